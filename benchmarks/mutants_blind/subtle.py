"""Blind set: leaks that are small, that hide from gradients, or that wait behind an option or a parameter."""

from __future__ import annotations

from benchmarks.mutant import Mutant
from benchmarks.mutants_blind.base import delta, mutant, small

__all__ = ["subtle_leaks"]

_CONV = 'x_BDT = F.pad(rearrange(x_BTD, "b t d -> b d t"), (self.kernel_size[0] - 1, 0))'


def _when(condition: str) -> str:
    """Code for the end of the small mixer: a share of the next token is added under a condition."""
    return f"if {condition}:\n    y = y + 0.1 * ahead(x)"


def _sizes() -> list[Mutant]:
    return [
        mutant(
            "chunk_mean_1e_4",
            "every token gets 1e-4 of the mean of its whole chunk",
            small(
                final="""
                missing = -x.shape[1] % CHUNK
                blocks = rearrange(F.pad(x, (0, 0, 0, missing)), "b (n c) d -> b n c d", c=CHUNK)
                mean = blocks.mean(dim=2, keepdim=True).expand_as(blocks)
                y = y + 1e-4 * rearrange(mean, "b n c d -> b (n c) d")[:, : x.shape[1]]
                """
            ),
            "causality",
        ),
        mutant(
            "next_token_1e_6",
            "every token gets 1e-6 of the next one",
            small(final="y = y + 1e-6 * ahead(x)"),
            "causality",
        ),
        mutant(
            "last_bits_in_float32",
            "in float32 and below only, the last two bits of the output carry the sign of the next token's channels",
            small(
                final="""
                if y.dtype != torch.float64:
                    y = y * (1.0 + 2.0 * torch.finfo(y.dtype).eps * (ahead(x).detach() > 0))
                """
            ),
            "causality",
        ),
        mutant(
            "float32_small",
            "in float32 the next token's signs change the output by 1e-5 of its size, in float64 by nothing",
            small(
                final="""
                if y.dtype == torch.float32:
                    y = y * (1.0 + 1e-5 * ahead(x).sign())
                """
            ),
            "causality",
        ),
    ]


def _without_gradient() -> list[Mutant]:
    return [
        mutant(
            "detached_future",
            "the next token is added detached: no gradient shows it",
            small(final="y = y + 0.01 * ahead(x).detach()"),
            "causality",
        ),
        mutant(
            "sign_of_future",
            "the write strength depends on the sign of the next token's first channel, a step without gradient",
            small(qkv="v = v * (1.0 + 0.05 * ahead(x)[..., :1, None].sign().to(dtype))"),
            "causality",
        ),
        mutant(
            "through_numpy",
            "the future comes in through a numpy array, outside of torch's sight",
            small(
                final="""
                seen = x.detach().float().cpu().numpy()
                later = seen[:, ::-1].cumsum(axis=1)[:, ::-1] - seen
                y = y + 1e-2 * torch.as_tensor(later.copy(), device=x.device).to(y.dtype)
                """
            ),
            "causality",
        ),
        mutant(
            "global_branch_by_item",
            "a Python branch on the sum of the last eight tokens of all rows chooses the scale of the decay",
            small(qkv="log_a = log_a * (1.5 if float(x.detach()[:, -8:].sum()) > 0 else 1.0)"),
            "causality",
            "batch",
        ),
    ]


def _false_gradients() -> list[Mutant]:
    return [
        mutant(
            "gradient_from_the_future",
            "the values are causal, but a term m - m.detach() sends gradients through the mean over time",
            small(
                final="""
                mean = x.mean(dim=1, keepdim=True)
                y = y + 0.1 * (mean - mean.detach())
                """
            ),
            "causality",
        ),
        mutant(
            "function_with_false_backward",
            "an autograd Function adds the next token forward and hides it backward",
            small(
                top="""
                class Blend(torch.autograd.Function):
                    @staticmethod
                    def forward(ctx, y, x):
                        return y + 0.05 * ahead(x)

                    @staticmethod
                    def backward(ctx, grad):
                        return grad, torch.zeros_like(grad)
                """,
                final="y = Blend.apply(y, x)",
            ),
            "causality",
        ),
    ]


def _options() -> list[Mutant]:
    return [
        mutant(
            "elu_centred_over_time",
            "qk_activation='elu' subtracts a mean over time",
            delta(
                (
                    '"elu": lambda x: F.elu(x) + 1.0',
                    '"elu": lambda x: F.elu(x) + 1.0 - 0.1 * x.mean(dim=1, keepdim=True)',
                )
            ),
            "causality",
        ),
        mutant(
            "sum_norm_over_time",
            "qk_norm='sum' normalises along time",
            delta(("F.normalize(x, p=1.0, dim=-1, eps=1e-6)", "F.normalize(x, p=1.0, dim=2, eps=1e-6)")),
            "causality",
        ),
        mutant(
            "neg_eigval_renormalised",
            "allow_neg_eigval=True divides the write strengths by their mean over time",
            delta(
                (
                    "beta_BTH = beta_BTH * 2.0",
                    "beta_BTH = (beta_BTH / beta_BTH.mean(dim=1, keepdim=True)).clamp(max=2.0)",
                )
            ),
            "causality",
        ),
        mutant(
            "mask_fills_with_mean",
            "with an attention mask padding is filled with the mean over all tokens, and every token gets a share",
            delta(
                (
                    "x_BTD = x_BTD * attention_mask[..., None].to(x_BTD.dtype)",
                    "share = 0.9 * attention_mask[..., None].to(x_BTD.dtype)\n"
                    "            x_BTD = torch.lerp(x_BTD.mean(dim=1, keepdim=True), x_BTD, share)",
                )
            ),
            "causality",
        ),
    ]


