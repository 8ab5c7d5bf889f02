"""Policies: fixed, heuristic and learned. Training is in `resq_rl.policies.ppo`, which needs stable-baselines3."""

from resq_rl.policies.adaptation import AdaptiveRunner
from resq_rl.policies.clairvoyant import Clairvoyant
from resq_rl.policies.fixed import (
    DynamicResQ,
    FrameMagnitude,
    GroupThresholds,
    PerFrame,
    RandomLevels,
    SkipGate,
    StaticResQ,
    periodic,
)
from resq_rl.policies.gradient import GradientSettings, LearnedThresholds, learn_thresholds
from resq_rl.policies.learned import LearnedPolicy
from resq_rl.policies.oracle import (
    Schedule,
    best_schedule,
    best_schedule_within,
    measure_on_tables,
    measure_schedules,
    oracle_measurement,
)
from resq_rl.policies.rate_control import RateControl
from resq_rl.policies.runner import RunCost, Runner
from resq_rl.policies.search import Tried, best_for, evolve_thresholds, search_group_thresholds
from resq_rl.policies.tuning import (
    best_of,
    best_policies,
    thinned,
)
from resq_rl.policies.weight_bits import choose_weight_bits

__all__ = [
    "AdaptiveRunner",
    "Clairvoyant",
    "DynamicResQ",
    "FrameMagnitude",
    "GradientSettings",
    "GroupThresholds",
    "LearnedPolicy",
    "LearnedThresholds",
    "PerFrame",
    "RandomLevels",
    "RateControl",
    "RunCost",
    "Runner",
    "Schedule",
    "SkipGate",
    "StaticResQ",
    "Tried",
    "best_for",
    "best_of",
    "best_policies",
    "best_schedule",
    "best_schedule_within",
    "choose_weight_bits",
    "evolve_thresholds",
    "learn_thresholds",
    "measure_on_tables",
    "measure_schedules",
    "oracle_measurement",
    "periodic",
    "search_group_thresholds",
    "thinned",
]
