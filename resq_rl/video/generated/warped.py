"""Clips made from single labelled frames, by moving a camera through each of them."""

from dataclasses import dataclass, replace
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from resq_rl.errors import SettingsError, VideoError
from resq_rl.video.clip import IGNORE, SPLITS, Clip, Split, VideoDataset, as_bytes, check_split
from resq_rl.video.framing import Framing, framing_of
from resq_rl.video.images import check_count, check_size

__all__ = ["WarpedVideo"]

_WALLS: Final = 0.7  # nearness at the sides of a frame, and at its top: streets are wide and open
_CEILING: Final = 0.3
_SMOOTHNESS: Final = 6  # frames over which turns build up and fade


@dataclass(frozen=True)
class Drive:
    """How a camera moves through one frame; lengths are shares of half the frame, 1 from its middle to its edge.

    Attributes:
        horizon: the point that the camera drives towards, below (above 0) or above the middle.
        distance: way from the frame to each of the clip's, in distances from the camera to the frame's lower edge.
        turn: how far the camera has turned, downwards and to the right.
    """

    horizon: float
    distance: Float[Tensor, " t"]
    turn: Float[Tensor, "t 2"]

    def grid(self, size: tuple[int, int]) -> Float[Tensor, "t h w 2"]:
        """Where in the frame each pixel of a clip of `size` is seen: x and y from -1 to 1, as `grid_sample` wants.

        The scene is a corridor along the way: ground, walls and ceiling. What is seen at p, from the point driven
        towards, is at p / (1 + distance * nearness(p)) in the frame; nearness is the inverse of the distance from the
        camera along the way, so it grows linearly from that point outwards, to 1 at the lower edge.
        """
        rows, columns = ((torch.arange(length) + 0.5) * 2 / length - 1 for length in size)
        y = (rows[None] + self.turn[:, :1] - self.horizon)[:, :, None]
        x = (columns[None] + self.turn[:, 1:])[:, None, :]
        nearness = torch.maximum(torch.maximum(y / (1 - self.horizon), -_CEILING * y), _WALLS * x.abs())
        scale = 1 / (1 + self.distance[:, None, None] * nearness).clamp(min=0.2)
        return torch.stack([x * scale, y * scale + self.horizon], -1)


