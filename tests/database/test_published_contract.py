"""Every published route over HTTP, as an existing client calls it: `requests`, `detail` of an error, 404 as "none"."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import requests

from tests.database.db_service import KEYS, EmbeddingDouble, Service, body_of

SCORED = [*KEYS, "score"]
ENVELOPE = ["success", "message", "data"]
TIME = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d")
INDEX_STATS = [
    "total_vectors", "dimension", "index_type", "active_mappings", "orphan_vectors", "next_index", "health_status",
]  # fmt: skip
MERGE = [
    "updated_at", "total_evaluated", "new_elements_evaluated", "old_candidates", "final_candidates", "new_entries",
    "replaced_entries", "highest_score", "lowest_score", "average_score",
]  # fmt: skip
STATS = [
    "total_records", "unique_names", "database_size", "collection_size", "index_size", "storage_size",
    "average_object_size", "database_name", "collection_name",
]  # fmt: skip
CANDIDATE_STATS = [
    "capacity", "current_size", "update_threshold", "new_data_count", "needs_update", "highest_score", "lowest_score",
    "average_score", "score_range",
]  # fmt: skip
UCT = ["index", "name", "base_score", "n_node", "exploration_term", "uct_score", "summary"]


class Client:
    """Calls by `requests`; every success has to be 200. Keeps which routes were driven."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.session = requests.Session()
        self.session.trust_env = False
        self.driven: set[tuple[str, str]] = set()

    def __call__(self, method: str, path: str, expected: int = 200, **kwargs: Any) -> Any:
        answer = self.session.request(method, self.url + path, timeout=30, **kwargs)
        assert answer.status_code == expected, f"{method} {path}: {answer.status_code} {answer.text[:500]}"
        assert answer.headers["content-type"].startswith("application/json")
        if expected != 200:
            body = answer.json()
            assert list(body) == ["success", "message", "detail"] and body["success"] is False
            assert isinstance(body["detail"], str) and body["detail"]
            return body
        self.driven.add((method, path.partition("?")[0]))
        return answer.json()

    def data(self, method: str, path: str, **kwargs: Any) -> Any:
        answer = self(method, path, **kwargs)
        assert list(answer) == ENVELOPE and answer["success"] is True and isinstance(answer["message"], str)
        return answer["data"]

    def elements(self, path: str, keys: list[str] = KEYS) -> list[int]:
        found = self("GET", path)
        assert isinstance(found, list) and all(list(element) == keys for element in found), path
        return [element["index"] for element in found]

    def element(self, path: str, keys: list[str] = KEYS) -> int:
        found = self("GET", path)
        assert list(found) == keys
        return int(found["index"])


def result(benchmark: str, loss: str = "4.5") -> dict[str, str]:
    return {"train": f"step,1,2000\nx,10.8,{loss}\n", "test": f"Model,arc_easy,piqa,average\nx,{benchmark},0.5,nan\n"}


@pytest.fixture
def client(service: Service) -> Client:
    return Client(service.url)


def test_every_published_route(client: Client, service: Service) -> None:
    described = client.data("GET", "/")
    assert sorted(described) == ["docs", "port", "redoc", "version"]
    # 1 root, 2 and 3 its children, 4 below 2 without a benchmark mean, 5 incomplete, 6 of a name with slashes.
    for name, parent, cells in (
        ("delta_net", None, "0.20"),
        ("delta_net_a", 1, "0.40"),
        ("delta_net_b", 1, "0.30"),
        ("delta_net_a", 2, "nan"),
        ("incomplete", 4, ""),
        ("by-index/1/children", 2, "0.10"),
    ):
        body = body_of(name, parent, result=result(cells))
        del body["summary"]
        stored = client.data("POST", "/elements", json=body)
        assert list(stored) == ["name", "index"] and stored["name"] == name
    health = client("GET", "/health")
    assert list(health) == ["status", "timestamp", "database"] and health["status"] == "healthy"
    assert health["database"] == {"connected": True, "total_records": 6}
    assert list(client("GET", "/stats")) == STATS

    assert client.element("/elements/sample") in range(1, 7)
    assert client.elements("/elements/by-name/delta_net_a") == [2, 4]
    assert client.elements("/elements/by-name/by-index/1/children") == [6]
    assert client.elements("/elements/by-name/by-index%2F1%2Fchildren") == [6]
    assert client.element("/elements/by-index/3") == 3
    assert client.elements("/elements/with-score/by-name/delta_net_a", SCORED) == [2, 4]
    assert client.element("/elements/with-score/by-index/2", SCORED) == 2
    assert list(client.data("GET", "/elements/2/score")) == ["index", "score"]
    assert client("GET", "/elements/with-score/by-index/4")["score"] is None, "nan in a scored column"
    assert client.elements("/elements/top-k/1000")[:4] == [2, 3, 1, 6]
    assert set(client.elements("/elements/top-k/1000")[4:]) == {4, 5}, "without a mean: last"
    assert client.elements("/elements/sample-range/1/3/3") == [2, 3, 1]
    assert client.elements("/elements/sample-range/1/10000/1000")[:4] == [2, 3, 1, 6]
    near = client.elements("/elements/search-similar?motivation=motivation%20of%20delta_net_b&top_k=20")
    assert near[0] == 3 and len(near) == 6
    assert len(client.elements("/elements/search-similar?motivation=motivation")) == 5, "5 by default"
    _tree(client)
    _candidates(client)
    _upkeep(client)
    assert_all_driven(client, service)


