"""Mutants of form: signature, construction, shapes, dtypes, finiteness, behaviour at other lengths."""

from __future__ import annotations

from benchmarks.mutant import Mutant
from benchmarks.mutants.bases import DELTA, GATED, designed, edited, inserted, written

__all__ = ["mutants"]

_S = "shapes"
_RETURNED = "return o, None, past_key_values"


def mutants() -> list[Mutant]:
    """All of them."""
    return [*_static(), *_construction(), *_returned(), *_finite(), *_lengths()]


def _static() -> list[Mutant]:
    return [
        written("no_python", DELTA + "\n    return (\n", "does not parse", "static"),
        edited(
            "other_class_name",
            GATED,
            "the class has another name",
            "static",
            ("class DeltaNet(nn.Module)", "class Mixer(nn.Module)"),
        ),
        edited(
            "forward_without_kwargs",
            DELTA,
            "forward takes no **kwargs",
            "static",
            (
                "        output_attentions: bool = False,\n        **kwargs: Any,\n",
                "        output_attentions: bool = False,\n",
            ),
        ),
        edited(
            "renamed_input",
            DELTA,
            "forward's input has another name",
            "static construct shapes",
            ("        hidden_states: Tensor,\n", "        x: Tensor,\n"),
            ("x_BTD = hidden_states\n", "x_BTD = x\n"),
        ),
        edited(
            "init_without_kwargs",
            designed(gate="head"),
            "__init__ takes no **kwargs",
            "static construct",
            ("        norm_eps: float = 1e-5,\n        **kwargs: Any,\n", "        norm_eps: float = 1e-5,\n"),
        ),
        edited(
            "imports_numpy",
            DELTA,
            "imports numpy",
            "static",
            ("import torch\nfrom einops", "import numpy\nimport torch\nfrom einops"),
        ),
        edited(
            "imports_os_inside",
            GATED,
            "imports os inside a function",
            "static",
            (
                "        self.layer_idx = layer_idx\n",
                "        self.layer_idx = layer_idx\n        import os\n        self.cores = os.cpu_count()\n",
            ),
        ),
        edited(
            "no_module",
            DELTA,
            "the class is no nn.Module",
            "static construct",
            ("class DeltaNet(nn.Module)", "class DeltaNet"),
        ),
        written(
            "deleted_class",
            GATED + "\n\ndel DeltaNet\n",
            "the class is deleted at the end of the module",
            "static construct sandbox",
        ),
    ]


