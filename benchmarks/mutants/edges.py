"""Mutants whose mechanism sees the future: wrong masks, chunk edges, convolutions and shifts."""

from __future__ import annotations

from benchmarks.mutant import Mutant
from benchmarks.mutants.bases import DELTA, GATED, designed, edited, inserted

__all__ = ["mutants"]

_C = "causality"
_LINEAR = designed(state="linear")
_WINDOW = designed(path="window", decay="channel")
_SOLVE = "solve_triangular(overlap_MCC, writes, upper=False, unitriangular=True)"


def mutants() -> list[Mutant]:
    """Masks, chunk edges, convolutions and shifts that reach beyond the current token."""
    return [*_masks(), *_chunk_edges(), *_filters()]


def _masks() -> list[Mutant]:
    return [
        edited("mask_one_ahead", DELTA, "the mask inside a chunk admits the next token", _C, (".tril()", ".tril(1)")),
        edited("no_mask_in_chunk", DELTA, "no mask inside a chunk", _C, ("k_MKC) * causal_CC", "k_MKC)")),
        edited("anticausal_mask", DELTA, "the mask inside a chunk is transposed", _C, (".tril()", ".triu()")),
        edited(
            "upper_triangular_solve",
            DELTA,
            "a token subtracts what later tokens of its chunk wrote",
            _C,
            (_SOLVE, "solve_triangular(overlap_MCC, writes, upper=True, unitriangular=True)"),
        ),
        edited(
            "full_solve",
            DELTA,
            "the system of a chunk is solved with both triangles",
            _C,
            (
                f"torch.linalg.{_SOLVE}",
                "torch.linalg.solve(overlap_MCC + 2 * torch.eye(CHUNK, dtype=writes.dtype), writes)",
            ),
        ),
        edited(
            "decay_mask_one_ahead",
            GATED,
            "the decay mask admits the next token",
            _C,
            ("device=q_MCK.device).triu(1)", "device=q_MCK.device).triu(2)"),
        ),
        edited(
            "decay_without_mask",
            GATED,
            "decays are not masked, so reads inside a chunk see all of it",
            _C,
            (".masked_fill(later_CC, -torch.inf)", ".clamp(max=0.0)"),
        ),
        edited("linear_mask_one_ahead", _LINEAR, "tril(1) in an additive memory", _C, (".tril()", ".tril(1)")),
        edited("channel_decay_no_mask", _WINDOW, "tril is missing", _C, ("(q_NACK @ turn).tril()", "(q_NACK @ turn)")),
        edited(
            "window_one_ahead",
            _WINDOW,
            "local attention sees one token ahead, except at the edge of a block",
            _C,
            ("(column <= row)", "(column <= row + 1)"),
        ),
        edited("window_whole_block", _WINDOW, "local attention sees its block", _C, ("(column <= row) & ", "")),
        edited(
            "product_row_not_token",
            designed(state="product"),
            "rows are compared with tokens as if there were one row a token, plus one",
            _C,
            ("(row[None, :] // 2) >", "((row[None, :] - 1) // 2) >"),
        ),
    ]


def _chunk_edges() -> list[Mutant]:
    return [
        edited(
            "state_of_own_chunk",
            DELTA,
            "a chunk reads the state that already holds the chunk itself",
            _C,
            (
                "zip(write_ANKV.unbind(1)[:-1], keep_ANKK.unbind(1)[:-1]",
                "zip(write_ANKV.unbind(1), keep_ANKK.unbind(1)",
            ),
            ("torch.stack(states, dim=1)", "torch.stack(states[1:], dim=1)"),
        ),
        edited(
            "linear_state_of_own_chunk",
            _LINEAR,
            "the running sum over chunks is not shifted",
            _C,
            (
                "F.pad(write[:-1].cumsum(dim=0), (0, 0, 0, 0, 0, 0, 1, 0))",
                "write.cumsum(dim=0)",
            ),
        ),
        edited(
            "running_sum_from_the_end",
            _LINEAR,
            "the sum over chunks runs from the last to the first",
            _C,
            ("write[:-1].cumsum(dim=0)", "write[1:].flip(0).cumsum(dim=0).flip(0)"),
        ),
        edited(
            "final_state_everywhere",
            designed(decay="scalar"),
            "every chunk reads the state at the end of the sequence",
            _C,
            ("state = torch.stack(states)", "state = states[-1].expand(len(states), *states[-1].shape)"),
        ),
        edited(
            "decay_to_the_end_of_chunk",
            GATED,
            "queries are decayed by the whole chunk, later tokens included",
            _C,
            (
                "since_start_MC1, until_end_M1C = total_MC1.exp()",
                "since_start_MC1, until_end_M1C = total_MC1[:, -1:].expand_as(total_MC1).exp()",
            ),
        ),
        edited(
            "first_token_of_next_chunk",
            _LINEAR,
            "the state of a chunk holds the first token of that chunk for all its reads",
            _C,
            (
                "F.pad(write[:-1].cumsum(dim=0), (0, 0, 0, 0, 0, 0, 1, 0))",
                "F.pad(write[:-1].cumsum(dim=0), (0, 0, 0, 0, 0, 0, 1, 0)) + "
                "F.pad((turn[..., :1] @ v_NACV[:, :, :1])[1:], (0, 0, 0, 0, 0, 0, 0, 1))",
            ),
        ),
        inserted(
            "last_of_chunk_sees_next",
            GATED,
            "only the last token of each chunk of 32 sees the token after it",
            _C,
            "edge = (torch.arange(x.shape[1]) % 32 == 31)[None, :, None]\no = o + 0.1 * edge * F.pad(x, (0, 0, -1, 1))",
        ),
        inserted(
            "sees_end_of_chunk",
            designed(gate="silu"),
            "each token reads the last token of its chunk",
            _C,
            "last = (torch.arange(x.shape[1]) // 32 * 32 + 31).clamp(max=x.shape[1] - 1)\no = o + 0.1 * x[:, last]",
        ),
        inserted(
            "chunk_mean",
            DELTA,
            "the mean of the own chunk of 16 is added",
            _C,
            "padded = F.pad(x, (0, 0, 0, -x.shape[1] % 16)).unflatten(1, (-1, 16))\n"
            "mean = padded.mean(2, keepdim=True).expand_as(padded).flatten(1, 2)\no = o + 0.1 * mean[:, : x.shape[1]]",
        ),
        inserted(
            "blocks_from_the_end",
            GATED,
            "running means restart at blocks that are aligned to the end of the sequence",
            _C,
            "blocks = F.pad(x, (0, 0, -x.shape[1] % 32, 0)).unflatten(1, (-1, 32))\n"
            "o = o + 0.1 * blocks.cumsum(2).flatten(1, 2)[:, -x.shape[1] :]",
        ),
    ]


