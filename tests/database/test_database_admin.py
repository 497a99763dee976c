"""database/admin.py: backup under load, restore, verify without a right to write, migrations, published files."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import random
import shutil
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from common.errors import StoreError
from common.files import sha256_text
from common.knobs import Database as DatabaseSettings
from common.process import REPOSITORY
from database.admin import main
from database.bulk import MOST_REFUSALS
from database.sqlite_schema import MIGRATIONS
from database.store import open_store
from tests.database.db_service import BASELINE, Service, body_of, mongodb_server

VERSION_1 = REPOSITORY / "tests" / "assets" / "database_version_1.sqlite.gz"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A version-1 file, as the first release wrote it: elements 1, 3, 4, 5 (2 was removed), candidates 1 and 3."""
    path = tmp_path / "database.sqlite"
    path.write_bytes(gzip.decompress(VERSION_1.read_bytes()))
    return path


def run(*arguments: object, store: Path | str) -> int:
    url = store if isinstance(store, str) else f"sqlite:///{store}"
    return main([*map(str, arguments), "--store", url])


def test_a_reader_that_left_is_no_broken_store(file: Path) -> None:
    assert run("migrate", store=file) == 0
    reading, writing = os.pipe()
    os.close(reading)
    argv = [sys.executable, "database/admin.py", "verify", "--store", f"sqlite:///{file}"]
    done = subprocess.run(argv, cwd=REPOSITORY, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_version_1_file_is_migrated_and_sound(
    file: Path, start: Callable[..., Service], capsys: pytest.CaptureFixture[str]
) -> None:
    with sqlite3.connect(file) as before:
        assert before.execute("PRAGMA user_version").fetchone() == (1,)
        stored = dict(before.execute("SELECT idx, body FROM documents"))
        scores = dict(before.execute("SELECT idx, score FROM elements"))
    assert run("migrate", store=file) == 0 and f"schema 1 -> {len(MIGRATIONS)}" in capsys.readouterr().out
    assert run("verify", store=file) == 0, capsys.readouterr().out
    assert "everything holds" in capsys.readouterr().out
    assert run("migrate", store=file) == 0 and f"schema {len(MIGRATIONS)} -> " in capsys.readouterr().out
    service = start()
    assert sorted(stored) == [1, 3, 4, 5]
    for index, text in stored.items():
        element = service.get(f"/elements/with-score/by-index/{index}")
        assert {name: element[name] for name in json.loads(text)} == json.loads(text)
        assert element["score"] == pytest.approx(scores[index])
    assert service.get("/elements/by-index/3")["parent"] == 1 and service.client.runs(4)[0].name == "delta_net_4"
    assert sorted(element["index"] for element in service.get("/candidates/all")) == [1, 3]
    program = service.get("/elements/by-index/4")["program"]
    assert service.get(f"/v2/programs/{sha256_text(program)}")["indices"] == [4]
    assert service.client.baseline("cpu-1") == BASELINE and service.add("next") == 6
    assert service.get("/v2/events")["events"][-1]["kind"] in ("added", "scored")


def test_a_migration_hashes_whole_programs_and_leaves_what_is_damaged(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    programs = {1: "a\0b = 2", 3: "\0", 5: "x = '\u00e9\U0001f600'"}
    with contextlib.closing(sqlite3.connect(file)) as opened:
        for index, program in programs.items():
            (body,) = opened.execute("SELECT body FROM documents WHERE idx = ?", (index,)).fetchone()
            changed = json.dumps(json.loads(body) | {"program": program}, ensure_ascii=index < 5)
            opened.execute("UPDATE documents SET body = ? WHERE idx = ?", (changed, index))
            run_of_it = "UPDATE runs SET body = json_set(body, '$.program_sha256', ?) WHERE idx = ?"
            opened.execute(run_of_it, (sha256_text(program), index))
        opened.commit()
        damaged = file.with_name("damaged.sqlite")
        damaged.write_bytes(file.read_bytes())
    assert run("migrate", store=file) == 0
    assert run("verify", store=file) == 0, capsys.readouterr().out
    with contextlib.closing(sqlite3.connect(damaged)) as opened:
        opened.execute("UPDATE documents SET body = '{' WHERE idx = 4")
        opened.commit()
    assert run("migrate", store=damaged) == 0
    assert run("verify", store=damaged) == 1 and "element 4" in capsys.readouterr().out


def test_a_backup_under_load_is_whole_and_comes_back(
    start: Callable[..., Service], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    service = start()
    source, copy = tmp_path / "database.sqlite", tmp_path / "copy.sqlite"
    acknowledged: list[int] = []
    stop = threading.Event()
    for number in range(30):  # far more than is copied between two writes; of random digits, which do not shrink
        acknowledged.append(service.add(f"n{number}", analysis=random.Random(number).randbytes(500_000).hex()))

    def write() -> None:
        while not stop.is_set():
            acknowledged.append(service.add(f"n{len(acknowledged)}", acknowledged[-1] if acknowledged else None))

    writer = threading.Thread(target=write)
    writer.start()
    while len(acknowledged) < 40:
        assert writer.is_alive()
        time.sleep(0.005)
    before = len(acknowledged)
    assert run("backup", copy, store=source) == 0
    assert run("restore", copy, "--replace", store=source) == 3 and "stop the server" in capsys.readouterr().err
    stop.set()
    writer.join()
    assert run("backup", copy, store=source) == 2, "an existing file is not overwritten"
    service.stop()
    assert run("verify", store=copy) == 0, capsys.readouterr().out
    assert run("restore", copy, store=source) == 2 and "--replace" in capsys.readouterr().err
    assert run("restore", copy, "--replace", store=source) == 0
    again = start()
    total = again.get("/health")["database"]["total_records"]
    assert before <= total <= len(acknowledged)
    assert again.get(f"/elements/by-index/{before}")["name"] == f"n{before - 1}"
    assert again.get("/elements/search-similar?motivation=motivation%20of%20n3&top_k=1")[0]["name"] == "n3"
    assert again.add("next") == total + 1


def test_the_name_of_a_backup_is_on_disk_when_it_is_told(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[tuple[str, bool]] = []
    flush = os.fsync
    target = tmp_path / "there" / "copy.sqlite"
    target.parent.mkdir()

    def seen(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            flushed.append((str(Path(f"/proc/self/fd/{descriptor}").readlink()), target.exists()))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", seen)
    assert run("backup", target, store=file) == 0
    assert flushed == [(str(target.parent), True)]
    restored = tmp_path / "restored" / "database.sqlite"
    assert run("restore", target, store=restored) == 0
    assert flushed[1:] == [(str(restored.parent), True)]


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="no bwrap to make a small disk")
def test_a_copy_that_fails_names_the_disk_that_is_full_and_leaves_nothing_on_it(file: Path) -> None:
    """A file system of 3 MB, and a database of 5."""
    assert run("migrate", store=file) == 0
    with contextlib.closing(sqlite3.connect(file)) as opened:
        opened.execute("UPDATE documents SET body = json_set(body, '$.log', printf('%.5000000c', 'l')) WHERE idx = 4")
        opened.commit()
    admin, limited = f"{sys.executable} database/admin.py", file.parent / "limited"
    limited.mkdir()
    script = f"""
        echo killed > /mnt/copy.partial; echo killed > /mnt/copy.partial-journal
        {admin} backup /mnt/copy --store sqlite:///{file}; echo $?
        {admin} restore {file} --store sqlite:////mnt/database.sqlite; echo $?
        ls /mnt
        ulimit -f 4000
        {admin} backup {limited}/copy --store sqlite:///{file}; echo $?
        ls {limited}
    """
    small = ["bwrap", "--dev-bind", "/", "/", "--size", "3000000", "--tmpfs", "/mnt", "sh", "-c", script]
    done = subprocess.run(small, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.stdout == "3\n3\n3\n", done.stdout + done.stderr
    for target, folder in (("/mnt/copy", "/mnt"), ("/mnt/database.sqlite", "/mnt"), (f"{limited}/copy", limited)):
        assert f"cannot write {target}: " in done.stderr and f"the disk of {folder} is full, or a limit" in done.stderr
        assert f"free space at {folder} (about 5." in done.stderr, done.stderr
    assert run("backup", limited / "copy", store=file) == 0


def test_verify_changes_nothing_and_needs_no_right_to(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", store=file) == 3 and "admin.py migrate" in capsys.readouterr().err, "an earlier schema"
    assert run("migrate", store=file) == 0
    before = file.read_bytes()
    holder = sqlite3.connect(file, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    # Another process writes.
    assert run("verify", store=file) == 0, capsys.readouterr().out
    holder.close()
    assert file.read_bytes() == before
    with pytest.raises(StoreError, match="read only"):
        store = open_store(DatabaseSettings(store=f"sqlite:///{file}"), read_only=True)
        store.write(lambda session: session.put_state("x", 1))
    if shutil.which("bwrap") is None:
        pytest.skip("no bwrap to make a disk read-only")
    for end in ("-wal", "-shm"):
        file.with_name(file.name + end).unlink(missing_ok=True)
    on_a_disk = ["bwrap", "--ro-bind", "/", "/", "--dev", "/dev", sys.executable, "database/admin.py"]

    def read_only(*arguments: str) -> subprocess.CompletedProcess[str]:
        argv = [*on_a_disk, *arguments, "--store", f"sqlite:///{file}"]
        return subprocess.run(argv, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)

    done = read_only("verify")
    assert (done.returncode, done.stdout) == (0, "4 elements: everything holds\n"), done.stderr
    # What was committed last is still in the log, which cannot be read there: told, and not overlooked.
    with sqlite3.connect(file) as writer:
        writer.execute("UPDATE totals SET records = 9")
        writer.commit()
        log = file.with_name(file.name + "-wal")
        kept = log.read_bytes()
    writer.close()
    file.write_bytes(before)
    log.write_bytes(kept)
    done = read_only("verify")
    assert done.returncode == 3 and "-wal" in done.stderr and "fix:" in done.stderr, done.stderr


def test_what_is_no_database_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE x (a)")
    damaged = tmp_path / "damaged.sqlite"
    damaged.write_bytes(gzip.decompress(VERSION_1.read_bytes())[:40_000])
    for store in (tmp_path / "absent.sqlite", other, damaged):
        for arguments in (("verify",), ("migrate",), ("backup", tmp_path / "out.sqlite")):
            assert run(*arguments, store=store) == 3, (store, arguments)
            assert "fix:" in capsys.readouterr().err
    assert run("restore", damaged, store=tmp_path / "new.sqlite") == 3
    assert run("restore", other, store=tmp_path / "new.sqlite") == 3
    for arguments in (("verify",), ("migrate",), ("backup", tmp_path / "out.sqlite")):
        assert run(*arguments, store=tmp_path) == 3 and f"{tmp_path} is a folder" in capsys.readouterr().err
    sound = tmp_path / "sound.sqlite"
    sound.write_bytes(gzip.decompress(VERSION_1.read_bytes()))
    assert run("backup", tmp_path / "no" / "out.sqlite", store=sound) == 3
    assert f"there is no folder {tmp_path / 'no'}" in capsys.readouterr().err
    assert run("backup", store=other) == 2 and run("verify", other, store=other) == 2
    assert not (tmp_path / "out.sqlite").exists() and not (tmp_path / "new.sqlite").exists()


# What would be refused today, as an earlier release took it.
ODD = """
UPDATE elements SET time = 'yesterday' WHERE idx = 5;
UPDATE documents SET body = json_set(body, '$.time', 'yesterday', '$.name', printf('%.6000c', 'n')) WHERE idx = 5;
UPDATE elements SET name = printf('%.6000c', 'n') WHERE idx = 5;
UPDATE documents SET body = json_set(body, '$.result.train', printf('%.2000000c', 's')) WHERE idx = 5;
UPDATE runs SET body = json_set(body, '$.seed', -1, '$.profile', '', '$.train_loss', json('{"last": 1}')) WHERE idx = 4;
UPDATE baselines SET body = json_set(body, '$.seeds', json('[1, 1]'));
INSERT INTO usage (body) VALUES ('{"role": "", "model": "m", "calls": 1, "failed": 2}');
"""


def test_an_export_is_restored_into_an_empty_store(
    file: Path, start: Callable[..., Service], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("migrate", store=file) == 0
    with contextlib.closing(sqlite3.connect(file)) as before:
        before.executescript(ODD)
    service = start()
    # What is stored is read, whatever is asked of what comes in.
    for path in (
        "/elements/by-index/5",
        "/elements/with-score/by-index/5",
        "/elements/roots",
        "/v2/elements",
        "/v2/runs",
    ):
        service.get(path)
    assert service.get("/elements/by-index/5")["time"] == "yesterday" and service.client.runs(4)[0].seed == -1
    assert service.get("/v2/usage")["usage"][0]["failed"] == 2 and service.get("/v2/usage/totals")[0]["failed"] == 2
    kept = service.client.baseline("cpu-1")
    assert kept is not None and kept.seeds == [1, 1]
    service.client.add_candidate(5)
    service.post("/repair")
    lines = tmp_path / "export.jsonl"
    lines.write_text(service.http.get("/v2/export").text)
    service.stop()
    fresh = tmp_path / "fresh.sqlite"
    assert run("restore", lines, store=fresh) == 0, capsys.readouterr().out
    assert run("restore", lines, store=fresh) == 2 and "empty" in capsys.readouterr().err
    assert run("verify", store=fresh) == 0, capsys.readouterr().out
    with sqlite3.connect(fresh) as after:
        assert after.execute("SELECT idx, parent FROM elements ORDER BY idx").fetchall() == [
            (1, None), (3, 1), (4, 1), (5, 4),
        ]  # fmt: skip
        assert after.execute("SELECT COUNT(*) FROM runs").fetchone() == (3,)
        assert after.execute("SELECT body ->> '$.seed' FROM runs WHERE idx = 4").fetchone() == (-1,)
        assert after.execute("SELECT body ->> '$.time' FROM documents WHERE idx = 5").fetchone() == ("yesterday",)
        assert after.execute("SELECT body ->> '$.seeds' FROM baselines").fetchone() == ("[1,1]",)


def test_a_restore_never_ends_well_without_what_it_should_hold(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fresh, lines = tmp_path / "fresh" / "database.sqlite", tmp_path / "lines.jsonl"
    # No element of the file can be stored.
    rows = [{"baseline": BASELINE.model_dump()}, {"element": {"name": "x"}}, {"element": body_of("y", result={})}]
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows) + json.dumps({"candidates": [1]}))
    assert run("restore", lines, store=fresh) == 3
    told = capsys.readouterr().err
    assert "no element" in told and "line 2: time: Field required" in told and "fix:" in told
    assert not fresh.parent.exists()
    # Nor read.
    assert run("migrate", store=file) == 0
    good, broken = file.read_bytes(), tmp_path / "broken.sqlite"
    for statement, status, said in (
        ("UPDATE documents SET body = '{'", 3, "no element of"),
        ("DELETE FROM documents", 3, "no element of"),
        ("DELETE FROM elements", 2, f"holds no element, and {file} holds 4"),
    ):
        broken.write_bytes(good)
        with contextlib.closing(sqlite3.connect(broken, isolation_level=None)) as opened:
            opened.execute("PRAGMA journal_mode = DELETE")
            opened.execute(statement)
        assert run("restore", broken, "--replace", store=file) == status
        assert said in capsys.readouterr().err
        assert run("verify", store=file) == 0, "the good store stays"
    # Some can: they are put in place, and the status says that it is not all.
    broken.write_bytes(good)
    with contextlib.closing(sqlite3.connect(broken, isolation_level=None)) as opened:
        opened.execute("PRAGMA journal_mode = DELETE")
        opened.execute("UPDATE documents SET body = '{' WHERE idx = 4")
    capsys.readouterr()
    assert run("restore", broken, store=fresh) == 1
    told = capsys.readouterr().out
    assert "element 4 cannot be read" in told and "4 elements restored" in told and "1 of them cannot be read" in told
    # So is what lies beside the elements.
    for statement, said in (
        ("UPDATE runs SET body = '{}'", "runs: that of element "),
        ("UPDATE baselines SET body = '{}'", "baselines: that of "),
        ("UPDATE evidence SET evidence = 'x' WHERE idx = 1", "evidence: that of element 1 cannot be read"),
        ("INSERT OR REPLACE INTO state VALUES ('rules', '{')", "state: that of rules cannot be read"),
    ):
        broken.write_bytes(good)
        with contextlib.closing(sqlite3.connect(broken, isolation_level=None)) as opened:
            opened.execute("PRAGMA journal_mode = DELETE")
            assert opened.execute(statement).rowcount > 0, statement
        assert run("restore", broken, "--replace", store=fresh) == 1
        told = capsys.readouterr().out
        assert said in told and "0 of them cannot be read, nor" in told, told


def test_what_is_no_backup_is_one_error_and_leaves_no_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    junk, fresh = tmp_path / "junk", tmp_path / "new" / "database.sqlite"
    for content in (b"", b"some\nlines\n", b"\xff\x00\n" * 9, b'{"a": 1}\n[2]\n'):
        junk.write_bytes(content)
        assert run("restore", junk, store=fresh) == 3
        printed = capsys.readouterr()
        assert "is no backup" in printed.err and not printed.out and not fresh.parent.exists()


GALLERY = [
    {
        "name": "delta_net_x", "index": 30.0, "parent": 10, "score": 2.31, "parameters": "495.73M",
        "svg_picture": "<svg onload=alert(1)>", "name_new": "X", "summary": "one line", "motivation": "why",
        "program": "class DeltaNet: ...",
        "result": {"train": "step,1,1000\nx,10.8,3.4\n", "test": "Model,piqa,Wikitext ppl,average\nx,0.6,31.0,nan\n"},
    },
    {
        "name": "delta_net_y", "index": 41, "parent": 30, "parameters": float("nan"), "svg_picture": None,
        "motivation": "more", "program": "class DeltaNet: pass", "result": {"train": "step,1\nx,nan\n", "test": ""},
    },
]  # fmt: skip
DUMP = [
    body_of("root") | {"index": 1, "_id": {"$oid": "6"}, "motivation_embedding": [0.1], "created_at": "x", "score": 9},
    body_of("child") | {"index": {"$numberInt": "7"}, "parent": {"$numberDouble": "1.0"}, "analysis": float("nan")},
    body_of("no program") | {"index": 8, "program": None},
    body_of("no result") | {"index": 9, "result": {"train": 1}},
    "text",
    body_of("its own parent") | {"index": 11, "parent": 11},
    body_of("\ud800") | {"index": 12},
    body_of("later parent") | {"index": 13, "parent": 99, "time": "yesterday"},
]


@pytest.mark.parametrize("command", ["restore", "import-published"])
def test_what_gives_its_text_only_once_is_no_file(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # It is read twice: what the first look had taken would be missing.
    os.mkfifo(tmp_path / "pipe")
    assert run(command, tmp_path / "pipe", store=tmp_path / "a.sqlite") == 2
    assert "expected a file" in capsys.readouterr().err
    assert not (tmp_path / "a.sqlite").exists()


def test_whoever_stops_reading_what_a_restore_says_is_not_told_of_a_bad_backup(tmp_path: Path) -> None:
    lines = tmp_path / "a.jsonl"
    lines.write_text(json.dumps(body_of("n")))
    reading, writing = os.pipe()
    os.close(reading)
    argv = [sys.executable, "-u", "database/admin.py", "restore", lines, "--store", f"sqlite:///{tmp_path}/a.sqlite"]
    ended = subprocess.run(argv, cwd=REPOSITORY, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (141, "")


@pytest.mark.parametrize("form", ["list", "results", "lines"])
def test_a_published_dump_is_read_and_its_refusals_told(
    tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    published, store = tmp_path / "dump.json", tmp_path / "a.sqlite"
    text = {
        "list": lambda: json.dumps(DUMP),
        "results": lambda: json.dumps({"total_records": len(DUMP), "results": DUMP}),
        "lines": lambda: "\n".join(map(json.dumps, DUMP)) + "\n{broken\n",
    }[form]()
    published.write_text(text)
    assert run("import-published", published, store=store) == 0
    out = capsys.readouterr().out
    reasons = {
        3: "no program",
        4: "train and test",
        5: 'expected an object, got "text"',
        6: "its own parent",
        7: "surrogate",
    }
    for number, reason in reasons.items():
        assert any(line.startswith(f"row {number} refused: ") and reason in line for line in out.splitlines()), out
    assert "row 8: its parent 99 is not in the file: stored as a root" in out
    assert "row 8: its time 'yesterday' cannot be read: stored without one" in out
    assert f"3 stored, 0 were before, {5 + (form == 'lines')} refused" in out
    assert run("import-published", published, store=store) == 0 and "0 stored, 3 were before" in capsys.readouterr().out
    assert run("verify", store=store) == 0, capsys.readouterr().out
    with sqlite3.connect(store) as after:
        assert after.execute("SELECT idx, name, parent FROM elements ORDER BY idx").fetchall() == [
            (1, "root", None), (7, "child", 1), (13, "later parent", None),
        ]  # fmt: skip


def test_of_a_published_file_no_text_is_altered_and_what_cannot_be_read_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published, store = tmp_path / "dump.json", tmp_path / "a.sqlite"
    names = ["plain", "caf\u00e9", "\ufffd"]
    rows = [json.dumps(body_of(name) | {"index": at}, ensure_ascii=False) for at, name in enumerate(names, 1)]
    latin = [row.encode("latin-1") for row in rows[:2]]
    for content, line in ((b"[" + b",\n".join(latin) + b"]", 2), (latin[1], 1), (b"\n" + latin[1] + b"\n", 2)):
        published.write_bytes(content)
        assert run("import-published", published, store=store) == 2
        told = capsys.readouterr().err
        assert f"expected UTF-8, got the byte 0xe9 in line {line}" in told, told
        assert f"iconv -f latin1 -t utf8 {published}" in told and not store.exists()
    published.write_bytes(json.dumps(GALLERY).encode("utf-16"))
    assert run("import-published", published, store=store) == 2 and "iconv -f utf16" in capsys.readouterr().err
    published.write_bytes(b"\xef\xbb\xbf" + b"\n".join([*latin, rows[2].encode()]))
    assert run("import-published", published, store=store) == 0
    out = capsys.readouterr().out
    assert "row 2 refused: expected UTF-8, got the byte 0xe9 in line 2; if the file is Latin-1, convert it: " in out
    assert "2 stored, 0 were before, 1 refused" in out
    with contextlib.closing(sqlite3.connect(store)) as after:
        assert after.execute("SELECT name FROM elements ORDER BY idx").fetchall() == [("plain",), ("\ufffd",)]


def test_a_published_parent_that_cannot_be_read_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    published, store = tmp_path / "dump.json", tmp_path / "a.sqlite"
    none = [None, "nan", "", float("nan"), {"$numberDouble": "NaN"}]
    odd: list[object] = ["abc", 1.5, -1, 0, 10**30, True, [1], {"a": 1}, "\x1b[2J"]
    rows = [body_of(f"n{at}") | {"index": at, "parent": parent} for at, parent in enumerate([*none, *odd], 1)]
    published.write_text(json.dumps([*rows, body_of("no index") | {"index": "x"}]))
    assert run("import-published", published, store=store) == 0
    out = capsys.readouterr().out
    shown = ['"abc"', "1.5", "-1", "0", str(10**30), "true", "a list", "an object", '"\\u001b[2J"']
    expected = [f"row {at}: its parent {text} cannot be read: stored as a root" for at, text in enumerate(shown, 6)]
    expected.append(f'row {len(rows) + 1}: its index "x" cannot be read: stored under another')
    assert sorted(out.splitlines()) == sorted([*expected, f"{len(rows) + 1} stored, 0 were before, 0 refused"])


def test_of_very_many_refusals_the_first_are_printed_and_the_rest_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published, store = tmp_path / "dump.jsonl", tmp_path / "a.sqlite"
    # The last one has a note as well, which nobody needs.
    odd = body_of("no result") | {"index": 9, "result": {"train": "", "test": ""}, "time": "yesterday", "parent": 99}
    published.write_text(json.dumps(DUMP[0]) + "\n" + "{\n" * MOST_REFUSALS + json.dumps(odd) + "\n")
    assert run("import-published", published, store=store) == 0
    out = capsys.readouterr().out.splitlines()
    refused = [line for line in out if " refused: " in line]
    assert len(refused) == MOST_REFUSALS and refused[-1].startswith(f"row {MOST_REFUSALS + 1} refused: ")
    assert out[-2:] == ["and 1 more rows refused", f"1 stored, 0 were before, {MOST_REFUSALS + 1} refused"]
    assert not any("yesterday" in line for line in out)
    lines = tmp_path / "lines.jsonl"
    lines.write_text(json.dumps(body_of("a") | {"index": 1}) + "\n" + "{\n" * (MOST_REFUSALS + 3))
    assert run("restore", lines, store=tmp_path / "b.sqlite") == 1
    out = capsys.readouterr().out.splitlines()
    assert len([line for line in out if " refused: " in line]) == MOST_REFUSALS and "and 3 more refused" in out
    assert f"1 lines restored from {lines}, {MOST_REFUSALS + 3} refused" in out


def test_a_gallery_is_not_measured_by_the_constants_of_another_stage(
    tmp_path: Path, start: Callable[..., Service], capsys: pytest.CaptureFixture[str]
) -> None:
    published = tmp_path / "gallery.json"
    published.write_text(json.dumps(GALLERY))
    assert run("import-published", published, store=tmp_path / "database.sqlite") == 0
    assert "published-340m-1b" in capsys.readouterr().out
    service = start()
    found = service.get("/elements/with-score/by-index/30")
    assert found["score"] is None and found["summary"] == "one line" and found["parent"] is None
    assert service.get("/elements/by-index/41")["parent"] == 30
    details = service.get("/v2/elements/30/score")
    assert details["loss_term"] is None and details["baseline_key"] == "published-340m-1b"
    record = service.client.runs(30)[0]
    assert record.parameters == 495_730_000 and record.train_loss == {"1": 10.8, "1000": 3.4}
    assert [element["index"] for element in service.get("/elements/top-k/5")] == [30, 41]


def test_no_file_is_too_odd_to_be_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content in (b"", b"3", b"not json", b"[" * 100_000, b"\xff\xfe\x00"):
        odd = tmp_path / "odd.json"
        odd.write_bytes(content)
        assert run("import-published", odd, store=tmp_path / "a.sqlite") == 2, content
        assert "fix:" in capsys.readouterr().err
    assert run("import-published", tmp_path / "absent", store=tmp_path / "a.sqlite") == 2


@pytest.mark.services
def test_mongodb_is_backed_up_as_json_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    published = tmp_path / "dump.json"
    published.write_text(json.dumps(DUMP))
    with mongodb_server() as url:
        store = f"{url}/admin_test"
        assert run("import-published", published, store=store) == 0
        assert run("verify", store=store) == 0, capsys.readouterr().out
        assert run("backup", tmp_path / "lines.jsonl", store=store) == 0
        other = f"{url}/admin_other"
        assert run("restore", tmp_path / "lines.jsonl", store=other) == 0, capsys.readouterr().out
        assert run("backup", tmp_path / "again.jsonl", store=other) == 0
    assert (tmp_path / "again.jsonl").read_text() == (tmp_path / "lines.jsonl").read_text()
