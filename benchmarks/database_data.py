"""Made-up elements of 20 KB with seeded vectors, put into a store through its own interface, quickly."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from common.knobs import Database as DatabaseSettings
from database.candidate_manager import Candidates
from database.evaluate_agent.rubric import Novelty
from database.evaluate_agent.score import Evaluation, Evidence, evidence_of
from database.models import NewElement
from database.mongodb_database import MongoStore
from database.mongodb_documents import ELEMENTS, document_of
from database.scores import Scores
from database.store import NewEntry, Session, Store, open_store
from tests.database.db_service import EmbeddingDouble

DIMENSION = 384
MODEL = "synthetic"
_SEED = 7
_PER_TOPIC = 50
_BATCH = 1000
_FORMS = 499
_LINES = [
    f"        x = x + self.gate_{number}(x) * {number}.25  # mix channel {number} of the state" for number in range(400)
]


def vectors(size: int) -> np.ndarray:
    """float32 [size, 384], unit norm: topics with noise around them, as motivations have."""
    rng = np.random.default_rng(_SEED)
    topics = rng.normal(size=(max(1, size // _PER_TOPIC), DIMENSION)).astype(np.float32)
    found = topics[rng.integers(len(topics), size=size)]
    found += 0.8 * rng.normal(size=found.shape).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def element_of(number: int, parent: int | None, rng: random.Random) -> NewElement:
    """About 20 KB of JSON. `motivation` names the vector that the embedding double gives for it."""
    accuracies = ",".join(f"{rng.uniform(0.1, 0.5):.3f}" for _ in range(12))
    steps = ",".join(f"{rng.uniform(4.2, 4.9):.4f}" for _ in range(21))
    start = rng.randrange(200)
    return NewElement(
        time="2025-07-01 12:00:00",
        name=f"delta_net_{number % 70_000}",
        result={
            "train": f"step,{','.join(str(100 * step) for step in range(21))}\nx,{steps}\n",
            "test": f"Model,{','.join(f'task_{task}' for task in range(12))}\nx,{accuracies}\n",
        },
        program="class DeltaNet:\n" + "\n".join(_LINES[start : start + 180]),
        motivation=f"vector {number} " + "because decay and write strength interact " * 30,
        analysis="The loss fell where recall was needed. " * 90,
        cognition="",
        log="",
        parent=parent,
        summary="gated",
    )


def fill(settings: DatabaseSettings, size: int, small: bool = False) -> None:
    """Fills a new store with `size` elements, their vectors, scores and candidates.

    Args:
        small: elements of about 2 KB instead of 20.
    """
    mongodb = settings.store.startswith("mongodb")
    # Without the events around it, which would be one a document.
    store = MongoStore(settings.store, settings.lock_timeout) if mongodb else open_store(settings)
    scores = Scores()
    store.write(scores.begin)
    revision = store.read(lambda session: scores.revision(session, None))
    children = Counter(_parents(size))
    for batch in _batches(size, small):
        if isinstance(store, MongoStore):
            _fill_mongodb(store, batch, revision, children)
        else:
            _fill(store, batch, revision)
    candidates = Candidates(settings, scores)

    def finish(session: Session) -> None:
        if isinstance(store, MongoStore):
            for name, value in (("last_index", size), ("model", MODEL), ("sequence", size), ("sketches", size)):
                session.put_state(name, value)
        candidates.merge(session, [])
        candidates.rebuild(session)

    store.write(finish)
    store.close()


_Batch = list[tuple[NewEntry, Evidence, Evaluation]]


def _batches(size: int, small: bool) -> Iterator[_Batch]:
    rng = random.Random(_SEED)
    block = vectors(size)
    parents = _parents(size)
    forms = []
    for number in range(min(size, _FORMS)):
        element = element_of(number, None, rng)
        if small:
            element = element.model_copy(update={"program": element.program[:800], "analysis": "", "summary": ""})
        evidence = evidence_of(element.result.train, element.result.test, None)
        forms.append((element, evidence.model_copy(update={"novelty": Novelty(motivation=0.4, motivation_index=1)})))
    sketches = np.random.default_rng(_SEED).integers(0, 2**31, size=(size, 128), dtype=np.uint32)
    for start in range(0, size, _BATCH):
        batch: _Batch = []
        for number in range(start, min(size, start + _BATCH)):
            element, evidence = forms[number % len(forms)]
            own = {
                "name": f"delta_net_{number % 70_000}",
                "parent": parents[number],
                "motivation": f"vector {number} {element.motivation.partition(' ')[2]}",
            }
            element = element.model_copy(update=own)
            entry = NewEntry(
                element=element,
                evidence=evidence,
                complete=True,
                sketch=sketches[number].astype("<u4").tobytes(),
                windows=block[number : number + 1],
                model=MODEL,
            )
            batch.append((entry, evidence, Evaluation(score=rng.uniform(0.5, 2.0), source="result")))
        yield batch


def _parents(size: int) -> list[int | None]:
    """The parent of each element: any that came before."""
    rng = random.Random(_SEED)
    return [rng.randint(1, number) if number else None for number in range(size)]


def _fill(store: Store, batch: _Batch, revision: int) -> None:
    def work(session: Session) -> None:
        for entry, evidence, evaluation in batch:
            index = session.insert(entry)
            session.set_evaluation(index, evidence, evaluation.model_copy(update={"revision": revision}))

    store.write(work)


def _fill_mongodb(store: MongoStore, batch: _Batch, revision: int, children: Mapping[int | None, int]) -> None:
    """As `_fill`, a thousand documents a request; what is counted is counted when the store is opened."""
    collection = store._database[ELEMENTS]
    first = collection.estimated_document_count() + 1
    documents: list[dict[str, Any]] = []
    for index, (entry, _, evaluation) in enumerate(batch, first):
        document = document_of(entry, index)
        assert entry.windows is not None and entry.sketch is not None
        document["score"] = evaluation.score
        document["asi"] |= {
            "pending": False,
            "revision": revision,
            "children": children.get(index, 0),
            "evaluation": evaluation.model_copy(update={"revision": revision}).model_dump_json(),
            "sketch": entry.sketch,
            "sketch_sequence": index,
            "vector": {
                "sequence": index,
                "model": MODEL,
                "dimension": DIMENSION,
                "windows": entry.windows.astype("<f4").tobytes(),
            },
        }
        documents.append(document)
    collection.insert_many(documents)


def embedding_double(known: np.ndarray) -> EmbeddingDouble:
    """An embedding server for "vector N ..." texts."""
    return EmbeddingDouble(lambda text: [known[int(text.split()[1]) % len(known)].tolist()], MODEL, DIMENSION)