def _filters() -> list[Mutant]:
    pad = "(self.kernel_size[0] - 1, 0)"
    return [
        edited(
            "centred_convolution",
            DELTA,
            "the short convolution is centred",
            _C,
            (pad, "((self.kernel_size[0] - 1) // 2, self.kernel_size[0] // 2)"),
        ),
        edited(
            "convolution_one_ahead",
            GATED,
            "the convolution is padded by one too few on the left",
            _C,
            (pad, "(self.kernel_size[0] - 2, 1)"),
        ),
        edited("anticausal_convolution", DELTA, "padded on the right", _C, (pad, "(0, self.kernel_size[0] - 1)")),
        edited(
            "shifted_taps_one_ahead",
            designed(conv="short", decay="fixed"),
            "the sum of shifted copies starts one token late",
            _C,
            ("(0, 0, width - 1, 0)", "(0, 0, width - 2, 1)"),
        ),
        edited(
            "spaced_taps_reach_ahead",
            designed(conv="dilated"),
            "the taps of the dilated convolution are padded for one tap too few",
            _C,
            ("(0, 0, gap * (width - 1), 0)", "(0, 0, gap * (width - 2), gap)"),
        ),
        edited(
            "multiscale_centred",
            designed(conv="multiscale"),
            "the widths are centred on each other, and the sum on the token",
            _C,
            ("(taps_DW.shape[1] - 1, 0)", "(taps_DW.shape[1] // 2, taps_DW.shape[1] // 2)"),
        ),
        edited(
            "token_shift_from_the_right",
            designed(shift="static"),
            "the token shift takes the next token",
            _C,
            ("F.pad(x, (0, 0, 1, -1))", "F.pad(x, (0, 0, -1, 1))"),
        ),
        edited(
            "token_shift_by_roll",
            designed(shift="dynamic"),
            "the token shift wraps around: the first token sees the last",
            _C,
            ("F.pad(x, (0, 0, 1, -1))", "x.roll(1, 1)"),
        ),
        edited(
            "fir_path_centred",
            designed(path="fir"),
            "the filter path is centred",
            _C,
            ("(taps_DW.shape[1] - 1, 0)", "(taps_DW.shape[1] // 2, (taps_DW.shape[1] - 1) // 2)"),
        ),
        inserted(
            "circular_fourier_filter",
            DELTA,
            "a filter by Fourier transform without zero padding wraps around",
            _C,
            "filter_F = torch.fft.rfft(self.taps.to(x.dtype), n=x.shape[1], dim=0)\n"
            "o = o + torch.fft.irfft(torch.fft.rfft(x, dim=1) * filter_F, n=x.shape[1], dim=1)",
            init="self.taps = nn.Parameter(0.1 * torch.randn(4, hidden_size))",
        ),
        inserted(
            "pool_and_upsample",
            GATED,
            "means over blocks of 4 are repeated back to the tokens of the block",
            _C,
            "pooled = F.avg_pool1d(F.pad(x, (0, 0, 0, -x.shape[1] % 4)).transpose(1, 2), 4).transpose(1, 2)\n"
            "o = o + 0.2 * pooled.repeat_interleave(4, dim=1)[:, : x.shape[1]]",
        ),
        edited(
            "gate_of_next_token",
            GATED,
            "the output gate is computed from the next token",
            _C,
            ("self.g_proj(x_BTD)", "self.g_proj(torch.cat([x_BTD[:, 1:], x_BTD[:, -1:]], dim=1))"),
        ),
        edited(
            "write_strength_of_next_token",
            DELTA,
            "the write strength is computed from the next token",
            _C,
            ("self.b_proj(x_BTD)", "self.b_proj(F.pad(x_BTD, (0, 0, -1, 1)))"),
        ),
        edited(
            "heads_by_view",
            designed(decay="scalar", gate="head"),
            "heads are split off by a view over time and channels, not by a transposition",
            _C + " shapes batch",
            (
                "if remember is memory",
                "v = v.reshape(v.shape[0], v.shape[2], v.shape[1], -1).transpose(1, 2).contiguous()\n"
                "        if remember is memory",
            ),
        ),
    ]