def _construction() -> list[Mutant]:
    width = "hidden_size = hidden_size if d_model is None else d_model"
    return [
        edited(
            "ignores_d_model", DELTA, "d_model has no effect", "construct shapes", (width, "hidden_size = hidden_size")
        ),
        edited("needs_d_model", GATED, "only d_model is read", "construct", (width, "hidden_size = d_model")),
        inserted(
            "needs_layer_idx",
            DELTA,
            "cannot be built without a layer_idx",
            "construct",
            "",
            init="self.depth = 1.0 / (1 + layer_idx)",
        ),
        inserted(
            "four_heads_only",
            GATED,
            "fails with eight heads",
            "construct shapes",
            "o = o * self.gains[: self.num_heads].sum()",
            init="self.gains = nn.Parameter(torch.ones(4))\nassert num_heads <= 4",
        ),
        edited(
            "wide_values_break",
            DELTA,
            "builds with expand_v=2 and then fails",
            "construct shapes",
            (
                "self.o_proj = nn.Linear(value_dim, hidden_size, bias=False)",
                "self.o_proj = nn.Linear(key_dim, hidden_size, bias=False)",
            ),
        ),
        edited(
            "key_width_breaks",
            DELTA,
            "builds with expand_k other than 1 and then fails",
            "construct shapes",
            ("s=2, h=self.num_heads)", "s=2, h=self.num_heads, k=self.hidden_size // self.num_heads)"),
        ),
        inserted(
            "layers_in_a_list",
            GATED,
            "layers in a plain list are no registered parameters",
            "construct gradients",
            "o = o + self.extra[0](x)",
            init="self.extra = [nn.Linear(hidden_size, hidden_size)]",
        ),
        inserted(
            "plain_tensor_weight",
            DELTA,
            "a weight is a plain tensor that wants gradients",
            "construct gradients",
            "o = o * self.gain.to(o.dtype)",
            init="self.gain = torch.ones(hidden_size, requires_grad=True)",
        ),
        inserted(
            "weights_in_a_closure",
            GATED,
            "a layer hides in a function's closure",
            "construct gradients",
            "o = o + self.extra(x)",
            init="layer = nn.Linear(hidden_size, hidden_size)\nself.extra = lambda x: layer.to(x.dtype)(x)",
        ),
        inserted(
            "weights_of_the_module",
            DELTA,
            "a weight is a global tensor shared by all instances",
            "construct gradients state",
            "o = o + x @ WEIGHTS[x.shape[-1]].to(x.dtype)",
            init="WEIGHTS.setdefault(hidden_size, torch.randn(hidden_size, hidden_size, requires_grad=True))",
            top="WEIGHTS = {}",
        ),
        inserted(
            "built_in_forward",
            GATED,
            "a layer is built anew in each call",
            "construct gradients state batch causality",
            "o = o + nn.Linear(x.shape[-1], x.shape[-1]).to(x.dtype)(x)",
        ),
        inserted(
            "built_at_first_call",
            DELTA,
            "a layer is built at the first call, after the optimizer",
            "construct gradients state",
            "if self.extra is None:\n    self.extra = nn.Linear(x.shape[-1], x.shape[-1]).to(x.dtype)\n"
            "o = o + self.extra(x)",
            init="self.extra = None",
        ),
        inserted(
            "counts_instances",
            DELTA,
            "the third instance of the process is built otherwise",
            "construct state",
            "",
            init="MADE.append(1)\nnn.init.constant_(self.o_proj.weight, 0.01 * len(MADE))",
            top="MADE = []",
        ),
    ]


def _returned() -> list[Mutant]:
    found = [
        ("only_the_output", "return o", "returns the tensor alone"),
        ("two_values", "return o, past_key_values", "returns two values"),
        ("a_list", "return [o, None, past_key_values]", "returns a list"),
        ("a_dict", "return {'hidden_states': o}", "returns a dict"),
        ("auxiliary_of_the_batch", "return o, o.mean((1, 2)), past_key_values", "its auxiliary value is no scalar"),
        ("too_narrow", "return o[..., 1:], None, past_key_values", "one channel is missing"),
        ("too_short", "return o[:, 1:], None, past_key_values", "the first token is missing"),
        ("padded", "return F.pad(o, (0, 0, 0, -o.shape[1] % 32)), None, past_key_values", "padding is not cut off"),
        ("squeezed", "return o.squeeze(0), None, past_key_values", "a batch of one loses its dimension"),
        ("transposed", "return o.transpose(1, 2), None, past_key_values", "[B, D, T]"),
        ("as_float64", "return o.double(), None, past_key_values", "the output is float64 whatever comes in"),
        ("nothing", "return None, None, past_key_values", "returns no output"),
        (
            "non_empty_tokens",
            "return o[:, : int((x[0, :, 0] > -2.5).sum())], None, past_key_values",
            "as long as the data says",
        ),
    ]
    bases = (DELTA, GATED, designed(state="linear", decay="scalar"))
    return [
        edited(f"returns_{name}", bases[index % 3], fault, "shapes static construct", (_RETURNED, new), lines="pass")
        for index, (name, new, fault) in enumerate(found)
    ]


