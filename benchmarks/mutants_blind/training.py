"""Blind set: gradients that are missing or wrong, programs that do not learn, outputs that grow with length."""

from __future__ import annotations

from benchmarks.mutant import Mutant
from benchmarks.mutants_blind.base import delta, designed, gated, mutant, small
from pipeline.designer import Genome

__all__ = ["training_faults"]

_NO_NORM = ("        o = F.rms_norm(o, (self.head_v_dim,), self.o_norm.to(dtype), self.norm_eps)\n", "")


def _missing_gradients() -> list[Mutant]:
    return [
        mutant(
            "large_unused_table",
            "most of the parameters are a table that no forward pass reads",
            small(init="self.table = nn.Parameter(torch.randn(256, 4 * hidden_size) * 0.02)"),
            "gradients",
        ),
        mutant(
            "projections_without_gradient",
            "queries, keys and values are computed under no_grad 'to save memory'",
            small(
                (
                    "        qkv = self.qkv_proj(x)\n        if self",
                    "        with torch.no_grad():\n            qkv = self.qkv_proj(x)\n        if self",
                ),
            ),
            "gradients",
        ),
        mutant(
            "frozen_everything",
            "all parameters are registered and none asks for a gradient",
            small(init="self.requires_grad_(False)"),
            "gradients",
            "construct",
            "learns",
        ),
        mutant(
            "ignores_its_input",
            "the output is a learnt bias; everything else is multiplied by zero",
            small(
                init="self.constant = nn.Parameter(torch.randn(hidden_size))",
                final="y = self.constant.to(y.dtype).expand_as(y) + 0.0 * y",
            ),
            "gradients",
            "learns",
        ),
    ]


def _wrong_gradients() -> list[Mutant]:
    return [
        mutant(
            "ascends",
            "an autograd Function turns the gradient's sign: training climbs",
            small(
                top="""
                class Turn(torch.autograd.Function):
                    @staticmethod
                    def forward(ctx, y):
                        return y.clone()

                    @staticmethod
                    def backward(ctx, grad):
                        return -grad
                """,
                final="y = Turn.apply(y)",
            ),
            "learns",
            "gradients",
        ),
        mutant(
            "huge_gradients",
            "a hook multiplies the gradient by 1e39, which overflows float32",
            small(final="if y.requires_grad:\n    y.register_hook(lambda grad: grad * 1e39)"),
            "gradients",
            "learns",
        ),
        mutant(
            "nan_at_zero",
            "keys are divided by their norm without epsilon: padding zeros give NaN",
            delta(
                (
                    "torch.rsqrt(x.square().sum(dim=-1, keepdim=True) + 1e-6)",
                    "torch.rsqrt(x.square().sum(dim=-1, keepdim=True))",
                )
            ),
            "gradients",
            "shapes",
        ),
        mutant(
            "square_root_at_zero",
            "the forward value is fine for equal tokens, but the gradient of a distance of zero is NaN",
            small(
                inputs="""
                moved = x - F.pad(x, (0, 0, 1, -1))
                x = x + 0.1 * moved.square().sum(dim=-1, keepdim=True).sqrt()
                """
            ),
            "gradients",
        ),
    ]


def _dead() -> list[Mutant]:
    return [
        mutant(
            "two_zero_factors",
            "output weights and an output gain both start at zero: all gradients are zero for ever",
            small(
                init="self.gain = nn.Parameter(torch.zeros(hidden_size))\nnn.init.zeros_(self.o_proj.weight)",
                final="y = y * self.gain.to(y.dtype)",
            ),
            "gradients",
            "learns",
        ),
        mutant(
            "one_bit_output",
            "the output is rounded to its sign and no gradient passes",
            small(final="y = y + (y.sign() - y).detach() - (y - y.detach())"),
            "gradients",
            "learns",
        ),
        mutant(
            "saturated_gate",
            "the output passes a sigmoid of weights at minus forty: zero for all purposes, gradients included",
            small(
                init="self.opening = nn.Parameter(torch.full((hidden_size,), -40.0))",
                final="y = y * torch.sigmoid(self.opening).to(y.dtype)",
            ),
            "learns",
            "gradients",
        ),
    ]


