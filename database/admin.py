"""Care of a database: backup, restore, verify, migrate, and published files.

python database/admin.py backup FILE [--store sqlite:///FILE or mongodb://...]
python database/admin.py restore FILE [--replace] [--store ...]
python database/admin.py verify [--store ...]              # exit 1 when something is broken
python database/admin.py migrate [--store ...]
python database/admin.py import-published FILE [--store ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import contextlib
import hashlib
import json
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from common.errors import AsiError, ServiceError, StoreError, UsageError, first_line
from common.files import put_in_place
from common.knobs import Database as DatabaseSettings
from common.process import piped
from common.records import Baseline, RunRecord
from common.settings import parse, path_argument, usage_exit
from common.text import printable
from database.bulk import MOST_REFUSALS, Importer
from database.evaluate_agent.score import Evidence
from database.exporting import export_lines
from database.invariants import broken
from database.lines import look_over
from database.memory import Memory
from database.models import Element
from database.published import read_published
from database.sqlite_copy import copy_database, partial_of, told
from database.sqlite_database import open_read_only
from database.sqlite_schema import APPLICATION_ID, MIGRATIONS
from database.store import open_store

__all__ = ["main"]

_COMMANDS = ("backup", "restore", "verify", "migrate", "import-published")
_SHOWN = 200
_BESIDE: list[tuple[str, str, str, Callable[[str], object]]] = [
    ("runs", "body", "SELECT 'element ' || idx, body FROM runs", RunRecord.model_validate_json),
    ("baselines", "body", "SELECT key, body FROM baselines", Baseline.model_validate_json),
    ("evidence", "evidence", "SELECT 'element ' || idx, evidence FROM evidence", Evidence.model_validate_json),
    ("state", "value", "SELECT name, value FROM state", json.loads),
]
"""Of what a database holds beside its elements: the table, its column, what is asked, and what reads an answer."""


class _NoEmbedder:
    """Nothing is embedded here: what is stored stays pending until a server runs over the store."""

    model = "none"
    dimension = 0

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        raise ServiceError("nothing is embedded by this command")

    def windows(self, texts: Sequence[str]) -> list[np.ndarray]:
        raise ServiceError("nothing is embedded by this command")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Backup, restore, verification, migration and import of a database.")
    parser.add_argument("command", choices=_COMMANDS)
    parser.add_argument("file", nargs="?", type=path_argument, help="of backup, restore and import-published")
    parser.add_argument("--replace", action="store_true", help="restore: over a database that holds something")
    try:
        settings, arguments = parse(parser, argv, sections=["database"], short=["database.store"])
        needs = arguments.command in ("backup", "restore", "import-published")
        if needs != (arguments.file is not None):
            raise UsageError(f"{arguments.command} takes {'a' if needs else 'no'} FILE", "see --help")
        if arguments.command == "backup":
            return backup(settings.database, arguments.file)
        if arguments.command == "restore":
            return restore(settings.database, arguments.file, arguments.replace)
        if arguments.command == "verify":
            return verify(settings.database)
        if arguments.command == "migrate":
            return migrate(settings.database)
        return import_published(settings.database, arguments.file)
    except UsageError as error:
        return usage_exit(error)
    except AsiError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def backup(settings: DatabaseSettings, target: Path) -> int:
    """Copies the store while it is used. Of SQLite: a database file, by SQLite's own backup; of MongoDB: JSON Lines,
    the elements of one moment as they are when their page is read."""
    if target.exists():
        raise UsageError(f"{target} exists", "name a new file")
    file = _sqlite_file(settings)
    if file is None:
        with _memory(settings) as memory, told(target, target), partial_of(target) as partial:
            with partial.open("w", encoding="utf-8") as lines:
                lines.writelines(export_lines(memory))
                lines.flush()
                os.fsync(lines.fileno())
            put_in_place(partial, target)
        print(
            f"{target}: elements with their runs, keys and verdicts, baselines, usage, answers and the candidate set, "
            "as JSON Lines; not in it: events, vectors, scores, keys of imports"
        )
        return 0
    _require_ours(file)
    with told(file, target), partial_of(target) as partial:
        copy_database(file, partial)
        put_in_place(partial, target)
    print(f"{target}: {_require_ours(target)} elements")
    return 0


def restore(settings: DatabaseSettings, source: Path, replace: bool) -> int:
    """Puts a backup in place: a database file over SQLite, JSON Lines into an empty store of either kind."""
    file = _sqlite_file(settings)
    _require_no_pipe(source)
    head = None
    with contextlib.suppress(OSError), source.open("rb") as handle:
        head = handle.read(16)
    if head not in (None, b"SQLite format 3\0"):
        return _restore_lines(settings, source)
    if file is None:
        raise UsageError("a backup of SQLite cannot be put into MongoDB", "restore it into sqlite:///FILE first, then "
                         "export that by GET /v2/export and restore the JSON Lines")  # fmt: skip
    count = _require_ours(source)
    unreadable = _unreadable(source)
    if unreadable and len(unreadable) == count:
        raise StoreError(f"no element of {source} can be read: {unreadable[0]}", "take another backup")
    beside = _unreadable_beside(source)
    if file.exists():
        held = _require_ours(file)
        if held and not replace:
            raise UsageError(f"{file} holds a database", "add --replace, or name another --store")
        if held and not count:
            raise UsageError(
                f"{source} holds no element, and {file} holds {held}", "name another backup, or remove the database"
            )
        _require_unused(file)
    with told(source, file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with partial_of(file) as partial:
            copy_database(source, partial)
            for end in ("-wal", "-shm", ".faiss"):
                file.with_name(file.name + end).unlink(missing_ok=True)
            put_in_place(partial, file)
    for line in [*unreadable, *beside][:_SHOWN]:
        print(printable(line))
    more = f", nor {len(beside)} things beside them" if beside else ""
    print(f"{file}: {count} elements restored from {source}, {len(unreadable)} of them cannot be read{more}")
    return 1 if unreadable or beside else 0


def verify(settings: DatabaseSettings) -> int:
    """Prints every invariant that does not hold; 1 when there is one. Changes nothing, and needs no right to."""
    file = _sqlite_file(settings)
    if file is not None:
        _require_ours(file)
    store = open_store(settings, read_only=True)
    try:
        found = broken(store, settings.candidate_capacity)
        count = store.read(lambda session: session.count())
    finally:
        store.close()
    for line in found:
        print(f"broken: {printable(line)}")
    print(f"{count} elements: {f'{len(found)} things are broken' if found else 'everything holds'}")
    if found:
        print("POST /repair, of a running server, mends what can be computed again; then verify again.")
    return 1 if found else 0


def migrate(settings: DatabaseSettings) -> int:
    """Takes the schema steps that a store lacks. A server does so too when it starts."""
    file = _sqlite_file(settings)
    if file is not None:
        _require_ours(file)
        with told(file, file), contextlib.closing(open_read_only(file)) as opened:
            before = opened.execute("PRAGMA user_version").fetchone()[0]
    open_store(settings).close()
    if file is None:
        print("the documents hold all that this release keeps with them; the next server counts on, if they are many")
    else:
        print(f"{file}: schema {before} -> {len(MIGRATIONS)}")
    return 0


def import_published(settings: DatabaseSettings, path: Path) -> int:
    """Stores the rows of a published file and prints each that was refused, and why; 1 when none was stored."""
    _require_no_pipe(path)
    rows = read_published(path)
    key = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    with _memory(settings) as memory:
        # The key is of the whole file. What a release reads in a row may change.
        # All rows are in memory, so their refusals may be as well: no note is told of a row that was refused.
        importer = Importer(memory, f"published-{key}", compared=False, kept=len(rows))
        for row in rows:
            if row.value is None:
                importer.refuse(row.number, row.refused)
            else:
                importer.value(row.number, row.value)
        importer.finish()
    refused = {refusal.line for refusal in importer.refused}
    notes = [f"row {row.number}: {note}" for row in rows if row.number not in refused for note in row.notes]
    for line in sorted(notes)[:_SHOWN]:
        print(printable(line))
    if len(notes) > _SHOWN:
        print(f"and {len(notes) - _SHOWN} more notes like these")
    for refusal in importer.refused[:MOST_REFUSALS]:
        print(printable(f"row {refusal.line} refused: {refusal.reason}"))
    if importer.refusals > MOST_REFUSALS:
        print(f"and {importer.refusals - MOST_REFUSALS} more rows refused")
    print(f"{importer.stored} stored, {importer.repeated} were before, {importer.refusals} refused")
    return 0 if importer.stored + importer.repeated or not rows else 1


def _require_no_pipe(path: Path) -> None:
    """Raises UsageError for what gives its text once only, such as a pipe: it is looked over before it is stored."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UsageError(
            f"expected a file, got {path}, which may give its text only once", "write it to a file, and name that"
        )


