"""The texts of a Hugging Face dataset, NAME:CONFIG, streamed in their order, also from a place of before on. NAME may
be a local folder.

The library says where a stream is (`state_dict`). A place here also names the document read last, which is read again
first: a dataset that has changed, or a library that counts otherwise, is noticed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from common.errors import JobError, UsageError, first_line

__all__ = ["HubDataset", "MovedError", "Place"]

_COLUMN = "text"


class MovedError(Exception):
    """The document at a place is not the one that was there."""


@dataclass(frozen=True)
class Place:
    """Behind a document.

    Attributes:
        documents: rows up to there.
        before: the library's state before that document.
        last: SHA-256 of that document, in hex.
    """

    documents: int
    before: dict[str, Any]
    last: str


def _identity_of(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


class HubDataset:
    """A dataset that was found.

    Attributes:
        revision: another one where the dataset's files are others, or the library is.
        place: behind the text that `documents` yielded last; None before the first.

    Raises:
        UsageError: it is empty.
        JobError: it can be reached neither on the hub nor in the local cache.
    """

    def __init__(self, dataset: str) -> None:
        self.name = dataset
        self.place: Place | None = None
        name, _, configuration = dataset.partition(":")
        try:
            from datasets import load_dataset_builder

            builder = load_dataset_builder(name, configuration)
            self._stream = builder.as_streaming_dataset(split="train")
        except StopIteration as error:  # the library looks for the columns in the first row
            raise self._empty() from error
        # A foreign library, which raises whatever those below it do.
        except Exception as error:
            raise JobError(
                f"the dataset {name} ({configuration}) is not reachable: {first_line(error)}",
                "correct data.dataset, connect to huggingface.co, use --profile cpu, or train on your own files with "
                "--training.text FILE",
            ) from error
        self.revision = f"{builder.hash} {version('datasets')}"

    def texts(self) -> Iterator[str]:
        """All texts; see `documents`."""
        return (text for text, _ in self.documents())

    def documents(self, place: Place | None = None) -> Iterator[tuple[str, bytes]]:
        """The texts, or those behind `place`, each with its SHA-256. Rows without one (null) are passed over.

        Raises:
            UsageError: there is no document, or no column of texts.
            JobError: the stream broke off.
            MovedError: another document is at `place`.
        """
        count = 0
        if place is not None:
            self._stream.load_state_dict(place.before)
            count = place.documents - 1
        rows = iter(self._stream)
        try:
            while True:
                before = self._stream.state_dict()
                row = self._next(rows, count)
                if row is None:
                    break
                count += 1
                text = self._text_of(row, count)
                if text is None:
                    continue
                identity = _identity_of(text)
                if place is not None:
                    if identity.hex() != place.last:
                        raise MovedError
                    place = None
                    continue
                self.place = Place(count, before, identity.hex())
                yield text, identity
        finally:
            rows.close()
        if place is not None:
            raise MovedError
        if count == 0:
            raise self._empty()

    def _empty(self) -> UsageError:
        return UsageError(f"the dataset {self.name} is empty: split train holds no document", "correct data.dataset")

    def _next(self, rows: Iterator[dict[str, Any]], count: int) -> dict[str, Any] | None:
        try:
            return next(rows, None)
        # A foreign library, as above: a server that hangs up, a damaged file, a full disk of its cache.
        except Exception as error:
            raise JobError(
                f"the dataset {self.name} broke off after {count:,} documents: {first_line(error)}",
                "repeat the command: it goes on from what is kept",
            ) from error

    def _text_of(self, row: dict[str, Any], number: int) -> str | None:
        if _COLUMN not in row:
            raise UsageError(
                f"the dataset {self.name} has no column {_COLUMN!r}: its columns are {', '.join(row)}",
                "name another dataset or configuration in data.dataset",
            )
        text = row[_COLUMN]
        if text is None or isinstance(text, str):
            return text
        raise UsageError(
            f"document {number:,} of the dataset {self.name} is no text: its column {_COLUMN!r} holds "
            f"{type(text).__name__}",
            "name another dataset or configuration in data.dataset",
        )
