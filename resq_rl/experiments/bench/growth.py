"""How the cost of a step grows: with regions, resolution, layers, width, layer groups and the length of clips."""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resq_rl.envs import Problem, measure
from resq_rl.envs.network_engine import clips_that_fit
from resq_rl.errors import ResqError
from resq_rl.experiments.bench.timing import REFERENCE, alternate, step_jobs
from resq_rl.experiments.study.study import Study
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


def moving(study: Study, batch: int) -> list[tuple[Tensor, ...]]:
    """The network's inputs for two successive frames of each of `batch` clips."""
    problem = study.problems["train"]
    longer = [i for i, clip in enumerate(problem.clips) if len(clip) > 1]
    chosen = [longer[i % len(longer)] for i in range(batch)]
    starts = [problem.starts[i] for i in chosen] if problem.starts else []
    found = []
    for t in (0, 1):
        inputs: Inputs = torch.stack([problem.clips[i].frames[t] for i in chosen])
        if isinstance(study.task, Recurrent):
            previous = torch.stack([start.prediction for start in starts])
            inputs = recurrent_inputs(study.task, as_tuple(inputs)[0], previous, starts)
        found.append(tuple(map(to_float, as_tuple(inputs))))
    return found


def regions(study: Study) -> dict[str, Any]:
    """A residual step for one region, and for as many and four times as many as the settings say."""
    rows, columns = study.settings.environment.grid
    grids = ((1, 1), (rows, columns), (2 * rows, 2 * columns))
    frames = moving(study, max(1, _batch(study, study.model)))
    return {
        f"residual, {down}x{across} regions": _residual(study, study.model, frames, (down, across))
        for down, across in grids
    }


def resolutions(study: Study) -> dict[str, Any]:
    """A residual step of the same network on frames of other sizes."""
    height, width = study.model.frame_size

    def build(factor: float) -> tuple[ResQModel, list[Tensor]]:
        clips = [_resized(clip, (round(factor * height), round(factor * width))) for clip in _few(study)]
        return _calibrated(study, study.network, clips), clips

    return _each(study, {f"{round(f * height)}x{round(f * width)}": lambda f=f: build(f) for f in FACTORS})  # type: ignore[misc]


def layers(study: Study) -> dict[str, Any]:
    """A residual step of stacks of convolutions at a quarter of the frame's size, by their number."""

    def build(depth: int) -> tuple[ResQModel, list[Tensor]]:
        first = nn.Conv2d(3, CHANNELS, 4, 4)
        rest = [m for _ in range(depth - 1) for m in (nn.ReLU(), nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1))]
        return _calibrated(study, nn.Sequential(first, *rest), clips), clips

    clips = [clip.frames for clip in _few(study)]
    return _each(study, {f"{depth} layers": lambda d=depth: build(d) for depth in DEPTHS})  # type: ignore[misc]


def widths(study: Study) -> dict[str, Any]:
    """A residual step of the shipped network's architecture with other numbers of channels, and random weights."""

    def build(width: int) -> tuple[ResQModel, list[Tensor]]:
        return _calibrated(study, CompactDDRNet(width=width), clips), clips

    clips = [clip.frames for clip in _few(study)]
    return _each(study, {f"{width} channels": lambda w=width: build(w) for width in WIDTHS})  # type: ignore[misc]


def groups(study: Study) -> dict[str, Any]:
    """A residual step of the network with one layer group, its own, and one for each layer."""
    names = [operator.name for operator in study.model.operators]

    def build(setting: Any) -> tuple[ResQModel, list[Tensor]]:
        return _calibrated(study, study.network, clips, groups=setting), clips

    clips = [clip.frames for clip in _few(study)]
    settings = {"all": ["*"]}, study.model.config.groups, {name: [name] for name in names}
    counts = 1, len(study.model.groups), len(names)
    return _each(study, {f"{n} groups": lambda s=s: build(s) for n, s in zip(counts, settings, strict=True)})  # type: ignore[misc]


