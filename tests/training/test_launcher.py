"""The launcher over real processes: records, files, faults of programs, cancelling, the monitor, and the command
line."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import verifier_assets as assets

from common.errors import JobError, StoreError, UsageError
from common.files import held
from common.process import REPOSITORY
from common.records import CheckOutcome, CheckReport, RunRecord
from common.settings import load
from tests.pipeline.running import children, command_line
from tests.training.forgeries import reporting
from training.checkpoints import FOLDER, kept
from training.items import read_items
from training.launcher import Event, Launcher, Peer, find_device, peer_of
from training.metric_writers import WandB
from training.metrics import Metrics
from training.profiles import OWN_TASKS, CheckpointSpec, load_profile
from training.programs import Program
from training.results import element_result
from training.train import main as train_command

TINY = REPOSITORY / "tests" / "assets" / "tiny.toml"
HEAD = """
import torch
from torch import nn

class DeltaNet(nn.Module):
    def __init__(self, hidden_size=64, d_model=None, **kwargs):
        super().__init__()
        self.proj = nn.Linear(hidden_size, {width}, bias=False)
        self.out = nn.Linear({width}, hidden_size, bias=False)

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        x = self.proj(hidden_states)
"""
MEAN = HEAD.format(width="hidden_size") + (
    "        x = x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]\n        return self.out(x), None, None\n"
)
RAISES = HEAD.format(width="hidden_size") + '        raise ValueError("no good at all")\n'
NAN = HEAD.format(width="hidden_size") + "        return self.out(x) / 0.0, None, None\n"
HIDES = HEAD.format(width="8000") + (
    "        return self.out(x), None, None\n\n    def parameters(self, recurse=True):\n        return iter(())\n"
)
PRINTS = MEAN.replace("        x = self.proj", "        print('said \\x1b[31m so')\n        x = self.proj")
ENDLESS = assets.planted(assets.RETURN, "        while True:\n            pass\n" + assets.RETURN)
SLEEPS = HEAD.format(width="hidden_size") + (
    "        import time\n        time.sleep(0.3)\n        return self.out(x), None, None\n"
)
WANDB = """
import json, os, types
from pathlib import Path

assert os.environ["WANDB_ERROR_REPORTING"] == "false"
errors = types.SimpleNamespace(Error=type("Error", (Exception,), {}))

def Settings(**quiet):
    assert quiet["console"] == "off" and quiet["save_code"] is False

def tell(said):
    with (Path(__file__).parent / "calls").open("a") as calls:
        calls.write(json.dumps(said) + "\\n")

class Run:
    def log(self, values, step):
        tell([values, step])
    def finish(self):
        tell("finished")

def init(settings, **given):
    tell(given)
    return Run()
