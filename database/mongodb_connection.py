"""The connection to a MongoDB server, and what the driver says as errors that tell what to do."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import pymongo
from bson.errors import BSONError
from pymongo import errors as mongo_errors

from common.errors import StoreError
from database.mongodb_draft import SendError
from database.store import StoreBusyError, StoreFullError, without_secrets

__all__ = ["connect", "translated"]

ANSWER_SECONDS = 25.0
"""How long the server is waited for, unless patiently."""


def connect(url: str, patient: bool = False) -> pymongo.MongoClient[dict[str, Any]]:
    """
    Args:
        patient: an answer may take as long as it takes, such as that to the building of an index.

    Raises:
        StoreError: the URL names no server.
    """
    try:
        return pymongo.MongoClient(
            url,
            serverSelectionTimeoutMS=5000,
            connectTimeoutMS=5000,
            socketTimeoutMS=None if patient else int(1000 * ANSWER_SECONDS),
            retryWrites=False,
        )
    except ValueError as error:
        raise StoreError(
            f"{without_secrets(url)} names no MongoDB server: {error}",
            "write mongodb://USER:PASSWORD@HOST:PORT/DATABASE, each of :/?#[]@% in a password as % and two hex digits",
        ) from error


@contextlib.contextmanager
def translated(shown: str) -> Iterator[None]:
    """Raises what the driver says as an error that tells what to do; `shown` names the database."""
    try:
        yield
    except SendError as error:
        cause = error.__cause__
        assert cause is not None
        raise _translation(shown, cause) from cause
    except (mongo_errors.PyMongoError, BSONError) as error:
        raise _translation(shown, error) from error


def _translation(shown: str, error: BaseException) -> StoreError:
    error = _plain(error)
    if isinstance(error, mongo_errors.ConnectionFailure | mongo_errors.ExecutionTimeout):
        return StoreBusyError(
            f"expected a MongoDB server that answers at {_hosts(shown)}, got {_reason(shown, error)}",
            "start it, or correct --store mongodb://HOST:PORT/DATABASE",
        )
    if isinstance(error, mongo_errors.OperationFailure):
        # 112 WriteConflict; 14031 OutOfDiskSpace; 13 and 18 are refused credentials.
        if error.code == 112:
            return StoreBusyError(
                f"{shown}: a write that was cut off is in the way of this one", "try again in a minute"
            )
        if error.code == 14031:
            return StoreFullError(f"{shown}: {error}", "free disk space on the MongoDB server")
        fix = "correct the user and password in --store" if error.code in (13, 18) else "see the server's log"
        return StoreError(f"{shown}: {error}", fix)
    return StoreError(f"{shown}: {error}", "see the server's log, or correct --store mongodb://HOST:PORT/DATABASE")


def _hosts(shown: str) -> str:
    """HOST:PORT, or several, of a database that is shown by its URL or as one "at" them."""
    return shown.rpartition(" at ")[2].rpartition("://")[2].partition("/")[0]


def _reason(shown: str, error: BaseException) -> str:
    """What the driver says went wrong, without its settings and what it knows of each server."""
    text = re.sub(r" \(configured timeouts: [^)]*\)", "", str(error))
    text = re.split(r",? (?:Timeout|Topology Description|full error): ", text)[0]
    return text.removeprefix(f"{_hosts(shown)}: ")[:300]


def _plain(error: BaseException) -> BaseException:
    """What a request of several writes failed for. The driver's own error shows the whole document."""
    if not isinstance(error, mongo_errors.BulkWriteError):
        return error
    said = [*(error.details.get("writeErrors") or []), *(error.details.get("writeConcernErrors") or [])]
    first = said[0] if said else {}
    return mongo_errors.OperationFailure(str(first.get("errmsg") or "a write was refused")[:300], first.get("code"))
