"""The log of the service: whatever is logged, and whoever reads it, nobody waits for a line."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from common.process import REPOSITORY

_BEFORE = """
import logging, sys, threading, time
import uvicorn
from database.logs import log_to_stderr
log_to_stderr("text")
uvicorn.Config(lambda: None, log_config=None, log_level="warning")
log = logging.getLogger("x")
"""


def said(program: str) -> str:
    """What a process that logs writes to stderr until it ends by itself."""
    text = _BEFORE + textwrap.dedent(program)
    done = subprocess.run(
        [sys.executable, "-c", text], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=True
    )
    return done.stderr


@pytest.mark.parametrize(
    "wrong", ['log.warning("%d", "no number")', 'log.info("%(nope)s", {"a": 1})', 'log.info("%s", Wrong())']
)
def test_a_line_that_cannot_be_made_stops_nobody(wrong: str) -> None:
    lines = said(
        f"""
        class Wrong:
            def __str__(self):
                raise RuntimeError("no text")
        {wrong}
        log.info("beside it")
        time.sleep(0.3)
        log.info("after it")
        time.sleep(0.3)
        assert "log" in [thread.name for thread in threading.enumerate()]
        """
    )
    assert lines.index("--- Logging error ---") < lines.index("after it") and "beside it" in lines


def test_what_is_logged_while_a_line_is_made_does_not_wait_for_it() -> None:
    lines = said(
        """
        class Noisy:
            def __str__(self):
                log.warning("said meanwhile")
                return "noisy"
        log.warning("%s", Noisy())
        time.sleep(0.5)
        log.warning("the next")
        """
    )
    assert all(text in lines for text in ("noisy", "said meanwhile", "the next"))


def test_the_last_line_is_written_at_the_end() -> None:
    assert "the last one" in said('log.info("the last one")')


def test_nobody_waits_where_stderr_is_not_read() -> None:
    program = """
    began = time.monotonic()
    for number in range(30_000):
        log.info("%s", "x" * 100)
        if number % 1000 == 0:
            log.warning("a warning")
    print(time.monotonic() - began, flush=True)
    """
    text = _BEFORE + textwrap.dedent(program)
    with subprocess.Popen(
        [sys.executable, "-c", text], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert float(process.stdout.readline()) < 30, "it did not wait for a reader"
        lines = process.stderr.read()
        assert process.wait(30) == 0
    assert lines.count("x" * 100) >= 20_000, "what was not too much is there"


def test_the_end_does_not_wait_for_a_reader() -> None:
    # A pipe holds 64 KiB.
    program = """
    log.info("%s", "x" * 60_000)
    time.sleep(0.5)
    log.info("%s", "y" * 20_000)
    """
    with subprocess.Popen(
        [sys.executable, "-c", _BEFORE + textwrap.dedent(program)], cwd=REPOSITORY, stderr=subprocess.PIPE
    ) as process:
        try:
            assert process.wait(20) == 0
        finally:
            process.kill()
