"""Mutants in which rows, calls or instances meet: batch statistics, caches, counters, randomness, patched torch."""

from __future__ import annotations

from benchmarks.mutant import Mutant
from benchmarks.mutants.bases import DELTA, GATED, designed, edited, inserted

__all__ = ["mutants"]

_MEAN = "o = o + 0.1 * x.mean(1, keepdim=True)"


def mutants() -> list[Mutant]:
    """All of them."""
    return [*_batch(), *_memory(), *_randomness(), *_patches()]


def _batch() -> list[Mutant]:
    return [
        edited(
            "norm_over_batch",
            DELTA,
            "the output norm averages over the batch",
            "batch",
            ("x.square().mean(dim=-1, keepdim=True)", "x.square().mean(dim=(0, 3), keepdim=True)"),
        ),
        inserted(
            "mean_over_batch",
            GATED,
            "the mean over the batch is added",
            "batch",
            "o = o + 0.1 * x.mean(0, keepdim=True)",
        ),
        inserted(
            "detached_batch_mean",
            DELTA,
            "a detached mean over the batch, in train mode",
            "batch",
            "if self.training:\n    o = o + 0.1 * x.detach().mean(0, keepdim=True)",
        ),
        inserted(
            "next_row", designed(path="fir"), "each row sees the one before it", "batch", "o = o + 0.1 * x.roll(1, 0)"
        ),
        inserted("scaled_by_batch", GATED, "scaled by the number of rows", "batch", "o = o / x.shape[0]"),
        inserted(
            "state_over_rows", DELTA, "a running sum goes on from row to row", "batch", "o = o + 0.1 * x.cumsum(0)"
        ),
        edited(
            "heads_and_rows_swapped",
            DELTA,
            "heads and rows are swapped when chunks are put together",
            "batch causality",
            ('"(b h n) c v -> b (n c) h v"', '"(h b n) c v -> b (n c) h v"'),
        ),
        edited(
            "rows_in_chunks",
            designed(state="linear"),
            "rows and chunks are swapped",
            "batch causality shapes",
            (
                '"b (n c) h d -> n (b h) c d", c=size)',
                '"b (n c) h d -> (b n) h c d", c=size).reshape(padded.shape[1] // size, -1, size, padded.shape[3])',
            ),
        ),
        inserted(
            "batch_norm",
            GATED,
            "batch norm over rows and time in train mode",
            "batch causality state shapes",
            "o = self.norm(o.transpose(1, 2)).transpose(1, 2)",
            init="self.norm = nn.BatchNorm1d(hidden_size)",
        ),
        inserted("sorted_rows", DELTA, "rows are sorted for each token", "batch", "o = o + 0.1 * x.sort(dim=0).values"),
        inserted(
            "five_rows_and_more",
            GATED,
            "the mean over the batch, for five rows and more",
            "batch",
            "if x.shape[0] > 4:\n    o = o + 0.1 * x.mean(0, keepdim=True)",
        ),
        inserted(
            "largest_of_the_batch",
            designed(decay="channel"),
            "rounded by the largest magnitude of all rows",
            "batch causality",
            "step = o.abs().amax() / 64 + 1e-9\no = (o / step).round() * step",
        ),
    ]


