"""DDRNet-23-slim against the names of the published checkpoints, a hand count and a plain reference."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resq_rl.errors import NetworkError, WeightsError
from resq_rl.perception import DDRNet23Slim, Segmentation, ddrnet23_slim
from resq_rl.quantization import LevelField, QuantizationConfig, ResQModel
from tests.perception.test_compact_networks import macs

STATISTICS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
DOWNSAMPLED = ("layer2", "layer3", "layer4")


def published_names() -> Iterator[str]:
    """What the published Cityscapes checkpoint holds of the network itself."""

    def convolution(name: str, bias: bool = False) -> Iterator[str]:
        yield from (f"{name}.{part}" for part in (("weight", "bias") if bias else ("weight",)))

    def norm(name: str) -> Iterator[str]:
        yield from (f"{name}.{part}" for part in STATISTICS)

    for index in (0, 3):
        yield from (*convolution(f"conv1.{index}", bias=True), *norm(f"conv1.{index + 1}"))
    for stage in ("layer1", "layer2", "layer3", "layer4", "layer3_", "layer4_"):
        for block, number in ((b, n) for b in (0, 1) for n in (1, 2)):
            yield from (*convolution(f"{stage}.{block}.conv{number}"), *norm(f"{stage}.{block}.bn{number}"))
    for stage in ("layer5", "layer5_"):
        for number in (1, 2, 3):
            yield from (*convolution(f"{stage}.0.conv{number}"), *norm(f"{stage}.0.bn{number}"))
    downsampled = [f"{stage}.0.downsample" for stage in (*DOWNSAMPLED, "layer5", "layer5_")]
    for name in ("compression3", "compression4", "down3", "down4", *downsampled):
        yield from (*convolution(f"{name}.0"), *norm(f"{name}.1"))
    yield from (*convolution("down4.3"), *norm("down4.4"))
    for name in ("scale0", "process1", "process2", "process3", "process4", "compression", "shortcut"):
        yield from (*norm(f"spp.{name}.0"), *convolution(f"spp.{name}.2"))
    for name in ("scale1", "scale2", "scale3", "scale4"):
        yield from (*norm(f"spp.{name}.1"), *convolution(f"spp.{name}.3"))
    yield from (*norm("final_layer.bn1"), *convolution("final_layer.conv1"), *norm("final_layer.bn2"))
    yield from convolution("final_layer.conv2", bias=True)


def randomized(network: nn.Module) -> nn.Module:
    """The network with statistics and affine parameters of norms that are not all 0 and 1."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight, 0.8, 1.2),
                (module.bias, -0.2, 0.2),
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.6, 1.4),
            ):
                assert tensor is not None
                tensor.data.uniform_(low, high)
    return network


