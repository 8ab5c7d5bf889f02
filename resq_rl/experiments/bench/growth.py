"""How the cost of a step grows: with regions, resolution, layers, width, layer groups and the length of clips."""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resq_rl.envs import ClipStore, measure
from resq_rl.envs.simulator import clips_that_fit
from resq_rl.errors import ResqError
from resq_rl.experiments.bench.timing import REFERENCE, alternate, step_jobs
from resq_rl.experiments.study.world import World
from resq_rl.perception import CompactDDRNet, Recurrent, recurrent_inputs
from resq_rl.policies import DynamicResQ
from resq_rl.quantization import Inputs, ResQModel, as_tuple, to_float
from resq_rl.video import Clip

__all__ = ["clip_lengths", "groups", "layers", "moving", "regions", "resolutions", "widths"]

log = logging.getLogger(__name__)

# Of stacks of convolutions and of the shipped network's architecture.
DEPTHS, CHANNELS, WIDTHS = (5, 20), 32, (16, 32, 64)
FACTORS = (0.5, 1.0, 2.0)  # of the frame's height and width
CALIBRATION = 2  # clips
TAU = 0.7


def moving(world: World, batch: int) -> list[tuple[Tensor, ...]]:
    """What the network takes for two frames that follow each other in each of `batch` clips."""
    store = world.stores["train"]
    longer = [i for i, clip in enumerate(store.clips) if len(clip) > 1]
    chosen = [longer[i % len(longer)] for i in range(batch)]
    starts = [store.starts[i] for i in chosen] if store.starts else []
    found = []
    for t in (0, 1):
        inputs: Inputs = torch.stack([store.clips[i].frames[t] for i in chosen])
        if isinstance(world.task, Recurrent):
            previous = torch.stack([start.prediction for start in starts])
            inputs = recurrent_inputs(world.task, as_tuple(inputs)[0], previous, starts)
        found.append(tuple(map(to_float, as_tuple(inputs))))
    return found


def regions(world: World) -> dict[str, Any]:
    """A residual step for one region, and for as many and four times as many as the settings say."""
    rows, columns = world.settings.environment.grid
    grids = ((1, 1), (rows, columns), (2 * rows, 2 * columns))
    frames = moving(world, max(1, _batch(world, world.model)))
    return {
        f"residual, {down}x{across} regions": _residual(world, world.model, frames, (down, across))
        for down, across in grids
    }


def resolutions(world: World) -> dict[str, Any]:
    """A residual step of the same network on frames of other sizes."""
    height, width = world.model.frame_size

    def build(factor: float) -> tuple[ResQModel, list[Tensor]]:
        clips = [_resized(clip, (round(factor * height), round(factor * width))) for clip in _few(world)]
        return _calibrated(world, world.network, clips), clips

    return _each(world, {f"{round(f * height)}x{round(f * width)}": lambda f=f: build(f) for f in FACTORS})  # type: ignore[misc]


def layers(world: World) -> dict[str, Any]:
    """A residual step of stacks of convolutions at a quarter of the frame's size, by their number."""

    def build(depth: int) -> tuple[ResQModel, list[Tensor]]:
        first = nn.Conv2d(3, CHANNELS, 4, 4)
        rest = [m for _ in range(depth - 1) for m in (nn.ReLU(), nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1))]
        return _calibrated(world, nn.Sequential(first, *rest), clips), clips

    clips = [clip.frames for clip in _few(world)]
    return _each(world, {f"{depth} layers": lambda d=depth: build(d) for depth in DEPTHS})  # type: ignore[misc]


def widths(world: World) -> dict[str, Any]:
    """A residual step of the shipped network's architecture with other numbers of channels, and random weights."""

    def build(width: int) -> tuple[ResQModel, list[Tensor]]:
        return _calibrated(world, CompactDDRNet(width=width), clips), clips

    clips = [clip.frames for clip in _few(world)]
    return _each(world, {f"{width} channels": lambda w=width: build(w) for width in WIDTHS})  # type: ignore[misc]


