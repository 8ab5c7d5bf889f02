"""J and F against other computations of the same definitions."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage

from resq_rl.perception.mask_accuracy import contour, contour_accuracy, j_and_f, region_similarity
from resq_rl.video import DavisVideo

masks = arrays(np.uint8, st.tuples(st.integers(1, 3), st.just(11), st.just(14)), elements=st.integers(0, 1))


def marked(mask: np.ndarray) -> list[tuple[int, int]]:
    """Contour pixels, one by one: those with another value right, below or diagonally below, within the frame."""
    height, width = mask.shape
    found = []
    for y in range(height):
        for x in range(width):
            others = [(y, x + 1), (y + 1, x), (y + 1, x + 1)]
            if any(v < height and u < width and mask[v, u] != mask[y, x] for v, u in others):
                found.append((y, x))
    return found


def brute_f(prediction: np.ndarray, target: np.ndarray, radius: int) -> float:
    """F from distances of every pair of contour pixels."""
    mine, wanted = marked(prediction), marked(target)
    if not mine or not wanted:
        return float(not mine and not wanted)

    def share(ours: list[tuple[int, int]], theirs: list[tuple[int, int]]) -> float:
        near = [min((y - v) ** 2 + (x - u) ** 2 for v, u in theirs) <= radius**2 for y, x in ours]
        return sum(near) / len(near)

    precision, recall = share(mine, wanted), share(wanted, mine)
    return 0.0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)


@given(masks, st.data())
@settings(max_examples=60, deadline=None)
def test_both_equal_a_brute_force(prediction: np.ndarray, data: st.DataObject) -> None:
    """Three radii; masks of any shape, with specks, empty and full."""
    target = data.draw(arrays(np.uint8, prediction.shape, elements=st.integers(0, 1)))
    radius = data.draw(st.integers(1, 3))
    tolerance = (radius - 0.5) / math.hypot(*prediction.shape[1:])
    mine, wanted = torch.from_numpy(prediction), torch.from_numpy(target)
    found = contour_accuracy(mine, wanted, tolerance)
    overlap = region_similarity(mine, wanted)
    for i, (one, two) in enumerate(zip(prediction, target, strict=True)):
        assert float(found[i]) == pytest.approx(brute_f(one, two, radius))
        both, either = np.sum((one > 0) & (two > 0)), np.sum((one > 0) | (two > 0))
        assert float(overlap[i]) == pytest.approx(both / either if either else 1.0)


def f_by_scipy(prediction: np.ndarray, target: np.ndarray) -> float:
    """F at 480p, where the tolerance is ceil(0.008 * 979.7) = 8 pixels, with the dilation of another library."""
    v, u = np.mgrid[-8:9, -8:9]
    edges = []
    for mask in (prediction, target):
        padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge").astype(int)
        corner = padded[:-1, :-1]
        edges.append((corner != padded[:-1, 1:]) | (corner != padded[1:, :-1]) | (corner != padded[1:, 1:]))
    near = [ndimage.binary_dilation(edge, v * v + u * u <= 64) for edge in edges]
    precision, recall = (edges[0] & near[1]).sum() / edges[0].sum(), (edges[1] & near[0]).sum() / edges[1].sum()
    return float(2 * precision * recall / (precision + recall))


def test_contour_accuracy_by_scipy_dilation_at_the_size_of_davis() -> None:
    y, x = np.mgrid[:480, :854]
    one = (((y - 240) / 120.0) ** 2 + ((x - 400) / 90.0) ** 2 < 1).astype(np.uint8)
    two = (((y - 250) / 110.0) ** 2 + ((x - 411) / 100.0) ** 2 < 1 + 0.1 * np.sin(x / 9.0)).astype(np.uint8)
    found = float(contour_accuracy(torch.from_numpy(one)[None], torch.from_numpy(two)[None]))
    assert 0.3 < found < 0.95
    assert found == pytest.approx(f_by_scipy(one, two))


@pytest.mark.real_data
def test_masks_of_davis_five_frames_apart(shared: Path) -> None:
    """J and F of each mask against a later one, at the size of the source."""
    video = DavisVideo(shared / "data" / "davis2016", splits={"test": ["dog", "soapbox"]}, frames=6)
    for clip in video.clips("test"):
        assert clip.labels is not None
        one, two = clip.labels[:1], clip.labels[5:]
        regions, contours = region_similarity(one, two), contour_accuracy(one, two)
        for i, (a, b) in enumerate(zip(one.numpy(), two.numpy(), strict=True)):
            assert float(regions[i]) == pytest.approx((a & b).sum() / (a | b).sum())
            assert float(contours[i]) == pytest.approx(f_by_scipy(a, b))
            assert 0.05 < float(contours[i]) < 0.99


def test_a_contour_by_hand() -> None:
    """A square of 2x2 in a frame of 5x5: its pixels differ right and below, its neighbours above and left too."""
    mask = torch.zeros(1, 5, 5, dtype=torch.bool)
    mask[0, 2:4, 2:4] = True
    expected = torch.tensor([[0, 0, 0, 0, 0], [0, 1, 1, 1, 0], [0, 1, 0, 1, 0], [0, 1, 1, 1, 0], [0, 0, 0, 0, 0]])
    assert torch.equal(contour(mask)[0].int(), expected.int())
    assert not contour(torch.ones(1, 5, 5, dtype=torch.bool)).any()


def test_unlabelled_pixels_count_in_neither_mask() -> None:
    prediction, target = torch.zeros(1, 8, 8, dtype=torch.uint8), torch.zeros(1, 8, 8, dtype=torch.uint8)
    prediction[0, 1:7, 1:7], target[0, 1:7, 1:4] = 1, 1
    assert float(region_similarity(prediction, target)) == pytest.approx(0.5)
    target[0, :, 4:] = 255
    assert float(region_similarity(prediction, target)) == 1.0
    assert float(contour_accuracy(prediction, target)) == 1.0


def test_a_sequence_counts_without_its_first_and_last_frame() -> None:
    target = torch.zeros(4, 20, 30, dtype=torch.uint8)
    target[:, 5:15, 5:15] = 1
    prediction = target.clone()
    prediction[0], prediction[3] = 0, 0  # do not count
    prediction[2] = 0
    assert j_and_f(prediction, target) == (0.5, 0.5, 0.5)


def test_empty_masks_follow_davis() -> None:
    """Nothing predicted and nothing there is right; only one of them empty is wrong."""
    empty, full = torch.zeros(1, 10, 10, dtype=torch.uint8), torch.zeros(1, 10, 10, dtype=torch.uint8)
    full[0, 3:6, 3:6] = 1
    for measure in (region_similarity, contour_accuracy):
        assert [float(measure(a, b)) for a, b in ((empty, empty), (empty, full), (full, empty))] == [1.0, 0.0, 0.0]
