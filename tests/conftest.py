"""Puts the repository root first on sys.path, keeps threads to one, and shares the services that many tests need."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A developer's own configuration must not change what the tests see.
for variable in [name for name in os.environ if name.startswith("ASI_") and not name.startswith("ASI_TEST_")]:
    del os.environ[variable]

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

from tests.fixtures_services import cognition_url, embedding_client, embedding_url  # noqa: E402, F401

LONGEST = (
    "pipeline/test_kills.py",
    "training/test_ranks.py",
    "pipeline/test_llm_pipeline.py",
    "training/test_launcher.py",
    "pipeline/test_pipeline.py",
    "training/test_forged.py",
    "training/test_verifier_checks.py",
    "training/test_verifier_verdicts.py",
    "pipeline/test_bad_input.py",
    "training/test_check_cli.py",
    "pipeline/test_figures.py",
    "cognition_base/test_rag_api.py",
    "training/test_audit.py",
    "pipeline/test_designer_mechanisms.py",
    "pipeline/test_designer.py",
    "training/test_speed.py",
    "training/test_architectures.py",
    "training/test_wider_tasks.py",
)
"""Files of five seconds and more. The first and the third share baselines, so they are not begun at the same time."""


def pytest_configure(config: pytest.Config) -> None:
    """On a busy machine a single example may take any time; tests that wait for something have bounds of their own. The
    fast suite takes the same examples each time: what has passed once passes in CI. The slow tests take new ones."""
    fast = "not slow" in config.getoption("markexpr")
    settings.register_profile("tests", deadline=None, derandomize=fast)
    settings.load_profile("tests")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: two workers that take whole files then end at about the same time. A slow test that
    names no bound of its own has half an hour, so that a busy machine fails none."""
    places = {ROOT / "tests" / name: place for place, name in enumerate(LONGEST)}
    assert all(path.exists() for path in places), "tests/conftest.py: LONGEST names a file that is gone"
    items.sort(key=lambda item: places.get(item.path, len(places)))
    for item in items:
        if item.get_closest_marker("slow") is not None and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(1800))
