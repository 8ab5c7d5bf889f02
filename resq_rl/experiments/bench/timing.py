"""Times of frames as ratios to the float network, of jobs that run in turn.

What is compared runs round by round, so that a machine that slows down slows all of it; a figure is the median over the
rounds of the ratio to the reference of the same round.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from resq_rl.quantization import Field, LevelField, Reference, ResQModel, ThresholdField

__all__ = ["REFERENCE", "Figure", "alternate", "seconds", "shown", "step_jobs", "timed"]

REFERENCE = "float forward"
TAU = 0.5


@dataclass(frozen=True)
class Figure:
    """A time as a ratio to the reference: the median over the rounds, the lowest and the highest.

    Attributes:
        milliseconds: median, per frame of a clip.
    """

    ratio: float
    lowest: float
    highest: float
    milliseconds: float


def seconds(run: Callable[[], object]) -> float:
    """How long it takes."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def alternate(
    jobs: Mapping[str, Callable[[], int]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Figure]:
    """Time jobs in turn, after each ran once to warm up.

    Args:
        jobs: by name; each returns the number of frames it ran. Ratios are to the first, per frame.
        rounds: how often.
    """
    spent: dict[str, list[float]] = {name: [] for name in jobs}
    for job in jobs.values():
        job()
    for _ in range(rounds):
        for name, job in jobs.items():
            started = clock()
            frames = job()
            spent[name].append((clock() - started) / frames)
    base = spent[next(iter(jobs))]
    figures = {}
    for name, values in spent.items():
        ratios = [value / reference for value, reference in zip(values, base, strict=True)]
        milliseconds = 1e3 * statistics.median(values)
        figures[name] = Figure(statistics.median(ratios), min(ratios), max(ratios), milliseconds)
    return figures


def shown(figures: Mapping[str, Figure]) -> dict[str, Any]:
    """Figures as they are written to files."""
    return {name: asdict(figure) for name, figure in figures.items()}


def step_jobs(
    model: ResQModel,
    frames: Sequence[tuple[Tensor, ...]],
    grid: tuple[int, int],
    kappa: tuple[float, ...],
    references: tuple[Reference, ...] = ("previous", "keyframe"),
) -> dict[str, Callable[[], int]]:
    """A float forward pass, a keyframe and residual steps of clips in motion.

    Args:
        frames: what the network takes for two frames that follow each other in each clip.
        grid, kappa: of the fields.
        references: each takes a state of its own.
    """
    moving, batch = list(frames), len(frames[0][0])
    every = torch.ones(batch, dtype=torch.bool)
    fields: dict[str, Field] = {
        "thresholds": ThresholdField.constant(TAU, batch, len(model.groups), grid, kappa),
        "levels": LevelField.constant(len(model.config.levels) - 2, batch, len(model.groups), grid),
    }
    states = {reference: model.new_state(batch, reference) for reference in references}
    for state in states.values():
        model.step(moving[0], state, every, fields["levels"])

    def step(reference: Any, name: str, refresh: Tensor) -> int:
        moving.reverse()  # so that every step sees motion
        model.step(moving[0], states[reference], refresh, fields[name])
        return batch

    def forward() -> int:
        model.float_forward(moving[0])
        return batch

    jobs: dict[str, Callable[[], int]] = {REFERENCE: forward, "keyframe": lambda: step(references[0], "levels", every)}
    for reference in states:
        for name in fields:
            jobs[f"residual, {name}, {reference}"] = lambda r=reference, n=name: step(r, n, ~every)  # type: ignore[misc]
    return jobs


@contextmanager
def timed(owner: Any, name: str, spent: dict[str, float]) -> Iterator[None]:
    """Add up the time that a method of an object, or of all objects of a class, takes."""
    own, method = name in vars(owner), getattr(owner, name)

    def measured(*arguments: Any, **settings: Any) -> Any:
        started = time.perf_counter()
        try:
            return method(*arguments, **settings)
        finally:
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - started

    setattr(owner, name, measured)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, method)
        else:
            delattr(owner, name)
