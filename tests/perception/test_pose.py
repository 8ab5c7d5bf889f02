"""Human pose: what heatmaps say, and how predictions of points are judged."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from resq_rl.errors import NetworkError, SettingsError, VideoError
from resq_rl.perception import CompactPose, Pose, PretrainSettings, Task, Trainable, measure_counts, pretrain
from resq_rl.video import JOINTS, Clip, FigureVideo

TASK = Pose()
SIZE = (96, 160)
SMALL = Pose(points=("left_hip", "nose", "right_shoulder"), stride=1)


def figures(frames: int, seed: int = 0) -> Tensor:
    """Points all over the frame, some of which do not count."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.rand(frames, len(JOINTS), 2, generator=generator) * torch.tensor([150.0, 86.0]) + 5
    counted = (torch.rand(frames, len(JOINTS), 1, generator=generator) < 0.8).float()
    return torch.cat([places, counted], -1)


def moved(target: Tensor, seed: int, pixels: float = 20.0) -> Tensor:
    """Predictions near the target."""
    generator = torch.Generator().manual_seed(seed)
    shift = (torch.rand(*target.shape[:2], 2, generator=generator) - 0.5) * 2 * pixels
    return torch.cat([target[..., :2] + shift, torch.rand(*target.shape[:2], 1, generator=generator)], -1)


def wrong_by_hand(task: Pose, prediction: Tensor, target: Tensor) -> np.ndarray:
    """Frame by frame and point by point: -1 does not count, 0 right, 1 wrong."""
    out = np.full(target.shape[:2], -1)
    left_hip, right_shoulder = task.names.index("left_hip"), task.names.index("right_shoulder")
    for t, (own, seen) in enumerate(zip(target.double().numpy(), prediction.double().numpy(), strict=True)):
        if task.normaliser == "torso":
            size = float(np.hypot(*(own[left_hip, :2] - own[right_shoulder, :2])))
        else:
            counted = own[own[:, 2] > 0, :2]
            size = float(np.max(counted.max(0) - counted.min(0))) if len(counted) else 0.0
        for k in range(len(own)):
            if own[k, 2] > 0:
                out[t, k] = int(np.hypot(*(seen[k, :2] - own[k, :2])) > task.share * size)
    return out


def test_pose_is_a_task_that_networks_can_be_trained_for() -> None:
    assert isinstance(TASK, Task)
    assert isinstance(TASK, Trainable)
    assert TASK.metric == "PCK@0.2"
    assert Pose(share=0.1, normaliser="box").metric == "PCK@0.1 of box"


@pytest.mark.parametrize("normaliser", ["torso", "box"])
@pytest.mark.parametrize("share", [0.1, 0.2, 0.5])
def test_pck_equals_a_count_by_hand(normaliser: str, share: float) -> None:
    task = Pose(share=share, normaliser=normaliser)  # type: ignore[arg-type]
    target = figures(40)
    prediction = moved(target, 1, pixels=150 * share)
    expected = wrong_by_hand(task, prediction, target)
    counts = task.counts(prediction, target)
    assert (counts[..., 0].numpy() == (expected == 0)).all()
    assert (counts[..., 1].numpy() == (expected >= 0)).all()
    assert 0.02 < (expected == 0).sum() / (expected >= 0).sum() < 0.98
    share_right = (expected == 0).sum() / (expected >= 0).sum()
    assert float(task.accuracy(counts.sum(0))) == pytest.approx(share_right)
    by_frame = [(row == 0).sum() / (row >= 0).sum() for row in expected]
    assert task.accuracy(counts).tolist() == pytest.approx(by_frame)


def test_accuracy_without_points_is_not_a_number() -> None:
    target = figures(2)
    target[..., 2] = 0
    counts = TASK.counts(moved(target, 2), target)
    assert not counts.any()
    assert torch.isnan(TASK.accuracy(counts)).all()


