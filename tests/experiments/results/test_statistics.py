import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from scipy.interpolate import PchipInterpolator

from resq_rl.errors import ResultsError
from resq_rl.experiments.results.statistics import bd_bops, bootstrap_intervals, pareto_envelope

ANCHOR = [(0.62, 0.10), (0.66, 0.15), (0.70, 0.25), (0.71, 0.40)]

fronts = st.lists(st.tuples(st.floats(0.4, 0.8), st.floats(0.01, 1.0)), min_size=1, max_size=12)


def integrated(front: list[tuple[float, float]], anchor: list[tuple[float, float]], low: float, high: float) -> float:
    """The delta in percent by dense trapezoids over scipy's own interpolation: an independent implementation."""
    accuracy = np.linspace(low, high, 40_001)
    logs = []
    for points in (front, anchor):
        ordered = np.array(sorted(points))
        logs.append(PchipInterpolator(ordered[:, 0], np.log(ordered[:, 1]))(accuracy))
    return 100 * (math.exp(np.trapezoid(logs[0] - logs[1], accuracy) / (high - low)) - 1)


def test_envelope_keeps_what_no_point_beats() -> None:
    points = [(0.7, 0.3), (0.6, 0.1), (0.65, 0.3), (0.7, 0.4), (0.6, 0.2), (0.7, 0.3), (0.5, 0.05)]
    assert pareto_envelope(points).tolist() == [[0.5, 0.05], [0.6, 0.1], [0.7, 0.3]]


@given(fronts)
def test_envelope_against_pairwise_comparison(points: list[tuple[float, float]]) -> None:
    envelope = [tuple(row) for row in pareto_envelope(points)]
    unbeaten = {
        (a, b)
        for a, b in points
        if not any((other >= a and cost <= b) and (other, cost) != (a, b) for other, cost in points)
    }
    assert set(envelope) == unbeaten
    assert envelope == sorted(unbeaten)


def test_empty_envelope() -> None:
    assert pareto_envelope([]).shape == (0, 2)


@pytest.mark.parametrize("point", [(math.nan, 0.1), (0.5, math.inf), (0.5, 0.0), (0.5, -1.0)])
def test_envelope_refuses_unmeasured_points(point: tuple[float, float]) -> None:
    with pytest.raises(ResultsError, match="finite accuracies and positive BOPs"):
        pareto_envelope([(0.6, 0.1), point])


@pytest.mark.parametrize("factor", [0.25, 0.6, 1.0, 3.0])
def test_delta_of_a_scaled_front_is_its_factor(factor: float) -> None:
    front = [(accuracy, factor * bops) for accuracy, bops in ANCHOR]
    result = bd_bops(front, ANCHOR, float_accuracy=0.72)
    assert result.value == pytest.approx(100 * (factor - 1), abs=1e-9)
    assert result.accuracy_range == (0.62, 0.71)
    assert result.reason is None


def test_delta_of_exponential_fronts_is_the_ratio_at_the_middle() -> None:
    # log BOPs linear in accuracy: the mean difference over [0.60, 0.70] is the difference at 0.65.
    front = [(a, 0.1 * math.exp(10 * (a - 0.6))) for a in (0.60, 0.64, 0.70)]
    anchor = [(a, 0.2 * math.exp(14 * (a - 0.6))) for a in (0.60, 0.67, 0.70)]
    expected = 100 * (0.5 * math.exp((10 - 14) * 0.05) - 1)
    assert bd_bops(front, anchor, float_accuracy=0.65).value == pytest.approx(expected, rel=1e-9)


def test_delta_against_independent_integration() -> None:
    front = [(0.625, 0.06), (0.64, 0.08), (0.68, 0.11), (0.705, 0.2), (0.715, 0.5)]
    result = bd_bops(front, ANCHOR, float_accuracy=0.70)
    assert result.value == pytest.approx(integrated(front, ANCHOR, 0.625, 0.71), rel=1e-6)


def test_delta_stays_within_ten_points_of_float() -> None:
    front = [(0.45, 0.01), (0.60, 0.09), (0.69, 0.15), (0.71, 0.3)]
    anchor = [(0.40, 0.02), (0.55, 0.08), (0.66, 0.15), (0.72, 0.6)]
    result = bd_bops(front, anchor, float_accuracy=0.72)
    assert result.accuracy_range == pytest.approx((0.62, 0.71))
    assert result.value == pytest.approx(integrated(front, anchor, 0.62, 0.71), rel=1e-6)


def test_delta_looks_at_envelopes_only() -> None:
    dominated = [(0.63, 0.9), (0.5, 0.7)]
    plain, crowded = (bd_bops(f, ANCHOR, float_accuracy=0.72) for f in (ANCHOR[1:], ANCHOR[1:] + dominated))
    assert plain == crowded


def test_delta_is_antisymmetric() -> None:
    front = [(a, b * (0.5 + a)) for a, b in ANCHOR]
    there, back = (bd_bops(*pair, float_accuracy=0.72).value for pair in ((front, ANCHOR), (ANCHOR, front)))
    assert there is not None
    assert back is not None
    assert (1 + there / 100) * (1 + back / 100) == pytest.approx(1)


@pytest.mark.parametrize(
    ("front", "reason"),
    [
        ([], "first front has 0 points"),
        ([(0.7, 0.1)], "first front has 1 point;"),
        ([(0.7, 0.2), (0.7, 0.1)], "first front has 1 point;"),
        ([(0.72, 0.1), (0.74, 0.2)], "share an accuracy range of 0.0000"),
        ([(0.70, 0.1), (0.74, 0.2)], "share an accuracy range of 0.0100, less than half of the narrower one (0.0400)"),
        ([(0.30, 0.1), (0.50, 0.2)], "no range of accuracies above 0.620"),
    ],
)
def test_delta_is_not_reported_with_a_reason(front: list[tuple[float, float]], reason: str) -> None:
    result = bd_bops(front, ANCHOR, float_accuracy=0.72)
    assert result.value is None
    assert reason in (result.reason or "")


