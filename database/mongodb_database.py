"""The MongoDB store (pymongo): one document an element, so that an element is stored whole or not at all.

Documents lie in the published place (collection data_elements, the eleven keys and score); what more we know is under
`asi`. A lease in the database lets one process write at a time, a group of writes each time. On a replica set a group
is one transaction besides. A stand-alone server has none: there a document is the unit that cannot be half-written, and
what follows from documents (the next index, the counts) is read from them after a write was cut off.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from pymongo import errors as mongo_errors
from pymongo.client_session import ClientSession
from pymongo.database import Database
from pymongo.read_concern import ReadConcern
from pymongo.write_concern import WriteConcern

from common.errors import StoreError
from database.background import Background
from database.errors import VanishedError
from database.group_writer import GroupWriter, Write
from database.mongodb_connection import connect, translated
from database.mongodb_counting import once_more, step
from database.mongodb_draft import COUNTING, Draft, SendError
from database.mongodb_lease import LEASE_SECONDS, Hold, Lease
from database.mongodb_mending import mend
from database.mongodb_opening import adopt, create_indexes
from database.mongodb_session import MongoSession
from database.mongodb_sizes import ServerSizes
from database.mongodb_state import Known
from database.store import without_secrets

__all__ = ["MongoStore"]

T = TypeVar("T")
_Outcome = tuple[Any, BaseException | None]
_LOG = logging.getLogger(__name__)
_VANISHINGS = 4
_CONFLICT_SECONDS = 0.05
_LARGEST_GROUP = 16 << 20
"""About how many bytes of new elements one transaction takes."""
_DEFAULT_DATABASE = "myapp"
_COUNTING_SECONDS = 2.0
"""How long a start, or a write that has to mend, waits for the elements to be counted; the rest is counted beside."""
_COUNTING_REST = 5.0


class _LostError(Exception):
    """The writes of a group were not kept, because of its cause.

    Args:
        again: whether nothing of them is there, so that each may be tried alone.
        spoiled: positions in the group of those of which something is there all the same, and that fail.
    """

    def __init__(self, again: bool, spoiled: Collection[int] = ()) -> None:
        super().__init__()
        self.again = again
        self.spoiled = spoiled


class MongoStore:
    """See `database.store.Store`.

    Args:
        url: mongodb://HOST:PORT/DATABASE; without a database "myapp", the published one.
        lock_timeout: seconds to wait for another process that writes.
        read_only: changes nothing, and needs no right to; every write is refused.
        transactions: False uses none, as on a stand-alone server, where the server would have them.

    Raises:
        StoreError: the server does not answer, refuses us, or holds two elements of one index.
    """

    snapshots = False

    def __init__(
        self, url: str, lock_timeout: float = 10.0, read_only: bool = False, transactions: bool = True
    ) -> None:
        self._lock_timeout = lock_timeout
        self._read_only = read_only
        self._known = Known()
        self._once_more = False
        """Whether everything is to be counted once more after the count that this start found going on."""
        self._url = url
        with translated(without_secrets(url)):
            self._client = connect(url)
            database = self._client.get_default_database(_DEFAULT_DATABASE)
            self._database: Database[dict[str, Any]] = database.with_options(write_concern=WriteConcern(w=1, j=True))
            hello = self._client.admin.command("hello")
            # Of a cluster, whose servers are connected to by now, there may be several.
            self._shown = f"{database.name} at {', '.join(sorted(f'{h}:{p}' for h, p in self._client.nodes))}"
            able = bool(hello.get("setName")) or hello.get("msg") == "isdbgrid"
            # One for all writes, which one thread does: its name lets the next holder of the lease end what it left.
            self._writer = self._client.start_session() if able and transactions else None
            self._lease = Lease(self._database, self._shown, self._writer)
            if not read_only:
                with self._patient() as patient:
                    self._prepare(patient)
        self._known.sizes = self._sizes = ServerSizes(self._ask_sizes)
        self._group: GroupWriter[MongoSession] = GroupWriter(self._commit, self._closed)
        self._counter = Background("counting", self._count, _COUNTING_REST)
        if not read_only:
            self._known.count = self._counter.wake
            self._counter.start()

    def read(self, work: Callable[[MongoSession], T]) -> T:
        """Repeats `work` where an element that it saw is gone: reads here are no snapshot."""
        vanished = 0
        while True:
            try:
                with translated(self._shown):
                    return work(MongoSession(self._database, known=self._known))
            except VanishedError:
                vanished += 1
                if vanished > _VANISHINGS:
                    raise

    def write(self, work: Callable[[MongoSession], T]) -> T:
        return self.submit(work).result()

    def submit(self, work: Callable[[MongoSession], T]) -> Future[T]:
        return self._group.submit(work)

    def close(self) -> None:
        self._counter.close()
        self._group.close()
        self._sizes.close()
        if self._writer is not None:
            self._writer.end_session()
        self._client.close()

    def _commit(self, group: Sequence[Write[MongoSession]]) -> None:
        """Keeps a group of writes under one lease, which is given up in between when it runs short."""
        if self._read_only:
            raise StoreError(f"{self._shown} was opened to be read only", "see what wrote to it")
        waiting, together = list(group), len(group) > 1
        while waiting:
            with translated(self._shown), self._lease.hold(self._lock_timeout) as hold:
                while waiting and time.monotonic() < hold.until:
                    self._mend(hold)
                    try:
                        outcomes = self._attempt(waiting if together else waiting[:1], hold)
                    except _LostError as lost:
                        assert lost.__cause__ is not None
                        if together and lost.again:
                            together = False
                            for place in sorted(lost.spoiled, reverse=True):
                                self._answer(waiting.pop(place), None, lost.__cause__)
                            continue
                        if together:
                            raise lost.__cause__ from None
                        outcomes = [(None, lost.__cause__)]
                    for value, failure in outcomes:
                        self._answer(waiting.pop(0), value, failure)

    def _answer(self, write: Write[MongoSession], value: Any, failure: BaseException | None) -> None:
        if failure is None:
            write.succeed(value)
            return
        try:
            with translated(self._shown):
                raise failure
        except BaseException as error:  # noqa: BLE001 - it is the outcome of this write, and of no other
            write.fail(error)

    def _attempt(self, group: Sequence[Write[MongoSession]], hold: Hold) -> list[_Outcome]:
        """(value, error) of the first writes of a group, as many as go together, once they are on disk.

        Raises:
            _LostError: none of them was kept.
        """
        if self._writer is None:
            return self._one_by_one(group, hold)
        deadline = time.monotonic() + self._lock_timeout
        while True:
            draft = Draft(self._database, self._writer)
            committing = False
            self._writer.start_transaction(ReadConcern("snapshot"), WriteConcern("majority", j=True))
            try:
                outcomes = self._outcomes(group, draft, hold)
                draft.send()
                committing = True
                self._finish(self._writer, deadline)
                return outcomes
            except (SendError, mongo_errors.PyMongoError) as error:
                cause = error.__cause__ if isinstance(error, SendError) else error
                assert cause is not None
                transient = isinstance(cause, mongo_errors.PyMongoError) and cause.has_error_label(
                    "TransientTransactionError"
                )
                if not transient or time.monotonic() > deadline:
                    away = isinstance(cause, mongo_errors.ConnectionFailure)
                    raise _LostError(again=not (away or committing)) from cause
                time.sleep(_CONFLICT_SECONDS)
            finally:
                if self._writer.in_transaction:
                    self._writer.abort_transaction()

    def _one_by_one(self, group: Sequence[Write[MongoSession]], hold: Hold) -> list[_Outcome]:
        """As `_attempt`, without a transaction."""
        draft = Draft(self._database)
        try:
            outcomes = self._outcomes(group, draft, hold)
            draft.send()
            return outcomes
        except SendError as error:
            hold.broken = True
            cause = error.__cause__
            away = isinstance(cause, mongo_errors.ConnectionFailure)
            # Another holder, after this one stood still, may have answered from what was sent.
            taken = not away and hold.renew() and draft.take_back()
            raise _LostError(again=taken, spoiled=draft.changed_by) from cause

    def _outcomes(self, group: Sequence[Write[MongoSession]], draft: Draft, hold: Hold) -> list[_Outcome]:
        outcomes: list[_Outcome] = []
        for place, write in enumerate(group):
            if outcomes and (draft.size > _LARGEST_GROUP or time.monotonic() > hold.until):
                break
            mark = draft.mark()
            try:
                session = MongoSession(self._database, self._writer, draft, self._known)
                outcomes.append((write.work(session), None))
            except BaseException as error:  # it is the outcome of this write, unless others are lost with it
                if isinstance(error, SendError) or (self._writer and isinstance(error, mongo_errors.PyMongoError)):
                    raise
                if not draft.forget_since(mark):
                    if self._writer is not None:
                        raise _LostError(again=True) from error
                    hold.broken = True
                outcomes.append((None, error))
            finally:
                if draft.changes != mark.changes:
                    draft.changed_by.add(place)
        return outcomes

    def _finish(self, session: ClientSession, deadline: float) -> None:
        """Commits; asks again where the answer was lost."""
        while True:
            try:
                session.commit_transaction()
                return
            except mongo_errors.PyMongoError as error:
                if not error.has_error_label("UnknownTransactionCommitResult") or time.monotonic() > deadline:
                    raise

    def _mend(self, hold: Hold) -> None:
        """Puts right what a write that was cut off left behind; in a transaction nothing is."""
        if hold.broken and (hold.marked or self._writer is None):
            with self._patient() as patient:
                self._say(mend(patient, seconds=_COUNTING_SECONDS))
            self._counter.wake()
        hold.broken = hold.marked = False

    def _count(self) -> bool:
        """Counts some of the elements, where that is not done; whether more are left. What a killed holder left is
        mended, though nobody writes: its counts may be wrong."""
        if not self.read(lambda session: session.state(COUNTING)):
            # It has ended.
            self._known.counted = True
            with translated(self._shown):
                cut_off = self._lease.cut_off()
            if cut_off:
                self.write(lambda session: None)
                return True
            if not self._once_more:
                return False
            self._once_more = False
            self.write(once_more)
            return True
        said = self.write(step)
        self._say(said or [])
        return said is None

    def _ask_sizes(self, milliseconds: int) -> dict[str, Any]:
        return self._database.command("dbStats", maxTimeMS=milliseconds)

    @contextlib.contextmanager
    def _patient(self) -> Iterator[Database[dict[str, Any]]]:
        """The database, for what may take as long as it takes: indexes are built, everything is counted."""
        with connect(self._url, patient=True) as client:
            yield client[self._database.name].with_options(write_concern=self._database.write_concern)

    def _say(self, lines: Sequence[str]) -> None:
        for line in lines:
            _LOG.warning("%s: put right: %s", self._shown, line)

    def _closed(self) -> StoreError:
        return StoreError(f"{self._shown} is closed", "open it again")

    def cache_file(self) -> str | None:
        return None

    def _prepare(self, database: Database[dict[str, Any]]) -> None:
        create_indexes(database, self._shown)
        # A holder that was killed keeps the lease until it runs out.
        with self._lease.hold(LEASE_SECONDS + self._lock_timeout) as hold:
            adopt(database)
            # Without transactions the last write may have been cut off, whatever the lease says.
            cut_off = self._writer is None or hold.marked
            doubtful = hold.marked or (hold.broken and self._writer is None)
            # They may have been counted before.
            self._once_more = MongoSession(database).state(COUNTING) is not None
            # In any case everything is counted: another program may have stored or removed elements.
            self._say(mend(database, cut_off, doubtful, _COUNTING_SECONDS))
            hold.broken = hold.marked = False