def test_errors_lie_where_points_should_be_and_where_they_were_seen() -> None:
    target = figures(8)
    prediction = moved(target, 3, pixels=60.0)  # some outside of the frame
    wrong = wrong_by_hand(TASK, prediction, target)
    error = TASK.error(prediction, target, TASK.error_table(torch.zeros(13, 2, dtype=torch.int64), "iou"), SIZE)
    assert error.shape == (8, *SIZE)
    assert error.mean((1, 2)).tolist() == pytest.approx([(row == 1).sum() / 13 for row in wrong], rel=1e-5)
    for t in range(8):
        expected = np.zeros(SIZE)
        for k in np.flatnonzero(wrong[t] == 1):
            for x, y, _ in (target[t, k].tolist(), prediction[t, k].tolist()):
                row, column = int(np.clip(np.round(y), 0, 95)), int(np.clip(np.round(x), 0, 159))
                expected[row, column] += 0.5 * 96 * 160 / 13
        np.testing.assert_allclose(error[t].numpy(), expected, rtol=1e-5)


def test_a_perfect_prediction_costs_nothing() -> None:
    target = figures(5)
    prediction = torch.cat([target[..., :2], torch.ones(5, 13, 1)], -1)
    assert not TASK.error(prediction, target, torch.ones(13), SIZE).any()
    assert float(TASK.accuracy(TASK.counts(prediction, target).sum(0))) == 1.0


