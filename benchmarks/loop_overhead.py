"""Seconds an experiment costs outside its check, training and scoring jobs, and where they go.

    python benchmarks/loop_overhead.py [--data-dir DIR] [--experiments 6] [--profile cpu-smoke]

Runs the loop into a fresh data-dir (or reads one that is there), then takes from the journals what each stage took
beyond the jobs. The jobs' own start (interpreter, imports, sandbox) is shown beside it. Aim: under 2 s an experiment.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pipeline.summary import Row, load_rows  # noqa: E402


def overhead(row: Row) -> dict[str, float]:
    """Wall seconds of one experiment by part, without check, train and score jobs."""
    seconds = row.seconds
    jobs = sum(seconds.get(phase, 0.0) for phase in ("start", "train", "score"))
    return {
        "sample": seconds.get("sample", 0.0),
        "design and novelty": seconds.get("evolve", 0.0),
        "around training": max(0.0, seconds.get("evaluate", 0.0) - jobs),
        "analyse": seconds.get("analyse", 0.0),
        "store": seconds.get("update", 0.0),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--experiments", type=int, default=6)
    parser.add_argument("--profile", default="cpu-smoke")
    arguments = parser.parse_args()
    root = arguments.data_dir or Path(tempfile.mkdtemp(prefix="loop-overhead-"))
    if not (root / "run.json").exists():
        command = [sys.executable, str(ROOT / "pipeline/pipeline.py"), "--data-dir", str(root)]
        more = ["--profile", arguments.profile, "--experiments", str(arguments.experiments)]
        subprocess.run([*command, *more], check=True, stdout=sys.stderr)
    rows = [row for row in load_rows(root) if row.index is not None]
    parts = [overhead(row) for row in rows]
    profiles = ", ".join(sorted({row.run.profile for row in rows if row.run}))
    print(f"{len(rows)} experiments of profile {profiles}; seconds each: median (maximum)")
    for part in parts[0]:
        values = [item[part] for item in parts]
        print(f"  {part:<20} {statistics.median(values):6.2f} ({max(values):.2f})")
    totals = [sum(item.values()) for item in parts]
    print(f"  {'all':<20} {statistics.median(totals):6.2f} ({max(totals):.2f})   aim: under 2")
    starts = [row.seconds.get("start", 0.0) for row in rows]
    print(
        f"  beside it: job start {statistics.median(starts):.2f}, check "
        f"{statistics.median(r.seconds.get('check', 0.0) for r in rows):.2f}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
