"""DDRNet-23-slim, the real-time segmentation network of Hong et al. 2021 (arXiv 2101.06085), layer for layer.

Layers have the names of the authors' published checkpoints, so that those load. In the terms of the paper's table 1,
`conv1` is the stem; the branches share `layer1` and `layer2`; `layer3` to `layer5` are the low-resolution branch,
`layer3_` to `layer5_` the high-resolution one; `compression*` and `down*` are the fusions between them; `spp` is the
DAPPM. The auxiliary head, which only training uses, is left out.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Final, no_type_check

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from resq_rl.errors import NetworkError, SettingsError
from resq_rl.perception.compact_networks import resize
from resq_rl.perception.networks import load_network
from resq_rl.perception.normalisation import IMAGENET_MEAN, IMAGENET_STD, Channels, InputTransform, Values
from resq_rl.perception.weight_files import load_weights

__all__ = ["DDRNet23Slim", "ddrnet23_slim"]

_WIDTH: Final = 32  # channels of the stem
_CONTEXT: Final = 128  # channels of each scale of the DAPPM
_HEAD: Final = 64
_POOLS: Final = ((5, 2), (9, 4), (17, 8))  # kernel and stride of the DAPPM's scales 1 to 3
_TRAINING_ONLY: Final = ("seghead_extra.*", "loss.*")


def _normed(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Convolution without bias, then BatchNorm."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False), nn.BatchNorm2d(outputs)
    )


def _activated(inputs: int, outputs: int, kernel: int, *first: nn.Module) -> nn.Sequential:
    """`first`, then BatchNorm, ReLU and a convolution without bias, in the DAPPM's order."""
    convolution = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(*first, nn.BatchNorm2d(inputs), nn.ReLU(), convolution)


