"""Mutants that cannot be trained, or cost more than linear attention may: gradients, learning, work and memory."""

from __future__ import annotations

from benchmarks.mutant import Mutant
from benchmarks.mutants.bases import DELTA, GATED, designed, edited, inserted

__all__ = ["mutants"]

_G = "gradients learns"


def mutants() -> list[Mutant]:
    """All of them."""
    return [*_gradients(), *_useless(), *_cost(), *_hidden_cost()]


def _gradients() -> list[Mutant]:
    return [
        edited(
            "detached_projection",
            DELTA,
            "the largest projection gets no gradient",
            _G,
            ("qkv = self.qkv_proj(x_BTD)", "qkv = self.qkv_proj(x_BTD).detach()"),
        ),
        inserted(
            "unused_parameters",
            GATED,
            "half of the parameters are used nowhere",
            _G,
            "",
            init="self.spare = nn.Linear(hidden_size, 6 * hidden_size)",
        ),
        inserted(
            "times_zero",
            DELTA,
            "a large layer counts times zero",
            _G,
            "o = o + 0.0 * self.spare(x).sum(-1, keepdim=True)",
            init="self.spare = nn.Linear(hidden_size, 6 * hidden_size)",
        ),
        inserted(
            "frozen_projection",
            GATED,
            "the largest projection is frozen",
            _G,
            "",
            init="self.qkv_proj.requires_grad_(False)",
        ),
        inserted("all_frozen", DELTA, "all parameters are frozen", _G, "", init="self.requires_grad_(False)"),
        inserted("no_gradient_at_all", GATED, "the output is detached", _G, "o = o.detach()"),
        inserted(
            "rounded_output", DELTA, "the output is rounded, so gradients vanish", _G, "o = (o * 100).round() / 100"
        ),
        inserted("sign_only", designed(gate="silu"), "only the sign of the output is returned", _G, "o = o.sign()"),
        inserted(
            "data_of_the_output", GATED, "the output is rebuilt from .data", _G, "o = torch.zeros_like(o).copy_(o.data)"
        ),
        edited(
            "mask_after_exp",
            GATED,
            "decays are masked after exp: infinity times zero in the backward pass",
            _G + " shapes",
            (".masked_fill(later_CC, -torch.inf).exp()", ".exp().masked_fill(later_CC, 0.0)"),
            ("-self.A_log.to(dtype).exp() * F.softplus(", "-10.0 * self.A_log.to(dtype).exp() * F.softplus(3.0 + "),
        ),
        inserted(
            "where_hides_nan",
            DELTA,
            "the branch that is not taken has a NaN gradient",
            _G,
            "o = torch.where(o > 0, o.sqrt(), o)",
        ),
        inserted(
            "root_of_zero",
            GATED,
            "the square root at zero has an infinite gradient",
            _G,
            "o = o + (o - o.detach()).abs().sqrt()",
        ),
        inserted(
            "backward_fails",
            DELTA,
            "a tensor that the backward pass needs is changed in place",
            _G + " construct cost",
            "saved = o.exp()\no = o + 1e-3 * saved\nsaved.mul_(2.0)",
        ),
        inserted(
            "gradient_reversed",
            GATED,
            "a function of its own turns the gradient around",
            "learns gradients",
            "o = Reverse.apply(o)",
            top="class Reverse(torch.autograd.Function):\n    @staticmethod\n    def forward(ctx, x):\n"
            "        return x.clone()\n\n    @staticmethod\n    def backward(ctx, grad):\n        return -grad",
        ),
    ]