@pytest.mark.parametrize("kind", ["heatmaps", "probabilities"])
@pytest.mark.parametrize("stride", [1, 4])
def test_gaussian_heat_says_where_its_centre_is(stride: int, kind: Any) -> None:
    """Independent of the task's own drawing: exp(-d^2 / 2) by numpy as probabilities, its logarithm as logits."""
    task, (height, width) = dataclasses.replace(SMALL, stride=stride, kind=kind), (16 * stride, 24 * stride)
    rng = np.random.default_rng(0)
    centres = rng.uniform(2 * stride, 14 * stride, size=(5, 3, 2))
    y, x = (np.arange(n // stride) * stride + (stride - 1) / 2 for n in (height, width))
    squared = (x[None, :] - centres[..., 0, None, None]) ** 2 + (y[:, None] - centres[..., 1, None, None]) ** 2
    heat = np.exp(-squared / (2 * (1.3 * stride) ** 2))
    raw = 0.8 * heat if kind == "probabilities" else np.log(heat) + 7.0
    found = task.predict(task.output(torch.from_numpy(raw).float(), (height, width)))
    np.testing.assert_allclose(found[..., :2].numpy(), centres, atol=0.02 * stride)
    for t in range(5):
        for k in range(3):
            row, column = np.unravel_index(heat[t, k].argmax(), heat[t, k].shape)
            near = heat[t, k, row - 1 : row + 2, column - 1 : column + 2].sum()
            assert float(found[t, k, 2]) == pytest.approx(near / heat[t, k].sum(), rel=1e-4)


def test_peaks_in_corners_stay_in_the_frame() -> None:
    logits = torch.full((1, 3, 8, 12), -5.0)
    logits[0, 0, 0, 0], logits[0, 1, 7, 11], logits[0, 2, 0, 11] = 3.0, 3.0, 3.0
    assert SMALL.predict(logits)[0, :, :2].tolist() == [[0, 0], [11, 7], [11, 0]]


LANDMARKS = Pose(points=5, kind="landmarks", normaliser="box")


def landmarks_of(values: int, points: int = 5, frames: int = 4) -> np.ndarray:
    """x and y well within the frame, and further values that mean something else."""
    rng = np.random.default_rng(values)
    places = rng.uniform((10, 10), (149, 85), size=(frames, points, 2))
    return np.concatenate([places, rng.normal(0, 100, size=(frames, points, values - 2))], 2).astype(np.float32)


@pytest.mark.parametrize("values", [2, 3, 4, 5, 7])
@pytest.mark.parametrize("shape", ["(b, k v)", "(b, k, v)", "(b, k v, 1, 1)", "(b, 1, k v)", "(b, 1, k, v)"])
def test_landmarks_of_any_number_of_values_are_read(values: int, shape: str) -> None:
    array = landmarks_of(values)
    flat, nested = torch.from_numpy(array.reshape(4, -1)), torch.from_numpy(array)
    raw = {
        "(b, k v)": flat,
        "(b, k, v)": nested,
        "(b, k v, 1, 1)": flat[:, :, None, None],
        "(b, 1, k v)": flat[:, None],
        "(b, 1, k, v)": nested[:, None],
    }[shape]
    told = dataclasses.replace(LANDMARKS, values=values)
    for task in (told, LANDMARKS if values <= 5 else told):
        found = task.predict(task.output((torch.zeros(4, 1), raw)[1:], SIZE))
        np.testing.assert_allclose(found[..., :2].numpy(), array[..., :2], rtol=0, atol=0.01)
    single = told.predict(told.output({"points": raw[:1]}, SIZE))  # one clip
    np.testing.assert_allclose(single[..., :2].numpy(), array[:1, :, :2], rtol=0, atol=0.01)


@pytest.mark.parametrize("axes", ["xy", "yx"])
@pytest.mark.parametrize("coordinates", ["pixels", "frame"])
def test_landmarks_are_read_in_their_unit_and_order(axes: Any, coordinates: Any) -> None:
    array = landmarks_of(3)
    raw = array.copy()
    if coordinates == "frame":  # from the left edge of the first pixel, which lies half a pixel before its centre
        raw[..., 0], raw[..., 1] = (array[..., 0] + 0.5) / 160, (array[..., 1] + 0.5) / 96
    if axes == "yx":
        raw[..., [0, 1]] = raw[..., [1, 0]]
    task = dataclasses.replace(LANDMARKS, coordinates=coordinates, axes=axes)
    found = task.predict(task.output(torch.from_numpy(raw)[:, None], SIZE))
    np.testing.assert_allclose(found[..., :2].numpy(), array[..., :2], rtol=0, atol=0.01)


def test_channels_choose_among_landmarks() -> None:
    task = dataclasses.replace(TASK, kind="landmarks", channels=tuple(range(20, 33)), output_key=1, values=5)
    landmarks = torch.rand(3, 39, 5) * 60 + 10
    found = task.predict(task.output([torch.zeros(3), landmarks.flatten(1)], SIZE))
    torch.testing.assert_close(found[..., :2], landmarks[:, 20:33, :2], rtol=0, atol=0.01)
    nested = dataclasses.replace(task, values=None)
    assert torch.equal(nested.predict(nested.output([torch.zeros(3), landmarks], SIZE)), found)
    with pytest.raises(NetworkError, match=r"k at least 33 points of v = 5 values, .* \(3, 100\)"):
        task.output([torch.zeros(3), torch.zeros(3, 100)], SIZE)
    with pytest.raises(NetworkError, match=r"k at least 33 points of two or more values, .* \(3, 195\)\. Set .*"):
        nested.output([torch.zeros(3), landmarks.flatten(1)], SIZE)


@pytest.mark.parametrize(
    ("values", "shape"),
    [
        (None, (4, 11)),  # no whole number of values
        (None, (4, 5)),  # one value each
        (None, (4, 2, 5)),  # coordinates first
        (None, (4, 6, 2)),  # another point
        (3, (4, 10)),
        (3, (4, 5, 2)),
        (2, (4, 20)),  # ten points
        (None, (4, 5, 8, 8)),  # heatmaps
        (None, (4, 75)),  # 15 points of 5 values, or 5 of 15
    ],
)
def test_landmarks_that_do_not_fit_are_refused(values: int | None, shape: tuple[int, ...]) -> None:
    task = dataclasses.replace(LANDMARKS, values=values)
    with pytest.raises(NetworkError, match=r"Landmarks must be .* k 5 points of .*Set points, values"):
        task.output(torch.zeros(shape), SIZE)


@pytest.mark.parametrize(("size", "cells"), [((97, 161), (25, 41)), ((97, 161), (24, 40)), ((98, 162), (24, 41))])
def test_heatmaps_of_odd_frames_are_taken(size: tuple[int, int], cells: tuple[int, int]) -> None:
    """Networks round the size of their heatmaps up or down."""
    logits = torch.full((2, 13, *cells), -9.0)
    logits[:, :, 7, 11] = 9.0
    found = TASK.predict(TASK.output(logits, size))
    assert found[0, 0, :2].tolist() == pytest.approx([11 * 4 + 1.5, 7 * 4 + 1.5])


def test_points_without_names_are_judged() -> None:
    task, named = Pose(points=3, normaliser="box"), Pose(points=("a", "b", "c"), normaliser="box")
    target = figures(20)[:, :3]
    prediction = moved(target, 4, pixels=15.0)
    assert torch.equal(task.counts(prediction, target), named.counts(prediction, target))
    assert torch.equal(task.mirrored(target, 160)[..., 1:], target[..., 1:])
    assert task.overlay(torch.zeros(3, *SIZE), prediction[0]).any()
    clip = Clip(torch.zeros(20, 3, *SIZE, dtype=torch.uint8), target, 24.0, "points", "test")
    task.check(clip)
    loss = task.objective([clip], PretrainSettings(augment=False))
    assert float(loss(torch.zeros(20, 3, 24, 40), target)) > 0
    with pytest.raises(SettingsError, match="points without names do not tell left from right"):
        task.objective([clip], PretrainSettings())


def test_what_has_no_effect_on_poses_is_refused() -> None:
    clips = FigureVideo(size=(32, 48), frames=2, train=1).clips("train")
    for settings in (PretrainSettings(dice=1.0), PretrainSettings(class_balance=0.0)):
        with pytest.raises(SettingsError, match="has no effect on a task of points"):
            TASK.objective(clips, settings)
    with pytest.raises(SettingsError, match="roll_out has no effect on a task of single frames, got 4"):
        pretrain(CompactPose(width=8), clips, clips, PretrainSettings(steps=1, roll_out=4), task=TASK)


def test_channels_choose_among_heatmaps() -> None:
    task = dataclasses.replace(SMALL, channels=(4, 0, 2))
    raw = torch.randn(2, 5, 8, 12)
    assert torch.equal(task.output(raw, (8, 12)), raw[:, [4, 0, 2]])


@pytest.mark.parametrize("shape", [(2, 12, 24, 40), (2, 13, 48, 80), (2, 13)])
def test_heatmaps_of_another_form_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(NetworkError, match=r"13 points must put out float heatmaps of 1/4 of the frame \(96, 160\)"):
        TASK.output(torch.zeros(shape), SIZE)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"share": 0.0}, "share must be above 0"),
        ({"stride": 0}, "stride must be 1 or more"),
        ({"points": ("a", "a")}, "points must be names, each once"),
        ({"points": ("a", "b")}, "normaliser must be box, or torso for points that have right_shoulder and left_hip"),
        ({"channels": (1, 2)}, "channels must be 13 numbers"),
        ({"channels": (*range(12), -1)}, "channels must be 13 numbers, one for each point, from 0 on"),
        ({"points": 0}, "points must be names, each once, or how many points there are, got 0"),
        ({"points": 17}, "normaliser must be box, or torso for points that have right_shoulder and left_hip"),
        ({"kind": "landmarks", "values": 1}, "values must be 2 or more"),
        ({"values": 5}, "values must be .* left alone for heatmaps, on which it has no effect, got 5"),
        ({"coordinates": "frame"}, "coordinates must be .* left alone for heatmaps, on which it has no effect"),
        ({"axes": "yx"}, "axes must be xy or yx, and left alone for heatmaps, on which it has no effect"),
        ({"kind": "boxes"}, "kind must be one of heatmaps, probabilities, landmarks, got 'boxes'"),
        ({"kind": "probabilities", "values": 3}, "values must be 2 or more, and left alone for heatmaps"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, object], match: str, unchecked_types: None) -> None:
    with pytest.raises(SettingsError, match=match):
        Pose(**settings)  # type: ignore[arg-type]