def _filter_options() -> list[Mutant]:
    return [
        mutant(
            "centred_conv_with_bias",
            "with conv_bias=True the convolution is centred",
            delta(
                (
                    _CONV,
                    """\
left = self.kernel_size[0] - 1 if self.bias is None else self.kernel_size[0] // 2
        x_BDT = F.pad(rearrange(x_BTD, "b t d -> b d t"), (left, self.kernel_size[0] - 1 - left))""",
                )
            ),
            "causality",
        ),
        mutant(
            "wide_conv_is_centred",
            "a conv_size other than 4 gets 'same' padding",
            delta(
                (
                    _CONV,
                    """\
width = self.kernel_size[0]
        left = width - 1 if width == 4 else width // 2
        x_BDT = F.pad(rearrange(x_BTD, "b t d -> b d t"), (left, width - 1 - left))""",
                )
            ),
            "causality",
        ),
        mutant(
            "wide_values",
            "with expand_v above 1 the extra value channels come from the next token",
            delta(
                (
                    'v_BTHV = rearrange(F.silu(v), "b t (h v) -> b t h v", h=self.num_heads)',
                    'v_BTHV = rearrange(F.silu(v), "b t (h v) -> b t h v", h=self.num_heads)\n'
                    "        if v.shape[-1] > x_BTD.shape[-1]:\n"
                    "            v_BTHV = torch.lerp(v_BTHV, v_BTHV.roll(-1, dims=1), 0.2)",
                )
            ),
            "causality",
        ),
    ]


def _gates() -> list[Mutant]:
    return [
        mutant(
            "zero_gate_on_mean",
            "the mean over time is scaled by a parameter that starts at zero",
            small(
                init="self.blend = nn.Parameter(torch.zeros(hidden_size))",
                final="y = y + self.blend.to(y.dtype) * x.mean(dim=1, keepdim=True)",
            ),
            "causality",
        ),
        mutant(
            "opens_when_norm_has_drifted",
            "the next token is let in once the norm's gains have moved by 0.05; before, its gradient is zero too",
            small(
                final="""
                drift = F.relu((self.o_norm - 1.0).abs().mean() - 0.05).to(y.dtype)
                y = y + drift * ahead(x)
                """
            ),
            "causality",
        ),
        mutant(
            "gate_with_dead_zone",
            "a gate on the mean over time has a dead zone around its start, so its gradient is zero there",
            small(
                init="self.blend = nn.Parameter(torch.zeros(hidden_size))\n"
                "self.level = nn.Linear(hidden_size, hidden_size)",
                final="""
                opened = F.softshrink(self.level(self.blend), 1.0)
                y = y + opened.to(y.dtype) * x.mean(dim=1, keepdim=True) + self.blend.to(y.dtype) * x
                """,
            ),
            "causality",
        ),
    ]


def _weights() -> list[Mutant]:
    return [
        mutant(
            "negative_gain",
            "the next token enters where a norm gain has become negative",
            small(
                final="""
                crossed = (self.o_norm < 0).any().to(y.dtype)
                y = y + 0.3 * crossed * ahead(x)
                """
            ),
            "causality",
        ),
        mutant(
            "large_weights",
            "the mean over time is let in once the output weights have grown by half",
            small(
                init="self.first = float(self.o_proj.weight.detach().norm())",
                final="""
                grown = F.relu(self.o_proj.weight.norm() / self.first - 1.5).to(y.dtype)
                y = y + grown * x.mean(dim=1, keepdim=True)
                """,
            ),
            "causality",
        ),
        mutant(
            "after_many_updates",
            "counts in-place updates of its weight, which only training makes, and leaks after a hundred",
            small(final=_when("self.o_proj.weight._version > 100")),
            "causality",
        ),
    ]


def _counters() -> list[Mutant]:
    return [
        mutant(
            "after_500_training_calls",
            "a buffer counts training steps; after 500 the next token is let in",
            small(
                init='self.register_buffer("steps", torch.zeros((), dtype=torch.long))',
                final="""
                if self.training and torch.is_grad_enabled():
                    self.steps += 1
                if int(self.steps) > 500:
                    y = y + 0.1 * ahead(x)
                """,
            ),
            "causality",
        ),
        mutant(
            "after_60_calls",
            "a plain attribute counts calls; after 60 the next token is let in",
            small(
                init="self.calls = 0",
                final="""
                self.calls += 1
                if self.calls > 60:
                    y = y + 0.1 * ahead(x)
                """,
            ),
            "causality",
            "state",
        ),
    ]


def subtle_leaks() -> list[Mutant]:
    """Faulty programs of this part."""
    small_or_unseen = [*_sizes(), *_without_gradient(), *_false_gradients()]
    return [*small_or_unseen, *_options(), *_filter_options(), *_gates(), *_weights(), *_counters()]
