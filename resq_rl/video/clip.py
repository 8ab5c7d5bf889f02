"""Clips of video with their labels, and the protocol of the datasets that they come from."""

import math
from dataclasses import dataclass
from typing import Final, Literal, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from resq_rl.errors import VideoError

__all__ = ["IGNORE", "SPLITS", "Clip", "Split", "VideoDataset", "as_bytes", "check_split"]

IGNORE: Final = 255
"""The label of a pixel that no metric counts."""

Split = Literal["train", "validation", "test"]
"""The three uses of clips: calibration and training, tuning, and the final measurement."""

SPLITS: Final[tuple[Split, ...]] = get_args(Split)


@dataclass(frozen=True, eq=False)
class Clip:
    """Consecutive frames of one video, with labels where there are any.

    Attributes:
        frames: RGB values 0..255, (t, 3, h, w).
        labels: the truth that predictions are compared with, or None for video without labels. Either the class or
            object of each pixel, uint8 of (t, rows, columns), of the frames' size or another, `IGNORE` (255) where a
            pixel is unlabelled; or points, float32 of (t, k, 3): x and y in pixels from the centre of the upper left
            one, and 1 where a point counts or else 0.
        fps: frames per second.
        name: short name that is unique within its dataset, such as "davis2016/kite-surf".
        origin: where the clip comes from: a path, or the settings of a generator.

    Raises:
        VideoError: there are no frames, frames or labels have another shape or type, or the frame rate is not
            positive.
    """

    frames: UInt8[Tensor, "t 3 h w"]
    labels: UInt8[Tensor, "t rows columns"] | Float32[Tensor, "t k 3"] | None
    fps: float
    name: str
    origin: str

    def __post_init__(self) -> None:
        shape, where = tuple(self.frames.shape), f"clip {self.name!r} ({self.origin})"
        if len(shape) != 4 or shape[1] != 3 or self.frames.dtype != torch.uint8:
            raise VideoError(
                f"Frames of {where} must be uint8 of shape (t, 3, h, w), got {self.frames.dtype} of shape "
                f"{shape}. Convert them to RGB bytes with the channels second."
            )
        if 0 in shape:
            raise VideoError(
                f"Frames of {where} must hold at least one frame of one pixel, got shape {shape}. "
                "Check that the source is not empty and that start, stride and size leave something."
            )
        if not (math.isfinite(self.fps) and self.fps > 0):
            raise VideoError(
                f"Frame rate of {where} must be a positive number of frames per second, got {self.fps}. "
                "Give the rate yourself where the source does not tell it."
            )
        if self.labels is None:
            return
        found = tuple(self.labels.shape)
        if self.labels.dtype == torch.float32:
            fits = len(found) == 3 and (found[0], found[2]) == (shape[0], 3)
        else:
            fits = self.labels.dtype == torch.uint8 and len(found) == 3 and found[0] == shape[0] and 0 not in found
        if not fits:
            raise VideoError(
                f"Labels of {where} must be uint8 of shape ({shape[0]}, h, w), a label map for each frame, got "
                f"{self.labels.dtype} of shape {found}. Give one label map per frame, or points as float32 of shape "
                f"({shape[0]}, k, 3)."
            )

    def __len__(self) -> int:
        """The number of frames."""
        return int(self.frames.shape[0])

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return int(self.frames.shape[2]), int(self.frames.shape[3])


@runtime_checkable
class VideoDataset(Protocol):
    """A source of clips in three disjoint splits."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the label values; empty for video without labels."""
        ...

    def clips(self, split: Split) -> list[Clip]:
        """All clips of a split.

        Raises:
            VideoError: the split is unknown or its source cannot be read.
        """
        ...


def check_split(split: str) -> Split:
    """Return `split` if it names one of the three splits.

    Raises:
        VideoError: `split` is none of them.
    """
    for known in SPLITS:
        if split == known:
            return known
    raise VideoError(f"Unknown split {split!r}: use one of {', '.join(SPLITS)}.")


def as_bytes(values: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """The nearest bytes."""
    return values.round().clamp(0, 255).byte()
