"""The loop, from one command.

    python pipeline/pipeline.py                                             for ever, profile cpu, into runs/default
    python pipeline/pipeline.py --experiments 3 --profile cpu-smoke --data-dir runs/demo     the small version

Ctrl-C ends it cleanly; the same --data-dir goes on where it was. `kill -USR1` to its process writes what each thread is
at to stderr and ends nothing. --help lists every setting.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # Python puts this folder first, where `import pipeline` would find this file instead of the package.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

    from common.process import end_on_interrupt

    end_on_interrupt()

import argparse
import faulthandler
import signal
from collections.abc import Sequence

from common.errors import AsiError
from common.process import exit_with_parent, leave
from common.settings import Settings, parse
from common.text import printable
from pipeline.session import run_session

SHORT = (
    "run.data_dir",
    "run.profile",
    "run.experiments",
    "run.seed",
    "run.parallel",
    "run.seed_program",
    "training.benchmarks",
)


def main(argv: Sequence[str] | None = None) -> int:
    exit_with_parent()
    faulthandler.register(signal.SIGUSR1)
    parser = argparse.ArgumentParser(
        prog="pipeline.py", description="Design, check, train, measure and explain architectures."
    )
    try:
        settings, _ = parse(parser, argv, sections=tuple(Settings.model_fields), short=SHORT)
        return run_session(settings)
    except AsiError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"error: {error}\n  fix: free disk space or memory, then repeat the command", file=sys.stderr)
        return 3


if __name__ == "__main__":
    leave(main())
