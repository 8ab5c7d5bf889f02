"""From settings to what a job works on: clips, the calibrated model, its task, and agents to train."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from resq_rl.envs import (
    ActionKind,
    ActionScheme,
    BatchedEnvironment,
    ClipStore,
    EpisodeSettings,
    Measurement,
    Policy,
    Simulator,
    TableSimulator,
    Trace,
    measure,
    trace,
)
from resq_rl.errors import NetworkError, SettingsError, VideoError
from resq_rl.experiments.config.settings import Settings
from resq_rl.experiments.runs.progress import Advance, stage
from resq_rl.experiments.study.measured import Measured
from resq_rl.perception import Task, clip_inputs, example_inputs
from resq_rl.policies import Responses
from resq_rl.quantization import Inputs, ResQModel, choose_residual_weight_bits
from resq_rl.video import Clip, Split

__all__ = ["World", "build_world", "prepare_clips", "read_clips"]

log = logging.getLogger(__name__)

AGENTS: dict[str, ActionKind] = {
    "resq_rl/FrameBits-v0": "frame_bits",
    "resq_rl/FrameLevel-v0": "frame_level",
    "resq_rl/RegionBits-v0": "region_bits",
    "resq_rl/RegionThresholds-v0": "region_thresholds",
}


@dataclass(frozen=True)
class World:
    """What one experiment works on.

    Attributes:
        settings: all settings.
        network: the float network.
        model: it, calibrated.
        task: its task.
        stores: clips by split.
        calibration: what it was calibrated on: clips as the network takes them.
        video: name of the video for reports.
        responses: tables of frame-level decisions by split, from which policies are measured and trained where given.
        measured: what was measured on the network before.
    """

    settings: Settings
    network: nn.Module
    model: ResQModel
    task: Task
    stores: dict[Split, ClipStore]
    calibration: tuple[Inputs, ...]
    video: str
    responses: Mapping[Split, Responses] = field(default_factory=dict)
    measured: Measured = field(default_factory=lambda: Measured(None))

    def measure(self, policy: Policy, split: Split, advance: Advance | None = None) -> Measurement:
        """Run a policy over the clips of a split."""
        if split in self.responses:
            result = self.responses[split].measure(policy)
            if advance is not None:
                advance(self.stores[split].frames)
            return result
        return self._measure(self.model, policy, split, advance)

    def trace(self, policy: Policy, split: Split, clip: int = 0) -> Trace:
        """Run a policy over one clip of a split, on the network even where tables are given."""
        grid = self.settings.environment.grid
        return trace(self.model, self.task, self.stores[split], policy, clip=clip, grid=grid)

    def measure_per_frame(self, policy: Policy, bits: int, split: Split) -> Measurement:
        """Run a policy on the network quantized to `bits`-bit weights and activations; BOPs still in units of W8A8."""
        config = self.settings.quantization.config(key_weight_bits=bits, key_activation_bits=bits)
        example = example_inputs(self.task, self.stores[split].clips[0])
        model = ResQModel(self.network, example, config).calibrate(self.calibration)
        return self._measure(model, policy, split, None)

    def _measure(self, model: ResQModel, policy: Policy, split: Split, advance: Advance | None) -> Measurement:
        grid, slots = self.settings.environment.grid, self.settings.environment.clips_per_batch
        store, measured = self.stores[split], self.measured
        key = measured.key(model, self.task, store, policy, grid, slots)
        known = measured.get(key, self.task, policy)
        if known is None:
            result = measure(model, self.task, store, policy, grid=grid, slots=slots, progress=advance)
            measured.put(key, result)
            return result
        if advance is not None:
            advance(store.frames)
        return known

    def scheme(self) -> ActionScheme:
        """The actions that the settings ask for."""
        environment = self.settings.environment
        return ActionScheme(
            AGENTS[environment.id],
            environment.agents,
            len(self.model.groups),
            environment.grid,
            len(self.model.config.levels),
            environment.agents == "region",
            environment.thresholds,
            self.settings.heuristic.kappa,
            environment.ignored,
        )

    def agents(self, fields: Policy | None = None) -> BatchedEnvironment:
        """Agents on the training clips; agents that decide on keyframes alone where `fields` chooses the rest."""
        scheme = self.scheme() if fields is None else replace(self.scheme(), kind="keyframe", agents="frame")
        environment, store = self.settings.environment, self.stores["train"]
        episodes = EpisodeSettings(
            trade_off=environment.trade_off_range,
            intervals=environment.keyframe_intervals,
            reward_scale=self.settings.training.reward_scale,
            relative=True,
        )
        slots, trade_off_range = environment.clips_per_batch, environment.trade_off_range
        simulator = (
            TableSimulator(
                self.model,
                self.task,
                store,
                self.responses["train"].tables,
                slots=slots,
                trade_off_range=trade_off_range,
            )
            if "train" in self.responses
            else Simulator(
                self.model,
                self.task,
                store,
                slots=slots,
                grid=environment.grid,
                reference=environment.reference,
                trade_off_range=trade_off_range,
            )
        )
        return BatchedEnvironment(simulator, scheme, episodes, fields=fields)


def build_world(settings: Settings, splits: Sequence[Split], measured: Path | None = None) -> World:
    """Load video and network, calibrate, and prepare the clips of `splits`.

    The training split is always read: calibration is done on its first clips.

    Args:
        measured: file of measurements on the network, which are not repeated.

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
    stores = prepare_clips(settings, model, task, {name: clips[name] for name in splits})
    source = type(video).__name__
    return World(settings, network, model, task, stores, calibration, source, measured=Measured(measured))


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


def prepare_clips(
    settings: Settings, model: ResQModel, task: Task, clips: Mapping[Split, Sequence[Clip]]
) -> dict[Split, ClipStore]:
    """Clips with what they are judged by: labels or the float network's predictions, as the settings say."""
    stores: dict[Split, ClipStore] = {}
    with stage("float network", sum(len(c) for own in clips.values() for c in own)) as advance:
        for name, own in clips.items():
            stores[name] = ClipStore.prepare(
                model,
                task,
                own,
                source=settings.environment.accuracy,
                weighting=settings.environment.weighting,
                fill=name == "train",
                progress=advance,
            )
    return stores


def _calibrated(settings: Settings, model: ResQModel, clips: Sequence[Inputs]) -> ResQModel:
    with stage("calibration", 1):
        model = model.compile() if settings.quantization.compile else model
        model.calibrate(clips)
        if settings.quantization.residual_weight_bits == "auto":
            bits = choose_residual_weight_bits(model, clips[:4], tolerance=settings.quantization.weight_tolerance)
            log.info("residual weight bits: %s", ", ".join(f"{k} {b}" for k, b in sorted(bits.items())))
    return model
