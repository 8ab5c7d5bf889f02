import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import binary_opening, gaussian_filter, gaussian_filter1d

from resq_rl.video.clip import IGNORE
from resq_rl.video.datasets.tracking import follow, object_box
from resq_rl.video.images import Box


def test_box_by_hand() -> None:
    labels = np.zeros((10, 20), dtype=np.uint8)
    assert object_box(labels) is None
    labels[9, 0] = IGNORE
    assert object_box(labels) is None
    labels[2, 5] = 1
    labels[4, 3] = 7
    assert object_box(labels) == (3.0, 2.0, 6.0, 5.0)


@given(st.integers(0, 1000), st.integers(1, 6))
def test_thick_parts_agree_with_another_library(seed: int, thickness: int) -> None:
    noise = gaussian_filter(np.random.default_rng(seed).normal(size=(30, 40)), 2.0)
    labels = (noise > 0.1).astype(np.uint8)
    rows, columns = binary_opening(labels, np.ones((thickness, thickness))).nonzero()
    if rows.size:
        expected = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert object_box(labels, thickness) == expected


def test_ropes_do_not_count_unless_there_is_nothing_else() -> None:
    labels = np.zeros((40, 60), dtype=np.uint8)
    labels[10, :50] = 1
    assert object_box(labels, 5) == (0.0, 10.0, 50.0, 11.0)
    labels[8:20, 5:15] = 2
    assert object_box(labels, 5) == (5.0, 8.0, 15.0, 20.0)
    assert object_box(labels) == (0.0, 8.0, 50.0, 20.0)


boxes = st.builds(
    lambda left, top, width, height: (left, top, left + width, top + height),
    st.floats(0, 300),
    st.floats(0, 300),
    st.floats(20, 200),
    st.floats(20, 200),
)


@given(st.lists(boxes, min_size=1, max_size=12), st.floats(1.0, 2.0), st.floats(0.5, 2.0))
def test_unsmoothed_window_is_the_box_grown_to_the_aspect(found: list[Box], factor: float, aspect: float) -> None:
    for box, (left, top, right, bottom) in zip(found, follow(list(found), factor, aspect, 0), strict=True):
        assert (bottom - top) / (right - left) == pytest.approx(aspect)
        assert (left + right) / 2 == pytest.approx((box[0] + box[2]) / 2)
        assert (top + bottom) / 2 == pytest.approx((box[1] + box[3]) / 2)
        shares = ((box[3] - box[1]) / (bottom - top), (box[2] - box[0]) / (right - left))
        assert max(shares) == pytest.approx(1 / factor)


def test_a_still_object_gives_a_still_window() -> None:
    windows = follow([(10.0, 20.0, 50.0, 60.0)] * 30, 1.3, 1.0)
    assert np.array(windows) == pytest.approx(np.tile([4.0, 14.0, 56.0, 66.0], (30, 1)))


def test_smoothing_agrees_with_another_library_and_removes_jitter() -> None:
    steps = np.arange(60)
    jitter = np.random.default_rng(0).normal(0, 3, 60)
    found: list[Box | None] = [(float(x), 0.0, float(x) + 40, 40.0) for x in 2 * steps + jitter]
    centres = np.array([(window[0] + window[2]) / 2 for window in follow(found, 1.3, 1.0, 4.0)])
    assert centres == pytest.approx(gaussian_filter1d(2 * steps + jitter + 20, 4, mode="nearest", truncate=3))
    assert np.diff(centres, 2)[8:-8].std() < 0.1 * np.diff(jitter, 2).std()


def test_hidden_object_is_passed_on_a_straight_way() -> None:
    found: list[Box | None] = [None, (0.0, 0.0, 40.0, 40.0), None, None, None, (80.0, 0.0, 120.0, 40.0), None]
    centres = [(window[0] + window[2]) / 2 for window in follow(found, 1.0, 1.0, 0)]
    assert centres == pytest.approx([20, 20, 40, 60, 80, 100, 100])


def test_windows_of_tiny_objects_keep_some_surroundings() -> None:
    left, top, right, bottom = follow([(5.0, 5.0, 6.0, 6.0)], 1.3, 1.0)[0]
    assert (right - left, bottom - top) == pytest.approx((16, 16))
