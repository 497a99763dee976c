"""Random sequences of every route over HTTP, with stops and kills in between, against a model of a few dictionaries."""

from __future__ import annotations

import json
import math
import re
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from common.files import sha256_text
from database.ledger import Event
from tests.database.candidate_model import PUBLISHED_BENCHMARK, PUBLISHED_LOSS, WIDTH, CandidateModel, Design
from tests.database.db_service import BASELINE, Service, body_of, element_of, mongodb_server, run_of

NAMES = ["a", "b/all", "$ne", "%2e ü"]
CELLS = ["0.1", "0.5", "nan", ""]
ENDLESS = "/v2/events/stream"


@dataclass
class Row:
    body: dict[str, Any]
    mean: float | None
    complete: bool = True
    run: dict[str, Any] | None = None
    loss: float | None = 4.5

    @property
    def parent(self) -> int | None:
        parent: int | None = self.body["parent"]
        return parent


@dataclass
class Place:
    """A server and how it is started again."""

    service: Service
    again: Callable[[bool], Service] | None = None
    driven: set[tuple[str, str]] = field(default_factory=set)


class RouteMachine(RuleBasedStateMachine):
    """Each rule writes by one route; `ask` asks all others. `rows` is what should be stored."""

    place: Place

    def __init__(self) -> None:
        super().__init__()
        self.own = uuid.uuid4().hex
        self.spent = 0
        self.rows: dict[int, Row] = {}
        self.last = 0
        self.number = 0
        self.keyed: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
        self.designs: dict[int, Design] = {}

    def call(self, method: str, path: str, status: int = 200, **kwargs: Any) -> Any:
        answer = self.place.service.http.request(method, path, **kwargs)
        assert answer.status_code == status, f"{method} {path}: {answer.status_code} {answer.text[:500]}"
        if status == 200:
            self.place.driven.add((method, answer.request.url.path))
        return answer.json() if "json" in answer.headers["content-type"].partition("x-nd")[0] else answer.text

    @initialize()
    def empty(self) -> None:
        self.call("DELETE", "/elements/all")
        self.call("PUT", f"/v2/baselines/{BASELINE.key}", json=BASELINE.model_dump())
        self.since = self.call("GET", "/v2/events?limit=1")["last"]
        self.added = 0
        state = self.call("GET", "/candidates/stats")["data"]
        rules = state["capacity"], self.call("GET", "/v2/stats")["candidates"]["cold_start"], state["update_threshold"]
        self.model = CandidateModel(*rules, lambda index, _: self.designs[index], {BASELINE.key: BASELINE})
        self.model.seen = self.since
        self.insert("a", "0.5", False, None)

    def quiet(self) -> None:
        """Waits until nothing is embedded or scored in the background, and follows what happened."""
        deadline = time.monotonic() + 60
        while True:
            told = self.call("GET", "/v2/stats")
            if not told["pending_embeddings"] and not told["stale_scores"]:
                break
            assert time.monotonic() < deadline
            time.sleep(0.01)
        self.follow()

    def follow(self) -> None:
        while events := self.call("GET", f"/v2/events?after={self.model.seen}&limit=1000")["events"]:
            self.model.follow([Event(**event) for event in events])

    def insert(self, name: str, cell: str, keyed: bool, parent: int | None) -> None:
        self.number += 1
        body = body_of(
            name,
            parent,
            result={"train": "s,1\nx,4.5", "test": f"m,a\nx,{cell}"},
            motivation=f"gate{self.number} word{self.number}",
        )
        headers = {"Idempotency-Key": f"{self.own}-{self.number}"} if keyed else {}
        stored = self.call("POST", "/elements", json=body, headers=headers)
        self.keep(body, float(cell) if cell not in ("nan", "") else None, bool(cell))
        assert stored["data"] == {"name": name, "index": self.last}
        if keyed:
            self.keyed.append((headers["Idempotency-Key"], body, stored))

    def keep(
        self,
        body: dict[str, Any],
        mean: float | None,
        complete: bool,
        run: dict[str, Any] | None = None,
        loss: float = 4.5,
    ) -> None:
        self.last, self.added = self.last + 1, self.added + 1
        self.rows[self.last] = Row(dict(body), mean, complete, run, loss)
        self.designs[self.last] = Design(loss, mean, None if run is None else BASELINE.key)

    def some(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.rows)))

    def parent(self, data: st.DataObject) -> int | None:
        return data.draw(st.sampled_from([None, *sorted(self.rows)]))

    @rule(name=st.sampled_from(NAMES), cell=st.sampled_from(CELLS), keyed=st.booleans(), data=st.data())
    def add(self, name: str, cell: str, keyed: bool, data: st.DataObject) -> None:
        self.insert(name, cell, keyed, self.parent(data))

    @precondition(lambda self: self.keyed)
    @rule(data=st.data())
    def add_again(self, data: st.DataObject) -> None:
        key, body, stored = data.draw(st.sampled_from(self.keyed))
        assert self.call("POST", "/elements", json=body, headers={"Idempotency-Key": key}) == stored
        self.call("POST", "/elements", 409, json=body | {"log": "other"}, headers={"Idempotency-Key": key})

    @rule(loss=st.floats(3.8, 4.2), benchmark=st.floats(0.3, 0.7), data=st.data())
    def experiment(self, loss: float, benchmark: float, data: st.DataObject) -> None:
        self.number += 1
        element = element_of(self.number, self.parent(data))
        run = run_of(element, loss, benchmark).model_dump(mode="json")
        usage = [{"role": "planner", "model": "m", "calls": 1}]
        key = f"{self.own}/{self.number}"
        body = {"idempotency_key": key, "element": element.model_dump(), "run": run, "usage": usage}
        first = self.call("POST", "/v2/experiments", json=body)["data"]
        self.keep(element.model_dump(), benchmark, True, run, loss)
        assert (first["index"], first["created"]) == (self.last, True)
        again = self.call("POST", "/v2/experiments", json=body)["data"]
        assert again["index"] == self.call("GET", f"/v2/experiments/{key}")["index"] == self.last
        assert again["created"] is False

    @rule(name=st.sampled_from(NAMES), data=st.data())
    def bring(self, name: str, data: st.DataObject) -> None:
        """Two lines, of which the second is a child of the first; an index of a file is no index here."""
        result = {"train": "s,1\nx,4.5", "test": "m,a\nx,0.25"}
        first, second = body_of(name, result=result), body_of(name, 7, result=result)
        lines = [json.dumps({"element": first | {"index": 7}}), "no json", json.dumps({"element": second})]
        told = self.call("POST", "/v2/import", content="\n".join(lines))["data"]
        assert told["stored"] == 2 and [refusal["line"] for refusal in told["refused"]] == [2]
        if not self.rows:
            self.last = 6  # an empty store keeps the indices of a file
        self.keep(first, 0.25, True)
        self.keep(second | {"parent": self.last}, 0.25, True)

    def forget(self, gone: list[int]) -> None:
        parents = {index: self.rows.pop(index).parent for index in gone}
        for row in self.rows.values():
            while row.parent in parents:
                row.body["parent"] = parents[row.parent]

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        index = self.some(data)
        self.call("DELETE", f"/elements/by-index/{index}")
        self.call("DELETE", f"/elements/by-index/{index}", 404)
        self.forget([index])

    @rule(name=st.sampled_from(NAMES))
    def remove_name(self, name: str) -> None:
        gone = [index for index, row in self.rows.items() if row.body["name"] == name]
        answer = self.call("DELETE", f"/elements/by-name/{quoted(name)}", 200 if gone else 404)
        assert not gone or answer["data"] == {"deleted_count": len(gone)}
        self.forget(gone)

    @rule()
    def clean(self) -> None:
        gone = [index for index, row in self.rows.items() if not row.complete]
        before = len(self.rows)
        told = self.call("POST", "/elements/clean-invalid")["data"]
        self.forget(gone)
        assert (told["count_before"], told["cleaned_count"], told["count_after"]) == (before, len(gone), len(self.rows))

    @precondition(lambda self: len(self.rows) > 6)
    @rule()
    def clear(self) -> None:
        assert self.call("DELETE", "/elements/all")["data"] == {"deleted_count": len(self.rows)}
        # Before indices are given to other designs.
        self.follow()
        self.rows, self.last, self.keyed = {}, 0, []

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def move(self, data: st.DataObject) -> None:
        child, parent = self.some(data), self.parent(data)
        above, closes = parent, False
        while above is not None and not closes:
            closes, above = above == child, self.rows[above].parent
        self.call("POST", f"/elements/{child}/set-parent", 400 if closes else 200, json={"parent_index": parent})
        if not closes:
            self.rows[child].body["parent"] = parent

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def choose(self, data: st.DataObject) -> None:
        """By hand; nothing else changes the set meanwhile."""
        self.quiet()
        index, model = self.some(data), self.model
        allowed = model.add(index)
        self.call("POST", f"/candidates/{index}/add", 200 if allowed else 400)
        self.follow()
        self.call("PUT", f"/candidates/{index}", 200 if index in model.members else 404)
        for how in ("index", "name")[: data.draw(st.integers(0, 2))]:
            name = self.rows[index].body["name"]
            gone = {index} if how == "index" else {i for i in model.members if self.rows[i].body["name"] == name}
            status = 404 if how == "index" and index not in model.members else 200
            model.members -= gone
            self.call("DELETE", f"/candidates/by-{how}/{index if how == 'index' else quoted(name)}", status)
            self.follow()
        assert model.told == model.members

    @rule(path=st.sampled_from(["force-update", "rebuild-from-scored", "all"]))
    def change_candidates(self, path: str) -> None:
        self.quiet()
        if path == "force-update":
            self.model.force()
        elif path == "rebuild-from-scored":
            self.model.rebuild()
        else:
            self.model.members = set()
        told = self.call("DELETE" if path == "all" else "POST", f"/candidates/{path}")["data"]
        assert path == "all" or told.get("final_candidates", told.get("new_candidate_count")) == len(self.model.members)
        self.follow()
        assert self.model.told == self.model.members

    @rule(path=st.sampled_from(["/repair", "/faiss/rebuild", "/faiss/clean-orphans"]))
    def mend(self, path: str) -> None:
        told = self.call("POST", path)["data"]
        assert "orphans_made_roots" not in told or told["orphans_made_roots"] == 0 == told["completeness_corrected"]

    @rule(calls=st.integers(0, 3))
    def spend(self, calls: int) -> None:
        record = {"role": "model test", "model": f"m{self.own}", "calls": calls}
        self.call("POST", "/v2/usage", json=[record, record])
        totals = [row for row in self.call("GET", "/v2/usage/totals") if row["model"] == record["model"]]
        self.spent += 2 * calls
        assert [row["calls"] for row in totals] == [self.spent]
        assert self.call("GET", "/v2/usage?limit=1")["usage"]

    @precondition(lambda self: self.place.again is not None)
    @rule(killed=st.booleans())
    def restart(self, killed: bool) -> None:
        assert self.place.again is not None
        self.place.service = self.place.again(killed)

    @rule(data=st.data())
    def ask(self, data: st.DataObject) -> None:
        """Every question of the whole store; then of one element."""
        rows, get = self.rows, lambda path: self.call("GET", path)
        indices = sorted(rows)
        children = {i: [j for j in indices if rows[j].parent == i] for i in indices}
        assert get("/health")["database"]["total_records"] == get("/stats")["total_records"] == len(rows)
        assert get("/stats")["unique_names"] == len({row.body["name"] for row in rows.values()})
        assert get("/v2/stats")["incomplete"] == sum(not row.complete for row in rows.values())
        assert get("/ready") == {"status": "ready"} and f"asi_database_elements {float(len(rows))}" in get("/metrics")
        assert get("/")["data"]["docs"] == "/docs"
        ranked = sorted(indices, key=lambda i: (rows[i].mean is None, -(rows[i].mean or 0), i))
        assert (
            named(get("/elements/top-k/1000")) == ranked and named(get("/elements/sample-range/2/3/9")) == ranked[1:3]
        )
        assert named(get("/elements/roots")) == [i for i in indices if rows[i].parent is None]
        forest = get("/tree-structure")["data"]
        assert forest["total_roots"] == len(forest["trees"])
        assert dict(flat(forest["trees"], None)) == {i: rows[i].parent for i in indices}
        self.ask_uct(children)
        pages = get("/v2/elements?limit=500")["elements"]
        assert named(pages) == indices
        assert named(get("/v2/elements?limit=500&incomplete=true")["elements"]) == [
            i for i in indices if not rows[i].complete
        ]
        assert {row["index"]: row["run"] for row in get("/v2/runs?limit=500")["runs"]}.keys() == {
            i for i in indices if rows[i].run
        }
        lines = [json.loads(line) for line in get("/v2/export").splitlines()]
        assert sorted(line["element"]["index"] for line in lines if "element" in line) == indices
        events = get(f"/v2/events?after={self.since}&limit=1000")["events"]
        assert len(events) == 1000 or sum(event["kind"] == "added" for event in events) == self.added
        self.ask_candidates()
        vectors = get("/faiss/stats")["data"]
        assert vectors["active_mappings"] == len(rows), "short motivations have one each"
        assert vectors["total_vectors"] == vectors["active_mappings"] + vectors["orphan_vectors"]
        assert get(f"/v2/baselines/{BASELINE.key}")["loss"] == BASELINE.loss
        if rows:
            self.ask_of(self.some(data), children)

    def ask_uct(self, children: dict[int, list[int]]) -> None:
        """Every score by the formula, best first; what was never visited is infinite."""
        growth = math.log(max(len(self.rows) - 1, 1))
        found = self.call("GET", "/elements/uct-scores")
        assert {row["index"]: (row["base_score"], row["n_node"]) for row in found} == {
            i: (row.mean, len(children[i])) for i, row in self.rows.items()
        }
        order = []
        for row in found:
            term = math.sqrt(growth / row["n_node"]) * 1.414 if row["n_node"] else math.inf
            assert row["exploration_term"] == (pytest.approx(term) if row["n_node"] else "infinite")
            score = term if row["base_score"] is None else row["base_score"] + term
            if row["n_node"]:
                assert row["uct_score"] == (None if row["base_score"] is None else pytest.approx(score))
            else:
                assert row["uct_score"] == "infinite"
            order.append((row["uct_score"] is None, -score if row["uct_score"] is not None else 0, row["index"]))
        assert [index for *_, index in order] == [index for *_, index in sorted(order)]

    def ask_candidates(self) -> None:
        """The set by its rules, once nothing changes it in the background."""
        self.quiet()
        model = self.model
        candidates = self.call("GET", "/candidates/all")
        assert named(candidates) == model.ranked() and model.told == model.members
        assert [row["score"] for row in candidates] == [model.stored[i].score for i in model.ranked()]
        assert named(self.call("GET", "/candidates/top-k/50")) == model.ranked()
        assert set(named(self.call("GET", "/candidates/sample-range/1/50/50"))) == model.members
        new = sum(i > model.merged for i in self.rows)
        assert self.call("GET", "/candidates/stats")["data"]["new_data_count"] == new
        assert self.call("GET", "/candidates/new-data-count")["data"]["new_data_count"] == new

    def ask_score(self, index: int) -> float | None:
        """The score, which is that of the formula, of the last event and of each route."""
        self.follow()
        details = self.call("GET", f"/v2/elements/{index}/score")
        score: float | None = details["score"]
        assert details["index"] == index and score == expected_score(self.rows[index], details["judgement"])
        assert score == self.call("GET", f"/elements/{index}/score")["data"]["score"]
        assert score == self.model.stored[index].score
        return score

    def teardown(self) -> None:
        """However few steps there were, every score and the set are looked at in the end."""
        self.ask_candidates()
        for index in self.rows:
            self.ask_score(index)

    def ask_of(self, index: int, children: dict[int, list[int]]) -> None:
        rows, get, row = self.rows, lambda path: self.call("GET", path), self.rows[index]
        element = get(f"/elements/by-index/{index}")
        assert element == row.body | {"index": index, "summary": element["summary"]}
        scored = get(f"/elements/with-score/by-index/{index}")
        assert {name: value for name, value in scored.items() if name != "score"} == element
        assert scored["score"] == self.ask_score(index)
        same = [i for i in sorted(rows) if rows[i].body["name"] == row.body["name"]]
        for path in ("by-name", "with-score/by-name"):
            assert named(get(f"/elements/{path}/{quoted(row.body['name'])}")) == same
        assert get("/elements/sample")["index"] in rows
        assert named(get(f"/elements/{index}/children")) == children[index]
        way = [index]
        while (above := rows[way[0]].parent) is not None:
            way.insert(0, above)
        assert named(get(f"/elements/{index}/path")) == way
        context = get(f"/elements/context/{index}")["data"]
        strongest = sorted(children[index], key=lambda i: (-len(children[i]), i))[:2]
        assert named(context["strongest_siblings"]) == strongest
        assert (context["grandparent"] or {}).get("index") == row.parent
        assert get("/elements/uct-select")["index"] == min(i for i in rows if not children[i])
        tree = get(f"/tree-structure?root_index={index}")["data"]
        assert tree["element"]["index"] == index and len(tree["children"]) == len(children[index])
        near = get(f"/elements/search-similar?motivation={quoted(row.body['motivation'])}&top_k=20")
        assert set(named(near)) <= set(rows)
        assert len(rows) > 20 or row.body["motivation"] == near[0]["motivation"]
        sha256 = sha256_text(row.body["program"])
        holders = [i for i in sorted(rows) if rows[i].body["program"] == row.body["program"]]
        assert get(f"/v2/programs/{sha256}")["indices"] == holders
        kept = [] if row.run is None else [row.run]
        runs = get(f"/v2/elements/{index}/runs")
        assert runs == kept
        assert len(get(f"/v2/elements/{index}/measurements")) == 2 * len(kept)
        assert get(f"/v2/elements/{index}/checks") == []
        fingerprint = "none" if row.run is None else row.run["fingerprint"]
        assert (index in get(f"/v2/fingerprints/{quoted(fingerprint)}")) == bool(kept)