"""


def program(text: str, name: str = "sample") -> Program:
    return Program(name, text, trust="user")


@pytest.fixture(scope="module")
def flags(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return {"training": {"text": [text_file], "cache_dir": tmp_path_factory.mktemp("cache"), "device": "cpu"}}


@pytest.fixture(scope="module")
def launcher(flags: dict[str, dict[str, Any]]) -> Launcher:
    made = Launcher(load(None, flags), load_profile(TINY))
    made.prepare()
    return made


def train_all(launcher: Launcher, programs: Sequence[Program], out: Path, **options: Any) -> list[RunRecord]:
    def one(number: int) -> RunRecord:
        return launcher.train(programs[number], seed=0, out=out / str(number), run_id=f"run{number}", **options)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, range(len(programs))))


@pytest.fixture(scope="module")
def pair(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[RunRecord], Path, list[Event]]:
    """One program and seed, trained twice at the same time from two threads."""
    out = tmp_path_factory.mktemp("pair")
    events: list[Event] = []
    check = CheckReport(
        program="sample", accepted=True, checks=[CheckOutcome(name="static", passed=True, seconds=0.5)],
        facts={"flops_per_token": 1234.0, "work_exponent": 1.0, "dtype": "float32"},
    )  # fmt: skip
    return train_all(launcher, [program(PRINTS)] * 2, out, checks=check, on_event=events.append), out, events


def test_a_finished_run_has_everything_in_its_record(
    pair: tuple[list[RunRecord], Path, list[Event]], launcher: Launcher
) -> None:
    record = pair[0][0]
    assert (record.status, record.reason, record.detail) == ("finished", None, "")
    assert record.heldout_loss is not None and record.heldout_loss.n == 16 * 64 and record.heldout_loss.se
    assert list(record.benchmarks) == list(launcher.profile.eval.benchmarks)
    assert all(score.chance == 0.25 and 8 <= score.n <= 40 for score in record.benchmarks.values())
    assert record.benchmark_mean is not None and 120 <= record.benchmark_mean.n <= 160
    assert record.train_loss["30"] < record.train_loss["1"]
    assert record.tokens == 30 * 4 * 64 and record.flops_per_token == 1234.0
    assert {"start", "train", "score", "check", "train_cpu"} <= set(record.seconds)
    assert record.baseline_key == launcher.baseline_key() and record.corpus_sha256 == launcher.prepare().sha256
    assert record.program_sha256 == program(PRINTS).sha256 and record.versions["torch"]
    assert peer_of(record).cpu_seconds_per_step
    spent = record.efficiency
    assert spent is not None and list(spent.prefill) == ["64", "128", "256"] and spent.decode is None
    assert all(speed.value > 0 and speed.n == 3 and speed.se is not None for speed in spent.prefill.values())
    assert spent.peak_memory_mb is not None and 50 < spent.peak_memory_mb < 4096
    assert record.command.startswith("python training/train.py PROGRAM --profile tiny --seed 0 --out DIR --trust ")
    (text,) = launcher.settings.training.text
    assert f"--training.cache_dir {launcher.cache} --training.device cpu --training.text {text}" in record.command


def test_candidates_have_the_baselines_size(
    pair: tuple[list[RunRecord], Path, list[Event]], launcher: Launcher
) -> None:
    sizes = [json.loads(path.read_text()) for path in (launcher.cache / "sizes").glob("*.json")]
    assert len(sizes) == 1
    assert pair[0][0].parameters == pytest.approx(sizes[0]["parameters"], rel=launcher.profile.model.tolerance)


def test_one_seed_gives_one_result_to_the_last_bit(pair: tuple[list[RunRecord], Path, list[Event]]) -> None:
    first, second = pair[0]
    assert first.train_loss == second.train_loss
    assert first.heldout_loss == second.heldout_loss and first.benchmarks == second.benchmarks


def test_the_files_say_what_the_record_says(
    pair: tuple[list[RunRecord], Path, list[Event]], launcher: Launcher
) -> None:
    (record, _), out, _ = pair
    folder = out / "0"
    assert RunRecord.model_validate_json((folder / "result.json").read_text()) == record
    assert {name: (folder / f"{name}.csv").read_text() for name in ("train", "test")} == element_result(record)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert record.heldout_loss is not None and lines.pop()["heldout_loss"] == record.heldout_loss.value
    assert [line["step"] for line in lines] == [1, 5, 10, 15, 20, 25, 30]
    wanted = ("cpu_seconds", "grad_norm", "lr", "tokens_per_second", "memory_mb")
    assert all(line[name] > 0 for line in lines for name in wanted)
    validated = {line["step"]: line["val_loss"] for line in lines if "val_loss" in line}
    assert {int(step): loss for step, loss in record.validation_loss.items()} == validated
    assert list(validated) == [10, 20, 30] and validated[30] < validated[10] < np.log(launcher.profile.model.vocab)
    area = (validated[10] + 2 * validated[20] + validated[30]) / 4
    assert record.learning_curve is not None and record.learning_curve.n == 3
    assert record.learning_curve.value == pytest.approx(area)
    right = [line["val_tasks"] for line in lines if "val_tasks" in line]
    assert set(record.task_curves) == set(launcher.profile.tasks.names) and len(right) == 3
    for name, curve in record.task_curves.items():
        one, two, three = (line[name] for line in right)
        assert curve.value == pytest.approx((one + 2 * two + three) / 4) and 0 <= curve.value <= 1
    said = (folder / "stderr.log").read_text()  # without the control characters that the program printed
    assert "said \ufffd[31m so\n" in said and len(said) <= 16384


def test_every_item_is_kept_beside_the_record(pair: tuple[list[RunRecord], Path, list[Event]]) -> None:
    (record, other), out, _ = pair
    items, same = read_items(out / "0" / "items.json"), read_items(out / "1" / "items.json")
    assert items is not None and same is not None and items.tasks == same.tasks
    assert (items.run_id, items.baseline_key) == (record.run_id, record.baseline_key)
    for name, score in record.benchmarks.items():
        assert np.mean(items.tasks[name].scores) == pytest.approx(score.value)
        assert len(items.tasks[name].scores) == score.n
        assert score.bits_per_byte is not None and score.bits_per_byte.n == score.n and score.bits_per_byte.value > 0
    assert other.benchmarks == record.benchmarks


def test_events_show_stages_and_progress(pair: tuple[list[RunRecord], Path, list[Event]]) -> None:
    events = pair[2]
    assert {"start", "train", "score"} <= {event.name for event in events if event.kind == "stage"}
    last = [event for event in events if event.kind == "progress"][-1]
    assert (last.step, last.steps) == (30, 30) and last.loss and last.tokens_per_second and last.seconds_left == 0


def test_faults_of_programs_are_records_with_a_reason_and_without_files_of_an_earlier_run(
    launcher: Launcher, tmp_path: Path
) -> None:
    hiding = tmp_path / "2"
    hiding.mkdir()
    for name in ("result.json", "test.csv", "stderr.log"):
        (hiding / name).write_text("of an earlier run")
    records = train_all(launcher, [program(text) for text in (RAISES, NAN, HIDES)], tmp_path)
    assert [(record.status, record.reason) for record in records] == [
        ("failed", "crashed"),
        ("stopped", "nan"),
        ("failed", "refused"),
    ]
    assert "no good at all" in records[0].detail and "line 13" in records[0].detail
    assert "over budget" in records[2].detail, "parameters that it hides are counted"
    for number, record in enumerate(records):
        assert record.heldout_loss is None and not record.benchmarks and record.benchmark_mean is None
        assert json.loads((tmp_path / str(number) / "result.json").read_text())["reason"] == record.reason
    # A table without columns is none.
    assert not any((hiding / name).exists() for name in ("train.csv", "test.csv", "stderr.log"))


@pytest.mark.slow
def test_a_program_that_runs_in_one_precision_only_is_trained_in_it(launcher: Launcher, tmp_path: Path) -> None:
    one = program(assets.HARD_BFLOAT16)
    (report,) = launcher.check([one])
    warned = [check.detail for check in report.checks if not check.passed and check.name == "shapes"]
    assert report.accepted and "does not run in float32" in warned[0]
    record = launcher.train(one, seed=0, out=tmp_path, run_id="half", checks=report)
    assert (record.status, record.dtype) == ("finished", "bfloat16") and record.heldout_loss is not None
    assert [check.detail for check in record.checks if check.name == "shapes" and not check.passed] == warned


def test_preparing_can_be_cancelled(flags: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    fresh = {"training": {"cache_dir": tmp_path, "device": "cpu"}}
    cancel = threading.Event()
    with pytest.raises(JobError, match="was cancelled"):
        Launcher(load(None, fresh), load_profile(TINY)).prepare(lambda event: cancel.set(), cancel)
    assert not list(tmp_path.rglob("corpus.json")) and not list((tmp_path / "corpus").glob(".building-*"))


def test_ctrl_c_during_the_check_is_an_interrupted_run(
    flags: dict[str, dict[str, Any]], launcher: Launcher, text_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "slow.py").write_text(ENDLESS)
    environment = {**os.environ, "ASI_TRAINING__CACHE_DIR": str(launcher.cache), "ASI_TRAINING__DEVICE": "cpu"}
    environment["PYTHONUNBUFFERED"] = "1"
    command = [sys.executable, "train.py", str(tmp_path / "slow.py"), "--profile", str(TINY), "--text", str(text_file)]
    with subprocess.Popen(
        [*command, "--out", str(tmp_path / "o")], cwd=REPOSITORY / "training", env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("check: "):  # a first outcome: the check runs
                process.send_signal(signal.SIGINT)
                break
        process.stdout.read()
        assert process.wait(60) == 4
    record = json.loads((tmp_path / "o" / "result.json").read_text())
    assert (record["status"], record["reason"]) == ("stopped", "interrupted")


def test_a_run_that_beats_every_peer_by_far_is_ended_with_its_partial_curve(launcher: Launcher, tmp_path: Path) -> None:
    peer = Peer(dict.fromkeys((1, *range(5, 31, 5)), 60.0))
    record = launcher.train(program(MEAN), seed=0, out=tmp_path, run_id="leak", peers=[peer])
    assert (record.status, record.reason) == ("stopped", "leak")
    assert 1 < len(record.train_loss) < 7 and record.heldout_loss is None
    assert (tmp_path / "train.csv").read_text().startswith("step,1,5")


def saving(launcher: Launcher) -> Launcher:
    """The same, with a checkpoint every second step."""
    made = Launcher(launcher.settings, launcher.profile.model_copy(update={"checkpoint": CheckpointSpec(steps=2)}))
    assert made.baseline_key() == launcher.baseline_key()
    return made


def test_a_killed_worker_goes_on_from_its_checkpoint_to_the_same_numbers(
    launcher: Launcher, pair: tuple[list[RunRecord], Path, list[Event]], tmp_path: Path
) -> None:
    struck: list[int] = []
    notes: list[str] = []
    shown: list[int] = []

    def strike(event: Event) -> None:
        notes.append(event.text)
        if event.text.startswith("goes on from"):
            shown.clear()
        shown.extend([event.step or 0] if event.kind == "progress" else [])
        if event.kind == "progress" and (event.step or 0) >= 10 and not struck:
            struck.append(_worker_below(os.getpid()))
            os.kill(struck[0], signal.SIGKILL)

    record = saving(launcher).train(program(PRINTS), seed=0, out=tmp_path / "a", run_id="a", on_event=strike, keep=True)
    assert struck and record.status == "finished"
    (resumed,) = [note for note in notes if "goes on from the checkpoint of step" in note]
    begun = int(resumed.split()[-1])
    assert shown and all(step > begun for step in shown), "reports that are told again are no progress"
    whole = pair[0][0]
    assert (record.train_loss, record.heldout_loss) == (whole.train_loss, whole.heldout_loss)
    assert record.benchmarks == whole.benchmarks
    assert [path.stem for path in kept(tmp_path / "a" / FOLDER)] == ["step-000000030"]
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 5, 10, 15, 20, 25, 30, 30]
    assert [line["tokens"] for line in lines[:-1]] == [256 * line["step"] for line in lines[:-1]]
    seconds = [line["seconds"] for line in lines[:-1]]
    assert seconds[0] > 0 and seconds == sorted(seconds) and seconds[-1] < record.seconds["train"] < 120
    # It was begun anew after step 10, and what was used before counts; but not as time before this command.
    assert "train_earlier" not in record.seconds and "peak_memory_mb" not in record.hardware
    assert all(line["tokens_per_second"] > 0 for line in lines[:-1])


@pytest.mark.slow
@pytest.mark.parametrize("claim", ["step + 4", "step + 20", "1"])
def test_a_checkpoint_of_a_step_that_cannot_be_done_yet_is_forged(
    launcher: Launcher, tmp_path: Path, claim: str
) -> None:
    text = reporting(f"step = said['checkpoint']['step']; said['checkpoint']['step'] = {claim}", "checkpoint")
    record = saving(launcher).train(program(text), seed=0, out=tmp_path / "c", run_id="c")
    assert (record.status, record.reason) == ("failed", "forged") and "checkpoint" in record.detail


@pytest.mark.slow
def test_a_program_that_kills_itself_is_not_tried_for_ever(launcher: Launcher, tmp_path: Path) -> None:
    notes: list[str] = []
    suicide = SLEEPS.replace("time.sleep(0.3)", "__import__('os').kill(__import__('os').getpid(), 9)")
    record = launcher.train(
        program(suicide), seed=0, out=tmp_path / "b", run_id="b", on_event=lambda event: notes.append(event.text)
    )
    assert (record.status, record.reason) == ("failed", "crashed") and sum("again" in text for text in notes) == 1


def _worker_below(pid: int) -> int:
    """The youngest process of a training worker that descends from `pid`."""
    return max(one for one in children(pid) if "training.worker" in command_line(one))


def test_cancelling_ends_a_run_at_once(launcher: Launcher, tmp_path: Path) -> None:
    cancel, seen = threading.Event(), []

    def on_event(event: Event) -> None:
        if event.kind == "progress":
            seen.append(time.monotonic())
            cancel.set()

    record = launcher.train(program(SLEEPS), seed=0, out=tmp_path, run_id="c", on_event=on_event, cancel=cancel)
    assert (record.status, record.reason) == ("stopped", "interrupted")
    assert time.monotonic() - seen[0] < 8.7, "the steps that are left sleep so long"


def test_the_baseline_key_follows_the_profile_and_the_corpus(launcher: Launcher) -> None:
    profile = launcher.profile
    other = profile.model_copy(update={"train": profile.train.model_copy(update={"lr": 1e-3})})
    changed = Launcher(launcher.settings, other)
    changed._corpus = launcher.prepare()
    assert changed.baseline_key() != launcher.baseline_key()
    again = Launcher(launcher.settings, profile)
    assert again.baseline_key() == launcher.baseline_key()


def test_the_device_is_found_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert find_device("auto") == "cpu" == find_device("cpu")
    with pytest.raises(UsageError, match="GPU"):
        find_device("cuda")


def test_the_host_side_imports_no_torch() -> None:
    code = (
        "import sys, training.launcher, training.train, training.monitor, training.data.corpus, training.baseline;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'lm_eval', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, timeout=60).returncode == 0


def run_cli(*arguments: str, flags: dict[str, dict[str, Any]]) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "ASI_TRAINING__CACHE_DIR": str(flags["training"]["cache_dir"]),
        "ASI_TRAINING__DEVICE": "cpu",
    }
    return subprocess.run(
        [sys.executable, "train.py", *arguments], cwd=REPOSITORY / "training", capture_output=True, text=True,
        timeout=120, env=environment,
    )  # fmt: skip


def test_wrong_usage_is_one_line_and_status_2(flags: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    missing = run_cli(str(tmp_path / "absent.py"), "--out", str(tmp_path / "o"), flags=flags)
    assert missing.returncode == 2 and missing.stderr.startswith("error: ") and "absent.py" in missing.stderr
    seed = str(REPOSITORY / "training" / "architectures" / "delta_net.py")
    profile = run_cli(seed, "--profile", "nope", "--out", str(tmp_path / "o"), flags=flags)
    assert profile.returncode == 2 and "cpu-smoke" in profile.stderr
    folder = run_cli(seed, "--profile", str(TINY), "--out", str(tmp_path / "file" / "o"), flags=flags)
    assert folder.returncode == 2 and folder.stderr.startswith("error: ")


def test_a_second_command_into_one_folder_is_refused_while_the_first_runs(
    flags: dict[str, dict[str, Any]], text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "o"
    seed = str(REPOSITORY / "training" / "architectures" / "delta_net.py")
    with held(out):
        (out / "metrics.jsonl").write_text("of the first\n")
        done = run_cli(seed, "--profile", str(TINY), "--text", str(text_file), "--out", str(out), flags=flags)
    holder = f"another command that is running (process {os.getpid()}) writes into {out}"
    assert done.returncode == 2 and holder in done.stderr, done
    assert (out / "metrics.jsonl").read_text() == "of the first\n" and not (out / "result.json").exists()


def test_an_interrupt_before_the_corpus_is_a_status_that_main_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(launcher: Launcher, tell: Any, cancel: threading.Event) -> None:
        tell(Event("stage", "corpus"))
        os.kill(os.getpid(), signal.SIGINT)
        assert cancel.wait(60)
        raise JobError("preparing the corpus was cancelled")

    monkeypatch.setattr(Launcher, "ready", interrupted)
    seed = str(REPOSITORY / "training" / "architectures" / "delta_net.py")
    assert train_command([seed, "--profile", str(TINY), "--out", str(tmp_path)]) == 4
    told = capsys.readouterr()
    assert "the corpus was not ready" in told.err and re.search(r"^corpus: stopped after \d+\.\d s$", told.out, re.M)


def test_a_refused_program_has_status_1_and_a_record(
    flags: dict[str, dict[str, Any]], launcher: Launcher, text_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad.py").write_text("class Other:\n    pass\n")
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "test.csv").write_text("of an earlier run")
    done = run_cli(
        str(tmp_path / "bad.py"),
        "--profile",
        str(TINY),
        "--text",
        str(text_file),
        "--out",
        str(tmp_path / "o"),
        "--reference",
        "--trust",
        flags=flags,
    )
    assert done.returncode == 1, done.stderr
    record = json.loads((tmp_path / "o" / "result.json").read_text())
    assert (record["status"], record["reason"]) == ("failed", "refused") and "refused" in done.stdout
    assert record["seconds"]["total"] > 0
    head = f"python training/train.py {tmp_path}/bad.py --profile {TINY} --seed 0 --out {tmp_path}/o"
    assert record["command"].startswith(f"{head} --reference --trust")
    # What came from the environment is said too.
    assert f"--training.text {text_file}" in record["command"] and "--training.device cpu" in record["command"]
    assert not (tmp_path / "o" / "test.csv").exists()


def test_the_table_fits_80_columns_and_says_what_its_seconds_count(
    flags: dict[str, dict[str, Any]], pair: tuple[list[RunRecord], Path, list[Event]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run = pair[0][0].model_dump(mode="json")
    score: dict[str, Any] = {"value": 0.25, "n": 10_000, "se": 0.0125, "chance": 0.25, "counted": True}
    long = {"value": 123_456.78, "n": 65_536, "se": 1_234.56}
    score["bits_per_byte"] = {**long, "value": 12.3}
    run["benchmarks"] = dict.fromkeys((*OWN_TASKS, "squad_completion"), score)
    run |= {"perplexities": {"lambada_openai": long}, "benchmark_mean": {"value": 0.25, "n": 150_000, "se": 0.004}}
    run["task_curves"] = {"permutation_s5": {"value": 0.25, "n": 200, "se": None}}
    run["seconds"] = {"train": 43.3, "train_cpu": 40.0, "train_earlier": 10.2, "total": 50.5}
    out, text = tmp_path / "o", tmp_path / "sample.py"
    out.mkdir()
    (out / "result.json").write_text(json.dumps(run))
    text.write_text(PRINTS)
    for name, value in (("COLUMNS", "80"), ("ASI_TRAINING__CACHE_DIR", str(flags["training"]["cache_dir"]))):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ASI_TRAINING__DEVICE", "cpu")
    words = [
        str(text),
        "--profile",
        str(TINY),
        "--text",
        str(flags["training"]["text"][0]),
        "--out",
        str(out),
        "--trust",
    ]
    assert train_command(words) == 0
    said = capsys.readouterr().out
    table = said[said.index("measure ") : said.index("* not more than 2 SE above chance")].splitlines()
    assert len(table) == 1 + 3 + len(run["benchmarks"]) + 2 and max(map(len, table)) <= 80
    assert sum(row.count("0.25 *") for row in table) == len(run["benchmarks"])
    assert "mean of 16, 16 at chance" in said and "…" not in said
    assert "train 43.3, total 50.5; train and total count 10.2 of earlier starts" in said


@pytest.mark.slow
def test_the_command_checks_trains_and_tells(flags: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    seed = str(REPOSITORY / "training" / "architectures" / "gated_delta_net.py")
    done = run_cli(seed, "--profile", str(TINY), "--seed", "3", "--out", str(tmp_path / "o"), flags=flags)
    assert done.returncode == 0, done.stderr
    assert "held-out loss" in done.stdout and "tokens/s" in done.stdout
    record = json.loads((tmp_path / "o" / "result.json").read_text())
    assert record["seed"] == 3 and record["name"] == "gated_delta_net" and record["checks"]
    assert record["command"].startswith("python training/train.py ")


@pytest.mark.slow
def test_out_of_memory_is_tried_again_with_halves_of_the_micro_batch(launcher: Launcher, tmp_path: Path) -> None:
    hungry = MEAN.replace(
        "        x = self.proj",
        "        if len(hidden_states) > 1 and self.training:\n"
        "            raise MemoryError('cannot allocate memory for this batch')\n        x = self.proj",
    )
    notes: list[str] = []
    record = launcher.train(
        program(hungry), seed=0, out=tmp_path, run_id="m", on_event=lambda event: notes.append(event.text)
    )
    assert record.status == "finished" and record.hardware["micro_batch"] == 1
    assert [sum(f"tried again with {rows} sequences" in note for note in notes) for rows in (2, 1)] == [1, 1]
    never = launcher.train(program(hungry.replace("> 1 and", "> 0 and")), seed=0, out=tmp_path, run_id="m")
    assert (never.status, never.reason) == ("failed", "memory")


@pytest.mark.slow
def test_tensorboard_files_are_written_by_setting(launcher: Launcher, tmp_path: Path) -> None:
    training = launcher.settings.training.model_copy(update={"tensorboard": True})
    made = Launcher(launcher.settings.model_copy(update={"training": training}), launcher.profile)
    assert made.train(program(MEAN), seed=0, out=tmp_path, run_id="t").status == "finished"
    (events,) = (tmp_path / "tensorboard").glob("events.*")
    content = events.read_bytes()
    assert all(tag in content for tag in (b"train/loss", b"heldout/loss", b"optimiser/grad_norm", b"validation/recall"))


def test_a_missing_package_is_told_at_the_start(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    training = launcher.settings.training.model_copy(update={"wandb": "offline"})
    with pytest.raises(UsageError, match="needs the package wandb, which is not installed"):
        Launcher(launcher.settings.model_copy(update={"training": training}), launcher.profile)


def test_a_writer_gets_every_line(tmp_path: Path) -> None:
    """Weights & Biases is no requirement: a module with the calls that we make stands for it, over a process's end."""
    (tmp_path / "wandb.py").write_text(WANDB)
    (tmp_path / "o" / "wandb" / "offline-run-of-before").mkdir(parents=True)
    code = (
        "import sys; from pathlib import Path; from functools import partial; sys.path.insert(0, sys.argv[1]);"
        "from training.metrics import Metrics; from training.metric_writers import WandB;"
        "out = Path(sys.argv[1]) / 'o'; wandb = partial(WandB, out, 'offline', 'net seed 1', {'seed': 1});"
        "metrics = Metrics(out, [wandb, wandb]); metrics.begin();"
        "metrics.add({'step': 5, 'loss': 4.5, 'mfu': None}); metrics.add({'step': 5, 'heldout_loss': 4.0, 'n': 9});"
        "metrics.close()"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=REPOSITORY, check=True, timeout=60)
    calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    begun = calls.pop(0)
    assert (begun["mode"], begun["dir"], begun["name"]) == ("offline", str(tmp_path / "o"), "net seed 1")
    assert calls.pop(0) == begun
    told = [[{"train/loss": 4.5}, 5], [{"heldout/loss": 4.0}, 5], "finished"]
    assert calls == [one for one in told for _ in range(2)]
    assert list((tmp_path / "o" / "wandb").iterdir()) == []


