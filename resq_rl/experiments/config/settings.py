"""All settings of a command as frozen dataclasses, made from Hydra's config at the boundary.

The values and their defaults live in the YAML groups of `resq_rl.configs`; the classes here say what each may
be. A group that makes an object (`video`, `model`, `task`) is a `Target`: its `_target_` names a class or
function and its other keys are arguments.
"""

import itertools
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from resq_rl.errors import SettingsError
from resq_rl.experiments.config.conversion import Bounds, check_bounds, convert_dataclass
from resq_rl.experiments.config.targets import Target, make_target
from resq_rl.perception import PretrainSettings

__all__ = [
    "BenchmarkSettings",
    "EnvironmentSettings",
    "ExportSettings",
    "HeuristicSettings",
    "QuantizationSettings",
    "RunningSettings",
    "Settings",
    "Target",
    "TrackingSettings",
    "TrainingSettings",
    "make_settings",
    "plain",
]

Bits = Annotated[int, Bounds(at_least=2, at_most=16)]
Count = Annotated[int, Bounds(at_least=1)]
Positive = Annotated[float, Bounds(above=0)]
Share = Annotated[float, Bounds(at_least=0, at_most=1)]
LayerKind = Literal["conv", "depthwise", "grouped", "linear", "pointwise", "transposed"]
Reference = Literal["previous", "keyframe"]
EnvironmentId = Literal[
    "resq_rl/FrameBits-v0", "resq_rl/FrameLevel-v0", "resq_rl/RegionBits-v0", "resq_rl/RegionThresholds-v0"
]


class _Group:
    """A settings group; its numbers are checked against their `Bounds` when it is made."""

    _prefix: ClassVar[str] = ""

    def __post_init__(self) -> None:
        check_bounds(self, self._prefix)
        self._check()

    def _check(self) -> None:
        """Check what one annotation cannot say."""

    def _refuse(self, field: str, constraint: str) -> SettingsError:
        value = getattr(self, field)
        shown = list(value) if isinstance(value, tuple) else value
        return SettingsError(f"Setting '{self._prefix}{field}' must be {constraint}; received {shown!r}.")

    def _check_increasing(self, field: str) -> None:
        values = getattr(self, field)
        if not values or any(a >= b for a, b in itertools.pairwise(values)):
            raise self._refuse(field, "a list of increasing values, at least one")


@dataclass(frozen=True)
class QuantizationSettings(_Group):
    """How the network is quantized.

    Attributes:
        key_weight_bits, key_activation_bits: bits of a keyframe.
        levels: activation bits that a residual may take, increasing; 0 skips.
        residual_weight_bits: "auto" (from calibration), one width, or one per kind of layer.
        weight_tolerance: for "auto", by what factor the squared error of the output may grow over 8-bit weights.
        weight_rounding: "nearest", or "second_order": the weights of a channel together, from calibration clips.
        range_estimator: how ranges come from calibration clips.
        groups: "auto", or patterns of layer names by name of the group.
        bops_convention: what one multiplication of w by a bits costs.
        calibration_clips: how many training clips are used.
        compile: run the simulation's elementwise work in C, where the machine has a compiler; results stay the same.
    """

    _prefix: ClassVar[str] = "quantization."

    key_weight_bits: Bits
    key_activation_bits: Bits
    levels: Annotated[tuple[int, ...], Bounds(at_least=0, at_most=16)]
    residual_weight_bits: Annotated[Literal["auto"] | int | Mapping[LayerKind, int], Bounds(at_least=2, at_most=16)]
    weight_tolerance: Annotated[float, Bounds(at_least=1)]
    weight_rounding: Literal["nearest", "second_order"]
    range_estimator: Literal["least_squares", "min_max", "percentile"]
    groups: Literal["auto"] | Mapping[str, tuple[str, ...]]
    bops_convention: Literal["product", "max", "clipped"]
    calibration_clips: Count
    compile: bool

    def _check(self) -> None:
        self._check_increasing("levels")
        if 1 in self.levels:
            raise self._refuse("levels", "free of 1: a symmetric quantizer needs at least 2 bits")


