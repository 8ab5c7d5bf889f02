"""Policies: fixed, heuristic and learned."""

from resq_rl.policies.fixed import (
    DynamicResQ,
    GroupThresholds,
    PerFrame,
    RandomLevels,
    SkipGate,
    StaticResQ,
    periodic,
)

__all__ = [
    "DynamicResQ",
    "GroupThresholds",
    "PerFrame",
    "RandomLevels",
    "SkipGate",
    "StaticResQ",
    "periodic",
]
