"""The store interface: what a database of elements can do, whatever keeps it.

A store runs `work(session)` as one transaction: all of it is durable when `write` returns, or none of it happened.
Rules of the domain (scores, candidates, the tree) live above, in functions over a Session, so that both stores share
them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import numpy as np

from common.errors import StoreError, UsageError
from common.knobs import Database as DatabaseSettings
from common.records import Baseline, RunRecord
from database.evaluate_agent.score import Evaluation, Evidence
from database.models import Element, NewElement

if TYPE_CHECKING:
    from database.ledger import Ledger

__all__ = [
    "CLEARED",
    "KEPT_STATE",
    "MAX_INDEX",
    "Facts",
    "NewEntry",
    "Order",
    "Session",
    "Sizes",
    "Store",
    "StoreBusyError",
    "StoreFullError",
    "UncountedError",
    "VectorRow",
    "VectorState",
    "Where",
    "open_store",
    "windows_in",
    "without_secrets",
]

T = TypeVar("T")
MAX_INDEX = 2**63 - 1
CLEARED = "cleared"
"""Small state: how often all elements were removed at once. Indices are given anew after that: what was noted of an
element before may be about another one now."""
KEPT_STATE = ("baselines", CLEARED, "epoch", "opened", "revision", "rules", "sequence", "sketches")
"""Names of the small state that outlives the removal of all elements."""
Order = Literal["index", "newest", "time", "benchmark", "score", "revision"]


class StoreFullError(StoreError):
    """The disk, or a quota on it, is full; nothing of the write was kept."""


class StoreBusyError(StoreError):
    """Another process holds the store, or it does not answer; the same request may succeed later."""

    retry_after: int | None = None
    """Seconds after which it is worth to ask again, where that is known."""


class UncountedError(StoreBusyError):
    """What was asked for follows from counts that are not known yet: the elements are being counted."""

    retry_after = 2


@dataclass(frozen=True)
class Facts:
    """The small, indexed part of a stored element. `benchmark` is its mean accuracy, None when one cannot be had."""

    index: int
    name: str
    time: str
    parent: int | None
    summary: str
    loss: float | None
    benchmark: float | None
    complete: bool
    baseline_key: str | None
    score: float | None
    pending: bool
    """Its motivation has no vectors of the current model yet."""
    revision: int | None
    """Which state of the rules and of its baseline the score was computed from; None before the first time."""


@dataclass(frozen=True)
class NewEntry:
    """All that is stored of a new element at once. `windows` is float32 [w, dimension], None while it could not be
    embedded."""

    element: NewElement
    evidence: Evidence
    complete: bool
    sketch: bytes | None = None
    windows: np.ndarray | None = None
    model: str | None = None
    run: RunRecord | None = None
    key: str | None = None


@dataclass(frozen=True)
class Where:
    """Which elements: all conditions that are set hold together."""

    index: int | None = None
    name: str | None = None
    parent: int | None = None
    roots: bool = False
    explored: bool = False
    """With a parent."""
    after: int = 0
    before_revision: int | None = None
    """Scored before this revision."""
    incomplete: bool = False
    pending: bool = False
    unscored: bool = False
    baseline_key: str | None = None
    published: bool = False
    """Without a run record, and so scored against the published constants."""


@dataclass(frozen=True)
class VectorRow:
    """The windows of one motivation, float32 [w, dimension], in the order in which they were stored (`sequence`)."""

    sequence: int
    index: int
    windows: np.ndarray


@dataclass(frozen=True)
class VectorState:
    """What a cache of the vectors has to agree with. `epoch` grows whenever something stored before is removed or
    replaced."""

    epoch: int
    sequence: int
    model: str | None


@dataclass(frozen=True)
class Sizes:
    """Bytes, and where they lie; None for what the server has not told yet."""

    database: int | None
    documents: int
    storage: int | None
    index: int | None
    database_name: str
    collection_name: str
    measured_at: str | None = None
    """When the server told, UTC, "YYYY-MM-DD HH:MM:SS"; None where that is now."""


class Session(Protocol):
    """One transaction. Elements are addressed by index; an index that is not there is simply absent from an answer."""

    # Elements
    def insert(self, entry: NewEntry, index: int | None = None) -> int:
        """Stores `entry` under the next index, which no element has had while data existed, and returns it.

        Args:
            index: the index to take instead: one that is free (`is_free`), and that no element had. The next one is
                above it.
        """
        ...

    def is_free(self, index: int) -> bool:
        """Whether nothing is stored under it."""
        ...

    def find_key(self, key: str) -> Facts | None:
        """The element stored under this idempotency key."""
        ...

    def keys(self, indices: Sequence[int]) -> dict[int, str]:
        """The idempotency keys of those of `indices` that have one."""
        ...

    def facts(
        self, where: Where = ..., order: Order = "index", limit: int | None = None, offset: int = 0
    ) -> list[Facts]:
        """By index, newest first, by time, best first by benchmark or score (None last), or by the score's revision;
        ties by index."""
        ...

    def elements(self, indices: Sequence[int]) -> list[Element]:
        """The whole elements, in the order asked."""
        ...

    def each(self, indices: Sequence[int]) -> Iterator[Element]:
        """As `elements`, few of them in memory at a time."""
        ...

    def weight_of(self, indices: Sequence[int]) -> int:
        """About how many bytes `elements` of these have; a guess by their number where documents would be read for
        it."""
        ...

    def bytes_of(self, indices: Sequence[int]) -> dict[int, int]:
        """About how many bytes each of these elements has, without reading them."""
        ...

    def ranked(self, order: Order, limit: int | None = None, offset: int = 0) -> list[int]:
        """The indices of `facts` without a condition."""
        ...

    def parents(self, indices: Sequence[int] | None = None) -> dict[int, int | None]:
        """What each of `indices` that exists (every element without) lies below."""
        ...

    def sample(self) -> int | None:
        """An index, uniformly at random; None when there is none."""
        ...

    def count(self, where: Where = ..., limit: int | None = None) -> int:
        """How many match, counting no further than `limit`."""
        ...

    def unique_names(self) -> int: ...

    def child_counts(self, indices: Iterable[int] | None = None) -> dict[int, int]:
        """Number of children of each of `indices` (of all without) that has any."""
        ...

    def strongest_children(self, parent: int, limit: int) -> list[int]:
        """The children of `parent` that have most children themselves, ties by index."""
        ...

    def oldest_leaf(self) -> int | None: ...

    def orphans(self) -> list[int]:
        """Elements whose parent does not exist."""
        ...

    def set_parent(self, indices: Sequence[int], parent: int | None) -> None: ...

    def delete(self, indices: Sequence[int]) -> None:
        """Removes rows, runs, vectors and candidacy. The caller has re-attached the children."""
        ...

    def clear(self) -> None:
        """Removes all elements, and counts that (`CLEARED`); the next index is 1. Baselines and their order (state
        "baselines") stay."""
        ...

    # What is measured and computed of an element
    def evidence(self, index: int) -> tuple[Evidence, Evaluation | None] | None: ...

    def set_evaluation(self, index: int, evidence: Evidence, evaluation: Evaluation) -> None: ...

    def set_complete(self, index: int, complete: bool) -> None: ...

    def runs(self, index: int) -> list[RunRecord]: ...

    def with_fingerprint(self, fingerprint: str) -> list[int]:
        """Elements of which a run has this functional fingerprint, by index."""
        ...

    # Novelty
    def use_model(self, model: str) -> None:
        """From now on only vectors of this model count: where others did, every element is pending."""
        ...

    def put_windows(self, index: int, model: str, windows: np.ndarray) -> None:
        """Keeps float32 [w, dimension], of a model that is used from now on."""
        ...

    def windows(self, after: int, limit: int) -> list[VectorRow]:
        """Vectors of the current model, from the sequence number that follows `after`."""
        ...

    def vector_state(self) -> VectorState: ...

    def vector_sequences(self) -> np.ndarray:
        """Sequence numbers of the vectors of the current model: int64, ascending."""
        ...

    def put_sketch(self, index: int, sketch: bytes) -> None:
        """Keeps the sketch of a program; one that is there stays."""
        ...

    def sketches(self, after: int, limit: int) -> list[tuple[int, int, bytes]]:
        """(sequence, index, program sketch) in the order in which they were stored, from the sequence number that
        follows `after`."""
        ...

    def sketch_sequences(self) -> np.ndarray:
        """Sequence numbers of all sketches: int64, in any order. None is given twice, even after `clear`."""
        ...

    def windows_of(self, indices: Sequence[int]) -> dict[int, np.ndarray]:
        """The vectors of the current model of those of `indices` that have any: float32 [w, dimension], w = 0 where
        they cannot be read."""
        ...

    def sketches_of(self, indices: Sequence[int]) -> dict[int, bytes]: ...

    def unsettle(self, indices: Sequence[int]) -> None:
        """Forgets vectors and sketches of these elements, which are pending then."""
        ...

    # Candidates
    def candidates(self) -> list[Facts]:
        """The candidate set, best score first, None last, ties by index."""
        ...

    def put_candidates(self, indices: Sequence[int]) -> None:
        """Replaces the set."""
        ...

    # Small state
    def state(self, name: str) -> Any: ...

    def put_state(self, name: str, value: Any) -> None: ...

    def answer(self, route: str, key: str) -> dict[str, Any] | None:
        """What this write answered when it was first sent with this Idempotency-Key."""
        ...

    def put_answer(self, route: str, key: str, answer: dict[str, Any]) -> None:
        """Keeps it, in place of an older one."""
        ...

    def answer_names(self) -> list[tuple[str, str]]:
        """(route, key) of every answer that is kept."""
        ...

    def baseline(self, key: str) -> Baseline | None: ...

    def put_baseline(self, baseline: Baseline) -> None:
        """Keeps it under a new revision."""
        ...

    def baseline_revision(self, key: str) -> int:
        """The revision under which it was stored last; 0 when it never was."""
        ...

    def next_revision(self) -> int:
        """A number above every revision so far."""
        ...

    # Beside the elements
    @property
    def ledger(self) -> Ledger:
        """Events, usage, programs by hash."""
        ...

    # Upkeep
    def sizes(self) -> Sizes: ...

    def check(self) -> list[str]:
        """What the storage itself says is broken, and what to do; [] when it is sound."""
        ...

    def derive(self, element: Element) -> None:
        """Puts right what is kept of a stored element beside its document: name, time, summary, program hash."""
        ...

    def recount(self) -> None:
        """Counts anew what is kept because it would have to be counted. MongoDB does so at each start instead."""
        ...


class Store(Protocol):
    """Thread-safe. Every method raises StoreError, StoreFullError or StoreBusyError."""

    @property
    def snapshots(self) -> bool:
        """Whether a read sees one state, whatever is written meanwhile."""
        ...

    def read(self, work: Callable[[Session], T]) -> T:
        """Runs `work` over one consistent state; it must not write."""
        ...

    def write(self, work: Callable[[Session], T]) -> T:
        """Runs `work` as one transaction and returns when it is on disk. It may be run again if it could not be
        kept."""
        ...

    def submit(self, work: Callable[[Session], T]) -> Future[T]:
        """As `write`, without waiting. Writes that wait at the same time may share one commit; each fails alone.
        `work` must not touch what lies outside the session: its transaction may be lost and repeated."""
        ...

    def close(self) -> None:
        """Returns when every submitted write has its outcome."""
        ...

    def cache_file(self) -> str | None:
        """Where a disposable cache of the vectors may lie; None when the store has no folder."""
        ...


def windows_in(block: bytes, dimension: int) -> np.ndarray:
    """float32 [w, dimension] from stored bytes; w = 0 where they are not as many as they should be."""
    if not dimension > 0 or len(block) % (4 * dimension):
        return np.zeros((0, max(1, dimension)), dtype=np.float32)
    return np.frombuffer(block, dtype="<f4").reshape(-1, dimension)


def without_secrets(url: str) -> str:
    """The URL of a store as it may be shown: without user, password and options. A password that was not escaped may
    hold any character."""
    return re.sub(r"//.*@", "//", url, flags=re.DOTALL).partition("?")[0]


def open_store(settings: DatabaseSettings, read_only: bool = False) -> Store:
    """Opens `settings.store`: sqlite:///relative, sqlite:////absolute, or mongodb://HOST:PORT/DATABASE; `read_only`
    changes nothing in it and needs no right to.

    Raises:
        UsageError: the URL is none of these.
        StoreError: the store is there and cannot be used; the message says why and what to do.
    """
    from database.ledger import Recorded

    url = settings.store
    if url.startswith("sqlite:///") and url.removeprefix("sqlite:///") not in ("", ":memory:"):
        from database.sqlite_database import SqliteStore

        store: Store = SqliteStore(url.removeprefix("sqlite:///"), settings.lock_timeout, read_only)
        return Recorded(store, settings.events_kept)
    if url.startswith(("mongodb://", "mongodb+srv://")):
        from database.mongodb_database import MongoStore

        return Recorded(MongoStore(url, settings.lock_timeout, read_only), settings.events_kept)
    raise UsageError(
        "expected a store such as sqlite:///database.sqlite or mongodb://127.0.0.1:27018/myapp, got "
        f"{without_secrets(url)!r}",
        "three slashes name a file relative to this folder, four an absolute one: sqlite:////var/lib/asi/database.sqlite",
    )