def _useless() -> list[Mutant]:
    return [
        inserted(
            "constant_output",
            DELTA,
            "the output is a learnt constant",
            "gradients learns",
            "o = self.constant.to(o.dtype).expand_as(o).clone()",
            init="self.constant = nn.Parameter(torch.ones(hidden_size))",
        ),
        inserted("zero_output", GATED, "the output is zero", "gradients learns", "o = o * 0.0"),
        inserted(
            "input_passed_through", DELTA, "the input is returned as it came", "gradients learns", "o = x.clone()"
        ),
        inserted(
            "depends_on_position_only",
            designed(state="linear"),
            "the output depends on the position only",
            "gradients learns",
            "o = torch.arange(x.shape[1], dtype=o.dtype)[:, None] * self.ramp.to(o.dtype) / 64 + torch.zeros_like(o)",
            init="self.ramp = nn.Parameter(torch.ones(hidden_size))",
        ),
        inserted(
            "saturated", GATED, "a tanh at its limits passes no gradient", "gradients learns", "o = torch.tanh(1e6 * o)"
        ),
        inserted(
            "vanishing", DELTA, "the output is a millionth of what it should be", "learns gradients", "o = o * 1e-12"
        ),
        inserted("exploding", GATED, "outputs of a billion", "learns gradients length", "o = o * 1e9"),
        edited(
            "no_memory",
            DELTA,
            "a token sees nothing but itself",
            "learns",
            (
                "self.o_norm(chunked_delta_rule(q_BTHK, k_BTHK, v_BTHV.to(dtype), beta_BTH))",
                "self.o_norm(v_BTHV.to(dtype) * (q_BTHK * k_BTHK).sum(-1, keepdim=True) * beta_BTH[..., None])",
            ),
            ("qkv = self.qkv_conv(qkv)", "qkv = qkv * self.qkv_conv.weight[:, 0, -1]"),
        ),
    ]


def _cost() -> list[Mutant]:
    c = "cost"
    attention = "F.scaled_dot_product_attention(x, x, x, is_causal=True)"
    rows, columns = "x[:, :, None, :1]", "x[:, None, :, :1]"
    before = "F.pad(x.transpose(1, 2), (x.shape[1] - 1, 0))"
    return [
        inserted(
            "softmax_attention", DELTA, "causal softmax attention beside the memory", c, f"o = o + 0.1 * {attention}"
        ),
        inserted(
            "thin_attention",
            GATED,
            "quadratic attention with four channels",
            c,
            "q = x[..., :4]\nweights = (q @ q.transpose(1, 2)).tril()\n"
            "o = o + 0.01 * (weights @ q).mean(-1, keepdim=True)",
        ),
        inserted(
            "attention_over_1000",
            DELTA,
            "quadratic attention in a branch for long sequences",
            c,
            f"if x.shape[1] > 1000:\n    o = o + 0.1 * {attention}",
        ),
        inserted(
            "pairs_of_tokens",
            designed(decay="fixed"),
            "differences of all pairs of tokens",
            c,
            f"pairs = ({rows} - {columns}).squeeze(-1).abs().tril()\no = o + 0.01 * pairs.mean(-1, keepdim=True)",
        ),
        edited(
            "one_chunk",
            DELTA,
            "the whole sequence is one chunk",
            c,
            ("    value_dim = v_BTHV.shape[-1]\n", "    value_dim = v_BTHV.shape[-1]\n    CHUNK = length\n"),
        ),
        edited(
            "chunk_grows",
            GATED,
            "chunks grow with the square root of the length, and so does the work",
            c,
            (
                "    value_dim = v_BTHV.shape[-1]\n",
                "    value_dim = v_BTHV.shape[-1]\n    CHUNK = max(16, 2 * int(length**0.5))\n",
            ),
        ),
        inserted(
            "earlier_chunks",
            GATED,
            "each chunk attends to all chunks before it",
            c,
            "parts = []\nfor start in range(0, x.shape[1], 32):\n"
            "    seen, now = x[:, : start + 32], x[:, start : start + 32]\n"
            "    parts.append((now @ seen.transpose(1, 2)).tril(start) @ seen)\n"
            "o = o + 0.001 * torch.cat(parts, dim=1)",
        ),
        inserted(
            "loop_over_tokens_and_heads",
            DELTA,
            "a Python loop over tokens and groups of channels",
            c,
            "rows, state = [], torch.zeros_like(x[:, 0])\nfor t in range(x.shape[1]):\n    parts = []\n"
            "    for part, now in zip(state.chunk(16, -1), x[:, t].chunk(16, -1), strict=True):\n"
            "        parts.append(torch.tanh(0.9 * part + 0.1 * now) * torch.sigmoid(now))\n"
            "    state = torch.cat(parts, -1)\n    rows.append(state)\no = o + 0.1 * torch.stack(rows, 1)",
        ),
        inserted(
            "mask_of_the_sequence",
            designed(path="fir"),
            "builds a mask of length by length and sums a product with it",
            c,
            "mask = torch.ones(x.shape[1], x.shape[1], dtype=x.dtype).tril()\no = o + 0.001 * mask @ x",
        ),
        inserted(
            "sequence_wide_solve",
            GATED,
            "one triangular system over all tokens",
            c,
            "system = 1e-3 * (x[..., :8] @ x[..., :8].transpose(1, 2)).tril(-1)\n"
            "system = system + torch.eye(x.shape[1], dtype=x.dtype)\n"
            "o = o + 0.1 * torch.linalg.solve_triangular(system, x, upper=False)",
        ),
        inserted(
            "length_by_length_filter",
            DELTA,
            "a convolution as long as the sequence, computed directly",
            c,
            "taps = self.taps.to(x.dtype) ** torch.arange(x.shape[1] - 1, -1, -1, dtype=x.dtype)\n"
            "o = o + 0.1 * F.conv1d(F.pad(x.transpose(1, 2), (x.shape[1] - 1, 0)), taps.expand(x.shape[-1], 1, -1),"
            " groups=x.shape[-1]).transpose(1, 2)",
            init="self.taps = nn.Parameter(torch.full((1,), 0.9))",
        ),
        inserted(
            "running_mean_by_pooling",
            GATED,
            "a mean over all tokens so far, by pooling windows as long as the sequence",
            c,
            f"o = o + 0.1 * F.avg_pool1d({before}, x.shape[1], 1).transpose(1, 2)",
        ),
        inserted(
            "running_maximum_by_pooling",
            DELTA,
            "a maximum over all tokens so far, by pooling windows as long as the sequence",
            c,
            f"o = o + 0.1 * F.max_pool2d({before}[:, None], (1, x.shape[1]), 1)[:, 0].transpose(1, 2)",
        ),
        inserted(
            "length_by_length_time_first",
            designed(decay="scalar"),
            "a convolution as long as the sequence, by the operation that takes time first",
            c,
            "few = F.pad(x[..., :4].transpose(0, 1), (0, 0, 0, 0, x.shape[1] - 1, 0))\n"
            "taps = torch.full((x.shape[1], 4, 4), 1e-3).to(x)\n"
            "o = torch.cat([o[..., :4] + torch.conv_tbc(few, taps, torch.zeros(4).to(x), 0).transpose(0, 1), "
            "o[..., 4:]], -1)",
        ),
    ]