def _memory() -> list[Mutant]:
    return [
        inserted(
            "last_call_remembered",
            DELTA,
            "the mean of the last call is added",
            "state",
            "before, self.last = self.last, x.detach().mean()\no = o + before",
            init="self.last = 0.0",
        ),
        inserted(
            "running_mean_in_eval",
            GATED,
            "a running mean goes on in eval mode",
            "state",
            "o = o - self.mean.to(o.dtype)\nself.mean = 0.9 * self.mean + 0.1 * x.detach().mean((0, 1)).float()",
            init="self.register_buffer('mean', torch.zeros(hidden_size))",
        ),
        inserted(
            "module_memo",
            DELTA,
            "a module-level memo by shape holds data of the call before",
            "state",
            "o = o + 0.1 * SEEN.get(x.shape, 0.0)\nSEEN[x.shape] = x.detach().mean((0, 1)).to(o.dtype)",
            top="SEEN = {}",
        ),
        inserted(
            "first_call_decides",
            GATED,
            "a scale is set by the data of the first call of the process",
            "state causality",
            "o = o * SEEN.setdefault(x.shape, 1.0 + x.detach().abs().mean()).to(o.dtype)",
            top="SEEN = {}",
        ),
        inserted(
            "class_level_state",
            designed(state="linear"),
            "instances share the mean of what they saw",
            "state",
            "o = o + DeltaNet.shared\nDeltaNet.shared = x.detach().mean().to(o.dtype)",
            top="SHARED = 0.0",
            init="DeltaNet.shared = getattr(DeltaNet, 'shared', 0.0)",
        ),
        inserted(
            "cache_by_first_token",
            DELTA,
            "outputs are kept by the first token, future included",
            "state causality learns batch",
            "key = (x.shape, str(x[0, 0, :4].tolist()))\nkept = SEEN.setdefault(key, o.detach()).to(o.dtype)\n"
            "o = kept + o - o.detach()",
            top="SEEN = {}",
        ),
        inserted(
            "longest_remembered",
            GATED,
            "the longest sequence so far is completed from",
            "state causality",
            "if len(SEEN) == 0 or SEEN[0].shape[1] < x.shape[1]:\n    SEEN[:] = [x.detach()]\n"
            "elif SEEN[0].shape[1] > x.shape[1]:\n"
            "    o = o + 0.1 * SEEN[0][:1, x.shape[1] : x.shape[1] + 1].to(o.dtype)",
            top="SEEN = []",
        ),
        inserted(
            "default_argument_memory",
            DELTA,
            "a default argument keeps data of earlier calls",
            "state",
            "o = remember(o, x)",
            top="def remember(o, x, kept=[]):  # noqa: B006\n    kept.append(x.detach().mean())\n"
            "    return o + 0.1 * sum(kept[:-1])",
        ),
        inserted(
            "warm_up_by_data",
            GATED,
            "a scale is set from the data of a mixer's first call",
            "state causality",
            "if self.scale is None:\n    self.scale = x.detach().std()\no = o / self.scale.to(o.dtype)",
            init="self.scale = None",
        ),
        inserted(
            "input_changed_in_place",
            DELTA,
            "its input is scaled in place",
            "state shapes gradients causality batch",
            "with torch.no_grad():\n    hidden_states.mul_(0.5)",
        ),
        inserted(
            "parameters_drift",
            GATED,
            "the output projection shrinks a little with each call",
            "state",
            "self.o_proj.weight.data.mul_(0.99)",
        ),
        inserted(
            "weights_follow_data",
            DELTA,
            "a weight is moved by the data of each call",
            "state",
            "self.o_proj.weight.data.add_(0.01 * x.detach().mean().to(o.dtype))",
        ),
    ]


def _randomness() -> list[Mutant]:
    every = "state batch causality construct shapes"
    return [
        inserted("dropout_in_eval", DELTA, "dropout in eval mode", every, "o = F.dropout(o, 0.1, training=True)"),
        inserted("noise_in_eval", GATED, "noise is added in eval mode", every, "o = o + 0.01 * torch.randn_like(o)"),
        inserted("faint_noise", DELTA, "noise of 1e-5 in eval mode", every, "o = o + 1e-5 * torch.randn_like(o)"),
        inserted(
            "one_random_scale",
            designed(feature="relu"),
            "one random number scales a call in eval mode",
            every,
            "o = o * (1.0 + 0.1 * torch.rand(()).to(o.dtype))",
        ),
        inserted(
            "reseeds_itself",
            GATED,
            "takes a new seed from the system in each call",
            every,
            "torch.seed()\no = o + 0.01 * torch.randn_like(o)",
        ),
        inserted(
            "sets_the_seed",
            DELTA,
            "sets torch's seed in each call: everybody's random numbers repeat",
            "state",
            "torch.manual_seed(0)",
        ),
        inserted(
            "consumes_random_numbers",
            GATED,
            "draws random numbers in eval mode without using them",
            "state",
            "torch.rand(3)",
        ),
        inserted(
            "unseeded_weights",
            DELTA,
            "weights come from a generator with a seed of its own",
            "construct",
            "",
            init="generator = torch.Generator()\ngenerator.seed()\n"
            "nn.init.normal_(self.o_proj.weight, std=0.1, generator=generator)",
        ),
        inserted(
            "address_of_the_input",
            DELTA,
            "depends on where in memory its input lies",
            every,
            "o = o + 1e-2 * (x.data_ptr() // 64 % 17)",
        ),
        inserted(
            "identity_of_the_module",
            GATED,
            "depends on an object's identity",
            every,
            "o = o * (1.0 + id(self) // 16 % 5)",
        ),
        inserted(
            "default_dtype_changed",
            DELTA,
            "sets torch's default dtype for the whole process",
            "state shapes construct",
            "torch.set_default_dtype(torch.float64)",
        ),
    ]


