"""The data-dir: everything of one run in one folder, held by one pipeline at a time.

run.json            identity of the run: id, profile, seed, when it began; never changes
settings.toml       the settings as resolved at the last start
database.sqlite     elements, runs, scores, candidates (and its caches beside it)
baseline.json       the baseline that candidates are compared with, and the calibration runs behind it
roots/              training output of the user's own roots (--seed-program)
experiments/0001/   one folder an experiment: its journal, program and training output
pool/               final programs by name
logs/               what the services and jobs printed, and every call of a role
timings.json        wall seconds of the phases, for the table at the end
"""

from __future__ import annotations

import fcntl
import os
import threading
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from pydantic import FiniteFloat, TypeAdapter, ValidationError

from common.errors import BusyError, JournalError, StoreError, UsageError
from common.files import read_json, write_atomic, write_json
from common.settings import Settings
from common.settings_toml import dump_toml
from pipeline.experiment import Experiment

__all__ = ["Workspace", "now", "read_timings"]

_TIMINGS = TypeAdapter(dict[str, FiniteFloat])


class Workspace:
    """One opened data-dir.

    Args:
        root: the folder; made if it is not there.

    Attributes:
        notes: what a person should know of what was found, a line each.

    Raises:
        UsageError: the folder cannot be made or written.
        BusyError: another pipeline holds it.
        JournalError: run.json is damaged.
        UsageError: run.json belongs to another profile or seed.
    """

    def __init__(self, root: Path, settings: Settings) -> None:
        self.root = root.resolve()
        try:
            for folder in (self.root, self.roots, self.experiments, self.pool, self.logs):
                folder.mkdir(parents=True, exist_ok=True)
            self._lock = self._hold()
        except OSError as error:
            raise UsageError(
                f"cannot write the data-dir {self.root}: {error.strerror}",
                "choose a folder you may write: --data-dir DIR",
            ) from error
        self._timings_lock = threading.Lock()
        try:
            self.run_id = self._identify(settings)
            self.notes = self._set_damaged_times_aside()
            write_atomic(self.root / "settings.toml", dump_toml(settings))
        except BaseException:
            self.close()
            raise

    @property
    def roots(self) -> Path:
        return self.root / "roots"

    @property
    def experiments(self) -> Path:
        return self.root / "experiments"

    @property
    def pool(self) -> Path:
        return self.root / "pool"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def database(self) -> Path:
        return self.root / "database.sqlite"

    def _hold(self) -> IO[str]:
        handle = (self.root / "lock").open("a+")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            handle.seek(0)
            owner = handle.read().strip() or "unknown"
            handle.close()
            raise BusyError(
                f"the data-dir {self.root} is in use by another pipeline (process {owner})",
                "wait for it, or give this one its own --data-dir; many pipelines share one database by "
                "--services.database_url",
            ) from error
        handle.seek(0)
        handle.truncate()
        handle.write(str(os.getpid()))
        handle.flush()
        return handle

    def _identify(self, settings: Settings) -> str:
        path = self.root / "run.json"
        wanted = {"profile": settings.run.profile, "seed": settings.run.seed}
        if not path.exists():
            identity = {"run_id": uuid.uuid4().hex, "created": now(), **wanted}
            write_json(path, identity)
            return str(identity["run_id"])
        try:
            found = read_json(path)
        except StoreError as error:
            raise JournalError(
                error.message, f"restore {path} from a backup, or start over with another --data-dir"
            ) from error
        if not isinstance(found, dict) or not isinstance(found.get("run_id"), str):
            raise JournalError(
                f"{path}: expected run_id, profile and seed, got {str(found)[:80]!r}", "use another --data-dir"
            )
        if not any(self.experiments.iterdir()) and not (self.root / "baseline.json").exists():
            # An earlier start failed before it did anything, so nothing is bound to what it was asked for.
            write_json(path, {**found, **wanted})
            return str(found["run_id"])
        for key, value in wanted.items():
            if found.get(key) != value:
                raise UsageError(
                    f"{self.root} was begun with {key} {found.get(key)!r}, now {value!r} is asked for",
                    f"repeat --{key} {found.get(key)}, or use another --data-dir",
                )
        return str(found["run_id"])

    def _set_damaged_times_aside(self) -> list[str]:
        """Times are for the table at the end alone: no reason to stop."""
        try:
            read_timings(self.root)
        except JournalError as error:
            aside = self.root / f"timings.damaged-{uuid.uuid4().hex[:8]}.json"
            (self.root / "timings.json").rename(aside)
            return [f"{error.message}. It is kept as {aside.name}; the table will lack the times of earlier starts."]
        return []

    def experiment(self, number: int) -> Experiment:
        """Number `number` of this run; its folder appears with its first stage."""
        return Experiment(number, self.experiments / f"{number:04d}", self.run_id)

    def record_time(self, phase: str, seconds: float) -> None:
        """Adds `seconds` to the wall time of `phase` in timings.json."""
        with self._timings_lock:
            timings = read_timings(self.root)
            timings[phase] = round(timings.get(phase, 0.0) + seconds, 3)
            write_json(self.root / "timings.json", timings)

    def close(self) -> None:
        """Lets the next pipeline in. The folder stays."""
        self._lock.close()


def read_timings(root: Path) -> dict[str, float]:
    """Wall seconds by phase of the run in `root`.

    Raises:
        JournalError: the file is damaged.
    """
    path = root / "timings.json"
    if not path.exists():
        return {}
    try:
        return _TIMINGS.validate_python(read_json(path))
    except (StoreError, ValidationError) as error:
        got = error.message if isinstance(error, StoreError) else f"got {path.read_text(encoding='utf-8')[:60]!r}"
        raise JournalError(
            f'{path}: expected seconds by phase, such as {{"corpus": 12.5}}; {got}',
            f"remove {path}; only the times of earlier starts are lost",
        ) from error


def now() -> str:
    """UTC time as the published database writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S")
