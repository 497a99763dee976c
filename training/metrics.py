"""The one stream of a run's metrics: metrics.jsonl, one object a line, written as the run goes on.

The monitor, plots and optional other writers (training/metric_writers.py) are fed from the same objects.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from common.errors import StoreError, message_of
from training.metric_writers import Writer

__all__ = ["FILE", "Metrics"]

FILE = "metrics.jsonl"
Opener = Callable[[], Writer]


class Metrics:
    """Writes into `folder`; a context manager. An object's None values are kept: a missing number is no number.

    Args:
        openers: each makes one more writer, which gets the same objects. One that fails later on gets no more of them:
            a run does not end for what nothing is read from.
        note: told in a line which writer failed, and how.

    Raises:
        StoreError: from every method, when the disk is full or the folder cannot be written.
    """

    def __init__(
        self, folder: Path, openers: Sequence[Opener] = (), note: Callable[[str], None] = lambda text: None
    ) -> None:
        self._path, self._openers, self._note = folder / FILE, openers, note
        self._file: IO[str] | None = None
        self._writers: list[Writer] = []

    def begin(self) -> None:
        """Starts over with an empty stream. Raises also what keeps a writer from being made."""
        self.close()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("w", encoding="utf-8", buffering=1)
            for opened in self._openers:
                self._writers.append(opened())
        except OSError as error:
            raise self._failed(error) from error

    def add(self, line: Mapping[str, Any]) -> None:
        try:
            if self._file is not None:
                self._file.write(json.dumps(line, allow_nan=False) + "\n")
        except OSError as error:
            raise self._failed(error) from error
        self._writers = [writer for writer in self._writers if self._did(writer, lambda writer: writer.add(line))]

    def close(self) -> None:
        file, writers = self._file, self._writers
        self._file, self._writers = None, []
        for writer in writers:
            self._did(writer, lambda writer: writer.close())
        try:
            if file is not None:
                file.close()
        except OSError as error:
            raise self._failed(error) from error

    def _did(self, writer: Writer, work: Callable[[Writer], None]) -> bool:
        """Whether the writer could do it; where not, a note says so."""
        try:
            work(writer)
        except (OSError, StoreError) as error:
            self._note(f"no more metrics for {type(writer).__name__}: {message_of(error)}; {FILE} has all of them")
            return False
        return True

    def _failed(self, error: OSError) -> StoreError:
        return StoreError(
            f"cannot write {self._path}: {error.strerror or error}", "free disk space, or name another --out"
        )

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
