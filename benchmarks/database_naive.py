"""The same questions by reading everything, as the published service does: what the database's answers and times are
held against."""

from __future__ import annotations

import json
import math
import sqlite3
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pymongo

from database.evaluate_agent.score import benchmark_mean


@dataclass(frozen=True)
class Small:
    """What a scan keeps of one element."""

    index: int
    parent: int | None
    benchmark: float | None


class Naive:
    """One scan of all documents (`seconds`), and each question asked of what it found."""

    def __init__(self, store: str) -> None:
        began = time.perf_counter()
        self.rows = [_small(document) for document in _documents(store)]
        self.seconds = time.perf_counter() - began

    def timed(self, question: str, *arguments: int) -> tuple[float, list[int]]:
        """Seconds (scan included) and the indices it answers."""
        began = time.perf_counter()
        found: list[int] = getattr(self, question)(*arguments)
        return self.seconds + time.perf_counter() - began, found

    def by_index(self, index: int) -> list[int]:
        return [row.index for row in self.rows if row.index == index]

    def top_k(self, k: int) -> list[int]:
        ranked = sorted(self.rows, key=lambda row: (row.benchmark is None, -(row.benchmark or 0.0), row.index))
        return [row.index for row in ranked[:k]]

    def children(self, index: int) -> list[int]:
        return sorted(row.index for row in self.rows if row.parent == index)

    def context(self, index: int) -> list[int]:
        counts = Counter(row.parent for row in self.rows)
        strongest = sorted(self.children(index), key=lambda child: (-counts[child], child))[:2]
        parent = next(row.parent for row in self.rows if row.index == index)
        return [index, *strongest, *([] if parent is None else [parent])]

    def path(self, index: int) -> list[int]:
        parents = {row.index: row.parent for row in self.rows}
        steps = [index]
        while (parent := parents[steps[-1]]) is not None:
            steps.append(parent)
        return steps[::-1]

    def uct_select(self) -> list[int]:
        counts = Counter(row.parent for row in self.rows)
        growth = math.log(max(len(self.rows) - 1, 1))
        best = max(
            self.rows,
            key=lambda row: (
                math.inf
                if not counts[row.index]
                else (row.benchmark or -math.inf) + 1.414 * math.sqrt(growth / counts[row.index]),
                -row.index,
            ),
        )
        return [best.index]


def _documents(store: str) -> Any:
    if store.startswith("mongodb://"):
        client: pymongo.MongoClient[dict[str, Any]] = pymongo.MongoClient(store)
        yield from client.get_default_database()["data_elements"].find()
        client.close()
        return
    connection = sqlite3.connect(store.removeprefix("sqlite:///"))
    query = "SELECT d.body, e.idx, e.parent FROM documents d JOIN elements e ON e.idx = d.idx"
    for body, index, parent in connection.execute(query):
        yield json.loads(body) | {"index": index, "parent": parent}
    connection.close()


def _small(document: dict[str, Any]) -> Small:
    mean, _ = benchmark_mean(document["result"]["test"])
    return Small(document["index"], document["parent"], None if mean is None else mean.value)