@dataclass(frozen=True)
class EnvironmentSettings(_Group):
    """What a policy decides and what it is rewarded for.

    Attributes:
        id: the registered environment.
        agents: "region" (one agent per region and clip) or "frame" (one per clip).
        grid: regions down and across.
        clips_per_batch: clips that one forward pass runs.
        reference: what residuals are taken against.
        keyframe_intervals: frames from one forced keyframe to the next, of which region agents meet one per episode in
            training and the best for each trade-off is chosen on validation; 0 for none but the first.
        accuracy: against labels, or agreement with the float network.
        weighting: what a wrong pixel costs: "iou" by the rarity of the classes it confuses, "pixel" the same for all.
        trade_off: lambda of the reward: one number, a range to draw from log-uniformly per episode, or "auto" for a
            range chosen on training clips.
        thresholds: what a threshold action may choose, increasing.
        ignored: features of the observation that agents see as 0, or patterns of their names.
    """

    _prefix: ClassVar[str] = "environment."

    id: EnvironmentId
    agents: Literal["region", "frame"]
    grid: Annotated[tuple[int, int], Bounds(at_least=1)]
    clips_per_batch: Count
    reference: Reference
    keyframe_intervals: Annotated[tuple[int, ...], Bounds(at_least=0)]
    accuracy: Literal["labels", "teacher"]
    weighting: Literal["iou", "pixel"]
    trade_off: Annotated[Literal["auto"] | float | tuple[float, float], Bounds(above=0)]
    thresholds: Annotated[tuple[float, ...], Bounds(above=0)]
    ignored: tuple[str, ...]

    def _check(self) -> None:
        self._check_increasing("thresholds")
        if not self.keyframe_intervals:
            raise self._refuse("keyframe_intervals", "a list of at least one value")
        if isinstance(self.trade_off, tuple) and self.trade_off[0] > self.trade_off[1]:
            raise self._refuse("trade_off", "a number or an increasing range [low,high]")
        if self.agents == "region" and self.id in ("resq_rl/FrameBits-v0", "resq_rl/FrameLevel-v0"):
            raise self._refuse("agents", f"'frame' with {self.id}, which has no regions")

    @property
    def trade_off_range(self) -> tuple[float, float]:
        """`trade_off` as (low, high), both ends equal for a single number.

        Raises:
            SettingsError: it is still "auto".
        """
        if self.trade_off == "auto":
            raise SettingsError("environment.trade_off is 'auto' and was not chosen yet: give a number or a range.")
        return self.trade_off if isinstance(self.trade_off, tuple) else (self.trade_off, self.trade_off)


@dataclass(frozen=True)
class TrainingSettings(_Group):
    """Training by PPO.

    Attributes:
        frames: environment frames of one training run (a batch of 32 clips spends 32 per step).
        keyframe_frames: environment frames after those, in which a second small policy learns when to run keyframes
            while the region agents stay as they are; 0 for keyframes at fixed intervals only.
        seeds: one training run each.
        n_steps, batch_size, epochs, learning_rate, gamma, gae_lambda, ent_coef, clip_range: as in
            stable-baselines3.
        hidden: units of the policy network's hidden layers.
        policy_bits: width at which the policy network is charged.
        reward_scale: factor of every reward.
        warm_start: as what the policy begins, with the same choices in all regions: "best" for each lambda, of all that
            was tried; "even", constant choices from most BOPs at the lowest lambda to fewest at the highest, which
            suits networks for which all between full bits and skipping looks bad at first; or "none", at random.
        search_frames: environment frames that go, besides, into searching a threshold for each layer group for "best"
            (of region agents that choose thresholds; rounded up to whole settings); with 0 it knows constant choices
            only.
        checkpoint_every: rollouts between checkpoints.
        trade_offs: how many values of lambda, spread over its range, make the front.
        resume: folder of the run to go on with, of `train`, `compare` or `pretrain`; or None.
    """

    _prefix: ClassVar[str] = "training."

    frames: Count
    keyframe_frames: Annotated[int, Bounds(at_least=0)]
    seeds: Annotated[tuple[int, ...], Bounds(at_least=0)]
    n_steps: Count
    batch_size: Count
    epochs: Count
    learning_rate: Positive
    gamma: Share
    gae_lambda: Share
    ent_coef: Annotated[float, Bounds(at_least=0)]
    clip_range: Positive
    hidden: Annotated[tuple[int, ...], Bounds(at_least=1)]
    policy_bits: Annotated[int, Bounds(at_least=2, at_most=32)]
    reward_scale: Positive
    warm_start: Literal["best", "even", "none"]
    search_frames: Annotated[int, Bounds(at_least=0)]
    checkpoint_every: Count
    trade_offs: Count
    resume: str | None

    def spread(self, trade_off_range: tuple[float, float]) -> list[float]:
        """`trade_offs` values of lambda over a range, evenly by ratio; one where the range is a single number."""
        low, high = trade_off_range
        return [float(t) for t in np.geomspace(low, high, self.trade_offs if high > low else 1)]

    def _check(self) -> None:
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise self._refuse("seeds", "a list of different seeds, at least one")


