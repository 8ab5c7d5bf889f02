"""The task of mask propagation, its network and training on roll-outs."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from resq_rl.errors import NetworkError, SettingsError, VideoError
from resq_rl.perception import (
    CompactDDRNet,
    MaskPropagation,
    MaskPropagationNet,
    PretrainSettings,
    Recurrent,
    Segmentation,
    Trainable,
    contour_accuracy,
    load_weights,
    measure_counts,
    pretrain,
    region_similarity,
)
from resq_rl.perception.disturbed_masks import disturbed_masks
from resq_rl.perception.segmentation import segmentation_loss
from resq_rl.perception.training_batches import FrameSampler
from resq_rl.video import IGNORE, Clip, GeneratedObjects

VIDEO = GeneratedObjects(size=(48, 64), frames=6, train=4, validation=2, test=1)
TASK = MaskPropagation()


def test_it_is_a_recurrent_task_that_networks_can_be_trained_for() -> None:
    assert isinstance(TASK, Recurrent)
    assert isinstance(TASK, Trainable)
    assert not isinstance(Segmentation(), Recurrent)
    with pytest.raises(SettingsError, match="classes must be 2"):
        MaskPropagation(classes=3)
    with pytest.raises(SettingsError, match=r"label_size .* cannot be used"):
        MaskPropagation(label_size=(8, 8))


def test_the_network_is_the_segmentation_network_with_three_more_planes() -> None:
    torch.manual_seed(0)
    network = MaskPropagationNet(8).eval()
    plain = CompactDDRNet(2, 8, planes=6).eval()
    plain.load_state_dict(network.state_dict())
    frames, masks = torch.rand(2, 3, 40, 56), (torch.rand(2, 1, 40, 56) > 0.5).float()
    colours = torch.rand(2, 6, 1, 1)
    with torch.no_grad():
        found = network(frames, masks, colours)
        assert found.shape == (2, 2, 40, 56)
        near = [1 - 5 * (frames - colours[:, i : i + 3]).abs().mean(1, keepdim=True) for i in (0, 3)]
        expected = plain(torch.cat([frames, masks, *(n.where(n > 0, 0.0) for n in near)], 1))
        torch.testing.assert_close(found, expected)
        assert not torch.equal(found, network(frames, 1 - masks, colours))
    assert sum(p.numel() for p in MaskPropagationNet().parameters()) < 500_000
    with pytest.raises(NetworkError, match="width"):
        MaskPropagationNet(7)


def test_counts_hold_j_and_f_of_the_frames_that_are_labelled() -> None:
    generator = torch.Generator().manual_seed(0)
    prediction, target = (torch.randint(0, 2, (3, 20, 30), generator=generator, dtype=torch.uint8) for _ in range(2))
    target[1] = IGNORE
    counts = TASK.counts(prediction, target)
    region, boundary = region_similarity(prediction, target), contour_accuracy(prediction, target)
    inside = [float((target[i] == 1).sum()) for i in (0, 2)]
    assert counts[1].tolist() == [0.0] * 5
    for row, i, area in zip((0, 2), (0, 2), inside, strict=True):
        assert counts[row].tolist() == pytest.approx([float(region[i]), float(boundary[i]), 1.0, area, 600.0])
    expected = float(region[[0, 2]].mean() + boundary[[0, 2]].mean()) / 2
    assert float(TASK.accuracy(counts.sum(0))) == pytest.approx(expected)
    assert TASK.accuracy(counts[[0, 2]]).shape == (2,)


def test_the_template_is_two_colours_of_the_object() -> None:
    """An object of three dark and three light pixels before a red ground; an empty one gives grey."""
    frame, mask = torch.zeros(3, 4, 5, dtype=torch.uint8), torch.zeros(4, 5, dtype=torch.uint8)
    frame[0], mask[1, :3], mask[2, :3] = 255, 1, 1
    frame[:, 1, :3] = torch.tensor([10, 20, 30])[:, None]
    frame[:, 2, :3] = torch.tensor([200, 100, 50])[:, None]
    assert TASK.template(frame, mask).flatten().tolist() == [10, 20, 30, 200, 100, 50]
    assert TASK.template(frame[:, :2], mask[:2]).flatten().tolist() == [10, 20, 30, 10, 20, 30]
    assert TASK.template(frame, torch.zeros_like(mask)).flatten().tolist() == [128] * 6


def test_a_missed_pixel_of_a_small_object_costs_more_than_of_the_background() -> None:
    """The table of two classes of which the object is a tenth: max(f) / 2 * (1 / 0.9 + 1 / 0.1) = 5."""
    table = TASK.error_table(torch.tensor([0.5, 0.5, 1.0, 60.0, 600.0], dtype=torch.float64), "iou")
    torch.testing.assert_close(table, torch.tensor([[0.0, 5.0], [5.0, 0.0]]))
    assert TASK.error_table(torch.ones(5, dtype=torch.float64), "pixel").tolist() == [[0, 1], [1, 0]]


def test_the_loss_is_of_each_labelled_frame_by_itself() -> None:
    """A small object missed costs as much beside a large one as alone, and a frame without labels costs nothing."""
    labels = torch.zeros(3, 16, 16, dtype=torch.int64)
    labels[0, :2, :2], labels[1, :, :12], labels[2] = 1, 1, IGNORE
    logits = torch.randn(3, 2, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    loss = TASK.objective(VIDEO.clips("train"), PretrainSettings(dice=1.0, class_balance=0.0))
    alone = [segmentation_loss(logits[i : i + 1], labels[i : i + 1], torch.ones(2), 1.0) for i in range(2)]
    torch.testing.assert_close(loss(logits, labels), (alone[0] + alone[1]) / 2)
    assert loss(logits[2:], labels[2:]).item() == 0
    loss(logits[2:], labels[2:]).backward()
    assert logits.grad is not None
    assert float(logits.grad.abs().max()) == 0


def test_disturbed_masks_are_like_the_objects_but_wrong() -> None:
    """Most keep much of the object; an empty mask may only gain a blot; the same generator gives the same."""
    masks = torch.stack([clip.labels[0] == 1 for clip in VIDEO.clips("train") * 8 if clip.labels is not None])
    found = disturbed_masks(masks, torch.Generator().manual_seed(3))
    again = disturbed_masks(masks, torch.Generator().manual_seed(3))
    assert torch.equal(found, again)
    overlap = region_similarity(found.byte(), masks.byte())
    assert 0.3 < float(overlap.mean()) < 0.9
    assert len(overlap.unique()) > 24
    blots = disturbed_masks(torch.zeros(32, 48, 64, dtype=torch.bool), torch.Generator().manual_seed(3))
    share = blots.float().mean((1, 2))
    assert 2 < int((share > 0).sum()) < 20
    assert float(share.max()) < 0.1


def test_windows_are_consecutive_frames_with_their_labels() -> None:
    clips = VIDEO.clips("train")
    sampler = FrameSampler(clips, 8, seed=0, augment=False, window=3)
    frames, labels = sampler.draw(5)
    assert frames.shape == (8, 3, 3, 48, 64)
    starts = []
    for window, label in zip(frames, labels, strict=True):
        places = [
            (i, t)
            for i, clip in enumerate(clips)
            for t in range(4)
            if torch.equal(clip.frames[t : t + 3].float() / 255, window)
        ]
        assert len(places) == 1
        owner, time = places[0]
        expected = clips[owner].labels
        assert expected is not None
        assert torch.equal(expected[time : time + 3].long(), label)
        starts.append(time)
    assert len(set(starts)) > 1
    with pytest.raises(VideoError, match="windows of 7 frames needs clips of as many"):
        FrameSampler(clips, 8, seed=0, augment=False, window=7)


def test_a_window_is_augmented_as_a_whole() -> None:
    """Still frames stay equal but for noise, and labels are mirrored with them."""
    clip = VIDEO.clips("train")[0]
    assert clip.labels is not None
    still = Clip(clip.frames[:1].expand(4, -1, -1, -1), clip.labels[:1].expand(4, -1, -1), 25.0, "still", "test")
    plain = FrameSampler([still], 8, seed=1, augment=False, window=4).draw(0)
    frames, labels = FrameSampler([still], 8, seed=1, augment=True, window=4).draw(0)
    assert float((frames - frames[:, :1]).abs().mean()) < 0.04
    assert torch.equal(labels, labels[:, :1].expand_as(labels))
    mirrored = [torch.equal(label, other.flip(-1)) for label, other in zip(labels, plain[1], strict=True)]
    assert any(mirrored)
    assert not all(mirrored)
    assert float((frames - plain[0]).abs().mean((1, 2, 3, 4)).min()) > 0.003


class Recorder(nn.Module):
    """A network with one weight that keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.seen: list[Tensor] = []

    def forward(self, frames: Tensor, masks: Tensor, colours: Tensor) -> Tensor:
        self.seen.append(masks)
        foreground = self.scale * (frames.mean(1, keepdim=True) - 0.5)
        return torch.cat([-foreground, foreground], 1)


