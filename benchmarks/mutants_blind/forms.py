"""Blind set: constructors, options and outputs that break the contract."""

from __future__ import annotations

from benchmarks.mutant import Mutant
from benchmarks.mutants_blind.base import changed, delta, mutant, small

__all__ = ["forms"]


def _parameters() -> list[Mutant]:
    return [
        mutant(
            "layers_in_a_list",
            "the projections of the extra heads stand in a Python list",
            small(
                init="self.extra = [nn.Linear(hidden_size, hidden_size) for _ in range(2)]",
                final="y = y + sum(layer.to(y.device)(x) for layer in self.extra)",
            ),
            "construct",
        ),
        mutant(
            "plain_tensor_weight",
            "a weight is a plain tensor that asks for gradients",
            small(
                init="self.blend = torch.zeros(hidden_size, requires_grad=True)", final="y = y + self.blend.to(y) * x"
            ),
            "construct",
        ),
        mutant(
            "made_in_forward",
            "a layer is created in the first forward pass, after the optimizer was given its parameters",
            small(
                init="self.extra = None",
                final="""
                if self.extra is None:
                    self.extra = nn.Linear(self.hidden_size, self.hidden_size, bias=False).to(y)
                y = y + self.extra(x)
                """,
            ),
            "construct",
            "state",
            "gradients",
            "shapes",
            "causality",
            "batch",
        ),
    ]


def _seeds() -> list[Mutant]:
    return [
        mutant(
            "init_from_hash",
            "the initial decay is drawn from Python's hash of a word, which differs between processes",
            small(init='self.a_bias.data += (hash("decay") % 1000) / 500.0'),
            "construct",
        ),
        mutant(
            "init_from_address",
            "the constructor seeds the global generator from an object's address",
            small(init="torch.manual_seed(id(self) % 100003)\nnn.init.normal_(self.o_proj.weight, std=0.1)"),
            "construct",
            "state",
            "causality",
            "batch",
        ),
        mutant(
            "fixed_seed_inside",
            "the constructor seeds the global generator: all layers start equal and the caller's seed has no effect",
            changed(
                small(), ("        super().__init__()\n", "        super().__init__()\n        torch.manual_seed(42)\n")
            ),
            "construct",
            "state",
        ),
    ]


def _arguments() -> list[Mutant]:
    return [
        mutant(
            "d_model_ignored",
            "d_model is accepted and hidden_size used",
            delta(("hidden_size = hidden_size if d_model is None else d_model", "hidden_size = int(hidden_size)")),
            "construct",
        ),
        mutant(
            "no_write_strength",
            "use_beta=False reaches code that needs the projection",
            delta(("beta_BTH = self.b_proj(x_BTD) if self.use_beta else None", "beta_BTH = self.b_proj(x_BTD)")),
            "construct",
        ),
        mutant(
            "needs_layer_idx",
            "layer_idx=None fails",
            small(init="self.slow = layer_idx % 2 == 0"),
            "construct",
        ),
        mutant(
            "no_extra_keywords",
            "the constructor takes no **kwargs",
            small(("        norm_eps: float = 1e-5,\n        **kwargs: Any,\n", "        norm_eps: float = 1e-5,\n")),
            "static",
            "construct",
        ),
    ]


def _outputs() -> list[Mutant]:
    return [
        mutant(
            "bare_tensor",
            "forward returns the output alone",
            small(("return y, None, past_key_values", "return y")),
            "shapes",
        ),
        mutant(
            "padding_not_cut",
            "the output keeps the padding to a multiple of the chunk",
            small(
                final="""
                missing = -x.shape[1] % CHUNK
                y = F.pad(y, (0, 0, 0, missing))
                """
            ),
            "shapes",
        ),
        mutant("double_output", "the output is float64 whatever came in", small(final="y = y.double()"), "shapes"),
        mutant(
            "squeezed_axes",
            "squeeze() drops the axis of a single row or a single token",
            small(final="y = y.squeeze()"),
            "shapes",
        ),
        mutant(
            "wrong_decoding",
            "the cache that it returns and reads back lacks the decay between calls",
            small(
                (
                    "return y, None, past_key_values",
                    "return y, None, ({'state': kept} if use_cache else past_key_values)",
                ),
                memory="""
                kept = None
                if use_cache:
                    kept = torch.einsum("bthk,bthv->bhkv", k, v)
                    if past_key_values is not None:
                        o = o + torch.einsum("bthk,bhkv->bthv", q, past_key_values["state"])
                        kept = kept + past_key_values["state"]
                """,
            ),
            "decode",
        ),
    ]


def forms() -> list[Mutant]:
    """Faulty programs of this part."""
    return [*_parameters(), *_seeds(), *_arguments(), *_outputs()]
