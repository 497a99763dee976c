"""Program text of every mechanism but the memory itself, as a `Piece` for each option of each slot."""

from __future__ import annotations

from pipeline.designer.grammar import Genome
from pipeline.designer.piece import Piece

__all__ = ["pieces"]

_EMPTY = Piece()

_CAUSAL_CONV = '''
def causal_conv(x_BTD: Tensor, taps_DW: Tensor) -> Tensor:
    """Depthwise convolution over the last W tokens; the last tap weighs the current token."""
    x_BDT = F.pad(rearrange(x_BTD, "b t d -> b d t"), (taps_DW.shape[1] - 1, 0))
    return rearrange(F.conv1d(x_BDT, taps_DW[:, None], groups=x_BDT.shape[1]), "b d t -> b t d")
'''
_SHORT_CONV = '''
def short_conv(x_BTD: Tensor, taps_DW: Tensor) -> Tensor:
    """Depthwise causal convolution with few taps as a sum of shifted copies; the last tap weighs the current token."""
    length, width = x_BTD.shape[1], taps_DW.shape[1]
    padded = F.pad(x_BTD, (0, 0, width - 1, 0))
    y_BTD = padded[:, :length] * taps_DW[:, 0]
    for lag in range(1, width):  # over taps
        y_BTD = torch.addcmul(y_BTD, padded[:, lag : lag + length], taps_DW[:, lag])
    return y_BTD
'''
_DILATED_CONV = '''
def spaced_conv(x_BTD: Tensor, taps_DW: Tensor, gap: int) -> Tensor:
    """Depthwise causal convolution whose taps lie `gap` tokens apart, as a sum of shifted copies."""
    length, width = x_BTD.shape[1], taps_DW.shape[1]
    padded = F.pad(x_BTD, (0, 0, gap * (width - 1), 0))
    y_BTD = padded[:, :length] * taps_DW[:, 0]
    for lag in range(1, width):  # over taps
        y_BTD = torch.addcmul(y_BTD, padded[:, gap * lag : gap * lag + length], taps_DW[:, lag])
    return y_BTD
'''
_WINDOW = '''
def window_attention(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor) -> Tensor:
    """Softmax attention over the last C tokens, by blocks that see themselves and the block before: linear in T."""
    length, heads = q_BTHK.shape[1:3]
    q_NACK, k_NACK, v_NACV = chunks(q_BTHK), chunks(k_BTHK), chunks(v_BTHV)
    k_two, v_two = (torch.cat([F.pad(t, (0, 0, 0, 0, 0, 0, 1, 0))[:-1], t], dim=2) for t in (k_NACK, v_NACV))
    row = torch.arange(CHUNK, device=q_NACK.device)[:, None] + CHUNK
    column = torch.arange(2 * CHUNK, device=q_NACK.device)
    block = torch.arange(q_NACK.shape[0], device=q_NACK.device)[:, None, None, None]
    seen = (column <= row) & (column > row - CHUNK) & (column + CHUNK * block >= CHUNK)
    weights = (q_NACK @ k_two.transpose(-1, -2)).masked_fill(~seen, -torch.inf).softmax(dim=-1)
    return rearrange(weights @ v_two, "n (b h) c d -> b (n c) h d", h=heads)[:, :length]
'''


def _taps(name: str, width: str, channels: str) -> str:
    """An __init__ line: filter taps drawn as a depthwise convolution layer draws them, uniform in +-1/sqrt(width)."""
    return f"self.{name} = nn.Parameter(torch.empty({channels}, {width}).uniform_(-1.0, 1.0) * {width}**-0.5)"


def _feature(option: str) -> Piece:
    if option == "quadratic":
        return Piece(
            init="half = (self.head_k_dim + 1) // 2\n"
            "self.square_map = nn.Parameter(torch.randn(self.head_k_dim, 2 * half) / math.sqrt(self.head_k_dim))\n"
            "self.feature_dim = self.head_k_dim + half",
            mix="left, right = (qk @ self.square_map.to(qk.dtype)).chunk(2, dim=-1)\n"
            "qk = torch.cat([qk, left * right], dim=-1)",
        )
    if option == "hedgehog":
        return Piece(
            init="start = torch.eye(self.head_k_dim) + 0.1 * torch.randn(self.head_k_dim, self.head_k_dim)\n"
            "self.feature_map = nn.Parameter(start)\nself.feature_dim = 2 * self.head_k_dim",
            mix="signed = qk @ self.feature_map.to(qk.dtype)\nsigned = torch.cat([signed, -signed], dim=-1)\n"
            "qk = (signed - signed.amax(dim=-1, keepdim=True).detach()).exp()",
        )
    line = {
        "silu": "qk = F.silu(qk)",
        "elu1": "qk = F.elu(qk) + 1.0",
        "relu": "qk = qk.relu()",
        "softplus": "qk = F.softplus(qk)",
    }[option]
    return Piece(mix=line)


