"""The right to write to a MongoDB store: a document that names its holder until a time, by the server's clock."""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC
from functools import partial
from typing import Any

from bson import ObjectId
from pymongo import errors as mongo_errors
from pymongo.client_session import ClientSession
from pymongo.database import Database
from pymongo.write_concern import WriteConcern

from database.mongodb_documents import STATE
from database.store import StoreBusyError

__all__ = ["LEASE_SECONDS", "Hold", "Lease"]

LEASE_SECONDS = 20.0
_ELAPSED = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
"""A clock that nobody sets, and that goes on while the machine sleeps; macOS has none but the second, which does so
there."""


@dataclass
class Hold:
    """The lease while it is held."""

    renew: Callable[[], bool]
    """Prolongs it by a whole lease from now; False where it was given back, or another holder has it or had it
    meanwhile."""
    until: float
    """Until when (time.monotonic) another write may be begun: half of the lease is left for it then."""
    broken: bool
    """Whether a write was cut off: by the holder before, until it was mended; now, for the next one to mend."""
    marked: bool = False
    """Whether it may have been cut off without a transaction around it, by a holder that had none."""


class Lease:
    """
    Args:
        shown: names the database in errors.
        writer: the session of this process's transactions, where the server has them.
    """

    def __init__(self, database: Database[dict[str, Any]], shown: str, writer: ClientSession | None) -> None:
        self._database = database
        self._shown = shown
        self._writer = writer
        self._owner = uuid.uuid4().hex
        at = database.client.admin.command("hello").get("localTime")
        now = time.time() if at is None else at.replace(tzinfo=UTC).timestamp()
        self._clock_offset = now - time.clock_gettime(_ELAPSED)
        # A release that is lost is waited for, which is no harm: it need not wait for the journal.
        self._unjournaled = database.get_collection(STATE, write_concern=WriteConcern(w=1, j=False))

    @contextlib.contextmanager
    def hold(self, wait: float) -> Iterator[Hold]:
        """Holds it. A holder that died lets it run out.

        Args:
            wait: seconds to wait for another holder.

        Raises:
            StoreBusyError: another one held it for longer.
        """
        token = f"{self._owner}-{ObjectId()}"
        before = self._acquire(token, wait)
        cut_off = bool(before["until"])
        stored = _unmended(before)
        hold = Hold(partial(self._renew, token), 0.0, broken=stored or cut_off, marked=stored)
        done = threading.Event()
        keeper = threading.Thread(target=self._keep, args=(token, done), name="lease", daemon=True)
        keeper.start()
        try:
            hold.until = time.monotonic() + LEASE_SECONDS / 2
            yield hold
        finally:
            done.set()
            self._give_back(token, hold.broken, stored, before.get("late"))

    def cut_off(self) -> bool:
        """Whether a write was cut off without a transaction around it, and nobody has mended that or is at it."""
        found = self._database[STATE].find_one({"_id": "lease"})
        return found is not None and found["until"] < self._server_time() and _unmended(found)

    def _give_back(self, token: str, broken: bool, stored: bool, late: int | None) -> None:
        """
        Args:
            broken: whether something is to be mended by the next one.
            stored: whether the document said so when the lease was taken.
            late: how many had marked it by then that had lost the lease.
        """
        mine, released = {"_id": "lease", "owner": token}, {"until": 0.0}
        if stored and not broken:
            # All is mended but for what was written beside this holder, which is marked meanwhile.
            mended = self._unjournaled.update_one(mine | {"late": late}, {"$set": released | {"broken": False}})
            if mended.matched_count:
                return
        changed = {"broken": True} if broken and not stored else {}
        if not self._unjournaled.update_one(mine, {"$set": released | changed}).matched_count:
            # It ran out, and another one wrote meanwhile: what was written on both sides may not agree.
            self._unjournaled.update_one({"_id": "lease"}, {"$set": {"broken": True}, "$inc": {"late": 1}})

    def _acquire(self, token: str, wait: float) -> dict[str, Any]:
        """Waits for it; what its document said before."""
        leases = self._database[STATE]
        deadline = time.monotonic() + wait
        created = False
        while True:
            now = self._server_time()
            mine = {"owner": token, "until": now + LEASE_SECONDS, "session": self._session_name()}
            before = leases.find_one_and_update({"_id": "lease", "until": 0.0}, {"$set": mine})
            if before is None:
                before = self._take_over(mine, now)
            if before is not None:
                return before
            if not created:
                # Nobody ever held it, or somebody holds it.
                created = True
                with contextlib.suppress(mongo_errors.DuplicateKeyError):
                    leases.update_one({"_id": "lease"}, {"$setOnInsert": {"owner": "", "until": 0.0}}, upsert=True)
                continue
            if time.monotonic() > deadline:
                raise StoreBusyError(f"{self._shown}: another process has been writing for {wait:g} s", "try again")
            time.sleep(0.005)

    def _take_over(self, mine: dict[str, Any], now: float) -> dict[str, Any] | None:
        """Takes it where it ran out; what its document said before. That something has to be mended is marked by the
        same request: this process may be killed before it has done so."""
        leases = self._database[STATE]
        ended = leases.find_one({"_id": "lease", "until": {"$lt": now}})
        if ended is None:
            return None
        same = {name: ended.get(name) for name in ("_id", "owner", "until", "session")}
        mark = {"broken": True} if _unmended(ended) else {}
        before: dict[str, Any] | None = leases.find_one_and_update(same, {"$set": mine | mark})
        if before is not None:
            self._end_transaction_of(before)
        return before

    def _session_name(self) -> Any:
        return None if self._writer is None else self._writer.session_id["id"]

    def _end_transaction_of(self, before: dict[str, Any]) -> None:
        """Ends what the holder before left open, if it did not give the lease back: its transaction would be in the way
        of every write for a minute, and a holder that only stood still must not go on with it."""
        name = before.get("session")
        if before["until"] and name is not None and name != self._session_name():
            # A server, or a user, that may not do so lets it run out.
            with contextlib.suppress(mongo_errors.OperationFailure):
                self._database.client.admin.command("killSessions", [{"id": name}])

    def _keep(self, token: str, done: threading.Event) -> None:
        """Prolongs the lease of a long write, in a thread of its own, until it is given back."""
        while not done.wait(LEASE_SECONDS / 3):
            with contextlib.suppress(mongo_errors.PyMongoError):
                self._renew(token)

    def _renew(self, token: str) -> bool:
        until = self._server_time() + LEASE_SECONDS
        # Once it is given back nobody holds it, whatever was on its way to the server.
        mine = {"_id": "lease", "owner": token, "until": {"$gt": 0.0}}
        return self._database[STATE].update_one(mine, {"$set": {"until": until}}).matched_count == 1

    def _server_time(self) -> float:
        """Now by the server's clock, the only one that all processes share."""
        return time.clock_gettime(_ELAPSED) + self._clock_offset


def _unmended(lease: dict[str, Any]) -> bool:
    """Whether it was marked so, or its holder, which had no transactions, did not give it back."""
    return bool(lease.get("broken")) or (bool(lease["until"]) and lease.get("session") is None)
