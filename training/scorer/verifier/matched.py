"""Matched: parameters and FLOPs a token beside those of the profile's baseline, for the record.

Proves nothing on its own and always passes: training fits every model to the baseline's number of parameters, and
ends what has no room. Sets facts.parameter_ratio and facts.flops_ratio, None where the baseline is not known. The
parameters are those that construct counted at the profile's width; the FLOPs are those that cost counted (inside).
"""

from __future__ import annotations

from common.records import CheckOutcome
from training.scorer.verifier.context import Context, passed

__all__ = ["NAME", "run"]

NAME = "matched"


def run(context: Context) -> list[CheckOutcome]:
    """Sets facts.parameter_ratio and facts.flops_ratio."""
    options, facts = context.options, context.facts
    ratios: dict[str, float | None] = {}
    said = []
    for name, own, base, what in (
        ("parameter_ratio", facts.get("mixer_parameters"), options.baseline_mixer_parameters, "parameters"),
        ("flops_ratio", facts.get("flops_per_token"), options.baseline_flops_per_token, "FLOPs a token"),
    ):
        ratios[name] = round(own / base, 4) if own is not None and base else None
        beside = f" ({ratios[name]:.2f} of the baseline's)" if ratios[name] is not None else ""
        said.append(f"{what} unknown" if own is None else f"{own:,.0f} {what}{beside}")
    facts.update(ratios)
    return [passed(NAME, f"{', '.join(said)} at width {options.profile_width}")]