def _memoryless() -> list[Mutant]:
    return [
        mutant(
            "no_mixing",
            "a token never sees another: a gated layer in the place of a mixer",
            designed(
                Genome(state="linear", conv="short"),
                ("o = remember(q, w, v)", "o = v * (q * w).sum(dim=-1, keepdim=True)"),
                (
                    "qkv = short_conv(qkv, self.conv_taps.to(qkv.dtype))",
                    "qkv = qkv * self.conv_taps[:, -1].to(qkv.dtype)",
                ),
            ),
            "learns",
        ),
        mutant(
            "forgets_at_once",
            "the decay is so strong that nothing lasts beyond the next token, and there is no convolution",
            small(qkv="log_a = 0.0 * log_a - 12.0", inputs="self.use_short_conv = False"),
            "learns",
            "gradients",
        ),
    ]


def _growth() -> list[Mutant]:
    return [
        mutant(
            "plain_sum",
            "an additive memory without decay or output norm grows with the length",
            small(
                _NO_NORM,
                memory="o = o * self.o_norm.to(dtype)",
                qkv="k = F.relu(k) + 0.2\nq = F.relu(q) + 0.2\nv = v + 0.5\nlog_a = 0.0 * log_a",
            ),
            "length",
        ),
        mutant(
            "times_position",
            "the output is multiplied by its position",
            small(final="y = y * torch.arange(1, x.shape[1] + 1, device=x.device, dtype=y.dtype)[:, None]"),
            "length",
            "learns",
        ),
        mutant(
            "slow_explosion",
            "a gain grows by half a percent a token: outputs double about every 140 tokens",
            small(
                _NO_NORM,
                memory="""
                o = o * self.o_norm.to(dtype)
                steps = torch.arange(x.shape[1], device=x.device, dtype=dtype)[:, None, None]
                o = o * (0.005 * steps).exp()
                """,
            ),
            "length",
            "learns",
        ),
        mutant(
            "decay_upside_down",
            "the decay's sign is wrong: the state grows instead of fading",
            gated(("log_decay_BTH = -self.A_log", "log_decay_BTH = 0.1 * self.A_log")),
            "length",
            "learns",
            "shapes",
            "gradients",
        ),
    ]


def _breaks_when_long() -> list[Mutant]:
    return [
        mutant(
            "global_exponents",
            "decays are split into exp(G) and exp(-G) over the whole sequence, which overflows on long ones",
            small(
                qkv="""
                log_a = log_a - 0.05
                total = log_a.cumsum(dim=1)
                k, log_a = k * (-total).exp()[..., None], 0.0 * log_a
                """,
                memory="o = o * total.exp()[..., None]",
            ),
            "length",
            "shapes",
            "gradients",
        ),
        mutant(
            "position_table_of_512",
            "learnt positions for 512 tokens: longer input fails",
            small(
                init="self.places = nn.Embedding(512, hidden_size)",
                inputs="x = x + 0.1 * self.places(torch.arange(x.shape[1], device=x.device)).to(x.dtype)",
            ),
            "length",
            "cost",
        ),
        mutant(
            "fails_ragged_beyond_256",
            "above 256 tokens only multiples of 32 are accepted",
            delta(
                inputs="""
                if x_BTD.shape[1] > 256 and x_BTD.shape[1] % CHUNK:
                    raise RuntimeError("length must be a multiple of 32")
                """
            ),
            "length",
            "shapes",
        ),
    ]


def training_faults() -> list[Mutant]:
    """Faulty programs of this part."""
    return [*_missing_gradients(), *_wrong_gradients(), *_dead(), *_memoryless(), *_growth(), *_breaks_when_long()]
