"""Whole experiments: one write, once for each key, nothing acknowledged is lost, scores and candidates by the rules."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from benchmarks.database_data import fill
from common.errors import ServiceError
from common.knobs import Database as DatabaseSettings
from common.records import Baseline
from database.candidate_manager import Candidates
from database.client import DatabaseClient
from database.scores import Scores
from database.store import Session, open_store
from tests.database.db_service import BASELINE, EmbeddingDouble, Service, element_of, run_of, settled


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-6 * max(-1.0, min(1.0, x))))


def test_an_experiment_is_stored_whole_and_once(service: Service) -> None:
    client = service.client
    client.put_baseline(BASELINE)
    element = element_of(1, None)
    run = run_of(element, 3.9, 0.55)
    first = client.add_experiment("e1", element, run)
    assert (first.index, first.name, first.created) == (1, "delta_net_1", True)
    again = client.add_experiment("e1", element.model_copy(update={"log": "sent again"}), run_of(element, 3.8, 0.6))
    assert again.model_dump() == first.model_dump() | {"created": False}
    assert client.experiment("e1") == again and client.experiment("e2") is None
    other = element_of(2, None)
    with pytest.raises(ServiceError, match="e1' was used before, for element 1") as caught:
        client.add_experiment("e1", other, run_of(other, 3.9, 0.55))
    assert caught.value.status == 409
    assert client.runs(1) == [run]
    stored = client.element(1)
    assert stored is not None and stored.program == element.program
    page = client.all_elements()
    assert [item.index for item in page.elements] == [1] and page.next is None
    assert client.element(2) is None and client.scored(2) is None and client.context(2) is None


def test_what_is_no_finished_experiment_of_this_program_is_refused(service: Service) -> None:
    element = element_of(1, None)
    run = run_of(element, 3.9, 0.55)
    for wrong in (
        {"element": element.model_dump(), "run": run.model_dump() | {"status": "stopped", "reason": "slow"}},
        {"element": element.model_dump() | {"program": "another"}, "run": run.model_dump()},
        {"element": element.model_dump() | {"parent": 5}, "run": run.model_dump()},
    ):
        service.post("/v2/experiments", {"idempotency_key": "k", **wrong}, 400)
    for wrong in (
        {"element": element.model_dump()},
        {"element": element.model_dump(), "run": run.model_dump() | {"seed": "x"}},
        {"element": element.model_dump(), "run": run.model_dump() | {"more": 1}},
    ):
        service.post("/v2/experiments", {"idempotency_key": "k", **wrong}, 422)
    assert service.get("/health")["database"]["total_records"] == 0


def test_scores_by_hand(service: Service) -> None:
    client = service.client
    client.put_baseline(BASELINE)
    assert client.baseline("cpu-1") == BASELINE
    # The standard: both terms at their measured gain, the judge anchored at 5.
    standard = service.add_experiment(1, None, 4.0, 0.5)
    assert standard["score"] == pytest.approx(0.5 + 0.5 + 4 / 9)
    candidate = service.add_experiment(2, 1, 3.8, 0.56)
    details = client.score_details(2)
    assert details["loss_term"] == pytest.approx(sigma((4.0 - 3.8) / 0.4))
    assert details["benchmark_term"] == pytest.approx(sigma((0.56 - 0.5) / 0.15))
    assert (details["loss_clip"], details["benchmark_clip"], details["baseline_key"]) == (0.1, 0.3, "cpu-1")
    judgement = details["judgement"]
    # Three seeds: t(2) = 4.303. Loss 5 % better, beyond 4.303 x 0.03 x sqrt(4/3) = 0.149: 7. Benchmark 12 % better,
    # within 0.099: 5. Their mean: 6.
    assert judgement["performance_score"] == 6
    # Linear work at 1.05 x the baseline's: "similar".
    assert judgement["complexity_score"] == 8
    weighted = 0.30 * 6 + 0.25 * judgement["innovation_score"] + 0.45 * 8
    assert judgement["weighted_final_score"] == pytest.approx(weighted)
    assert details["judge"] == pytest.approx((weighted - 1) / 9)
    terms = details["loss_term"] + details["benchmark_term"] + details["judge"]
    assert candidate["score"] == pytest.approx(terms) == pytest.approx(details["score"])
    assert all(part["how"] for part in judgement["parts"].values())
    # A difference within the margin is no difference.
    service.add_experiment(3, 1, 3.94, 0.53)
    assert client.score_details(3)["judgement"]["performance_score"] == 5


def test_a_changed_baseline_scores_again(service: Service) -> None:
    service.client.put_baseline(BASELINE)
    service.add_experiment(1, None, 4.0, 0.5)
    before = service.add_experiment(2, 1, 3.9, 0.5)["score"]
    service.client.put_baseline(Baseline(**BASELINE.model_dump() | {"loss": 3.9}))
    after = service.client.scored(2)
    assert after is not None and after.score is not None and after.score < before
    assert service.client.score_details(2)["loss_term"] == pytest.approx(0.5)
    service.put("/v2/baselines/other", BASELINE.model_dump(), 400)
    service.client.put_baseline(BASELINE)


def test_without_its_baseline_an_element_has_no_score(service: Service) -> None:
    element = element_of(1, None)
    run = run_of(element, 3.9, 0.5).model_copy(update={"baseline_key": "not-there"})
    assert service.client.add_experiment("e", element, run).score is None
    assert "not-there" in service.client.score_details(1)["missing"][0]
    assert service.client.stats()["unscored"] == 1


def test_candidates_change_in_batches_after_the_cold_start(service: Service) -> None:
    service.client.put_baseline(BASELINE)
    for number in (1, 2):
        service.add_experiment(number, None, 4.0, 0.5)
        service.client.add_candidate(number)

    def current() -> list[int]:
        return sorted(element.index for element in service.client.candidates())

    # Cold start: four explored elements; they all come in together when it ends.
    for number in (3, 4, 5):
        service.add_experiment(number, 1, 4.0 - 0.02 * number, 0.5)
        assert current() == [1, 2]
    assert service.get("/candidates/stats")["data"]["needs_update"] is False
    service.add_experiment(6, 1, 3.88, 0.5)
    assert len(current()) == 5 and {3, 4, 5, 6} < set(current())
    assert service.get("/candidates/new-data-count")["data"] == {"new_data_count": 0}
    # Then every second element; one that is suspiciously good, and one that is far too bad, stay out.
    service.add_experiment(7, 1, 3.5, 0.5)
    assert 7 not in current()
    service.add_experiment(8, 1, 3.86, 0.52)
    assert 7 not in current() and 8 in current() and len(current()) == 5
    service.add_experiment(9, 1, 3.85, 0.30)
    service.add_experiment(10, 1, 3.84, 0.53)
    assert 9 not in current() and 10 in current()
    best = service.client.candidates()
    assert [item.score for item in best] == sorted((item.score or 0 for item in best), reverse=True)
    assert service.client.candidates_range(1, 1, 1)[0].index == best[0].index
    assert [item["index"] for item in service.get("/candidates/top-k/2")] == [best[0].index, best[1].index]
    assert service.get("/candidates/sample-range/6/9/2") == []
    stats = service.get("/candidates/stats")["data"]
    assert set(stats) == {
        "capacity", "current_size", "update_threshold", "new_data_count", "needs_update", "highest_score",
        "lowest_score", "average_score", "score_range",
    }  # fmt: skip
    assert (service.client.stats()["candidates"]["cold_start"], stats["update_threshold"]) == (4, 2)
    assert stats["score_range"] == pytest.approx(stats["highest_score"] - stats["lowest_score"])
    # By hand: a full set refuses what is not above its lowest.
    service.post("/candidates/1/add", status=400)
    assert service.put(f"/candidates/{best[0].index}")["data"] == {"index": best[0].index}
    assert service.delete(f"/candidates/by-index/{best[0].index}")["data"] == {"index": best[0].index}
    report = service.post("/candidates/force-update")["data"]
    assert set(report) == {
        "updated_at", "total_evaluated", "new_elements_evaluated", "old_candidates", "final_candidates", "new_entries",
        "replaced_entries", "highest_score", "lowest_score", "average_score",
    }  # fmt: skip
    assert report["final_candidates"] == 5 and best[0].index in current()
    rebuilt = service.post("/candidates/rebuild-from-scored")["data"]
    assert set(rebuilt) == {"updated_at", "old_candidate_count", "new_candidate_count", "message"}
    assert 7 in current(), "a rebuild takes the best stored scores, unfiltered"


def test_a_forced_update_looks_at_the_newest_300(tmp_path: Path) -> None:
    settings = DatabaseSettings(store=f"sqlite:///{tmp_path}/a.sqlite")
    fill(settings, 320, small=True)
    store, candidates = open_store(settings), Candidates(settings, Scores())

    def force(session: Session) -> tuple[int, set[int]]:
        session.put_candidates([])
        # The best scores of all, and too old.
        for index in range(1, 21):
            known = session.evidence(index)
            assert known is not None and known[1] is not None
            session.set_evaluation(index, known[0], known[1].model_copy(update={"score": 2.9}))
        told = candidates.force_update(session)
        return told["new_elements_evaluated"], {facts.index for facts in session.candidates()}

    evaluated, members = store.write(force)
    assert evaluated == 300 and len(members) == 50 and min(members) > 20
    store.close()


def test_scores_of_two_baselines_are_never_compared(service: Service) -> None:
    client = service.client
    # Published clients first: their elements have no run record.
    service.add("published")
    client.add_candidate(1)
    assert [item.index for item in client.candidates()] == [1]
    client.put_baseline(BASELINE)
    for number in (2, 3):
        service.add_experiment(number, None, 3.7, 0.6)
        client.add_candidate(number)
    assert [item.index for item in client.candidates()][-1] == 1, "another key ranks after all comparable ones"
    # A baseline nobody was measured against changes nothing.
    client.put_baseline(Baseline(**BASELINE.model_dump() | {"key": "cpu-2"}))
    assert [item.index for item in client.candidates()][-1] == 1

    def measured(number: int, loss: float) -> float | None:
        element = element_of(number, 2)
        run = run_of(element, loss, 0.5).model_copy(update={"baseline_key": "cpu-2"})
        return client.add_experiment(f"e{number}", element, run).score

    worst = measured(4, 4.1)
    client.add_candidate(4)
    found = client.candidates()
    assert found[0].index == 4 and worst is not None
    assert max(item.score or 0 for item in found) > worst, "first, though elements of another key have more"
    stats = service.get("/candidates/stats")["data"]
    assert stats["highest_score"] == stats["lowest_score"] == pytest.approx(worst)
    for number in range(5, 11):
        measured(number, 4.1 - 0.01 * number)
    assert {item.index for item in client.candidates()} <= set(range(4, 11)), "the others gave up their places"
    service.post("/candidates/2/add", status=400)
    service.post("/candidates/rebuild-from-scored")
    assert {item.index for item in client.candidates()} <= set(range(4, 11))
    # The first baseline is put again, unchanged: its elements are the comparable ones now.
    client.put_baseline(BASELINE)
    service.post("/candidates/rebuild-from-scored")
    assert {item.index for item in client.candidates()} == {2, 3}
    service.post("/repair")


def test_a_candidate_is_added_again_without_harm(service: Service) -> None:
    service.client.put_baseline(BASELINE)
    for number in range(1, 6):
        service.add_experiment(number, None, 4.0 - 0.02 * number, 0.5)
        for _ in range(2):
            service.client.add_candidate(number)
    lowest = service.client.candidates()[-1].index
    assert service.post(f"/candidates/{lowest}/add")["data"] == {"index": lowest}
    assert len(service.client.candidates()) == 5


def test_without_an_embedding_server_elements_wait_and_are_settled_later(
    service: Service, embedding: EmbeddingDouble
) -> None:
    service.client.put_baseline(BASELINE)
    service.add_experiment(1, None, 4.0, 0.5)
    embedding.broken = True
    stored = service.add_experiment(2, 1, 3.9, 0.5)
    assert stored["created"] and stored["score"] is None
    stats = service.client.stats()
    assert stats["pending_embeddings"] == 1 and stats["unscored"] == 1 and stats["embedding_error"]
    assert service.get("/faiss/stats")["data"]["health_status"] == "pending"
    assert service.get("/elements/2/score")["data"] == {"index": 2, "score": None}
    service.get("/elements/search-similar?motivation=never%20asked%20before", 503)
    embedding.broken = False
    found = DatabaseClient(service.url).search_similar("gate 2 decays", 2)  # repeats while the server rests
    assert [element.index for element in found] == [2, 1]
    scored = service.client.scored(2)
    assert scored is not None and scored.score is not None
    assert service.client.stats()["pending_embeddings"] == 0


def test_an_element_that_missed_its_batch_enters_once_it_is_scored(
    service: Service, embedding: EmbeddingDouble
) -> None:
    service.client.put_baseline(BASELINE)
    service.add_experiment(1, None, 4.0, 0.5)
    service.client.add_candidate(1)
    embedding.broken = True
    for number in (2, 3, 4, 5):
        service.add_experiment(number, 1, 3.9, 0.5)
    assert service.get("/candidates/new-data-count")["data"]["new_data_count"] == 0
    assert [element.index for element in service.client.candidates()] == [1]
    embedding.broken = False
    service.client.search_similar("gate " * 40_000 + "é" * 40_000)
    # A search embeds what is pending for 3 s at most, which a slow store may not keep to.
    settled(service)
    assert sorted(element.index for element in service.client.candidates()) == [1, 2, 3, 4, 5]


@pytest.mark.timeout(600)
def test_four_clients_at_once_get_every_index_once(service: Service) -> None:
    service.client.put_baseline(BASELINE)

    def work(worker: int) -> list[int]:
        with DatabaseClient(service.url) as client:
            found = []
            for number in range(10):
                element = element_of(100 * worker + number, None)
                found.append(client.add_experiment(f"{worker}-{number}", element, run_of(element, 4.0, 0.5)).index)
                # A retry by another hand.
                client.add_experiment(f"{worker}-{number}", element, run_of(element, 4.0, 0.5))
            return found

    with ThreadPoolExecutor(4) as pool:
        found = [index for indices in pool.map(work, range(4)) for index in indices]
    assert sorted(found) == list(range(1, 41))
    assert service.get("/health")["database"]["total_records"] == 40


def test_kill_9_loses_nothing_that_was_acknowledged(start: Callable[..., Service]) -> None:
    first = start()
    first.client.put_baseline(BASELINE)
    acknowledged: list[tuple[str, int]] = []
    sent: list[str] = []
    enough = threading.Event()

    def write(worker: int) -> None:
        with httpx.Client(base_url=first.url, timeout=60, trust_env=False) as http:
            for number in range(1000):
                element = element_of(1000 * worker + number, None)
                body = {
                    "idempotency_key": element.name,
                    "element": element.model_dump(),
                    "run": run_of(element, 4.0, 0.5).model_dump(),
                }
                sent.append(element.name)
                try:
                    answer = http.post("/v2/experiments", json=body)
                except httpx.HTTPError:
                    return
                acknowledged.append((element.name, answer.json()["data"]["index"]))
                if len(acknowledged) >= 25:
                    enough.set()

    threads = [threading.Thread(target=write, args=(worker,)) for worker in range(3)]
    for thread in threads:
        thread.start()
    # Each is answered with its score, which takes a busy machine seconds.
    assert enough.wait(120)
    first.kill()
    for thread in threads:
        thread.join(30)

    second = start()
    stored = {item.name: item.index for item in second.client.all_elements(0, 500).elements}
    assert dict(acknowledged).items() <= stored.items()
    assert set(stored) <= set(sent)
    assert sorted(stored.values()) == list(range(1, len(stored) + 1)), "no gap, no index twice"
    name, index = acknowledged[0]
    element = element_of(int(name.rsplit("_", 1)[1]), None)
    again = second.client.add_experiment(name, element, run_of(element, 4.0, 0.5))
    assert (again.index, again.created) == (index, False)
    assert second.client.runs(index)[0].name == name
    # What was killed before its score is settled now: by each question as much as 3 s allow, and in the background.
    settled(second)
    assert second.get("/faiss/stats")["data"]["active_mappings"] == len(stored)
    assert second.stop() == 0


def test_the_client_says_what_to_do_and_survives_a_restart(start: Callable[..., Service], tmp_path: object) -> None:
    service = start()
    port = service.url.rsplit(":", 1)[1]
    client = DatabaseClient(service.url)
    assert client.health()["status"] == "healthy"
    service.kill()
    with pytest.raises(ServiceError) as caught:
        client.health()
    assert "database/mongodb_api.py" in caught.value.fix

    def restart() -> None:
        start(env={"ASI_DATABASE__HOST": "127.0.0.1"}, port=port)

    thread = threading.Thread(target=restart)
    thread.start()
    assert client.candidates() == []
    thread.join()
    with pytest.raises(ServiceError) as caught:
        client.add_candidate(5)
    assert caught.value.status == 404
