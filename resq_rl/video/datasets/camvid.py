"""The CamVid driving dataset in the arrangement of SegNet."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import ClassVar, Final

from resq_rl.errors import VideoError
from resq_rl.video.assembly import ClipFrames
from resq_rl.video.clip import IGNORE, Split
from resq_rl.video.datasets.base import LabelledVideo, Recording
from resq_rl.video.images import image_paths, map_labels, read_labels
from resq_rl.video.parts import Part

__all__ = ["CamVidVideo"]

_CLASSES: Final = (
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
)
_VALUES: Final = {**{index: index for index in range(len(_CLASSES))}, len(_CLASSES): IGNORE}
_FOLDERS: Final[dict[Split, str]] = {"train": "train", "validation": "val", "test": "test"}
_NUMBERED = re.compile(r"^(?P<drive>.*?)_?f?(?P<number>\d+)$")
_CAMERA_RATE: Final = 30.0


@dataclass(frozen=True)
class _Frame:
    path: Path
    drive: str
    number: int


@dataclass(frozen=True)
class CamVidVideo(LabelledVideo):
    """Clips of CamVid with eleven classes; void pixels are ignored.

    Reads images of `root`/FOLDER (png or jpg) and labels of the same names in `root`/FOLDERannot, at each call. File
    names tell the drive and the frame number ("0016E5_07959" is frame 7959 of drive 0016E5). The frames of a drive make
    one clip; where frames are missing (a gap of more than one and a half times the usual distance) another clip begins.
    The camera ran at 30 frames per second, so the frame rate of a clip is 30 over the usual distance.

    Attributes:
        root: folder that holds `train`, `trainannot` and so on.
        splits: for each split "FOLDER" for all drives of it, "FOLDER/DRIVE" for one, or "FOLDER/DRIVE[start:stop]" for
            some of its images, counted from 0 in order; None for those of train, val and test that are there.
        size: height and width in pixels that frames and labels are brought to; None for the size of the source.
        label_size: height and width in pixels of the labels where that is not the frames', to measure at it, such as
            their own; None for the frames'.
        frames: most frames taken from each drive; None for all.
        clip_frames: cuts each clip into clips of this many frames, and drops a shorter rest; None leaves them whole.
            Or lengths by split, such as {train: 48}.

    Raises:
        SettingsError: a setting out of its range.
        VideoError: a missing root, folder or drive, or splits that overlap.
    """

    label_size: tuple[int, int] | None = None
    frames: int | None = None
    clip_frames: ClipFrames = None

    dataset: ClassVar[str] = "CamVid"
    spelling: ClassVar[str] = "FOLDER (for FOLDER and FOLDERannot), FOLDER/DRIVE or FOLDER/DRIVE[start:stop]"
    counts: ClassVar[tuple[str, ...]] = ("frames",)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the label values."""
        return _CLASSES

    def _published(self) -> dict[Split, list[Part]]:
        there = {split: name for split, name in _FOLDERS.items() if (self._root / name).is_dir()}
        if not there:
            self._require(_FOLDERS.values(), "Set root to the folder that holds them, or correct splits.")
        return {split: self._spelled(Part(folder)) for split, folder in there.items()}

    def _videos(self, group: str) -> list[str]:
        self._require((group, f"{group}annot"), "Set root to the folder that holds them, or correct splits.")
        return sorted({frame.drive for frame in self._frames(group)})

    def _frames(self, folder: str) -> list[_Frame]:
        """Images of a folder, ordered by drive and number."""
        frames = []
        for path in image_paths(self._below(folder)):
            found = _NUMBERED.match(path.stem)
            if found is None:
                raise VideoError(
                    f"Image {path} of CamVid must end with its frame number, as in 0016E5_07959. Rename it or take it "
                    "out of the folder."
                )
            frames.append(_Frame(path, found["drive"], int(found["number"])))
        return sorted(frames, key=lambda frame: (frame.drive, frame.number))

    def _recordings(self, parts: Sequence[Part]) -> Iterator[Recording]:
        for part in parts:
            yield from self._drive(part)

    def _drive(self, part: Part) -> Iterator[Recording]:
        """The recordings of a drive, which gaps part."""
        folder, _, drive = part.name.partition("/")
        frames = [frame for frame in self._frames(folder) if frame.drive == drive]
        chosen = frames[part.start : part.stop][: self.frames]
        if not chosen:
            raise VideoError(
                f"No frame to take of drive {drive} in {self._root / folder}: it holds {len(frames)} images, wanted "
                f"{part}. Lower start."
            )
        labels = {frame.path: f"{folder}annot/{frame.path.stem}.png" for frame in chosen}
        self._require(labels.values(), "Finish the download, or leave the drive out of splits.")
        runs, step = _runs(chosen)
        first = part.start
        for run in runs:
            name = part.name if len(runs) == 1 else f"{part.name}_{run[0].number:05d}"
            files = [self._root / labels[frame.path] for frame in run]
            yield Recording(
                part=replace(part if len(runs) == 1 else Part(name), name=f"camvid/{name}"),
                first=first,
                frames=[frame.path for frame in run],
                labels=(map_labels(read_labels(file), _VALUES, file) for file in files),
                fps=_CAMERA_RATE / step,
            )
            first += len(run)


def _runs(frames: Sequence[_Frame]) -> tuple[list[list[_Frame]], float]:
    """Frames of a drive, cut at gaps of more than one and a half times the usual distance; and that distance."""
    gaps = [after.number - before.number for before, after in pairwise(frames)]
    usual = float(median(gaps)) if gaps else _CAMERA_RATE
    runs = [[frames[0]]]
    for frame, gap in zip(frames[1:], gaps, strict=True):
        if gap > 1.5 * usual:
            runs.append([])
        runs[-1].append(frame)
    return runs, max(usual, 1.0)
