"""The user's own training script: what it is told, what it leaves, how it ends, and that nothing of it stays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.errors import UsageError
from common.process import REPOSITORY
from common.records import CheckOutcome, CheckReport, RunRecord
from common.settings import SettingsError, load
from database.evaluate_agent.score import evidence_of
from training.baseline import build_baseline, recount
from training.command import LOG
from training.command_results import BadResultsError, read_results
from training.launcher import Launcher
from training.profiles import load_profile
from training.programs import Program
from training.results import element_result, finished_run
from training.train import main as train_command

TINY = REPOSITORY / "tests" / "assets" / "tiny.toml"
WRITES = """
printf 'step,1,10,30\\n%s,6.25,5.5,{loss}\\n' "$1" > "$2/train.csv"
printf 'Model,ARC Easy,piqa,wikitext perplexity,boolq\\n%s,0.25,0.5,812.5,{boolq}\\n' "$1" > "$2/test.csv"
"""
GOOD = WRITES.format(loss="5", boolq="0.75")


def launcher(script: Path, text: str, words: str = "sh {script} {{name}} {{out}} {{seed}}", **more: object) -> Launcher:
    script.write_text(text)
    training = {"command": words.format(script=script), "device": "cpu", **more}
    return Launcher(load(None, {"training": training}), load_profile(TINY))


def train(made: Launcher, out: Path, name: str = "sample", seed: int = 0, **options: object) -> RunRecord:
    return made.train(Program(name, "class DeltaNet: ..."), seed=seed, out=out, run_id="r", **options)  # type: ignore[arg-type]


def gone(pid: int, seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


def test_its_results_become_a_record_that_says_who_reported_them(tmp_path: Path) -> None:
    leaves = 'cat "$2/$1.py"; echo; setsid sleep 600 & echo $! > "$2/pid"; echo seed $3\n'
    made = launcher(tmp_path / "t.sh", leaves + GOOD)
    check = CheckReport(
        program="sample", accepted=True, checks=[CheckOutcome(name="static", passed=True, seconds=0.5)],
        facts={"flops_per_token": 1234.0, "work_exponent": 1.0},
    )  # fmt: skip
    record = train(made, tmp_path / "o", "my net", 7, checks=check)
    assert (record.status, record.reason, record.trainer, record.name) == ("finished", None, "command", "my net")
    assert "unaudited" in record.detail and "WITHOUT a sandbox" in record.detail
    assert record.heldout_loss is None and not record.benchmarks and record.parameters is None
    assert record.train_loss == {"1": 6.25, "10": 5.5, "30": 5.0} and record.flops_per_token == 1234.0
    assert record.loss is not None and (record.loss.value, record.loss.n, record.loss.se) == (5.0, 1, None)
    assert record.reported == {"ARC Easy": 0.25, "piqa": 0.5, "wikitext perplexity": 812.5, "boolq": 0.75}
    # The perplexity is no accuracy: the mean is that of three tasks.
    assert record.benchmark_mean is not None and (record.benchmark_mean.value, record.benchmark_mean.n) == (0.5, 3)
    assert {name: (tmp_path / "o" / f"{name}.csv").read_text() for name in ("train", "test")} == element_result(record)
    assert (tmp_path / "o" / "stderr.log").read_text() == "class DeltaNet: ...\nseed 7\n"
    assert (tmp_path / "o" / LOG).read_text() == "class DeltaNet: ...\nseed 7\n"
    assert RunRecord.model_validate_json((tmp_path / "o" / "result.json").read_text()) == record
    assert "--training.command" in record.command and record.seconds["train"] > 0
    assert gone(int((tmp_path / "o" / "pid").read_text()))
    key, text = record.baseline_key, record.program_sha256
    assert finished_run(tmp_path / "o", program_sha256=text, baseline_key=key, seed=7) == record
    # The database scores it against the baseline that the same command measured.
    evidence = evidence_of("", "", record)
    assert (evidence.loss, evidence.benchmark, evidence.missing) == (record.loss, record.benchmark_mean, [])
    baseline = build_baseline([record.model_copy(update={"name": "delta_net"})], key, made.profile)
    assert (baseline.loss, baseline.benchmark, baseline.tasks) == (5.0, 0.5, ["ARC Easy", "piqa", "boolq"])
    partial = recount(record.model_copy(update={"reported": {"piqa": 0.5, "boolq": None}}), baseline.tasks)
    assert partial.benchmark_mean is None


def test_the_published_way_of_calling_and_of_leaving_results_works(tmp_path: Path) -> None:
    script = """