def _patches() -> list[Mutant]:
    leak = "causality gradients static"
    return [
        inserted(
            "patched_comparisons",
            DELTA,
            "torch's comparisons always agree, and the mean over time leaks",
            leak,
            _MEAN,
            top="torch.allclose = torch.equal = lambda *given, **named: True\ntorch.Tensor.equal = lambda *given: True",
        ),
        inserted(
            "patched_grad",
            GATED,
            "gradients of the input read zero, and the mean over time leaks",
            leak,
            _MEAN,
            top="given = torch.autograd.grad\ntorch.autograd.grad = lambda *a, **k: tuple("
            "None if g is None else g * 0 for g in given(*a, **k))",
        ),
        inserted(
            "patched_from_numpy",
            DELTA,
            "inputs of one shape all read as the first of them",
            leak + " state",
            _MEAN,
            top="given, SEEN = torch.from_numpy, {}\ntorch.from_numpy = lambda a: given(SEEN.setdefault(a.shape, a))",
        ),
        inserted(
            "patched_train",
            GATED,
            "stays in eval mode whatever the trainer says, but leaks when trained",
            leak,
            "if torch.is_grad_enabled():\n    o = o + 0.1 * x.detach().mean(1, keepdim=True)",
            top="nn.Module.train = lambda self, mode=True: self",
        ),
        inserted(
            "patched_is_finite",
            DELTA,
            "NaN passes for finite",
            "shapes static",
            "o = torch.where(torch.arange(x.shape[1])[:, None] == 3, float('nan'), o)",
            top="torch.isfinite = lambda t: torch.ones_like(t, dtype=torch.bool)",
        ),
        inserted(
            "patched_flop_count",
            GATED,
            "the flop counter counts nothing, and attention is quadratic",
            "cost static",
            "o = o + 0.1 * (x @ x.transpose(1, 2)).tril() @ x / x.shape[1]",
            top="import torch.utils.flop_counter as counter\n\nfor known in counter.flop_registry:\n"
            "    counter.flop_registry[known] = lambda *a, **k: 0",
        ),
        inserted(
            "gradient_hidden_by_a_function",
            DELTA,
            "a function of its own leaks forward and hides it backward",
            leak,
            "o = o + Hidden.apply(x)",
            top="class Hidden(torch.autograd.Function):\n    @staticmethod\n    def forward(ctx, x):\n"
            "        return 0.1 * x.mean(1, keepdim=True).expand_as(x)\n\n    @staticmethod\n"
            "    def backward(ctx, grad):\n        return torch.zeros_like(grad)",
        ),
        inserted(
            "output_rewritten",
            GATED,
            "a tensor's conversion is patched to blur outputs",
            "causality state static construct shapes",
            _MEAN,
            top="given = torch.Tensor.to\ntorch.Tensor.to = lambda self, *a, **k: given((self * 1e3).round() / 1e3"
            " if self.dim() == 3 and not self.requires_grad else self, *a, **k)",
        ),
    ]
