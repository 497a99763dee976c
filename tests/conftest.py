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

from hypothesis import settings  # noqa: E402

# On a busy machine a single example may take any time; tests that wait for something have bounds of their own.
settings.register_profile("tests", deadline=None)
settings.load_profile("tests")

from tests.fixtures_services import cognition_url, embedding_client, embedding_url  # noqa: E402, F401
