"""Blind set: programs that see the future by their filters, their kernels and their statistics over time."""

from __future__ import annotations

from benchmarks.mutant import Mutant
from benchmarks.mutants_blind.base import delta, designed, gated, mutant, small
from pipeline.designer import Genome

__all__ = ["leaks"]

_WITHIN = "    within_MCC = torch.bmm(q_MCK, k_MKC) * causal_CC\n"
_SMALL_PAD = "(self.conv.kernel_size[0] - 1, 0)"


def _shifts() -> list[Mutant]:
    return [
        mutant(
            "roll_wraps_to_first",
            "token shift by torch.roll: the first token sees the last one",
            small(inputs="x = 0.7 * x + 0.3 * torch.roll(x, 1, dims=1)"),
            "causality",
        ),
        mutant(
            "shift_sign",
            "the token shift pads the wrong end and mixes in the next token",
            designed(
                Genome(shift="static"), ("previous = F.pad(x, (0, 0, 1, -1))", "previous = F.pad(x, (0, 0, -1, 1))")
            ),
            "causality",
        ),
        mutant(
            "far_peek",
            "a token sees the one 200 places ahead, so only sequences longer than 200 show it",
            small(final="y = y + 0.1 * ahead(x, 200)"),
            "causality",
        ),
        mutant(
            "last_to_first_channel",
            "one channel of the first token gets one channel of the last token, nothing else leaks",
            small(
                final="""
                spot = torch.zeros_like(y)
                spot[:, 0, 0] = x[:, -1, 5]
                y = y + 0.2 * spot
                """
            ),
            "causality",
        ),
    ]


def _filters() -> list[Mutant]:
    return [
        mutant(
            "conv_slice_off_by_one",
            "the convolution pads both sides and its output is cut one token late",
            small(
                (_SMALL_PAD, "(self.conv.kernel_size[0] - 1, self.conv.kernel_size[0] - 1)"),
                ('"b d t -> b t d")\n        dtype', '"b d t -> b t d")[:, 1 : x.shape[1] + 1]\n        dtype'),
            ),
            "causality",
        ),
        mutant(
            "fft_circular",
            "a long filter applied by FFT without padding wraps around, so late tokens reach early ones",
            small(
                init="self.taps = nn.Parameter(torch.randn(64, self.head_v_dim) * 0.05)",
                memory="""
                n = v.shape[1]
                taps = F.pad(self.taps.to(dtype), (0, 0, 0, n))[:n, None]
                o = o + torch.fft.irfft(torch.fft.rfft(v, dim=1) * torch.fft.rfft(taps, dim=0), n=n, dim=1)
                """,
            ),
            "causality",
        ),
        mutant(
            "window_off_by_one",
            "the local window's mask lets a token see the next one of its block",
            designed(Genome(path="window"), ("(column <= row) &", "(column <= row + 1) &")),
            "causality",
        ),
        mutant(
            "future_of_the_gate",
            "with use_gate the gate is computed from the next token",
            delta(("F.silu(self.g_proj(x_BTD))", "F.silu(self.g_proj(F.pad(x_BTD, (0, 0, -1, 1))))")),
            "causality",
        ),
    ]


def _masks() -> list[Mutant]:
    return [
        mutant(
            "ragged_tail_unmasked",
            "the last chunk is not masked when the length is no multiple of the chunk",
            delta(
                (
                    _WITHIN,
                    """\
    scores_MCC = torch.bmm(q_MCK, k_MKC)
    within_MCC = scores_MCC * causal_CC
    if length % CHUNK:
        per_row = within_MCC.shape[0] // (batch * heads)
        tail = torch.arange(within_MCC.shape[0], device=q_MCK.device) % per_row == per_row - 1
        within_MCC = torch.where(tail[:, None, None], scores_MCC, within_MCC)
""",
                )
            ),
            "causality",
        ),
        mutant(
            "one_head_unmasked",
            "the last head's scores are not masked",
            delta(
                (
                    _WITHIN,
                    """\
    scores_MCC = torch.bmm(q_MCK, k_MKC)
    head = torch.arange(scores_MCC.shape[0], device=q_MCK.device) // (scores_MCC.shape[0] // (batch * heads)) % heads
    within_MCC = torch.where(head[:, None, None] == heads - 1, scores_MCC, scores_MCC * causal_CC)
""",
                )
            ),
            "causality",
        ),
        mutant(
            "mask_one_above_diagonal",
            "the mask inside a chunk keeps one token above the diagonal",
            delta((".tril()\n    within_MCC", ".tril(1)\n    within_MCC")),
            "causality",
        ),
        mutant(
            "product_rows_off_by_one",
            "with two rows a token the mask compares rows and lets the next token's first row through",
            designed(
                Genome(state="product"),
                (
                    "later = (row[None, :] // 2) > torch.arange(CHUNK, device=q_NACK.device)[:, None]",
                    "later = row[None, :] > 2 * torch.arange(CHUNK, device=q_NACK.device)[:, None] + 2",
                ),
            ),
            "causality",
        ),
    ]