def expected_score(row: Row, judgement: dict[str, Any] | None) -> Any:
    """The published formula over what was sent; of the judgement only its three integers are taken."""
    loss, benchmark, widths = PUBLISHED_LOSS, PUBLISHED_BENCHMARK, (WIDTH, WIDTH)
    if row.run is not None:
        assert BASELINE.benchmark is not None
        loss, benchmark = BASELINE.loss, BASELINE.benchmark
        widths = BASELINE.loss_clip, BASELINE.benchmark_clip
    if row.loss is None or row.mean is None or judgement is None:
        return None
    gains = (loss - row.loss) / (widths[0] * loss), (row.mean - benchmark) / (widths[1] * benchmark)
    terms = [1 / (1 + math.exp(-6 * max(-1.0, min(1.0, gain)))) for gain in gains]
    weights = {"performance_score": 0.30, "innovation_score": 0.25, "complexity_score": 0.45}
    overall = sum(weight * judgement[name] for name, weight in weights.items())
    return pytest.approx(sum(terms) + (overall - 1) / 9)


def quoted(text: str) -> str:
    return "".join(f"%{byte:02X}" for byte in text.encode())


def named(elements: list[dict[str, Any]]) -> list[int]:
    return [element["index"] for element in elements]


def flat(trees: list[dict[str, Any]], parent: int | None) -> Iterator[tuple[int, int | None]]:
    for tree in trees:
        assert tree["element"]["parent"] == parent
        yield tree["element"]["index"], parent
        yield from flat(tree["children"], tree["element"]["index"])


