"""A small text that many tests of training learn from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = np.random.default_rng(0)
    words = np.array(
        ["gate", "state", "decay", "matrix", "value", "mixer", "chunk", "layer", "token", "width", "model"]
    )
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text("\n\n".join(" ".join(random.choice(words, 150)) for _ in range(150)))
    return path
