"""Clips in which an object, cut out of labelled video, moves over other video: for learning to follow objects."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from resq_rl.errors import SettingsError, VideoError
from resq_rl.video.clip import Clip, Split, VideoDataset, as_bytes, check_split
from resq_rl.video.framing import Framing, framing_of
from resq_rl.video.images import check_count

__all__ = ["CompositedVideo"]

SMALLEST: Final = 0.002  # share of the frame that an object covers at least where it is cut out
HEIGHTS: Final = (0.15, 0.7)  # least and greatest height of a pasted object, of the frame's
BEHIND, BEFORE = 0.5, 0.35  # how often another object passes behind the one to follow, and before it
STILL: Final = 0.3  # how often the camera does not pan
LIGHT: Final = 0.15  # greatest change of brightness
# Standard deviations of speeds per frame: of objects in heights of the frame, of turns in radians, of the logarithm of
# sizes. A camera is slower. Bends are in heights of the object.
PACE, TURN, GROWTH, BEND = 0.03, 0.02, 0.02, 0.05


class _Cutout(NamedTuple):
    """Consecutive frames with the outlines of an object, its centre (y, x) in each, and its height in the first."""

    frames: Float[Tensor, "t 3 h w"]
    outlines: Float[Tensor, "t 1 h w"]
    centres: Float[Tensor, "t 2"]
    height: float


@dataclass(frozen=True)
class CompositedVideo:
    """Training clips in which an object is followed over a ground, both taken from other video.

    The object is cut out of consecutive frames of a labelled training clip by its mask (label 1), so that it deforms as
    it does there, and takes a way of its own: it moves, turns, grows and bends. The ground is another clip, which a
    camera pans and zooms through. Other objects pass behind and before it, and the light changes. Some clips are
    labelled frames as they are. Validation and test clips are those of the source.

    A clip depends only on the settings and its number.

    Attributes:
        source: labelled dataset of the classes 0 and 1, of one frame size.
        objects: more of them, whose validation and test clips are not used.
        grounds: a dataset whose training clips are the grounds of half of the clips, and whose labels do not matter;
            None for those of the labelled ones alone.
        frames: frames of each clip.
        train: clips in the training split.
        real: share of them that are labelled frames as they are, from one on that shows an object.
        noise: standard deviation of the sensor noise of the others, of a range of 1.
        seed: another seed gives other clips.
        fps: frames per second that the clips declare.

    Raises:
        SettingsError: a setting out of its range, or a labelled dataset with other than two classes.
    """

    source: VideoDataset
    objects: Mapping[str, VideoDataset] = field(default_factory=dict)
    grounds: VideoDataset | None = None
    frames: int = 16
    train: int = 600
    real: float = 0.4
    noise: float = 0.01
    seed: int = 0
    fps: float = 24.0
    _made: dict[int, Clip] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("frames", "train"):
            check_count(getattr(self, name), name, "CompositedVideo")
        for name, most in (("real", 1.0), ("noise", 1.0), ("seed", math.inf)):
            if not 0 <= getattr(self, name) <= most:
                raise SettingsError(
                    f"Setting {name} of CompositedVideo must be from 0 to {most:g}, got {getattr(self, name)}."
                )
        for dataset in self._labelled:
            if len(dataset.classes) != 2:
                raise SettingsError(
                    f"CompositedVideo cuts out objects of label 1, but a dataset has the classes {dataset.classes}. "
                    "Use datasets of background and object."
                )

    @property
    def classes(self) -> tuple[str, ...]:
        """Those of the source."""
        return self.source.classes

    @property
    def framing(self) -> Framing:
        """That of the source."""
        return framing_of(self.source)

    @property
    def _labelled(self) -> list[VideoDataset]:
        return [self.source, *self.objects.values()]

    def clips(self, split: Split) -> list[Clip]:
        """The clips of a split; those for training are made once per instance and then kept.

        Raises:
            VideoError: a dataset cannot give the split; labelled clips have no masks of the size of their frames, or
                several sizes; or none shows an object of at least 0.2% of the frame.
        """
        if check_split(split) != "train":
            return self.source.clips(split)
        for number in range(self.train):
            if number not in self._made:
                self._made[number] = self._clip(number)
        return [self._made[number] for number in range(self.train)]

    @cached_property
    def _seen(self) -> list[tuple[Clip, Tensor]]:
        """Clips that show an object, and the numbers of the frames that do."""
        found = []
        clips = [clip for dataset in self._labelled for clip in dataset.clips("train")]
        for clip in clips:
            if clip.labels is None or clip.labels.shape[1:] != clip.size or clip.size != clips[0].size:
                raise VideoError(
                    f"Clip {clip.name!r} ({clip.origin}) needs masks of the size of its frames, {clip.size}, and that "
                    f"of the first clip, {clips[0].size}, to cut objects out. Use labelled video of one size, with "
                    "label_size null."
                )
            shown = torch.nonzero((clip.labels == 1).sum((1, 2)) >= SMALLEST * math.prod(clip.size))[:, 0]
            found += [(clip, shown)] if len(shown) else []
        if not found:
            raise VideoError(
                f"None of {len(clips)} training clips shows an object of {SMALLEST:.1%} of the frame to cut out. Use "
                "labelled video of larger objects."
            )
        return found

    @cached_property
    def _grounds(self) -> list[Clip]:
        return [] if self.grounds is None else self.grounds.clips("train")

    def _clip(self, number: int) -> Clip:
        """The clip of this number."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        clip, times = self._object(generator)
        name = f"composited{f'-{self.seed}' if self.seed else ''}/train-{number}"
        if _uniform(generator) < self.real:
            assert clip.labels is not None  # as of all labelled clips
            return Clip(clip.frames[times], clip.labels[times], self.fps, name, clip.origin)
        ground, ground_times = self._ground(generator)
        frames = _panned(ground.frames[ground_times].float(), clip.size, generator)
        labels = torch.zeros(self.frames, *clip.size, dtype=torch.uint8)
        behind, before = _uniform(generator) < BEHIND, _uniform(generator) < BEFORE
        others = [self._object(generator) for _ in range(behind + before)]
        for own, times_of in [*others[:behind], (clip, times), *others[behind:]]:
            colours, outlines = _placed(_cut(own, times_of), generator)
            frames = torch.lerp(frames, colours, outlines)
            labels[outlines[:, 0] > 0.5] = int(own is clip and times_of is times)
        first, last = (1 + LIGHT * (2 * _uniform(generator) - 1) for _ in range(2))
        frames = frames * torch.linspace(first, last, self.frames)[:, None, None, None]
        frames = frames + torch.randn(frames.shape, generator=generator) * (255 * self.noise)
        return Clip(as_bytes(frames), labels, self.fps, name, f"{clip.origin} over {ground.origin}")

    def _object(self, generator: torch.Generator) -> tuple[Clip, Int64[Tensor, " t"]]:
        """A clip and consecutive frames of it, of which the first shows an object."""
        clip, shown = self._seen[_index(generator, len(self._seen))]
        return clip, self._from(clip, int(shown[_index(generator, len(shown))]))

    def _ground(self, generator: torch.Generator) -> tuple[Clip, Int64[Tensor, " t"]]:
        """A clip and consecutive frames of it."""
        others = self._grounds if _uniform(generator) < 0.5 else []
        clips = others or [clip for clip, _ in self._seen]
        clip = clips[_index(generator, len(clips))]
        return clip, self._from(clip, _index(generator, len(clip)))

    def _from(self, clip: Clip, first: int) -> Int64[Tensor, " t"]:
        """Numbers of consecutive frames of a clip from one on, which turns around at the ends."""
        period = max(1, 2 * (len(clip) - 1))
        times = (first + torch.arange(self.frames)) % period
        return torch.minimum(times, (period - times) % period)


