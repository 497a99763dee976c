"""Blind set: sound programs that keep counters, round, choose hard, start at zero, or use rare corners of torch."""

from __future__ import annotations

from benchmarks.mutant import Mutant
from benchmarks.mutants_blind.base import delta, gated, honest_program, small

__all__ = ["honest_in_form"]


def _counters() -> list[Mutant]:
    return [
        honest_program(
            "counts_its_calls",
            "a buffer counts training steps and nothing reads it",
            small(
                init='self.register_buffer("steps", torch.zeros((), dtype=torch.long), persistent=False)',
                inputs="if self.training:\n    self.steps += 1",
            ),
        ),
        honest_program(
            "anneals_by_step",
            "a step counter softens the write strength during the first thousand training steps",
            small(
                init='self.register_buffer("steps", torch.zeros((), dtype=torch.long))',
                qkv="""
                if self.training and torch.is_grad_enabled():
                    self.steps += 1
                v = v * (0.9 + 0.1 * (self.steps.to(dtype) / 1000.0).clamp(max=1.0))
                """,
            ),
        ),
        honest_program(
            "cached_masks",
            "a table of the module keeps constants by size and device, never content",
            small(
                (
                    "    later = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).triu(1)\n",
                    "    later = later_tokens(CHUNK, str(q.device))\n",
                ),
                (
                    "def memory(",
                    '''@lru_cache(maxsize=8)
def later_tokens(size: int, device: str) -> Tensor:
    """True where the column's token comes after the row's."""
    with torch.inference_mode(False):
        return torch.ones(size, size, dtype=torch.bool, device=device).triu(1)


def memory(''',
                ),
                ("from typing import Any\n", "from functools import lru_cache\nfrom typing import Any\n"),
            ),
        ),
        honest_program(
            "dropout_in_training",
            "nn.Dropout: random in train mode as it should be, exact in eval mode",
            small(init="self.dropout = nn.Dropout(0.1)", out="o = self.dropout(o)"),
        ),
    ]


def _starts() -> list[Mutant]:
    return [
        honest_program(
            "zero_output_at_start",
            "the output projection starts at zero, so nothing depends on the input before the first update",
            small(init="nn.init.zeros_(self.o_proj.weight)"),
        ),
        honest_program(
            "layer_scale",
            "the output is scaled by a learnt 1e-4 a channel at first",
            small(
                init="self.scale = nn.Parameter(torch.full((hidden_size,), 1e-4))",
                final="y = y * self.scale.to(y.dtype)",
            ),
        ),
        honest_program(
            "few_idle_parameters",
            "about a tenth of the parameters waits for an option that is off",
            small(init="self.idle_proj = nn.Linear(hidden_size, hidden_size // 2, bias=False)"),
        ),
        honest_program(
            "random_features_in_buffer",
            "random numbers: a fixed feature map drawn once in the constructor and stored in a buffer",
            small(
                init='self.register_buffer("features", torch.randn(2 * [self.head_k_dim]) * self.head_k_dim**-0.5)',
                qkv="""
                q, k = ((t @ self.features.to(dtype)).exp() for t in (q, k))
                q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
                """,
            ),
        ),
        honest_program(
            "shared_query_key",
            "queries and keys are one tensor",
            small(qkv="q = k"),
        ),
    ]


def _steps() -> list[Mutant]:
    return [
        honest_program(
            "quantised_per_token",
            "rounds activations to 8 bits with one scale a token: steps everywhere, no statistics across tokens",
            small(
                inputs="""
                scale = x.detach().abs().amax(dim=-1, keepdim=True).clamp(min=1e-6) / 127.0
                x = x + ((x / scale).round() * scale - x).detach()
                """
            ),
        ),
        honest_program(
            "winner_channels",
            "keeps the four largest key channels of each token: a hard choice, over channels",
            small(
                qkv="""
                bar = k.topk(min(4, k.shape[-1]), dim=-1).values[..., -1:]
                k = F.normalize(k * (k >= bar), dim=-1)
                """
            ),
        ),
        honest_program(
            "hard_head_routing",
            "an argmax picks one head a token, with a straight-through gradient",
            small(
                init="self.router = nn.Linear(hidden_size, num_heads, bias=False)",
                memory="""
                share = self.router(x).to(dtype).softmax(dim=-1)
                hard = F.one_hot(share.argmax(dim=-1), self.num_heads).to(dtype)
                o = o * (0.5 + hard + share - share.detach())[..., None]
                """,
            ),
        ),
    ]