def _norm(option: str) -> Piece:
    unit = "qk = qk * torch.rsqrt(qk.square().sum(dim=-1, keepdim=True) + 1e-6)"
    if option == "rms":
        return Piece(
            init="self.qk_gain = nn.Parameter(torch.rand(2, 1, self.feature_dim) + 0.5)",
            mix=f"{unit} * self.qk_gain.to(qk.dtype)",
        )
    line = {
        "l2": unit,
        "sum": "qk = qk / (qk.sum(dim=-1, keepdim=True) + 1e-6)",
        "soft": "qk = qk / (1.0 + torch.linalg.vector_norm(qk, dim=-1, keepdim=True))",
    }[option]
    return Piece(mix=line)


def _beta(genome: Genome) -> Piece:
    """Write strength [B, T, H or 2 H, 1 or K] and the write key w = strength * k."""
    two = genome.state == "product"
    heads = "2 * num_heads" if two else "num_heads"
    axis = "-2"
    use = (
        f"strength_extra, strength = strength.chunk(2, dim={axis})\nw, w_extra = strength * k, strength_extra * k_extra"
    )
    use = use if two else "w = strength * k"
    if genome.beta == "constant":
        if genome.state == "linear":
            return Piece(mix="w = k")
        rate = f"self.rate = nn.Parameter(torch.zeros({heads}, 1))"
        return Piece(init=rate, mix=f"strength = torch.sigmoid(self.rate.to(k.dtype))\n{use}")
    if genome.beta == "channel":
        return Piece(
            streams=(("beta", "rank"),),
            init=f"self.beta_up = nn.Linear(rank, {heads} * self.feature_dim, bias=False)",
            lift="beta = self.beta_up(beta)",
            mix=f'strength = torch.sigmoid(rearrange(beta, "b t (h d) -> b t h d", d=self.feature_dim))\n{use}',
        )
    strength = "torch.sigmoid(beta)[..., None]"
    factor = "2.0 * " if genome.beta == "negative" else ""
    return Piece(streams=(("beta", heads),), mix=f"strength = {factor}{strength}\n{use}")


def _decay(option: str) -> Piece:
    """log_decay [B, T, H, 1 or K], at most 0."""
    if option == "fixed":
        return Piece(
            init="keep = 1.0 - torch.linspace(math.log(1 / 32), math.log(1 / 512), num_heads).exp()\n"
            'self.register_buffer("head_log_decay", keep.log()[:, None], persistent=False)',
            mix="log_decay = self.head_log_decay.to(v.dtype).expand(*v.shape[:3], 1)",
        )
    if option == "scalar":
        return Piece(
            streams=(("decay", "num_heads"),),
            init="# Rates over (1, 16) and steps over (0.001, 0.1): heads begin with short and with long memories.\n"
            "self.A_log = nn.Parameter(torch.empty(num_heads).uniform_(1.0, 16.0).log())\n"
            "step = torch.empty(num_heads).uniform_(math.log(1e-3), math.log(1e-1)).exp()\n"
            "self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))",
            mix="log_decay = (-self.A_log.to(v.dtype).exp() * F.softplus(decay + self.dt_bias.to(v.dtype)))[..., None]",
        )
    up = "self.decay_up = nn.Linear(rank, num_heads * self.feature_dim, bias=False)\n"
    spread = "self.decay_bias = nn.Parameter(torch.linspace({}, {}, self.feature_dim).repeat(num_heads))"
    opened = "opened = torch.sigmoid(decay + self.decay_bias.to(v.dtype))"
    wide = 'rearrange(opened, "b t (h d) -> b t h d", d=self.feature_dim)'
    if option == "channel":
        return Piece(
            streams=(("decay", "rank"),),
            init=up + spread.format("-6.0", "-1.0"),
            lift="decay = self.decay_up(decay)",
            mix=f"{opened}\nlog_decay = -2.0 * {wide}  # in (-2, 0)",
        )
    return Piece(
        streams=(("decay", "rank"),),
        init="self.floor = 1.0 - 0.5 ** (1 + (layer_idx or 0))  # lower bound of the decay, rising with depth\n"
        + up
        + spread.format("0.0", "5.0"),
        lift="decay = self.decay_up(decay)",
        mix=f"{opened}\nopened = {wide}\nlog_decay = (self.floor + (1.0 - self.floor) * opened).log()",
    )


