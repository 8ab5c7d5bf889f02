import numpy as np

from resq_rl.video.datasets.points import points_box


def test_a_box_holds_the_points_that_count() -> None:
    points = np.array([[3, 5, 1], [7, 2, 1], [90, 90, 0]], np.float32)
    assert points_box(points) == (3.0, 2.0, 8.0, 6.0)
    assert points_box(points * np.float32(0)) is None
