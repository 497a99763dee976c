"""The functional fingerprint: equal for what is written otherwise, another for another mechanism."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from common.process import REPOSITORY
from pipeline.designer import MECHANISMS, OPTIONS, SLOTS, Genome, render
from pipeline.designer.grammar import DELTA_NET, GATED_DELTA_NET, problems
from tests.pipeline.designs import genome_with
from training.programs import Program
from training.sandbox import choose
from training.scorer.client import Worker
from training.scorer.verifier import CHECKS, Options
from training.scorer.verifier.context import Context

BEST = choose("auto")
pytestmark = pytest.mark.skipif(BEST.backend != "bubblewrap", reason=f"no bubblewrap here: {BEST.note}")
SEED = (REPOSITORY / "training" / "architectures" / "gated_delta_net.py").read_text()
DELTA = (REPOSITORY / "training" / "architectures" / "delta_net.py").read_text()


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker(BEST, Program("seed", SEED)) as started:
        yield started


def fingerprint(worker: Worker, text: str) -> str:
    worker.program = Program("p", text)
    context = Context(worker, worker.program, Options(), precise="float64", lowest="float64")
    worker.load()
    built, _ = worker.call("construct", {"specs": [context.spec()]})
    context.shapes = [shape for _, shape in built["results"][0]["parameters"]]
    (outcome,) = CHECKS["fingerprint"](context)
    assert outcome.passed, outcome
    assert context.facts["fingerprint"]
    return str(context.facts["fingerprint"])


def replaced(text: str, *pairs: tuple[str, str]) -> str:
    for old, new in pairs:
        assert old in text, old
        text = text.replace(old, new)
    return text


def test_names_order_fusion_and_writing_make_no_difference(worker: Worker) -> None:
    first = fingerprint(worker, SEED)
    renamed = replaced(SEED, ("g_proj", "gate_map"), ("A_log", "rate"), ("qkv_conv", "aaa"), ("o_proj", "zzz"))
    beta = "        if use_beta:\n            self.b_proj = nn.Linear(hidden_size, num_heads, bias=False)\n"
    step = "        self.a_proj = nn.Linear(hidden_size, num_heads, bias=False)\n"
    reordered = replaced(SEED, (beta, ""), (step, step + beta))
    split = replaced(
        SEED,
        (
            "        self.qkv_proj = nn.Linear(hidden_size, sum(self.qkv_dims), bias=False)\n",
            "        self.first = nn.Linear(hidden_size, self.qkv_dims[0], bias=False)\n"
            "        self.second = nn.Linear(hidden_size, self.qkv_dims[1], bias=False)\n",
        ),
        ("self.qkv_proj(x_BTD)", "torch.cat([self.first(x_BTD), self.second(x_BTD)], -1)"),
    )
    longer = replaced(SEED, ("CHUNK = 32", "CHUNK = 64"))
    for text in (renamed, reordered, split, longer, render(GATED_DELTA_NET, "delta_net_again")):
        assert fingerprint(worker, text) == first
    assert fingerprint(worker, render(DELTA_NET, "delta_net_other")) == fingerprint(worker, DELTA) != first


def test_small_changes_of_the_function_make_a_difference(worker: Worker) -> None:
    texts = [
        SEED,
        replaced(SEED, ("F.softplus(a_BTH", "F.relu(a_BTH")),
        replaced(SEED, (".sigmoid()", ".sigmoid() * 0.97")),
        replaced(SEED, ("self.o_proj(o_BTV * F.silu(", "self.o_proj(o_BTV * torch.sigmoid(")),
        replaced(SEED, ("v = rearrange" if "v = rearrange" in SEED else "F.silu(v)", "F.relu(v)")),
    ]
    assert len({fingerprint(worker, text) for text in texts}) == len(texts)


def designs(count: int) -> dict[str, Genome]:
    """Each mechanism beside DeltaNet, then random sentences of the grammar; all different."""
    found = {DELTA_NET: "delta", GATED_DELTA_NET: "gated"}
    found |= {genome_with(name): name for name in sorted(MECHANISMS)}
    generator = random.Random(5)
    while len(found) < count:
        chosen = {slot: generator.choice(OPTIONS[slot]) for slot in SLOTS}
        if not problems(chosen):
            found.setdefault(Genome(**chosen), f"random {len(found)}")
    return {name: genome for genome, name in list(found.items())[:count]}


def distinct(worker: Worker, count: int) -> None:
    prints: dict[str, list[str]] = {}
    for name, genome in designs(count).items():
        prints.setdefault(fingerprint(worker, render(genome, "delta_net_any")), []).append(name)
    assert len(prints) == count, [names for names in prints.values() if len(names) > 1]


def test_forty_designs_have_forty_prints(worker: Worker) -> None:
    distinct(worker, 40)


@pytest.mark.slow
def test_four_hundred_designs_have_as_many_prints(worker: Worker) -> None:
    distinct(worker, 400)
    print("400 designs of the designer, 400 fingerprints")
