"""What is pending is settled once, whoever does it, and as far as a request may wait."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from common.errors import ServiceError, StoreError
from common.knobs import Database as DatabaseSettings
from database.background import Background
from database.memory import Memory
from database.models import NewElement
from database.novelty import Sketches, shingles
from database.sqlite_session import SqliteSession
from database.store import open_store
from tests.database.db_service import DIMENSION, body_of, hashed_windows


class Words:
    """Embeds by hashed words. `meanwhile` happens before the next answer."""

    model = "hashed-words"
    dimension = DIMENSION

    def __init__(self, away: bool = False) -> None:
        self.away = away
        self.asked: list[int] = []
        """How many texts at a time."""
        self.meanwhile: Callable[[], object] | None = None

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        return np.array([windows[0] for windows in self.windows(texts)])

    def windows(self, texts: Sequence[str]) -> list[np.ndarray]:
        if self.away:
            raise ServiceError("away")
        self.asked.append(len(texts))
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            meanwhile()
        return [np.array(hashed_windows(text), dtype=np.float32) for text in texts]


def test_an_element_that_another_settled_meanwhile_is_not_rewritten(tmp_path: Path) -> None:
    settings = DatabaseSettings(store=f"sqlite:///{tmp_path}/a.sqlite")
    here = Words()
    memories = [Memory(open_store(settings), words, settings) for words in (Words(away=True), here, Words())]
    offline, one, two = memories
    for name in ("a", "b"):
        offline.add(NewElement.model_validate(body_of(name, motivation=f"motivation {name}")))
    here.meanwhile = lambda: two.settling.settle(1)
    assert one.settling.settle() == 0
    rows = one.store.read(lambda session: session.windows(0, 10))
    assert [(row.sequence, row.index) for row in rows] == [(1, 1), (2, 2)], "the first kept its row"
    for memory in memories:
        memory.close()


def test_an_index_that_was_given_to_another_design_meanwhile_gets_no_vectors_of_the_first(tmp_path: Path) -> None:
    """A client that resets the store does not wait until what it held is embedded."""
    settings = DatabaseSettings(store=f"sqlite:///{tmp_path}/a.sqlite")
    words = Words()
    memory = Memory(open_store(settings), words, settings)
    old, new = (NewElement.model_validate(body_of(name, motivation=f"{name} gates")) for name in ("old", "new"))
    memory.add(old)

    def reset() -> None:
        memory.store.write(lambda session: session.clear())
        memory.add(new)

    words.meanwhile = reset
    memory.settling.settle(1)
    assert memory.settling.settle() == 0
    (row,) = memory.store.read(lambda session: session.windows(0, 10))
    assert row.index == 1 and row.windows[0].tolist() == pytest.approx(hashed_windows("new gates")[0], abs=1e-6)
    memory.close()


def test_a_search_embeds_some_of_what_is_pending_and_says_how_much_remains(tmp_path: Path) -> None:
    settings = DatabaseSettings(store=f"sqlite:///{tmp_path}/a.sqlite")
    memory = Memory(open_store(settings), Words(), settings)  # not started: nothing is settled in the background
    elements = [NewElement.model_validate(body_of(f"n{number}", motivation=f"gate {number}")) for number in range(40)]
    for stored in [memory.submit(element) for element in elements]:
        stored.result()
    found, remaining = memory.similar("gate 3", 1)
    assert (found[0].name, remaining) == ("n3", 8)
    assert memory.similar("gate 39", 1)[0][0].name == "n39"
    memory.close()


def test_many_of_one_name_wait_for_what_is_pending_once(tmp_path: Path) -> None:
    """Clients give up after 30 seconds; a wait for each of them took as long as there were elements."""
    settings = DatabaseSettings(store=f"sqlite:///{tmp_path}/a.sqlite")
    memory = Memory(open_store(settings), Words(), settings)  # not started: nothing is settled in the background
    elements = [NewElement.model_validate(body_of("same", motivation=f"gate {number}")) for number in range(100)]
    indices = [stored.result().index for stored in [memory.submit(element) for element in elements]]
    assert [one.index for one in memory.scored([*indices, 999])] == indices
    assert memory.settling.pending() == 68, "one batch of 32 was embedded"
    memory.close()


def test_a_batch_holds_no_more_than_a_few_megabytes(tmp_path: Path) -> None:
    """Thirty-two elements of the largest size would be two gigabytes."""
    settings = DatabaseSettings(store=f"sqlite:///{tmp_path}/a.sqlite")
    words = Words()
    memory = Memory(open_store(settings), words, settings)
    for number, megabytes in enumerate((3, 4, 2, 9, 0, 0)):
        memory.add(NewElement.model_validate(body_of(f"n{number}", log="x" * (megabytes << 20))))
    while memory.settling.step():
        pass
    assert words.asked == [2, 1, 1, 2] and memory.settling.pending() == 0
    memory.close()


def test_programs_compared_last_are_remembered_up_to_some_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = DatabaseSettings(store=f"sqlite:///{tmp_path}/a.sqlite")
    memory = Memory(open_store(settings), Words(), settings)
    programs = [" ".join(f"{name}{number}" for number in range(1000)) for name in "abcd"]
    for name, program in zip("abcd", programs, strict=True):
        memory.add(NewElement.model_validate(body_of(name, program=program)))
    assert memory.settling.settle() == 0
    read: list[int] = []
    whole = SqliteSession.elements
    monkeypatch.setattr(SqliteSession, "elements", lambda self, of: read.extend(of) or whole(self, of))

    def reads(room: int) -> int:
        monkeypatch.setattr("database.novelty._KEPT_BYTES", room)
        sketches = Sketches()
        for program in programs[:2] * 2:
            memory.store.read(lambda session, asked=program: sketches.nearest(session, shingles(asked), before=3))
        found, read[:] = len(read), []
        return found

    size = shingles(programs[0]).nbytes
    assert reads(2 * size) == 2 < reads(2 * size - 1)
    memory.close()


def test_what_failed_is_tried_again_after_the_rest_and_not_after_two() -> None:
    tried: list[float] = []
    done = threading.Event()

    def step() -> bool:
        tried.append(time.monotonic())
        if len(tried) == 1:
            raise StoreError("away")
        done.set()
        return False

    background = Background("trying", step, 1.0)
    background.start()
    assert done.wait(30)
    background.close()
    assert 1.0 <= tried[1] - tried[0] < 1.9
