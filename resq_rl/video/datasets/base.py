"""What the readers of datasets share: naming videos, choosing those of a split, and decoding labelled frames."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np

from resq_rl.errors import VideoError
from resq_rl.video.assembly import ClipFrames, Decoded, check_clip_frames, clip_length, cut_clips
from resq_rl.video.clip import Clip, Split, check_split
from resq_rl.video.datasets.tracking import follow
from resq_rl.video.datasets.tree import below, require
from resq_rl.video.framing import Framing
from resq_rl.video.images import Box, check_count, read_frame
from resq_rl.video.parts import Part, check_disjoint, listed, split_parts

__all__ = ["LabelledVideo", "Recording", "held_out"]


@dataclass(frozen=True)
class Recording:
    """Consecutive frames of one video, with their labels, before they are decoded and framed.

    Attributes:
        part: the part of the video that was asked for, under the name that its clips get.
        first: number of the first frame within the video.
        frames: files of the frames.
        labels: a label map or points of each frame, in pixels of the source; read one by one.
        fps: frames per second.
        boxes: extent of what a window follows in each frame, None where it is not seen; needed for `Framing.crop`.
        origin: where the frames come from; the first of them by default.
    """

    part: Part
    first: int
    frames: Sequence[Path]
    labels: Iterable[np.ndarray]
    fps: float
    boxes: Sequence[Box | None] = ()
    origin: Path | None = None

    def clips(self, framing: Framing, clip_frames: int | None = None) -> list[Clip]:
        """Decode and frame the recording, as clips of `clip_frames` frames or as one.

        Raises:
            VideoError: a frame is missing, damaged or of another size than its labels or the frames before; or a window
                is wanted and what it should follow is in no frame.
        """
        framed = list(self._framed(framing))
        decoded = Decoded(
            frames=[frame for frame, _ in framed],
            labels=[label for _, label in framed],
            part=self.part,
            first=self.first,
            stride=1,
            fps=self.fps,
            origin=str(self.origin or self.frames[0]),
        )
        return cut_clips(decoded, clip_frames)

    def _framed(self, framing: Framing) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Each frame and its labels, framed."""
        extent: tuple[int, int] | None = None
        for path, label, window in zip(self.frames, self.labels, self._windows(framing), strict=True):
            image = read_frame(path)
            extent = extent or image.size
            if image.size != extent:
                raise VideoError(
                    f"Frame {path} must be of the size of the ones before, {extent[0]}x{extent[1]}, got "
                    f"{image.width}x{image.height}. Copy it again."
                )
            if label.dtype == np.float32:
                yield framing.frame(image, window), framing.points(label, extent, window)
                continue
            if label.shape != (image.height, image.width):
                raise VideoError(
                    f"The label of frame {path} must be of the size of its frame, {image.width}x{image.height}, got "
                    f"{label.shape[1]}x{label.shape[0]}. Use frames and labels of one resolution."
                )
            yield framing.frame(image, window), framing.labels(label, window)

    def _windows(self, framing: Framing) -> Sequence[Box | None]:
        if framing.crop is None or framing.size is None:
            return [None] * len(self.frames)
        if not any(self.boxes):
            raise VideoError(
                f"No labelled object to crop around in {self.origin or self.frames[0]} ({self.part}): all "
                f"{len(self.frames)} labels are empty. Leave the video out, or set crop to None."
            )
        return follow(list(self.boxes), framing.crop, framing.size[0] / framing.size[1])


@dataclass(frozen=True)
class LabelledVideo(ABC):
    """A dataset on disk, whose videos are chosen for the splits by their names.

    A subclass says which videos there are and how one is read. Names are "GROUP/VIDEO" where the dataset has groups
    of videos, and a group alone stands for all of its videos.

    Attributes:
        root: folder of the dataset.
        splits: for each split the names of its videos, or "NAME[start:stop]" for some frames; None for the published
            splits.
        size: height and width in pixels that frames and labels are brought to; None for the size of the source.
    """

    root: str | Path
    splits: Mapping[Split, Sequence[str | Part]] | None = None
    size: tuple[int, int] | None = None

    dataset: ClassVar[str]  # its name, and how its entries are spelled, for messages
    spelling: ClassVar[str]
    counts: ClassVar[tuple[str, ...]] = ()  # settings that are numbers of 1 or more

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", self.framing.size)
        check_clip_frames(self._clip_frames, self._reader)
        for name in self.counts:
            check_count(getattr(self, name), name, self._reader)
        check_disjoint(self._parts(), self._reader)

    @property
    @abstractmethod
    def classes(self) -> tuple[str, ...]:
        """Names of the classes or points in the order of the labels."""

    @property
    def framing(self) -> Framing:
        """How frames and labels are brought to the clips: whole, and stretched to `size`."""
        return Framing(self.size, label_size=getattr(self, "label_size", None), reader=self._reader)

    def clips(self, split: Split) -> list[Clip]:
        """Decode the clips of a split.

        Raises:
            VideoError: the split is unknown or empty; a frame or label is missing, damaged or of another size; or a
                label holds values that the dataset does not have.
        """
        parts = self._parts()
        if not parts.get(check_split(split)):
            raise VideoError(
                f"{self._reader} has no split {split} in {self._root}: found {listed(s for s in parts if parts[s])}. "
                f"Add it to splits, with entries such as {self.spelling}."
            )
        length = clip_length(self._clip_frames, split)
        return [clip for one in self._recordings(parts[split]) for clip in one.clips(self.framing, length)]

    @abstractmethod
    def _published(self) -> dict[Split, list[Part]]:
        """The videos of each split where `splits` is None."""

    @abstractmethod
    def _videos(self, group: str) -> list[str]:
        """Names of the videos of a group, in order; refuses a group that is not there."""

    @abstractmethod
    def _recordings(self, parts: Sequence[Part]) -> Iterable[Recording]:
        """The recordings of these videos, one after another."""

    @property
    def _reader(self) -> str:
        return type(self).__name__

    @property
    def _clip_frames(self) -> ClipFrames:
        return getattr(self, "clip_frames", None)

    @property
    def _root(self) -> Path:
        return Path(self.root).expanduser()

    def _below(self, name: str) -> Path:
        return below(self._root, name, self.dataset)

    def _require(self, names: Iterable[str], mend: str) -> None:
        require(self._root, self.dataset, names, mend)

    def _parts(self) -> dict[Split, list[Part]]:
        """The videos of each split."""
        if self.splits is None:
            return self._published()
        given = split_parts(self.splits, self._reader)
        return {split: [one for part in entries for one in self._spelled(part)] for split, entries in given.items()}

    def _spelled(self, part: Part) -> list[Part]:
        """An entry of `splits` as single videos."""
        group, _, video = part.name.partition("/")
        there = self._videos(group)
        chosen = [name for name in there if video in ("", name)]
        if not chosen or (len(chosen) > 1 and part != Part(part.name)):
            self._below(part.name)
            raise VideoError(
                f"No single video {part} of {self._reader} in {self._root}: found {listed(there)}. Write "
                f"{self.spelling}."
            )
        return [replace(part, name=f"{group}/{name}") for name in chosen]


def held_out(learn: Sequence[Part], report: Sequence[Part]) -> dict[Split, list[Part]]:
    """Splits from two published lists: every fifth video for training is held out for validation."""
    return {
        "train": [part for number, part in enumerate(learn) if number % 5 != 4],
        "validation": list(learn[4::5]),
        "test": list(report),
    }