def _cut(clip: Clip, times: Int64[Tensor, " t"]) -> _Cutout:
    """The object in some frames of a clip, of which the first shows it; unseen, it is where it was last."""
    assert clip.labels is not None  # as of all labelled clips
    outlines, centres, heights = clip.labels[times] == 1, [], []
    for outline in outlines:
        sides = [torch.nonzero(outline.any(axis))[:, 0] for axis in (1, 0)]
        if len(sides[0]):
            last = [float(side[0] + side[-1] + 1) / 2 for side in sides]
            heights.append(float(sides[0][-1] - sides[0][0] + 1))
        centres.append(last)
    return _Cutout(clip.frames[times].float(), outlines[:, None].float(), torch.tensor(centres), heights[0])


def _placed(cutout: _Cutout, generator: torch.Generator) -> tuple[Float[Tensor, "t 3 h w"], Float[Tensor, "t 1 h w"]]:
    """Colours and outlines of a cut-out object on its way through the frame."""
    count, _, height, width = cutout.frames.shape
    low, high = (math.log(share * height / cutout.height) for share in HEIGHTS)
    scale = torch.exp(low + (high - low) * _uniform(generator) + _way(count, GROWTH, generator))
    limits = torch.tensor([float(height), float(width)])
    begin = (0.15 + 0.7 * torch.rand(2, generator=generator)) * limits
    centre = (begin + height * _way(count, PACE, generator, 2)).remainder(2 * limits)
    centre = torch.minimum(centre, 2 * limits - centre)  # it turns around at the edges
    bends = torch.randn(2, 2, 3, 4, generator=generator) * (BEND * cutout.height)
    bends = F.interpolate(bends, size=(height, width), mode="bicubic", align_corners=True)
    bend = bends[:1] + torch.linspace(0, 1, count)[:, None, None, None] * (bends[1:] - bends[:1])
    mirror = 1.0 if _uniform(generator) < 0.5 else -1.0
    place = torch.stack(torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij"))
    place = place - centre[:, :, None, None]
    y, x = _turned(place, _way(count, TURN, generator), 1 / scale)
    seen = torch.stack([y, mirror * x], 1) + bend + cutout.centres[:, :, None, None]
    grid = torch.stack([2 * seen[:, 1] / width - 1, 2 * seen[:, 0] / height - 1], -1)
    sampled = F.grid_sample(torch.cat([cutout.frames, cutout.outlines], 1), grid, align_corners=False)
    return sampled[:, :3], sampled[:, 3:]


def _panned(
    frames: Float[Tensor, "t 3 _ _"], size: tuple[int, int], generator: torch.Generator
) -> Float[Tensor, "t 3 h w"]:
    """A ground as a camera pans and zooms through it."""
    count = len(frames)
    scale = torch.exp(-0.5 * _uniform(generator) + _way(count, GROWTH / 4, generator))
    shift = _way(count, 0.0 if _uniform(generator) < STILL else PACE / 2, generator, 2)
    rows, columns = (2 * (torch.arange(length) + 0.5) / length - 1 for length in size)
    place = torch.stack(torch.meshgrid(rows, columns, indexing="ij")).expand(count, -1, -1, -1)
    y, x = _turned(place, _way(count, TURN / 4, generator), scale)
    grid = torch.stack([x + shift[:, 1, None, None], y + shift[:, 0, None, None]], -1)
    return F.grid_sample(frames, grid, padding_mode="reflection", align_corners=False)


def _turned(
    place: Float[Tensor, "t 2 h w"], turn: Float[Tensor, " t"], scale: Float[Tensor, " t"]
) -> tuple[Float[Tensor, "t h w"], Float[Tensor, "t h w"]]:
    """Places (y, x), turned and scaled."""
    cosine, sine = (f(turn)[:, None, None] * scale[:, None, None] for f in (torch.cos, torch.sin))
    y, x = place.unbind(1)
    return cosine * y - sine * x, sine * y + cosine * x


def _way(frames: int, pace: float, generator: torch.Generator, *shape: int) -> Float[Tensor, "t *shape"]:
    """A way that begins at 0, at a speed of standard deviation `pace`, of which a part changes slowly."""
    steady = torch.randn(1, *shape, generator=generator)
    changing = torch.randn(frames, *shape, generator=generator).cumsum(0) / 6
    way = ((steady + changing) * pace).cumsum(0)
    return way - way[:1]


def _uniform(generator: torch.Generator) -> float:
    return float(torch.rand(1, generator=generator))


def _index(generator: torch.Generator, count: int) -> int:
    return int(torch.randint(count, (1,), generator=generator))
