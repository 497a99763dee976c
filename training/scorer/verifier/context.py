"""What the checks share: the worker, the shapes they use, the precision in which the program computes, and tolerances.

**Tolerance is measured.** The same program on the same input, changed in the last bit of the lowest precision in
which it really computes, gives outputs that differ by what rounding can do to it. A difference is a finding only when
it is a multiple of that, position by position: what is chaotic at the end of a sequence excuses nothing at its start.
A floor covers operations that round differently at other shapes (a matrix product of 31 rows and one of 32 take
different kernels).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from common.records import CheckOutcome
from training.profiles import ModelSpec
from training.programs import Program
from training.scorer.client import Worker

__all__ = ["EPSILON", "Context", "Options", "Refused", "failed", "passed", "raised", "warned"]

_DETAIL, _TEXT, _ITEMS, _DEPTH = 2000, 2000, 64, 6
"""Longest detail and text, most items of a list, and deepest nesting of a counterexample."""
_PROFILE_FLOPS = 2.5e9
"""Forward FLOPs at which a test at the size of training is cut short."""
EPSILON = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


@dataclass(frozen=True)
class Options:
    """What the verifier measures at, and where it refuses.

    Attributes:
        width, heads: of the mixers that are tested.
        profile_width, profile_heads, profile_length, profile_batch, profile_layers: of the model that is to be trained:
            width and heads, tokens of a sequence, sequences of a forward pass, mixers.
        seconds: CPU time of all checks of one program together; call_seconds: of one call to its process. By the clock
            both may take `WALL` times as long, so that a busy machine refuses nobody; memory_mb: of its process.
        exponent: largest growth of work and memory with the length.
        warn_operations, refuse_operations: launched operations per added token.
        unused: largest share of parameters that never get a gradient.
        baseline_mixer_parameters, baseline_flops_per_token: of the profile's baseline, for the record; None: unknown.
    """

    width: int = 64
    heads: int = 4
    profile_width: int = 64
    profile_heads: int = 4
    profile_length: int = 512
    profile_batch: int = 4
    profile_layers: int = 2
    seconds: float = 180.0
    call_seconds: float = 20.0
    memory_mb: int = 4096
    file_mb: int = 64
    exponent: float = 1.15
    warn_operations: float = 4.0
    refuse_operations: float = 64.0
    unused: float = 0.25
    baseline_mixer_parameters: int | None = None
    baseline_flops_per_token: float | None = None


class Refused(Exception):  # noqa: N818 - a verdict, no error
    """Ends a check with this outcome."""

    def __init__(self, outcome: CheckOutcome) -> None:
        super().__init__(outcome.detail)
        self.outcome = outcome


@dataclass
class Context:
    """One program under test.

    Attributes:
        dtype: the precision that training will use: "float32", or "bfloat16" (autocast) where float32 does not run.
        precise: the highest precision in which it runs, for comparing outputs.
        lowest: the lowest floating dtype that its operations produce in `precise`.
        mixing: it uses operations that round all positions together (a Fourier transform, a pivoted solve).
        slow: one forward pass takes so long that the other checks are left out.
        dtypes: those of "float32" and "bfloat16" in which it runs.
        shared: mixers share state through the program's module, so it is executed anew for each (see shapes).
        switches: constructor keywords by label that construct could build; unsupported: why others could not.
        shapes: of its parameters at the width under test, in their order.
        refused: names of the checks that have refused it so far.
    """

    worker: Worker
    program: Program
    options: Options
    dtype: Literal["float32", "bfloat16"] = "float32"
    precise: str = "float32"
    lowest: str = "float32"
    mixing: bool = False
    slow: bool = False
    facts: dict[str, Any] = field(default_factory=dict)
    dtypes: tuple[str, ...] = ("float32",)
    shared: bool = False
    switches: dict[str, dict[str, object]] = field(default_factory=dict)
    unsupported: dict[str, str] = field(default_factory=dict)
    shapes: list[list[int]] = field(default_factory=list)
    refused: set[str] = field(default_factory=set)

    def arguments(self, heads: int | None = None, layer: int = 0) -> dict[str, object]:
        """The block's keywords at the width under test, the others as published."""
        options = self.options
        model = ModelSpec(hidden_size=options.width, heads=heads or options.heads, layers=1, ffn=1, vocab=300)
        return model.mixer_arguments(layer)

    def spec(
        self,
        seed: int = 0,
        *,
        dtype: str | None = None,
        train: bool = False,
        jitter: bool = False,
        given: Mapping[str, object] | None = None,
    ) -> dict[str, Any]:
        """How the worker is to build a mixer: with the block's keywords and those `given`. `jitter` moves its
        parameters away from their initial values."""
        return {
            "kwargs": {**self.arguments(), **(given or {})},
            "seed": seed,
            "dtype": dtype or self.precise,
            "train": train,
            "jitter": {"seed": seed + 100, "scale": 0.1} if jitter else None,
            "anew": self.shared,
        }

    def trained_spec(self, seed: int, layer: int, *, train: bool = True) -> dict[str, Any]:
        """A mixer as the profile's model has it: its width, heads, layer and precision, called as the block
        does, behind its norm; in training that is an operation that autograd records."""
        options = self.options
        size = {"hidden_size": options.profile_width, "num_heads": options.profile_heads, "layer_idx": layer}
        spec = self.spec(seed, jitter=True, train=train, dtype=self.dtype, given=size)
        return {**spec, "call": "bare", "history": train, "normed": True}

    def affordable_rows(self, length: int) -> float:
        """Rows of so many tokens that a test at the size of training may take."""
        return _PROFILE_FLOPS / (float(self.facts.get("flops_per_token") or 1.0) * max(length, 1))

    def inputs(self, seed: int, batch: int, length: int, width: int | None = None) -> np.ndarray:
        """Standard normal [batch, length, width], float64; the worker casts it."""
        return np.random.default_rng(seed).standard_normal((batch, length, width or self.options.width))

    def outputs(
        self, check: str, spec: Mapping[str, Any], arrays: Sequence[np.ndarray], **meta: Any
    ) -> list[np.ndarray]:
        """Outputs of fresh mixers on `arrays`, each of its input's shape and finite.

        Raises:
            Refused: one of them fails, has another shape or is not finite.
        """
        reply, outputs = self.worker.call("forward", {"spec": dict(spec), **meta}, arrays)
        calls = int(meta.get("calls", 1))
        wanted = [array for array in arrays for _ in range(calls)]
        if not len(outputs) == len(reply["results"]) == len(wanted):
            raise Refused(failed(check, f"expected {len(wanted)} outputs, got {len(outputs)}"))
        for array, result, output in zip(wanted, reply["results"], outputs, strict=True):
            place = {"seed": spec["seed"], "batch": array.shape[0], "length": array.shape[1], "dtype": spec["dtype"]}
            if not result.get("ok"):
                raise Refused(raised(check, "forward raises", result.get("error", {}), place))
            if output.shape != array.shape:
                raise Refused(
                    failed(
                        check,
                        f"expected output {list(array.shape)}, got {list(output.shape)}",
                        {**place, "output": list(output.shape)},
                    )
                )
            if not np.isfinite(output).all():
                raise Refused(failed(check, "the output is not finite", {**place, **not_finite(output)}))
        return [output.astype(np.float64) for output in outputs]

    @property
    def epsilon(self) -> float:
        """Relative spacing of the numbers that the program computes with."""
        return EPSILON[self.lowest]

    def tolerance(self, check: str, spec: Mapping[str, Any], x: np.ndarray, output: np.ndarray) -> np.ndarray:
        """Largest honest difference of `output` at each position, [length]; see the module's text."""
        generator = np.random.default_rng(7)
        shaken = [x * (1 + self.epsilon * generator.integers(-1, 2, x.shape)) for _ in range(2)]
        again = self.outputs(check, spec, shaken)
        effect = np.maximum(*(np.abs(other - output).max(axis=(0, 2)) for other in again))
        fine = self.epsilon < 1e-6
        scale = np.maximum.accumulate(np.abs(output).max(axis=(0, 2)))
        return np.maximum(
            (32 if fine else 4) * np.maximum.accumulate(effect), (128 if fine else 8) * self.epsilon * scale
        )

    def same_shape_tolerance(self, output: np.ndarray, growth: float = 1.0, dtype: str | None = None) -> float:
        """Largest honest difference where the shapes are equal, which is next to nothing: the same kernels add the
        same numbers in the same order. Only what rounds all positions together spreads the rounding of the largest
        input (`growth`), and may flip a last bit of a coarse dtype. `dtype`: in which it ran, `precise` unless told."""
        scale = float(np.abs(output).max())
        epsilon = self.epsilon_in(dtype)
        # A stray bfloat16 tensor must not hide a leak, so no coarse dtype widens this.
        fine = min(epsilon, EPSILON["float32"])
        if self.mixing:
            return max(64 * fine * growth, 0.0 if epsilon < 1e-6 else 2 * epsilon) * scale
        return 8 * fine * scale

    def loose_tolerance(self, output: np.ndarray, dtype: str | None = None) -> float:
        """For a first look where shapes differ and the effect of rounding was not measured."""
        epsilon = self.epsilon_in(dtype)
        return (4096 if epsilon < 1e-6 else 16) * epsilon * float(np.abs(output).max())

    def epsilon_in(self, dtype: str | None) -> float:
        """Relative spacing of the numbers that it computes with when it runs in `dtype`."""
        return self.epsilon if dtype in (None, self.precise) else max(self.epsilon, EPSILON[str(dtype)])

    @property
    def fine(self) -> float:
        """The epsilon for comparisons that a coarse dtype does not blur."""
        return min(self.epsilon, EPSILON["float32"])


