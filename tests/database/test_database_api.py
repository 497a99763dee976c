"""The published contract, over HTTP against a real server: paths, fields, meanings, errors."""

from __future__ import annotations

import json
import math

import pytest

from tests.database.db_service import KEYS, Service, body_of, settled

RUNS_LIKE_MATH = 'a\u0000b </script> {"$gt": ""} \' OR 1=1 -- é 漢'


def test_an_element_has_exactly_the_published_keys(service: Service) -> None:
    index = service.add("delta_net_a", analysis="", cognition="", summary="")
    assert index == 1
    element = service.get("/elements/by-index/1")
    assert list(element) == KEYS
    assert (element["analysis"], element["cognition"], element["summary"]) == ("none", "none", "")
    assert element["result"] == body_of("x")["result"] and element["parent"] is None
    scored = service.get("/elements/with-score/by-index/1")
    assert list(scored) == [*KEYS, "score"] and 0 < scored["score"] < 3
    assert service.get("/elements/1/score")["data"] == {"index": 1, "score": scored["score"]}
    assert service.get("/elements/sample") == element
    assert service.get("/elements/with-score/by-name/delta_net_a") == [scored]


def test_by_name_is_ordered_by_time_and_takes_any_name(service: Service) -> None:
    name = "a/b children?x=1 é"
    service.add(name, time="2025-01-02 00:00:00")
    service.add(name, time="2025-01-01 00:00:00")
    assert [element.index for element in service.client.by_name(name)] == [2, 1]
    service.add("children")
    assert [element.index for element in service.client.by_name("children")] == [3]
    assert service.get("/elements/by-name/unknown") == []


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"parent": 7}, 400),
        ({"parent": 0}, 400),
        ({"parent": -1}, 400),
        ({"parent": 10**30}, 400),
        ({"result": {}}, 400),
        ({"result": {"train": "", "test": ""}}, 400),
        ({"result": None}, 422),
        ({"result": {"train": 3, "test": ""}}, 422),
        ({"name": 5}, 422),
        ({"name": {"$gt": ""}}, 422),
        ({"motivation": None}, 422),
        ({"parent": "x"}, 422),
    ],
)
def test_a_wrong_element_is_refused_and_not_stored(service: Service, change: dict[str, object], status: int) -> None:
    service.post("/elements", body_of("x") | change, status)
    assert service.get("/health")["database"]["total_records"] == 0


def test_required_fields_are_required_and_optional_ones_are_not(service: Service) -> None:
    for key in ("time", "name", "result", "program", "motivation", "analysis", "cognition", "log"):
        body = body_of("x")
        del body[key]
        service.post("/elements", body, 422)
    body = body_of("x")
    del body["parent"], body["summary"]
    assert service.post("/elements", body) == {
        "success": True,
        "message": "element 1 is stored",
        "data": {"name": "x", "index": 1},
    }


