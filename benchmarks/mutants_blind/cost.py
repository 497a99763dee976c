"""Blind set: quadratic work and memory."""

from __future__ import annotations

from benchmarks.mutant import Mutant
from benchmarks.mutants_blind.base import mutant, small

__all__ = ["costs"]


def _attention(condition: str = "True") -> str:
    return f"""
    if {condition}:
        full = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
        o = o + 0.1 * full.transpose(1, 2)
    """


def _fused() -> list[Mutant]:
    return [
        mutant(
            "fused_attention_path",
            "a fused softmax attention runs beside the memory",
            small(memory=_attention()),
            "cost",
        ),
        mutant(
            "attention_when_training",
            "full attention in train mode only",
            small(memory=_attention("self.training")),
            "cost",
        ),
        mutant(
            "attention_with_gradients",
            "full attention only where gradients are recorded",
            small(memory=_attention("torch.is_grad_enabled() and q.requires_grad")),
            "cost",
        ),
        mutant(
            "attention_for_batches",
            "full attention only for more than one row",
            small(memory=_attention("x.shape[0] > 1")),
            "cost",
        ),
        mutant(
            "attention_from_layer_one",
            "full attention in layers other than the first, a hybrid nobody asked for",
            small(memory=_attention("self.layer_idx")),
            "cost",
        ),
        mutant(
            "attention_unless_power_of_two",
            "full attention for lengths that are no powers of two",
            small(memory=_attention("x.shape[1] & (x.shape[1] - 1)")),
            "cost",
        ),
    ]


def _pairs() -> list[Mutant]:
    return [
        mutant(
            "pairwise_distances",
            "a kernel of pairwise distances by torch.cdist, which is no matrix product to a counter",
            small(
                memory="""
                distance = torch.cdist(q[:, :, 0], k[:, :, 0], compute_mode="donot_use_mm_for_euclid_dist")
                mass = (-distance).exp().tril().sum(dim=-1)
                mass = mass / torch.arange(1, x.shape[1] + 1, device=x.device, dtype=dtype)
                o = o + mass[..., None, None] * v
                """
            ),
            "cost",
        ),
        mutant(
            "elementwise_pairs",
            "all pairs of tokens by broadcasting, without any matrix product",
            small(
                memory="""
                level = log_a.mean(dim=-1)
                near = torch.sigmoid(level[:, :, None] - level[:, None, :]).tril().sum(dim=-1)
                near = near / torch.arange(1, x.shape[1] + 1, device=x.device, dtype=dtype)
                o = o + near[..., None, None] * v
                """
            ),
            "cost",
        ),
        mutant(
            "pairs_in_numpy",
            "all pairs of tokens in numpy, which no counter of torch operations sees",
            small(
                memory="""
                level = log_a.detach().mean(dim=-1).double().cpu().numpy()
                place = torch.arange(x.shape[1]).numpy()
                pull = 1.0 / (1.0 + (level[:, :, None] - level[:, None, :]) ** 2)
                above = (pull * (place[:, None] >= place[None])).sum(axis=2)
                o = o + torch.as_tensor(above / (place + 1), device=x.device).to(dtype)[..., None, None] * v
                """
            ),
            "cost",
        ),
    ]


