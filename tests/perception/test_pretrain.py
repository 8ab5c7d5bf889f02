import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.segmentation import dice_score

from resq_rl.errors import NetworkError, ResultsError, SettingsError, VideoError, WeightsError
from resq_rl.perception import (
    CompactDDRNet,
    MaskPropagation,
    PretrainProgress,
    PretrainSettings,
    Segmentation,
    load_weights,
    mean_iou,
    measure_counts,
    pretrain,
)
from resq_rl.perception.segmentation import class_iou, segmentation_loss
from resq_rl.perception.training_batches import FrameSampler, augmented
from resq_rl.sealed import Checkpoints
from resq_rl.video import IGNORE, Clip, GeneratedVideo

TASK = Segmentation(classes=3)
SHORT = PretrainSettings(steps=6, batch=4, learning_rate=1e-2, validate_every=3)


def clip(seed: int, frames: int = 4, size: tuple[int, int] = (16, 24), name: str = "") -> Clip:
    """Frames whose class is their colour: red is 1, green is 2, grey is 0."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (frames, size[0] // 8, size[1] // 8), generator=generator)
    labels = labels.repeat_interleave(8, 1).repeat_interleave(8, 2)
    colours = torch.tensor([[90, 90, 90], [220, 40, 40], [40, 220, 40]])
    images = colours[labels].movedim(-1, 1) + torch.randint(30, (frames, 3, *size), generator=generator)
    return Clip(images.to(torch.uint8), labels.to(torch.uint8), 24.0, name or f"colours-{seed}", "a test")


TRAIN, VALIDATION = [clip(0), clip(1, frames=2)], [clip(2)]


def network(width: int = 8) -> nn.Module:
    """A network that can tell colours apart, the same each time."""
    torch.manual_seed(7)
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 3, 1))


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {n: v.clone() for n, v in model.state_dict().items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[n], two[n]) for n in one.keys() | two.keys())


def test_training_learns_colours(tmp_path: Path) -> None:
    model, seen = network(), list[PretrainProgress]()
    settings = PretrainSettings(steps=60, batch=4, learning_rate=2e-2, validate_every=20)
    report = pretrain(
        model, TRAIN, VALIDATION, settings, task=TASK, progress=seen.append, weights=tmp_path / "w.safetensors"
    )
    assert [p.step for p in seen] == list(range(1, 61))
    assert [p.step for p in seen if p.validation is not None] == [20, 40, 60]
    losses = [p.loss for p in seen]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert report.validation > 0.9
    assert report.validation == max(miou for _, _, miou in report.history)
    assert len(class_iou(report.counts)) == 3
    measured = float(mean_iou(measure_counts(model, VALIDATION, TASK).sum(0)))
    assert measured == pytest.approx(report.validation)
    assert all(parameter.is_contiguous() for parameter in model.parameters())
    fresh = network()
    metadata = load_weights(fresh, tmp_path / "w.safetensors")
    assert same(weights_of(fresh), weights_of(model))
    assert metadata["architecture"] == "Sequential"
    assert metadata["input"] == "RGB in 0..1, 16x24"
    assert json.loads(metadata["settings"]) == json.loads(json.dumps(dataclasses.asdict(settings)))
    assert float(metadata["validation_accuracy"]) == pytest.approx(report.validation, abs=1e-4)


def test_training_lowers_the_loss_on_generated_video(tmp_path: Path) -> None:
    video = GeneratedVideo(size=(32, 48), frames=2, train=4, validation=1)
    seen: list[float] = []
    report = pretrain(
        CompactDDRNet(width=8),
        video.clips("train"),
        video.clips("validation"),
        PretrainSettings(steps=24, batch=4, learning_rate=1e-2, validate_every=24),
        progress=lambda p: seen.append(p.loss),
        weights=tmp_path / "w.safetensors",
    )
    assert sum(seen[-5:]) < 0.85 * sum(seen[:5])
    metadata = load_weights(CompactDDRNet(width=8), tmp_path / "w.safetensors")
    assert metadata["architecture"] == "CompactDDRNet"
    assert (metadata["classes"], metadata["width"]) == ("6", "8")
    assert len(class_iou(report.counts)) == 6


def test_training_repeats_itself() -> None:
    one, two = network(), network()
    first = pretrain(one, TRAIN, VALIDATION, SHORT, task=TASK)
    second = pretrain(two, TRAIN, VALIDATION, SHORT, task=TASK)
    assert first.history == second.history
    assert same(weights_of(one), weights_of(two))
    other = pretrain(network(), TRAIN, VALIDATION, dataclasses.replace(SHORT, seed=1), task=TASK)
    assert other.history != first.history


class StopError(Exception):
    """Ends a training run from its progress callback."""


def test_a_resumed_run_equals_one_that_was_not_stopped(tmp_path: Path) -> None:
    whole, parts, checkpoint = network(), network(), tmp_path / "run"
    expected = pretrain(whole, TRAIN, VALIDATION, SHORT, task=TASK)

    def stop(progress: PretrainProgress) -> None:
        if progress.step == 4:
            raise StopError

    with pytest.raises(StopError):
        pretrain(parts, TRAIN, VALIDATION, SHORT, task=TASK, checkpoint=checkpoint, progress=stop)
    steps: list[int] = []
    resumed = network()
    nn.init.ones_(next(resumed.parameters()))
    report = pretrain(
        resumed, TRAIN, VALIDATION, SHORT, task=TASK, checkpoint=checkpoint, progress=lambda p: steps.append(p.step)
    )
    assert steps == [4, 5, 6]  # the checkpoint was written after step 3
    assert dataclasses.replace(report, seconds=0.0) == dataclasses.replace(expected, seconds=0.0)
    assert same(weights_of(resumed), weights_of(whole))
    again = pretrain(network(), TRAIN, VALIDATION, SHORT, task=TASK, checkpoint=checkpoint)
    assert again.history == expected.history


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run"
    pretrain(network(), TRAIN, VALIDATION, SHORT, task=TASK, checkpoint=checkpoint)
    content = [path.read_bytes() for path in Checkpoints(checkpoint).paths()]
    other = dataclasses.replace(SHORT, batch=5)
    with pytest.raises(SettingsError, match="another run: batch 4 instead of 5"):
        pretrain(network(), TRAIN, VALIDATION, other, task=TASK, checkpoint=checkpoint)
    with pytest.raises(SettingsError, match="frames 6 instead of 4"):
        pretrain(network(), TRAIN[:1], VALIDATION, SHORT, task=TASK, checkpoint=checkpoint)
    with pytest.raises(WeightsError, match="does not fit Sequential"):
        pretrain(network(16), TRAIN, VALIDATION, SHORT, task=TASK, checkpoint=checkpoint)
    assert [path.read_bytes() for path in Checkpoints(checkpoint).paths()] == content


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = pretrain(network(), TRAIN, VALIDATION, SHORT, task=TASK, checkpoint=tmp_path)
    first, newest = Checkpoints(tmp_path).paths()
    newest.write_bytes(newest.read_bytes()[:-7])
    steps: list[int] = []
    report = pretrain(
        network(), TRAIN, VALIDATION, SHORT, task=TASK, checkpoint=tmp_path, progress=lambda p: steps.append(p.step)
    )
    assert f"{newest} cannot be used" in caplog.text
    assert steps == [4, 5, 6]
    assert report.history == expected.history
    for path in (first, newest):
        path.write_bytes(b"no checkpoint")
    with pytest.raises(ResultsError, match="can be read"):
        pretrain(network(), TRAIN, VALIDATION, SHORT, task=TASK, checkpoint=tmp_path)


def unlabelled(source: Clip) -> Clip:
    return dataclasses.replace(source, labels=None)


def relabelled(source: Clip, value: int) -> Clip:
    assert source.labels is not None
    return dataclasses.replace(source, labels=torch.full_like(source.labels, value))


@pytest.mark.parametrize(
    ("train", "validation", "match"),
    [
        ([], VALIDATION, "no clips for training"),
        (TRAIN, [], "no clips for validation"),
        ([unlabelled(TRAIN[0])], VALIDATION, "'colours-0' .* has no labels, which training needs"),
        (TRAIN, [unlabelled(VALIDATION[0])], "'colours-2' .* which validation needs"),
        ([clip(0), clip(1, size=(8, 8))], VALIDATION, r"one size, got 2: \[\(8, 8\), \(16, 24\)\]"),
        ([relabelled(TRAIN[0], 3)], VALIDATION, r"training clips hold the values \[3\]"),
        (TRAIN, [relabelled(VALIDATION[0], 9)], r"validation clips hold the values \[9\]"),
        ([relabelled(TRAIN[0], IGNORE)], VALIDATION, "No pixel of the 1 training clips"),
    ],
)
def test_clips_that_cannot_be_used_are_refused(train: list[Clip], validation: list[Clip], match: str) -> None:
    with pytest.raises(VideoError, match=match):
        pretrain(network(), train, validation, SHORT, task=TASK)


def test_a_network_of_another_number_of_classes_is_refused() -> None:
    with pytest.raises(NetworkError, match=r"\(b, 6, h, w\)"):
        pretrain(network(), TRAIN, VALIDATION, SHORT, task=Segmentation(classes=6))


def test_a_network_of_another_kind_of_task_is_refused() -> None:
    following = [dataclasses.replace(c, labels=(torch.as_tensor(c.labels) > 0).to(torch.uint8)) for c in TRAIN]
    settings = dataclasses.replace(SHORT, roll_out=1)
    with pytest.raises(NetworkError, match=r"CompactDDRNet cannot run on the 3 inputs .* MaskPropagation"):
        pretrain(CompactDDRNet(2), following, following, settings, task=MaskPropagation())


def test_a_task_without_logits_is_refused() -> None:
    with pytest.raises(SettingsError, match="needs a task of kind 'logits', got 'probability'"):
        pretrain(network(), TRAIN, VALIDATION, SHORT, task=Segmentation(2, "probability"))


def test_a_loss_that_is_not_finite_ends_the_run() -> None:
    settings = dataclasses.replace(SHORT, steps=40, learning_rate=1e38, dice=0.0)
    with pytest.raises(SettingsError, match=r"the loss is (nan|inf) at step \d+ of 40, with learning_rate 1e\+38"):
        pretrain(network(), TRAIN, VALIDATION, settings, task=TASK)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"steps": 0}, "'pretraining.steps' must be an integer of at least 1; received 0"),
        ({"batch": 1}, "'pretraining.batch' must be an integer of at least 2; received 1"),
        ({"dice": -0.5}, "'pretraining.dice' must be a finite number of at least 0; received -0.5"),
        ({"weight_decay": float("nan")}, "'pretraining.weight_decay' must be a finite number .* received nan"),
        ({"learning_rate": 0.0}, "'pretraining.learning_rate' must be a finite number above 0; received 0.0"),
        ({"learning_rate": float("inf")}, "received inf"),
        ({"zoom": (2.0, 0.5)}, r"'pretraining.zoom' must be two positive factors, .* received \[2.0, 0.5\]"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(SettingsError, match=match):
        PretrainSettings(**settings)


def test_loss_is_cross_entropy_plus_dice() -> None:
    logits, weights = torch.randn(2, 3, 8, 8), torch.tensor([0.5, 1.0, 2.0])
    labels = torch.randint(3, (2, 8, 8))
    entropy = F.cross_entropy(logits, labels, weights)
    assert torch.allclose(segmentation_loss(logits, labels, weights, 0.0), entropy)
    # On predictions that are certain, soft Dice is the Dice score of the classes.
    certain = torch.where(F.one_hot(logits.argmax(1), 3).movedim(-1, 1).bool(), 0.0, -80.0)
    scores = dice_score(
        logits.argmax(1).flatten()[None], labels.flatten()[None], 3, average="none", input_format="index"
    )
    loss = segmentation_loss(certain, labels, weights, 2.0) - segmentation_loss(certain, labels, weights, 0.0)
    assert float(loss) == pytest.approx(2 * (1 - float(scores.mean())), abs=1e-4)


@pytest.mark.parametrize("dice", [0.0, 0.5])
def test_ignored_pixels_and_absent_classes_do_not_touch_the_loss(dice: float) -> None:
    logits, labels = torch.randn(1, 4, 4, 6), torch.randint(2, (1, 4, 6))
    labels[..., 3:] = IGNORE
    changed = logits.clone()
    changed[..., 3:] = torch.randn(1, 4, 4, 3)
    one, two = (segmentation_loss(x, labels, torch.ones(4), dice) for x in (logits, changed))
    assert torch.allclose(one, two)
    assert torch.allclose(one, segmentation_loss(logits[..., :3], labels[..., :3], torch.ones(4), dice))


def test_batches_depend_on_seed_and_step_alone() -> None:
    sampler = FrameSampler(TRAIN, 8, 0, True)
    sampler.draw(4)
    for one, two in zip(sampler.draw(5), FrameSampler(TRAIN, 8, 0, True).draw(5), strict=True):
        assert torch.equal(one, two)
    assert not torch.equal(sampler.draw(5)[0], sampler.draw(6)[0])
    assert not torch.equal(sampler.draw(5)[0], FrameSampler(TRAIN, 8, 1, True).draw(5)[0])


def test_every_frame_is_drawn_with_its_labels() -> None:
    drawn = [FrameSampler(TRAIN, 16, 0, False).draw(step) for step in range(4)]
    frames, labels = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    found = set()
    for frame, target in zip((255 * frames).round().byte(), labels, strict=True):
        for c, source in enumerate(TRAIN):
            for t in range(len(source)):
                assert source.labels is not None
                if torch.equal(frame, source.frames[t]):
                    assert torch.equal(target, source.labels[t].long())
                    found.add((c, t))
    assert len(found) == 6


def test_augmentation_keeps_range_and_mirrors_frames_with_their_labels() -> None:
    labels = torch.randint(3, (64, 4, 6))
    images = (labels[:, None].float() / 2).expand(-1, 3, -1, -1).contiguous()
    changed, moved = augmented(images, labels, torch.Generator().manual_seed(0))
    assert float(changed.min()) >= 0
    assert float(changed.max()) <= 1
    mirrored = (moved == labels.flip(-1)).flatten(1).all(1)
    kept = (moved == labels).flatten(1).all(1)
    assert 16 < mirrored.sum() < 48
    assert (mirrored | kept).all()
    for image, target in zip(changed, moved, strict=True):  # brighter classes stay brighter
        means = [float(image[:, target == c].mean()) for c in range(3)]
        assert means == sorted(means)


def test_measuring_gives_one_matrix_per_clip_whatever_the_batch() -> None:
    model = network().eval()
    clips = [clip(5, frames=5), clip(6, frames=3, size=(24, 16))]
    whole = measure_counts(model, clips, TASK)
    assert torch.equal(whole, measure_counts(model, clips, TASK, batch=2))
    assert whole.sum((1, 2)).tolist() == [5 * 16 * 24, 3 * 24 * 16]
    with pytest.raises(VideoError, match="no clips to measure on"):
        measure_counts(model, [], TASK)
    with pytest.raises(VideoError, match="which measuring needs"):
        measure_counts(model, [unlabelled(clips[0])], TASK)
