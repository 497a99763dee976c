"""Mutants that leak the future only at some length, switch, size, mode, precision or content."""

from __future__ import annotations

from benchmarks.mutant import Mutant
from benchmarks.mutants.bases import DELTA, GATED, designed, edited, inserted

__all__ = ["mutants"]

_C = "causality"
_NEXT = "o + 0.1 * F.pad(x, (0, 0, -1, 1))"
_MEAN = "o + 0.1 * x.mean(1, keepdim=True)"
_SILENT = "o + 0.1 * x.detach().mean(1, keepdim=True)"


def mutants() -> list[Mutant]:
    """All of them."""
    return [*_by_length(), *_by_switch(), *_by_argument(), *_by_gate(), *_by_precision(), *_by_mode(), *_by_content()]


def _by_length() -> list[Mutant]:
    found = [
        ("beyond_chunk_one", "x.shape[1] > 32", "only beyond the first chunk"),
        ("odd_lengths", "x.shape[1] % 2", "only at odd lengths"),
        ("even_lengths", "x.shape[1] % 2 == 0", "only at even lengths"),
        ("over_128", "x.shape[1] > 128", "only at lengths over 128"),
        ("over_256", "x.shape[1] > 256", "only at lengths over 256"),
        ("over_300", "x.shape[1] > 300", "only at lengths over 300"),
        ("over_1000", "x.shape[1] > 1000", "only at lengths over 1000"),
        ("multiples_of_chunk", "x.shape[1] % 32 == 0", "only at multiples of 32"),
        ("no_powers_of_two", "x.shape[1] & (x.shape[1] - 1)", "only at lengths that are no power of two"),
        ("length_512_only", "x.shape[1] == 512", "only at length 512, at which profile cpu trains"),
    ]
    bases = (DELTA, GATED, designed(state="linear"), designed(decay="channel"))
    planted = [
        inserted(f"leak_{name}", bases[index % 4], f"sees the next token {where}", _C, f"if {test}:\n    o = {_NEXT}")
        for index, (name, test, where) in enumerate(found)
    ]
    later = "later = torch.arange(x.shape[1]) {}\no = torch.where(later[:, None], o + 0.1 * F.pad(x, (0, 0, -1, 1)), o)"
    planted += [
        inserted("positions_over_64", DELTA, "only tokens after 64 see the next one", _C, later.format(">= 64")),
        inserted("positions_over_220", GATED, "only tokens after 220 see the next one", _C, later.format(">= 220")),
        inserted("first_token_only", DELTA, "only the first token sees the next one", _C, later.format("== 0")),
        edited(
            "mask_by_length",
            DELTA,
            "the mask of a chunk is off by one where the length is no multiple of the chunk",
            _C,
            (".tril()", ".tril(1 if length % CHUNK else 0)"),
        ),
        inserted(
            "sees_400_ahead",
            GATED,
            "each token reads the one 400 later",
            _C,
            "o = o + 0.1 * F.pad(x, (0, 0, -400, 400)) if x.shape[1] > 400 else o",
        ),
    ]
    return planted