def _hidden_cost() -> list[Mutant]:
    c = "cost"
    attention = "F.scaled_dot_product_attention(x, x, x, is_causal=True)"
    return [
        inserted(
            "attention_with_a_switch",
            DELTA,
            "quadratic attention with use_gate=True",
            c,
            f"if self.use_gate:\n    o = o + 0.1 * {attention}",
        ),
        inserted(
            "attention_by_zero_gate",
            GATED,
            "quadratic attention behind a share that starts at zero",
            c,
            f"o = o + self.share * {attention}",
            init="self.share = nn.Parameter(torch.zeros(1))",
        ),
        inserted(
            "attention_in_eval",
            DELTA,
            "quadratic attention in eval mode only",
            c + " shapes causality",
            f"if not self.training:\n    o = o + 0.1 * {attention}",
        ),
        inserted(
            "attention_for_layer_3",
            GATED,
            "quadratic attention in every fourth layer",
            c,
            f"if self.attend:\n    o = o + 0.1 * {attention}",
            init="self.attend = (layer_idx or 0) % 4 == 3",
        ),
        inserted(
            "attention_over_3000",
            designed(decay="scalar"),
            "quadratic attention beyond 3000 tokens",
            c + " length",
            f"if x.shape[1] > 3000:\n    o = o + 0.1 * {attention}",
        ),
        inserted(
            "attention_without_gradients",
            DELTA,
            "quadratic attention where no gradients are recorded",
            c + " shapes causality",
            f"if not torch.is_grad_enabled():\n    o = o + 0.1 * {attention}",
        ),
        inserted(
            "attention_in_backward",
            GATED,
            "the backward pass multiplies length by length",
            c,
            "o = Costly.apply(o)",
            top="class Costly(torch.autograd.Function):\n    @staticmethod\n    def forward(ctx, x):\n"
            "        ctx.save_for_backward(x)\n        return x.clone()\n\n"
            "    @staticmethod\n    def backward(ctx, grad):\n"
            "        (x,) = ctx.saved_tensors\n        return grad + 1e-9 * (x @ x.transpose(1, 2)).tril() @ grad",
        ),
    ]
