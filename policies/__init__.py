"""Policies: fixed, heuristic and learned. Training is in `resq_rl.policies.ppo`, which needs stable-baselines3."""

from resq_rl.policies.fixed import (
    DynamicResQ,
    GroupThresholds,
    PerFrame,
    RandomLevels,
    SkipGate,
    StaticResQ,
    periodic,
)
from resq_rl.policies.learned import LearnedPolicy
from resq_rl.policies.tuning import (
    best_policies,
    dynamic_resq_settings,
    skip_gate_settings,
    static_resq_settings,
)

__all__ = [
    "DynamicResQ",
    "GroupThresholds",
    "LearnedPolicy",
    "PerFrame",
    "RandomLevels",
    "SkipGate",
    "StaticResQ",
    "best_policies",
    "dynamic_resq_settings",
    "periodic",
    "skip_gate_settings",
    "static_resq_settings",
]