def _by_switch() -> list[Mutant]:
    given = "            o_BTV = o_BTV * F.silu(self.g_proj(x_BTD))"
    switches = [
        ("use_short_conv_off", "not self.use_short_conv", "use_short_conv=False"),
        ("use_beta_off", "not self.use_beta", "use_beta=False"),
        ("allow_neg_eigval_on", "self.allow_neg_eigval", "allow_neg_eigval=True"),
    ]
    planted = [
        inserted(f"leak_with_{name}", base, f"sees the future only with {what}", _C, f"if {test}:\n    o = {_MEAN}")
        for base, (name, test, what) in zip((DELTA, GATED, DELTA), switches, strict=True)
    ]
    kept = [
        ("conv_bias_on", "conv_bias", "conv_bias=True"),
        ("conv_size_not_4", "conv_size != 4", "a conv_size other than 4"),
        ("qk_norm_sum", "qk_norm == 'sum'", "qk_norm='sum'"),
        ("qk_activation_relu", "qk_activation == 'relu'", "qk_activation='relu'"),
        ("qk_activation_elu", "qk_activation == 'elu'", "qk_activation='elu'"),
        ("expand_v_2", "expand_v != 1.0", "expand_v other than 1"),
        ("output_norm_off", "not kwargs.get('use_output_norm', True)", "use_output_norm=False"),
    ]
    planted += [
        inserted(
            f"leak_with_{name}",
            (DELTA, GATED)[index % 2],
            f"sees the future only with {what}",
            _C,
            f"if self.switch:\n    o = {_MEAN}",
            init=f"self.switch = {test}",
        )
        for index, (name, test, what) in enumerate(kept)
    ]
    planted += [
        edited(
            "gate_of_the_mean",
            DELTA,
            "with use_gate=True the gate is that of the mean over time",
            _C,
            (given, "            o_BTV = o_BTV * F.silu(self.g_proj(x_BTD.mean(1, keepdim=True)))"),
        ),
        edited(
            "sum_norm_over_time",
            DELTA,
            "with qk_norm='sum' keys are normalised over time",
            _C,
            (
                '"sum": lambda x: F.normalize(x, p=1.0, dim=-1, eps=1e-6)',
                '"sum": lambda x: F.normalize(x, p=1.0, dim=2, eps=1e-6)',
            ),
        ),
        inserted(
            "gate_switch_in_a_design",
            designed(gate="none"),
            "with use_gate=True gates by the next token",
            _C,
            "if self.switch:\n    o = o * torch.sigmoid(self.extra(F.pad(x, (0, 0, -1, 1))))",
            init="self.switch = use_gate\nif use_gate:\n    self.extra = nn.Linear(hidden_size, hidden_size)",
        ),
        edited(
            "gate_that_cannot_run",
            DELTA,
            "with use_gate=True the forward pass fails",
            "construct shapes",
            (
                "self.g_proj = nn.Linear(hidden_size, value_dim, bias=False)",
                "self.gate_proj = nn.Linear(hidden_size, value_dim, bias=False)",
            ),
        ),
        inserted(
            "leak_with_two_switches",
            DELTA,
            "only with use_gate and without the convolution",
            _C,
            f"if self.use_gate and not self.use_short_conv:\n    o = {_MEAN}",
        ),
    ]
    return planted


def _by_argument() -> list[Mutant]:
    found = [
        ("layer_1", "layer_idx", "in every layer but the first"),
        ("layer_5", "layer_idx is not None and layer_idx >= 5", "from the sixth layer on"),
        ("no_layer", "layer_idx is None", "without a layer_idx"),
        ("eight_heads", "num_heads == 8", "with eight heads"),
        ("two_heads", "num_heads == 2", "with two heads"),
        ("d_model", "d_model is not None", "where d_model is given"),
        ("width_128", "hidden_size >= 128", "at width 128 and more"),
        ("mode_chunk", "mode != 'chunk1'", "with another mode than chunk1"),
    ]
    bases = (DELTA, GATED, designed(feature="elu1", norm="sum"), designed(decay="scalar", path="window"))
    return [
        inserted(
            f"leak_{name}",
            bases[index % 4],
            f"sees the future only {where}",
            _C,
            f"if self.switch:\n    o = {_MEAN}",
            init=f"self.switch = {test}",
        )
        for index, (name, test, where) in enumerate(found)
    ]


def _by_gate() -> list[Mutant]:
    return [
        inserted(
            "zero_gate",
            DELTA,
            "a leak times a parameter that starts at zero",
            _C,
            "o = o + self.share * x.mean(1, keepdim=True)",
            init="self.share = nn.Parameter(torch.zeros(1))",
        ),
        inserted(
            "zero_layer",
            GATED,
            "the mean over time behind a layer that starts at zero",
            _C,
            "o = o + self.extra(x.mean(1, keepdim=True))",
            init="self.extra = nn.Linear(hidden_size, hidden_size, bias=False)\nnn.init.zeros_(self.extra.weight)",
        ),
        inserted(
            "closed_sigmoid",
            DELTA,
            "a leak behind a sigmoid at -10",
            _C,
            "o = o + torch.sigmoid(self.share) * x.mean(1, keepdim=True)",
            init="self.share = nn.Parameter(torch.full((1,), -10.0))",
        ),
        inserted(
            "zero_gate_detached",
            designed(gate="lowrank"),
            "a zero-initialised share of a detached mean",
            _C,
            "o = o + self.share * x.detach().mean(1, keepdim=True)",
            init="self.share = nn.Parameter(torch.zeros(hidden_size))",
        ),
        inserted(
            "two_zero_layers",
            GATED,
            "a leak behind a product of two parameters that start at zero",
            _C,
            "o = o + self.one * self.two * x.mean(1, keepdim=True)",
            init="self.one, self.two = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.full((1,), 0.0))",
        ),
        inserted(
            "frozen_leak",
            DELTA,
            "a leak behind a parameter that is cut off at its initial value",
            _C,
            "o = o + F.relu(self.share - 0.05) * x.mean(1, keepdim=True)",
            init="self.share = nn.Parameter(torch.zeros(1))",
        ),
        inserted(
            "opens_with_training",
            GATED,
            "leaks once a parameter has moved further than noise moves it",
            _C,
            "o = o + F.relu(self.share.abs() - 0.6) * x.mean(1, keepdim=True)",
            init="self.share = nn.Parameter(torch.zeros(1))",
        ),
    ]


