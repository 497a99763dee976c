"""Checks, trains and benchmarks one program: `python training/train.py FILE --profile cpu --seed 0 --out DIR`.

Small version: `python training/train.py training/architectures/delta_net.py --profile cpu-smoke --out /tmp/out`
(about 25 s, and 10 s more the first time for the corpus). Writes DIR/result.json, train.csv, test.csv, metrics.jsonl
and, where the program printed something, stderr.log. Where the profile keeps checkpoints, the same command goes on
after a kill from the last one; where it has finished, it shows the result again.
`torchrun --nproc-per-node N training/train.py ...`, or --training.processes N, shares each batch among N processes.
Exit status: 0 finished, 1 refused or forged, 3 failed, 4 stopped (by the monitor, or Ctrl-C), 2 wrong usage.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

    from common.process import end_on_interrupt

    end_on_interrupt(status=4)

import argparse
import contextlib
import os
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from common.errors import AsiError, JobError, UsageError
from common.files import held, sha256_text, write_json
from common.process import exit_with_parent, leave, on_interrupt
from common.records import CheckReport, RunRecord
from common.settings import Settings, parse, path_argument, usage_exit
from common.text import printable
from training.branch import branched, require_lineage
from training.checkpoints import FOLDER, refuse_foreign
from training.command import WARNING
from training.events import Event
from training.launcher import Launcher
from training.profiles import load_profile, profile_names
from training.programs import Program, load
from training.refused import refused_record
from training.repeat import repeating_command
from training.results import FILES, clear, finished_before
from training.run import run_identity
from training.torchrun import asked_for, launched

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

__all__ = ["exit_status", "main"]

INTERRUPTED = 4


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    exit_with_parent(parent=os.getppid() if launched(os.environ) else None)
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Check, train and benchmark one program.",
        epilog=f"profiles: {', '.join(profile_names())}",
    )
    parser.add_argument("file", type=path_argument, metavar="FILE", help="a program file with a class DeltaNet")
    parser.add_argument(
        "--out", type=path_argument, required=True, metavar="DIR", help="folder for result.json, train.csv, test.csv"
    )
    parser.add_argument("--reference", action="store_true", help="a program outside the search: cost is a warning")
    parser.add_argument(
        "--trust", action="store_true", help="you have read it: run it without a real sandbox if there is none"
    )
    parser.add_argument(
        "--start-from",
        type=path_argument,
        metavar="FILE",
        help="a kept checkpoint of this program and seed to go on from",
    )
    parser.add_argument(
        "--decay-steps", type=int, metavar="N", help="with --start-from: decay over N steps from there, and end"
    )
    short = ("run.profile", "run.seed", "training.text", "training.benchmarks")
    try:
        sections = ("run.profile", "run.seed", "sandbox", "check", "training", "monitor")
        settings, arguments = parse(parser, argv, sections=sections, short=short)
        copies = asked_for(os.environ)
        if copies is not None:
            if copies[0] > 0:
                return 0
            settings = _shared(settings, copies[1])
        profile = load_profile(settings.run.profile)
        if arguments.start_from is not None:
            profile = branched(profile, arguments.start_from, arguments.decay_steps)
        elif arguments.decay_steps is not None:
            raise UsageError("--decay-steps says how to go on from a checkpoint", "name it with --start-from FILE")
        name = arguments.file.stem
        if arguments.start_from is not None and settings.training.command is not None:
            raise UsageError("--start-from goes on from a checkpoint of our trainer", "leave out training.command")
        program = load(arguments.file, trust=arguments.trust, reference=arguments.reference, name=name)
        arguments.out.mkdir(parents=True, exist_ok=True)
        launcher = Launcher(settings, profile)
    except UsageError as error:
        return usage_exit(error)
    except OSError as error:
        return usage_exit(
            UsageError(f"cannot make the folder {error.filename}: {error.strerror}", "name another --out")
        )
    command = repeating_command(
        settings,
        settings.run.profile,
        program,
        settings.run.seed,
        file=str(arguments.file.absolute()),
        out=str(arguments.out.absolute()),
        more=_branch_flags(arguments),
    )
    cancel = threading.Event()
    with _Display(cancel) as display:
        try:
            record = _run(launcher, program, settings, arguments.out, arguments.start_from, command, display, cancel)
        except AsiError as error:
            display.line(f"error: {error}", error=True)
            return error.exit_code
    if record is None:
        print("stopped, interrupted: the corpus was not ready, so nothing was written", file=sys.stderr)
        return INTERRUPTED
    display.summary(record, arguments.out)
    return exit_status(record)


def _branch_flags(arguments: argparse.Namespace) -> list[str]:
    origin, decay = arguments.start_from, arguments.decay_steps
    flags = ["--start-from", str(origin.absolute())] if origin is not None else []
    return flags + (["--decay-steps", str(decay)] if decay is not None else [])


def _shared(settings: Settings, processes: int) -> Settings:
    training = settings.training.model_copy(update={"processes": processes})
    return settings.model_copy(update={"training": training})


def exit_status(record: RunRecord) -> int:
    """0 finished, 1 refused or forged, 3 failed, 4 stopped."""
    if record.reason in ("refused", "forged"):
        return 1
    return {"finished": 0, "failed": 3, "stopped": INTERRUPTED}[record.status]


def _run(
    launcher: Launcher,
    program: Program,
    settings: Settings,
    out: Path,
    origin: Path | None,
    command: str,
    display: _Display,
    cancel: threading.Event,
) -> RunRecord | None:
    """The record, which lies in `out` too; None where Ctrl-C, which sets `cancel`, came before there was a corpus to
    name in it."""
    seed = settings.run.seed
    run_id = sha256_text(f"{program.sha256} {launcher.profile.fingerprint()} {seed}")[:16]

    with contextlib.ExitStack() as holding:
        holding.enter_context(on_interrupt(lambda number: cancel.set()))
        try:
            launcher.ready(display.show, cancel)
        except JobError:
            if cancel.is_set():
                return None
            raise
        key = launcher.baseline_key()
        done = finished_before(out, program_sha256=program.sha256, baseline_key=key, seed=seed)
        if done is not None:
            display.line(f"{out} holds this run, finished before: to train again, name another --out or remove {out}")
            return done
        holding.enter_context(held(out))
        if launcher.command is None:
            identity = run_identity(launcher, program, seed)
            refuse_foreign(out / FOLDER, identity)
            if origin is not None:
                require_lineage(origin, identity)
        else:
            display.line(f"warning: {WARNING}", error=True)
        clear(out)
        report: CheckReport | None = None
        began = time.monotonic()
        try:
            report = launcher.check([program], display.show, cancel)[0]
        except JobError:
            if not cancel.is_set():
                raise
        if report is None or not report.accepted:
            wall = time.monotonic() - began
            record = refused_record(launcher, program, report, seed=seed, run_id=run_id, command=command, wall=wall)
            write_json(out / "result.json", record.model_dump(mode="json"))
            return record
        return launcher.train(
            program,
            seed=seed,
            out=out,
            run_id=run_id,
            checks=report,
            on_event=display.show,
            cancel=cancel,
            command=command,
            keep=settings.training.keep_checkpoint,
            origin=origin,
        )


class _Display:
    """Shows events: one moving line a stage on a terminal, plain lines otherwise.

    Args:
        cancel: once set, a stage that ends was not done but stopped.
    """

    def __init__(self, cancel: threading.Event) -> None:
        from common.console import PipedConsole

        self._cancel = cancel
        self._console = PipedConsole(highlight=False)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._stage, self._begun, self._said = "", time.monotonic(), 0.0
        if self._console.is_terminal:
            from rich.progress import BarColumn, Progress, TextColumn

            columns = (TextColumn("{task.description:10}"), BarColumn(30), TextColumn("{task.fields[text]}"))
            self._progress = Progress(*columns, console=self._console, transient=True)

    def __enter__(self) -> _Display:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end_stage()
        if self._progress is not None:
            self._progress.stop()

    def line(self, text: str, error: bool = False) -> None:
        if error:
            print(printable(text), file=sys.stderr, flush=True)
        else:
            self._console.print(printable(text), markup=False, soft_wrap=True)

    def show(self, event: Event) -> None:
        if event.kind == "stage":
            self._end_stage()
            self._stage, self._begun = event.name, time.monotonic()
            if self._progress is not None:
                self._task = self._progress.add_task(event.name, total=None, text="")
        elif event.kind == "progress":
            self._show_progress(event)
        elif self._progress is None:
            self.line(f"{event.name}: {event.text}")
        elif self._task is not None:
            self._progress.update(self._task, text=event.text)

    def _show_progress(self, event: Event) -> None:
        parts = [f"step {event.step}/{event.steps}"]
        parts += [f"loss {event.loss:.3f}"] if event.loss is not None else []
        parts += [f"{event.tokens_per_second:,.0f} tokens/s"] if event.tokens_per_second else []
        parts += [f"{event.seconds_left:.0f} s left"] if event.seconds_left is not None else []
        text = ", ".join(parts)
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, total=event.steps, completed=event.step or 0, text=text)
        elif time.monotonic() - self._said > 2 or event.step == event.steps:
            self._said = time.monotonic()
            self.line(f"train: {text}")

    def _end_stage(self) -> None:
        if self._stage:
            if self._progress is not None and self._task is not None:
                self._progress.remove_task(self._task)
            self._task = None
            stopped = "stopped after " if self._cancel.is_set() else ""
            self.line(f"{self._stage}: {stopped}{time.monotonic() - self._begun:.1f} s")
            self._stage = ""

    def summary(self, record: RunRecord, out: Path) -> None:
        from rich.table import Table

        table = Table(box=None, pad_edge=False, show_header=True)
        for title in ("measure", "value", "± se", "n", "chance", "bits a byte"):
            table.add_column(title, justify="left" if title == "measure" else "right")
        if record.heldout_loss is not None:
            loss = record.heldout_loss
            table.add_row("held-out loss", f"{loss.value:.4f}", _number(loss.se, 4), f"{loss.n:,}")
        elif record.loss is not None:
            table.add_row(record.loss_name, f"{record.loss.value:.4f}")
        for column, value in record.reported.items():
            table.add_row(f"{printable(column)}, reported", "none" if value is None else f"{value:.4f}")
        if record.learning_curve is not None:
            area = record.learning_curve
            table.add_row("mean validation loss", f"{area.value:.4f}", "", f"{area.n} points")
        for name, area in record.task_curves.items():
            table.add_row(f"{name} over the run", f"{area.value:.3f}", "", f"{area.n} points")
        for name, score in record.benchmarks.items():
            chance = _number(score.chance, 2) + (" *" if score.not_above_chance else "")
            bits = f"{score.bits_per_byte.value:.3f}" if score.bits_per_byte else ""
            table.add_row(name, f"{score.value:.3f}", _number(score.se, 3), str(score.n), chance, bits)
        for name, found in record.perplexities.items():
            table.add_row(f"{name} perplexity", f"{found.value:.2f}", _number(found.se, 2), str(found.n))
        if record.benchmark_mean is not None:
            mean = record.benchmark_mean
            counted = [score for score in record.benchmarks.values() if score.counted]
            lost = sum(score.not_above_chance for score in counted)
            named = f"mean of {len(counted) or mean.n}" + (f", {lost} at chance *" if lost else "")
            table.add_row(named, f"{mean.value:.3f}", _number(mean.se, 3), str(mean.n))
        reason = f", {record.reason}: {record.detail.splitlines()[0] if record.detail else ''}" if record.reason else ""
        self.line(f"\n{record.name}: {record.status}{reason}")
        if record.trainer == "command" and record.status == "finished":
            self.line("unaudited: reported by training.command")
        if table.row_count:
            self._console.print(table)
        if any(score.not_above_chance for score in record.benchmarks.values()):
            self.line("* not more than 2 SE above chance")
        if record.parameters is not None:
            rate = f", {record.tokens_per_second:,.0f} tokens/s" if record.tokens_per_second else ""
            self.line(f"{record.parameters:,} parameters ({record.mixer_parameters:,} in the mixers){rate}")
        if record.efficiency is not None and record.efficiency.prefill:
            speeds = [f"{length}: {speed.value:,.0f}" for length, speed in record.efficiency.prefill.items()]
            decode = record.efficiency.decode
            written = f"; decoding {decode.value:,.0f}" if decode is not None else ""
            memory = f"; peak memory {record.efficiency.peak_memory_mb:,.0f} MB"
            self.line(f"prefill, tokens/s at length {', '.join(speeds)}{written}{memory}")
        if record.seconds:
            wall = {name: value for name, value in record.seconds.items() if not name.endswith("_cpu")}
            earlier = wall.pop("train_earlier", None)
            more = f"; train and total count {earlier:.1f} of earlier starts" if earlier is not None else ""
            self.line("seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in wall.items()) + more)
        self.line("files: " + " ".join(str(out / name) for name in sorted(FILES) if (out / name).exists()))


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


if __name__ == "__main__":
    leave(main())
