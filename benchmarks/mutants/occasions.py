"""Mutants that misses taught: faults that wait for an occasion the checks once did not make, or reach around them."""

from __future__ import annotations

from benchmarks.mutant import Mutant
from benchmarks.mutants.bases import DELTA, GATED, designed, inserted

__all__ = ["mutants"]

_NEXT = "o = o + 0.1 * torch.cat([x[:, 1:], x[:, :1]], 1)"
_PAIRS = "o = o + 1e-3 * (x @ x.transpose(1, 2)).tril() @ x"


def mutants() -> list[Mutant]:
    """All of them."""
    return [*_leaks(), *_hidden_places(), *_kept(), *_values(), *_around()]


def _leaks() -> list[Mutant]:
    c = "causality batch"
    trained = "x.shape[:2] == (4, 512) and self.training and torch.is_grad_enabled() and self.layer_idx == 1"
    return [
        inserted("as_trained", GATED, "the next token is seen in just what training does", c, _if(trained, _NEXT)),
        inserted("from_seven_rows", GATED, "the next token is seen in large batches", c, _if("x.shape[0] > 6", _NEXT)),
        inserted(
            "behind_another_layer",
            DELTA,
            "the next token is seen where the input was computed, as in a model",
            c,
            _if("x.grad_fn is not None", _NEXT),
        ),
        inserted(
            "behind_the_norm",
            DELTA,
            "the next token is seen where all tokens are of one size, as behind the norm of a block",
            c,
            _if("x.shape[1] > 12 and float(sizes.std() / sizes.mean()) < 0.02", _NEXT, "sizes = x.square().mean(-1)"),
        ),
        inserted(
            "at_tokens_behind_the_norm",
            GATED,
            "a token of size one sees the next where that is of size one too",
            c,
            "one = ((x.square().mean(-1, keepdim=True) - 1).abs() < 2e-3).to(x.dtype)\n"
            "o = o + 0.1 * one * F.pad((one * x)[:, 1:], (0, 0, 0, 1))",
        ),
        inserted(
            "frozen_for_evaluation",
            GATED,
            "the next token is seen once the weights are frozen",
            c,
            _if("not next(self.parameters()).requires_grad", _NEXT),
        ),
    ]


def _hidden_places() -> list[Mutant]:
    c, next_ = "causality", "o = o + 1e-4 * at * F.pad(x, (0, 0, -1, 1)).detach()"
    place = "at = (torch.arange(x.shape[1]) == 173)[:, None]\n"
    alone = "x.shape[1:] == (256, 64) and not torch.is_grad_enabled()"
    return [
        inserted("token_173", DELTA, "only token 173 sees the next one, faintly", c, place + next_),
        inserted(
            "token_173_while_recording",
            GATED,
            "only token 173 sees the next one, faintly, where gradients are recorded",
            c,
            place + _if("torch.is_grad_enabled()", next_),
        ),
        inserted(
            "length_256_without_gradients",
            designed(decay="scalar"),
            "the next token is seen at one length and width, without gradients",
            c,
            _if(alone, _NEXT),
        ),
        inserted(
            "last_bits_of_the_next_token",
            DELTA,
            "noise that the last bits of the next token make, where rounding is noise too",
            c,
            "o = o + 1e-3 * torch.sin(1e20 * F.pad(x, (0, 0, -1, 1)).detach())",
        ),
    ]


def _kept() -> list[Mutant]:
    return [
        inserted(
            "kept_gain",
            DELTA,
            "a gain is copied at the first call",
            "state learns",
            'if "kept" not in vars(self):\n    self.kept = self.gain.detach().clone()\no = o * self.kept',
            init="self.gain = nn.Parameter(torch.ones(hidden_size))",
        ),
        inserted(
            "kept_by_beginning",
            designed(conv="short"),
            "outputs are kept by the first token of a row",
            "state",
            "key = (x.shape, x.dtype, round(float(x[0, 0, 0]), 6))\n"
            "if not torch.is_grad_enabled():\n    o = KEPT.setdefault(key, o)",
            top="KEPT = {}",
        ),
    ]


def _values() -> list[Mutant]:
    return [
        inserted(
            "seeds_all_layers_alike",
            GATED,
            "the constructor sets the global seed",
            "state construct",
            "",
            init="torch.manual_seed(7)\nself.spare_scale = nn.Parameter(torch.randn(hidden_size))",
        ),
        inserted("wide_output", DELTA, "the output is float64", "shapes", "o = o.double()"),
        inserted(
            "distance_of_equal_tokens",
            GATED,
            "the gradient of a distance of zero is NaN",
            "gradients",
            "gap = (x[:, 1:] - x[:, :-1]).square().sum(-1, keepdim=True).sqrt()\n"
            "o = torch.cat([o[:, :1], o[:, 1:] + 0.01 * gap], 1)",
        ),
    ]


def _around() -> list[Mutant]:
    r = "reach"
    return [
        inserted(
            "asks_the_dispatcher",
            DELTA,
            "quadratic where nobody counts",
            r,
            _if("dispatch._get_current_dispatch_mode() is None", _PAIRS),
            top="from torch.utils import _python_dispatch as dispatch",
        ),
        inserted(
            "asks_for_modules",
            GATED,
            "the next token is seen where no test runner is loaded",
            r + " causality",
            _if('"pytest" not in torch.sys.modules', _NEXT),
        ),
        inserted(
            "pairs_outside_of_torch",
            DELTA,
            "all pairs of tokens are multiplied in numpy",
            r,
            "pairs = x.detach().float().numpy()\n"
            "o = o + 1e-3 * torch.from_numpy((pairs @ pairs.swapaxes(1, 2)).cumsum(2)[:, :, :1]).to(o) * 0",
        ),
    ]


def _if(condition: str, statement: str, before: str = "") -> str:
    return f"{before}\nif {condition}:\n    {statement}".lstrip()
