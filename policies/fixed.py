"""Policies that are set, not learned: fixed, random, and the heuristics."""

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from resq_rl.envs import Decision, FrameView, Observation
from resq_rl.envs.observation import FRAME_FEATURES
from resq_rl.errors import PolicyError
from resq_rl.quantization import DEFAULT_KAPPA, LevelField, Reference, ThresholdField

__all__ = [
    "DynamicResQ",
    "FrameMagnitude",
    "GroupThresholds",
    "PerFrame",
    "RandomLevels",
    "SkipGate",
    "StaticResQ",
    "check_timing",
    "periodic",
    "rule_from_json",
    "rule_to_json",
    "scene_changed",
]


def periodic(age: Int64[Tensor, " b"], interval: int) -> Bool[Tensor, " b"]:
    """Which clips are due a keyframe, with one every `interval` frames; 0 means only the first frame.

    Args:
        age: frames since each clip's keyframe.
    """
    return age + 1 >= interval if interval else torch.zeros_like(age, dtype=torch.bool)


def scene_changed(observation: Observation, least: float) -> Bool[Tensor, " b"]:
    """Which clips have a `frame_residual_mean` (see `resq_rl.envs.observation`) above `least`, as after a cut."""
    return _frame_residual(observation) > least


def check_timing(interval: int, scene_change: float) -> None:
    """Raise PolicyError unless keyframes can follow an interval and a rule for changes of scene."""
    if interval < 0:
        raise PolicyError(f"The keyframe interval must be 0 (first frame only) or more, got {interval}.")
    if not scene_change > 0:
        raise PolicyError(f"The mean residual of a change of scene must be positive, or infinite, got {scene_change}.")


def rule_to_json(scene_change: float) -> float | None:
    """A rule for changes of scene as files hold it: null for none, since JSON has no infinity."""
    return scene_change if scene_change < math.inf else None


def rule_from_json(value: float | None) -> float:
    """The rule that `rule_to_json` gave."""
    return math.inf if value is None else value


def _frame_residual(observation: Observation) -> Float[Tensor, " b"]:
    return observation.frame[:, FRAME_FEATURES.index("frame_residual_mean")]


@dataclass(frozen=True)
class _Free:
    """A policy that costs nothing to run and is the same for every trade-off.

    Attributes:
        reference: what residuals are taken against.
        interval: frames between keyframes; 0 for the first only.
        scene_change: mean residual above which a frame runs as a keyframe too (`scene_changed`).
    """

    reference: Reference = "previous"
    interval: int = 8
    scene_change: float = field(default=math.inf, kw_only=True)
    trade_off: float = field(default=1.0, init=False, repr=False)
    trade_off_range: tuple[float, float] = field(default=(1.0, 1.0), init=False, repr=False)
    macs: int = field(default=0, init=False, repr=False)
    bits: int = field(default=8, init=False, repr=False)

    def __post_init__(self) -> None:
        check_timing(self.interval, self.scene_change)

    @property
    def settings(self) -> dict[str, object]:
        """Fields that identify the policy."""
        rule = {"scene_change": self.scene_change} if self.scene_change < math.inf else {}
        return {"reference": self.reference, "interval": self.interval, **rule}

    def _refresh(self, view: FrameView) -> Bool[Tensor, " b"]:
        due = periodic(view.age, self.interval)
        if self.scene_change == math.inf:  # nothing need be observed then
            return due
        return due | scene_changed(view.observation, self.scene_change)


@dataclass(frozen=True)
class PerFrame(_Free):
    """Every frame is a keyframe: per-frame quantization, W8A8 under the default configuration."""

    interval: int = 1

    def decide(self, view: FrameView) -> Decision:
        """Refresh everywhere."""
        field = LevelField.constant(0, view.clips, view.groups)
        return Decision(torch.ones(view.clips, dtype=torch.bool), field)


@dataclass(frozen=True)
class StaticResQ(_Free):
    """Static ResQ: a keyframe every `interval` frames, the same level everywhere in between."""

    level: int = 2

    @property
    def settings(self) -> dict[str, object]:
        """Fields that identify the policy."""
        return super().settings | {"level": self.level}

    def decide(self, view: FrameView) -> Decision:
        """The same level everywhere."""
        return Decision(self._refresh(view), LevelField.constant(self.level, view.clips, view.groups))