def _restore_lines(settings: DatabaseSettings, source: Path) -> int:
    known, refusal = look_over(source)  # before a store is made
    if not known:
        raise StoreError(
            f"{source} is no backup: expected an SQLite database, or JSON Lines as GET /v2/export gives them",
            "name a file that `admin.py backup` or an export wrote",
        )
    if refusal is not None:
        raise StoreError(
            f"no element of {source} can be stored; line {refusal.line}: {printable(refusal.reason)}",
            "take another backup",
        )
    with _memory(settings) as memory, source.open("rb") as lines:
        if memory.store.read(lambda session: session.count(limit=1)):
            raise UsageError(
                "JSON Lines are restored into an empty store, this one holds elements", "name another --store"
            )
        importer = Importer(memory, backup=True)
        for number, line in enumerate(lines, 1):
            importer.line(number, line)
        importer.finish()
    for refusal in importer.refused:
        print(printable(f"line {refusal.line} refused: {refusal.reason}"))
    if importer.more_refused:
        print(f"and {importer.more_refused} more refused")
    print(f"{importer.stored} lines restored from {source}, {importer.refusals} refused")
    if importer.left_out:
        print(f"{importer.left_out} idempotency keys are left out: the store had given indices before")
    print("not in JSON Lines: events, keys of imports; and vectors and scores, which a server computes anew")
    return 1 if importer.refusals else 0