def test_mirroring_swaps_sides_and_is_its_own_inverse() -> None:
    labels = figures(4)
    mirrored = TASK.mirrored(labels, 160)
    left, right = JOINTS.index("left_wrist"), JOINTS.index("right_wrist")
    assert torch.equal(mirrored[:, left, 0], 159 - labels[:, right, 0])
    assert torch.equal(mirrored[:, left, 1:], labels[:, right, 1:])
    assert torch.equal(mirrored[:, 0, 0], 159 - labels[:, 0, 0])
    torch.testing.assert_close(TASK.mirrored(mirrored, 160), labels, rtol=0, atol=1e-4)


def test_under_teacher_agreement_certain_points_are_targets() -> None:
    prediction = figures(1)
    prediction[0, :, 2] = torch.linspace(0, 1, 13)
    target = TASK.target(prediction)
    assert torch.equal(target[..., :2], prediction[..., :2])
    assert target[0, :, 2].tolist() == [float(score >= 0.1) for score in np.linspace(0, 1, 13, dtype=np.float32)]


def test_labels_of_another_task_are_refused() -> None:
    frames = torch.zeros(2, 3, 8, 12, dtype=torch.uint8)
    classes = Clip(frames, torch.zeros(2, 8, 12, dtype=torch.uint8), 24.0, "classes", "test")
    points = Clip(frames, torch.zeros(2, 5, 3), 24.0, "points", "test")
    for clip in (classes, points):
        with pytest.raises(VideoError, match=rf"{clip.name}: pose needs labels of shape \(frames, 13, 3\)"):
            TASK.check(clip)


