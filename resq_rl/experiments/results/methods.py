"""The methods of a comparison: their keys in files, how figures show them, and how they are tuned and compared.

A baseline whose settings are tuned on validation clips is added by one entry here, beside its policy in
`resq_rl.policies`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Final, TypeVar

from resq_rl.envs import Policy
from resq_rl.experiments.config.settings import HeuristicSettings, Settings
from resq_rl.policies import (
    DynamicResQ,
    FrameMagnitude,
    GroupThresholds,
    LearnedPolicy,
    RandomLevels,
    RateControl,
    SkipGate,
    StaticResQ,
)
from resq_rl.quantization import Reference

__all__ = [
    "LEARNED",
    "METHODS",
    "SCENE_CHANGE",
    "Method",
    "controlled",
    "learned_method",
    "method_of",
    "scene_changes",
    "tuned_methods",
]

# Policies whose keyframes can follow a rule for changes of scene.
Timed = TypeVar("Timed", DynamicResQ, GroupThresholds, RateControl, LearnedPolicy)

Candidates = Callable[[Settings], Sequence[Policy]]
Refinement = Callable[[HeuristicSettings, Any], Sequence[Policy]]


@dataclass(frozen=True)
class Method:
    """One row of a comparison.

    Attributes:
        key: name in `comparison.json`.
        title: name in tables and figures.
        colour: hexadecimal RGB. The colours are Okabe and Ito's palette, a grey, and Paul Tol's wine, indigo, teal,
            purple, green and olive, which the colour-blind can tell apart.
        marker: Matplotlib's code of the marker.
        candidates: the policies that are tried on the validation clips, for a method that is tuned so.
        refinements: by name, for each of the best candidates, what is tried next.
        frame_level: whether it takes one decision for a frame (True), a decision for each region or pixel (False), or
            either (None).
        against: keys of the methods with which it is compared, by Bjontegaard delta.
    """

    key: str
    title: str
    colour: str
    marker: str
    candidates: Candidates | None = None
    refinements: tuple[tuple[str, Refinement], ...] = ()
    frame_level: bool | None = None
    against: tuple[str, ...] = ()


def _references(settings: Settings) -> tuple[Reference, ...]:
    """The references to tune over; frame-level decisions are tabulated against the keyframe alone."""
    return ("keyframe",) if _is_frame_level(settings) else settings.heuristic.references


def _static_resq(settings: Settings) -> list[StaticResQ]:
    levels = range(len(settings.quantization.levels))
    chosen = product(_references(settings), settings.heuristic.intervals, levels)
    return [StaticResQ(reference, interval, level=level) for reference, interval, level in chosen]


def _skip_gate(settings: Settings) -> list[SkipGate]:
    heuristic, levels = settings.heuristic, len(settings.quantization.levels)
    chosen = product(heuristic.references, heuristic.intervals, heuristic.taus)
    return [SkipGate(reference, interval, tau=tau, levels=levels) for reference, interval, tau in chosen]


def _random(settings: Settings) -> list[RandomLevels]:
    heuristic, levels = settings.heuristic, len(settings.quantization.levels)
    chosen = product(heuristic.references, heuristic.intervals)
    return [RandomLevels(reference, interval, levels=levels, seed=settings.seed) for reference, interval in chosen]


def _dynamic_resq(settings: Settings) -> list[DynamicResQ]:
    heuristic = settings.heuristic
    chosen = product(heuristic.references, heuristic.intervals, heuristic.taus)
    return [DynamicResQ(reference, interval, tau=tau, kappa=heuristic.kappa) for reference, interval, tau in chosen]


def _frame_magnitude(settings: Settings) -> list[FrameMagnitude]:
    heuristic = settings.heuristic
    chosen = product(heuristic.intervals, heuristic.frame_taus, (*heuristic.scene_changes, math.inf))
    return [
        FrameMagnitude("keyframe", interval, tau=tau, kappa=heuristic.frame_kappa, scene_change=scene_change)
        for interval, tau, scene_change in chosen
    ]


def _other_kappas(heuristic: HeuristicSettings, policy: DynamicResQ) -> list[DynamicResQ]:
    return [replace(policy, kappa=kappa) for kappa in heuristic.other_kappas]


def scene_changes(heuristic: HeuristicSettings, policy: Timed) -> list[Timed]:
    """The policy with every other rule for changes of scene; none where it decides on keyframes itself."""
    if isinstance(policy, LearnedPolicy) and policy.decides_keyframes:
        return []
    rules = (math.inf, *heuristic.scene_changes)
    return [replace(policy, scene_change=rule) for rule in rules if rule != policy.scene_change]


def _rate_control(settings: Settings) -> list[RateControl]:
    heuristic = settings.heuristic
    chosen = product(heuristic.references, heuristic.taus, _GAINS)
    return [
        RateControl(reference, taus=(tau,), kappa=heuristic.kappa, integral=integral, proportional=proportional)
        for reference, tau, (integral, proportional) in chosen
    ]


def controlled(policy: GroupThresholds) -> list[RateControl]:
    """Static thresholds under a rate controller."""
    return [
        RateControl(policy.reference, taus=policy.taus, kappa=policy.kappa, integral=_GAINS[0][0], fill=fill)
        for fill in _FILLS
    ]


def _fills(_: HeuristicSettings, policy: RateControl) -> list[RateControl]:
    return [replace(policy, fill=fill) for fill in _FILLS]


# Integral and proportional gains of a rate controller, and how full it keeps the bucket.
_GAINS: Final = ((1.0, 0.0), (1.0, 0.5), (3.0, 0.0), (3.0, 0.5))
_FILLS: Final = (0.15, 0.6)
SCENE_CHANGE: Final[tuple[str, Refinement]] = ("scene change", scene_changes)
# With which learned policies are compared, the most important first.
_BASELINES: Final = (
    "dynamic_resq",
    "rate_control",
    "searched_thresholds",
    "random_search",
    "searched_by_layer",
    "cma_es",
    "gradient_thresholds",
    "frame_magnitude",
    "static_resq",
)
# In the order of the report, weakest to strongest.
METHODS: Final = (
    Method("per_frame", "per-frame", "#000000", "s"),
    Method("static_resq", "static ResQ", "#E69F00", "^", _static_resq),
    Method("skip_gate", "skip gate", "#F0E442", "v", _skip_gate, frame_level=False),
    Method("random", "random", "#999999", "X", _random, frame_level=False),
    Method(
        "dynamic_resq",
        "Dynamic ResQ",
        "#0072B2",
        "o",
        _dynamic_resq,
        refinements=(("kappa", _other_kappas), SCENE_CHANGE),
        frame_level=False,
    ),
    Method(
        "rate_control",
        "rate control",
        "#AA4499",
        "H",
        _rate_control,
        refinements=(("fill", _fills), SCENE_CHANGE),
        frame_level=False,
    ),
    Method("frame_magnitude", "frame magnitude", "#56B4E9", "h", _frame_magnitude, frame_level=True),
    Method("searched_thresholds", "searched thresholds", "#009E73", "D"),
    Method("random_search", "random search", "#882255", "<"),
    Method("searched_by_layer", "searched by layer", "#117733", "8"),
    Method("cma_es", "CMA-ES", "#999933", "p"),
    Method("gradient_thresholds", "gradient thresholds", "#332288", ">"),
    Method("ppo", "PPO", "#D55E00", "*", against=_BASELINES),
    Method("gradient_policy", "gradient policy", "#44AA99", "d", against=_BASELINES),
    Method("oracle", "oracle", "#CC79A7", "P", against=("searched_thresholds",)),
)
# The key of learned policies by their trainer; a comparison has one of them.
LEARNED: Final = {"ppo": "ppo", "gradient": "gradient_policy"}
_BY_KEY: Final = {method.key: method for method in METHODS}


def method_of(key: str) -> Method:
    """The method of a key; an unknown key, such as that of a user's own method, gets its words as title and a grey."""
    return _BY_KEY.get(key, Method(key, key.replace("_", " "), "#6E7781", "."))


def learned_method(fronts: Mapping[str, Sequence[Any]]) -> str:
    """The key of the learned policies in fronts by method; PPO's where there are none."""
    return next((key for key in LEARNED.values() if fronts.get(key)), LEARNED["ppo"])


def tuned_methods(settings: Settings) -> list[Method]:
    """The methods that are tuned on validation clips for the decisions that the settings ask for."""
    frame_level, budget = _is_frame_level(settings), settings.environment.budget
    left_out = () if budget is not None and budget.mean is not None else ("rate_control",)
    return [
        m
        for m in METHODS
        if m.candidates is not None and m.frame_level in (None, frame_level) and m.key not in left_out
    ]


def _is_frame_level(settings: Settings) -> bool:
    return settings.environment.id == "resq_rl/FrameLevel-v0"
