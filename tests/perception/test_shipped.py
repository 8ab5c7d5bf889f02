"""The networks that ship with the package."""

import json
from collections.abc import Callable

import pytest
import torch
from torch import nn

from resq_rl.errors import NetworkError
from resq_rl.perception import (
    CompactDDRNet,
    CompactPose,
    CompactSegFormer,
    Pose,
    Segmentation,
    class_iou,
    compact_ddrnet,
    compact_pose,
    compact_segformer,
    load_weights,
    mean_iou,
    measure_counts,
    shipped_weights,
)
from resq_rl.video import Clip, FigureVideo, GeneratedVideo

FLOOR = 0.86
"""Least mean IoU on the test clips below; measured values are in the model card."""


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    video = GeneratedVideo(frames=4, speed=12.0)
    return [video.clip("test", index) for index in range(16)]


def test_shipped_network_reaches_its_accuracy(clips: list[Clip]) -> None:
    confusion = measure_counts(compact_ddrnet(), clips, Segmentation()).sum(0)
    assert float(mean_iou(confusion)) >= FLOOR
    assert float(class_iou(confusion).min()) >= FLOOR - 0.15


def test_shipped_network_is_frozen_and_repeatable(clips: list[Clip]) -> None:
    one, two = compact_ddrnet(), compact_ddrnet()
    assert not one.training
    assert not any(p.requires_grad for p in one.parameters())
    frames = clips[0].frames.float() / 255
    assert torch.equal(one(frames), two(frames))


def test_shipped_weights_say_what_they_are() -> None:
    network = CompactDDRNet()
    metadata = load_weights(network, shipped_weights())
    assert metadata["architecture"] == "CompactDDRNet"
    assert (int(metadata["classes"]), int(metadata["width"])) == (network.classes, network.width)
    assert metadata["classes"] == str(len(GeneratedVideo().classes))
    assert metadata["input"] == "RGB in 0..1, 96x160"
    assert json.loads(metadata["settings"])["steps"] > 0
    assert float(metadata["validation_miou"]) >= FLOOR


def test_shipped_weights_are_small_float32() -> None:
    assert shipped_weights().stat().st_size < 4_000_000
    network = compact_ddrnet()
    assert {v.dtype for v in network.state_dict().values()} == {torch.float32, torch.int64}
    assert all(v.isfinite().all() for v in network.state_dict().values())


def test_model_card_lies_beside_the_weights() -> None:
    card = (shipped_weights().parent / "README.md").read_text()
    parameters = sum(p.numel() for p in CompactDDRNet().parameters())
    assert f"{parameters:,}" in card
    assert load_weights(CompactDDRNet(), shipped_weights())["validation_miou"] in card
    assert "Apache-2.0" in card


TRANSFORMER_FLOOR = 0.71
"""Least mean IoU of the transformer on the same clips; measured values are in the model card."""


def test_the_shipped_transformer_reaches_its_accuracy(clips: list[Clip]) -> None:
    confusion = measure_counts(compact_segformer(), clips, Segmentation()).sum(0)
    assert float(mean_iou(confusion)) >= TRANSFORMER_FLOOR
    assert float(class_iou(confusion).min()) >= TRANSFORMER_FLOOR - 0.15


def test_the_shipped_transformer_weights_say_what_they_are() -> None:
    network, path = CompactSegFormer(), shipped_weights("compact_segformer_generated")
    metadata = load_weights(network, path)
    assert metadata["architecture"] == "CompactSegFormer"
    assert (int(metadata["classes"]), int(metadata["width"])) == (network.classes, network.width)
    card = (path.parent / "README.md").read_text()
    parameters = sum(p.numel() for p in network.parameters())
    assert parameters < 1_000_000
    assert f"{parameters:,}" in card
    assert metadata["validation_accuracy"] in card


@pytest.mark.parametrize("make", [CompactDDRNet, CompactSegFormer])
def test_settings_out_of_range_are_refused(make: Callable[..., nn.Module]) -> None:
    with pytest.raises(NetworkError, match="classes must be from 2 to 255, got 1"):
        make(classes=1)
    with pytest.raises(NetworkError, match="width must be an even number of at least 8, got 9"):
        make(width=9)


POSE_FLOOR = 0.84
"""Least PCK@0.2 on the test clips below; measured values are in the model card."""


def test_the_shipped_pose_network_reaches_its_accuracy() -> None:
    video, task = FigureVideo(frames=4, speed=12.0), Pose()
    counts = measure_counts(compact_pose(), [video.clip("test", index) for index in range(24)], task).sum(0)
    assert float(task.accuracy(counts)) >= POSE_FLOOR
    by_point = counts[:, 0] / counts[:, 1]
    assert float(by_point.min()) >= POSE_FLOOR - 0.15


def test_the_shipped_pose_weights_say_what_they_are() -> None:
    network, path = CompactPose(), shipped_weights("compact_pose_generated")
    metadata = load_weights(network, path)
    assert metadata["architecture"] == "CompactPose"
    assert metadata["metric"] == "PCK@0.2"
    assert (int(metadata["classes"]), int(metadata["width"])) == (network.classes, network.width)
    card = (path.parent / "README.md").read_text()
    assert f"{sum(p.numel() for p in network.parameters()):,}" in card
    assert metadata["validation_accuracy"] in card
    assert sum(p.numel() for p in network.parameters()) < 500_000
