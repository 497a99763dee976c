"""Mutants that take means, norms, orders or recurrences over the whole sequence."""

from __future__ import annotations

from benchmarks.mutant import Mutant
from benchmarks.mutants.bases import DELTA, GATED, designed, edited, inserted

__all__ = ["mutants"]

_C = "causality"


def mutants() -> list[Mutant]:
    """Means, norms, orders and recurrences taken over the whole sequence."""
    return [*_moments(), *_orders(), *_whole_sequence()]


def _moments() -> list[Mutant]:
    return [
        inserted("mean_over_time", DELTA, "the mean over time is added", _C, "o = o + 0.1 * x.mean(1, keepdim=True)"),
        inserted("detached_mean", GATED, "a detached mean over time", _C, "o = o + 0.1 * x.detach().mean(1, True)"),
        edited(
            "softmax_over_time",
            DELTA,
            "queries and keys pass a softmax over time",
            _C,
            ("self.activation(qk)", "qk.softmax(dim=1)"),
        ),
        edited(
            "keys_normalised_over_time",
            designed(state="linear", norm="l2"),
            "queries and keys are normalised over time",
            _C,
            ("qk.square().sum(dim=-1, keepdim=True)", "qk.square().sum(dim=1, keepdim=True)"),
        ),
        edited(
            "norm_over_time",
            DELTA,
            "the output norm averages over time and channels",
            _C,
            ("x.square().mean(dim=-1, keepdim=True)", "x.square().mean(dim=(1, 3), keepdim=True)"),
        ),
        edited(
            "layer_norm_over_time",
            designed(out_norm="group"),
            "the output norm runs over everything but the batch",
            _C,
            (
                "F.layer_norm(o, (self.head_v_dim,), gain, offset, self.norm_eps)",
                "F.layer_norm(o, o.shape[1:], None, None, self.norm_eps) * gain + offset",
            ),
        ),
        inserted(
            "instance_norm",
            GATED,
            "instance norm: over time, each channel",
            _C,
            "o = F.instance_norm(o.transpose(1, 2)).transpose(1, 2) if x.shape[1] > 1 else o",
        ),
        inserted(
            "group_norm",
            DELTA,
            "group norm of [B, D, T]",
            _C,
            "o = self.norm(o.transpose(1, 2)).transpose(1, 2)",
            init="self.norm = nn.GroupNorm(4, hidden_size)",
        ),
        inserted(
            "squeeze_and_excite",
            designed(gate="sigmoid"),
            "a channel gate from the mean over time",
            _C,
            "o = o * 2 * torch.sigmoid(self.squeeze(x.mean(1, keepdim=True)))",
            init="self.squeeze = nn.Linear(hidden_size, hidden_size)",
        ),
        inserted(
            "max_over_time",
            DELTA,
            "scaled by the largest value of the sequence",
            _C,
            "o = o / (1.0 + x.amax(dim=(1, 2), keepdim=True))",
        ),
        edited(
            "standardised_strength",
            DELTA,
            "write strengths are standardised over time",
            _C,
            ("beta_BTH.to(dtype).sigmoid()", "(beta_BTH - beta_BTH.mean(1, keepdim=True)).to(dtype).sigmoid()"),
        ),
        inserted(
            "absmax_quantisation",
            GATED,
            "rounded to 8 bits by the largest magnitude of the sequence",
            _C,
            "step = o.detach().abs().amax(dim=(1, 2), keepdim=True) / 127 + 1e-9\n"
            "o = o + ((o / step).round() * step - o).detach()",
        ),
        edited(
            "preconditioner_of_the_future",
            designed(state="linear", detail="precondition"),
            "the energies of keys are summed from the end",
            _C,
            ("k.square().cumsum(dim=1)", "k.square().flip(1).cumsum(dim=1).flip(1)"),
        ),
        edited(
            "preconditioner_whole",
            designed(state="linear", detail="precondition", feature="elu1"),
            "the energies of keys are those of the whole sequence",
            _C,
            ("k.square().cumsum(dim=1)", "k.square().sum(dim=1, keepdim=True)"),
        ),
    ]


