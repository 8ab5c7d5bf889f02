"""Inputs of a network for one frame of every clip: the frame alone, or the frame and further tensors."""

from collections.abc import Iterator

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

__all__ = ["Inputs", "as_tuple", "float_frames", "to_float"]

Inputs = Tensor | tuple[Tensor, ...]
"""A frame of every clip, or a tuple of the frame and the network's further inputs by position, such as the previous
mask. The first dimension is the clip; in a clip of video it is the frame."""


def to_float(frames: UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Frames of 0..255 as float in 0..1."""
    return frames.to(torch.float32, copy=True).div_(255.0)


def as_tuple(inputs: Inputs) -> tuple[Tensor, ...]:
    """The inputs as a tuple, the frame first."""
    return (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)


def float_frames(clip: Inputs, most: int, device: torch.device) -> Iterator[tuple[Tensor, ...]]:
    """The inputs of the first `most` frames of a clip of bytes, converted to 0..1, each as a batch of one."""
    parts = as_tuple(clip)
    for t in range(min(most, len(parts[0]))):
        yield tuple(to_float(part[t : t + 1].to(device)) for part in parts)