def test_features_lie_in_the_unit_interval_and_follow_the_heat() -> None:
    output = torch.full((1, 13, 24, 40), -30.0)
    output[0, :, 12, 20] = 5.0  # all points certain, at one place
    unsure, steep, heat = TASK.features(output, TASK.predict(output))
    assert float(heat[0, 12, 20]) == 1.0
    assert float(heat.sum()) == pytest.approx(1.0, abs=1e-3)
    assert float(unsure.max()) < 1e-3
    assert {tuple(cell) for cell in (steep[0] > 0.5).nonzero().tolist()} == {(12, 20), (12, 19), (11, 20)}
    output[0, 3] = 0.0  # one point may be anywhere
    unsure, steep, heat = TASK.features(output, TASK.predict(output))
    assert float(unsure.min()) > 0.9
    for values in (unsure, steep, heat):
        assert 0 <= float(values.min()) <= float(values.max()) <= 1


def test_the_overlay_marks_the_points() -> None:
    frame, prediction = torch.full((3, *SIZE), 0.5), figures(1, seed=5)[0]
    drawn = TASK.overlay(frame, prediction)
    assert drawn.shape == frame.shape
    changed = (drawn != 0.6 * frame).any(0)
    assert all(changed[round(y), round(x)] for x, y, _ in prediction.tolist())
    assert float(changed.float().mean()) < 0.5


def test_the_loss_is_least_where_the_heat_is_the_labels() -> None:
    video = FigureVideo(frames=2, train=1)
    loss = TASK.objective(video.clips("train"), PretrainSettings())
    labels = figures(2)
    right = TASK._heat(labels[..., :2], SIZE)
    hidden = torch.where(labels[..., 2] > 0, labels[..., 0], 3.0)  # where points do not count, any place will do
    same = TASK._heat(torch.stack([hidden, labels[..., 1]], -1), SIZE)
    assert float(loss(same, labels)) == pytest.approx(float(loss(right, labels)), rel=1e-5)
    assert float(loss(right.roll(2, 3), labels)) > float(loss(right, labels)) + 0.5


def test_training_learns_figures() -> None:
    video = FigureVideo(size=(32, 48), frames=3, speed=8, train=4, validation=2, shapes=(0, 0), distractors=(0, 0))
    torch.manual_seed(0)
    network, seen = CompactPose(width=8), list[float]()
    settings = PretrainSettings(steps=40, batch=8, learning_rate=1e-2, validate_every=20)
    report = pretrain(
        network,
        video.clips("train"),
        video.clips("validation"),
        settings,
        task=TASK,
        progress=lambda p: seen.append(p.loss),
    )
    assert sum(seen[-5:]) < 0.85 * sum(seen[:5])
    counts = measure_counts(network, video.clips("validation"), TASK)
    assert float(TASK.accuracy(counts.sum(0))) == report.validation
    with pytest.raises(SettingsError, match="kind 'heatmaps', got 'landmarks'"):
        pretrain(network, video.clips("train"), [], task=dataclasses.replace(TASK, kind="landmarks"))


def test_logits_are_not_taken_for_heatmaps_of_probabilities() -> None:
    task = Pose(points=1, kind="probabilities", stride=4, normaliser="box")
    with pytest.raises(NetworkError, match=r"lie in 0\.\.1, the network puts out -2 to 0: set task\.kind=heatmaps"):
        task.output(torch.tensor([[[[-2.0, 0.0], [0.0, 0.0]]]]), (8, 8))
