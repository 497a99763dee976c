"""A real OpenSearch node with k-NN, built from Maven packages and run from one Java file, on loopback.

Needs Maven and a JDK of version 21 or newer; the jars (80 MB) are collected once into .cache/.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from common.process import REPOSITORY, spawn, terminate

HERE = Path(__file__).resolve().parent
OLDEST_JAVA = 21
START_SECONDS = 120
BUILD_SECONDS = 900


def find_jdk() -> Path:
    """The home of the newest JDK that is new enough; the test fails when there is none."""
    homes = [Path(os.environ["JAVA_HOME"])] if os.environ.get("JAVA_HOME") else []
    found = shutil.which("java")
    homes += [Path(found).resolve().parent.parent] if found else []
    for folder in (Path("/usr/lib/jvm"), Path.home() / ".sdkman/candidates/java", Path.home() / ".jdks"):
        homes += sorted(folder.iterdir()) if folder.is_dir() else []
    homes += sorted(Path("/Library/Java/JavaVirtualMachines").glob("*/Contents/Home"))
    versions = {home.resolve(): version for home in homes if (version := java_version(home))}
    best = max(versions, key=lambda home: versions[home], default=None)
    if best is None or versions[best] < OLDEST_JAVA:
        seen = ", ".join(f"{version} in {home}" for home, version in versions.items()) or "none"
        pytest.fail(
            f"the OpenSearch node needs a JDK {OLDEST_JAVA} or newer, found: {seen}\n"
            f"  fix: install one (Debian: apt-get install openjdk-21-jdk-headless) or set JAVA_HOME to one",
            pytrace=False,
        )
    return best


def java_version(home: Path) -> int:
    """Major version of the JDK in `home`, 0 where there is no JDK."""
    try:
        release = (home / "release").read_text()
    except OSError:
        return 0
    version = re.search(r'JAVA_VERSION="(\d+)', release)
    return int(version[1]) if version and (home / "bin" / "javac").exists() else 0


def jars(jdk: Path) -> Path:
    """The folder with lib/ and knn/, built by Maven when the pom changed."""
    pom = HERE / "pom.xml"
    folder = REPOSITORY / ".cache" / f"opensearch-{hashlib.sha256(pom.read_bytes()).hexdigest()[:12]}"
    if folder.is_dir():
        return folder
    maven = shutil.which("mvn")
    if maven is None:
        pytest.fail(
            "the OpenSearch node is built by Maven, and there is no mvn on the PATH\n"
            "  fix: install it (Debian: apt-get install maven)",
            pytrace=False,
        )
    folder.parent.mkdir(exist_ok=True)
    building = Path(tempfile.mkdtemp(dir=folder.parent, prefix="opensearch-building-"))
    try:
        done = subprocess.run(
            [maven, "-B", "-q", "-f", str(pom), f"-Dout={building}", "generate-resources"],
            env=os.environ | {"JAVA_HOME": str(jdk)},
            capture_output=True,
            text=True,
            timeout=BUILD_SECONDS,
        )
        if done.returncode != 0:
            pytest.fail(
                f"Maven could not collect the OpenSearch node: {(done.stdout + done.stderr)[-2000:]}", pytrace=False
            )
        building.replace(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def opensearch_node(home: Path) -> Iterator[str]:
    """A fresh node with its data in `home`: its URL while the block runs. It ends when its standard input does."""
    jdk = find_jdk()
    folder = jars(jdk)
    port = free_port()
    argv = [str(jdk / "bin" / "java"), "-Xms256m", "-Xmx512m", "-cp", f"{folder}/lib/*:{folder}/knn/*"]
    argv += [str(HERE / "OpenSearchNode.java"), str(home), str(port), str(free_port())]
    log = home / "node.log"
    home.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as errors:
        process = spawn(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)
        try:
            assert process.stdout is not None
            line = process.stdout.readline().decode().strip()
            if line != "ready":
                pytest.fail(f"the OpenSearch node did not start: {line} {log.read_text()[-3000:]}", pytrace=False)
            yield f"http://127.0.0.1:{port}"
        finally:
            terminate(process)
