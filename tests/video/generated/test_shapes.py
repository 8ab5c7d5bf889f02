"""Each shape against its outline as a polygon or a circle, worked out by hand and drawn by another library."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.path import Path as Outline

from resq_rl.video.generated.shapes import SHAPES, draw_colours, draw_shape, window

SIZE = (64, 80)
HEIGHT = 0.64 * 2  # from the centre of the triangle to a corner: twice the radius of its inner circle
CORNERS = {
    "box": [(-0.92, -0.72), (0.92, -0.72), (0.92, 0.72), (-0.92, 0.72)],
    "triangle": [(0, HEIGHT), (-HEIGHT * math.sin(math.pi / 3), -0.64), (HEIGHT * math.sin(math.pi / 3), -0.64)],
    "cross": [
        (sign * x, turn * y)
        for sign, turn, points in [
            (1, 1, [(1, 0.34), (0.34, 0.34), (0.34, 1)]),
            (-1, 1, [(0.34, 1), (0.34, 0.34), (1, 0.34)]),
            (-1, -1, [(1, 0.34), (0.34, 0.34), (0.34, 1)]),
            (1, -1, [(0.34, 1), (0.34, 0.34), (1, 0.34)]),
        ]
        for x, y in points
    ],
}


def inside_polygon(corners: list[tuple[float, float]]) -> Callable[[np.ndarray], np.ndarray]:
    return lambda points: Outline([*corners, corners[0]]).contains_points(points.reshape(-1, 2)).reshape(SIZE)


INSIDE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "disk": lambda points: np.hypot(points[..., 0], points[..., 1]) < 1,
    "ring": lambda points: np.abs(np.hypot(points[..., 0], points[..., 1]) - 0.76) < 0.24,
    **{name: inside_polygon(corners) for name, corners in CORNERS.items()},
}


def paint(name: str, centre: tuple[float, float], radius: float, angle: float) -> tuple[np.ndarray, np.ndarray]:
    shape = draw_shape(np.random.default_rng(3), list(SHAPES).index(name) + 1, SIZE, unit=1.0)
    frame, labels = np.full((3, *SIZE), -1.0, dtype=np.float32), np.zeros(SIZE, dtype=np.uint8)
    shape.paint(frame, labels, centre, radius, angle)
    return frame, labels


@pytest.mark.parametrize("name", SHAPES)
@given(centre=st.tuples(st.floats(-20, 84), st.floats(-20, 100)), radius=st.floats(4, 26), angle=st.floats(-7, 7))
def test_labels_are_the_pixels_inside_the_outline(
    name: str, centre: tuple[float, float], radius: float, angle: float
) -> None:
    frame, labels = paint(name, centre, radius, angle)
    y, x = np.mgrid[: SIZE[0], : SIZE[1]] - np.array(centre)[:, None, None]
    turned = np.stack([x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)], -1)
    expected = INSIDE[name](turned / radius)
    wrong = (labels > 0) != expected
    nearly = [INSIDE[name](turned / (radius * scale)) for scale in (0.999, 1.001)]
    bar = np.abs(np.abs(turned / radius) - 0.34).min(axis=-1) < 1e-3 if name == "cross" else False
    hole = np.abs(np.hypot(y, x) - 0.52 * radius) < 0.02 if name == "ring" else False
    assert not (wrong & (nearly[0] == nearly[1]) & ~np.asarray(bar) & ~np.asarray(hole)).any()
    assert set(np.unique(labels)) <= {0, list(SHAPES).index(name) + 1}
    assert (frame[:, labels > 0] >= -0.51).all()  # a labelled pixel is covered by at least a half
    assert (frame >= -1).all()


def test_edges_are_soft() -> None:
    frame, labels = paint("disk", (32.3, 40.2), 15, 0)
    covered = frame[0] + 1  # 0 outside
    edge = (covered > 0) & (labels == 0)
    assert 30 < edge.sum() < 150
    assert covered[edge].max() < covered[labels > 0].max()


def test_later_shapes_hide_earlier_ones() -> None:
    shapes = [draw_shape(np.random.default_rng(label), label, SIZE, unit=1.0) for label in (1, 2)]
    frame, labels = np.zeros((3, *SIZE), dtype=np.float32), np.zeros(SIZE, dtype=np.uint8)
    for shape in shapes:
        shape.paint(frame, labels, (32, 40), 15, 0.0)
    assert labels[32, 40] == 2
    assert set(np.unique(labels)) == {0, 1, 2}


@pytest.mark.parametrize("label", range(1, 6))
def test_centres_stay_inside_and_shapes_move_pause_and_turn(label: int) -> None:
    time = np.arange(0, 300.0)
    moved, parked, turned = [], [], []
    for seed in range(40):
        shape = draw_shape(np.random.default_rng(seed), label, (96, 160), unit=1.0)
        pose = shape.pose(time, (96, 160))
        assert (pose.y >= 0).all()
        assert (pose.y <= 95).all()
        assert (pose.x >= 0).all()
        assert (pose.x <= 159).all()
        assert 5 / 1.2 < pose.radius.min() <= pose.radius.max() < 23 * 1.2
        pace = np.hypot(np.diff(pose.y), np.diff(pose.x))
        moved.append(pace.max() > 0.2)
        parked.append((pace < 1e-9).any())
        turned.append(np.ptp(pose.angle) > 0.5)
    assert 20 <= sum(moved) < 40
    assert 10 <= sum(parked) < 40
    assert sum(turned) >= 20


def test_colour_does_not_tell_the_class() -> None:
    means = np.array(
        [
            np.mean([draw_shape(np.random.default_rng(seed), label, (96, 160), 1.0).fill for seed in range(300)])
            for label in range(1, 6)
        ]
    )
    assert np.ptp(means) < 0.02


@given(st.integers(0, 1000))
def test_colours_differ_in_brightness_as_asked(seed: int) -> None:
    first, second = draw_colours(np.random.default_rng(seed), (0.3, 0.3))
    assert ((first >= 0.02) & (first <= 0.98)).all()
    assert 0.1 < abs(first.mean() - second.mean()) < 0.31


@given(st.floats(-50, 150), st.floats(0, 30))
def test_window_holds_all_pixels_in_reach(centre: float, reach: float) -> None:
    low, high = window(centre, reach, 100)
    near = [pixel for pixel in range(100) if abs(pixel - centre) <= reach]
    assert all(low <= pixel < high for pixel in near)
    assert max(0, high - low) <= len(near) + 3
