"""The MongoDB store (pymongo): one document an element, so that an element is stored whole or not at all.

Documents lie in the published place (collection data_elements, the eleven keys and score); what more we know is under
`asi`. A lease in the database lets one process write at a time. On a replica set every write is a transaction
besides. A stand-alone server has none: there a document is the unit that cannot be half-written, and what follows
from documents (which elements are new, the next index) is read from them, so an interrupted write is completed by the
next one.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from datetime import UTC
from typing import Any, TypeVar

import pymongo
from bson import ObjectId
from bson.errors import BSONError
from pymongo import errors as mongo_errors
from pymongo.client_session import ClientSession
from pymongo.database import Database
from pymongo.read_concern import ReadConcern
from pymongo.write_concern import WriteConcern

from common.errors import StoreError
from database.errors import VanishedError
from database.evaluate_agent.score import evidence_of, parse_table
from database.group_writer import GroupWriter, Write
from database.models import NewElement
from database.mongodb_documents import ELEMENTS, STATE, document_of, element_of
from database.mongodb_ledger import adopt_programs
from database.mongodb_mending import mend
from database.mongodb_session import MongoSession
from database.store import NewEntry, StoreBusyError, StoreFullError, without_secrets

__all__ = ["MongoStore"]

T = TypeVar("T")
_LOG = logging.getLogger(__name__)
_LEASE_SECONDS = 20.0
_VANISHINGS = 4
_CONFLICT_SECONDS = 0.05
_DEFAULT_DATABASE = "myapp"


class MongoStore:
    """See `database.store.Store`.

    Args:
        url: mongodb://HOST:PORT/DATABASE; without a database "myapp", the published one.
        lock_timeout: seconds to wait for another process that writes.
        read_only: changes nothing, and needs no right to; every write is refused.

    Raises:
        StoreError: the server does not answer, refuses us, or holds two elements of one index.
    """

    def __init__(self, url: str, lock_timeout: float = 10.0, read_only: bool = False) -> None:
        self._lock_timeout = lock_timeout
        self._read_only = read_only
        self._owner = uuid.uuid4().hex
        with _translated(without_secrets(url)):
            self._client = _client(url)
            database = self._client.get_default_database(_DEFAULT_DATABASE)
            self._shown = (
                f"{database.name} at {', '.join(f'{host}:{port}' for host, port in [self._client.address or ('?', 0)])}"
            )
            self._database: Database[dict[str, Any]] = database.with_options(write_concern=WriteConcern(w=1, j=True))
            hello = self._client.admin.command("hello")
            at = hello.get("localTime")
            self._clock_offset = at.replace(tzinfo=UTC).timestamp() - time.time() if at is not None else 0.0
            transactions = bool(hello.get("setName")) or hello.get("msg") == "isdbgrid"
            # One for all writes, which one thread does: its name lets the next holder of the lease end what it left.
            self._writer = self._client.start_session() if transactions else None
            if not read_only:
                self._prepare()
        self._group: GroupWriter[MongoSession] = GroupWriter(self._commit, self._closed)

    def read(self, work: Callable[[MongoSession], T]) -> T:
        """Repeats `work` where an element that it saw is gone: reads here are no snapshot."""
        vanished = 0
        while True:
            try:
                with _translated(self._shown):
                    return work(MongoSession(self._database))
            except VanishedError:
                vanished += 1
                if vanished > _VANISHINGS:
                    raise

    def write(self, work: Callable[[MongoSession], T]) -> T:
        return self.submit(work).result()

    def submit(self, work: Callable[[MongoSession], T]) -> Future[T]:
        return self._group.submit(work)

    def close(self) -> None:
        self._group.close()
        if self._writer is not None:
            self._writer.end_session()
        self._client.close()

    def _commit(self, group: Sequence[Write[MongoSession]]) -> None:
        """Does a group of writes one by one under one lease, which is given up in between when it runs short."""
        if self._read_only:
            raise StoreError(f"{self._shown} was opened to be read only", "see what wrote to it")
        waiting = list(group)
        while waiting:
            with _translated(self._shown), self._lease(self._lock_timeout) as until:
                while waiting and time.monotonic() < until:
                    self._do(waiting.pop(0))

    def _do(self, write: Write[MongoSession]) -> None:
        try:
            with _translated(self._shown):
                write.succeed(self._transact(write.work))
        except BaseException as error:  # noqa: BLE001 - it is the outcome of this write, and of no other
            write.fail(error)

    def _transact(self, work: Callable[[MongoSession], T]) -> T:
        """Runs `work`, on a server that has them as a transaction; again while others are in its way, for at most
        `lock_timeout`."""
        if self._writer is None:
            return work(MongoSession(self._database))
        deadline = time.monotonic() + self._lock_timeout
        while True:
            self._writer.start_transaction(ReadConcern("snapshot"), WriteConcern("majority", j=True))
            try:
                value = work(MongoSession(self._database, self._writer))
                self._finish(self._writer, deadline)
                return value
            except mongo_errors.PyMongoError as error:
                if not error.has_error_label("TransientTransactionError") or time.monotonic() > deadline:
                    raise
                time.sleep(_CONFLICT_SECONDS)
            finally:
                if self._writer.in_transaction:
                    self._writer.abort_transaction()

    def _finish(self, session: ClientSession, deadline: float) -> None:
        """Commits; asks again where the answer was lost."""
        while True:
            try:
                session.commit_transaction()
                return
            except mongo_errors.PyMongoError as error:
                if not error.has_error_label("UnknownTransactionCommitResult") or time.monotonic() > deadline:
                    raise

    def _closed(self) -> StoreError:
        return StoreError(f"{self._shown} is closed", "open it again")

    def cache_file(self) -> str | None:
        return None

    def _prepare(self) -> None:
        elements = self._database[ELEMENTS]
        try:
            elements.create_index("index", unique=True)
        except mongo_errors.OperationFailure as error:
            # 11000: the index cannot be built, since a number is held twice.
            if error.code != 11000:
                raise
            twice = ", ".join(MongoSession(self._database).check()[:10])
            raise StoreError(
                f"{self._shown}: {twice}", f"remove or renumber all but one of them in {ELEMENTS}, then start again"
            ) from error
        elements.create_index([("name", 1), ("time", 1), ("index", 1)])
        elements.create_index([("parent", 1), ("index", 1)])
        elements.create_index([("time", 1), ("index", 1)])
        elements.create_index([("asi.benchmark", -1), ("index", 1)])
        elements.create_index([("score", -1), ("index", 1)])
        elements.create_index([("asi.complete", 1), ("index", 1)])
        elements.create_index([("asi.pending", 1), ("index", 1)])
        elements.create_index([("asi.baseline_key", 1), ("score", -1), ("index", 1)])
        elements.create_index([("asi.baseline_key", 1), ("asi.revision", 1), ("index", 1)])
        elements.create_index([("asi.vector.model", 1), ("asi.vector.sequence", 1)])
        elements.create_index("asi.key", unique=True, sparse=True)
        elements.create_index("asi.sketch_sequence", sparse=True)
        elements.create_index("asi.fingerprint", sparse=True)
        self._adopt()
        adopt_programs(self._database)
        # A holder that was killed keeps the lease until it runs out.
        with self._lease(_LEASE_SECONDS + self._lock_timeout):
            lines = mend(self._database) if self._writer is None else []
            session = MongoSession(self._database)
            for newest in session.ranked("newest", limit=1):
                # A store of the published service has no counter of ours.
                session.ledger.reserve(int(newest) + 1)
        for line in lines:
            _LOG.warning("%s: a write was cut off before: %s", self._shown, line)

    def _adopt(self) -> None:
        """Adds what we keep to documents that another program, or an earlier release, stored; nothing of theirs is
        changed, and the score they gave is kept beside the one that is computed now."""
        elements = self._database[ELEMENTS]
        for found in elements.find({"asi": {"$exists": False}, "index": {"$type": "number"}}):
            element = element_of(found)
            entry = NewEntry(
                element=NewElement.model_validate(element.model_dump(exclude={"index"})),
                evidence=evidence_of(element.result.train, element.result.test, None),
                complete=parse_table(element.result.train).complete and parse_table(element.result.test).complete,
            )
            ours = document_of(entry, element.index)["asi"] | {"adopted_score": found.get("score")}
            elements.update_one({"_id": found["_id"], "asi": {"$exists": False}}, {"$set": {"asi": ours}})
        earlier = {"asi": {"$exists": True}, "asi.revision": {"$exists": False}}
        elements.update_many(earlier | {"asi.evaluation": None}, {"$set": {"asi.revision": None}})
        elements.update_many(earlier, {"$set": {"asi.revision": 0}})
        # Sketches without a place in their order are made again.
        elements.update_many(
            {"asi.sketch": {"$exists": True}, "asi.sketch_sequence": {"$exists": False}},
            {"$set": {"asi.pending": True}},
        )

    @contextlib.contextmanager
    def _lease(self, wait: float) -> Iterator[float]:
        """Holds the right to write: a document that names its holder until a time. A holder that died lets it run
        out.

        Args:
            wait: seconds to wait for another holder.

        Yields:
            Until when (time.monotonic) another write may be begun: half of the lease is left for it then.
        """
        leases = self._database[STATE]
        with contextlib.suppress(mongo_errors.DuplicateKeyError):
            leases.update_one({"_id": "lease"}, {"$setOnInsert": {"owner": "", "until": 0.0}}, upsert=True)
        deadline = time.monotonic() + wait
        token = f"{self._owner}-{ObjectId()}"
        while True:
            now = self._server_time()
            mine = {"owner": token, "until": now + _LEASE_SECONDS, "session": self._session_name()}
            before = leases.find_one_and_update({"_id": "lease", "until": {"$lt": now}}, {"$set": mine})
            if before is not None:
                self._end_transaction_of(before)
                break
            if time.monotonic() > deadline:
                raise StoreBusyError(f"{self._shown}: another process has been writing for {wait:g} s", "try again")
            time.sleep(0.005)
        done = threading.Event()
        keeper = threading.Thread(target=self._keep_lease, args=(token, done), name="lease", daemon=True)
        keeper.start()
        try:
            yield time.monotonic() + _LEASE_SECONDS / 2
        finally:
            done.set()
            leases.update_one({"_id": "lease", "owner": token}, {"$set": {"until": 0.0}})

    def _session_name(self) -> Any:
        return None if self._writer is None else self._writer.session_id["id"]

    def _end_transaction_of(self, before: dict[str, Any]) -> None:
        """Ends what the holder before left open, if it did not give the lease back: its transaction would be in the way
        of every write for a minute, and a holder that only stood still must not go on with it."""
        name = before.get("session")
        if before["until"] and name is not None and name != self._session_name():
            # A server, or a user, that may not do so lets it run out.
            with contextlib.suppress(mongo_errors.OperationFailure):
                self._client.admin.command("killSessions", [{"id": name}])

    def _keep_lease(self, token: str, done: threading.Event) -> None:
        """Prolongs the lease of a long write, in a thread of its own, until it is given back."""
        while not done.wait(_LEASE_SECONDS / 3):
            with contextlib.suppress(mongo_errors.PyMongoError):
                until = self._server_time() + _LEASE_SECONDS
                self._database[STATE].update_one({"_id": "lease", "owner": token}, {"$set": {"until": until}})

    def _server_time(self) -> float:
        """Now by the server's clock, the only one that all processes share."""
        return time.time() + self._clock_offset