def test_hostile_text_is_data(service: Service) -> None:
    index = service.add(RUNS_LIKE_MATH, motivation=RUNS_LIKE_MATH, log="x" * 300_000)
    element = service.get(f"/elements/by-index/{index}")
    assert element["name"] == element["motivation"] == RUNS_LIKE_MATH and len(element["log"]) == 300_000
    answer = service.http.post(
        "/elements", content=b'{"name": "\\ud800"}', headers={"content-type": "application/json"}
    )
    assert answer.status_code == 422 and isinstance(answer.json()["detail"], str)
    surrogate = json.dumps(body_of("\ud800")).encode()
    answer = service.http.post("/elements", content=surrogate, headers={"content-type": "application/json"})
    assert answer.status_code == 422 and "surrogate" in answer.json()["detail"]
    for content in (b"{", b"[" * 100_000, b"\xff", b"", b"NaN"):
        answer = service.http.post("/elements", content=content, headers={"content-type": "application/json"})
        assert answer.status_code in (400, 422) and isinstance(answer.json()["detail"], str)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/elements/sample", 404),
        ("GET", "/elements/by-index/1", 404),
        ("GET", "/elements/by-index/0", 404),
        ("GET", f"/elements/by-index/{10**30}", 404),
        ("GET", "/elements/by-index/x", 422),
        ("GET", "/elements/with-score/by-index/1", 404),
        ("GET", "/elements/1/score", 404),
        ("GET", "/elements/1/children", 404),
        ("GET", "/elements/1/path", 404),
        ("GET", "/elements/context/1", 404),
        ("GET", "/elements/uct-select", 404),
        ("GET", "/elements/uct-select?c_param=0", 422),
        ("GET", "/elements/uct-scores?c_param=nan", 422),
        ("GET", "/elements/uct-scores?c_param=11", 422),
        ("GET", "/elements/top-k/0", 422),
        ("GET", "/elements/top-k/1001", 422),
        ("GET", "/elements/sample-range/0/5/1", 400),
        ("GET", "/elements/sample-range/5/4/1", 400),
        ("GET", "/elements/sample-range/1/10001/1", 400),
        ("GET", "/elements/sample-range/1/5/1001", 422),
        ("GET", "/elements/search-similar", 422),
        ("GET", "/elements/search-similar?motivation=a&top_k=21", 422),
        ("GET", "/candidates/top-k/51", 422),
        ("GET", "/candidates/sample-range/1/51/5", 400),
        ("GET", "/tree-structure?root_index=1", 404),
        ("DELETE", "/elements/by-index/1", 404),
        ("DELETE", "/elements/by-name/x", 404),
        ("DELETE", "/candidates/by-index/1", 404),
        ("PUT", "/candidates/1", 404),
        ("POST", "/candidates/1/add", 404),
        ("GET", "/v2/elements/1/runs", 404),
        ("GET", "/v2/elements/1/score", 404),
        ("GET", "/v2/baselines/unknown", 404),
        ("GET", "/nothing/here", 404),
        ("PATCH", "/elements", 405),
    ],
)
def test_errors_have_one_shape(service: Service, method: str, path: str, status: int) -> None:
    answer = service.http.request(method, path)
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert set(body) == {"success", "message", "detail"} and body["success"] is False and body["detail"]


def test_lists_of_nothing_are_empty(service: Service) -> None:
    for path in (
        "/elements/top-k/5",
        "/elements/sample-range/1/5/2",
        "/elements/roots",
        "/elements/uct-scores",
        "/elements/search-similar?motivation=a",
        "/candidates/all",
        "/candidates/top-k/5",
        "/candidates/sample-range/1/10/1",
    ):
        assert service.get(path) == [], path
    assert service.delete("/candidates/by-name/x")["data"] == {"deleted_count": 0}
    assert service.delete("/candidates/all")["data"] == {"deleted_count": 0}


def test_service_description_health_and_stats(service: Service) -> None:
    port = int(service.url.rsplit(":", 1)[1])
    described = service.get("/")
    assert described["success"] is True and described["data"]["port"] == port
    assert set(described["data"]) == {"version", "docs", "redoc", "port"}
    service.add("a")
    service.add("a")
    health = service.get("/health")
    assert health["status"] == "healthy" and health["database"] == {"connected": True, "total_records": 2}
    stats = service.get("/stats")
    assert set(stats) == {
        "total_records", "unique_names", "database_size", "collection_size", "index_size", "storage_size",
        "average_object_size", "database_name", "collection_name",
    }  # fmt: skip
    assert (stats["total_records"], stats["unique_names"]) == (2, 1)
    assert 0 < stats["average_object_size"] * 2 == stats["collection_size"] <= stats["database_size"]
    assert service.http.get("/openapi.json").status_code == 200


def test_ranking_by_benchmark_mean_puts_missing_ones_last(service: Service) -> None:
    for name, cells in (("low", "0.1,0.2"), ("none", "nan,0.9"), ("high", "0.5,0.6"), ("middle", "0.3,0.3")):
        service.add(name, result={"train": "step,1\nx,4.5", "test": f"Model,a,b\nx,{cells}"})
    assert [element["name"] for element in service.get("/elements/top-k/10")] == ["high", "middle", "low", "none"]
    assert [element["name"] for element in service.get("/elements/sample-range/2/3/5")] == ["middle", "low"]
    drawn = {service.get("/elements/sample-range/1/3/1")[0]["name"] for _ in range(40)}
    assert drawn == {"low", "middle", "high"}
    assert service.get("/elements/sample-range/9/12/3") == []


