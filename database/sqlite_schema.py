"""The schema of the SQLite store, as the steps that led to it: a new file takes all of them, an older one the rest.

Small columns lie apart from the documents, so that a question never reads what it does not answer. What would need a
scan to be counted (records, bytes, names, children of an element) is counted by triggers.
"""

from __future__ import annotations

__all__ = ["APPLICATION_ID", "MIGRATIONS"]

APPLICATION_ID = 0x41534931
"""What SQLite files of ours say they are."""

_FIRST = """
CREATE TABLE elements (
    idx INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    time TEXT NOT NULL,
    parent INTEGER,
    summary TEXT NOT NULL,
    loss REAL,
    benchmark REAL,
    complete INTEGER NOT NULL,
    baseline_key TEXT,
    score REAL,
    pending INTEGER NOT NULL DEFAULT 1,
    key TEXT UNIQUE,
    bytes INTEGER NOT NULL
)

CREATE INDEX elements_name ON elements (name, time, idx)

CREATE INDEX elements_parent ON elements (parent, idx)

CREATE INDEX elements_benchmark ON elements (benchmark DESC, idx)

CREATE INDEX elements_score ON elements (score DESC, idx)

CREATE INDEX elements_baseline ON elements (baseline_key)

CREATE INDEX elements_pending ON elements (idx) WHERE pending = 1

CREATE INDEX elements_unscored ON elements (idx) WHERE score IS NULL

CREATE INDEX elements_incomplete ON elements (idx) WHERE complete = 0

CREATE TABLE documents (idx INTEGER PRIMARY KEY, body TEXT NOT NULL, evidence TEXT NOT NULL, evaluation TEXT)

CREATE TABLE runs (id INTEGER PRIMARY KEY, idx INTEGER NOT NULL, body TEXT NOT NULL)

CREATE INDEX runs_idx ON runs (idx)

CREATE INDEX runs_fingerprint ON runs (json_extract(body, '$.fingerprint'))

CREATE TABLE sketches (idx INTEGER PRIMARY KEY, sketch BLOB NOT NULL)

CREATE TABLE vectors (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT,
    idx INTEGER NOT NULL UNIQUE,
    model TEXT NOT NULL,
    dimension INTEGER NOT NULL,
    windows BLOB NOT NULL
)

CREATE INDEX vectors_model ON vectors (model, sequence)

CREATE TABLE candidates (idx INTEGER PRIMARY KEY)

CREATE TABLE state (name TEXT PRIMARY KEY, value TEXT NOT NULL)

CREATE TABLE answers (
    route TEXT NOT NULL,
    key TEXT NOT NULL,
    body TEXT NOT NULL,
    PRIMARY KEY (route, key)
) WITHOUT ROWID

CREATE TABLE baselines (key TEXT PRIMARY KEY, body TEXT NOT NULL)
"""

# Scores get a revision; evidence leaves the documents, which are never rewritten then; sketches follow the order in
# which they were made; counters.
_SECOND = """
ALTER TABLE elements ADD COLUMN children INTEGER NOT NULL DEFAULT 0

ALTER TABLE elements ADD COLUMN revision INTEGER

CREATE TABLE evidence (idx INTEGER PRIMARY KEY, evidence TEXT NOT NULL, evaluation TEXT)

INSERT INTO evidence SELECT idx, evidence, evaluation FROM documents

UPDATE elements SET revision = 0 WHERE idx IN (SELECT idx FROM documents WHERE evaluation IS NOT NULL)

ALTER TABLE documents DROP COLUMN evidence

ALTER TABLE documents DROP COLUMN evaluation

ALTER TABLE sketches RENAME TO sketches_before

CREATE TABLE sketches (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT,
    idx INTEGER NOT NULL UNIQUE,
    sketch BLOB NOT NULL
)

INSERT INTO sketches (idx, sketch) SELECT idx, sketch FROM sketches_before ORDER BY idx

DROP TABLE sketches_before

ALTER TABLE baselines ADD COLUMN revision INTEGER NOT NULL DEFAULT 0

UPDATE elements SET children = (SELECT COUNT(*) FROM elements child WHERE child.parent = elements.idx)

DROP INDEX elements_baseline

CREATE INDEX elements_baseline ON elements (baseline_key, score DESC, idx)

CREATE INDEX elements_revision ON elements (baseline_key, revision)

CREATE INDEX elements_strongest ON elements (parent, children DESC, idx)

CREATE INDEX elements_leaf ON elements (idx) WHERE children = 0

CREATE TABLE totals (records INTEGER NOT NULL, bytes INTEGER NOT NULL, names INTEGER NOT NULL)

INSERT INTO totals SELECT COUNT(*), COALESCE(SUM(bytes), 0), COUNT(DISTINCT name) FROM elements

CREATE TRIGGER elements_added AFTER INSERT ON elements BEGIN
    UPDATE totals SET records = records + 1, bytes = bytes + NEW.bytes,
        names = names + NOT EXISTS (SELECT 1 FROM elements WHERE name = NEW.name AND idx <> NEW.idx);
    UPDATE elements SET children = children + 1 WHERE idx = NEW.parent;
END

CREATE TRIGGER elements_removed AFTER DELETE ON elements BEGIN
    UPDATE totals SET records = records - 1, bytes = bytes - OLD.bytes,
        names = names - NOT EXISTS (SELECT 1 FROM elements WHERE name = OLD.name);
    UPDATE elements SET children = children - 1 WHERE idx = OLD.parent;
END

CREATE TRIGGER elements_moved AFTER UPDATE OF parent ON elements WHEN OLD.parent IS NOT NEW.parent BEGIN
    UPDATE elements SET children = children - 1 WHERE idx = OLD.parent;
    UPDATE elements SET children = children + 1 WHERE idx = NEW.parent;
END
"""

# Events that others follow; programs by hash; usage of language models. `program_sha256` is a function of the
# connection, since SQLite takes a text out of JSON up to its first NUL only. POST /repair mends a file for which an
# earlier release took this step and did so.
_THIRD = """
CREATE TABLE events (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    time TEXT NOT NULL,
    kind TEXT NOT NULL,
    idx INTEGER,
    data TEXT NOT NULL
)

CREATE TABLE programs (idx INTEGER PRIMARY KEY, sha256 TEXT NOT NULL)

INSERT INTO programs
    SELECT idx, hashed FROM (SELECT idx, program_sha256(body) AS hashed FROM documents) WHERE hashed IS NOT NULL

CREATE INDEX programs_sha256 ON programs (sha256, idx)

CREATE TABLE usage (id INTEGER PRIMARY KEY AUTOINCREMENT, body TEXT NOT NULL)
"""

MIGRATIONS: list[list[str]] = [step.strip().split("\n\n") for step in (_FIRST, _SECOND, _THIRD)]
"""Statements by step; a file that has taken the first n has user_version n."""
