"""A study made from settings: clips, the calibrated network, its task, and agents to train."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

from torch import nn

from resq_rl.envs import (
    ActionKind,
    ActionScheme,
    BatchedEnvironment,
    EpisodeSettings,
    Measurement,
    NetworkEngine,
    Policy,
    Problem,
    Streams,
    TableEngine,
    Trace,
    trace,
)
from resq_rl.errors import NetworkError, SettingsError, VideoError
from resq_rl.experiments.config.settings import EnvironmentSettings, Settings
from resq_rl.experiments.runs.progress import Advance, stage
from resq_rl.experiments.study.measurements import Measurements
from resq_rl.perception import Task, clip_inputs, degenerate_output, example_inputs
from resq_rl.policies import choose_weight_bits, measure_on_tables
from resq_rl.quantization import Budget, Inputs, ResQModel
from resq_rl.video import Clip, Framing, Split, framing_of

__all__ = ["Base", "Study", "build_study", "learning_interval", "network_framing", "prepare_problems", "read_clips"]

log = logging.getLogger(__name__)

AGENTS: Final[Mapping[str, ActionKind]] = {
    "resq_rl/FrameBits-v0": "frame_bits",
    "resq_rl/FrameLevel-v0": "frame_level",
    "resq_rl/RegionBits-v0": "region_bits",
    "resq_rl/RegionThresholds-v0": "region_thresholds",
}


class Base(NamedTuple):
    """Thresholds of every layer by lambda, of which agents choose factors.

    Attributes:
        taus: one row for each lambda (`ActionScheme.base`).
        learned_at: as of `ActionScheme`.
    """

    taus: tuple[tuple[float, ...], ...]
    learned_at: tuple[float, ...]


@dataclass(frozen=True)
class Study:
    """The settings of one experiment, and its problem on each split of the clips.

    Attributes:
        settings: all settings.
        network: the float network.
        problems: by split the calibrated network, its task, the clips and the grid.
        calibration: the clips it was calibrated on, as the network takes them.
        video: name of the video for reports.
        framing: how frames of any source are brought to the network, as those of the video were.
        tables: engines of frame-level decisions by split, from which policies are measured and trained where given.
        measurements: keeps what was measured on the network.
        base: what agents choose factors of; None where they choose thresholds.
    """

    settings: Settings
    network: nn.Module
    problems: Mapping[Split, Problem]
    calibration: tuple[Inputs, ...]
    video: str
    framing: Framing
    tables: Mapping[Split, TableEngine] = field(default_factory=dict)
    measurements: Measurements = field(default_factory=lambda: Measurements(None))
    base: Base | None = None

    @property
    def problem(self) -> Problem:
        """The problem on the reported clips, or on the training clips where none are reported."""
        return self.problems[self.settings.split if self.settings.split in self.problems else "train"]

    @property
    def model(self) -> ResQModel:
        """The calibrated network."""
        return self.problem.model

    @property
    def task(self) -> Task:
        """The task."""
        return self.problem.task

    def measure(self, policy: Policy, split: Split, advance: Advance | None = None) -> Measurement:
        """Run a policy over the clips of a split."""
        if split not in self.tables:
            return self._measure(self.problems[split], policy, advance, self.settings.environment.budget)
        if advance is not None:
            advance(self.problems[split].frames)
        return measure_on_tables(self.tables[split], policy)

    def trace(self, policy: Policy, split: Split, clip: int = 0) -> Trace:
        """Run a policy over one clip of a split, on the network even where tables are given."""
        return trace(self.problems[split], policy, clip=clip, budget=self.settings.environment.budget)

    def measure_per_frame(self, policy: Policy, bits: int, split: Split) -> Measurement:
        """Run a policy on the network quantized to `bits`-bit weights and activations; BOPs still in units of W8A8."""
        problem = self.problems[split]
        config = self.settings.quantization.config(key_weight_bits=bits, key_activation_bits=bits)
        model = ResQModel(self.network, example_inputs(problem.task, problem.clips[0]), config)
        return self._measure(replace(problem, model=model.calibrate(self.calibration)), policy, None)

    def _measure(
        self, problem: Problem, policy: Policy, advance: Advance | None, budget: Budget | None = None
    ) -> Measurement:
        slots = self.settings.environment.clips_per_batch
        return self.measurements.measure(problem, policy, slots, advance, budget)

    def scheme(self) -> ActionScheme:
        """The actions that the settings ask for."""
        environment, problem = self.settings.environment, self.problem
        scheme = ActionScheme(
            AGENTS[environment.id],
            environment.agents,
            problem.groups,
            problem.grid,
            len(problem.model.config.levels),
            environment.agents == "region",
            environment.thresholds,
            self.settings.heuristic.kappa,
            environment.ignored,
        )
        layers = problem.model.group_of_site.tolist()
        return scheme if self.base is None else scheme.on(self.base.taus, layers, self.base.learned_at)

    def agents(self, fields: Policy | None = None) -> BatchedEnvironment:
        """Agents on the training clips; agents that decide on keyframes alone where `fields` chooses the rest."""
        scheme = self.scheme() if fields is None else replace(self.scheme(), kind="keyframe", agents="frame")
        environment = self.settings.environment
        episodes = EpisodeSettings(
            trade_off=environment.trade_off_range,
            intervals=environment.keyframe_intervals,
            reward_scale=self.settings.training.reward_scale,
            relative=True,
        )
        streams = Streams(
            self.tables.get("train") or NetworkEngine(self.problems["train"]),
            slots=environment.clips_per_batch,
            reference=environment.reference,
            trade_off_range=environment.trade_off_range,
            budget=environment.budget,
        )
        return BatchedEnvironment(streams, scheme, episodes, fields=fields)


def build_study(settings: Settings, splits: Sequence[Split], measurements: Path | None = None) -> Study:
    """Load video and network, calibrate, and prepare the clips of `splits`.

    The training split is always read: calibration is done on its first clips.

    Args:
        measurements: folder of measurements on the network, which are not repeated.

    Raises:
        ResqError: a part cannot be built; the message says which and how to mend it.
    """
    video, network, task = settings.video.build(), settings.model.build(), settings.task.build()
    if not isinstance(network, nn.Module):
        raise NetworkError(f"Setting 'model' must make an nn.Module, got {type(network).__name__}.")
    if not isinstance(task, Task):
        raise SettingsError(f"Setting 'task' must make a resq_rl.perception.Task, got {type(task).__name__}.")
    clips = read_clips(video, ["train", *splits])
    model = ResQModel(network, example_inputs(task, clips["train"][0]), settings.quantization.config())
    few = clips["train"][: settings.quantization.calibration_clips]
    calibration = tuple(clip_inputs(model.float_forward, task, clip) for clip in few)
    model = _calibrated(settings, model, calibration)
    if settings.quantization.residual_weight_bits == "auto":
        _choose_weight_bits(settings, model, task, few)
    problems = prepare_problems(settings, model, task, {name: clips[name] for name in splits})
    judged = problems["train" if "train" in problems else settings.split]
    warning = degenerate_output(task, judged.teacher)
    if warning is not None:
        log.warning(warning)
    return Study(
        settings,
        network,
        problems,
        calibration,
        type(video).__name__,
        network_framing(video, model),
        measurements=Measurements(measurements),
    )


def learning_interval(environment: EnvironmentSettings) -> int:
    """The keyframe interval of learning by gradients: the longest, in which errors have the most time to build up."""
    intervals = environment.keyframe_intervals
    return 0 if 0 in intervals else max(intervals)


def network_framing(video: Any, model: ResQModel) -> Framing:
    """How frames of any source are brought to the network; video of no set size is cut to its proportions."""
    framing = framing_of(video)
    return replace(framing, size=model.frame_size, fit="crop") if framing.size is None else framing


def read_clips(video: Any, splits: Sequence[Split]) -> dict[Split, list[Clip]]:
    """The clips of each split.

    Raises:
        VideoError: a split has none, or one cannot be read.
    """
    clips: dict[Split, list[Clip]] = {}
    names = list(dict.fromkeys(splits))
    with stage("reading video", len(names)) as advance:
        for name in names:
            clips[name] = video.clips(name)
            if not clips[name]:
                raise VideoError(f"The {name} split has no clips: give it some in the settings of 'video'.")
            advance(1)
    return clips


def prepare_problems(
    settings: Settings,
    model: ResQModel,
    task: Task,
    clips: Mapping[Split, Sequence[Clip]],
    grid: tuple[int, int] | None = None,
) -> dict[Split, Problem]:
    """The problem on each split: clips with the labels or the float network's predictions as targets.

    Args:
        grid: rows and columns of regions; by default the settings'.
    """
    problems: dict[Split, Problem] = {}
    environment = settings.environment
    with stage("float network", sum(len(c) for own in clips.values() for c in own)) as advance:
        for name, own in clips.items():
            problems[name] = Problem.prepare(
                model,
                task,
                own,
                grid=environment.grid if grid is None else grid,
                source=environment.accuracy,
                weighting=environment.weighting,
                fill=name == "train",
                progress=advance,
            )
    return problems


def _calibrated(settings: Settings, model: ResQModel, clips: Sequence[Inputs]) -> ResQModel:
    with stage("calibration", 1):
        model = model.compile() if settings.quantization.compile else model
        return model.calibrate(clips)


def _choose_weight_bits(settings: Settings, model: ResQModel, task: Task, clips: Sequence[Clip]) -> None:
    """Set the model to the widths that are best on its calibration clips, which all commands have."""
    environment = settings.environment
    with stage("residual weight bits", None) as advance:
        bits = choose_weight_bits(
            Problem.prepare(model, task, clips, source="teacher"),
            interval=learning_interval(environment),
            reference=environment.reference,
            kappa=settings.heuristic.kappa,
            seed=settings.seed,
            progress=advance,
        )
    log.info("residual weight bits: %s", ", ".join(f"{name} {width}" for name, width in bits.items()))