def test_a_writer_that_fails_is_a_note_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The results of a run that was trained are not lost for what shows them elsewhere."""

    class WandBError(Exception):
        pass

    class Lost:
        def log(self, values: dict[str, float], step: int) -> None:
            raise WandBError("no connection\nfor an hour")

        def finish(self) -> None:
            raise WandBError

    class Writes:
        def __init__(self) -> None:
            self.lines: list[Any] = []
            self.closed = 0

        def add(self, line: Any) -> None:
            self.lines.append(line)

        def close(self) -> None:
            self.closed += 1

    class Full(Writes):
        def close(self) -> None:
            super().close()
            raise OSError(28, "No space left on device")

    made = {"errors": types.SimpleNamespace(Error=WandBError), "Settings": dict, "init": lambda **_: Lost()}
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(**made))
    notes: list[str] = []
    full, writes, wandb = Full(), Writes(), partial(WandB, tmp_path, "online", "net", {})
    with Metrics(tmp_path, [wandb, lambda: full, lambda: writes], notes.append) as metrics:
        metrics.begin()
        metrics.add({"step": 1, "loss": 4.5})
        metrics.add({"step": 2, "loss": 4.0})
        assert notes == [
            "no more metrics for WandB: Weights & Biases failed: no connection; metrics.jsonl has all of them"
        ]
    assert "Full" in notes.pop() and len(notes) == 1 and (full.closed, writes.closed) == (1, 1)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == full.lines == writes.lines and len(lines) == 2
    with pytest.raises(StoreError, match="Weights & Biases failed: WandBError"):
        wandb().close()


@pytest.mark.slow
def test_a_benchmark_without_its_data_ends_a_run_before_it_begins(launcher: Launcher, tmp_path: Path) -> None:
    scored = launcher.profile.eval.model_copy(update={"benchmarks": ["recall", "piqa"]})
    made = Launcher(launcher.settings, launcher.profile.model_copy(update={"eval": scored}))
    stages: list[str] = []
    with pytest.raises(JobError, match="benchmark piqa cannot run here"):
        made.train(program(MEAN), seed=0, out=tmp_path, run_id="b", on_event=lambda event: stages.append(event.name))
    assert "benchmarks" in stages and "train" not in stages


@pytest.mark.parametrize(
    ("device", "answer", "error", "said"),
    [
        ("cpu", {"reason": "memory", "detail": ""}, UsageError, "more memory than 500 MB.*and --sandbox.memory_mb"),
        ("cuda", {"reason": "memory", "detail": ""}, UsageError, "more memory than 8,792 MB.*of the profile where"),
        ("cpu", {"reason": "refused", "detail": "no shape\nat all"}, UsageError, "tiny: no shape\n.*correct .model."),
        ("cpu", {"reason": "crashed", "detail": ""}, UsageError, "tiny: it said nothing\n.*correct .model."),
        ("cpu", {"reason": "crashed", "detail": "killed", "from_outside": True}, JobError, "crashed.: killed"),
        ("cpu", {"reason": "timeout", "detail": ""}, JobError, "not measured .timeout.: it said nothing"),
    ],
)
def test_a_size_that_was_not_measured_says_whose_fault_it_is(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch, device: str, answer: dict[str, Any], error: type, said: str
) -> None:
    monkeypatch.setattr("training.launcher.run_job", lambda *_: answer)
    profile = launcher.profile
    changed = {
        "model": profile.model.model_copy(update={"ffn": profile.model.ffn + 1}),
        "limits": profile.limits.model_copy(update={"memory_mb": 600}),
    }
    sandbox = launcher.settings.sandbox.model_copy(update={"memory_mb": 500})
    made = Launcher(launcher.settings.model_copy(update={"sandbox": sandbox}), profile.model_copy(update=changed))
    made.device = device
    with pytest.raises(error, match=f"(?s){said}") as raised:
        made.prepare()
    assert raised.type is error


@pytest.mark.slow
def test_a_profile_that_needs_more_memory_than_there_is_is_told_before_any_run(launcher: Launcher) -> None:
    profile = launcher.profile
    model = profile.model.model_copy(update={"hidden_size": 2048, "layers": 24, "ffn": 8192})
    limits = profile.limits.model_copy(update={"memory_mb": 600})
    large = Launcher(launcher.settings, profile.model_copy(update={"model": model, "limits": limits}))
    with pytest.raises(UsageError, match="does not fit: its baseline alone needs more memory than 600 MB"):
        large.prepare()