@given(fronts, fronts)
def test_delta_is_a_finite_number_or_a_reason(a: list[tuple[float, float]], b: list[tuple[float, float]]) -> None:
    result = bd_bops(a, b, float_accuracy=0.75)
    assert (result.value is None) == (result.reason is not None)
    assert result.value is None or (math.isfinite(result.value) and result.value > -100)


def means(values: np.ndarray) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Mean over the drawn clips and seeds of values (seeds, clips), for one draw or a batch of draws."""

    def statistic(clips: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        drawn = values[seeds[..., :, np.newaxis], clips[..., np.newaxis, :]]
        return np.asarray(drawn.mean(axis=(-1, -2)))

    return statistic


def test_bootstrap_covers_a_known_mean() -> None:
    generator, covered, trials = np.random.default_rng(0), 0, 300
    for _ in range(trials):
        values = generator.normal(3.0, 2.0, size=(1, 40))
        (interval,) = bootstrap_intervals(means(values), clips=40, generator=generator, replicates=400, vectorized=True)
        assert interval.bounds is not None
        covered += interval.bounds[0] <= 3.0 <= interval.bounds[1]
    assert 0.90 <= covered / trials <= 0.98


def test_bootstrap_width_of_a_normal_mean() -> None:
    values = np.random.default_rng(1).normal(size=(1, 400))
    (interval,) = bootstrap_intervals(
        means(values), clips=400, generator=np.random.default_rng(2), replicates=4000, vectorized=True
    )
    assert interval.bounds is not None
    expected = 2 * 1.96 * values.std() / math.sqrt(400)
    assert interval.bounds[1] - interval.bounds[0] == pytest.approx(expected, rel=0.06)


def test_bootstrap_counts_the_spread_between_seeds() -> None:
    values = np.arange(3.0)[:, np.newaxis] + np.zeros((3, 20))
    (interval,) = bootstrap_intervals(means(values), clips=20, seeds=3, generator=np.random.default_rng(0))
    assert interval.bounds == (0.0, 2.0)


def test_bootstrap_is_deterministic_and_vectorization_changes_nothing() -> None:
    values = np.random.default_rng(3).normal(size=(2, 15))
    one, again, batched = (
        bootstrap_intervals(
            means(values), clips=15, seeds=2, generator=np.random.default_rng(4), replicates=600, vectorized=vectorized
        )
        for vectorized in (False, False, True)
    )
    assert one == again == batched


def test_bootstrap_of_several_values_draws_once_for_all() -> None:
    values = np.random.default_rng(5).normal(size=30)

    def statistic(clips: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        mean = values[clips].mean()
        return np.array([mean, 2 * mean])

    first, second = bootstrap_intervals(statistic, clips=30, generator=np.random.default_rng(6), replicates=200)
    assert first.bounds is not None
    assert second.bounds == pytest.approx([2 * bound for bound in first.bounds])


@pytest.mark.parametrize(("share", "reported"), [(0.04, True), (0.10, False)])
def test_undefined_replicates_are_counted_and_too_many_give_no_interval(share: float, reported: bool) -> None:
    calls = 0

    def statistic(clips: np.ndarray, seeds: np.ndarray) -> float:
        nonlocal calls
        calls += 1
        return math.nan if calls <= share * 1000 else float(clips.mean())

    (interval,) = bootstrap_intervals(statistic, clips=10, generator=np.random.default_rng(0), replicates=1000)
    assert interval.undefined == 1000 * share
    assert (interval.bounds is not None) == reported
    assert reported or interval.reason == "10% of the bootstrap replicates have no value"


def test_one_clip_gives_no_interval() -> None:
    (interval,) = bootstrap_intervals(means(np.ones((1, 1))), clips=1, generator=np.random.default_rng(0))
    assert (interval.bounds, interval.reason) == (None, "one clip gives no interval")


@pytest.mark.parametrize(
    ("statistic", "vectorized"),
    [
        (lambda clips, seeds: 1.0, True),
        (lambda clips, seeds: np.ones(3), True),
        (lambda clips, seeds: np.ones((2, 2)), False),
        (lambda clips, seeds: np.ones((len(clips), 2, 2)), True),
    ],
)
def test_a_statistic_of_another_shape_is_refused(statistic: Callable[..., object], vectorized: bool) -> None:
    with pytest.raises(ResultsError, match="a number or an array of values per replicate"):
        bootstrap_intervals(statistic, clips=3, generator=np.random.default_rng(0), vectorized=vectorized)


@pytest.mark.parametrize("seeds", [1, 3])
def test_intervals_are_those_of_scipy(seeds: int) -> None:
    values = np.random.default_rng(7).normal(size=(seeds, 12))
    samples = [np.arange(12), np.arange(seeds)][: 1 + (seeds > 1)]  # SciPy refuses a sample of one training run

    def statistic(clips: np.ndarray, runs: np.ndarray | None = None) -> float:
        return float(values[:, clips].mean() if runs is None else values[np.ix_(runs, clips)].mean())

    truth = scipy.stats.bootstrap(
        samples, statistic, n_resamples=500, vectorized=False, method="percentile", rng=np.random.default_rng(8)
    )
    (interval,) = bootstrap_intervals(
        statistic, clips=12, seeds=seeds, generator=np.random.default_rng(8), replicates=500
    )
    assert interval.bounds == pytest.approx(tuple(truth.confidence_interval), rel=1e-12)