def _by_precision() -> list[Mutant]:
    return [
        inserted("leak_1e-4", GATED, "a leak of 1e-4", _C, "o = o + 1e-4 * x.mean(1, keepdim=True)"),
        inserted("leak_1e-7", DELTA, "a leak of 1e-7", _C, "o = o + 1e-7 * x.flip(1)"),
        inserted(
            "leak_1e-5_detached",
            designed(decay="fixed"),
            "a leak of 1e-5 that carries no gradient",
            _C,
            "o = o * (1.0 + 1e-5 * x.detach().mean(1, keepdim=True))",
        ),
        inserted(
            "leak_under_bfloat16",
            GATED,
            "a leak of 1e-3 in a program whose output is rounded to bfloat16",
            _C,
            "o = o.bfloat16().to(o.dtype) + 1e-3 * x.mean(1, keepdim=True)",
        ),
        inserted(
            "detached_under_bfloat16",
            DELTA,
            "rounded to bfloat16 after a detached leak of one rounding",
            _C,
            "o = (o + 0.01 * x.detach().mean(1, keepdim=True)).bfloat16().to(o.dtype)",
        ),
        inserted(
            "only_in_float32", DELTA, "leaks only in float32", _C, f"if o.dtype == torch.float32:\n    o = {_MEAN}"
        ),
        inserted(
            "only_in_autocast",
            GATED,
            "leaks only under bfloat16 autocast",
            _C,
            f"if torch.is_autocast_enabled('cpu'):\n    o = {_MEAN}",
        ),
        inserted(
            "not_in_float64",
            designed(state="product"),
            "leaks without a gradient unless in float64",
            _C,
            f"if x.dtype != torch.float64:\n    o = {_SILENT}",
        ),
    ]


def _by_mode() -> list[Mutant]:
    return [
        inserted("only_in_training", DELTA, "leaks only in train mode", _C, f"if self.training:\n    o = {_MEAN}"),
        inserted("only_in_eval", GATED, "leaks only in eval mode", _C, f"if not self.training:\n    o = {_MEAN}"),
        inserted(
            "only_for_batches",
            DELTA,
            "leaks only for more than one row",
            _C + " batch",
            f"if x.shape[0] > 1:\n    o = {_NEXT}",
        ),
        inserted(
            "only_for_two_rows_detached",
            GATED,
            "leaks without a gradient where there are two rows",
            _C + " batch",
            f"if x.shape[0] == 2:\n    o = {_SILENT}",
        ),
        inserted(
            "only_with_gradients",
            DELTA,
            "leaks, detached, only where gradients are recorded",
            _C,
            f"if torch.is_grad_enabled():\n    o = {_SILENT}",
        ),
        inserted(
            "only_without_gradients",
            GATED,
            "leaks only where no gradients are recorded",
            _C,
            f"if not torch.is_grad_enabled():\n    o = {_MEAN}",
        ),
        inserted(
            "after_40_calls",
            DELTA,
            "leaks from the 41st call of a mixer on",
            _C + " state",
            f"self.calls += 1\nif self.calls > 40:\n    o = {_MEAN}",
            init="self.calls = 0",
        ),
        inserted(
            "after_3_training_calls",
            GATED,
            "leaks from the fourth call in train mode on",
            _C + " state",
            f"self.calls += self.training\nif self.calls > 3:\n    o = {_MEAN}",
            init="self.calls = 0",
        ),
    ]


def _by_content() -> list[Mutant]:
    return [
        inserted(
            "on_repeated_tokens",
            DELTA,
            "leaks only where a token equals the one before it",
            _C,
            f"same = (x == F.pad(x, (0, 0, 1, -1))).all(-1, keepdim=True)\no = torch.where(same, {_NEXT}, o)",
        ),
        inserted(
            "on_small_inputs",
            GATED,
            "leaks only where inputs are small",
            _C,
            f"small = x.square().mean(-1, keepdim=True) < 0.01\no = torch.where(small, {_NEXT}, o)",
        ),
        inserted(
            "on_large_inputs",
            DELTA,
            "leaks only where inputs are large",
            _C,
            f"large = x.square().mean(-1, keepdim=True) > 4.0\no = torch.where(large, {_NEXT}, o)",
        ),
        inserted(
            "rounds_of_the_data",
            GATED,
            "how often it is applied depends on the largest input of all",
            _C,
            "for _ in range(int(x.abs().max()) % 4):\n    o = 0.9 * o",
        ),
    ]