def test_tree_routes_and_surgery(service: Service) -> None:
    for parent in (None, 1, 1, 2, 2, 3, 5):
        service.add(f"n{parent}", parent)
    indices = lambda found: [element["index"] for element in found]  # noqa: E731
    assert indices(service.get("/elements/1/children")) == [2, 3]
    assert service.get("/elements/7/children") == []
    assert indices(service.get("/elements/7/path")) == [1, 2, 5, 7]
    assert indices(service.get("/elements/roots")) == [1]
    context = service.get("/elements/context/2")["data"]
    assert context["direct_parent"]["index"] == 2 and context["grandparent"]["index"] == 1
    assert indices(context["strongest_siblings"]) == [5, 4]
    assert service.get("/elements/context/1")["data"]["grandparent"] is None
    assert list(context["direct_parent"]) == KEYS
    tree = service.get("/tree-structure")["data"]
    assert tree["total_roots"] == 1
    root = tree["trees"][0]
    assert set(root["element"]) == {"index", "name", "time", "parent"}
    assert [child["element"]["index"] for child in root["children"]] == [2, 3]
    assert service.get("/tree-structure?root_index=5")["data"]["children"][0]["element"]["index"] == 7
    service.post("/elements/2/set-parent", {"parent_index": 7}, 400)
    service.post("/elements/2/set-parent", {"parent_index": 2}, 400)
    service.post("/elements/2/set-parent", {"parent_index": 99}, 400)
    service.post("/elements/99/set-parent", {"parent_index": 1}, 404)
    service.post("/elements/2/set-parent", {}, 422)
    assert service.post("/elements/4/set-parent", {"parent_index": 3})["data"] == {"child_index": 4, "parent_index": 3}
    assert service.get("/elements/by-index/4")["parent"] == 3
    service.delete("/elements/by-index/2")
    assert indices(service.get("/elements/1/children")) == [3, 5]
    service.post("/elements/3/set-parent", {"parent_index": None})
    service.delete("/elements/by-index/1")
    assert indices(service.get("/elements/roots")) == [3, 5]
    assert service.add("next") == 8


def test_uct_follows_the_published_rule(service: Service) -> None:
    service.add("root", result={"train": "s,1\nx,4", "test": "m,a\nx,0.5"})
    assert service.get("/elements/uct-select")["index"] == 1
    service.add("child", 1)
    service.add("child", 1)
    service.add("unmeasured", None, result={"train": "s,1\nx,4", "test": "m,a\nx,nan"})
    service.add("leaf", 4)
    assert service.get("/elements/uct-select")["index"] == 2
    rows = service.get("/elements/uct-scores?c_param=2")
    assert [row["index"] for row in rows] == [2, 3, 5, 1, 4]
    assert rows[0]["uct_score"] == "infinite" and rows[0]["n_node"] == 0
    assert set(rows[0]) == {"index", "name", "base_score", "n_node", "exploration_term", "uct_score", "summary"}
    assert rows[3]["uct_score"] == pytest.approx(0.5 + 2 * math.sqrt(math.log(4) / 2))
    assert rows[4]["base_score"] is None and rows[4]["uct_score"] is None


def test_clean_invalid_drops_incomplete_rows_and_keeps_the_tree(service: Service) -> None:
    service.add("root")
    service.add("empty cell", 1, result={"train": "step,1,2\nx,4.5,", "test": "m,a\nx,0.5"})
    service.add("missing row", 2, result={"train": "step,1\n", "test": "m,a\nx,0.5"})
    service.add("child", 3)
    service.add("nan is no empty cell", 3, result={"train": "step,1\nx,nan", "test": ",a,average\n,0.1,nan"})
    assert service.post("/elements/clean-invalid")["data"] == {
        "count_before": 5, "cleaned_count": 2, "reparented_children": 2, "count_after": 3,
    }  # fmt: skip
    assert service.get("/elements/by-index/4")["parent"] == service.get("/elements/by-index/5")["parent"] == 1
    again = service.post("/elements/clean-invalid")["data"]
    assert again["cleaned_count"] == 0 and again["message"]