class Reference:
    """The network of the paper's figures 4 and 5 as plain functions over a checkpoint's tensors."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def conv(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = self.tensors[f"{name}.weight"]
        return F.conv2d(x, weight, self.tensors.get(f"{name}.bias"), stride, padding=weight.shape[-1] // 2)

    def norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias, mean, variance = (self.tensors[f"{name}.{part}"][:, None, None] for part in STATISTICS[:4])
        return (x - mean) / torch.sqrt(variance + 1e-5) * weight + bias

    def block(self, x: Tensor, name: str, strides: tuple[int, ...]) -> Tensor:
        y = x
        for number, stride in enumerate(strides, 1):
            y = F.relu(y) if number > 1 else y
            y = self.norm(self.conv(y, f"{name}.conv{number}", stride), f"{name}.bn{number}")
        if f"{name}.downsample.0.weight" in self.tensors:
            stride = max(strides)
            x = self.norm(self.conv(x, f"{name}.downsample.0", stride), f"{name}.downsample.1")
        return y + x

    def stage(self, x: Tensor, name: str) -> Tensor:
        first = self.block(x, f"{name}.0", (2, 1) if name in DOWNSAMPLED else (1, 1))
        return self.block(F.relu(first), f"{name}.1", (1, 1))

    def up(self, x: Tensor, size: torch.Size) -> Tensor:
        return F.interpolate(x, size=size[-2:], mode="bilinear", align_corners=False)

    def context(self, x: Tensor) -> Tensor:
        def scale(y: Tensor, name: str, index: int) -> Tensor:
            return self.conv(F.relu(self.norm(y, f"spp.{name}.{index}")), f"spp.{name}.{index + 2}")

        pooled = [F.avg_pool2d(x, 5, 2, 2), F.avg_pool2d(x, 9, 4, 4), F.avg_pool2d(x, 17, 8, 8), x.mean((2, 3), True)]
        found = [scale(x, "scale0", 0)]
        for number, coarse in enumerate(pooled, 1):
            y = self.up(scale(coarse, f"scale{number}", 1), x.shape)
            found.append(scale(y + found[-1], f"process{number}", 0))
        return scale(torch.cat(found, 1), "compression", 0) + scale(x, "shortcut", 0)

    def __call__(self, frames: Tensor) -> Tensor:
        mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        x = (frames - mean[:, None, None]) / deviation[:, None, None]
        for index in (0, 3):
            x = F.relu(self.norm(self.conv(x, f"conv1.{index}", 2), f"conv1.{index + 1}"))
        x = F.relu(self.stage(F.relu(self.stage(x, "layer1")), "layer2"))
        low, high = self.stage(x, "layer3"), self.stage(x, "layer3_")
        down = self.norm(self.conv(F.relu(high), "down3.0", 2), "down3.1")
        up = self.up(self.norm(self.conv(F.relu(low), "compression3.0"), "compression3.1"), high.shape)
        low, high = self.stage(F.relu(low + down), "layer4"), self.stage(F.relu(high + up), "layer4_")
        down = F.relu(self.norm(self.conv(F.relu(high), "down4.0", 2), "down4.1"))
        down = self.norm(self.conv(down, "down4.3", 2), "down4.4")
        up = self.up(self.norm(self.conv(F.relu(low), "compression4.0"), "compression4.1"), high.shape)
        low = self.context(self.block(F.relu(low + down), "layer5.0", (1, 2, 1)))
        high = self.block(F.relu(high + up), "layer5_.0", (1, 1, 1))
        x = self.conv(F.relu(self.norm(high + self.up(low, high.shape), "final_layer.bn1")), "final_layer.conv1")
        return self.conv(F.relu(self.norm(x, "final_layer.bn2")), "final_layer.conv2")


def test_layers_have_the_names_of_the_published_checkpoint() -> None:
    names = list(published_names())
    assert len(names) == len(set(names))
    assert set(DDRNet23Slim().state_dict()) == set(names)


def test_macs_equal_a_hand_count_and_the_paper() -> None:
    half, quarter, eighth, sixteenth = (1024 * 2048 // n**2 for n in (2, 4, 8, 16))
    low, lowest = 32 * 64, 16 * 32
    hand = {
        "conv1": half * 27 * 32 + quarter * 9 * 32 * 32,
        "layer1": quarter * 4 * 9 * 32 * 32,
        "layer2": eighth * (9 * 32 * 64 + 3 * 9 * 64 * 64 + 32 * 64),
        "layer3": sixteenth * (9 * 64 * 128 + 3 * 9 * 128 * 128 + 64 * 128),
        "layer3_": eighth * 4 * 9 * 64 * 64,
        "compression3": sixteenth * 128 * 64,
        "down3": sixteenth * 9 * 64 * 128,
        "layer4": low * (9 * 128 * 256 + 3 * 9 * 256 * 256 + 128 * 256),
        "layer4_": eighth * 4 * 9 * 64 * 64,
        "compression4": low * 256 * 64,
        "down4": sixteenth * 9 * 64 * 128 + low * 9 * 128 * 256,
        "layer5_": eighth * (64 * 64 + 9 * 64 * 64 + 2 * 64 * 128),
        "layer5": low * 256 * 256 + lowest * (9 * 256 * 256 + 2 * 256 * 512),
        "spp": (lowest + 8 * 16 + 4 * 8 + 2 * 4 + 1) * 512 * 128 + lowest * (4 * 9 * 128 * 128 + 640 * 128 + 512 * 128),
        "final_layer": eighth * (9 * 128 * 64 + 64 * 19),
    }
    with torch.device("meta"):
        assert macs(DDRNet23Slim(), 1024, 2048) == hand
    assert sum(hand.values()) == pytest.approx(36.3e9, rel=0.002)
    assert sum(p.numel() for p in DDRNet23Slim().parameters()) == pytest.approx(5.7e6, rel=0.002)


@pytest.mark.slow
def test_the_ledger_agrees_with_the_paper() -> None:
    model = ResQModel(ddrnet23_slim(None), torch.zeros(1, 3, 1024, 2048))
    assert model.macs == pytest.approx(36.3e9, rel=0.02)  # padding, 1.1%, is not counted


@pytest.mark.parametrize("size", [(64, 128), (72, 56), (50, 70)])
def test_output_equals_a_plain_reference(size: tuple[int, int]) -> None:
    network = randomized(DDRNet23Slim(classes=5)).eval()
    frames = torch.rand(2, 3, *size)
    with torch.no_grad():
        output, expected = network(frames), Reference(network.state_dict())(frames)
    assert output.shape == (2, 5, -(-size[0] // 8), -(-size[1] // 8))
    assert torch.allclose(output, expected, rtol=1e-4, atol=1e-4)
    assert output.std() > 0.01


def cityscapes_checkpoint() -> dict[str, Tensor]:
    """The arrangement of `best_val_smaller.pth`: prefixed, with an auxiliary head and a loss."""
    tensors = {f"model.{name}": value for name, value in randomized(DDRNet23Slim()).state_dict().items()}
    return tensors | {
        "model.seghead_extra.conv1.weight": torch.zeros(64, 64, 3, 3),
        "model.seghead_extra.bn1.weight": torch.zeros(64),
        "loss.criterion.weight": torch.ones(19),
    }


@pytest.mark.parametrize("arrangement", ["plain", "nested", "parallel"])
def test_published_checkpoints_load(arrangement: str, tmp_path: Path) -> None:
    tensors = cityscapes_checkpoint()
    if arrangement == "parallel":
        tensors = {f"module.{name}": value for name, value in tensors.items()}
    path = tmp_path / "best_val_smaller.pth"
    torch.save({"epoch": 3, "state_dict": tensors} if arrangement == "nested" else tensors, path)
    network = ddrnet23_slim(path)
    prefix = "module.model." if arrangement == "parallel" else "model."
    assert all(torch.equal(value, tensors[prefix + name]) for name, value in network.state_dict().items())
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())


def test_an_imagenet_backbone_loads(tmp_path: Path) -> None:
    """The classification checkpoint lacks the DAPPM and the head, and has layers of its own."""
    own = randomized(DDRNet23Slim()).state_dict()
    tensors = {name: value for name, value in own.items() if not name.startswith(("spp", "final_layer"))}
    torch.save(
        tensors | {"linear.weight": torch.zeros(1000, 1024), "linear.bias": torch.zeros(1000)}, tmp_path / "i.pth"
    )
    with pytest.raises(WeightsError, match=r"do not fit DDRNet23Slim: 79 missing \(final_layer.*2 unexpected \(linear"):
        ddrnet23_slim(tmp_path / "i.pth")
    state = ddrnet23_slim(tmp_path / "i.pth", classes=11, backbone=True).state_dict()
    assert all(torch.equal(state[name], value) for name, value in tensors.items())
    assert state["final_layer.conv2.weight"].shape == (11, 64, 1, 1)
    torch.save({"linear.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match="have no layer in common with DDRNet23Slim: 1 in the file"):
        ddrnet23_slim(tmp_path / "other.pth", backbone=True)


def test_checkpoints_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    tensors = cityscapes_checkpoint()
    del tensors["model.down3.0.weight"]
    tensors["model.extra.weight"] = torch.zeros(1)
    torch.save(tensors, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"1 missing \(down3.0.weight\); 1 unexpected \(extra.weight\)"):
        ddrnet23_slim(tmp_path / "w.pth")
    torch.save(cityscapes_checkpoint(), tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"2 of another shape \(final_layer.conv2.weight \(19, 64, 1, 1\)"):
        ddrnet23_slim(tmp_path / "w.pth", classes=11)
    with pytest.raises(NetworkError, match="classes must be from 2 to 255, got 1"):
        ddrnet23_slim(None, classes=1)


def test_it_runs_as_keyframes_and_residuals() -> None:
    network, task = ddrnet23_slim(None), Segmentation(19)
    clip = torch.randint(256, (3, 3, 8, 16), dtype=torch.uint8).repeat_interleave(8, 2).repeat_interleave(8, 3)
    model = ResQModel(
        network, torch.zeros(1, 3, 64, 128), QuantizationConfig(weight_rounding="nearest", range_estimator="min_max")
    ).calibrate([clip])
    assert sum(site.macs for site in model.sites) == model.macs
    state, frames = model.new_state(clips=1), clip.float() / 255
    key, cost = model.step(frames[:1], state, torch.tensor([True]), LevelField.constant(0, 1, len(model.groups)))
    exact = model.float_forward(frames[:1])
    assert (key - exact).norm() < 0.1 * exact.norm()
    assert float(cost.total) == model.reference_bops()
    finest = LevelField.constant(3, 1, len(model.groups))
    moved, _ = model.step(frames[1:2], state, torch.tensor([False]), finest)
    exact = model.float_forward(frames[1:2])
    assert (moved - exact).norm() < 0.5 * (key - exact).norm()
    assert task.output(moved, (64, 128)).shape == (1, 19, 64, 128)