def _tree(client: Client) -> None:
    assert client.elements("/elements/1/children") == [2, 3] and client.elements("/elements/6/children") == []
    assert client.elements("/elements/roots") == [1]
    assert client.elements("/elements/4/path") == [1, 2, 4]
    forest = client("GET", "/tree-structure")
    assert list(forest) == ["success", "data"] and list(forest["data"]) == ["trees", "total_roots"]
    tree = client("GET", "/tree-structure?root_index=2")["data"]
    assert list(tree) == ["element", "children"] and list(tree["element"]) == ["index", "name", "time", "parent"]
    context = client.data("GET", "/elements/context/2")
    assert sorted(context) == ["direct_parent", "grandparent", "strongest_siblings"]
    assert [element["index"] for element in context["strongest_siblings"]] == [4, 6]
    assert client.element("/elements/uct-select") == 3, "the oldest leaf"
    assert client.element("/elements/uct-select?c_param=10") == 3
    rows = client("GET", "/elements/uct-scores?c_param=0.5")
    assert [list(row) for row in rows] == [UCT] * 6 and rows[0]["uct_score"] == "infinite"
    moved = client.data("POST", "/elements/6/set-parent", json={"parent_index": None})
    assert moved == {"child_index": 6, "parent_index": None}
    assert client("POST", "/elements/1/set-parent", 400, json={"parent_index": 4})["detail"]


def _candidates(client: Client) -> None:
    stats = client("GET", "/candidates/stats")
    assert list(stats) == ["success", "data"] and list(stats["data"])[:5] == CANDIDATE_STATS[:5]
    client.data("DELETE", "/candidates/all")
    assert list(client("GET", "/candidates/stats")["data"]) == CANDIDATE_STATS[:5], "an empty set: the first five"
    assert client.data("POST", "/candidates/1/add") == {"index": 1}
    assert client.data("POST", "/candidates/2/add") == {"index": 2}
    assert list(client("GET", "/candidates/stats")["data"]) == CANDIDATE_STATS
    assert list(client.data("GET", "/candidates/new-data-count")) == ["new_data_count"]
    assert client.elements("/candidates/all", SCORED) == [2, 1]
    assert client.elements("/candidates/top-k/50") == [2, 1]
    assert client.elements("/candidates/sample-range/1/50/50") == [2, 1]
    assert client.elements("/candidates/sample-range/3/50/1") == []
    assert client.data("PUT", "/candidates/1") == {"index": 1}
    report = client.data("POST", "/candidates/force-update")
    assert list(report) == MERGE and TIME.fullmatch(report["updated_at"])
    report = client.data("POST", "/candidates/rebuild-from-scored")
    assert list(report) == ["updated_at", "old_candidate_count", "new_candidate_count", "message"]
    assert TIME.fullmatch(report["updated_at"]) and report["new_candidate_count"] >= 3
    assert client.data("DELETE", "/candidates/by-index/3") == {"index": 3}
    client("DELETE", "/candidates/by-index/3", 404)
    client("PUT", "/candidates/3", 404)
    assert client.data("DELETE", "/candidates/by-name/delta_net_a") == {"deleted_count": 1}
    assert client.data("DELETE", "/candidates/by-name/nobody/here") == {"deleted_count": 0}
    assert client.data("DELETE", "/candidates/all")["deleted_count"] > 0
    assert client.data("DELETE", "/candidates/all") == {"deleted_count": 0}


def _upkeep(client: Client) -> None:
    stats = client("GET", "/faiss/stats")
    assert list(stats) == ["success", "data"] and list(stats["data"]) == INDEX_STATS
    assert stats["data"]["index_type"] == "IP" and stats["data"]["total_vectors"] == 6
    client.data("POST", "/faiss/rebuild")
    assert list(client.data("POST", "/faiss/clean-orphans")) == ["total_vectors", "orphan_vectors", "cleaned"]
    cleaned = client.data("POST", "/elements/clean-invalid")
    assert cleaned == {"count_before": 6, "cleaned_count": 1, "reparented_children": 0, "count_after": 5}
    assert list(client.data("POST", "/elements/clean-invalid"))[-1] == "message"
    client.data("POST", "/repair")
    client.data("DELETE", "/elements/by-index/2")
    assert client("GET", "/elements/by-index/4")["parent"] == 1, "the grandparent"
    assert client.data("DELETE", "/elements/by-name/by-index/1/children") == {"deleted_count": 1}
    client.data("DELETE", "/elements/all")
    assert client.data("POST", "/elements", data=json.dumps(body_of("first")))["index"] == 1, "no content type"


