"""Fronts, Bjontegaard deltas and bootstrap intervals: the numbers that a comparison reports.

A front is an array of points with the columns (accuracy, BOPs): accuracy in 0..1, BOPs positive, all in one unit
(fractions of W8A8 in the reports). Intervals draw from the `numpy.random.Generator` that they are given.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64

from resq_rl.errors import ResultsError

__all__ = [
    "BdResult",
    "Interval",
    "bd_bops",
    "bootstrap_intervals",
    "pareto_envelope",
]

MAXIMUM_ACCURACY_LOSS = 0.10  # a Bjontegaard delta ignores accuracies further below the float accuracy
MINIMUM_OVERLAP = 0.5  # shared part of the narrower accuracy range for a Bjontegaard delta
MINIMUM_POINTS = 2  # points on each envelope for a Bjontegaard delta
MAXIMUM_UNDEFINED = 0.05  # share of the bootstrap replicates that may lack a value
CONFIDENCE = 0.95  # share of the replicates inside an interval
CHUNK = 256  # replicates that a vectorised statistic takes at a time


@dataclass(frozen=True)
class BdResult:
    """A Bjontegaard delta of BOPs.

    Attributes:
        value: mean change of BOPs at equal accuracy, in percent (negative: fewer), or None where it is not reported.
        accuracy_range: the accuracies (0..1) that `value` is averaged over, or None where the fronts share none.
        reason: why `value` is None.
    """

    value: float | None
    accuracy_range: tuple[float, float] | None
    reason: str | None


@dataclass(frozen=True)
class Interval:
    """A percentile bootstrap interval.

    Attributes:
        bounds: lower and upper bound, in the statistic's unit, or None where no interval is reported.
        undefined: the number of replicates without a finite value.
        reason: why `bounds` is None.
    """

    bounds: tuple[float, float] | None
    undefined: int
    reason: str | None


def pareto_envelope(points: Sequence[tuple[float, float]] | np.ndarray) -> Float64[np.ndarray, "front 2"]:
    """The points that no other point beats, sorted by BOPs; accuracy and BOPs strictly increase along it.

    Args:
        points: rows of (accuracy, BOPs), in any order, of any number.

    Raises:
        ResultsError: rows are not pairs, a value is not finite, or BOPs are not positive.
    """
    rows = np.asarray(points, dtype=np.float64)
    if rows.size == 0:
        return np.empty((0, 2))
    if rows.ndim != 2 or rows.shape[1] != 2:
        raise ResultsError(f"A front needs rows of (accuracy, BOPs); got an array of shape {rows.shape}.")
    wrong = ~np.isfinite(rows).all(axis=1) | (rows[:, 1] <= 0)
    if wrong.any():
        accuracy, bops = rows[wrong][0]
        raise ResultsError(
            f"A front needs finite accuracies and positive BOPs; got the point (accuracy {accuracy}, "
            f"BOPs {bops}). Leave out points that were not measured."
        )
    rows = rows[np.lexsort((-rows[:, 0], rows[:, 1]))]
    best_before = np.concatenate(([-np.inf], np.maximum.accumulate(rows[:, 0])[:-1]))
    return rows[rows[:, 0] > best_before]


def bd_bops(
    front: Sequence[tuple[float, float]] | np.ndarray,
    anchor: Sequence[tuple[float, float]] | np.ndarray,
    *,
    float_accuracy: float,
) -> BdResult:
    """Mean change of BOPs from `anchor` to `front` at equal accuracy (Bjontegaard delta), in percent.

    With f(a) the logarithm of BOPs as a monotone piecewise cubic (PCHIP) of the accuracy a along an envelope,

        value = 100 (exp(mean over a of f_front(a) - f_anchor(a)) - 1),

    the mean taken over the accuracies that both envelopes cover, down to 10 points (0.10) below `float_accuracy`. If
    they share less than half of the narrower range, or an envelope has fewer than two points, only the reason is
    reported. After Bjontegaard, VCEG-M33 (2001); interpolation by the `bjontegaard` package.

    Args:
        front, anchor: rows of (accuracy 0..1, BOPs); only their envelopes count.
        float_accuracy: accuracy of the float network, 0..1.

    Raises:
        ResultsError: as `pareto_envelope`.
    """
    first, second = pareto_envelope(front), pareto_envelope(anchor)
    for name, envelope in (("first", first), ("second", second)):
        if len(envelope) < MINIMUM_POINTS:
            points = f"{len(envelope)} point{'' if len(envelope) == 1 else 's'}"
            return BdResult(None, None, f"the envelope of the {name} front has {points}; {MINIMUM_POINTS} are needed")
    floor = float_accuracy - MAXIMUM_ACCURACY_LOSS
    ranges = [(max(envelope[0, 0], floor), envelope[-1, 0]) for envelope in (first, second)]
    low, high = max(start for start, _ in ranges), min(end for _, end in ranges)
    narrower = min(end - start for start, end in ranges)
    if narrower <= 0:
        return BdResult(None, None, f"a front has no range of accuracies above {floor:.3f}, 10 points under float")
    if high <= low or high - low < MINIMUM_OVERLAP * narrower:
        shared = max(high - low, 0.0)
        reason = (
            f"the fronts share an accuracy range of {shared:.4f}, less than half of the narrower one ({narrower:.4f})"
        )
        return BdResult(None, (float(low), float(high)) if high > low else None, reason)
    return BdResult(_log_change(first, second, low, high), (float(low), float(high)), None)


def _log_change(first: np.ndarray, second: np.ndarray, low: float, high: float) -> float:
    from bjontegaard import bd_rate  # slow to import: it brings pyplot

    _, of_second, of_first = bd_rate(
        second[:, 1],
        second[:, 0],
        first[:, 1],
        first[:, 0],
        method="pchip",
        require_matching_points=False,
        interpolators=True,
        min_overlap=0,
    )
    change = (of_first.integrate(low, high) - of_second.integrate(low, high)) / (high - low)
    return float(100.0 * (10.0**change - 1.0))


def bootstrap_intervals(
    statistic: Callable[..., Any],
    *,
    clips: int,
    seeds: int = 1,
    generator: np.random.Generator,
    replicates: int = 2000,
    vectorized: bool = False,
) -> list[Interval]:
    """95% percentile intervals of one or several statistics over the same draws of clips and seeds.

    Every replicate draws the clips and the training seeds with replacement. Methods that are compared must be computed
    in one statistic, from the same indices.

    Args:
        statistic: called as `statistic(clip_indices, seed_indices)` with integer arrays of shapes (clips,) and
            (seeds,). It returns a number or an array of shape (values,). A value that is not finite counts as
            undefined. If `vectorized`, the arguments have shapes (n, clips) and (n, seeds), and the result has shape
            (n,) or (n, values), for any n.
        clips, seeds: the numbers of clips and of training runs. A statistic averages over the drawn training runs.
        replicates: the number of draws.

    Returns:
        One interval per value. Its bounds are None, with the reason, for a single clip or where more than 5% of the
        replicates are undefined.

    Raises:
        ResultsError: the statistic returned an array of another shape.
    """
    clip_draws = generator.integers(clips, size=(replicates, clips))
    seed_draws = generator.integers(seeds, size=(replicates, seeds))
    if vectorized:
        starts = range(0, replicates, CHUNK)
        parts = [np.asarray(statistic(clip_draws[i : i + CHUNK], seed_draws[i : i + CHUNK])) for i in starts]
    else:
        parts = [np.asarray([statistic(*draw) for draw in zip(clip_draws, seed_draws, strict=True)])]
    if any(part.ndim not in (1, 2) for part in parts) or sum(map(len, parts)) != replicates:
        raise ResultsError(
            f"A bootstrap statistic must return a number or an array of values per replicate; got arrays of the "
            f"shapes {sorted({part.shape for part in parts})} for {replicates} replicates."
        )
    values = np.concatenate(parts).astype(np.float64).reshape(replicates, -1)
    return [_percentiles(column, clips) for column in values.T]


def _percentiles(values: Float64[np.ndarray, " replicates"], clips: int) -> Interval:
    defined = values[np.isfinite(values)]
    undefined = len(values) - len(defined)
    if clips < 2:
        return Interval(None, undefined, "one clip gives no interval")
    if undefined > MAXIMUM_UNDEFINED * len(values):
        share = 100 * undefined / len(values)
        return Interval(None, undefined, f"{share:.0f}% of the bootstrap replicates have no value")
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(defined, (tail, 1 - tail))
    return Interval((float(low), float(high)), undefined, None)
