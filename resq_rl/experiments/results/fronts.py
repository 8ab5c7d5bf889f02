"""From measurements to the points, intervals, Bjontegaard deltas and gains of a comparison."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float64, Int

from resq_rl.envs import Measurement
from resq_rl.experiments.results.entries import AtBudget, BdEntry, Gain, Point
from resq_rl.experiments.results.statistics import BdResult, Interval, bd_bops, bootstrap_intervals

__all__ = ["at_budget", "bops_step", "compare_fronts", "gain_at_budget", "points_of"]

REPLICATES = 1000


def _resampled(measurements: Sequence[Measurement], clips: Int[np.ndarray, "r n"]) -> Float64[np.ndarray, "r points 2"]:
    """(accuracy, BOPs) of every measurement under every resample of the clips."""
    count = measurements[0].frames.shape[0]
    draws = torch.zeros(len(clips), count, dtype=torch.float64)
    index = torch.as_tensor(clips)
    draws.scatter_add_(1, index, torch.ones(index.shape, dtype=torch.float64))
    columns = []
    for m in measurements:
        counts = (draws @ m.counts.double().flatten(1)).view(-1, *m.counts.shape[1:])
        counts = counts if m.counts.is_floating_point() else counts.round().to(m.counts.dtype)
        bops = (draws @ m.clip_bops) / (draws @ m.frames.double())
        columns.append(torch.stack([m.task.accuracy(counts), bops], 1))
    stacked: np.ndarray = torch.stack(columns, 1).numpy()
    return stacked


def bops_step(point: Measurement) -> int:
    """The MLflow step of a point, in millionths of W8A8, so that MLflow draws accuracy over BOPs as a front."""
    return round(1e6 * point.bops)


def points_of(measurements: Sequence[Measurement], *, seed: int) -> list[Point]:
    """The measurements as points, with 95% intervals that are bootstrapped over the clips."""
    if not measurements:
        return []
    intervals = bootstrap_intervals(
        lambda clips, _: _resampled(measurements, clips).reshape(len(clips), -1),
        clips=len(measurements[0].frames),
        generator=np.random.default_rng(seed),
        replicates=REPLICATES,
        vectorized=True,
    )
    frames = [float(m.frames.sum()) for m in measurements]
    return [
        Point(
            accuracy=m.accuracy,
            accuracy_ci95=intervals[2 * i].bounds,
            bops=m.bops,
            bops_ci95=intervals[2 * i + 1].bounds,
            peak_bops=float(m.peak.max()),
            policy_bops=float(m.policy.sum()) / frames[i],
            state_bytes=m.state_bytes,
            settings=m.settings,
            keyframe_bops=float(m.keyframe.sum()) / frames[i],
        )
        for i, m in enumerate(measurements)
    ]


def compare_fronts(
    fronts: Mapping[int, Sequence[Measurement]],
    anchor: Sequence[Measurement],
    *,
    float_accuracy: float,
    seed: int,
) -> BdEntry:
    """Bjontegaard delta of a method against an anchor, averaged over training seeds; interval over clips and seeds.

    Args:
        fronts: the method's measurements by training seed.
        anchor: the anchor's measurements on the same clips.
        float_accuracy: accuracy of the float network on the same clips.
        seed: seed of the bootstrap.
    """
    runs = list(fronts.values())
    every = [*anchor, *(m for run in runs for m in run)]
    bounds = np.cumsum([0, len(anchor), *(len(run) for run in runs)])

    def deltas(table: Float64[np.ndarray, "points 2"]) -> list[BdResult]:
        base = table[: bounds[1]]
        return [bd_bops(table[a:b], base, float_accuracy=float_accuracy) for a, b in pairwise(bounds[1:])]

    def drawn(clips: Int[np.ndarray, " n"], seeds: Int[np.ndarray, " m"]) -> float:
        values = [np.nan if r.value is None else r.value for r in deltas(_resampled(every, clips[None])[0])]
        return float(np.mean(np.array(values)[seeds]))

    own = deltas(np.array([[m.accuracy, m.bops] for m in every]))
    refused = [r for r in own if r.value is None]
    if refused:
        return BdEntry(None, None, refused[0].accuracy_range, refused[0].reason)
    ranges = [r.accuracy_range for r in own if r.accuracy_range is not None]
    (interval,) = bootstrap_intervals(
        drawn,
        clips=len(anchor[0].frames),
        seeds=len(runs),
        generator=np.random.default_rng(seed),
        replicates=REPLICATES,
    )
    value = float(np.mean([r.value for r in own if r.value is not None]))
    span = (float(np.mean([r[0] for r in ranges])), float(np.mean([r[1] for r in ranges])))
    return BdEntry(value, interval.bounds, span, interval.reason, interval.undefined)


def at_budget(runs: Sequence[Measurement], mean: float | None, *, seed: int) -> AtBudget:
    """A method under a budget, as measured once for each training seed.

    Args:
        runs: measurements of the seeds on the same clips.
        mean: the budget's mean, as a share of W8A8; None where it has none.
        seed: seed of the bootstrap.
    """
    interval = _accuracy_interval(runs, (), seed)
    used = [m.clip_bops / m.frames / mean for m in runs] if mean is not None else []
    return AtBudget(
        accuracy=float(np.mean([m.accuracy for m in runs])),
        accuracy_ci95=interval.bounds,
        bops=float(np.mean([m.bops for m in runs])),
        used=float(torch.cat(used).median()) if used else None,
        peak_bops=max(float(m.peak.max()) for m in runs),
        worst_tenth=float(np.mean([_worst_tenth(m) for m in runs])),
    )


def _worst_tenth(measured: Measurement) -> float:
    by_clip = measured.task.accuracy(measured.counts)
    worst = by_clip.nan_to_num(2.0).argsort()[: max(1, len(by_clip) // 10)]  # last, clips without a label
    return float(measured.task.accuracy(measured.counts[worst].sum(0)))


def gain_at_budget(runs: Sequence[Measurement], anchor: Sequence[Measurement], *, seed: int) -> Gain:
    """How much more accurate a method is than an anchor; interval over clips, and over the seeds of both."""
    interval = _accuracy_interval(runs, anchor, seed)
    means = [float(np.mean([m.accuracy for m in own])) for own in (runs, anchor)]
    bounds = None if interval.bounds is None else (100 * interval.bounds[0], 100 * interval.bounds[1])
    return Gain(100 * (means[0] - means[1]), bounds, interval.reason)


def _accuracy_interval(runs: Sequence[Measurement], anchor: Sequence[Measurement], seed: int) -> Interval:
    """The interval of the mean accuracy of some runs, less that of an anchor if there is one."""
    every = [*runs, *anchor]

    def mean(accuracy: Float64[np.ndarray, "r s"], seeds: Int[np.ndarray, "r m"]) -> Float64[np.ndarray, " r"]:
        drawn: np.ndarray = np.take_along_axis(accuracy, seeds % accuracy.shape[1], 1).mean(1)
        return drawn

    def difference(clips: Int[np.ndarray, "r n"], seeds: Int[np.ndarray, "r m"]) -> Float64[np.ndarray, " r"]:
        accuracy = _resampled(every, clips)[:, :, 0]
        own, other = accuracy[:, : len(runs)], accuracy[:, len(runs) :]
        return mean(own, seeds) - mean(other, seeds) if anchor else mean(own, seeds)

    (interval,) = bootstrap_intervals(
        difference,
        clips=len(every[0].frames),
        seeds=max(len(runs), len(anchor)),
        generator=np.random.default_rng(seed),
        replicates=REPLICATES,
        vectorized=True,
    )
    return interval
