"""Choosing the range of lambda from what constant fields gave."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resq_rl.errors import SettingsError
from resq_rl.experiments.training import ConstantFields


def fields(*points: tuple[float, float, float]) -> ConstantFields:
    """From (error, BOPs, accuracy)."""
    errors, bops, accuracies = zip(*points, strict=True)
    return ConstantFields(errors, bops, accuracies, 100)


def test_the_range_ends_at_the_slopes_of_the_hull() -> None:
    known = fields((0.10, 0.5, 0.9), (0.11, 0.3, 0.88), (0.19, 0.2, 0.82), (0.69, 0.1, 0.5))
    # A quarter of 0.01 / 0.2, and 0.08 / 0.1; the last point is too far below the first.
    assert known.trade_off_range() == pytest.approx((0.012, 0.8))


def test_points_above_the_hull_do_not_count() -> None:
    known = fields((0.10, 0.5, 0.9), (0.30, 0.45, 0.85), (0.11, 0.3, 0.88), (0.19, 0.2, 0.82), (0.12, 0.6, 0.9))
    assert known.trade_off_range() == pytest.approx((0.012, 0.8))


def test_all_points_count_where_none_comes_near() -> None:
    known = fields((0.5, 0.5, 0.4), (0.6, 0.3, 0.2))
    assert known.trade_off_range() == pytest.approx((0.12, 0.5))


@pytest.mark.parametrize("points", [[(0.1, 0.5, 0.9)], [(0.1, 0.5, 0.9), (0.05, 0.2, 0.9)], [(0.1, 0.5, 0.9)] * 2])
def test_no_range_is_said(points: list[tuple[float, float, float]]) -> None:
    with pytest.raises(SettingsError, match="no constant choice is more accurate for more bits"):
        fields(*points).trade_off_range()


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0.01, 1), st.floats(0.75, 0.9)), min_size=2, max_size=8),
    st.floats(-4, 2),
)
def test_the_best_choice_and_the_range_agree(points: list[tuple[float, float, float]], exponent: float) -> None:
    """Beyond the upper end the choice never changes any more among those near the float network."""
    known = fields(*points)
    trade_off = 10.0**exponent
    chosen = known.best(trade_off)
    losses = [error + trade_off * bops for error, bops, _ in points]
    assert losses[chosen] == min(losses)
    try:
        low, high = known.trade_off_range()
    except SettingsError:
        return
    assert 0 < low <= high
    if all(p[2] >= 0.8 for p in points):
        beyond = {points[known.best(t)][:2] for t in np.geomspace(1.06 * high + 1e-9, 1e6, 5)}
        assert len(beyond) == 1
