"""Cutting decoded frames into clips."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, UInt8

from resq_rl.video.clip import Clip, Split, check_split
from resq_rl.video.images import check_count
from resq_rl.video.parts import Part

__all__ = ["ClipFrames", "Decoded", "check_clip_frames", "clip_length", "cut_clips"]

ClipFrames = int | Mapping[Split, int] | None
"""Frames of the clips that videos are cut into: of all splits, or of those named; None leaves videos whole."""


def check_clip_frames(clip_frames: ClipFrames, reader: str) -> None:
    """Check the lengths of clips.

    Raises:
        VideoError: a key is not a split. SettingsError: a length is below 1.
    """
    lengths = clip_frames if isinstance(clip_frames, Mapping) else {"": clip_frames}
    for split, length in lengths.items():
        check_count(length, f"clip_frames.{check_split(split)}" if split else "clip_frames", reader)


def clip_length(clip_frames: ClipFrames, split: Split) -> int | None:
    """Frames of the clips of a split; None where its videos stay whole."""
    return clip_frames.get(split) if isinstance(clip_frames, Mapping) else clip_frames


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
