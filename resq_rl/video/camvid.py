"""The CamVid driving dataset in the arrangement of SegNet."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Final

import numpy as np

from resq_rl.errors import VideoError
from resq_rl.video.assembly import Decoded, cut_clips
from resq_rl.video.clip import IGNORE, Clip, Split, check_split
from resq_rl.video.images import (
    check_count,
    check_size,
    image_paths,
    map_labels,
    read_frame,
    read_labels,
    resize_frame,
    resize_labels,
)
from resq_rl.video.parts import Part, check_disjoint, listed, split_parts
from resq_rl.video.tree import below, require

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
class CamVidVideo:
    """Clips of CamVid with eleven classes; void pixels are ignored.

    Reads images of `root`/FOLDER (png or jpg) and labels of the same names in `root`/FOLDERannot, at each
    call. File names tell the drive and the frame number ("0016E5_07959" is frame 7959 of drive 0016E5).
    Frames of one drive are one clip, and where frames are missing (more than one and a half times the usual
    distance) the next clip begins. The camera ran at 30 frames per second, so the frame rate of a clip is 30
    over the usual distance.

    Attributes:
        root: folder that holds `train`, `trainannot` and so on.
        splits: for each split "FOLDER" for all drives of it, "FOLDER/DRIVE" for one, or
            "FOLDER/DRIVE[start:stop]" for some of its images, counted from 0 in order; None for train, val
            and test as far as they are there.
        size: height and width in pixels that frames and labels are brought to; None for the size of the
            source.
        frames: most frames taken from each drive; None for all.
        clip_frames: cuts each clip into clips of this many frames, and drops a shorter rest; None leaves them
            whole.

    Raises:
        SettingsError: a setting out of its range.
        VideoError: a missing root, folder or drive, or splits that overlap.
    """

    root: str | Path
    splits: Mapping[Split, Sequence[str | Part]] | None = None
    size: tuple[int, int] | None = None
    frames: int | None = None
    clip_frames: int | None = None

    def __post_init__(self) -> None:
        reader = "CamVidVideo"
        object.__setattr__(self, "size", check_size(self.size, reader))
        check_count(self.frames, "frames", reader)
        check_count(self.clip_frames, "clip_frames", reader)
        check_disjoint(self._parts(), reader)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the label values."""
        return _CLASSES

    def clips(self, split: Split) -> list[Clip]:
        """Decode the clips of a split.

        Raises:
            VideoError: the split is unknown or not there; a frame or label is missing, damaged or of another
                size; or a label holds values outside the classes.
        """
        parts = self._parts()
        if check_split(split) not in parts:
            raise VideoError(
                f"CamVidVideo has no split {split} in {self._root}: found {listed(parts)}. Add it to "
                f"splits, or add the folders {_FOLDERS[split]} and {_FOLDERS[split]}annot."
            )
        return [clip for part in parts[split] for clip in self._read(part)]

    @property
    def _root(self) -> Path:
        return Path(self.root).expanduser()

    def _parts(self) -> dict[Split, list[Part]]:
        """The drives of each split as FOLDER/DRIVE."""
        if self.splits is None:
            there = {split: [name] for split, name in _FOLDERS.items() if (self._root / name).is_dir()}
            if not there:
                require(self._root, "CamVid", _FOLDERS.values(), "Set root to the folder that holds them.")
            return self._drives(split_parts(there, "CamVidVideo"))
        return self._drives(split_parts(self.splits, "CamVidVideo"))

    def _drives(self, parts: Mapping[Split, Sequence[Part]]) -> dict[Split, list[Part]]:
        """Spell out entries that stand for all drives of a folder."""
        spelled: dict[Split, list[Part]] = {split: [] for split in parts}
        for split, entries in parts.items():
            for part in entries:
                folder, _, drive = part.name.partition("/")
                needed = (folder, f"{folder}annot")
                require(self._root, "CamVid", needed, "Set root to the folder that holds them, or correct splits.")
                drives = sorted({frame.drive for frame in self._frames(folder)})
                chosen = [name for name in drives if drive in ("", name)]
                if not chosen or (len(chosen) > 1 and part != Part(part.name)):
                    raise VideoError(
                        f"No single drive {part} of CamVidVideo in {self._root / folder}: found "
                        f"{listed(drives)}. Write FOLDER, FOLDER/DRIVE or FOLDER/DRIVE[start:stop]."
                    )
                spelled[split] += [replace(part, name=f"{folder}/{name}") for name in chosen]
        return spelled

    def _frames(self, folder: str) -> list[_Frame]:
        """Images of a folder, ordered by drive and number."""
        frames = []
        for path in image_paths(below(self._root, folder, "CamVid")):
            found = _NUMBERED.match(path.stem)
            if found is None:
                raise VideoError(
                    f"Image {path} of CamVid must end with its frame number, as in 0016E5_07959. Rename it "
                    "or take it out of the folder."
                )
            frames.append(_Frame(path, found["drive"], int(found["number"])))
        return sorted(frames, key=lambda frame: (frame.drive, frame.number))

    def _read(self, part: Part) -> list[Clip]:
        """Decode one drive into its clips."""
        folder, _, drive = part.name.partition("/")
        frames = [frame for frame in self._frames(folder) if frame.drive == drive]
        chosen = frames[part.start : part.stop][: self.frames]
        if not chosen:
            raise VideoError(
                f"No frame to take of drive {drive} in {self._root / folder}: it holds {len(frames)} "
                f"images, wanted {part}. Lower start."
            )
        labels = [f"{folder}annot/{frame.path.stem}.png" for frame in chosen]
        require(self._root, "CamVid", labels, "Finish the download, or leave the drive out of splits.")
        clips, first = [], part.start
        runs, step = _runs(chosen)
        for run in runs:
            name = part.name if len(runs) == 1 else f"{part.name}_{run[0].number:05d}"
            pairs = [self._decode(frame.path, folder) for frame in run]
            decoded = Decoded(
                frames=[frame for frame, _ in pairs],
                labels=[label for _, label in pairs],
                part=replace(part if len(runs) == 1 else Part(name), name=f"camvid/{name}"),
                first=first,
                stride=1,
                fps=_CAMERA_RATE / step,
                origin=str(run[0].path),
            )
            clips += cut_clips(decoded, self.clip_frames)
            first += len(run)
        return clips

    def _decode(self, path: Path, folder: str) -> tuple[np.ndarray, np.ndarray]:
        """A frame and its labels, brought to size."""
        image = read_frame(path)
        label_path = self._root / f"{folder}annot" / f"{path.stem}.png"
        label = map_labels(read_labels(label_path), _VALUES, label_path)
        if label.shape != (image.height, image.width):
            raise VideoError(
                f"Label {label_path} must be of the size of its frame, {image.width}x{image.height}, got "
                f"{label.shape[1]}x{label.shape[0]}. Use images and labels of one resolution."
            )
        return resize_frame(image, self.size), resize_labels(label, self.size)


def _runs(frames: Sequence[_Frame]) -> tuple[list[list[_Frame]], float]:
    """Cut frames of one drive where one and a half times the usual distance is missing; and that distance."""
    gaps = [after.number - before.number for before, after in pairwise(frames)]
    usual = float(median(gaps)) if gaps else _CAMERA_RATE
    runs = [[frames[0]]]
    for frame, gap in zip(frames[1:], gaps, strict=True):
        if gap > 1.5 * usual:
            runs.append([])
        runs[-1].append(frame)
    return runs, max(usual, 1.0)
