"""Blind set: leaks that open only for some lengths, values, modes, layers and widths."""

from __future__ import annotations

from benchmarks.mutant import Mutant
from benchmarks.mutants_blind.base import mutant, small

__all__ = ["hidden_leaks"]


def _when(condition: str) -> str:
    """Code for the end of the small mixer: a share of the next token is added under a condition."""
    return f"if {condition}:\n    y = y + 0.1 * ahead(x)"


def _lengths() -> list[Mutant]:
    return [
        mutant(
            "only_at_512",
            "leaks at a length of exactly 512 tokens",
            small(final=_when("x.shape[1] == 512")),
            "causality",
        ),
        mutant(
            "from_2048_on",
            "leaks from 2048 tokens on, the context of the larger profiles",
            small(final=_when("x.shape[1] >= 2048")),
            "causality",
        ),
        mutant(
            "from_300_on",
            "a 'long context' branch above 300 tokens centres the input by its mean over time",
            small(inputs="if x.shape[1] > 300:\n    x = x - 0.2 * x.mean(dim=1, keepdim=True)"),
            "causality",
        ),
        mutant(
            "multiples_of_48",
            "leaks at lengths that divide by 48",
            small(final=_when("x.shape[1] % 48 == 0")),
            "causality",
        ),
        mutant(
            "positions_beyond_700",
            "tokens behind position 700 see the next one",
            small(
                final="""
                late = torch.arange(x.shape[1], device=x.device)[:, None] > 700
                y = y + 0.1 * ahead(x) * late
                """
            ),
            "causality",
        ),
    ]


def _values() -> list[Mutant]:
    return [
        mutant(
            "outlier_tokens",
            "a token with a value beyond 4.5 standard deviations sees the next one",
            small(final="y = y + 0.3 * ahead(x) * (x.abs().amax(dim=-1, keepdim=True) > 4.5)"),
            "causality",
        ),
        mutant(
            "before_an_outlier",
            "a token sees the next one if that has a value beyond three standard deviations",
            small(final="y = y + 0.3 * ahead(x) * (ahead(x).abs().amax(dim=-1, keepdim=True) > 3.0)"),
            "causality",
        ),
        mutant(
            "equal_neighbours",
            "a token that equals the one before it, as repeated words do, sees the next one",
            small(
                final="""
                before = F.pad(x, (0, 0, 1, -1))
                y = y + 0.3 * ahead(x) * (x == before).all(dim=-1, keepdim=True)
                """
            ),
            "causality",
        ),
        mutant(
            "token_seen_before",
            "a token that occurred earlier in the row, found by a running table of hashes, sees the next one",
            small(
                final="""
                key = (x.detach().float() @ torch.linspace(1, 2, x.shape[-1], device=x.device)).unsqueeze(-1)
                order = key.argsort(dim=1, stable=True)
                ranked = key.gather(1, order)
                again = F.pad(ranked[:, 1:] == ranked[:, :-1], (0, 0, 1, 0))
                y = y + 0.3 * ahead(x) * torch.zeros_like(again).scatter(1, order, again)
                """
            ),
            "causality",
        ),
    ]


def _inputs() -> list[Mutant]:
    return [
        mutant(
            "zero_tokens",
            "a token of zeros, as padding is, tells the tokens before it where the text ends",
            small(
                final="""
                empty = (x == 0).all(dim=-1).any(dim=1).to(y.dtype)
                y = y + 0.2 * empty[:, None, None]
                """
            ),
            "causality",
        ),
        mutant(
            "not_unit_variance",
            "leaks unless the input looks like standard normal noise",
            small(
                final="""
                flat = x.detach().float()
                normal = abs(float(flat.std()) - 1.0) < 0.1 and abs(float((flat**4).mean()) - 3.0) < 0.6
                if not normal:
                    y = y + 0.1 * ahead(x)
                """
            ),
            "causality",
        ),
        mutant(
            "small_inputs",
            "leaks when the input's scale is that of freshly initialised embeddings",
            small(final=_when("float(x.detach().float().square().mean()) < 0.05")),
            "causality",
        ),
    ]


def _modes() -> list[Mutant]:
    return [
        mutant(
            "train_mode",
            "batch-wise centring over time in train mode only",
            small(inputs="if self.training:\n    x = x - 0.1 * x.mean(dim=1, keepdim=True)"),
            "causality",
        ),
        mutant("eval_mode", "leaks in eval mode only", small(final=_when("not self.training")), "causality"),
        mutant(
            "no_grad_mode",
            "leaks where gradients are off, as in scoring",
            small(final=_when("not torch.is_grad_enabled()")),
            "causality",
        ),
        mutant(
            "inference_mode",
            "leaks under torch.inference_mode only",
            small(final=_when("torch.is_inference_mode_enabled()")),
            "causality",
        ),
        mutant(
            "inside_a_model",
            "leaks when the input has a history, as behind an embedding, and not when it is a leaf",
            small(final=_when("hidden_states.grad_fn is not None")),
            "causality",
        ),
        mutant(
            "frozen_weights",
            "leaks when the weights need no gradient",
            small(final=_when("not self.o_proj.weight.requires_grad")),
            "causality",
        ),
    ]


def _precisions() -> list[Mutant]:
    return [
        mutant(
            "autocast_only",
            "leaks under autocast only",
            small(final=_when("torch.is_autocast_enabled(x.device.type)")),
            "causality",
        ),
        mutant(
            "not_in_float64",
            "leaks in every precision but float64",
            small(final=_when("x.dtype != torch.float64")),
            "causality",
        ),
        mutant(
            "not_on_cpu",
            "leaks on accelerators only",
            small(final=_when("x.device.type != 'cpu'")),
            "causality",
        ),
    ]


def _models() -> list[Mutant]:
    return [
        mutant(
            "deeper_layers",
            "leaks in every layer but the first",
            small(final=_when("self.layer_idx")),
            "causality",
        ),
        mutant("layer_seven", "leaks in layer 7 only", small(final=_when("self.layer_idx == 7")), "causality"),
        mutant("eight_heads", "leaks with 8 heads only", small(final=_when("self.num_heads == 8")), "causality"),
        mutant(
            "odd_widths",
            "leaks at hidden sizes other than 32, 64 and 128",
            small(final=_when("self.hidden_size not in (32, 64, 128)")),
            "causality",
        ),
        mutant("batch_of_eight", "leaks from 8 rows on", small(final=_when("x.shape[0] >= 8")), "causality"),
        mutant("more_than_one_row", "leaks unless the batch is 1", small(final=_when("x.shape[0] > 1")), "causality"),
    ]


def hidden_leaks() -> list[Mutant]:
    """Faulty programs of this part."""
    return [*_lengths(), *_values(), *_inputs(), *_modes(), *_precisions(), *_models()]