def _chunks() -> list[Mutant]:
    return [
        mutant(
            "state_after_chunk",
            "a chunk reads the state that already holds its own writes, later tokens included",
            delta(
                ("write_ANKV.unbind(1)[:-1], keep_ANKK.unbind(1)[:-1]", "write_ANKV.unbind(1), keep_ANKK.unbind(1)"),
                ("torch.stack(states, dim=1)", "torch.stack(states[1:], dim=1)"),
            ),
            "causality",
        ),
        mutant(
            "heads_by_reshape",
            "heads are split by reshape to [B, H, T, D] without a transpose, which mixes tokens and heads",
            small(qkv="q = q.reshape(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)"),
            "causality",
        ),
        mutant(
            "backward_scan_thousandth",
            "a scan from the end is added with weight 1e-3 and called an auxiliary path",
            small(
                memory="""
                turned = (t.flip(1) for t in (q, k, v, log_a))
                o = o + 1e-3 * memory(*turned).flip(1)
                """
            ),
            "causality",
        ),
    ]


def _norms() -> list[Mutant]:
    return [
        mutant(
            "group_norm_over_time",
            "GroupNorm on [B, channels, T] takes its statistics over all tokens",
            small(
                init="self.mix_norm = nn.GroupNorm(num_heads, value_dim)",
                out="o = self.mix_norm(o.transpose(1, 2)).transpose(1, 2)",
            ),
            "causality",
        ),
        mutant(
            "layer_norm_over_time",
            "the output norm is given the shape of everything behind the batch axis",
            designed(
                Genome(),
                (
                    "F.rms_norm(o, (self.head_v_dim,), self.norm_gain.to(o.dtype), self.norm_eps)",
                    "F.layer_norm(o, o.shape[1:]) * self.norm_gain.to(o.dtype)",
                ),
            ),
            "causality",
        ),
        mutant(
            "softmax_keys_over_time",
            "keys go through a softmax over the whole sequence, as in non-causal efficient attention",
            small(qkv="k = (4.0 * k).softmax(dim=1)"),
            "causality",
        ),
        mutant(
            "stabiliser_over_time",
            "the maximum subtracted before exp is taken over all tokens and does not cancel because of the added floor",
            small(qkv="k = (k - k.amax(dim=(1, 3), keepdim=True)).exp() + 1e-2"),
            "causality",
        ),
    ]


def _statistics() -> list[Mutant]:
    return [
        mutant(
            "hedgehog_max_over_time",
            "the feature map's stabiliser takes its maximum along time instead of channels, detached",
            designed(
                Genome(feature="hedgehog", norm="soft"),
                ("signed.amax(dim=-1, keepdim=True)", "signed.amax(dim=1, keepdim=True)"),
            ),
            "causality",
        ),
        mutant(
            "decay_centred_over_time",
            "the decay's logits are centred by their mean over the sequence",
            gated(
                (
                    "a_BTH = self.a_proj(x_BTD)\n",
                    "a_BTH = self.a_proj(x_BTD)\n        a_BTH = a_BTH - a_BTH.mean(dim=1, keepdim=True)\n",
                )
            ),
            "causality",
        ),
        mutant(
            "quantised_per_tensor",
            "activations are rounded to 8 bits with one scale for the whole tensor, over rows and future tokens",
            small(
                inputs="""
                scale = x.detach().abs().amax().clamp(min=1e-6) / 127.0
                x = x + ((x / scale).round() * scale - x).detach()
                """
            ),
            "causality",
            "batch",
        ),
    ]


def _choices() -> list[Mutant]:
    return [
        mutant(
            "depth_routing_top_half",
            "a router keeps the half of the tokens with the highest scores of the whole sequence",
            small(
                init="self.router = nn.Linear(hidden_size, 1, bias=False)",
                qkv="""
                score = self.router(x).to(dtype)
                bar = score.topk((x.shape[1] + 1) // 2, dim=1).values[:, -1:]
                v = v * ((score >= bar) * score.sigmoid())[..., None]
                """,
            ),
            "causality",
        ),
        mutant(
            "expert_choice_over_batch",
            "a capacity limit picks tokens over the flattened batch, so rows and later tokens compete",
            small(
                init="self.router = nn.Linear(hidden_size, 1, bias=False)",
                qkv="""
                score = self.router(x).to(dtype)
                bar = score.flatten().topk(max(1, score.numel() * 3 // 4)).values[-1]
                v = v * ((score >= bar) * score.sigmoid())[..., None]
                """,
            ),
            "causality",
            "batch",
        ),
        mutant(
            "sorted_values",
            "one value channel of every head is sorted along time",
            small(qkv="v = torch.cat([v[..., :1].sort(dim=1).values, v[..., 1:]], dim=-1)"),
            "causality",
        ),
    ]


def _lengths() -> list[Mutant]:
    return [
        mutant(
            "relative_position_of_length",
            "a position feature is the index divided by the sequence's length: only another length shows it",
            small(inputs="x = x + 0.3 * torch.linspace(0, 1, x.shape[1], device=x.device).to(x.dtype)[:, None]"),
            "causality",
            "length",
        ),
        mutant(
            "decay_scaled_by_length",
            "the memory's time scale is set from the sequence's length",
            small(qkv="log_a = log_a * (256.0 / x.shape[1])"),
            "causality",
            "length",
        ),
        mutant(
            "energy_over_length",
            "a causal running sum is divided by the whole length instead of the tokens seen",
            designed(
                Genome(state="linear", detail="precondition"), ("(k.shape[-1] / seen)", "(k.shape[-1] / k.shape[1])")
            ),
            "causality",
        ),
    ]


def leaks() -> list[Mutant]:
    """Faulty programs of this part."""
    return [*_shifts(), *_filters(), *_masks(), *_chunks(), *_norms(), *_statistics(), *_choices(), *_lengths()]