def check(place: Place, examples: int, steps: int) -> None:
    machine: Any = type("Machine", (RouteMachine,), {"place": place})
    run_state_machine_as_test(
        seed(1)(machine),
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )


def missing(place: Place) -> set[tuple[str, str]]:
    """Routes that no request of the sequences succeeded on, but for the endless one."""
    found = set()
    for path, methods in place.service.http.get("/openapi.json").json()["paths"].items():
        pattern = re.compile(
            re.sub(r"\{(name|key|fingerprint)\}", ".+", re.sub(r"\{(?!name|key|fing)\w+\}", "[^/]+", path))
        )
        for method in methods:
            if not any(method.upper() == one and pattern.fullmatch(asked) for one, asked in place.driven):
                found.add((method.upper(), path))
    return found - {("GET", ENDLESS)}


@pytest.mark.timeout(600)
def test_a_few_sequences_of_requests(service: Service) -> None:
    check(Place(service), examples=2, steps=12)


def restarting(start: Callable[..., Service], **kwargs: Any) -> Place:
    """A server that the sequences stop and kill."""
    few = {f"ASI_DATABASE__{name}": value for name, value in (("COLD_START", "4"), ("UPDATE_BATCH", "2"))}

    def again(killed: bool) -> Service:
        if killed:
            place.service.kill()
        else:
            assert place.service.stop() == 0
        return start(env=few, **kwargs)

    place = Place(start(env=few, **kwargs), again)
    return place


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_any_sequence_of_requests_with_stops_and_kills(start: Callable[..., Service]) -> None:
    place = restarting(start)
    check(place, examples=30, steps=40)
    assert missing(place) == set()


@pytest.mark.services
@pytest.mark.timeout(1200)
def test_sequences_of_requests_with_stops_and_kills_over_mongodb(start: Callable[..., Service]) -> None:
    with mongodb_server() as url:
        check(restarting(start, store=f"{url}/test_{uuid.uuid4().hex}"), examples=5, steps=30)
