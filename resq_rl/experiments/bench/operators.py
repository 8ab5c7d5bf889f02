"""Times of every operator of a calibrated network, in float and as products of codes, and the cost table they give."""

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from resq_rl.experiments.bench.timing import seconds
from resq_rl.quantization import CostTable, LayerKind, ResQModel, ThresholdField

__all__ = ["OperatorTimes", "cost_table", "operator_times", "whole_layers"]

NOTHING, EVERYTHING = 1e6, 1e-6  # thresholds above and below which no pixel lies
TAUS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # under which some tiles are active and others are not
TILE = 8  # rows and columns of outputs that are skipped together
WIDEST = 16  # bits


@dataclass(frozen=True)
class OperatorTimes:
    """Milliseconds of one operator call on one clip: medians over frames.

    Attributes:
        name, kind, macs: of the operator.
        float32: the float network's operator.
        dense: a residual step that multiplies everything, its elementwise work included.
        skipped: a residual step in which no pixel is active.
        active: (share of tiles with an active pixel, milliseconds) of residual steps under rising thresholds.
    """

    name: str
    kind: LayerKind
    macs: int
    float32: float
    dense: float
    skipped: float
    active: list[tuple[float, float]]


@contextmanager
def whole_layers(model: ResQModel) -> Iterator[None]:
    """Run every convolution whole, whether or not tiles of it could be skipped."""
    skipping = getattr(model.kernels, "skipping", None)
    if skipping is not None:
        skipping.enabled = False
    try:
        yield
    finally:
        if skipping is not None:
            skipping.enabled = True


@contextmanager
def _timed_calls(model: ResQModel, calls: list[tuple[float, float]]) -> Iterator[None]:
    """Note (seconds, share of active tiles) of every residual step of an operator."""
    kernels: Any = model.kernels
    residual = kernels.residual

    def timed(*arguments: Any, **settings: Any) -> tuple[Tensor, Tensor]:
        started = time.perf_counter()
        y, cost = residual(*arguments, **settings)
        calls.append((time.perf_counter() - started, _active_tiles(cost)))
        return y, cost

    kernels.residual = timed
    try:
        yield
    finally:
        del kernels.residual


def _active_tiles(cost: Tensor) -> float:
    """The share of tiles in which some pixel costs anything."""
    return float(F.max_pool2d((cost > 0).float()[:, None], TILE, ceil_mode=True).mean())


@torch.no_grad()
def operator_times(model: ResQModel, frames: Sequence[tuple[Tensor, ...]], rounds: int) -> list[OperatorTimes]:
    """Time every operator.

    Args:
        model: calibrated.
        frames: what the network takes for two frames of one clip that follow each other, (1, ...).
        rounds: how often each is timed.
    """
    with whole_layers(model):
        dense = _residual_calls(model, frames, EVERYTHING, rounds)
    skipped = _residual_calls(model, frames, NOTHING, rounds)
    partly = [_residual_calls(model, frames, tau, rounds) for tau in TAUS]
    times = []
    for index, site in enumerate(model.layers):
        values = torch.rand(1, *site.input_shape)
        spent = [seconds(partial(site.operator.float_output, values)) for _ in range(rounds + 1)]
        float32 = 1e3 * statistics.median(spent[1:])
        active = [(share, ms) for ms, share in (calls[index] for calls in partly)]
        own = (float32, dense[index][0], skipped[index][0], active)
        times.append(OperatorTimes(site.name, site.layer_kind, site.macs, *own))
    return times


def _residual_calls(
    model: ResQModel, frames: Sequence[tuple[Tensor, ...]], tau: float, rounds: int
) -> list[tuple[float, float]]:
    """Median (milliseconds, share of active tiles) of each operator in residual steps under one threshold."""
    field, every = ThresholdField.constant(tau, 1, len(model.groups)), torch.ones(1, dtype=torch.bool)
    state, moving, found = model.new_state(1), list(frames), []
    model.step(moving[0], state, every, field)
    for _ in range(rounds + 1):
        moving.reverse()
        calls: list[tuple[float, float]] = []
        model.float_forward(moving[0])  # leaves in the caches what it does between frames that are timed
        with _timed_calls(model, calls):
            model.step(moving[0], state, ~every, field)
        found.append(calls)
    by_operator = zip(*found[1:], strict=True)
    return [
        (1e3 * statistics.median(s for s, _ in calls), statistics.mean(a for _, a in calls)) for calls in by_operator
    ]


def cost_table(times: Sequence[OperatorTimes], frame: float, machine: str) -> CostTable:
    """The costs of this machine in nanoseconds: per multiply-accumulate and kind of layer, operator and frame.

    All widths cost the same here, since codes of any width are multiplied by the same instructions. What a
    multiply-accumulate of an active tile takes is fitted by least squares to what operators take beyond a step in which
    nothing is active, at all shares of active tiles that were timed.

    Args:
        frame: milliseconds of a residual frame in which nothing is active.
        machine: what it was measured on, for the table's source.
    """
    operator = statistics.mean(t.skipped for t in times)
    kinds: dict[Any, Sequence[OperatorTimes]] = {t.kind: [u for u in times if u.kind == t.kind] for t in times}
    macs = {kind: 1e6 * _slope(own) for kind, own in (kinds | {"any": times}).items()}
    return CostTable(
        name="measured",
        source=f"Measured by resq-rl profile on {machine}. Unit: nanoseconds.",
        macs={kind: {WIDEST: {WIDEST: cost}} for kind, cost in macs.items()},
        tile=(TILE, TILE),
        operator=1e6 * operator,
        frame=max(0.0, 1e6 * (frame - operator * len(times))),
    )


def _slope(times: Sequence[OperatorTimes]) -> float:
    """Milliseconds per multiply-accumulate of active tiles; 0 where they take no longer than none."""
    points = [(t.macs * share, ms - t.skipped) for t in times for share, ms in [*t.active, (1.0, t.dense)]]
    return max(0.0, sum(macs * ms for macs, ms in points) / sum(macs**2 for macs, _ in points))