def clip_lengths(study: Study) -> dict[str, Any]:
    """A frame of whole clips under Dynamic ResQ, their one keyframe, errors and counts included, by their length."""
    problem, grid = study.problems["train"], study.settings.environment.grid
    batch, longest = max(1, _batch(study, study.model)), min(map(len, problem.clips))
    policy = DynamicResQ("previous", 0, tau=TAU, kappa=study.settings.heuristic.kappa)

    def run(own: Problem) -> int:
        measure(own, policy, slots=batch)
        return own.frames

    forward = step_jobs(study.model, moving(study, batch), grid, study.settings.heuristic.kappa)[REFERENCE]
    jobs: dict[str, Callable[[], int]] = {REFERENCE: forward}
    for length in sorted({max(2, longest // n) for n in (4, 2, 1)}):
        clips = [_shortened(clip, length) for clip in problem.clips[:batch]]
        own = Problem.prepare(study.model, study.task, clips, grid=grid, source=problem.source)
        jobs[f"clips of {length} frames"] = lambda own=own: run(own)  # type: ignore[misc]
    figures = alternate(jobs, max(1, study.settings.benchmark.rounds // 3))
    return {name: asdict(figure) for name, figure in figures.items() if name != REFERENCE}


def _shortened(clip: Clip, length: int) -> Clip:
    labels = None if clip.labels is None else clip.labels[:length]
    return replace(clip, frames=clip.frames[:length], labels=labels)


def _each(study: Study, builders: dict[str, Callable[[], tuple[ResQModel, list[Tensor]]]]) -> dict[str, Any]:
    """The residual step of each model that can be built from frames alone."""
    found: dict[str, Any] = {}
    if isinstance(study.task, Recurrent):
        return found
    for name, build in builders.items():
        try:
            model, clips = build()
        except ResqError as error:  # an exported program may take one size of frames only
            log.warning("%s is not measured: %s", name, error)
            continue
        batch = _batch(study, model)
        if batch == 0:
            log.warning("%s is not measured: memory is too short for one clip.", name)
            continue
        frames = [(to_float(torch.stack([clips[i % len(clips)][t] for i in range(batch)])),) for t in (0, 1)]
        found[name] = _residual(study, model, frames, study.settings.environment.grid)
    return found


def _residual(
    study: Study, model: ResQModel, frames: Sequence[tuple[Tensor, ...]], grid: tuple[int, int]
) -> dict[str, Any]:
    """A residual step under thresholds against the previous frame."""
    jobs = step_jobs(model, frames, grid, study.settings.heuristic.kappa, ("previous",))
    chosen = {name: jobs[name] for name in (REFERENCE, "residual, thresholds, previous")}
    return asdict(alternate(chosen, study.settings.benchmark.rounds)["residual, thresholds, previous"])


def _calibrated(study: Study, network: nn.Module, clips: list[Tensor], **changes: Any) -> ResQModel:
    config = replace(study.model.config, weight_rounding="nearest", **({"groups": "auto"} | changes))
    model = ResQModel(network, to_float(clips[0][:1]), config)
    if study.settings.quantization.compile:
        model.compile()
    return model.calibrate(clips)


def _few(study: Study) -> list[Clip]:
    return [clip for clip in study.problems["train"].clips if len(clip) > 1][:CALIBRATION]


def _resized(clip: Clip, size: tuple[int, int]) -> Tensor:
    frames: Iterable[Tensor] = clip.frames.split(1)
    sized = [F.interpolate(frame, size, mode="bilinear", antialias=True) for frame in frames]  # bytes stay bytes
    return torch.cat(sized)


def _batch(study: Study, model: ResQModel) -> int:
    """As many clips as `benchmark.batches` asks for at most and memory allows: two states and their work."""
    fit = clips_that_fit(model)
    return min(max(study.settings.benchmark.batches), 2**30 if fit is None else fit // 3)
