"""The mask propagation network that ships with the package."""

import json

import pytest

from resq_rl.perception import (
    MaskPropagation,
    MaskPropagationNet,
    j_and_f,
    load_weights,
    mask_propagation_net,
    measure_counts,
    shipped_weights,
)
from resq_rl.video import GeneratedObjects

FLOOR = 0.82
"""Least J&F on the test clips below; measured values are in the model card."""


def test_shipped_network_reaches_its_accuracy() -> None:
    """Rolled out on its own masks, from the given one on; without them it follows nothing."""
    video, network, task = GeneratedObjects(frames=12, speed=2.0), mask_propagation_net(), MaskPropagation()
    clips = [video.clip("test", index) for index in range(16)]
    assert not network.training
    counts = measure_counts(network, clips, task)
    assert counts[:, 2].tolist() == [10.0] * 16
    kept = [j_and_f(clip.labels[:1].expand(12, -1, -1), clip.labels)[2] for clip in clips if clip.labels is not None]
    assert float(task.accuracy(counts.sum(0))) >= FLOOR > sum(kept) / len(kept)


def test_shipped_weights_say_what_they_are() -> None:
    path = shipped_weights("mask_propagation_generated")
    network = MaskPropagationNet()
    metadata = load_weights(network, path)
    assert (metadata["architecture"], metadata["metric"]) == ("MaskPropagationNet", "J&F")
    assert int(metadata["width"]) == network.width
    assert json.loads(metadata["settings"])["roll_out"] > 1
    assert float(metadata["validation_accuracy"]) >= FLOOR
    assert path.stat().st_size < 2_000_000
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(210_000, rel=0.01)