def passed(check: str, detail: str = "", *, severity: Literal["refuse", "warn"] = "refuse") -> CheckOutcome:
    return CheckOutcome(name=check, passed=True, severity=severity, detail=detail)


def failed(check: str, detail: str, counterexample: Mapping[str, Any] | None = None) -> CheckOutcome:
    return CheckOutcome(name=check, passed=False, detail=detail[:_DETAIL], counterexample=plain(counterexample))


def warned(check: str, detail: str, counterexample: Mapping[str, Any] | None = None) -> CheckOutcome:
    found = plain(counterexample)
    return CheckOutcome(name=check, passed=False, severity="warn", detail=detail[:_DETAIL], counterexample=found)


def plain(values: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The counterexample as small JSON: numpy numbers become Python's, infinities text; parts of it may come from the
    candidate's process, so depth, lengths and texts are bounded."""
    return None if values is None else {key: _plain(value) for key, value in values.items() if value is not None}


def _plain(value: Any, depth: int = 0) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.6g}") if np.isfinite(value) else str(value)
    if isinstance(value, str):
        return value[:_TEXT]
    if isinstance(value, int | None):
        return value if value is None or abs(value) < 2**63 else "a number over 2^63"
    if depth == _DEPTH:
        return "..."
    if isinstance(value, Mapping):
        items = itertools.islice(value.items(), _ITEMS)
        return {str(key)[:_TEXT]: _plain(item, depth + 1) for key, item in items}
    return [_plain(item, depth + 1) for item in itertools.islice(value, _ITEMS)]