def _client(url: str) -> pymongo.MongoClient[dict[str, Any]]:
    """Raises StoreError for a URL that names no server."""
    try:
        return pymongo.MongoClient(
            url, serverSelectionTimeoutMS=5000, connectTimeoutMS=5000, socketTimeoutMS=25000, retryWrites=False
        )
    except ValueError as error:
        raise StoreError(
            f"{without_secrets(url)} names no MongoDB server: {error}",
            "write mongodb://USER:PASSWORD@HOST:PORT/DATABASE, each of :/?#[]@% in a password as % and two hex digits",
        ) from error


@contextlib.contextmanager
def _translated(shown: str) -> Iterator[None]:
    """Raises what the driver says as an error that tells what to do."""
    try:
        yield
    except (mongo_errors.ConnectionFailure, mongo_errors.ExecutionTimeout) as error:
        raise StoreBusyError(
            f"the MongoDB server of {shown} does not answer: {str(error)[:300]}",
            "start it, or correct --store mongodb://HOST:PORT/DATABASE",
        ) from error
    except mongo_errors.OperationFailure as error:
        # 112 WriteConflict; 14031 OutOfDiskSpace; 13 and 18 are refused credentials.
        if error.code == 112:
            raise StoreBusyError(
                f"{shown}: a write that was cut off is in the way of this one", "try again in a minute"
            ) from error
        if error.code == 14031:
            raise StoreFullError(f"{shown}: {error}", "free disk space on the MongoDB server") from error
        fix = "correct the user and password in --store" if error.code in (13, 18) else "see the server's log"
        raise StoreError(f"{shown}: {error}", fix) from error
    except (mongo_errors.PyMongoError, BSONError) as error:
        raise StoreError(
            f"{shown}: {error}", "see the server's log, or correct --store mongodb://HOST:PORT/DATABASE"
        ) from error
