"""Environments over streams of clips that a ResQ-quantized network runs."""

from resq_rl.envs.actions import ACTIONS, DEFAULT_THRESHOLDS, Action, ActionKind, ActionScheme, Agents
from resq_rl.envs.batched import BatchedEnvironment, EpisodeSettings, Transition
from resq_rl.envs.engine import Conditions, Decision, Engine, FrameInputs, FrameResult
from resq_rl.envs.environments import (
    FrameBits,
    FrameLevel,
    RegionBits,
    RegionThresholds,
    ResQEnv,
    ResQVectorEnv,
    default_problem,
    register,
)
from resq_rl.envs.measure import Measurement, Trace, measure, trace
from resq_rl.envs.network_engine import NetworkEngine
from resq_rl.envs.observation import FRAME_FEATURES, Observation, region_features
from resq_rl.envs.problem import AccuracySource, ErrorWeighting, Problem
from resq_rl.envs.streams import FrameView, Policy, StreamResult, Streams
from resq_rl.envs.table import ResponseTable, respond
from resq_rl.envs.table_cache import tabulate
from resq_rl.envs.table_engine import TableEngine

__all__ = [
    "ACTIONS",
    "DEFAULT_THRESHOLDS",
    "FRAME_FEATURES",
    "AccuracySource",
    "Action",
    "ActionKind",
    "ActionScheme",
    "Agents",
    "BatchedEnvironment",
    "Conditions",
    "Decision",
    "Engine",
    "EpisodeSettings",
    "ErrorWeighting",
    "FrameBits",
    "FrameInputs",
    "FrameLevel",
    "FrameResult",
    "FrameView",
    "Measurement",
    "NetworkEngine",
    "Observation",
    "Policy",
    "Problem",
    "RegionBits",
    "RegionThresholds",
    "ResQEnv",
    "ResQVectorEnv",
    "ResponseTable",
    "StreamResult",
    "Streams",
    "TableEngine",
    "Trace",
    "Transition",
    "default_problem",
    "measure",
    "region_features",
    "register",
    "respond",
    "tabulate",
    "trace",
]

register()
