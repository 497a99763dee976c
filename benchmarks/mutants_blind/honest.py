"""Blind set: sound programs that look as if they saw the future, or as if they cost too much."""

from __future__ import annotations

from benchmarks.mutant import Mutant
from benchmarks.mutants_blind.base import delta, designed, honest_program, small
from pipeline.designer import Genome

__all__ = ["honest_over_time"]


def _turned_time() -> list[Mutant]:
    return [
        honest_program(
            "fft_long_filter_padded",
            "an FFT over the whole sequence, but padded to twice the length, so exactly causal up to rounding",
            small(
                init="self.taps = nn.Parameter(torch.randn(64, self.head_v_dim) * 0.02)",
                memory="""
                n, width = v.shape[1], self.taps.shape[0]
                taps = torch.fft.rfft(self.taps.to(dtype), n=n + width, dim=0)
                filtered = torch.fft.irfft(torch.fft.rfft(v, n=n + width, dim=1) * taps[:, None], n=n + width, dim=1)
                o = o + filtered[:, :n]
                """,
            ),
        ),
        honest_program(
            "flip_there_and_back",
            "time is reversed, filtered with padding behind, and reversed again: an ordinary causal filter",
            small(
                init="self.taps = nn.Parameter(torch.randn(hidden_size, 1, 3) * 0.1)",
                inputs="""
                turned = F.pad(x.flip(1).transpose(1, 2), (0, 2))
                x = x + F.conv1d(turned, self.taps.to(x.dtype), groups=x.shape[-1]).transpose(1, 2).flip(1)
                """,
            ),
        ),
        honest_program(
            "roll_then_blank",
            "torch.roll over time, but the wrapped token is overwritten with zeros",
            small(
                inputs="""
                moved = torch.roll(x, 1, dims=1)
                moved = torch.cat([torch.zeros_like(moved[:, :1]), moved[:, 1:]], dim=1)
                x = 0.7 * x + 0.3 * moved
                """
            ),
        ),
        honest_program(
            "cumulative_mean_norm",
            "normalises by statistics over time, running ones: the mean of the tokens so far",
            small(
                inputs="""
                seen = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=torch.float32)[:, None]
                power = x.float().square().mean(dim=-1, keepdim=True).cumsum(dim=1) / seen
                x = x * torch.rsqrt(power + 1e-5).to(x.dtype)
                """
            ),
        ),
    ]


def _grids() -> list[Mutant]:
    return [
        honest_program(
            "left_padded_chunks",
            "pads on the left, so the chunk grid moves with the length; the empty tokens write nothing",
            delta(
                ("(0, 0, 0, 0, 0, -length % CHUNK)", "(0, 0, 0, 0, -length % CHUNK, 0)"),
                ("[:, :length]", "[:, -length % CHUNK :]"),
            ),
        ),
        honest_program(
            "chunk_by_length",
            "the chunk size depends on the length (16 to 64), which changes rounding only",
            small(
                (
                    "    length = q.shape[1]\n    missing",
                    "    length = q.shape[1]\n    size = 16 if length < 100 else 64\n    missing",
                ),
                ("-length % CHUNK", "-length % size"),
                ('"b (n c) h d -> n b h c d", c=CHUNK', '"b (n c) h d -> n b h c d", c=size'),
                ('"b (n c) h -> n b h c", c=CHUNK', '"b (n c) h -> n b h c", c=size'),
                ("torch.ones(CHUNK, CHUNK,", "torch.ones(size, size,"),
            ),
        ),
        honest_program(
            "doubling_scan",
            "a parallel prefix scan by doubling: work n log n, with slices of the whole sequence",
            small(
                memory="""
                level, fade, step = v, log_a.exp()[..., None], 1
                while step < v.shape[1]:
                    level = torch.cat([level[:, :step], level[:, step:] + fade[:, step:] * level[:, :-step]], dim=1)
                    fade = torch.cat([fade[:, :step], fade[:, step:] * fade[:, :-step]], dim=1)
                    step *= 2
                o = o + 0.1 * level
                """
            ),
        ),
    ]


