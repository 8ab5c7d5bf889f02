"""Small networks and clips that the quantization tests share."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from resq_rl.quantization import QuantizationConfig, ResQModel
from tests.quantization.reference import Setting


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    """A number as the same number twice."""
    return (value, value) if isinstance(value, int) else value


@dataclass(frozen=True)
class Case:
    """One operator as a network of its own, with the arithmetic it must do."""

    name: str
    make: Callable[[], nn.Module]
    setting: Setting
    channels: tuple[int, int]
    size: tuple[int, int] = (7, 6)


def _conv(
    name: str,
    ins: int,
    outs: int,
    kernel: int | tuple[int, int],
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    bias: bool = True,
    size: tuple[int, int] = (7, 6),
) -> Case:
    top, left = pair(padding)
    setting = Setting("conv2d", pair(kernel), pair(stride), (left, left, top, top), pair(dilation), groups)
    return Case(
        name, lambda: nn.Conv2d(ins, outs, kernel, stride, padding, dilation, groups, bias), setting, (ins, outs), size
    )


def _transposed(
    name: str,
    ins: int,
    outs: int,
    kernel: int | tuple[int, int],
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    output_padding: int | tuple[int, int] = 0,
    groups: int = 1,
    dilation: int = 1,
    size: tuple[int, int] = (5, 4),
) -> Case:
    top, left = pair(padding)
    sides = (left, left, top, top)
    setting = Setting(
        "conv_transpose2d", pair(kernel), pair(stride), sides, pair(dilation), groups, pair(output_padding)
    )
    return Case(
        name,
        lambda: nn.ConvTranspose2d(ins, outs, kernel, stride, padding, output_padding, groups, True, dilation),
        setting,
        (ins, outs),
        size,
    )


CASES = (
    _conv("pointwise", 3, 5, 1),
    _conv("plain", 3, 4, 3, padding=1),
    _conv("without_bias", 3, 4, 3, bias=False),
    _conv("stride", 3, 4, 3, stride=2, padding=1),
    _conv("uneven", 2, 4, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2)),
    _conv("dilation", 3, 4, 3, padding=2, dilation=2),
    _conv("skips_pixels", 3, 4, 1, stride=3),
    _conv("groups", 4, 6, 3, padding=1, groups=2),
    _conv("depthwise", 4, 4, 3, stride=2, padding=1, groups=4),
    _conv("depthwise_multiplied", 3, 6, 3, padding=1, groups=3),
    Case("same", lambda: nn.Conv2d(3, 4, (4, 3), padding="same"), Setting("conv2d", (4, 3), pads=(1, 1, 1, 2)), (3, 4)),
    Case(
        "same_dilated",
        lambda: nn.Conv2d(3, 4, 2, padding="same", dilation=3),
        Setting("conv2d", (2, 2), pads=(1, 2, 1, 2), dilation=(3, 3)),
        (3, 4),
    ),
    Case("valid", lambda: nn.Conv2d(3, 4, 3, padding="valid"), Setting("conv2d", (3, 3)), (3, 4)),
    _transposed("transposed", 3, 4, 2, stride=2),
    _transposed("transposed_cropped", 3, 4, 3, stride=2, padding=1, output_padding=1),
    _transposed("transposed_uneven", 2, 4, (3, 2), stride=(3, 2), padding=(1, 0), output_padding=(2, 1)),
    _transposed("transposed_groups", 4, 6, 3, stride=2, padding=1, groups=2),
    _transposed("transposed_depthwise", 4, 4, 4, stride=2, padding=1, groups=4),
    _transposed("transposed_dilated", 3, 2, 3, padding=1, dilation=2),
)


def video(frames: int, channels: int, size: tuple[int, int], seed: int = 0, change: float = 0.1) -> Tensor:
    """Frames in 0..1 of which a few pixels change strongly, more change weakly and most stay: (t, c, h, w)."""
    generator = torch.Generator().manual_seed(seed)
    out = [torch.rand(channels, *size, generator=generator)]
    for _ in range(frames - 1):
        noise = torch.randn(channels, *size, generator=generator)
        scale = torch.rand(1, *size, generator=generator).pow(4)
        out.append((out[-1] + change * 3 * scale * noise).clamp(0, 1))
    return torch.stack(out)


def byte_clips(count: int, frames: int, channels: int, size: tuple[int, int], seed: int = 100) -> list[Tensor]:
    """Clips to calibrate on, uint8."""
    return [(video(frames, channels, size, seed + i) * 255).round().to(torch.uint8) for i in range(count)]


def smooth_clips(count: int, frames: int, channels: int, size: tuple[int, int], seed: int = 300) -> list[Tensor]:
    """Clips that change smoothly over space, so that the inputs of one patch go together as in real video; uint8."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(count, frames, channels, 3, 3, generator=generator)
    steps[:, 1:] *= 0.3
    coarse = (0.5 + 0.2 * steps.cumsum(1)).flatten(0, 1)
    fine = nn.functional.interpolate(coarse, size, mode="bilinear", align_corners=True)
    return list((fine.clamp(0, 1) * 255).round().to(torch.uint8).unflatten(0, (count, frames)))


def wrapped(
    network: nn.Module,
    channels: int = 3,
    size: tuple[int, int] = (8, 8),
    config: QuantizationConfig | None = None,
    *,
    clips: int = 2,
    seed: int = 100,
) -> ResQModel:
    """A calibrated model of `network`."""
    model = ResQModel(network, torch.rand(1, channels, *size), config)
    return model.calibrate(byte_clips(clips, 5, channels, size, seed))


@cache
def model_of(case: Case, config: QuantizationConfig | None = None) -> ResQModel:
    """The calibrated model of a case, which tests share and do not change."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return wrapped(case.make(), case.channels[0], case.size, config)


def everywhere(clips: int, value: bool) -> Tensor:
    """A refresh flag for each clip."""
    return torch.full((clips,), value)


class SmallNet(nn.Module):
    """Stem, depthwise-separable block with squeeze-and-excite and in-place ops, transposed convolution, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.ReLU(), nn.Conv2d(8, 8, 1))
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1))
        self.up = nn.ConvTranspose2d(8, 6, 2, 2)
        self.head = nn.Conv2d(6, 2, 1)
        self.score = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        y = self.block(x)
        y *= self.squeeze(y).clamp(0, 1)
        x = x + y
        return self.head(torch.relu(self.up(x))), self.score(x.mean((2, 3)))


def perturb_statistics(network: nn.Module, seed: int = 0) -> nn.Module:
    """Give BatchNorm layers statistics and scales far from their defaults, and switch to evaluation."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            if module.running_mean is not None and module.running_var is not None:
                module.running_mean.copy_(torch.randn(module.num_features, generator=generator) * 0.3)
                module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
            if module.affine:
                module.weight.data.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
                module.bias.data.copy_(torch.randn(module.num_features, generator=generator) * 0.2)
    return network.eval()