def _orders() -> list[Mutant]:
    return [
        edited(
            "values_sorted_over_time",
            DELTA,
            "values are sorted over time",
            _C,
            ("v_BTHV.to(dtype), beta_BTH", "v_BTHV.to(dtype).sort(dim=1).values, beta_BTH"),
        ),
        inserted("flip_over_time", GATED, "the reversed sequence is added", _C, "o = o + 0.1 * x.flip(1)"),
        inserted(
            "median_over_time", DELTA, "the median over time", _C, "o = o - 0.1 * x.median(1, keepdim=True).values"
        ),
        inserted(
            "rank_over_time",
            designed(decay="bounded"),
            "ranks over time by argsort, without a gradient",
            _C,
            "rank = x[..., :1].argsort(dim=1).argsort(dim=1).to(o.dtype)\no = o * (1.0 + 0.1 * (rank / x.shape[1]))",
        ),
        inserted(
            "expert_choice",
            GATED,
            "the tokens with the highest score of the sequence are treated otherwise",
            _C,
            "score = self.score(x)[..., 0]\nchosen = score >= score.topk((x.shape[1] + 1) // 2, dim=1).values[:, -1:]\n"
            "o = torch.where(chosen[..., None], o * 1.5, o)",
            init="self.score = nn.Linear(hidden_size, 1)",
        ),
        inserted(
            "threshold_at_the_mean",
            DELTA,
            "a hard threshold at the mean of the sequence",
            _C,
            "o = torch.where(x > x.mean(dim=1, keepdim=True), o, 0.9 * o)",
        ),
    ]


def _whole_sequence() -> list[Mutant]:
    return [
        inserted("last_token_everywhere", DELTA, "each token reads the last one", _C, "o = o + 0.1 * x[:, -1:]"),
        edited(
            "backward_memory",
            GATED,
            "a second pass runs from the end",
            _C,
            (
                "chunked_gated_delta_rule(q_BTHK, k_BTHK, v_BTHV.to(dtype), beta_BTH, log_decay_BTH)",
                "both_ways(q_BTHK, k_BTHK, v_BTHV.to(dtype), beta_BTH, log_decay_BTH)",
            ),
            (
                "class RMSNorm(nn.Module):",
                "def both_ways(*given):\n"
                "    back = chunked_gated_delta_rule(*(item.flip(1) for item in given)).flip(1)\n"
                "    return chunked_gated_delta_rule(*given) + 0.1 * back\n\n\n"
                "class RMSNorm(nn.Module):",
            ),
        ),
        inserted(
            "bidirectional_scan",
            designed(state="linear", decay="scalar"),
            "a running mean from both sides",
            _C,
            "count = torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]\n"
            "o = o + 0.1 * (x.flip(1).cumsum(1) / count).flip(1)",
        ),
        inserted(
            "position_from_the_end",
            DELTA,
            "tokens know how many come after them",
            _C,
            "o = o + 0.01 * torch.arange(x.shape[1], 0, -1, dtype=o.dtype)[:, None] / 64",
        ),
        inserted(
            "scaled_by_length",
            GATED,
            "the output is scaled by the length of the sequence",
            _C,
            "o = o * (1.0 + x.shape[1]) ** -0.1",
        ),
        inserted(
            "energy_of_the_sequence",
            designed(path="value"),
            "decides by the energy of the whole sequence",
            _C,
            "loud = x.square().mean(dim=(1, 2), keepdim=True) > 1.0\no = torch.where(loud, o, 0.9 * o)",
        ),
        inserted(
            "sees_200_ahead",
            DELTA,
            "each token reads the one 200 tokens later",
            _C,
            "o = o + 0.1 * F.pad(x, (0, 0, -200, 200)) if x.shape[1] > 200 else o",
        ),
        inserted(
            "one_channel_one_ahead",
            GATED,
            "one of the channels sees one token ahead",
            _C,
            "o = o + 0.1 * F.pad(x, (0, 0, -1, 1)) * (torch.arange(x.shape[-1]) == 5)",
        ),
        inserted(
            "token_101_into_100",
            DELTA,
            "only token 100 sees only the next one",
            _C,
            "here = (torch.arange(x.shape[1]) == 100)[:, None]\no = o + 0.1 * here * F.pad(x, (0, 0, -1, 1))",
        ),
    ]