@dataclass(frozen=True)
class WarpedVideo:
    """Clips of a camera driving through the single frames of a labelled dataset; labels move along.

    For datasets whose training frames lie too far apart to be video, such as CamVid's. Each frame of the source's
    training and validation split makes one clip: the camera drives through it at a steady speed, as if the scene were a
    corridor (so that what is near moves faster), turns, shakes, and has sensor noise. What the frame does not show
    repeats its edge and is unlabelled; nothing moves by itself. Test clips are those of the source, brought to `size`.

    A clip depends only on the settings, its split and the place of its frame in the split.

    Attributes:
        source: dataset of the frames; the larger its frames, the sharper the clips.
        size: height and width that clips are brought to, in pixels; None for the source's.
        frames: frames of each clip.
        train: most clips of the training split, from frames spread evenly over it; None for all.
        validation: most clips of the validation split, likewise.
        speed: greatest speed, in distances from the camera to the lower edge per frame; that of each clip is drawn
            evenly between 0 and this.
        turn: standard deviation of the camera's turning from frame to frame, in shares of half the frame.
        shake: standard deviation of its shaking, likewise.
        noise: standard deviation of the sensor noise, of a range of 1.
        seed: another seed gives other motion.
        fps: frames per second that the clips declare.

    Raises:
        SettingsError: a setting out of its range.
    """

    source: VideoDataset
    size: tuple[int, int] | None = None
    frames: int = 24
    train: int | None = None
    validation: int | None = None
    speed: float = 0.06
    turn: float = 0.003
    shake: float = 0.002
    noise: float = 0.01
    seed: int = 0
    fps: float = 15.0

    def __post_init__(self) -> None:
        reader = "WarpedVideo"
        object.__setattr__(self, "size", check_size(self.size, reader))
        for name in ("frames", "train", "validation"):
            check_count(getattr(self, name), name, reader)
        for name in ("speed", "turn", "shake", "noise", "seed"):
            if not getattr(self, name) >= 0:
                raise SettingsError(f"Setting {name} of {reader} must be 0 or more, got {getattr(self, name)}.")

    @property
    def classes(self) -> tuple[str, ...]:
        """The source's class names."""
        return self.source.classes

    @property
    def framing(self) -> Framing:
        """The source's, to this size; pixels differ by rounding where the source's size is another."""
        framing = framing_of(self.source)
        return framing if self.size is None else replace(framing, size=self.size)

    def clips(self, split: Split) -> list[Clip]:
        """Make the clips of a split.

        Raises:
            VideoError: the source cannot give the split, or a clip of it has no labels.
        """
        found = self.source.clips(check_split(split))
        if split == "test":
            return [self._resized(clip) for clip in found]
        places = [(clip, time) for clip in found for time in range(len(clip))]
        most = getattr(self, split) or len(places)
        count = min(most, len(places))
        chosen = [places[number * len(places) // count] for number in range(count)]
        return [self._drive(clip, time, split, number) for number, (clip, time) in enumerate(chosen)]

    def _drive(self, clip: Clip, time: int, split: Split, number: int) -> Clip:
        """The clip of one frame."""
        if clip.labels is None:
            raise VideoError(f"Clip {clip.name!r} ({clip.origin}) has no labels to move along. Use a labelled source.")
        if clip.labels.shape[1:] != clip.frames.shape[2:]:
            raise VideoError(
                f"Labels of clip {clip.name!r} must be of the size of its frames to move along: set label_size of the "
                "source to None."
            )
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number * len(SPLITS) + SPLITS.index(split))
        grid = self._draw(generator).grid(clip.size)
        frame = clip.frames[time].float().expand(self.frames, -1, -1, -1)
        known = (clip.labels[time].float() - IGNORE).expand(self.frames, 1, -1, -1)  # zeros outside mean unlabelled
        seen = F.grid_sample(frame, grid, padding_mode="border", align_corners=False)
        labels = F.grid_sample(known, grid, mode="nearest", padding_mode="zeros", align_corners=False)[:, 0] + IGNORE
        moved = Clip(as_bytes(seen), as_bytes(labels), self.fps, f"warped/{clip.name}#{time}", clip.origin)
        return self._resized(moved, generator)

    def _draw(self, generator: torch.Generator) -> Drive:
        """Motion of a clip, whose first view is the frame as it is, but for shaking."""
        speed, horizon = torch.rand(2, generator=generator).tolist()
        walk = torch.randn(self.frames + _SMOOTHNESS - 1, 2, generator=generator) * self.turn
        steady = walk.unfold(0, _SMOOTHNESS, 1).sum(-1) / _SMOOTHNESS**0.5
        turned = steady.cumsum(0) - steady[0]
        shaken = torch.randn(self.frames, 2, generator=generator) * self.shake
        return Drive(0.2 * horizon - 0.1, self.speed * speed * torch.arange(self.frames), turned + shaken)

    def _resized(self, clip: Clip, generator: torch.Generator | None = None) -> Clip:
        """A clip at the size wanted, with the noise of a sensor where a generator draws it."""
        frames, labels = clip.frames.float(), clip.labels
        if self.size is not None and self.size != clip.size:
            frames = F.interpolate(frames, self.size, mode="bilinear", antialias=True)
            labels = None if labels is None else F.interpolate(labels[:, None], self.size, mode="nearest-exact")[:, 0]
        if generator is not None and self.noise:
            frames = frames + torch.randn(frames.shape, generator=generator) * (255 * self.noise)
        return Clip(as_bytes(frames), labels, clip.fps, clip.name, clip.origin)
