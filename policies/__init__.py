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
from resq_rl.policies.oracle import Schedule, Scheduled, best_schedule, oracle_measurement
from resq_rl.policies.search import Searched, search_group_thresholds
from resq_rl.policies.tuning import (
    best_of,
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
    "Schedule",
    "Scheduled",
    "Searched",
    "SkipGate",
    "StaticResQ",
    "best_of",
    "best_policies",
    "best_schedule",
    "dynamic_resq_settings",
    "oracle_measurement",
    "periodic",
    "search_group_thresholds",
    "skip_gate_settings",
    "static_resq_settings",
]
