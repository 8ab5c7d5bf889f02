"""All settings of a command as frozen dataclasses, made from Hydra's config at the boundary.

A class says what each setting of its group means, what it may be, and its default, which Hydra is given from here
(`resq_rl.experiments.config.composition`); what the library has a dataclass for, a group extends. The options in
`resq_rl.configs` change some of the defaults. A group that makes an object (`video`, `model`, `task`) is a `Target`:
its `_target_` names a class or function and its other keys are arguments.
"""

import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import AfterValidator, Field

from resq_rl.checked import Bits, Checked, Count, Increasing, NotNegative, Positive, convert_dataclass
from resq_rl.envs import DEFAULT_THRESHOLDS, AccuracySource, Agents, ErrorWeighting
from resq_rl.errors import SettingsError
from resq_rl.experiments.config.command_settings import BenchmarkSettings, ExportSettings, RunningSettings
from resq_rl.experiments.config.targets import Target, make_target
from resq_rl.perception import PretrainSettings
from resq_rl.policies import FrameMagnitude
from resq_rl.policies.ppo_settings import PPOSettings
from resq_rl.quantization import DEFAULT_KAPPA, QuantizationConfig, Reference
from resq_rl.quantization.specification.budget import BudgetSetting
from resq_rl.video import Split

__all__ = [
    "EnvironmentSettings",
    "Folder",
    "HeuristicSettings",
    "QuantizationSettings",
    "Search",
    "Settings",
    "Target",
    "TrackingSettings",
    "TrainingSettings",
    "make_settings",
    "plain",
]

Search = Literal["greedy", "random", "greedy_by_layer", "cma_es"]  # without gradients
EnvironmentId = Literal[
    "resq_rl/FrameBits-v0", "resq_rl/FrameLevel-v0", "resq_rl/RegionBits-v0", "resq_rl/RegionThresholds-v0"
]
ONE_OR_MORE = Field(min_length=1)
INCREASING = Field(min_length=1, description="a list of increasing values above 0, at least one")


def _different(values: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(values)) != len(values):
        raise ValueError("repeated")
    return values


def _ascending(limits: tuple[float, float]) -> tuple[float, float]:
    if limits[0] > limits[1]:
        raise ValueError("not ascending")
    return limits


Seeds = Annotated[
    tuple[NotNegative, ...],
    Field(min_length=1, description="a list of different seeds, at least one, each an integer of at least 0"),
    AfterValidator(_different),
]
Range = Annotated[
    tuple[Positive, Positive],
    Field(description="an increasing range [low,high] of numbers above 0"),
    AfterValidator(_ascending),
]


def _plain_text(text: str) -> str:
    if "${" in text:  # it would be an interpolation where a run's settings are read again
        raise ValueError("an interpolation")
    return text


Folder = Annotated[
    str, Field(min_length=1, description="text, the name of a folder, without ${"), AfterValidator(_plain_text)
]
Ascending = Annotated[tuple[Positive, ...], INCREASING, Increasing]


@dataclass(frozen=True)
class QuantizationSettings(QuantizationConfig):
    """How the network is quantized: beside the model's own configuration, how it is calibrated and run.

    Attributes:
        residual_weight_bits: as of `QuantizationConfig`, or "auto", chosen on calibration clips (`choose_weight_bits`).
        calibration_clips: how many training clips are used.
        compile: run the simulation's elementwise work in C, where the machine has a compiler; results stay the same.
    """

    _group: ClassVar[str] = "quantization."

    residual_weight_bits: Literal["auto"] | Bits | Mapping[str, Bits] = 4  # type: ignore[assignment] # and "auto"
    calibration_clips: Count = 16
    compile: bool = True

    def config(self, **changes: Any) -> QuantizationConfig:
        """The model's own configuration; of "auto", the 4 bits from which the choice begins."""
        start = {"residual_weight_bits": 4} if self.residual_weight_bits == "auto" else {}
        return self.part(QuantizationConfig, **(start | changes))


