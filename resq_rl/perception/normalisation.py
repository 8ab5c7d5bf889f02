"""What frames a network expects, where it is not RGB in 0..1: a mean and deviation, BGR, or values up to 255."""

import math
from collections.abc import Sequence
from typing import Literal, get_args, no_type_check

import torch
from jaxtyping import Float
from torch import Tensor, nn

from resq_rl.errors import NetworkError, SettingsError

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "Channels", "InputTransform", "Normalised", "Values", "normalised"]

Channels = Literal["rgb", "bgr"]
Values = float | tuple[float, ...]
"""One number for all channels, or one for each."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class InputTransform(nn.Module):
    """From RGB frames in 0..1 to what a network expects.

        x = value_range * frames, with the channels in the network's order
        output = (x - mean) / std

    Args:
        mean, std: what is subtracted and divided by, one number or one for each channel, in the network's own order of
            channels and range of values. None for 0 and 1.
        channels: order of the channels that the network expects: "rgb", or "bgr" as in OpenCV and Caffe.
        value_range: the value of white: 1 for frames in 0..1, 255 for frames in 0..255.
        persistent: list `mean` and `std` in the state dictionary.

    Raises:
        SettingsError: a value is out of range.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        mean: Values | None = None,
        std: Values | None = None,
        channels: Channels = "rgb",
        value_range: float = 1.0,
        *,
        persistent: bool = True,
    ) -> None:
        super().__init__()
        if channels not in get_args(Channels):
            raise SettingsError(f"Input frames: channels must be rgb or bgr, got {channels!r}.")
        if not (math.isfinite(value_range) and value_range > 0):
            raise SettingsError(f"Input frames: value_range must be a positive number, got {value_range!r}.")
        self.channels, self.value_range = channels, float(value_range)
        self.register_buffer("mean", _per_channel("mean", 0.0 if mean is None else mean), persistent)
        self.register_buffer("std", _per_channel("std", 1.0 if std is None else std, positive=True), persistent)

    @no_type_check
    def forward(self, frames: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """The transformed frames."""
        if self.channels == "bgr":
            frames = frames.flip(1)
        if self.value_range != 1.0:
            frames = frames * self.value_range
        return (frames - self.mean) / self.std


class Normalised(nn.Module):
    """A network that is given RGB frames in 0..1 and passes them on through an `InputTransform`.

    The transform is part of the float network, so calibration, steps, export and deployment all include it. It is
    elementwise and stands before the first layer, whose ranges are calibrated on transformed frames; it costs no
    multiply-accumulates. The network keeps its layer groups, and the names of its layers get the prefix `network.`.

    Most networks of torchvision and timm take RGB in 0..1 with mean (0.485, 0.456, 0.406) and std (0.229, 0.224,
    0.225); those of OpenMMLab take the same as mean (123.675, 116.28, 103.53), std (58.395, 57.12, 57.375) and
    value_range 255; Caffe's take BGR with mean (103.939, 116.779, 123.68) and value_range 255.

    Args:
        network: takes frames first; whatever else it takes is passed on unchanged.
        mean, std, channels, value_range: see `InputTransform`.

    Raises:
        NetworkError: `network` is no module.
        SettingsError: a value is out of range.
    """

    def __init__(
        self,
        network: nn.Module,
        mean: Values | None = None,
        std: Values | None = None,
        channels: Channels = "rgb",
        value_range: float = 1.0,
    ) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise NetworkError(f"Normalised: network must be an nn.Module, got {type(network).__name__}.")
        self.transform = InputTransform(mean, std, channels, value_range)
        self.network = network
        self.training = network.training

    @no_type_check
    def forward(self, frames: Float[Tensor, "b 3 h w"], *others: Tensor):
        """What the network returns for frames in RGB, 0..1."""
        return self.network(self.transform(frames), *others)


def normalised(
    network: nn.Module, mean: Values | None, std: Values | None, channels: Channels, value_range: float
) -> nn.Module:
    """The network, within `Normalised` where it expects other frames than RGB in 0..1."""
    if (mean, std, channels, value_range) == (None, None, "rgb", 1.0):
        return network
    return Normalised(network, mean, std, channels, value_range)


def _per_channel(name: str, values: Values | Sequence[float], positive: bool = False) -> Float[Tensor, "c 1 1"]:
    numbers = [values] if isinstance(values, int | float) else list(values)
    if len(numbers) not in (1, 3) or not all(isinstance(v, int | float) and math.isfinite(v) for v in numbers):
        raise SettingsError(f"Input frames: {name} must be one number or three, got {values!r}.")
    if positive and not min(numbers) > 0:
        raise SettingsError(f"Input frames: {name} must be above 0, got {values!r}.")
    return torch.tensor([float(v) for v in numbers])[:, None, None]