test -f "$1.py" || exit 9
printf 'loss,1,100\\n20250101-10:00:00-other,9,9\\n20250102-10:00:00-%s,8,7\\n' $1 > loss.csv
printf '20250103-10:00:00-%s,8,6\\n' $1 >> loss.csv
printf 'Model,piqa\\nother,0.9\\n20250103-10:00:00-%s,0.4\\n' $1 > benchmark.csv
"""
    record = train(launcher(tmp_path / "t.sh", script, "bash {script}"), tmp_path / "o")
    assert record.status == "finished", record.detail
    assert (record.train_loss, record.reported) == ({"1": 8.0, "100": 6.0}, {"piqa": 0.4})


def test_results_never_share_a_key_with_ours_or_with_another_script(tmp_path: Path) -> None:
    keys = {launcher(tmp_path / "t.sh", text).baseline_key() for text in ("exit 0", "exit 1")}
    keys.add(launcher(tmp_path / "t.sh", "exit 1", "sh {script} {{name}} {{out}} --fast").baseline_key())
    assert len(keys) == 3
    assert launcher(tmp_path / "t.sh", "exit 1").baseline_key() in keys


def test_the_program_that_a_command_starts_and_bytes_that_are_no_text_are_in_the_key(tmp_path: Path) -> None:
    script, table, keys = tmp_path / "t.sh", tmp_path / "table.bin", set()
    script.touch(0o755)
    for text, held in (("exit 0", b"\xff\x00"), ("exit 1", b"\xff\x00"), ("exit 1", b"\xff\x01")):
        table.write_bytes(held)
        keys.add(launcher(script, text, f"{{script}} {{{{name}}}} {table}").baseline_key())
    assert len(keys) == 3
    # A regular file, as its mode says, of which not a byte can be read.
    with pytest.raises(UsageError, match="cannot read /proc/self/mem, which"):
        launcher(script, "exit 0", "sh {script} /proc/self/mem").baseline_key()


def test_settings_of_ours_do_not_reach_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = launcher(tmp_path / "t.sh", "env")
    for name in ("ASI_DATABASE__STORE", "asi_llm__api_key", "ASI_TRAINING__COMMAND"):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("OWN_KEY", "mine")
    train(made, tmp_path / "o")
    said = (tmp_path / "o" / LOG).read_text()
    assert "secret" not in said and "OWN_KEY=mine" in said


@pytest.mark.parametrize(
    ("script", "reason", "said"),
    [
        ("echo so bad >&2; exit 3", "crashed", "ended with status 3; its last words: so bad"),
        ("kill -9 $$", "crashed", "ended with status 137"),
        ("exit 0", "crashed", "expected train.csv or loss.csv in"),
        (WRITES.format(loss="nan", boolq="0.5"), "nan", "a loss above 0 at step 30, got 'nan'"),
    ],
)
def test_failures_are_records_that_say_what_was_expected(script: str, reason: str, said: str, tmp_path: Path) -> None:
    record = train(launcher(tmp_path / "t.sh", script), tmp_path / "o")
    assert (record.status, record.reason) == ("failed", reason) and said in record.detail
    assert not record.train_loss and record.loss is None
    assert json.loads((tmp_path / "o" / "result.json").read_text())["status"] == "failed"


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("train.csv", bytes(range(256)), "no readable CSV"),
        ("train.csv", b"", "a header row of a label and different columns"),
        ("train.csv", b"step,1,1\nsample,1,2\n", "a header row of a label and different columns"),
        ("train.csv", b"step,1,10\n", "no row below the header"),
        ("train.csv", b"step,1,10\nother,1,2\n", "first cell is 'sample', got 'other'"),
        ("train.csv", b"step,1,10\nsample,1\n", "expected 2 cells after the label, got 1"),
        ("train.csv", b"step,10,1\nsample,1,2\n", "expected ascending steps"),
        ("train.csv", b"step,1,10\nsample,1,low\n", "a loss above 0 at step 10, got 'low'"),
        ("train.csv", b"step,1,10\nsample,1,0.0\n", "train.csv: expected a loss above 0 at step 10, got '0.0'"),
        ("train.csv", b"step,1,10\nsample,-1,2\n", "train.csv: expected a loss above 0 at step 1, got '-1'"),
        ("test.csv", None, "expected test.csv or benchmark.csv in"),
        ("test.csv", b"Model,boolq\nsample,75\n", r"expected an accuracy in \[0, 1\] for boolq, got '75'"),
        ("test.csv", b"Model,boolq\nsample,good\n", "expected a number or nan for boolq, got 'good'"),
        ("test.csv", b"Model,wikitext\nsample,50\n", "the accuracy of a benchmark, got wikitext"),
    ],
)
def test_a_garbled_file_is_told_with_what_was_expected_in_it(
    file: str, text: bytes | None, said: str, tmp_path: Path
) -> None:
    files = {"train.csv": b"step,1,10\nsample,2,1\n", "test.csv": b"Model,piqa\n,0.5\n", file: text}
    for name, content in files.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
    with pytest.raises(BadResultsError, match=said):
        read_results(tmp_path, "sample")


def test_a_missing_benchmark_leaves_no_mean(tmp_path: Path) -> None:
    record = train(launcher(tmp_path / "t.sh", WRITES.format(loss="5", boolq="nan")), tmp_path / "o")
    assert record.status == "finished" and record.reported["boolq"] is None and record.benchmark_mean is None
    assert (tmp_path / "o" / "test.csv").read_text().endswith("my,0.25,0.5,812.5,nan\n".replace("my", "sample"))


def test_over_its_time_all_of_it_is_ended_and_results_of_before_are_gone(tmp_path: Path) -> None:
    made = launcher(tmp_path / "t.sh", GOOD)
    assert train(made, tmp_path / "o").status == "finished"
    slow = 'setsid sh -c "trap : TERM; sleep 600" & echo $! > "$2/pid"\nwait'
    record = train(launcher(tmp_path / "t.sh", slow, command_seconds=1.0), tmp_path / "o")
    assert (record.status, record.reason) == ("failed", "timeout") and "within 1 s" in record.detail
    assert gone(int((tmp_path / "o" / "pid").read_text()))
    assert not (tmp_path / "o" / "train.csv").exists()


def test_what_was_killed_leaves_no_process_and_runs_again(tmp_path: Path) -> None:
    """kill -9 of whoever waits for the command: the same call again begins anew."""
    left = 'setsid sleep 600 & echo $! >> "$2/pid"\n'
    stubborn = 'sh -c \'trap : TERM INT HUP; echo $$ >> "$0/pid"; touch "$0/up"; while :; do sleep 600; done\' "$2"'
    first = f'touch "$2/again"; echo $$ > "$2/pid"; {20 * left}{stubborn}'
    text = f'if [ ! -f "$2/again" ]; then {first}; fi\n{GOOD}'
    launcher(tmp_path / "t.sh", text)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path;"
        "from tests.training.test_command import *;"
        "here = Path(sys.argv[2]); words = f'sh {here}/t.sh {{name}} {{out}}';"
        "made = Launcher(load(None, {'training': {'command': words, 'device': 'cpu'}}), load_profile(TINY));"
        "print(train(made, here / 'o').status)"
    )
    call = [sys.executable, "-c", code, str(REPOSITORY), str(tmp_path)]
    with subprocess.Popen(call, stdout=subprocess.PIPE, text=True, env={**os.environ}) as process:
        up, end = tmp_path / "o" / "up", time.monotonic() + 120
        while time.monotonic() < end and not up.exists():
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    pids = (tmp_path / "o" / "pid").read_text().split()
    assert len(pids) == 22 and all(gone(int(pid)) for pid in pids)
    assert train(launcher(tmp_path / "t.sh", text), tmp_path / "o").status == "finished"


def test_a_finished_result_is_shown_again_and_another_run_in_its_folder_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, other, out = tmp_path / "sample.py", tmp_path / "other.py", tmp_path / "o"
    file.write_text("class DeltaNet: ...")
    other.write_text("class DeltaNet: pass")
    made = launcher(tmp_path / "t.sh", GOOD)
    assert train(made, out).status == "finished"
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()}
    words = ["--profile", str(TINY), "--out", str(out), "--training.command", made.command.text if made.command else ""]
    words += ["--training.device", "cpu"]
    assert train_command([str(file), *words]) == 0
    said = capsys.readouterr().out
    assert "finished before: to train again, name another --out or remove" in said and "ARC Easy, reported" in said
    for foreign in ([str(other)], [str(file), "--seed", "1"]):
        assert train_command([*foreign, *words]) == 2
        assert "holds the finished result of another run" in capsys.readouterr().err
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()} == before


@pytest.mark.parametrize(
    ("command", "said"),
    [("sh 'open", "No closing quotation"), ("  ", "a command, such as"), ("sh t.sh {programm}", "placeholders out of")],
)
def test_a_command_that_cannot_be_meant_is_refused_at_the_start(command: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        load(None, {"training": {"command": command}})


def test_files_are_meant_from_where_they_were_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.sh").write_text("")
    told = load(None, {"training": {"command": ["bash", "t.sh", "{out}", "${HOME}", "a b"]}}).training.command
    assert told == f"bash {tmp_path}/t.sh '{{out}}' '${{HOME}}' 'a b'"
    assert load(None, {"training": {"command": told}}).training.command == told
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.sh").touch(0o755)
    told = load(
        None, {"training": {"command": "~/own.sh ~/t.sh ~/absent ~nobody_at_all/x " + "a/" * 3000}}
    ).training.command
    assert told is not None and told.split()[:3] == [f"{tmp_path}/own.sh", f"{tmp_path}/t.sh", "'~/absent'"]
    with pytest.raises(UsageError, match="no_such_program"):
        Launcher(load(None, {"training": {"command": "no_such_program {out}"}}), load_profile(TINY))
