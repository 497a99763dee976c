"""What a docker job is: the body of the request that creates its container, and what its image must hold."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training import bubblewrap
from training.sandbox_job import Limits

__all__ = ["API", "IMAGE", "LABEL", "PROBE", "PYTHON", "Job", "container_config", "expected", "fix"]

IMAGE = "asi-arch-worker"
PYTHON = "/usr/local/bin/python"
LABEL = "asi-arch.owner"

API = "1.41"
"""The oldest version that knows all that is asked for (Docker 20.10)."""
_START_MB = 1024
"""Memory of Python and torch themselves; docker counts it and the pages of the temporary folders with the job's."""
_CUDA_CPUS = 4
"""CPUs of a job that also compiles kernels; on CPU a job has as many as its OMP_NUM_THREADS."""
_VERSIONS = ("torch", "numpy", "einops")
_NOT_THERE = (*bubblewrap.HELD_OUT_PACKAGES, *bubblewrap.JUDGING_PACKAGES)

PROBE = (
    "import importlib.metadata as m, importlib.util as u, sys, training\n"
    f"held = [name for name in {_NOT_THERE!r} if u.find_spec(name)]\n"
    "python = '%d.%d' % sys.version_info[:2]\n"
    f"versions = [name + ' ' + m.version(name).split('+')[0] for name in {_VERSIONS!r}]\n"
    "print('python', python, *versions, *held, flush=True)\n"
)
"""Says what the image holds; see `expected`."""


def expected() -> bytes:
    """What the probe job prints in an image that fits: our own versions, and no package that holds held-out text or
    judges."""
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    return " ".join(["python", python, *(f"{name} {_version(name)}" for name in _VERSIONS)]).encode() + b"\n"


def _version(name: str) -> str:
    """Without the part that tells builds apart: 2.13.0+cpu is 2.13.0."""
    return importlib.metadata.version(name).split("+")[0]


def fix(image: str) -> str:
    """What to do about an image that is missing or does not fit."""
    return f"build it from the repository root: docker build --target worker -t {image} ."


@dataclass(frozen=True)
class Job:
    """What a container is made from.

    Attributes:
        command: absolute path of a program in the image, and its arguments.
        reads: path in the container -> path on the daemon's machine, read-only.
        env: the whole environment, once the shim has dropped what the image adds.
        uid: numeric user and group.
        device: "cuda" passes the GPUs through, those of CUDA_VISIBLE_DEVICES where that is set.
        copies: folder to remove at the end.
    """

    command: Sequence[str]
    reads: Mapping[Path, Path]
    env: Mapping[str, str]
    limits: Limits
    uid: int
    device: str
    image: str = IMAGE
    copies: Path | None = None


def container_config(job: Job, owner: str, version: str = API) -> dict[str, Any]:
    """The body of the request that creates the container of `job`; needs no daemon.

    Args:
        owner: value of the label by which the guard finds it.
        version: of the API.
    """
    from docker import types

    places = {bubblewrap.SHIM: bubblewrap.SHIM, **job.reads}
    binds = [types.Mount(str(path), str(source), type="bind", read_only=True) for path, source in places.items()]
    executable = "exec" if job.device == "cuda" else "noexec"  # compiled kernels are loaded from there
    cuda = job.device == "cuda"
    limits, shared = job.limits, bubblewrap.SHM_MB[job.device]
    memory = None if limits.memory_mb is None else limits.memory_mb + limits.file_mb + shared + _START_MB
    host = types.HostConfig(
        version,
        network_mode="none",
        ipc_mode="private",
        cgroupns="private",
        read_only=True,
        privileged=False,
        cap_drop=["ALL"],
        security_opt=["no-new-privileges:true"],
        mounts=binds,
        tmpfs={
            "/tmp": f"rw,nosuid,nodev,{executable},size={limits.file_mb << 20},nr_inodes={limits.entries},mode=1777"
        },
        shm_size=shared << 20,
        mem_limit=None if memory is None else memory << 20,
        memswap_limit=None if memory is None else memory << 20,  # the same: no swap
        pids_limit=limits.processes + 8,  # docker's init and the shim's threads are counted
        nano_cpus=(_CUDA_CPUS if cuda else int(job.env.get("OMP_NUM_THREADS", "1"))) * 10**9,
        ulimits=[
            types.Ulimit(name="core", soft=0, hard=0),
            types.Ulimit(name="nofile", soft=limits.files, hard=limits.files),
            types.Ulimit(name="fsize", soft=limits.file_mb << 20, hard=limits.file_mb << 20),
        ],
        log_config=types.LogConfig(type=types.LogConfig.types.NONE),  # what it prints must not fill the daemon's disk
        init=True,  # reaps what its processes leave, and makes signals work as outside
        oom_score_adj=500,
        device_requests=[_gpus()] if cuda else None,
    )
    config = types.ContainerConfig(
        version,
        job.image,
        list(job.command[1:]),
        entrypoint=[job.command[0]],  # also keeps the image's own command out
        hostname="sandbox",
        user=f"{job.uid}:{job.uid}",
        environment=dict(job.env),
        stdin_open=True,
        network_disabled=True,
        working_dir="/tmp",
        labels={LABEL: owner},
        healthcheck={"test": ["NONE"]},
        host_config=host,
    )
    # Attached before the start; when our connection ends, so does its standard input.
    return {**config, "AttachStdin": True, "AttachStdout": True, "AttachStderr": True, "StdinOnce": True}


def _gpus() -> dict[str, Any]:
    from docker import types

    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    chosen: dict[str, Any] = {"device_ids": visible} if visible else {"count": -1}
    return types.DeviceRequest(capabilities=[["gpu", "compute", "utility"]], **chosen)