def groups(world: World) -> dict[str, Any]:
    """A residual step of the network with one layer group, its own, and one for each layer."""
    names = [operator.name for operator in world.model.operators]

    def build(setting: Any) -> tuple[ResQModel, list[Tensor]]:
        return _calibrated(world, world.network, clips, groups=setting), clips

    clips = [clip.frames for clip in _few(world)]
    settings = {"all": ["*"]}, world.model.config.groups, {name: [name] for name in names}
    counts = 1, len(world.model.groups), len(names)
    return _each(world, {f"{n} groups": lambda s=s: build(s) for n, s in zip(counts, settings, strict=True)})  # type: ignore[misc]


def clip_lengths(world: World) -> dict[str, Any]:
    """A frame of whole clips under Dynamic ResQ, their one keyframe, errors and counts included, by their length."""
    store, grid = world.stores["train"], world.settings.environment.grid
    batch, longest = max(1, _batch(world, world.model)), min(map(len, store.clips))
    policy = DynamicResQ("previous", 0, tau=TAU, kappa=world.settings.heuristic.kappa)

    def run(own: ClipStore) -> int:
        measure(world.model, world.task, own, policy, grid=grid, slots=batch)
        return own.frames

    forward = step_jobs(world.model, moving(world, batch), grid, world.settings.heuristic.kappa)[REFERENCE]
    jobs: dict[str, Callable[[], int]] = {REFERENCE: forward}
    for length in sorted({max(2, longest // n) for n in (4, 2, 1)}):
        clips = [_shortened(clip, length) for clip in store.clips[:batch]]
        own = ClipStore.prepare(world.model, world.task, clips, source=store.source)
        jobs[f"clips of {length} frames"] = lambda own=own: run(own)  # type: ignore[misc]
    figures = alternate(jobs, max(1, world.settings.benchmark.rounds // 3))
    return {name: asdict(figure) for name, figure in figures.items() if name != REFERENCE}


def _shortened(clip: Clip, length: int) -> Clip:
    labels = None if clip.labels is None else clip.labels[:length]
    return replace(clip, frames=clip.frames[:length], labels=labels)


def _each(world: World, builders: dict[str, Callable[[], tuple[ResQModel, list[Tensor]]]]) -> dict[str, Any]:
    """The residual step of each model that can be built from frames alone."""
    found: dict[str, Any] = {}
    if isinstance(world.task, Recurrent):
        return found
    for name, build in builders.items():
        try:
            model, clips = build()
        except ResqError as error:  # an exported program may take one size of frames only
            log.warning("%s is not measured: %s", name, error)
            continue
        batch = _batch(world, model)
        if batch == 0:
            log.warning("%s is not measured: memory is too short for one clip.", name)
            continue
        frames = [(to_float(torch.stack([clips[i % len(clips)][t] for i in range(batch)])),) for t in (0, 1)]
        found[name] = _residual(world, model, frames, world.settings.environment.grid)
    return found


def _residual(
    world: World, model: ResQModel, frames: Sequence[tuple[Tensor, ...]], grid: tuple[int, int]
) -> dict[str, Any]:
    """A residual step under thresholds against the previous frame."""
    jobs = step_jobs(model, frames, grid, world.settings.heuristic.kappa, ("previous",))
    chosen = {name: jobs[name] for name in (REFERENCE, "residual, thresholds, previous")}
    return asdict(alternate(chosen, world.settings.benchmark.rounds)["residual, thresholds, previous"])


def _calibrated(world: World, network: nn.Module, clips: list[Tensor], **changes: Any) -> ResQModel:
    config = replace(world.model.config, weight_rounding="nearest", **({"groups": "auto"} | changes))
    model = ResQModel(network, to_float(clips[0][:1]), config)
    if world.settings.quantization.compile:
        model.compile()
    return model.calibrate(clips)


def _few(world: World) -> list[Clip]:
    return [clip for clip in world.stores["train"].clips if len(clip) > 1][:CALIBRATION]


def _resized(clip: Clip, size: tuple[int, int]) -> Tensor:
    frames: Iterable[Tensor] = clip.frames.split(1)
    sized = [F.interpolate(frame, size, mode="bilinear", antialias=True) for frame in frames]  # bytes stay bytes
    return torch.cat(sized)


def _batch(world: World, model: ResQModel) -> int:
    """As many clips as `benchmark.batches` asks for at most and memory allows: two states and their work."""
    fit = clips_that_fit(model)
    return min(max(world.settings.benchmark.batches), 2**30 if fit is None else fit // 3)