@dataclass(frozen=True)
class HeuristicSettings(_Group):
    """The settings of Dynamic ResQ that are tried on the validation clips: all combinations of the lists.

    Attributes:
        intervals: frames from one keyframe to the next; 0 for none but the first.
        references: what residuals are taken against.
        taus: thresholds, in calibrated standard deviations of a layer's residual.
        kappa: factor of tau for each level above the lowest, increasing; also of threshold actions.
        other_kappas: tried beside `kappa` with the settings that were best with it.
        scene_changes: mean residuals of a frame (square root, 0..1) above which it runs as a keyframe, tried likewise.
        frame_taus: for frame-level decisions, mean residuals of a frame (square root, 0..1) at which it takes a higher
            level.
        frame_kappa: their multipliers by level.
        searches: how static thresholds per layer group are searched, with as many frames as the training of one policy.
        clairvoyant_points: values of lambda for which a choice by region that knows the errors ahead is measured beside
            the greedy search; each takes (fields x horizon) times as long as a policy.
        clairvoyant_horizon: frames it looks ahead; 0 for all to the end of the clip.
    """

    _prefix: ClassVar[str] = "heuristic."

    intervals: Annotated[tuple[int, ...], Bounds(at_least=0)]
    references: tuple[Reference, ...]
    taus: Annotated[tuple[float, ...], Bounds(above=0)]
    kappa: Annotated[tuple[float, ...], Bounds(above=0)]
    other_kappas: Annotated[tuple[tuple[float, ...], ...], Bounds(above=0)]
    scene_changes: Annotated[tuple[float, ...], Bounds(above=0)]
    frame_taus: Annotated[tuple[float, ...], Bounds(above=0)]
    frame_kappa: Annotated[tuple[float, ...], Bounds(above=0)]
    searches: tuple[Literal["greedy", "random"], ...]
    clairvoyant_points: Annotated[int, Bounds(at_least=0)]
    clairvoyant_horizon: Annotated[int, Bounds(at_least=0)]

    def _check(self) -> None:
        for field in ("intervals", "references", "taus", "frame_taus"):
            if not getattr(self, field):
                raise self._refuse(field, "a list of at least one value")
        self._check_increasing("kappa")
        self._check_increasing("frame_kappa")
        for other in self.other_kappas:
            if len(other) != len(self.kappa) or list(other) != sorted(other):
                raise self._refuse("other_kappas", "lists of increasing values, each as long as heuristic.kappa")


@dataclass(frozen=True)
class TrackingSettings(_Group):
    """Where runs are recorded.

    Attributes:
        enabled: record to MLflow.
        uri: the tracking server or store; None is an SQLite file in the results folder.
        experiment: name of the MLflow experiment.
        tags: tags of the run.
        parent_run: id of the MLflow run to nest under, or None.
    """

    _prefix: ClassVar[str] = "tracking."

    enabled: bool
    uri: str | None
    experiment: str
    tags: Mapping[str, str | int | float | bool]
    parent_run: str | None


@dataclass(frozen=True)
class BenchmarkSettings(_Group):
    """What `bench` measures.

    Attributes:
        batches: clips that one step runs.
        rounds: how often all that is compared runs in turn.
        processes: environments of one clip, each in a process of its own, that region agents are compared with.
        soak_steps: over which memory must not grow.
    """

    _prefix: ClassVar[str] = "benchmark."

    batches: Annotated[tuple[int, ...], Bounds(at_least=1)]
    rounds: Count
    processes: Count
    soak_steps: Count

    def _check(self) -> None:
        if not self.batches:
            raise self._refuse("batches", "a list of at least one value")


@dataclass(frozen=True)
class RunningSettings(_Group):
    """How `run` runs a policy on a video.

    Attributes:
        trade_off: lambda to decide for; None for the middle of the policy's range.
        interval: frames between keyframes, 0 for the first only; None for the policy's own timing.
        label: image of the mask that the first frame is given, for a task that begins with one; or None.
        frames: most frames to run; None for all.
        overlay: whether to write `overlay.mp4`.
        height: of the overlay in pixels.
        records: format of the file with a line per frame.
    """

    _prefix: ClassVar[str] = "running."

    trade_off: Annotated[float | None, Bounds(above=0)]
    interval: Annotated[int | None, Bounds(at_least=0)]
    label: str | None
    frames: Annotated[int | None, Bounds(at_least=1)]
    overlay: bool
    height: Annotated[int, Bounds(at_least=16, at_most=4320)]
    records: Literal["jsonl", "csv"]


