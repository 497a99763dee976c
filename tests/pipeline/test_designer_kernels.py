"""The chunkwise kernels of rendered programs against recurrences that take one token at a time, in float64."""

from __future__ import annotations

import pytest
import torch
from designs import ARCHITECTURES, namespace, step_by_step
from torch import Tensor
from torch.nn import functional as F

from pipeline.designer import Genome

BATCH, LENGTH, HEADS, KEY, VALUE = 2, 75, 2, 6, 5


def inputs(rows: int, decay_width: int | None, strongest: float) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    found = {
        "q": normal(BATCH, LENGTH, HEADS, KEY),
        "k": F.normalize(normal(BATCH, rows * LENGTH, HEADS, KEY), dim=-1),
        "v": normal(BATCH, rows * LENGTH, HEADS, VALUE),
    }
    found["w"] = 2.0 * torch.rand(BATCH, rows * LENGTH, HEADS, 1, generator=generator, dtype=torch.float64) * found["k"]
    if decay_width is not None:
        found["log_decay"] = -strongest * torch.rand(
            BATCH, LENGTH, HEADS, decay_width, generator=generator, dtype=torch.float64
        )
    return found


@pytest.mark.parametrize("strongest", [0.2, 2.0])
@pytest.mark.parametrize("decay", ["none", "fixed", "scalar", "channel", "bounded"])
@pytest.mark.parametrize("state", ["linear", "delta", "product"])
def test_kernel_equals_the_recurrence(state: str, decay: str, strongest: float) -> None:
    width = {"none": None, "channel": KEY, "bounded": KEY}.get(decay, 1)
    rows = 2 if state == "product" else 1
    given = inputs(rows, width, strongest)
    memory = namespace(Genome(state=state, decay=decay))["memory"]
    arguments = [given["q"], given["k"], given["w"], given["v"]]
    if state == "linear":
        del arguments[1]
    got = memory(*arguments, *([given["log_decay"]] if width else []))
    wanted = step_by_step(
        given["q"], None if state == "linear" else given["k"], given["w"], given["v"], given.get("log_decay"), rows
    )
    torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("decay", ["scalar", "channel"])
def test_strong_decay_is_exact_in_float32(decay: str) -> None:
    given = inputs(1, KEY if decay == "channel" else 1, 2.0)
    memory = namespace(Genome(decay=decay))["memory"]
    order = ("q", "k", "w", "v", "log_decay")
    single = memory(*(given[name].float() for name in order))
    torch.testing.assert_close(single.double(), step_by_step(*(given[name] for name in order)), rtol=1e-4, atol=1e-4)


def test_local_window_sees_exactly_the_last_32_tokens() -> None:
    attend = namespace(Genome(path="window"))["window_attention"]
    given = inputs(1, None, 0.0)
    q, k, v = given["q"], given["k"], given["v"]
    scores = torch.einsum("bihk,bjhk->bhij", q, k)
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    scores = scores.masked_fill((distance < 0) | (distance >= 32), -torch.inf)
    torch.testing.assert_close(attend(q, k, v), torch.einsum("bhij,bjhv->bihv", scores.softmax(-1), v))


def test_rendered_deltanet_computes_what_the_shipped_seed_computes() -> None:
    """The genome that stands for the seed is the seed's function: with its weights both give the same output."""
    for file, genome in (("delta_net.py", Genome()), ("gated_delta_net.py", Genome(decay="scalar", gate="silu"))):
        found: dict[str, type] = {}
        exec(compile((ARCHITECTURES / file).read_text(), file, "exec"), found)
        torch.manual_seed(1)
        seed = found["DeltaNet"](hidden_size=16, num_heads=2).double()
        ours = namespace(genome)["DeltaNet"](hidden_size=16, num_heads=2).double()
        weights = dict(seed.named_parameters())
        streams = ["qkv_proj", "b_proj", *(["a_proj", "g_proj"] if genome.gate != "none" else [])]
        with torch.no_grad():
            ours.in_proj.weight.copy_(torch.cat([weights[f"{name}.weight"] for name in streams]))
            ours.o_proj.weight.copy_(weights["o_proj.weight"])
            ours.conv_taps.copy_(weights["qkv_conv.weight"][:, 0])
            if genome.decay == "scalar":
                ours.A_log.copy_(weights["A_log"])
                ours.dt_bias.copy_(weights["dt_bias"])
            x = torch.randn(2, 50, 16, dtype=torch.float64)
            torch.testing.assert_close(ours(x)[0], seed(x)[0], rtol=1e-8, atol=1e-8)
