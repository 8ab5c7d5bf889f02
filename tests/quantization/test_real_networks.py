"""The pretrained networks of the `shared` folder, wrapped and stepped."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from resq_rl.quantization import LevelField, ResQModel, ThresholdField
from tests.quantization.networks import byte_clips, everywhere, video

SIZE = (256, 256)


def load(shared: Path, name: str) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.load(shared / "models" / name).module()


@pytest.mark.real_data
def test_selfie_segmentation(shared: Path) -> None:
    network = load(shared, "selfie_segmentation.pt2")
    frames = video(2, 3, SIZE)[:, None]
    model = ResQModel(network, frames[0])
    kinds = [site.layer_kind for site in model.sites]
    assert len(kinds) == 55
    assert kinds.count("transposed") == 1
    assert kinds.count("depthwise") > 10
    assert 55e6 < model.macs < 60e6
    assert all(model.exact_sites)
    with torch.no_grad():
        wanted = tree_leaves(network(frames[0]))
    for a, b in zip(wanted, tree_leaves(model.float_forward(frames[0])), strict=True):
        torch.testing.assert_close(b, a, atol=1e-5, rtol=1e-5)
    model.calibrate(byte_clips(1, 2, 3, SIZE))
    state = model.new_state(1)
    groups = len(model.groups)
    out, cost = model.step(frames[0], state, everywhere(1, True), LevelField.constant(0, 1, groups, (6, 10)))
    assert float(cost.total) == pytest.approx(model.reference_bops(), rel=1e-12)
    assert tree_leaves(out)[0].shape == (1, 1, *SIZE)
    out, cost = model.step(frames[1], state, everywhere(1, False), ThresholdField.constant(0.5, 1, groups, (6, 10)))
    assert 0 < float(cost.total) < model.reference_bops() / 2
    assert bool(tree_leaves(out)[0].isfinite().all())


@pytest.mark.real_data
def test_pose_landmarks(shared: Path) -> None:
    network = load(shared, "pose_landmark_lite.pt2")
    frames = torch.rand(1, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    model = ResQModel(network, frames)
    assert len(model.sites) == 88
    assert 190e6 < model.macs < 200e6
    with torch.no_grad():
        wanted = tree_leaves(network(frames))
    for a, b in zip(wanted, tree_leaves(model.float_forward(frames)), strict=True):
        torch.testing.assert_close(b, a, atol=1e-5 * float(a.abs().max()) + 1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.real_data
def test_attention_over_3600_places(shared: Path) -> None:
    network, size = load(shared, "twinlitenet.pt2"), (360, 640)
    frames = video(2, 3, size)[:, None]
    model = ResQModel(network, frames[0])
    products = [site.macs for site in model.sites if site.layer_kind == "product"]
    assert products == [3600 * 3600 * 4, 3600 * 3600 * 32, 32 * 32 * 3600, 32 * 32 * 3600]
    model.calibrate(byte_clips(1, 2, 3, size))
    state, groups = model.new_state(1), len(model.groups)
    out, cost = model.step(frames[0], state, everywhere(1, True), LevelField.constant(0, 1, groups, (6, 10)))
    assert float(cost.total) == pytest.approx(model.reference_bops(), rel=1e-12)
    with torch.no_grad():
        wanted = tree_leaves(network(frames[0]))
    for a, b in zip(wanted, tree_leaves(out), strict=True):
        assert float((a - b).norm()) < 0.3 * float(a.norm())
    out, cost = model.step(frames[1], state, everywhere(1, False), ThresholdField.constant(1e9, 1, groups, (6, 10)))
    assert float(cost.total) == pytest.approx(64 * sum(products), rel=1e-12)
    assert all(bool(y.isfinite().all()) for y in tree_leaves(out))