@dataclass(frozen=True)
class ExportSettings(_Group):
    """What `export` writes.

    Attributes:
        formats: "portable" (safetensors and JSON), "thresholds" (a table), "onnx" (needs the extra), "mlflow".
        trade_offs: rows of the table.
        name: under which the MLflow model is registered, or None.
    """

    _prefix: ClassVar[str] = "exporting."

    formats: tuple[Literal["mlflow", "onnx", "portable", "thresholds"], ...]
    trade_offs: Count
    name: str | None

    def _check(self) -> None:
        if not self.formats:
            raise self._refuse("formats", "a list of at least one format")


@dataclass(frozen=True)
class Settings(_Group):
    """Every setting of one command.

    Attributes:
        video, model, task: made with `Target.build`.
        pretraining: how `pretrain` trains the network.
        benchmark: what `bench` measures.
        running: how `run` runs a policy.
        exporting: what `export` writes.
        policy: folder of a trained policy, for `evaluate`, `run` and `export`; or of policies by seed, which `compare`
            measures instead of training.
        trusted: whether settings that are read from the folder of a policy, or of a run to go on with, may name code
            that does not belong to the shipped options; asked for on the command line only.
        source: what `run` runs on: path of a video file or of a folder of frames, or index of a camera.
        split: clips that `compare` and `evaluate` report on.
        results: folder of all results; each run has its own folder in it.
        tables: folder where the responses of frame-level decisions are kept from one run to the next; None for nowhere.
        seed: of everything random but training runs, which have `training.seeds`.
        threads: CPU threads for tensor operations.
    """

    video: Target
    model: Target
    task: Target
    quantization: QuantizationSettings
    environment: EnvironmentSettings
    training: TrainingSettings
    heuristic: HeuristicSettings
    tracking: TrackingSettings
    pretraining: PretrainSettings
    benchmark: BenchmarkSettings
    running: RunningSettings
    exporting: ExportSettings
    policy: str | None
    trusted: bool
    source: int | str | None
    split: Literal["train", "validation", "test"]
    results: str
    tables: str | None
    seed: Annotated[int, Bounds(at_least=0)]
    threads: Count

    def _check(self) -> None:
        levels = len(self.quantization.levels)
        for name in ("kappa", "frame_kappa"):
            steps = len(getattr(self.heuristic, name))
            if steps != levels - 1:
                raise SettingsError(
                    f"Setting 'heuristic.{name}' must have one value fewer than 'quantization.levels' ({levels}); "
                    f"received {steps} values."
                )
        if self.training.keyframe_frames and self.environment.agents != "region":
            raise SettingsError(
                "Setting 'training.keyframe_frames' must be 0 with environment.agents=frame, whose agents decide on "
                f"keyframes themselves; received {self.training.keyframe_frames}."
            )
        if self.environment.id == "resq_rl/FrameLevel-v0" and self.environment.reference != "keyframe":
            raise SettingsError(
                "Setting 'environment.reference' must be keyframe with resq_rl/FrameLevel-v0: only then do a frame's "
                f"accuracy and BOPs follow from its keyframe and level; received {self.environment.reference!r}."
            )


def plain(config: DictConfig) -> dict[str, Any]:
    """The config as nested dicts, lists and numbers, interpolations resolved.

    Raises:
        SettingsError: an interpolation cannot be resolved.
    """
    try:
        container = OmegaConf.to_container(config, resolve=True, throw_on_missing=False)
    except OmegaConfBaseException as error:
        raise SettingsError(f"Cannot resolve the settings: {' '.join(str(error).split())}.") from error
    return typing.cast(dict[str, Any], container)


def make_settings(config: DictConfig | Mapping[str, Any]) -> Settings:
    """Typed, checked settings from a composed config.

    Raises:
        SettingsError: one line that names the first wrong setting and the nearest valid one.
    """
    values = plain(config) if isinstance(config, DictConfig) else dict(config)
    for name, annotation in typing.get_type_hints(Settings).items():
        if annotation is Target and name in values:
            values[name] = make_target(values[name], name)
    return typing.cast(Settings, convert_dataclass(values, Settings))