def raised(check: str, what: str, error: Mapping[str, Any], place: Mapping[str, Any] | None = None) -> CheckOutcome:
    """A failed check for a candidate's exception; running out of memory is a broken limit, so the check is
    `sandbox`."""
    found = {**(place or {}), **brief(error)}
    if error.get("memory"):
        return failed("sandbox", f"{check}: {what} {explain(error)}", {"reason": "memory", "during": check, **found})
    return failed(check, f"{what} {explain(error)}", found)


def explain(error: Mapping[str, Any]) -> str:
    """A candidate's exception in one line."""
    line = f" (line {error['line']}: {str(error.get('source') or '')[:200]})" if error.get("line") else ""
    return f"{str(error.get('type', 'an error'))[:100]}: {str(error.get('message', ''))[:300]}{line}"


def brief(error: Mapping[str, Any]) -> dict[str, Any]:
    """What of a candidate's exception goes into a counterexample."""
    return {
        "error": error.get("type"),
        "message": str(error.get("message", ""))[:500],
        "line": error.get("line"),
        "source": error.get("source"),
    }


def not_finite(output: np.ndarray) -> dict[str, Any]:
    """Where the first NaN or infinity is."""
    bad = ~np.isfinite(output)
    return {"not_finite": int(bad.sum()), "first_position": int(np.argmax(bad.any(axis=(0, 2))))}