def _conv(option: str) -> Piece:
    channels = "qkv_dim"
    if option == "short":
        return Piece(
            (_SHORT_CONV,),
            init=_taps("conv_taps", "conv_size", channels),
            mix="qkv = short_conv(qkv, self.conv_taps.to(qkv.dtype))",
            sees="self.conv_taps.shape[1] - 1",
        )
    if option == "dilated":
        return Piece(
            (_DILATED_CONV,),
            init=f"{_taps('near_taps', 'conv_size', channels)}\n{_taps('far_taps', 'conv_size', channels)}",
            mix="near = spaced_conv(qkv, self.near_taps.to(qkv.dtype), 1)\n"
            "qkv = near + spaced_conv(qkv, self.far_taps.to(qkv.dtype), self.far_taps.shape[1])",
            sees="self.far_taps.shape[1] * (self.far_taps.shape[1] - 1)",
        )
    if option == "multiscale":
        sizes = ("3", "7", "15")
        return Piece(
            (_CAUSAL_CONV,),
            init="\n".join(_taps(f"taps_{size}", size, channels) for size in sizes),
            mix="# The three widths end at the current token, so they add up to one filter.\n"
            "taps = self.taps_15 + F.pad(self.taps_7, (8, 0)) + F.pad(self.taps_3, (12, 0))\n"
            "qkv = causal_conv(qkv, taps.to(qkv.dtype))",
            sees="14",
        )
    return _EMPTY


def _shift(option: str) -> Piece:
    static = "self.shift_mix = nn.Parameter(torch.linspace(0.0, 0.5, hidden_size))"
    previous = "previous = F.pad(x, (0, 0, 1, -1))"
    if option == "static":
        lerp = "x = torch.lerp(x, previous, self.shift_mix.to(x.dtype))"
        return Piece(init=static, shift=f"{previous}\n{lerp}", sees="1")
    if option == "dynamic":
        return Piece(
            init=f"{static}\nself.shift_down = nn.Linear(hidden_size, rank, bias=False)\n"
            "self.shift_up = nn.Linear(rank, hidden_size, bias=False)",
            shift="step_back = F.pad(x, (0, 0, 1, -1)) - x\n"
            "x = x + step_back * (self.shift_mix + self.shift_up(torch.tanh(self.shift_down(step_back)))).to(x.dtype)",
            sees="1",
        )
    return _EMPTY


def _path(option: str) -> Piece:
    flat = 'flat = rearrange(v, "b t h d -> b t (h d)")'
    heads = '"b t (h d) -> b t h d", h=self.num_heads)'
    if option == "fir":
        return Piece(
            (_CAUSAL_CONV,),
            (("route", "2 * num_heads"),),
            init=_taps("fir_taps", "7", "self.value_dim"),
            mix=f"{flat}\nlocal = rearrange(causal_conv(flat, self.fir_taps.to(v.dtype)), {heads}\n"
            'share = rearrange(route, "b t (s h) -> s b t h 1", s=2).softmax(dim=0)\n'
            "o = share[0] * o + share[1] * local",
            sees="6",
        )
    if option == "multifir":
        return Piece(
            (_CAUSAL_CONV,),
            (("route", "4 * num_heads"),),
            init=f"{_taps('near_fir', '3', 'self.value_dim')}\n{_taps('far_fir', '31', 'self.value_dim')}",
            mix=f"{flat}\nnear = rearrange(causal_conv(flat, self.near_fir.to(v.dtype)), {heads}\n"
            f"far = rearrange(causal_conv(flat, self.far_fir.to(v.dtype)), {heads}\n"
            'share = rearrange(route, "b t (s h) -> s b t h 1", s=4).softmax(dim=0)\n'
            "o = share[0] * o + share[1] * near + share[2] * far + share[3] * v",
            sees="30",
        )
    if option == "window":
        return Piece(
            (_WINDOW,),
            (("route", "num_heads"),),
            init="self.sharpness = nn.Parameter(torch.full((num_heads, 1), math.log(8.0)))",
            mix="local = window_attention(q * self.sharpness.to(q.dtype).exp(), k, v)\n"
            "o = torch.lerp(o, local, torch.sigmoid(route)[..., None])",
            sees=None,
        )
    if option == "value":
        return Piece((), (("route", "num_heads"),), mix="o = torch.lerp(o, v, torch.sigmoid(route)[..., None])")
    return _EMPTY


