"""Environments over a batched simulator of ResQ-quantized perception."""

from resq_rl.envs.actions import DEFAULT_THRESHOLDS, ActionKind, ActionScheme, Agents
from resq_rl.envs.batched import BatchedEnvironment, EpisodeSettings, Transition
from resq_rl.envs.clips import AccuracySource, ClipStore, ErrorWeighting
from resq_rl.envs.environments import (
    FrameBits,
    FrameLevel,
    RegionBits,
    RegionThresholds,
    ResQEnv,
    ResQVectorEnv,
    default_world,
    register,
)
from resq_rl.envs.measure import FrameView, Measurement, Policy, Trace, frames_of, measure, trace
from resq_rl.envs.observation import FRAME_FEATURES, Observation, region_features
from resq_rl.envs.simulator import Decision, FrameResult, Simulator
from resq_rl.envs.table import ResponseTable, TableSimulator, respond
from resq_rl.envs.table_cache import TableCache

__all__ = [
    "DEFAULT_THRESHOLDS",
    "FRAME_FEATURES",
    "AccuracySource",
    "ActionKind",
    "ActionScheme",
    "Agents",
    "BatchedEnvironment",
    "ClipStore",
    "Decision",
    "EpisodeSettings",
    "ErrorWeighting",
    "FrameBits",
    "FrameLevel",
    "FrameResult",
    "FrameView",
    "Measurement",
    "Observation",
    "Policy",
    "RegionBits",
    "RegionThresholds",
    "ResQEnv",
    "ResQVectorEnv",
    "ResponseTable",
    "Simulator",
    "TableCache",
    "TableSimulator",
    "Trace",
    "Transition",
    "default_world",
    "frames_of",
    "measure",
    "region_features",
    "register",
    "respond",
    "trace",
]

register()