def _finite() -> list[Mutant]:
    bad = "o = torch.where(torch.arange(x.shape[1])[:, None] == {}, float('nan'), o)"
    return [
        inserted(
            "nan_at_odd_lengths",
            DELTA,
            "NaN at odd lengths over 20",
            _S,
            f"if x.shape[1] % 2 and x.shape[1] > 20:\n    {bad.format(7)}",
        ),
        inserted("nan_at_one_token", GATED, "NaN for a single token", _S, "o = o / float(x.shape[1] > 1)"),
        inserted(
            "infinite_at_chunk_multiples",
            DELTA,
            "infinite at multiples of 64",
            _S,
            "o = o / float(x.shape[1] % 64 > 0)",
        ),
        inserted("nan_for_three_rows", GATED, "NaN for three rows", "shapes batch", "o = o / float(x.shape[0] != 3)"),
        inserted(
            "nan_in_training",
            DELTA,
            "NaN in train mode",
            "shapes gradients cost learns",
            f"if self.training:\n    {bad.format(0)}",
        ),
        inserted(
            "nan_for_zeros",
            designed(norm="l2"),
            "NaN where inputs are zero, as padding is",
            "shapes gradients learns state causality",
            "o = o + x / x.norm(dim=-1, keepdim=True)",
        ),
        inserted(
            "overflow_of_large_inputs",
            GATED,
            "exp of the input overflows for inputs of 100",
            "shapes batch causality",
            "o = o + (x * 10).exp() * 1e-9",
        ),
        inserted(
            "raises_in_training",
            DELTA,
            "cannot run in train mode",
            "shapes gradients cost learns",
            "if self.training:\n    o = o + x[:, :, : -1]",
        ),
        inserted(
            "raises_in_eval", GATED, "cannot run in eval mode", _S, "if not self.training:\n    o = o + x[:, :, : -1]"
        ),
        inserted(
            "half_precision_inside",
            DELTA,
            "multiplies float16 by the parameter's dtype: runs in neither dtype",
            _S,
            "o = o + x.half() @ self.o_proj.weight.double()",
        ),
    ]


def _lengths() -> list[Mutant]:
    long = "length shapes causality cost"
    return [
        edited(
            "chunk_multiples_only",
            DELTA,
            "only runs at multiples of the chunk",
            _S,
            ("[:, :length]", "[:, :length].reshape(batch, length // CHUNK, CHUNK, heads, -1).flatten(1, 2)"),
        ),
        inserted(
            "table_of_512_positions",
            DELTA,
            "a table of 512 positions ends",
            long,
            "o = o + self.place(torch.arange(x.shape[1]))",
            init="self.place = nn.Embedding(512, hidden_size)",
        ),
        inserted(
            "raises_over_1000",
            GATED,
            "refuses lengths over 1000",
            long,
            "if x.shape[1] > 1000:\n    raise RuntimeError('too long')",
        ),
        inserted(
            "unstable_decay_quotient",
            DELTA,
            "running sums are divided by decays that underflow",
            long,
            "rate = torch.full((x.shape[1], 1), 0.25, dtype=o.dtype).cumsum(0)\n"
            "o = o + 0.1 * (x * rate.exp()).cumsum(1) * (-rate).exp()",
        ),
        inserted(
            "grows_exponentially",
            GATED,
            "grows by a percent a token",
            long + " learns",
            "o = o * 1.01 ** torch.arange(x.shape[1], dtype=o.dtype)[:, None]",
        ),
        edited(
            "unstable_write_strength",
            DELTA,
            "write strengths up to 4 make the memory explode",
            long + " learns gradients",
            ("beta_BTH.to(dtype).sigmoid()", "beta_BTH.to(dtype).sigmoid() * 6.0"),
            ('if kwargs.get("use_output_norm", True) else', "if False else"),
        ),
        inserted(
            "grows_quadratically",
            designed(state="linear"),
            "two running sums of magnitudes",
            long + " learns",
            "o = o + 0.01 * x.abs().cumsum(1).cumsum(1)",
        ),
        inserted(
            "nan_over_700", GATED, "NaN at lengths over 700", long, "if x.shape[1] > 700:\n    o = o * float('nan')"
        ),
        inserted(
            "jumps_over_600",
            DELTA,
            "a thousand times larger after token 600",
            long,
            "o = torch.where(torch.arange(x.shape[1])[:, None] > 600, 1000 * o, o)",
        ),
    ]
