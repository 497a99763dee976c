"""Blind set: rows of a batch that meet, and state that outlives a call."""

from __future__ import annotations

from benchmarks.mutant import Mutant
from benchmarks.mutants_blind.base import delta, mutant, small

__all__ = ["faults"]


def _rows() -> list[Mutant]:
    return [
        mutant(
            "batch_norm",
            "BatchNorm1d over [B, channels, T] in train mode, running statistics in eval mode",
            small(
                init="self.mix_norm = nn.BatchNorm1d(value_dim)",
                out="o = self.mix_norm(o.float().transpose(1, 2)).transpose(1, 2).to(x.dtype)",
            ),
            "batch",
            "causality",
            "state",
        ),
        mutant(
            "centred_over_rows",
            "a thousandth of the mean over the rows at the same position is subtracted",
            small(inputs="x = x - 1e-3 * x.mean(dim=0, keepdim=True)"),
            "batch",
        ),
        mutant(
            "shift_over_flat_batch",
            "the token shift runs over the flattened batch: a row starts with the last token of the row before",
            small(
                inputs="""
                flat = rearrange(x, "b t d -> 1 (b t) d")
                moved = F.pad(flat, (0, 0, 1, -1))
                x = 0.7 * x + 0.3 * rearrange(moved, "1 (b t) d -> b t d", b=x.shape[0])
                """
            ),
            "batch",
            "causality",
        ),
        mutant(
            "running_sum_over_rows",
            "the state is a running sum over batch and time in one axis",
            small(
                memory="""
                flat = rearrange(v, "b t h d -> (b t) h d").cumsum(dim=0) / v.shape[1]
                o = o + 0.1 * rearrange(flat, "(b t) h d -> b t h d", b=x.shape[0])
                """
            ),
            "batch",
            "causality",
        ),
    ]


def _row_counts() -> list[Mutant]:
    return [
        mutant(
            "divided_by_rows",
            "the write strength is divided by the number of rows",
            delta(
                ("beta_BTH = beta_BTH.to(dtype).sigmoid()", "beta_BTH = beta_BTH.to(dtype).sigmoid() / x_BTD.shape[0]")
            ),
            "batch",
        ),
        mutant(
            "stabiliser_over_rows",
            "an exponential feature subtracts the largest value of all rows at that position, with a floor behind",
            small(qkv="k = (k - k.amax(dim=(0, 3), keepdim=True)).exp() + 1e-2"),
            "batch",
        ),
        mutant(
            "third_row_on",
            "rows from the third on share the first row's decay, as a broadcasting slip",
            small(qkv="log_a = torch.cat([log_a[:2], log_a[:1].expand_as(log_a[2:])]) if x.shape[0] > 2 else log_a"),
            "batch",
        ),
        mutant(
            "nearest_row",
            "each row borrows from the row most like it so far",
            small(
                memory="""
                if x.shape[0] > 1:
                    sketch = x.detach()[:, 0].float()
                    near = (sketch @ sketch.t()).fill_diagonal_(-torch.inf).argmax(dim=1)
                    o = o + 0.05 * o[near]
                """
            ),
            "batch",
        ),
    ]


def _carried() -> list[Mutant]:
    return [
        mutant(
            "carries_state_over",
            "the memory of one batch is the start of the next, kept detached on the module",
            small(
                init="self.carried = None",
                memory="""
                if self.carried is not None and self.carried.shape[0] == x.shape[0]:
                    o = o + 0.2 * torch.einsum("bthk,bhkv->bthv", q, self.carried.to(q))
                self.carried = torch.einsum("bthk,bthv->bhkv", k[:, -32:], v[:, -32:]).detach()
                """,
            ),
            "state",
            "batch",
            "causality",
        ),
        mutant(
            "running_mean_buffer",
            "the input is centred by a buffer that follows the mean of everything seen, in train mode",
            small(
                init='self.register_buffer("mean", torch.zeros(hidden_size))',
                inputs="""
                if self.training:
                    self.mean.lerp_(x.detach().float().mean(dim=(0, 1)), 0.1)
                x = x - self.mean.to(x.dtype)
                """,
            ),
            "state",
            "batch",
            "causality",
        ),
        mutant(
            "alternates",
            "every second call halves the last four channels",
            small(
                init="self.odd = False",
                out="""
                self.odd = not self.odd
                if self.odd:
                    o = torch.cat([o[..., :-4], 0.5 * o[..., -4:]], dim=-1)
                """,
            ),
            "state",
            "causality",
            "batch",
        ),
    ]


def _side_effects() -> list[Mutant]:
    return [
        mutant(
            "changes_its_input",
            "the token shift is written into the caller's tensor whenever autograd allows it",
            small(
                inputs="""
                if not (x.is_leaf and x.requires_grad and torch.is_grad_enabled()):
                    x += 0.3 * F.pad(x.detach(), (0, 0, 1, -1))
                """
            ),
            "state",
            "shapes",
            "causality",
            "batch",
            "gradients",
        ),
        mutant(
            "seeds_the_generator",
            "the forward pass seeds the global generator to draw its fixed features",
            small(
                qkv="""
                torch.manual_seed(1234)
                k = F.relu(k @ torch.randn(self.head_k_dim, self.head_k_dim, device=x.device).to(dtype)) + 1e-3
                q = F.relu(q @ torch.randn(self.head_k_dim, self.head_k_dim, device=x.device).to(dtype)) + 1e-3
                """
            ),
            "state",
        ),
        mutant(
            "stale_weights",
            "the norm's gains are copied at the first call, so later updates have no effect",
            small(
                init="self.copy = None",
                memory="""
                if self.copy is None:
                    self.copy = self.o_norm.detach().clone()
                o = o * self.copy.to(dtype) / self.o_norm.detach().to(dtype)
                """,
            ),
            "state",
            "learns",
            "gradients",
        ),
    ]


def _chance() -> list[Mutant]:
    return [
        mutant(
            "dropout_in_eval",
            "F.dropout without the training flag drops in eval mode too",
            small(out="o = F.dropout(o, 0.05)"),
            "state",
            "causality",
            "batch",
            "construct",
        ),
        mutant(
            "noise_of_its_own",
            "a private generator without a seed adds noise of 1e-3",
            small(
                init="self.source = torch.Generator()\nself.source.seed()",
                final="y = y + 1e-3 * torch.randn(y.shape, generator=self.source).to(y)",
            ),
            "state",
            "causality",
            "batch",
            "construct",
        ),
        mutant(
            "default_cache_argument",
            "a mutable default holds the last output and is blended into the next",
            small(
                (
                    "        **kwargs: Any,\n    ) -> tuple[",
                    "        _kept: dict = {},\n        **kwargs: Any,\n    ) -> tuple[",
                ),
                final="""
                old = _kept.get("y")
                _kept["y"] = y.detach()
                if old is not None and old.shape == y.shape and old.dtype == y.dtype:
                    y = 0.9 * y + 0.1 * old
                """,
            ),
            "state",
            "static",
            "causality",
            "batch",
        ),
    ]


def faults() -> list[Mutant]:
    """Faulty programs of this part."""
    return [*_rows(), *_row_counts(), *_carried(), *_side_effects(), *_chance()]