@dataclass(frozen=True)
class EnvironmentSettings(Checked):
    """What a policy decides and what it is rewarded for.

    Attributes:
        id: the registered environment.
        agents: "region" (one agent per region and clip) or "frame" (one per clip).
        grid: regions down and across.
        clips_per_batch: clips that one forward pass runs.
        reference: what residuals are taken against, "previous" or "keyframe".
        keyframe_intervals: frames from one forced keyframe to the next, 0 for none but the first. For region agents,
            each training episode draws one, and validation chooses the best for each trade-off. Frame agents decide on
            keyframes themselves; only the constant choices that training begins with are tried at each interval.
        accuracy: against "labels", or "teacher": agreement with the float network.
        weighting: what a wrong pixel costs in the reward: "iou" by the rarity of the classes it confuses, "pixel" the
            same for all.
        trade_off: lambda of the reward: one number, a range to draw from log-uniformly per episode, or "auto" for a
            range chosen on training clips.
        thresholds: what a threshold action may choose, increasing; 100 skips. Environments that choose bits use them
            for searched thresholds only, or not at all (FrameLevel).
        ignored: features of the observation that agents see as 0, or patterns of their names, such as
            [uncertainty, spent_*].
        budget: what the frames of every clip may cost, {peak, mean, bucket} as of `resq_rl.quantization.Budget`, in
            training, tuning and measuring alike; None for no limit.
    """

    _group: ClassVar[str] = "environment."

    id: EnvironmentId = "resq_rl/RegionThresholds-v0"
    agents: Agents = "region"
    grid: tuple[Count, Count] = (6, 10)
    clips_per_batch: Count = 32
    reference: Reference = "previous"
    keyframe_intervals: Annotated[tuple[NotNegative, ...], ONE_OR_MORE] = (16, 0)
    accuracy: AccuracySource = "labels"
    weighting: ErrorWeighting = "iou"
    trade_off: Literal["auto"] | Positive | Range = "auto"
    thresholds: Ascending = DEFAULT_THRESHOLDS
    ignored: tuple[str, ...] = ()
    budget: BudgetSetting = None

    def _check(self) -> None:
        if self.budget is not None and self.id == "resq_rl/FrameLevel-v0":
            raise SettingsError(
                f"Setting 'environment.budget' must be null with {self.id}, whose tables begin with a whole keyframe: "
                "choose environment=frame_bits, region_bits or region_thresholds."
            )
        if self.agents == "region" and self.id in ("resq_rl/FrameBits-v0", "resq_rl/FrameLevel-v0"):
            raise SettingsError(
                f"Setting 'environment.agents' must be 'frame' with {self.id}, which has no regions; received 'region'."
            )

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
class TrainingSettings(PPOSettings):
    """Training of policies; one run learns a whole range of lambda.

    Attributes:
        trainer: "ppo" (of stable-baselines3, over environment.trade_off), or "gradient": gradients through the unrolled
            network teach region agents that choose thresholds, together with the thresholds per layer from which they
            begin. They weigh BOPs against divergence from the float network, over a range of lambda of their own, and
            of the settings of PPO they know frames (one that is backpropagated counts three times), hidden and
            policy_bits.
        keyframe_frames: environment frames after `frames`, in which a second small policy learns when to run keyframes
            while the region agents stay as they are; 0 for keyframes at fixed intervals only.
        seeds: one training run each.
        reward_scale: factor of every reward.
        warm_start: where the policy begins, with the same choices in all regions: "auto" is "gradient" for region
            agents that choose thresholds, where those can be learned, else "best"; "best" begins at the best choices
            known for each lambda; "even" at constant choices, from most BOPs at the lowest lambda to fewest at the
            highest, which suits networks for which all between full bits and skipping looks bad at first; "gradient" at
            thresholds per layer that are learned by gradients, of which agents that choose thresholds then choose
            factors; "none" at random.
        search_frames: further environment frames, spent on searching a threshold for each layer group for "best" (of
            region agents that choose thresholds; rounded up to whole settings), or on learning one for each layer for
            "gradient". With 0, "auto" and "best" know constant choices only.
        trade_offs: how many values of lambda, spread over its range, make the front.
        resume: folder of the run (or sweep) to go on with, of `train`, `compare` or `pretrain`; or None.
    """

    _group: ClassVar[str] = "training."

    trainer: Literal["ppo", "gradient"] = "ppo"
    keyframe_frames: NotNegative = 0
    seeds: Seeds = (0, 1, 2)
    reward_scale: Positive = 3.0
    warm_start: Literal["auto", "best", "even", "gradient", "none"] = "auto"
    search_frames: NotNegative = 15_000
    trade_offs: Count = 8
    resume: str | None = None

    def ppo(self, **changes: Any) -> PPOSettings:
        """The settings of PPO itself."""
        return self.part(PPOSettings, **changes)

    def spread(self, trade_off_range: tuple[float, float]) -> list[float]:
        """`trade_offs` values of lambda over a range, evenly by ratio; one where the range is a single number."""
        low, high = trade_off_range
        return [float(t) for t in np.geomspace(low, high, self.trade_offs if high > low else 1)]


