"""Cutting decoded frames into clips."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, UInt8

from resq_rl.video.clip import Clip
from resq_rl.video.parts import Part

__all__ = ["Decoded", "cut_clips"]


@dataclass(frozen=True)
class Decoded:
    """Consecutive decoded frames of one source.

    Attributes:
        frames: RGB frames of one size.
        labels: class indices or points of each frame, or None.
        part: the part of the source that was asked for, under the name that its clips get.
        first: number of the first frame within the source.
        stride: frames of the source from one frame to the next.
        fps: frames per second, the stride taken into account.
        origin: path of the source.
    """

    frames: Sequence[UInt8[np.ndarray, "h w 3"]]
    labels: Sequence[UInt8[np.ndarray, "label_h label_w"]] | Sequence[Float32[np.ndarray, "k 3"]] | None
    part: Part
    first: int
    stride: int
    fps: float
    origin: str


def cut_clips(decoded: Decoded, clip_frames: int | None) -> list[Clip]:
    """Cut decoded frames into clips of `clip_frames` frames, or into one.

    Frames left over at the end are dropped, unless there are fewer than `clip_frames` in all. Clips of a source that
    was cut are named after their frames within it, as NAME[start:stop].
    """
    count = len(decoded.frames)
    length = min(clip_frames or count, count)
    clips = []
    for start in range(0, count - length + 1, length):
        stop = start + length
        first, last = (decoded.first + number * decoded.stride for number in (start, stop))
        clips.append(
            Clip(
                frames=torch.from_numpy(np.stack(decoded.frames[start:stop])).permute(0, 3, 1, 2).contiguous(),
                labels=None if decoded.labels is None else torch.from_numpy(np.stack(decoded.labels[start:stop])),
                fps=decoded.fps,
                name=str(decoded.part if length == count else Part(decoded.part.name, first, last)),
                origin=decoded.origin,
            )
        )
    return clips