class Block(nn.Module):
    """Convolutions with ReLUs between them, plus a shortcut, a strided 1x1 convolution where the shape changes.

    The sum is not rectified; the layer that takes it does that. Layers are named `conv1`, `bn1`, `conv2` and so on.

    Args:
        channels: of the input and after each convolution.
        kernels: size of each convolution.
        stride: of the first 3x3 convolution.
    """

    def __init__(self, channels: Sequence[int], kernels: Sequence[int], stride: int = 1) -> None:
        super().__init__()
        self.depth = len(kernels)
        strided = kernels.index(3)
        for number, (inputs, outputs) in enumerate(pairwise(channels)):
            kernel, step = kernels[number], stride if number == strided else 1
            convolution, norm = _normed(inputs, outputs, kernel, step)
            self.add_module(f"conv{number + 1}", convolution)
            self.add_module(f"bn{number + 1}", norm)
        same = channels[0] == channels[-1] and stride == 1
        self.downsample = None if same else _normed(channels[0], channels[-1], 1, stride)

    @no_type_check
    def forward(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k _ _"]:
        output = self.bn1(self.conv1(features))
        for number in range(2, self.depth + 1):
            output = getattr(self, f"bn{number}")(getattr(self, f"conv{number}")(F.relu(output)))
        return output + (features if self.downsample is None else self.downsample(features))


class Stage(nn.Sequential):
    """Blocks with a ReLU before each of them."""

    @no_type_check
    def forward(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k _ _"]:
        for block in self:
            features = block(F.relu(features))
        return features


def _basic_stage(inputs: int, outputs: int, stride: int = 1) -> Stage:
    """Two basic blocks, the first of them strided."""
    return Stage(Block((inputs, outputs, outputs), (3, 3), stride), Block((outputs, outputs, outputs), (3, 3)))


def _bottleneck_stage(inputs: int, stride: int = 1) -> Stage:
    """One bottleneck block, which doubles the channels."""
    return Stage(Block((inputs, inputs, inputs, 2 * inputs), (1, 3, 1), stride))


class DAPPM(nn.Module):
    """Deep aggregation pyramid pooling: ever coarser averages, each added to the one before, then all concatenated."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        pools = [nn.AvgPool2d(kernel, stride, padding=kernel // 2) for kernel, stride in _POOLS]
        self.scale0 = _activated(inputs, hidden, 1)
        for number, pool in enumerate((*pools, nn.AdaptiveAvgPool2d(1)), 1):
            self.add_module(f"scale{number}", _activated(inputs, hidden, 1, pool))
            self.add_module(f"process{number}", _activated(hidden, hidden, 3))
        self.compression = _activated((len(pools) + 2) * hidden, outputs, 1)
        self.shortcut = _activated(inputs, outputs, 1)

    @no_type_check
    def forward(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k h w"]:
        scales = [self.scale0(features)]
        for number in range(1, len(_POOLS) + 2):
            coarse = resize(getattr(self, f"scale{number}")(features), features)
            scales.append(getattr(self, f"process{number}")(coarse + scales[-1]))
        return self.compression(torch.cat(scales, 1)) + self.shortcut(features)


class Head(nn.Module):
    """Norm, ReLU and convolution, twice; the last one classifies."""

    def __init__(self, inputs: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, hidden, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, classes, 1)

    @no_type_check
    def forward(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k h w"]:
        return self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(features))))))


class DDRNet23Slim(nn.Module):
    """DDRNet-23-slim: 5.7 M parameters, 36.3 G multiply-accumulates for a frame of 1024x2048.

    Args:
        classes: number of output classes, 2 to 255; the published weights have the 19 of Cityscapes.

        transform: what the layers take of the frames; None for the normalisation of ImageNet, on which the authors
            pretrained.

    Input: `Float[Tensor, "b 3 h w"]`, RGB in 0..1; the transform is part of the network. Output: logits
    `Float[Tensor, "b classes _ _"]` of an eighth of the height and width, which the task resizes.

    Raises:
        NetworkError: `classes` is out of range.
    """

    def __init__(self, classes: int = 19, transform: InputTransform | None = None) -> None:
        super().__init__()
        if not 2 <= classes <= 255:
            raise NetworkError(f"DDRNet23Slim: classes must be from 2 to 255, got {classes}.")
        self.classes, w = classes, _WIDTH
        self.transform = transform or InputTransform(IMAGENET_MEAN, IMAGENET_STD, persistent=False)
        self.conv1 = nn.Sequential(
            nn.Conv2d(3, w, 3, stride=2, padding=1),
            nn.BatchNorm2d(w),
            nn.ReLU(),
            nn.Conv2d(w, w, 3, stride=2, padding=1),
            nn.BatchNorm2d(w),
        )
        self.layer1 = _basic_stage(w, w)
        self.layer2 = _basic_stage(w, 2 * w, stride=2)
        self.layer3 = _basic_stage(2 * w, 4 * w, stride=2)
        self.layer3_ = _basic_stage(2 * w, 2 * w)
        self.compression3 = _normed(4 * w, 2 * w, 1)
        self.down3 = _normed(2 * w, 4 * w, 3, stride=2)
        self.layer4 = _basic_stage(4 * w, 8 * w, stride=2)
        self.layer4_ = _basic_stage(2 * w, 2 * w)
        self.compression4 = _normed(8 * w, 2 * w, 1)
        down = _normed(2 * w, 4 * w, 3, stride=2), _normed(4 * w, 8 * w, 3, stride=2)
        self.down4 = nn.Sequential(*down[0], nn.ReLU(), *down[1])
        self.layer5_ = _bottleneck_stage(2 * w)
        self.layer5 = _bottleneck_stage(8 * w, stride=2)
        self.spp = DAPPM(16 * w, _CONTEXT, 4 * w)
        self.final_layer = Head(4 * w, _HEAD, classes)

    @no_type_check
    def forward(self, frames: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b k _ _"]:
        """Logits of `frames`, RGB in 0..1, at an eighth of their size."""
        shared = self.layer2(self.layer1(self.conv1(self.transform(frames))))
        coarse, fine = self.layer3(shared), self.layer3_(shared)
        merged = fine + resize(self.compression3(F.relu(coarse)), fine)
        coarse = self.layer4(coarse + self.down3(F.relu(fine)))
        fine = self.layer4_(merged)
        merged = fine + resize(self.compression4(F.relu(coarse)), fine)
        coarse = self.layer5(coarse + self.down4(F.relu(fine)))
        fine = self.layer5_(merged)
        return self.final_layer(fine + resize(self.spp(coarse), fine))


def ddrnet23_slim(
    weights: str | Path | None,
    classes: int = 19,
    backbone: bool = False,
    mean: Values | None = IMAGENET_MEAN,
    std: Values | None = IMAGENET_STD,
    channels: Channels = "rgb",
    value_range: float = 1.0,
) -> DDRNet23Slim:
    """A frozen `DDRNet23Slim`.

    Args:
        weights: safetensors, or a checkpoint of PyTorch such as the published `best_val_smaller.pth` (Cityscapes); None
            for random ones, from torch's global generator.
        classes: number of output classes.
        backbone: take from `weights` what this network has in common with them, and leave the rest random: for
            training on from the published `DDRNet23s_imagenet.pth`, or to other classes.
        mean, std, channels, value_range: what frames the weights were trained on, see `InputTransform`; those of
            ImageNet by default.

    Raises:
        NetworkError: `classes` is out of range.
        SettingsError: `backbone` without `weights`, or what is said of the frames is out of range.
        WeightsError: the weights are missing, damaged or do not fit.
    """
    if backbone and weights is None:
        raise SettingsError("backbone takes a part of the weights, and there are none. Set weights, or leave it out.")
    network = DDRNet23Slim(classes, InputTransform(mean, std, channels, value_range, persistent=False))
    if weights is not None:
        load_weights(network, weights, ignored=_TRAINING_ONLY, partial=backbone)
    load_network(network)
    return network
