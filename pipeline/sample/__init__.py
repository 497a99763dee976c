"""Sample: which architecture is evolved next, and which others the planner sees."""

from pipeline.sample.context import build_context, relative, sample
from pipeline.sample.policies import POLICIES, RankPolicy, SamplingPolicy, Selection, UniformPolicy

__all__ = [
    "POLICIES",
    "RankPolicy",
    "SamplingPolicy",
    "Selection",
    "UniformPolicy",
    "build_context",
    "relative",
    "sample",
]
