"""The benchmark of the verifier: its programs are what they say, and a sample gets the right verdicts; slow: all."""

from __future__ import annotations

import ast
import random

import pytest

from benchmarks import mutants_blind as blind
from benchmarks import verifier_report as report
from benchmarks.good_designs import good_designs
from benchmarks.mutant import Mutant
from benchmarks.mutants import form, mutants, sweep
from benchmarks.verifier import good_programs, planted_faults, run_good, run_mutants, run_sweep
from common.files import sha256_text
from common.process import REPOSITORY
from training.programs import seed_hashes
from training.sandbox import choose
from training.scorer.verifier import CHECKS

BEST = choose("auto")
sandboxed = pytest.mark.skipif(BEST.backend != "bubblewrap", reason=f"no bubblewrap here: {BEST.note}")

DOCUMENTATION = REPOSITORY / "docs" / "verifier.md"


def documented(mutant: Mutant) -> bool:
    """Whether docs/verifier.md names it as one that is missed."""
    return DOCUMENTATION.exists() and f"`{mutant.name}`" in DOCUMENTATION.read_text(encoding="utf-8")


def test_every_mutant_is_a_changed_program_with_its_own_name_and_a_check_to_refuse_it() -> None:
    planted = mutants()
    good = good_designs(crossovers=6)
    assert len(planted) >= 60 and len(good) >= 60
    for programs in (planted, good, [point.mutant for point in sweep()]):
        assert len({item.name for item in programs}) == len(programs)
        assert len({item.text for item in programs}) == len(programs)
    shipped, honest = seed_hashes(), {item.text for item in good}
    checks = {*CHECKS, "static", "reach", "sandbox"}
    for mutant in planted:
        assert sha256_text(mutant.text) not in shipped and mutant.text not in honest, mutant.name
        assert mutant.fault and mutant.expected and mutant.expected <= checks, (mutant.name, mutant.expected - checks)
        if "static" not in mutant.expected:
            ast.parse(mutant.text)


def test_the_blind_set_can_still_be_planted() -> None:
    """Its edits name lines of our designer's text, which moves on."""
    planted, sound = blind.mutants(), blind.honest()
    assert (len(planted), len(sound)) == (170, 36)
    assert len({item.text for item in (*planted, *sound)}) == 206


def test_the_same_programs_are_made_in_every_call() -> None:
    assert mutants() == mutants() and good_designs(2) == good_designs(2)


@sandboxed
def test_a_sample_of_mutants_is_refused() -> None:
    # Faults of form are refused by the first checks; leaks and good designs, which run more, are in other tests.
    rng = random.Random(1)
    quick = [item for item in form.mutants() if "static" in item.expected or item.expected == {"shapes"}]
    chosen = rng.sample(quick, 2)
    rows = [(item.name, item.text, item.fault, item.expected) for item in chosen if not documented(item)]
    result = report.check_all("sample", rows, 2)
    assert all(verdict.accepted is False and verdict.intended for verdict in result.verdicts), report.text(result)


def test_the_figures_name_what_was_missed() -> None:
    def verdict(name: str, accepted: bool) -> report.Verdict:
        by = () if accepted else ("batch",)
        return report.Verdict(
            name, "a fault", frozenset({"causality"}), accepted, by, ("state",), "differs", 2.0, 700.0
        )

    found = report.text(report.SetResult("one", True, (verdict("a", False), verdict("b", True)), 9.0))
    assert "1/2 planted faults refused" in found and "missed b" in found and "warned of by state" in found
    assert "refused by another check: a, expected causality" in found and "4.5 s of wall time" in found
    points = [report.Point("plain", "early", strength, strength > 1e-3) for strength in (1e-1, 1e-6)]
    assert "50%" not in report.curve(points) and "100%" in report.curve(points)


@sandboxed
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["one", "two"])
def test_every_mutant_is_refused_or_stands_in_the_documentation(name: str) -> None:
    faults = planted_faults(name)
    result = run_mutants(name, faults)
    print(report.text(result))
    known = {item.name for item in faults if documented(item)}
    assert {verdict.name for verdict in result.wrong()} <= known
    assert all(verdict.accepted is not None for verdict in result.verdicts)


@sandboxed
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["good", "two"])
def test_no_good_design_is_refused(name: str) -> None:
    result = run_good(name, good_programs(name))
    print(report.text(result))
    assert all(verdict.accepted for verdict in result.verdicts)


@sandboxed
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_leaks_of_1e_4_are_refused_at_every_position() -> None:
    result, points = run_sweep()
    print(report.text(result))
    print(report.curve(points))
    assert all(point.found for point in points if point.strength >= 1e-4 and point.kind != "in bfloat16")
