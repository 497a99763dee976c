"""Counts what an operation of torch does, from inside its dispatcher: deterministic, where timing is not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

__all__ = ["Count", "Largest", "Watch", "count", "leaves"]

_aten = torch.ops.aten
_tensor = torch.Tensor
_abs, _amax, _detach, _nan_to_num = _tensor.abs, _tensor.amax, _tensor.detach, _tensor.nan_to_num
_hooks = torch.autograd.graph.saved_tensors_hooks
_windowed = frozenset(
    f"{kind}{sides}d{end}"
    for kind, end in (("avg_pool", ""), ("max_pool", ""), ("max_pool", "_with_indices"), ("fractional_max_pool", ""))
    for sides in (1, 2, 3)
)
_registry: dict[Any, Callable[..., int]] = dict(flop_registry)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, _tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _extra_flops(packet: Any, args: Any, out: Any) -> int:
    """Formulas for what torch's registry leaves out: fused attention on CPU, solves, inverses, Fourier transforms,
    sorts, pooling and convolution along the first dimension."""
    if "attention" in packet.__name__:
        query, key, *_ = _tensors(args)
        return 4 * int(query.numel()) * int(key.shape[-2])
    if packet in (_aten.linalg_solve_triangular, _aten.triangular_solve):
        return int(2 * out[0].numel() if isinstance(out, tuple) else out.numel()) * int(args[0].shape[-1])
    if packet in (_aten.linalg_inv_ex, _aten.linalg_cholesky_ex, _aten.linalg_lu_factor_ex):
        return 2 * int(args[0].numel()) * int(args[0].shape[-1])
    if packet in (_aten._fft_r2c, _aten._fft_c2r, _aten._fft_c2c):
        size = max(int(args[0].numel()), int(out.numel()))
        return int(5 * size * math.log2(max(2, max(args[0].shape))))
    if packet in (_aten.sort, _aten.topk, _aten.argsort):
        return int(args[0].numel() * math.log2(max(2, max(args[0].shape))))
    if packet.__name__ in _windowed:
        # Every output reads its whole window. One size may stand for all sides.
        window = [args[1]] if isinstance(args[1], int) else list(args[1])
        sides = int(packet.__name__.partition("d")[0][-1]) if len(window) == 1 else 1
        return int(next(_tensors(out)).numel()) * math.prod(window) ** sides
    if packet is _aten.conv_tbc:
        return 2 * int(out.numel()) * math.prod(args[1].shape[:2])
    return 0


class _Mode(TorchDispatchMode):
    """A dispatch mode that does not import torch._dynamo (2 s) only to keep it away."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class Count(_Mode):
    """Adds up matmul FLOPs, elements produced, bytes moved and operations launched. Views are free."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.elements = self.bytes = self.operations = 0
        self._views: dict[Any, bool] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func not in self._views:
            infos = [item.alias_info for item in func._schema.returns]
            self._views[func] = any(info is not None and not info.is_write for info in infos)
        if not self._views[func]:
            packet = func._overloadpacket
            formula = _registry.get(packet)
            self.flops += formula(*args, **kwargs, out_val=out) if formula else _extra_flops(packet, args, out)
            made = list(_tensors(out))
            self.elements += sum(item.numel() for item in made)
            self.bytes += sum(item.numel() * item.element_size() for item in (*made, *_tensors(args)))
            self.operations += 1
        return out


class Watch(_Mode):
    """Notes the floating dtypes that operations produce, which is the precision in which a program really computes, and
    "mixing" where an operation (a Fourier transform, a pivoted factorisation) rounds all positions together."""

    def __init__(self, seen: set[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.__name__
        if "fft" in name or ("linalg" in name and "triangular" not in name and "norm" not in name):
            self.seen.add("mixing")
        for item in _tensors(out):
            if item.is_floating_point():
                self.seen.add(str(item.dtype).removeprefix("torch."))
        return out


class Largest(_Mode):
    """The largest finite magnitude among all floating values that operations produce; infinities are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.value = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for item in _tensors(out):
            if item.is_floating_point() and item.numel():
                size = _abs(_detach(item))
                found = float(_amax(size))
                if not math.isfinite(found):
                    found = float(_amax(_nan_to_num(size, 0.0, 0.0, 0.0)))
                self.value = max(self.value, found)
        return out


def count(run: Callable[[], Any], backward: Callable[[Any], Any] | None = None) -> dict[str, int]:
    """Work of one forward pass, and the bytes that it keeps for the backward pass (each storage once).

    Args:
        backward: differentiates what `run` returned; its matmul FLOPs are counted apart.
    """
    saved: dict[int, int] = {}

    def pack(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return value

    counter = Count()
    with _hooks(pack, lambda value: value), counter:
        kept = run()
    row = {
        "flops": counter.flops,
        "elements": counter.elements,
        "bytes": counter.bytes,
        "operations": counter.operations,
        "saved": sum(saved.values()),
    }
    if backward is not None:
        behind = Count()
        with behind:
            backward(kept)
        row["backward_flops"] = behind.flops
    return row


def leaves(root: Any) -> list[torch.Tensor]:
    """The tensors that a graph accumulates gradients into: inputs and parameters, registered or not."""
    found: dict[int, torch.Tensor] = {}
    stack, done = [root] if root is not None else [], set()
    while stack:
        node = stack.pop()
        if node in done:
            continue
        done.add(node)
        variable = getattr(node, "variable", None)
        if isinstance(variable, _tensor):
            found[id(variable)] = variable
        stack.extend(item for item, _ in node.next_functions if item is not None)
    return list(found.values())