def _detail(option: str) -> Piece:
    if option == "skip":
        return Piece(
            init="self.skip = nn.Parameter(torch.full((num_heads, self.head_v_dim), 0.5))",
            mix="o = o + self.skip.to(v.dtype) * v",
        )
    if option == "feedback":
        return Piece(
            init="self.feedback = nn.Parameter(torch.full((num_heads, 1), 0.1))",
            mix="q = q - self.feedback.to(q.dtype) * k",
        )
    if option == "precondition":
        return Piece(
            init="self.ridge = nn.Parameter(torch.zeros(num_heads, 1))",
            mix="seen = torch.arange(1, k.shape[1] + 1, dtype=k.dtype, device=k.device)[:, None, None]\n"
            "energy = k.square().cumsum(dim=1) * (k.shape[-1] / seen)\n"
            "q = q / (F.softplus(self.ridge.to(q.dtype)) + energy)",
            sees=None,
        )
    if option == "coupled":
        return Piece(mix="w = -torch.expm1(log_decay) * w  # a channel is written as far as it is forgotten")
    return _EMPTY


def _out_norm(option: str) -> Piece:
    gain = "self.norm_gain = nn.Parameter(torch.ones(self.head_v_dim))"
    if option == "rms":
        return Piece(init=gain, mix="o = F.rms_norm(o, (self.head_v_dim,), self.norm_gain.to(o.dtype), self.norm_eps)")
    return Piece(
        init=f"{gain}\nself.norm_offset = nn.Parameter(torch.zeros(self.head_v_dim))",
        mix="gain, offset = self.norm_gain.to(o.dtype), self.norm_offset.to(o.dtype)\n"
        "o = F.layer_norm(o, (self.head_v_dim,), gain, offset, self.norm_eps)",
    )


def _gate(option: str) -> Piece:
    wide = 'rearrange(gate, "b t (h d) -> b t h d", h=self.num_heads)'
    if option == "silu":
        return Piece(streams=(("gate", "self.value_dim"),), mix=f"o = o * F.silu({wide})")
    if option == "sigmoid":
        return Piece(streams=(("gate", "self.value_dim"),), mix=f"o = o * torch.sigmoid({wide})")
    if option == "lowrank":
        return Piece(
            streams=(("gate", "rank"),),
            init="self.gate_up = nn.Linear(rank, self.value_dim, bias=False)",
            lift="gate = self.gate_up(gate)",
            mix=f"o = o * torch.sigmoid({wide})",
        )
    if option == "head":
        return Piece(streams=(("gate", "num_heads"),), mix="o = o * torch.sigmoid(gate)[..., None]")
    return _EMPTY


def _state(option: str) -> Piece:
    """Parameters that a state form needs; its lines of mix come from the kernel templates."""
    if option == "product":
        return Piece(init="self.extra_value = nn.Parameter(torch.ones(num_heads, self.head_v_dim))")
    if option == "two_timescale":
        return Piece(
            init="if self.head_v_dim % 2:\n"
            '    raise ValueError(f"the value width a head must be even for two timescales, got {self.head_v_dim}")\n'
            "self.quick = nn.Parameter(torch.linspace(-3.0, -1.0, num_heads)[:, None])"
        )
    return _EMPTY


def pieces(genome: Genome) -> dict[str, Piece]:
    """The piece of each slot."""
    return {
        "shift": _shift(genome.shift),
        "conv": _conv(genome.conv),
        "feature": _feature(genome.feature),
        "norm": _norm(genome.norm),
        "beta": _beta(genome),
        "decay": _decay(genome.decay) if genome.decay != "none" else _EMPTY,
        "state": _state(genome.state),
        "path": _path(genome.path),
        "detail": _detail(genome.detail),
        "out_norm": _out_norm(genome.out_norm),
        "gate": _gate(genome.gate),
    }