def _growing_windows() -> list[Mutant]:
    return [
        mutant(
            "filter_as_long_as_text",
            "a direct convolution whose filter is as long as the sequence",
            small(
                init="self.rate = nn.Parameter(torch.linspace(-4.0, -1.0, num_heads))",
                memory="""
                lags = torch.arange(x.shape[1] - 1, -1, -1, device=x.device, dtype=dtype)
                taps = (-lags * self.rate.to(dtype).exp()[:, None]).exp()[:, None] / 8.0
                rows = rearrange(v, "b t h d -> (b d) h t")
                rows = F.conv1d(F.pad(rows, (x.shape[1] - 1, 0)), taps, groups=self.num_heads)
                o = o + rearrange(rows, "(b d) h t -> b t h d", b=x.shape[0])
                """,
            ),
            "cost",
        ),
        mutant(
            "window_of_a_quarter",
            "the local window is a quarter of the sequence",
            small(
                memory="""
                size = max(8, x.shape[1] // 4)
                windows = F.pad(v.mean(dim=-1), (0, 0, size - 1, 0)).unfold(1, size, 1).softmax(dim=-1)
                o = o + 0.2 * windows[..., -1:] * v
                """
            ),
            "cost",
            "causality",
        ),
        mutant(
            "chunk_of_an_eighth",
            "chunks grow in proportion to the length, so that the work inside them is quadratic",
            small(
                (
                    "    length = q.shape[1]\n    missing = -length % CHUNK",
                    "    length = q.shape[1]\n    size = max(32, length // 8)\n    missing = -length % size",
                ),
                ('"b (n c) h d -> n b h c d", c=CHUNK', '"b (n c) h d -> n b h c d", c=size'),
                ('"b (n c) h -> n b h c", c=CHUNK', '"b (n c) h -> n b h c", c=size'),
                ("torch.ones(CHUNK, CHUNK,", "torch.ones(size, size,"),
            ),
            "cost",
        ),
    ]


def _memory_and_backward() -> list[Mutant]:
    return [
        mutant(
            "mask_of_all_pairs",
            "the causal mask is built for all pairs of the sequence and only its blocks are used",
            small(
                (
                    "later = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).triu(1)",
                    "later = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)\n"
                    "    later = F.pad(later, (0, missing, 0, missing), value=True)[:CHUNK, :CHUNK]",
                ),
            ),
            "cost",
        ),
        mutant(
            "quadratic_backward",
            "a Function is linear forward and rebuilds all pairs in its backward pass",
            small(
                top="""
                class Lean(torch.autograd.Function):
                    @staticmethod
                    def forward(ctx, o, q, k):
                        ctx.save_for_backward(q, k)
                        return o.clone()

                    @staticmethod
                    def backward(ctx, grad):
                        q, k = ctx.saved_tensors
                        pairs = q[:, :, 0] @ k[:, :, 0].transpose(1, 2)
                        return grad + 0.0 * pairs.sum(dim=-1)[..., None, None], None, None
                """,
                memory="o = Lean.apply(o, q, k)",
            ),
            "cost",
        ),
    ]


def _loops() -> list[Mutant]:
    return [
        mutant(
            "loop_over_everything",
            "three nested Python loops, over rows, tokens and heads",
            small(
                (
                    "            o = memory(q, k, v, log_a)\n",
                    """\
            rows = []
            for b in range(q.shape[0]):
                states = [torch.zeros(self.head_k_dim, self.head_v_dim, dtype=dtype, device=x.device)] * self.num_heads
                for t in range(q.shape[1]):
                    for h in range(self.num_heads):
                        states[h] = log_a[b, t, h].exp() * states[h] + torch.outer(k[b, t, h], v[b, t, h])
                        rows.append(q[b, t, h] @ states[h])
            o = torch.stack(rows).view(*v.shape)
""",
                ),
            ),
            "cost",
        ),
        mutant(
            "replays_every_prefix",
            "the causal form is obtained by running the whole memory again for every chunk's prefix",
            small(
                (
                    "            o = memory(q, k, v, log_a)\n",
                    """\
            parts = []
            for end in range(CHUNK, q.shape[1] + CHUNK, CHUNK):
                parts.append(memory(q[:, :end], k[:, :end], v[:, :end], log_a[:, :end])[:, end - CHUNK :])
            o = torch.cat(parts, dim=1)
""",
                ),
            ),
            "cost",
        ),
    ]


def costs() -> list[Mutant]:
    """Faulty programs of this part."""
    return [*_fused(), *_pairs(), *_growing_windows(), *_memory_and_backward(), *_loops()]