@contextlib.contextmanager
def _memory(settings: DatabaseSettings) -> Iterator[Memory]:
    memory = Memory(open_store(settings), _NoEmbedder(), settings)
    try:
        yield memory
    finally:
        memory.close()


def _sqlite_file(settings: DatabaseSettings) -> Path | None:
    url = settings.store
    return Path(url.removeprefix("sqlite:///")) if url.startswith("sqlite:///") else None


def _require_ours(file: Path) -> int:
    """The number of elements in a sound file of ours.

    Raises:
        StoreError: it is missing, damaged, or of another program.
    """
    if not file.exists():
        raise StoreError(f"there is no file {file}", "name an existing one")
    if file.is_dir():
        raise StoreError(f"{file} is a folder", "name the file of a database in it")
    with told(file, file), contextlib.closing(open_read_only(file)) as opened:
        if opened.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
            raise StoreError(f"{file} is an SQLite database of another program", "name a database of this one")
        found = opened.execute("PRAGMA quick_check(3)").fetchall()
        if found != [("ok",)]:
            raise StoreError(f"{file} is damaged: {found[0][0]}", "take another backup")
        return int(opened.execute("SELECT COUNT(*) FROM elements").fetchone()[0])


def _unreadable(file: Path) -> list[str]:
    """A line for each element of a database of ours that cannot be read."""
    found = []
    with told(file, file), contextlib.closing(open_read_only(file)) as opened:
        query = "SELECT e.idx, d.body FROM elements e LEFT JOIN documents d ON d.idx = e.idx ORDER BY e.idx"
        for index, body in opened.execute(query):
            try:
                Element.model_validate(json.loads(body or "") | {"parent": None, "index": index})
            except (ValueError, TypeError) as error:
                found.append(f"element {index} cannot be read: {first_line(error)[:200]}")
    return found


def _unreadable_beside(file: Path) -> list[str]:
    """A line for each run, baseline, evaluation and piece of state of a database of ours that cannot be read."""
    found = []
    with told(file, file), contextlib.closing(open_read_only(file)) as opened:
        there = {row[0] for row in opened.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        for table, column, query, read in _BESIDE:
            columns = {row[1] for row in opened.execute(f"PRAGMA table_info({table})")} if table in there else set()
            # A schema of an earlier release may lack it.
            if column not in columns:
                continue
            for name, body in opened.execute(query):
                try:
                    read(body)
                except (ValueError, TypeError) as error:
                    found.append(f"{table}: that of {name} cannot be read: {first_line(error)[:200]}")
    return found


def _require_unused(file: Path) -> None:
    """Raises StoreError when another process has the database open."""
    with contextlib.closing(sqlite3.connect(file, timeout=1, isolation_level=None)) as opened:
        try:
            # Leaving WAL needs the file for oneself, and takes in what lies in the log.
            mode = opened.execute("PRAGMA journal_mode = DELETE").fetchone()[0]
        except sqlite3.OperationalError:
            mode = "locked"
    if mode != "delete":
        raise StoreError(f"{file} is in use", "stop the server that has it open, then try again")


if __name__ == "__main__":
    raise SystemExit(piped(main))
