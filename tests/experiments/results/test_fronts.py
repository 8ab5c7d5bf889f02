"""Accuracy at equal budget, on measurements whose figures are known by hand."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from resq_rl.envs import Measurement
from resq_rl.experiments.results.fronts import at_budget, gain_at_budget
from resq_rl.perception import Segmentation

FRAMES, PIXELS = 4, 100


def measured(right: Sequence[int], bops: Sequence[float], peak: float = 0.2) -> Measurement:
    """Clips of FRAMES frames: of PIXELS of either class, `right` are right in each class; BOPs are sums by clip."""
    counts = torch.zeros(len(right), 2, 2, dtype=torch.int64)
    for clip, own in enumerate(right):
        counts[clip] = torch.tensor([[own, PIXELS - own], [PIXELS - own, own]])
    count, zeros = len(right), torch.zeros(len(right), dtype=torch.float64)
    return Measurement(
        task=Segmentation(classes=2),
        counts=counts,
        error=zeros,
        keyframe=zeros,
        residual=torch.tensor(bops, dtype=torch.float64),
        policy=zeros,
        elementwise=zeros,
        peak=torch.full((count,), peak, dtype=torch.float64),
        frames=torch.full((count,), FRAMES),
        keyframes=torch.zeros(count, dtype=torch.int64),
        state_bytes=0,
        settings={},
    )


def iou(right: float) -> float:
    """Of two classes that are mistaken for each other alike: right / (right + twice the wrong ones)."""
    return right / (right + 2 * (PIXELS - right))


def test_a_method_at_the_budget_is_averaged_over_seeds_and_its_highest_frame_counts() -> None:
    runs = [measured([80, 80, 80], [0.4, 0.6, 0.8], peak=0.2), measured([90, 90, 90], [0.8, 0.8, 0.4], peak=0.25)]
    found = at_budget(runs, 0.2, seed=0)
    assert found.accuracy == pytest.approx((iou(80) + iou(90)) / 2)
    assert found.bops == pytest.approx((1.8 + 2.0) / 2 / (3 * FRAMES))
    assert found.used == pytest.approx(0.6 / FRAMES / 0.2)  # the lower middle one of six clips
    assert found.peak_bops == 0.25
    assert found.accuracy_ci95 == pytest.approx((iou(80), iou(90)))  # clips are alike, so only the seeds vary
    assert at_budget(runs, None, seed=0).used is None


def test_the_worst_tenth_of_clips() -> None:
    """Of twenty clips the two that lose most, in each run its own; a clip at least."""
    many = measured([90] * 9 + [20] + [90] * 9 + [60], [0.4] * 20)
    other = measured([30] + [90] * 18 + [10], [0.4] * 20)
    pairs = [(20 + 60) / 2, (30 + 10) / 2]
    assert at_budget([many, other], None, seed=0).worst_tenth == pytest.approx(sum(map(iou, pairs)) / 2)
    assert at_budget([measured([90, 70, 80], [0.4] * 3)], None, seed=0).worst_tenth == pytest.approx(iou(70))


def test_a_gain_is_paired_over_clips() -> None:
    """Both methods lose much on hard clips; the difference hardly varies with the clips that are drawn."""
    hard_and_easy = [50, 60, 70, 80, 90, 95]
    own, anchor = measured([r + 3 for r in hard_and_easy], [1.0] * 6), measured(hard_and_easy, [1.0] * 6)
    gain = gain_at_budget([own], [anchor], seed=0)
    mean = float(np.mean(hard_and_easy))
    assert gain.points == pytest.approx(100 * (iou(mean + 3) - iou(mean)))
    assert gain.ci95 is not None
    assert 0 < gain.ci95[0] < gain.points < gain.ci95[1]
    alone = at_budget([own], 0.2, seed=0).accuracy_ci95
    assert alone is not None
    assert gain.ci95[1] - gain.ci95[0] < 0.2 * 100 * (alone[1] - alone[0])
    assert gain_at_budget([own], [own], seed=0).ci95 == (0.0, 0.0)


def test_a_single_clip_has_no_interval() -> None:
    own = measured([80], [1.0])
    gain = gain_at_budget([own], [own], seed=0)
    assert (gain.points, gain.ci95, gain.reason) == (0.0, None, "one clip gives no interval")