@dataclass(frozen=True)
class _Magnitude(_Free):
    """Thresholds tau * kappa_j on a magnitude."""

    tau: float = 1.0
    kappa: tuple[float, ...] = DEFAULT_KAPPA

    @property
    def settings(self) -> dict[str, object]:
        """Fields that identify the policy."""
        return super().settings | {"tau": self.tau, "kappa": list(self.kappa)}


@dataclass(frozen=True)
class DynamicResQ(_Magnitude):
    """Dynamic ResQ (arXiv 2308.09511): levels per pixel and layer from the residual's magnitude, one tau for all."""

    def decide(self, view: FrameView) -> Decision:
        """One threshold everywhere."""
        thresholds = ThresholdField.constant(self.tau, view.clips, view.groups, kappa=self.kappa)
        return Decision(self._refresh(view), thresholds)


@dataclass(frozen=True)
class FrameMagnitude(_Magnitude):
    """The magnitude-threshold rule for a whole frame: its level from its mean residual, and keyframes likewise.

    A frame with `frame_residual_mean` m (see `resq_rl.envs.observation`) takes level #{j : m > tau * kappa_j}.
    """

    tau: float = 0.2
    kappa: tuple[float, ...] = (0.5, 1.0, 1.4)

    def decide(self, view: FrameView) -> Decision:
        """One level for each frame."""
        level = (_frame_residual(view.observation)[:, None] > self.tau * torch.tensor(self.kappa)).sum(1)
        return Decision(self._refresh(view), LevelField(level[:, None, None, None].expand(-1, view.groups, 1, 1)))


@dataclass(frozen=True)
class SkipGate(_Free):
    """A gate between nothing and the most bits at each pixel, as in Skip-Convolutions (arXiv 2104.11487)."""

    tau: float = 1.0
    levels: int = 4

    @property
    def settings(self) -> dict[str, object]:
        """Fields that identify the policy."""
        return super().settings | {"tau": self.tau}

    def decide(self, view: FrameView) -> Decision:
        """All thresholds in one place: a pixel is skipped or takes the finest level."""
        gate = ThresholdField.constant(self.tau, view.clips, view.groups, kappa=(1.0,) * (self.levels - 1))
        return Decision(self._refresh(view), gate)


@dataclass(frozen=True)
class GroupThresholds(_Free):
    """Static thresholds, one per layer group or one per layer (operator call)."""

    taus: tuple[float, ...] = ()
    kappa: tuple[float, ...] = DEFAULT_KAPPA

    @property
    def settings(self) -> dict[str, object]:
        """Fields that identify the policy."""
        return super().settings | {"taus": list(self.taus), "kappa": list(self.kappa)}

    def decide(self, view: FrameView) -> Decision:
        """The same thresholds in every region and frame."""
        if len(self.taus) not in (view.groups, view.layers):
            raise PolicyError(
                f"{view.groups} layer groups, or {view.layers} layers, need as many thresholds, got {len(self.taus)}."
            )
        taus = torch.tensor(self.taus)[None, :, None, None].expand(view.clips, -1, 1, 1)
        return Decision(self._refresh(view), ThresholdField(taus, self.kappa))


@dataclass(frozen=True)
class RandomLevels(_Free):
    """A level drawn at random for every layer group and region, with keyframes at the interval.

    Its draws go on from clip to clip; a copy made by `dataclasses.replace` begins them anew.
    """

    levels: int = 4
    seed: int = 0
    _generator: torch.Generator = field(default_factory=torch.Generator, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._generator.manual_seed(self.seed)

    @property
    def settings(self) -> dict[str, object]:
        """Fields that identify the policy."""
        return super().settings | {"seed": self.seed}

    def decide(self, view: FrameView) -> Decision:
        """Uniform over the levels."""
        levels = torch.randint(self.levels, (view.clips, view.groups, *view.grid), generator=self._generator)
        return Decision(self._refresh(view), LevelField(levels))