def _positions() -> list[Mutant]:
    return [
        honest_program(
            "rotary_positions",
            "absolute positions and a table made from the current length",
            small(
                qkv="""
                place = torch.arange(x.shape[1], device=x.device, dtype=dtype)[:, None, None]
                pairs = self.head_k_dim // 2
                angle = place * 1000.0 ** (-torch.arange(pairs, device=x.device, dtype=dtype) / max(pairs, 1))
                cos, sin = angle.cos(), angle.sin()
                q, k = (
                    torch.cat([a * cos - b * sin, a * sin + b * cos, rest], dim=-1)
                    for a, b, rest in (t.split([pairs, pairs, self.head_k_dim - 2 * pairs], dim=-1) for t in (q, k))
                )
                """
            ),
        ),
        honest_program(
            "window_beside_memory",
            "softmax attention, but over a fixed window of 32 tokens",
            designed(Genome(state="linear", decay="scalar", path="window", gate="head")),
        ),
        honest_program(
            "complex_rotating_state",
            "complex numbers inside: the state turns as it fades and the real part is read",
            small(
                init="self.speed = nn.Parameter(torch.linspace(0.0, 0.5, num_heads))",
                memory="""
                turn = self.speed.to(dtype) * torch.arange(x.shape[1], device=x.device, dtype=dtype)[:, None]
                wave = torch.polar(torch.ones_like(turn), turn)[..., None]
                real = memory(q * wave.real, k * wave.real, v, log_a)
                o = (torch.complex(o + real, torch.zeros_like(o)) * wave.conj()[None]).real
                """,
            ),
        ),
    ]


def _loops() -> list[Mutant]:
    return [
        honest_program(
            "lean_token_loop",
            "a Python loop over tokens, slow and otherwise right",
            small(
                (
                    "            o = memory(q, k, v, log_a)\n",
                    """\
            keep, state, reads = log_a.exp()[..., None, None].unbind(1), 0.0, []
            writes = (k[..., None] * v[..., None, :]).unbind(1)
            for t in range(q.shape[1]):
                state = keep[t] * state + writes[t]
                reads.append(state)
            o = torch.einsum("bthk,bthkv->bthv", q, torch.stack(reads, dim=1))
""",
                ),
            ),
        ),
        honest_program(
            "all_states_at_once",
            "keeps the state of every token in memory: a large constant, yet linear",
            small(
                (
                    "            o = memory(q, k, v, log_a)\n",
                    """\
            size = torch.arange(1, q.shape[1] + 1, device=x.device, dtype=dtype)[:, None, None, None]
            states = torch.einsum("bthk,bthv->bthkv", k, v).cumsum(dim=1) / size.sqrt()
            o = torch.einsum("bthk,bthkv->bthv", q * log_a.exp()[..., None], states)
""",
                ),
            ),
        ),
        honest_program(
            "preallocated_output",
            "writes into slices of an empty tensor in place",
            small(
                memory="""
                filled = torch.empty_like(o)
                for start in range(0, o.shape[1], 128):
                    filled[:, start : start + 128] = 1.5 * o[:, start : start + 128]
                o = filled
                """
            ),
        ),
    ]


def _two_ways() -> list[Mutant]:
    return [
        honest_program(
            "eval_skips_work",
            "takes another way to the same numbers when no gradient is needed",
            small(
                (
                    "            o = memory(q, k, v, log_a)\n",
                    """\
            if torch.is_grad_enabled():
                o = memory(q, k, v, log_a)
            else:
                o = torch.cat([memory(*row) for row in zip(*(t.split(1) for t in (q, k, v, log_a)), strict=True)])
""",
                ),
            ),
        ),
        honest_program(
            "checkpointed_memory",
            "the memory runs twice: it is recomputed in the backward pass",
            small(
                (
                    "o = memory(q, k, v, log_a)\n        o =",
                    "o = checkpoint(memory, q, k, v, log_a, use_reentrant=False)\n        o =",
                ),
                (
                    "from torch.nn import functional as F\n",
                    "from torch.nn import functional as F\nfrom torch.utils.checkpoint import checkpoint\n",
                ),
            ),
        ),
        honest_program(
            "compiled_kernel",
            "torch.compile decorates the memory",
            small(("def memory(", "@torch.compile\ndef memory(")),
        ),
    ]


def honest_over_time() -> list[Mutant]:
    """Sound programs of this part."""
    return [*_turned_time(), *_grids(), *_positions(), *_loops(), *_two_ways()]