def assert_all_driven(client: Client, service: Service) -> None:
    """Each of the 41 published routes answered at least once."""
    published = {
        (method.upper(), path)
        for path, methods in service.http.get("/openapi.json").json()["paths"].items()
        for method in methods
        if not path.startswith(("/v2/", "/ready", "/metrics"))
    }
    assert len(published) == 41
    patterns = {
        (method, path): re.compile(re.sub(r"\{name[^}]*\}", ".+", re.sub(r"\{(?!name)[^}]*\}", "[^/]+", path)))
        for method, path in published
    }
    missing = {
        route
        for route, pattern in patterns.items()
        if not any(method == route[0] and pattern.fullmatch(path) for method, path in client.driven)
    }
    assert not missing


def test_fixed_words_win_over_an_index(client: Client, service: Service) -> None:
    service.add("roots")
    for word in ("sample", "roots", "uct-select", "uct-scores"):
        client("GET", f"/elements/{word}")
    for path in ("/elements/by-name/score", "/elements/by-name/1/path", "/elements/with-score/by-name/1/score"):
        assert client("GET", path) == []
    assert client.data("DELETE", "/candidates/by-name/all") == {"deleted_count": 0}
    assert client.data("DELETE", "/candidates/all") == {"deleted_count": 0}
    client("GET", "/elements/by-index/sample", 422)
    client("DELETE", "/elements/by-name/all", 404)
    assert client("GET", "/health")["database"]["total_records"] == 1


def nested(depth: int, opening: str, closing: str) -> str:
    return opening * depth + "1" + closing * depth


@pytest.mark.parametrize("depth", [300, 900, 100_000])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_deep_json_is_data_or_refused(client: Client, depth: int, opening: str, closing: str) -> None:
    deep = nested(depth, opening, closing)
    plain = json.dumps(body_of("x"))
    answer = client.session.post(client.url + "/elements", data=plain[:-1] + f', "more": {deep}}}', timeout=30)
    assert answer.status_code == (200 if depth < 1000 else 422)
    run = json.dumps({"idempotency_key": "k", "element": body_of("x"), "run": {"design": {"a": "HERE"}}})
    client("POST", "/v2/experiments", 422, data=run.replace('"HERE"', deep))
    assert client("GET", "/health")["status"] == "healthy"


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e400", "9" * 6000, "1.5", '{"$gt": ""}', "[1]"])
def test_no_number_or_operator_passes_for_a_parent(client: Client, value: str) -> None:
    body = json.dumps(body_of("x")).replace('"parent": null', f'"parent": {value}')
    answer = client.session.post(client.url + "/elements", data=body, timeout=30)
    assert answer.status_code in (400, 422) and answer.json()["detail"]
    assert client("GET", "/health")["database"]["total_records"] == 0


@pytest.mark.parametrize(
    "text",
    [
        "\x00", "a\x00b", '{"$gt": ""}', "$where", "../../etc/passwd", "%2e%2e%2f", "C:\\x", "<b>x</b><script>",
        "'; DROP TABLE elements; --", "\r\nSet-Cookie: a=b", "\u202e\ufeff\U0010ffff", "a" * 5000, "?x=1#y", "+ +",
    ],
)  # fmt: skip
def test_a_hostile_name_is_a_name(client: Client, text: str) -> None:
    everywhere = body_of(text) | {key: text for key, value in body_of("").items() if isinstance(value, str)}
    everywhere |= {"result": {"train": text, "test": text}, "time": body_of("")["time"]}
    stored = client.data("POST", "/elements", json=everywhere)
    quoted = requests.utils.quote(text, safe="")
    assert client.elements(f"/elements/by-name/{quoted}") == [stored["index"]]
    found = client("GET", f"/elements/by-index/{stored['index']}")
    assert found == everywhere | {"index": stored["index"]}
    assert client.elements(f"/elements/search-similar?motivation={quoted}") == [1]
    assert client.elements(f"/candidates/top-k/1?{quoted}=1") == []
    assert client.data("DELETE", f"/elements/by-name/{quoted}") == {"deleted_count": 1}


def test_ten_megabytes_of_motivation_are_stored(client: Client, embedding: EmbeddingDouble) -> None:
    embedding.broken = True
    text = "gate " * 2_000_000
    index = client.data("POST", "/elements", json=body_of("long", motivation=text))["index"]
    assert client("GET", f"/elements/by-index/{index}")["motivation"] == text
    client.data("DELETE", "/elements/all")
    embedding.broken = False
