"""Targets, the teacher's predictions and error weights of a problem."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_jaccard_index

from resq_rl.envs import Problem
from resq_rl.errors import SettingsError, VideoError
from resq_rl.video import IGNORE, Clip
from tests.envs import problems
from tests.envs.problems import CLASSES, SIZE, moving_frames, tiny_clips, tiny_network


def test_labels_are_the_targets(problem: Problem) -> None:
    for clip, target in zip(problem.clips, problem.targets, strict=True):
        assert clip.labels is target
    assert problem.frames == 5 + 7 + 5 + 6
    assert len(problem) == 4


def test_the_teacher_is_the_unwrapped_float_network(problem: Problem) -> None:
    network = tiny_network()
    for clip, teacher in zip(problem.clips, problem.teacher, strict=True):
        with torch.no_grad():
            logits = network(clip.frames.float() / 255)
        expected = F.interpolate(logits, SIZE, mode="bilinear", align_corners=False).argmax(1)
        assert (teacher == expected).float().mean() > 0.9999  # ties and rounding aside


def test_against_the_teacher_the_float_network_is_perfect(problem: Problem) -> None:
    own = problems.with_clips(problem, [3, 4], source="teacher")
    assert own.float_accuracy == 1.0
    for target, teacher in zip(own.targets, own.teacher, strict=True):
        assert (target == teacher).all()


def test_unlabelled_clips_need_the_teacher(problem: Problem) -> None:
    clips = tiny_clips([3, 3], labels=False)
    own = Problem.prepare(problem.model, problem.task, clips, source="teacher")
    assert own.float_accuracy == 1.0
    with pytest.raises(VideoError, match=r"tiny/0 has no labels.*teacher"):
        Problem.prepare(problem.model, problem.task, clips)


def test_frames_without_labels_are_filled_by_the_float_network_if_asked_for(problem: Problem) -> None:
    (clip,) = tiny_clips([3])
    assert clip.labels is not None
    labels = clip.labels.clone()
    labels[:2] = IGNORE
    labels[2, 3:] = IGNORE
    sparse = [replace(clip, labels=labels)]
    plain, filled = (Problem.prepare(problem.model, problem.task, sparse, fill=fill) for fill in (False, True))
    assert torch.equal(plain.targets[0], labels)
    assert torch.equal(filled.targets[0][:2], filled.teacher[0][:2])
    assert torch.equal(filled.targets[0][2], labels[2])
    known = int((labels[2] != IGNORE).sum())
    assert int(plain.float_counts.sum()) == known > 0
    assert int(filled.float_counts.sum()) == known + 2 * labels[0].numel()


def test_float_accuracy_is_the_mean_iou_of_the_float_network(problem: Problem) -> None:
    prediction = torch.cat([t.flatten() for t in problem.teacher]).long()
    target = torch.cat([t.flatten() for t in problem.targets]).long()
    expected = multiclass_jaccard_index(prediction, target, CLASSES, "macro", ignore_index=IGNORE)
    assert problem.float_accuracy == pytest.approx(float(expected), abs=1e-6)


def test_confusion_counts_targets_by_row(problem: Problem) -> None:
    for i, (target, teacher) in enumerate(zip(problem.targets, problem.teacher, strict=True)):
        for a in range(CLASSES):
            for b in range(CLASSES):
                assert problem.float_counts[i, a, b] == ((target == a) & (teacher == b)).sum()


def test_every_wrong_pixel_costs_one_under_pixel_weighting(problem: Problem) -> None:
    table = problems.with_clips(problem, [3], weighting="pixel").error_table
    assert (table == 1 - torch.eye(CLASSES)).all()


def test_iou_weighting_is_the_first_order_change_of_mean_iou(problem: Problem) -> None:
    """From a perfect prediction, a few pixels of class a predicted as b lower mean IoU by their cost / max(f)."""
    labels = torch.zeros(1, *SIZE, dtype=torch.uint8)
    labels[:, :, :8], labels[:, :8, 8:24] = 1, 2  # shares 1/6, 1/12, 3/4
    clip = Clip(moving_frames(1), labels, 25.0, "known", "test")
    table = Problem.prepare(problem.model, problem.task, [clip]).error_table
    frequency = np.bincount(labels.flatten().numpy(), minlength=CLASSES) / labels.numel()
    assert not table.diagonal().any()
    for a in range(CLASSES):
        for b in set(range(CLASSES)) - {a}:
            assert float(table[a, b]) == pytest.approx(
                frequency.max() / CLASSES * (1 / frequency[a] + 1 / frequency[b]), rel=1e-5
            )
            prediction = labels.flatten().clone()
            prediction[torch.nonzero(labels.flatten() == a)[:2, 0]] = b
            iou = multiclass_jaccard_index(prediction.long(), labels.flatten().long(), CLASSES, "macro")
            cost = 2 * float(table[a, b]) / labels.numel()
            assert cost / frequency.max() == pytest.approx(1 - float(iou), rel=0.05)


def test_rare_and_absent_classes_count_as_half_a_percent(problem: Problem) -> None:
    labels = torch.zeros(1, *SIZE, dtype=torch.uint8)
    labels[0, 0, 0] = 1  # one pixel of 1536; class 2 has none
    clip = Clip(moving_frames(1), labels, 25.0, "rare", "test")
    table = Problem.prepare(problem.model, problem.task, [clip]).error_table
    share = 1535 / 1536
    assert float(table[0, 1]) == float(table[0, 2]) == pytest.approx((1 + share / 0.005) / CLASSES, rel=1e-5)


def test_labels_to_ignore_have_no_weight(problem: Problem) -> None:
    labels = torch.full((1, *SIZE), IGNORE, dtype=torch.uint8)
    clip = Clip(moving_frames(1), labels, 25.0, "void", "test")
    own = Problem.prepare(problem.model, problem.task, [clip])
    assert not own.float_counts.any()
    assert torch.isfinite(own.error_table).all()


def test_progress_counts_every_frame(problem: Problem) -> None:
    seen: list[int] = []
    Problem.prepare(problem.model, problem.task, tiny_clips([20, 3]), progress=seen.append)
    assert sum(seen) == 23


def test_a_subset_keeps_order_and_weights(problem: Problem) -> None:
    subset = problem.subset([2, 0])
    assert [c.name for c in subset.clips] == ["tiny/2", "tiny/0"]
    assert (subset.float_counts == problem.float_counts[[2, 0]]).all()
    assert (subset.targets[0] == problem.targets[2]).all()
    assert (subset.teacher[1] == problem.teacher[0]).all()
    assert subset.error_table is problem.error_table
    assert subset.source == problem.source


def test_no_clips_is_an_error(problem: Problem) -> None:
    with pytest.raises(VideoError, match="No clips"):
        Problem.prepare(problem.model, problem.task, [])


def test_clips_of_several_sizes_are_an_error(problem: Problem) -> None:
    clips = [*tiny_clips([2]), *tiny_clips([2], size=(16, 24))]
    with pytest.raises(VideoError, match=r"\(16, 24\), \(32, 48\).*video.size"):
        Problem.prepare(problem.model, problem.task, clips)


def test_labels_beyond_the_tasks_classes_are_an_error(problem: Problem) -> None:
    clip = tiny_clips([2])[0]
    assert clip.labels is not None
    labels = clip.labels.clone()
    labels[1, 3, 3] = CLASSES
    with pytest.raises(VideoError, match=r"tiny/0: labels reach class 3, the task has 3 classes.*task.classes"):
        Problem.prepare(problem.model, problem.task, [replace(clip, labels=labels)])


@pytest.mark.parametrize(("settings", "message"), [({"source": "humans"}, "humans"), ({"weighting": "dice"}, "dice")])
def test_unknown_choices_are_an_error(
    settings: dict[str, str], message: str, problem: Problem, unchecked_types: None
) -> None:
    with pytest.raises(SettingsError, match=message):
        Problem.prepare(problem.model, problem.task, tiny_clips([2]), **settings)  # type: ignore[arg-type]


def test_clips_of_another_size_than_the_network_are_refused(problem: Problem, uneven_problem: Problem) -> None:
    with pytest.raises(SettingsError, match="30x46 do not fit a model wrapped for"):
        Problem.prepare(problem.model, problem.task, uneven_problem.clips)


@pytest.mark.parametrize("grid", [(2, 0), (0, 3), (33, 3), (2, 49)])
def test_a_grid_is_no_finer_than_the_frame(grid: tuple[int, int], problem: Problem) -> None:
    with pytest.raises(SettingsError, match="grid must be 1x1 to 32x48 regions"):
        replace(problem, grid=grid)