def test_deletes_take_vectors_and_candidates_along(service: Service) -> None:
    for name in ("a", "a", "b"):
        index = service.add(name)
        service.post(f"/candidates/{index}/add")
    assert service.get("/faiss/stats")["data"] == {
        "total_vectors": 3, "dimension": 64, "index_type": "IP", "active_mappings": 3, "orphan_vectors": 0,
        "next_index": 3, "health_status": "healthy",
    }  # fmt: skip
    assert service.delete("/elements/by-name/a")["data"] == {"deleted_count": 2}
    assert [element["index"] for element in service.get("/candidates/all")] == [3]
    # Of a long motivation there are several; what is held is what is in use and what is not.
    service.add("long", motivation="gate state " * 60)
    found = service.get("/faiss/stats")["data"]
    assert (found["active_mappings"], found["orphan_vectors"]) == (5, 2)
    assert found["total_vectors"] == found["next_index"] == 7
    assert service.get("/v2/stats")["vector_index"] | {"dimension": 64} == {
        "vectors": 7, "elements": 2, "orphans": 2, "dimension": 64, "recall": None,
    }  # fmt: skip
    assert service.post("/faiss/clean-orphans")["data"] == {"total_vectors": 5, "orphan_vectors": 0, "cleaned": 2}
    found = service.get("/faiss/stats")["data"]
    assert (found["total_vectors"], found["active_mappings"], found["orphan_vectors"]) == (5, 5, 0)
    service.delete("/elements/by-name/long")
    assert service.post("/faiss/rebuild")["data"]["total_vectors"] == 1
    assert service.post("/repair")["success"] is True
    service.delete("/elements/all")
    assert service.get("/elements/search-similar?motivation=a") == []
    assert service.add("first again") == 1


def test_search_finds_the_nearest_window_of_a_long_text(service: Service) -> None:
    filler = " ".join(f"filler{number}" for number in range(300))
    service.add("long", motivation=f"{filler} delta rule with per channel decay gates")
    service.add("short", motivation="softmax attention over blocks")
    service.add("other", motivation="state space with convolution")
    settled(service)
    found = service.get("/elements/search-similar", params={"motivation": "delta rule with per channel decay gates"})
    assert found[0]["name"] == "long" and len(found) == 3
    assert list(found[0]) == KEYS
    found = service.get("/elements/search-similar", params={"motivation": "softmax attention", "top_k": 1})
    assert [element["name"] for element in found] == ["short"]
    assert service.get("/faiss/stats")["data"]["total_vectors"] > 10


def test_a_repeated_idempotency_key_answers_as_the_first_did(service: Service) -> None:
    headers = {"Idempotency-Key": "k1"}
    first = service.post("/elements", body_of("a"), headers=headers)
    assert service.post("/elements", body_of("a"), headers=headers)["data"] == first["data"]
    assert "k1" in service.post("/elements", body_of("other"), 409, headers=headers)["detail"]
    assert "body" in service.post("/elements", body_of("a", summary="another"), 409, headers=headers)["detail"]
    assert service.get("/health")["database"]["total_records"] == 1
    service.add("b")
    moved = service.post("/elements/1/set-parent", {"parent_index": 2}, headers=headers)
    assert service.post("/elements/1/set-parent", {"parent_index": 2}, headers=headers) == moved
    assert "body" in service.post("/elements/1/set-parent", {"parent_index": None}, 409, headers=headers)["detail"]
    removed = service.delete("/elements/by-index/1", headers=headers)
    assert service.delete("/elements/by-index/1", headers=headers) == removed
    service.delete("/elements/by-index/1", 404)


def test_the_reset_sequence_of_existing_clients(service: Service) -> None:
    service.delete("/elements/all")
    service.post(
        "/elements",
        body_of("delta_net", result={"train": "step,1,2000\nx,10.8,4.5749", "test": "m,a,average\nx,0.224,nan"}),
    )
    service.post("/candidates/1/add")
    candidate = service.get("/candidates/all")[0]
    assert list(candidate) == [*KEYS, "score"]
    # Loss and benchmark within a hair of the published baseline, judge at the anchor: 0.5 + 0.5 + 4/9.
    assert candidate["score"] == pytest.approx(0.5 + 0.5 + 4 / 9, abs=1e-3)
