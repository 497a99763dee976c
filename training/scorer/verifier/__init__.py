"""What an accepted program is known to be: each property is executed in the sandbox, measured, and judged out here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from common.errors import AsiError, SandboxError
from common.records import CheckOutcome, CheckReport
from training.checking import WALL
from training.programs import Program
from training.sandbox import Limits, Sandbox
from training.scorer.client import CandidateFault, OperationFailed, Worker, WorkerDied
from training.scorer.verifier import (
    batch,
    causality,
    construct,
    cost,
    decode,
    fingerprint,
    gradients,
    learns,
    length,
    matched,
    reach,
    shapes,
    state,
    static,
    switches,
)
from training.scorer.verifier.context import Context, Options, Refused, failed, passed, raised

__all__ = ["CHECKS", "Options", "verify", "verify_many"]

Check = Callable[[Context], list[CheckOutcome]]
CHECKS: dict[str, Check] = {
    construct.NAME: construct.run,
    shapes.NAME: shapes.run,
    cost.NAME: cost.run,
    gradients.NAME: gradients.run,
    causality.NAME: causality.run,
    batch.NAME: batch.run,
    state.NAME: state.run,
    switches.NAME: switches.run,
    length.NAME: length.run,
    learns.NAME: learns.run,
    decode.NAME: decode.run,
    matched.NAME: matched.run,
    fingerprint.NAME: fingerprint.run,
}
"""Run in this order after `static` and `reach`, which only read. Without construct and shapes nothing else can run, and
what is far too slow is not run on; of the others, switches leaves out what was refused before it, and matched and
fingerprint use what cost counted."""

_LARGEST_FACT = 1e18
_NEEDED = (construct.NAME, shapes.NAME)
OnCheck = Callable[[Program, CheckOutcome], None]


def verify(
    program: Program, sandbox: Sandbox, options: Options | None = None, on_check: OnCheck | None = None
) -> CheckReport:
    """All checks of one program, in its own sandboxed process.

    Args:
        on_check: called with each outcome as it comes.

    Returns:
        The report: accepted is whether no check of severity refuse failed. A crash, a time-out or a broken limit of
            the program is a failed check `sandbox`. Where no job could be started, which is no fault of the program,
            accepted is None and error says why. facts holds what was measured on the way: mixer_parameters,
            unsupported, dtype, flops_per_token, work_exponent, memory_exponent, ops_per_token, length_exponent,
            learns, decode, state_bytes, parameter_ratio, flops_ratio, fingerprint.
    """
    options = options or Options()
    outcomes: list[CheckOutcome] = []
    facts: dict[str, object] = {}
    try:
        for outcome in _outcomes(program, sandbox, options, facts):
            outcomes.append(outcome)
            if on_check is not None:
                on_check(program, outcome)
    except SandboxError as error:
        return CheckReport(program=program.name, accepted=None, checks=outcomes, facts=facts, error=str(error))
    accepted = all(outcome.passed or outcome.severity == "warn" for outcome in outcomes)
    return CheckReport(program=program.name, accepted=accepted, checks=outcomes, facts=facts)


def verify_many(
    programs: Sequence[Program],
    sandbox: Sandbox,
    options: Options | None = None,
    on_check: OnCheck | None = None,
    on_report: Callable[[int, CheckReport], None] | None = None,
    parallel: int = 2,
) -> list[CheckReport]:
    """`verify` for several programs, `parallel` at a time, each in its own process. Reports come in the order of
    `programs`.

    Args:
        on_report: called with the index and report of each program when it is done, from a thread of the pool.
    """

    def one(index: int) -> CheckReport:
        report = verify(programs[index], sandbox, options, on_check)
        if on_report is not None:
            on_report(index, report)
        return report

    with ThreadPoolExecutor(max(1, parallel)) as pool:
        return list(pool.map(one, range(len(programs))))


def _outcomes(program: Program, sandbox: Sandbox, options: Options, facts: dict[str, object]) -> Iterator[CheckOutcome]:
    begun = time.monotonic()
    first = static.run(program.text)
    yield from _timed([first], begun)
    if not first.passed:
        return
    begun = time.monotonic()
    yield from _timed([reach.run(program.text)], begun)
    limits = Limits(
        seconds=WALL * options.seconds,
        cpu_seconds=options.seconds,
        memory_mb=options.memory_mb,
        file_mb=options.file_mb,
    )
    try:
        sandbox.require(program)
    except SandboxError as error:
        yield failed("sandbox", error.message, {"reason": "refused", "fix": error.fix})
        return
    with Worker(
        sandbox, program, limits=limits, timeout=WALL * options.call_seconds, cpu_timeout=options.call_seconds
    ) as worker:
        context = Context(worker, program, options, facts=facts)
        for name, check in CHECKS.items():
            begun = time.monotonic()
            found, ended = _run(name, check, context)
            refused = {item.name for item in found if not item.passed and item.severity == "refuse"}
            context.refused |= refused
            yield from _timed(found, begun)
            if ended or context.slow or (name in _NEEDED and refused):
                return
        peak = worker.peak_memory_mb()
        used = f"in {sandbox.backend}, {worker.cpu_seconds():.1f} CPU seconds, at most {peak:,.0f} MB of memory"
    yield passed("sandbox", used)


def _run(name: str, check: Check, context: Context) -> tuple[list[CheckOutcome], bool]:
    """The outcomes of one check, and whether the worker is gone or not to be asked any more."""
    try:
        found, ended = _judged(name, check, context), False
    except WorkerDied as fault:
        found, ended = [_broken(name, fault)], True
    except AsiError:
        raise
    except Exception as error:  # noqa: BLE001 - a process boundary: what is judged comes from the candidate's process
        # An answer that does not have the form that our own operation gives was made by something else.
        found, ended = [_no_result(name, f"{type(error).__name__}: {str(error)[:300]}")], True
    beyond = _take_out(context.facts)
    if beyond and not ended:
        return [_no_result(name, f"expected numbers under {_LARGEST_FACT:g} for {', '.join(beyond)}")], True
    return found, ended


def _judged(name: str, check: Check, context: Context) -> list[CheckOutcome]:
    try:
        return check(context)
    except Refused as refusal:
        return [refusal.outcome]
    except OperationFailed as fault:
        return [raised(name, "it raises", fault.error)]


def _no_result(name: str, what: str) -> CheckOutcome:
    detail = f"the process answers with something that is no result: {what}"
    return failed("sandbox", detail, {"reason": "crashed", "during": name})


def _take_out(facts: dict[str, object]) -> list[str]:
    """Removes facts that are infinite, NaN or beyond all measure, since facts are stored and computed with."""
    beyond = [
        name for name, value in facts.items() if isinstance(value, int | float) and not abs(value) < _LARGEST_FACT
    ]
    for name in beyond:
        del facts[name]
    return beyond


def _broken(name: str, fault: CandidateFault) -> CheckOutcome:
    tail = fault.stderr.strip()[-600:] or None
    return failed("sandbox", f"{fault.detail}", {"reason": fault.reason, "during": name, "stderr": tail})


def _timed(found: Sequence[CheckOutcome], begun: float) -> Iterator[CheckOutcome]:
    """The outcomes of one check: the first carries its seconds, so that their sum is the time of all checks."""
    spent = round(time.monotonic() - begun, 4)
    for number, outcome in enumerate(found):
        yield outcome if number else outcome.model_copy(update={"seconds": spent})