@dataclass(frozen=True)
class HeuristicSettings(Checked):
    """The settings of Dynamic ResQ that are tried on the validation clips: all combinations of the lists.

    Attributes:
        intervals: frames from one keyframe to the next; 0 for none but the first.
        references: what residuals are taken against.
        taus: thresholds, in calibrated standard deviations of a layer's residual.
        kappa: factor of tau for each level above the lowest, increasing; also of threshold actions.
        other_kappas: further values of kappa, tried with the settings that were best with `kappa`.
        scene_changes: mean residuals of a frame (square root, 0..1) above which it runs as a keyframe, tried with the
            settings that were best without, of learned policies too; for frame-level decisions, in all combinations.
        frame_taus: for frame-level decisions, mean residuals of a frame (square root, 0..1) at which it takes a higher
            level.
        frame_kappa: for frame-level decisions, factor of frame_taus for each level.
        searches: how static thresholds are found, each way with as many environment frames as the training of one
            policy: "greedy" or "random" search of one for each layer group; "greedy_by_layer", the evolution strategy
            "cma_es" or "gradient" descent for one for each layer, which needs a task that tells how far two outputs
            diverge.
        clairvoyant_points: values of lambda for which an oracle by region, which knows the errors ahead, is measured
            beside the greedy search; each takes (fields x horizon) times as long as a policy.
        clairvoyant_horizon: frames that this oracle looks ahead; 0 for all to the end of the clip.
    """

    _group: ClassVar[str] = "heuristic."

    intervals: Annotated[tuple[NotNegative, ...], ONE_OR_MORE] = (8, 16, 0)
    references: Annotated[tuple[Reference, ...], ONE_OR_MORE] = ("previous", "keyframe")
    taus: Annotated[tuple[Positive, ...], ONE_OR_MORE] = (0.2, 0.3, 0.45, 0.7, 0.85, 1.0, 1.2, 1.4, 1.95)
    kappa: Ascending = DEFAULT_KAPPA
    other_kappas: tuple[tuple[Positive, ...], ...] = ((1.0, 2.0, 6.0), (1.0, 1.6, 6.0))
    scene_changes: tuple[Positive, ...] = (0.4,)
    frame_taus: Annotated[tuple[Positive, ...], ONE_OR_MORE] = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
    frame_kappa: Ascending = FrameMagnitude.kappa
    searches: tuple[Search | Literal["gradient"], ...] = ("greedy", "gradient")
    clairvoyant_points: NotNegative = 0
    clairvoyant_horizon: NotNegative = 0

    def _check(self) -> None:
        for other in self.other_kappas:
            if len(other) != len(self.kappa) or list(other) != sorted(other):
                raise SettingsError(
                    "Setting 'heuristic.other_kappas' must be lists of increasing values, each as long as "
                    f"heuristic.kappa ({len(self.kappa)}); received {list(other)}."
                )


@dataclass(frozen=True)
class TrackingSettings(Checked):
    """Where runs are recorded.

    Attributes:
        enabled: record to MLflow.
        uri: the tracking server or store, such as http://HOST:PORT of an `mlflow server`; None is an SQLite file,
            mlflow.db in the results folder; "offline" keeps records in the run's folder until
            `resq-rl sync FOLDER [URI]` sends them.
        experiment: name of the MLflow experiment.
        tags: tags of the run.
        parent_run: id of the MLflow run to nest under, or None.
    """

    _group: ClassVar[str] = "tracking."

    enabled: bool = True
    uri: str | None = None
    experiment: str = "resq_rl"
    tags: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    parent_run: str | None = None


@dataclass(frozen=True)
class Settings(Checked):
    """Every setting of one command.

    Attributes:
        video, model, task: targets, made with `Target.build`.
        pretraining: how `pretrain` trains the network.
        benchmark: what `bench` and `profile` measure.
        running: how `run` runs a policy.
        exporting: what `export` writes.
        policy: folder of a trained policy, for `evaluate`, `run` and `export`; or of policies by seed, which `compare`
            measures instead of training.
        trusted: whether settings that are read from the folder of a policy, or of a run to go on with, may name code
            that no shipped option names; given on the command line only.
        source: what `run` runs on: path of a video file or of a folder of frames, or index of a camera.
        split: clips that `compare` and `evaluate` report on.
        results: folder of all results; each run has its own folder in it.
        tables: folder that keeps the responses of frame-level decisions for later runs; None for none.
        seed: of random choices outside of training, such as bootstrap draws and random baselines; training runs have
            `training.seeds`, and pretraining `pretraining.seed`.
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
    split: Split
    results: Folder
    tables: str | None
    seed: NotNegative
    threads: Count

    def _check(self) -> None:
        levels, frame_level = len(self.quantization.levels), self.environment.id == "resq_rl/FrameLevel-v0"
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
        region_thresholds = (self.environment.id, self.environment.agents) == ("resq_rl/RegionThresholds-v0", "region")
        for name in ("trainer", "warm_start"):
            if getattr(self.training, name) == "gradient" and not region_thresholds:
                raise SettingsError(
                    f"Setting 'training.{name}' may be gradient only for region agents that choose thresholds "
                    "(environment=region_thresholds, environment.agents=region); received "
                    f"{self.environment.id} and {self.environment.agents}."
                )
        if self.training.trainer == "gradient" and self.training.keyframe_frames:
            raise SettingsError(
                "Setting 'training.keyframe_frames' must be 0 with training.trainer=gradient: keyframes are learned by "
                f"PPO only; received {self.training.keyframe_frames}."
            )
        if self.heuristic.clairvoyant_points and (frame_level or "greedy" not in self.heuristic.searches):
            raise SettingsError(
                "Setting 'heuristic.clairvoyant_points' must be 0 where the greedy search, beside which they are "
                "measured, does not run: it is not among heuristic.searches, or the environment is "
                f"resq_rl/FrameLevel-v0; received {self.heuristic.clairvoyant_points}."
            )
        if frame_level and self.environment.reference != "keyframe":
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
    return convert_dataclass(values, Settings)