def _precision() -> list[Mutant]:
    return [
        honest_program(
            "rounds_to_bfloat16",
            "rounds keys and values to bfloat16 by hand in every precision, so outputs move in steps",
            small(qkv="q, k, v = (t.to(torch.bfloat16).to(dtype) for t in (q, k, v))"),
        ),
        honest_program(
            "bfloat16_only",
            "casts to bfloat16 before the output projection and therefore only runs under bfloat16 autocast",
            delta(('"b t h v -> b t (h v)").to(x_BTD.dtype)', '"b t h v -> b t (h v)").to(torch.bfloat16)')),
        ),
    ]


def _torch() -> list[Mutant]:
    return [
        honest_program(
            "weight_norm_projection",
            "a parametrised weight: torch.nn.utils renames the output projection's parameter",
            small(init="nn.utils.parametrizations.weight_norm(self.o_proj)"),
        ),
        honest_program(
            "own_backward",
            "an autograd Function with a right backward pass",
            small(
                top="""
                class SquaredRelu(torch.autograd.Function):
                    @staticmethod
                    def forward(ctx, x):
                        ctx.save_for_backward(x)
                        return F.relu(x).square()

                    @staticmethod
                    def backward(ctx, grad):
                        (x,) = ctx.saved_tensors
                        return 2.0 * F.relu(x) * grad
                """,
                qkv="v = v + SquaredRelu.apply(v)",
            ),
        ),
        honest_program(
            "auxiliary_balance_loss",
            "the second result is a scalar over all tokens and rows, as the contract allows",
            small(
                ("return y, None, past_key_values", "return y, log_a.float().mean().square(), past_key_values"),
            ),
        ),
    ]


def _contract() -> list[Mutant]:
    return [
        honest_program(
            "raises_for_options",
            "says plainly which arguments it does not support",
            gated(
                (
                    "        if use_short_conv and conv_size < 1:\n",
                    '        if allow_neg_eigval or expand_k != 1.0 or qk_activation != "silu" or qk_norm != "l2":\n'
                    '            raise NotImplementedError("expected silu, l2, expand_k=1 and positive eigenvalues")\n'
                    "        if use_short_conv and conv_size < 1:\n",
                ),
            ),
        ),
        honest_program(
            "published_style",
            "uses the fla modules, keyword-only flags and a cache argument that is handed through",
            small(
                ("        use_cache: bool = False,\n", "        *,\n        use_cache: bool = False,\n"),
                (
                    "from torch.nn import functional as F\n",
                    "from torch.nn import functional as F\nfrom fla.modules import RMSNorm, ShortConvolution\n"
                    "from fla.modules.l2norm import l2norm\n",
                ),
                init="self.pre_conv = ShortConvolution(hidden_size, 4, activation='silu')\n"
                "self.out_norm = RMSNorm(self.head_v_dim)",
                inputs="x = x + self.pre_conv(x)[0]",
                memory="o = l2norm(o)\no = self.out_norm(o)",
            ),
        ),
    ]


def _decoding() -> list[Mutant]:
    return [
        honest_program(
            "working_cache",
            "keeps state between calls, in the cache that the caller passes, and decodes with it rightly",
            small(
                (
                    "        if use_short_conv:\n            channels",
                    "        if self.use_short_conv:\n            channels",
                ),
                ("= use_gate, use_short_conv, norm_eps", "= use_gate, False, norm_eps"),
                (
                    "return y, None, past_key_values",
                    "return y, None, ({'state': kept} if use_cache else past_key_values)",
                ),
                memory="""
                kept = None
                if use_cache:
                    total = log_a.cumsum(dim=1)
                    left = (total[:, -1:] - total).exp()[..., None]
                    kept = torch.einsum("bthk,bthv->bhkv", k * left, v)
                    if past_key_values is not None:
                        old = past_key_values["state"]
                        o = o + torch.einsum("bthk,bhkv->bthv", q * total.exp()[..., None], old)
                        kept = kept + total[:, -1].exp()[..., None, None] * old
                """,
            ),
        ),
    ]


def honest_in_form() -> list[Mutant]:
    """Sound programs of this part."""
    return [*_counters(), *_starts(), *_steps(), *_precision(), *_torch(), *_contract(), *_decoding()]
