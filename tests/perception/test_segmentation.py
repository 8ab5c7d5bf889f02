import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_confusion_matrix, multiclass_jaccard_index

from resq_rl.errors import NetworkError, SettingsError, VideoError
from resq_rl.perception import Segmentation, class_iou, mean_iou
from resq_rl.video import IGNORE

BINARY = Segmentation(classes=2, kind="probability")


def labels(seed: int, classes: int, frames: int = 3, ignored: float = 0.1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (frames, 9, 13)
    prediction = torch.randint(classes, shape, generator=generator).to(torch.uint8)
    target = torch.randint(classes, shape, generator=generator).to(torch.uint8)
    agree = torch.rand(shape, generator=generator) < 0.6
    target = torch.where(agree, prediction, target)
    target[torch.rand(shape, generator=generator) < ignored] = IGNORE
    return prediction, target


@pytest.mark.parametrize("classes", [2, 6, 255])
def test_confusion_equals_torchmetrics(classes: int) -> None:
    prediction, target = labels(classes, classes)
    confusion = Segmentation(classes=classes).confusion(prediction, target)
    assert confusion.shape == (3, classes, classes)
    for frame in range(3):
        expected = multiclass_confusion_matrix(
            prediction[frame].long(), target[frame].long(), classes, ignore_index=IGNORE
        )
        assert torch.equal(confusion[frame], expected)


def test_confusion_has_target_rows_and_prediction_columns() -> None:
    target = torch.tensor([[[0, 0, 1, IGNORE]]], dtype=torch.uint8)
    prediction = torch.tensor([[[1, 1, 1, 0]]], dtype=torch.uint8)
    confusion = Segmentation(classes=2).confusion(prediction, target)
    assert confusion.tolist() == [[[0, 2], [0, 1]]]


@given(seed=st.integers(0, 10_000), classes=st.integers(2, 7), frames=st.integers(1, 4))
def test_confusion_counts_every_labelled_pixel_once(seed: int, classes: int, frames: int) -> None:
    prediction, target = labels(seed, classes, frames)
    confusion = Segmentation(classes=classes).confusion(prediction, target)
    for frame in range(frames):
        for t in range(classes):
            for p in range(classes):
                pixels = (target[frame] == t) & (prediction[frame] == p)
                assert confusion[frame, t, p] == pixels.sum()


@pytest.mark.parametrize("seed", range(5))
def test_mean_iou_equals_torchmetrics(seed: int) -> None:
    prediction, target = labels(seed, 6)
    confusion = Segmentation().confusion(prediction, target).sum(0)
    expected = multiclass_jaccard_index(prediction.long(), target.long(), 6, ignore_index=IGNORE)
    assert float(mean_iou(confusion)) == pytest.approx(float(expected), abs=1e-6)
    per_class = multiclass_jaccard_index(prediction.long(), target.long(), 6, average="none", ignore_index=IGNORE)
    assert class_iou(confusion).tolist() == pytest.approx(per_class.tolist(), abs=1e-6)


def test_mean_iou_leaves_out_classes_that_neither_side_has() -> None:
    confusion = torch.tensor([[[3, 1, 0], [0, 4, 0], [0, 0, 0]], [[2, 0, 0], [0, 0, 0], [0, 0, 0]]])
    assert mean_iou(confusion).tolist() == pytest.approx([(3 / 4 + 4 / 5) / 2, 1.0])
    assert class_iou(confusion)[0, :2].tolist() == pytest.approx([3 / 4, 4 / 5])
    assert class_iou(confusion)[0, 2].isnan()


def test_mean_iou_counts_a_class_that_is_only_predicted_as_zero() -> None:
    assert float(mean_iou(torch.tensor([[3, 1], [0, 0]]))) == pytest.approx((3 / 4 + 0) / 2)


def test_metrics_are_nan_where_nothing_is_labelled() -> None:
    empty = torch.zeros(2, 6, 6, dtype=torch.int64)
    assert mean_iou(empty).isnan().all()


def test_metrics_are_exact_for_counts_beyond_float32() -> None:
    confusion = torch.tensor([[2**40 + 1, 1], [0, 2**40]])
    assert mean_iou(confusion).dtype == torch.float64
    assert class_iou(confusion).tolist() == [(2**40 + 1) / (2**40 + 2), 2**40 / (2**40 + 1)]


def test_mean_iou_keeps_leading_axes() -> None:
    confusion = torch.randint(1, 9, (2, 3, 4, 4))
    values = mean_iou(confusion)
    assert values.shape == (2, 3)
    assert float(values[1, 2]) == pytest.approx(float(mean_iou(confusion[1, 2])))


def test_predict_takes_the_highest_logit() -> None:
    output = torch.randn(2, 6, 4, 5)
    prediction = Segmentation().predict(output)
    assert prediction.dtype == torch.uint8
    assert torch.equal(prediction.long(), output.max(1).indices)


def test_predict_takes_the_foreground_from_its_threshold_on() -> None:
    output = torch.tensor([[[[0.0, 0.29, 0.3, 1.0]]]])
    task = Segmentation(classes=2, kind="probability", threshold=0.3)
    assert task.predict(output).tolist() == [[[0, 0, 1, 1]]]


def test_uncertainty_is_the_softmax_margin() -> None:
    output = 3 * torch.randn(2, 6, 16, 24)
    uncertainty = Segmentation().uncertainty(output, stride=4)
    assert uncertainty.shape == (2, 4, 6)
    best = output[1, :, 2 + 4, 2 + 2 * 4].softmax(0).sort(descending=True).values
    assert float(uncertainty[1, 1, 2]) == pytest.approx(1 - float(best[0] - best[1]), abs=1e-6)


@given(seed=st.integers(0, 1000), size=st.integers(1, 20), stride=st.integers(1, 8))
def test_uncertainty_lies_in_0_to_1_at_any_size(seed: int, size: int, stride: int) -> None:
    output = 20 * torch.randn(1, 3, size, size + 3, generator=torch.Generator().manual_seed(seed))
    uncertainty = Segmentation(classes=3).uncertainty(output, stride)
    assert uncertainty.numel() > 0
    assert (uncertainty >= 0).all()
    assert (uncertainty <= 1).all()


def test_uncertainty_of_a_probability_equals_that_of_its_two_logits() -> None:
    logit = 2 * torch.randn(2, 1, 8, 8)
    two = Segmentation(classes=2).uncertainty(torch.cat([torch.zeros_like(logit), logit], 1), 2)
    assert torch.allclose(BINARY.uncertainty(logit.sigmoid(), 2), two, atol=1e-6)
    assert BINARY.uncertainty(torch.tensor([[[[0.5]]]])).tolist() == [[[1.0]]]
    assert BINARY.uncertainty(torch.tensor([[[[1.0]]]])).tolist() == [[[0.0]]]


def test_output_of_kind_logit_is_a_probability() -> None:
    task = Segmentation(classes=2, kind="logit")
    raw = torch.randn(1, 1, 4, 4)
    assert torch.equal(task.output(raw), raw.sigmoid())
    assert torch.equal(task.predict(task.output(raw)).bool(), raw[:, 0] >= 0)


@pytest.mark.parametrize(
    ("raw", "key"),
    [
        ("tensor", None),
        ("tensor", 0),
        (["tensor"], None),
        (("other", "tensor"), 1),
        (["other", "tensor"], -1),
        ({"out": "tensor"}, None),
        ({"aux": "other", "out": "tensor"}, "out"),
    ],
)
def test_output_selects(raw: Any, key: int | str | None) -> None:
    values = {"tensor": torch.rand(2, 6, 4, 5), "other": torch.rand(2, 3)}
    task = Segmentation(output_key=key)
    if isinstance(raw, dict):
        given_raw: Any = {k: values[v] for k, v in raw.items()}
    else:
        given_raw = values[raw] if isinstance(raw, str) else type(raw)(values[v] for v in raw)
    assert torch.equal(task.output(given_raw), values["tensor"])


@pytest.mark.parametrize(
    ("raw", "key", "match"),
    [
        ([torch.rand(1, 6, 2, 2), torch.rand(1, 3)], None, r"2 outputs \(0: \(1, 6, 2, 2\), 1: \(1, 3\)\)"),
        ([torch.rand(1, 6, 2, 2)], 3, "output_key is 3"),
        ({"out": torch.rand(1, 6, 2, 2)}, "aux", "output_key is 'aux'"),
        ([], None, "0 outputs"),
        (torch.rand(1, 6, 2, 2), "out", "single Tensor, but output_key is 'out'"),
        ("text", None, "a str, not a tensor"),
        ([None], None, "a NoneType, not a tensor"),
        (torch.rand(1, 5, 2, 2), None, r"\(b, 6, h, w\), got torch.float32 of shape \(1, 5, 2, 2\)"),
        (torch.rand(6, 2, 2), None, r"of shape \(6, 2, 2\)"),
        (torch.zeros(1, 6, 2, 2, dtype=torch.uint8), None, "torch.uint8"),
    ],
)
def test_output_that_does_not_fit_is_refused(raw: Any, key: int | str | None, match: str) -> None:
    with pytest.raises(NetworkError, match=match):
        Segmentation(output_key=key).output(raw)


def test_output_is_resized_to_the_frame() -> None:
    raw = torch.arange(4.0).view(1, 1, 2, 2).expand(1, 6, 2, 2)
    assert Segmentation().output(raw).shape == (1, 6, 2, 2)
    resized = Segmentation().output(raw, (4, 4))
    assert resized.shape == (1, 6, 4, 4)
    assert resized[0, 0, 0].tolist() == pytest.approx([0.0, 0.25, 0.75, 1.0])


def test_output_is_float32() -> None:
    assert Segmentation().output(torch.rand(1, 6, 2, 2).half()).dtype == torch.float32


@pytest.mark.usefixtures("unchecked_types")
def test_labels_of_another_size_are_refused() -> None:
    prediction, target = torch.zeros(1, 4, 5, dtype=torch.uint8), torch.zeros(1, 8, 10, dtype=torch.uint8)
    with pytest.raises(VideoError, match=r"shape \(1, 8, 10\) and predictions \(1, 4, 5\)"):
        Segmentation().confusion(prediction, target)


def test_labels_that_are_no_class_are_refused() -> None:
    target = torch.tensor([[[0, 6, 200, IGNORE]]], dtype=torch.uint8)
    with pytest.raises(VideoError, match=r"\[6, 200\], but the task has the classes 0 to 5"):
        Segmentation().confusion(torch.zeros_like(target), target)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"kind": "softmax"}, "kind must be one of logits, probabilities, probability, logit, got 'softmax'"),
        ({"classes": 1}, "classes must be from 2 to 255, got 1"),
        ({"classes": 256}, "got 256"),
        ({"classes": 6, "kind": "probability"}, "classes must be 2, got 6"),
        ({"classes": 2, "kind": "probability", "threshold": 0.0}, "between 0 and 1, got 0.0"),
        ({"threshold": float("nan")}, "got nan"),
        ({"threshold": 0.7}, "threshold 0.7 has no effect on kind 'logits'"),
        ({"label_size": (0, 4)}, "label_size must be a height and a width of 1 or more, got"),
        ({"label_size": (4,)}, "label_size must be a height and a width"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(SettingsError, match=match):
        Segmentation(**settings)


@pytest.mark.parametrize(("own", "labels_at"), [((12, 20), (45, 61)), ((45, 61), (12, 20)), ((16, 16), (16, 16))])
def test_accuracy_is_measured_at_the_size_of_the_labels(own: tuple[int, int], labels_at: tuple[int, int]) -> None:
    """Against torch's own resizing and torchmetrics, whatever the size of the frames."""
    generator = torch.Generator().manual_seed(0)
    raw = F.avg_pool2d(torch.randn(4, 6, *own, generator=generator), 5, 1, 2)
    target = torch.randint(6, (4, *labels_at), generator=generator).to(torch.uint8)
    target[:, :3] = IGNORE
    task = Segmentation(label_size=labels_at)
    output = task.output(raw, own)
    prediction = task.predict(output)
    expected = F.interpolate(raw, labels_at, mode="bilinear", align_corners=False).argmax(1)
    assert torch.equal(prediction.long(), expected)
    counts = task.counts(prediction, target)
    found = multiclass_jaccard_index(expected, target.long(), 6, ignore_index=IGNORE)
    assert float(task.accuracy(counts.sum(0))) == pytest.approx(float(found), abs=1e-6)
    for values in task.features(output, prediction):
        assert 0 <= float(values.min()) <= float(values.max()) <= 1


@pytest.mark.parametrize(
    ("size", "labels_at"), [((4, 6), (8, 18)), ((4, 6), (7, 11)), ((9, 5), (4, 5)), ((6, 6), (6, 6))]
)
def test_errors_at_the_labels_lie_in_the_pixels_that_they_cover(
    size: tuple[int, int], labels_at: tuple[int, int]
) -> None:
    """The cost of a pixel is the mean over its area; repeating every label makes that a plain mean of blocks."""
    prediction, target = (t.repeat(1, 2, 2)[:, : labels_at[0], : labels_at[1]] for t in labels(3, 6))
    task = Segmentation(label_size=labels_at)
    table = task.error_table(task.counts(prediction, target).sum(0), "iou")
    error = task.error(prediction, target, table, size)
    full = Segmentation().error(prediction, target, table, labels_at).double()
    repeated = full.repeat_interleave(size[0], 1).repeat_interleave(size[1], 2)
    expected = repeated.unflatten(1, (size[0], -1)).unflatten(3, (size[1], -1)).mean((2, 4))
    torch.testing.assert_close(error.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(error.mean((1, 2)).double(), full.mean((1, 2)), rtol=1e-5, atol=1e-6)


def test_overlays_are_of_the_frames_size() -> None:
    frame, prediction = torch.full((3, 6, 8), 0.5), torch.zeros(12, 16, dtype=torch.uint8)
    prediction[:, 8:] = 1
    drawn = Segmentation(label_size=(12, 16)).overlay(frame, prediction)
    assert torch.equal(drawn, Segmentation().overlay(frame, prediction[::2, ::2]))


def clip_with_labels(size: tuple[int, int]) -> Any:
    """In the manner of a `Clip` of 8x12 frames."""
    return SimpleNamespace(name="c", size=(8, 12), labels=torch.zeros(2, *size, dtype=torch.uint8))


@pytest.mark.usefixtures("unchecked_types")
def test_labels_of_another_size_than_the_tasks_are_refused() -> None:
    Segmentation().check(clip_with_labels((8, 12)))
    Segmentation(label_size=(16, 24)).check(clip_with_labels((16, 24)))
    with pytest.raises(VideoError, match=r"of 16x24 pixels .* compares at 8x12\. Set task\.label_size=\[16,24\]"):
        Segmentation().check(clip_with_labels((16, 24)))
    with pytest.raises(VideoError, match=r"labels are of 8x12 pixels .* compares at 16x24"):
        Segmentation(label_size=(16, 24)).check(clip_with_labels((8, 12)))


def test_task_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Segmentation().classes = 3  # type: ignore[misc]


def test_probabilities_of_classes_mean_what_their_logits_mean() -> None:
    """A network that ends in a softmax and the same network without it are one task."""
    logits, teacher = torch.randn(2, 2, 5, 8, 12, generator=torch.Generator().manual_seed(0))
    plain, behind = Segmentation(classes=5), Segmentation(classes=5, kind="probabilities")
    own, its = behind.output(logits.softmax(1)), behind.output(teacher.softmax(1))
    assert torch.equal(behind.predict(own), plain.predict(logits))
    assert behind.channels == 5
    torch.testing.assert_close(behind.uncertainty(own), plain.uncertainty(logits), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(behind.divergence(own, its), plain.divergence(logits, teacher), rtol=1e-3, atol=1e-5)
    larger = behind.output(logits.softmax(1), (16, 24))
    wanted = F.interpolate(logits.softmax(1), size=(16, 24), mode="bilinear", align_corners=False)
    torch.testing.assert_close(larger.exp(), wanted, rtol=1e-5, atol=1e-6)


def test_logits_are_not_taken_for_probabilities() -> None:
    with pytest.raises(NetworkError, match=r"lie in 0\.\.1, the network puts out -2 to 3: set task\.kind=logits"):
        Segmentation(classes=2, kind="probabilities").output(torch.tensor([-2.0, 3.0]).view(1, 2, 1, 1))
    with pytest.raises(SettingsError, match="no effect on kind 'probabilities'"):
        Segmentation(classes=2, kind="probabilities", threshold=0.4)