def test_training_feeds_own_predictions_back() -> None:
    """After the first frame of a window the network gets what it predicted for the one before."""
    network, settings = Recorder(), PretrainSettings(steps=1, batch=4, roll_out=3, class_balance=0.0)
    pretrain(network, VIDEO.clips("train"), VIDEO.clips("validation"), settings, task=TASK)
    frames, labels = FrameSampler(VIDEO.clips("train"), 4, 0, True, window=4).draw(0)
    assert region_similarity(network.seen[0][:, 0].byte(), labels[:, 0].byte()).mean() > 0.4
    for t in (1, 2):
        assert torch.equal(network.seen[t][:, 0] > 0, frames[:, t].mean(1) > 0.5)


def test_training_improves_the_network_and_its_weights_load(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, losses = MaskPropagationNet(8), []
    settings = PretrainSettings(steps=30, batch=4, roll_out=2, class_balance=0.0, validate_every=15)
    report = pretrain(
        network,
        VIDEO.clips("train"),
        VIDEO.clips("validation"),
        settings,
        task=TASK,
        progress=lambda p: losses.append(p.loss),
        weights=tmp_path / "weights.safetensors",
    )
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    again = MaskPropagationNet(8).eval()
    assert load_weights(again, tmp_path / "weights.safetensors")["metric"] == "J&F"
    counts = measure_counts(again, VIDEO.clips("validation"), TASK)
    assert counts[:, 2].tolist() == [4.0, 4.0]
    assert float(TASK.accuracy(counts.sum(0))) == pytest.approx(report.validation)
