"""The DAVIS video object segmentation datasets, in the arrangements of 2016 and 2017."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from resq_rl.errors import SettingsError, VideoError
from resq_rl.video.assembly import Decoded, cut_clips
from resq_rl.video.clip import IGNORE, Clip, Split, check_split
from resq_rl.video.images import (
    Box,
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
from resq_rl.video.tracking import check_crop, follow, object_box
from resq_rl.video.tree import below, require

__all__ = ["DavisVideo"]


@dataclass(frozen=True)
class DavisVideo:
    """Clips of DAVIS 2016 (masks of 0 and 255) or DAVIS 2017 (palette masks of object numbers).

    Reads `JPEGImages/RESOLUTION/SEQUENCE` and `Annotations/RESOLUTION/SEQUENCE` under `root`, decoded at each
    call. Without `splits`, the official lists under `ImageSets` are used: every fifth sequence of the
    training list is for validation and the rest for training, and the official validation list, on which
    results are reported, is the test split.

    Attributes:
        root: folder that holds `JPEGImages` and `Annotations`.
        splits: sequence names for each split, "NAME" or "NAME[start:stop]" for some of its frames; None for
            the official lists.
        size: height and width in pixels that frames and labels are brought to; None for the size of the
            source.
        crop: height of a window around the labelled objects as a multiple of theirs, such as 1.3; it follows
            them smoothly, has the proportions of `size`, repeats the edge of frames that it leaves, and is
            unlabelled there. None for full frames.
        crop_thickness: parts of objects thinner than this many pixels of the source, such as ropes, do not count
            for the window; 1 counts all.
        objects: None for one class of all objects; a number for classes "object 1" up to it (2017 only).
        year: 2016 or 2017; None to tell from the files.
        resolution: folder name below `JPEGImages` and `Annotations`.
        frames: most frames taken from each sequence; None for all.
        clip_frames: cuts each sequence into clips of this many frames, and drops a shorter rest; None for one
            clip.
        fps: frames per second of the dataset.

    Raises:
        SettingsError: a setting out of its range.
        VideoError: a missing root, list or sequence, or splits that overlap.
    """

    root: str | Path
    splits: Mapping[Split, Sequence[str | Part]] | None = None
    size: tuple[int, int] | None = None
    crop: float | None = None
    crop_thickness: int = 1
    objects: int | None = None
    year: int | None = None
    resolution: str = "480p"
    frames: int | None = None
    clip_frames: int | None = None
    fps: float = 24.0

    def __post_init__(self) -> None:
        reader = "DavisVideo"
        object.__setattr__(self, "size", check_size(self.size, reader))
        check_count(self.frames, "frames", reader)
        check_count(self.clip_frames, "clip_frames", reader)
        check_count(self.objects, "objects", reader)
        check_count(self.crop_thickness, "crop_thickness", reader)
        if self.year not in (None, 2016, 2017):
            raise SettingsError(f"Setting year of {reader} must be 2016, 2017 or None, got {self.year!r}. Choose one.")
        check_crop(self.crop, self.size, reader)
        available = self._available()
        parts = self._parts()
        names = [part.name for entries in parts.values() for part in entries]
        wanted = [f"{top}/{self.resolution}/{name}" for name in names for top in ("JPEGImages", "Annotations")]
        require(self._root, "DAVIS", wanted, "Correct the names, or finish the download.")
        check_disjoint(parts, reader)
        object.__setattr__(self, "year", self.year or self._tell_year(available))
        if self.year == 2016 and self.objects is not None:
            raise SettingsError(
                f"Setting objects of {reader} must be None for DAVIS 2016, got {self.objects}: its masks do "
                "not tell objects apart."
            )

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the label values."""
        if self.objects is None:
            return ("background", "object")
        return ("background", *(f"object {number}" for number in range(1, self.objects + 1)))

    def clips(self, split: Split) -> list[Clip]:
        """Decode the clips of a split.

        Raises:
            VideoError: the split is unknown or not set; a frame or label is missing, damaged or of another
                size; or a label holds values outside the classes.
        """
        parts = self._parts()
        if check_split(split) not in parts:
            raise VideoError(
                f"DavisVideo has no split {split}: found {listed(parts)}. Add it to splits with sequences of "
                f"{listed(self._available())}."
            )
        return [clip for part in parts[split] for clip in self._read(part)]

    @property
    def _root(self) -> Path:
        return Path(self.root).expanduser()

    @property
    def _frames_root(self) -> Path:
        return below(self._root, f"JPEGImages/{self.resolution}", "DAVIS")

    @property
    def _labels_root(self) -> Path:
        return below(self._root, f"Annotations/{self.resolution}", "DAVIS")

    def _available(self) -> list[str]:
        """Names of all sequences."""
        require(
            self._root,
            "DAVIS",
            (f"JPEGImages/{self.resolution}", f"Annotations/{self.resolution}"),
            "Set root to the folder that holds JPEGImages and Annotations, and resolution to a folder in them.",
        )
        return sorted(path.name for path in self._frames_root.iterdir() if path.is_dir())

    def _tell_year(self, available: list[str]) -> int:
        """2017 where the first mask that is not empty holds object numbers, or else 2016."""
        named = [part.name for entries in self._parts().values() for part in entries]
        for name in [*named, *available][:1]:
            for path in image_paths(self._labels_root / name):
                values = read_labels(path)
                if values.any():
                    return 2017 if ((values > 0) & (values < IGNORE)).any() else 2016
        return 2016

    def _parts(self) -> dict[Split, list[Part]]:
        """The sequences of each split."""
        if self.splits is not None:
            return split_parts(self.splits, "DavisVideo")
        learn, report = self._official("train"), self._official("val")
        return {
            "train": [Part(name) for number, name in enumerate(learn) if number % 5 != 4],
            "validation": [Part(name) for name in learn[4::5]],
            "test": [Part(name) for name in report],
        }

    def _official(self, name: str) -> list[str]:
        """Sequence names of an official list, of either arrangement."""
        lists = self._root / "ImageSets"
        folders = [str(self.year)] if self.year else ["2017", "2016"]
        candidates = [lists / folder / f"{name}.txt" for folder in [*folders, self.resolution]]
        for path in candidates:
            if path.is_file():
                lines = path.read_text(encoding="utf-8").split("\n")
                words = [line.split()[0] for line in lines if line.strip()]
                names = [Path(word).parent.name if "/" in word else word for word in words]
                return list(dict.fromkeys(names))
        raise VideoError(
            f"No official list {name}.txt of DAVIS: looked for {', '.join(map(str, candidates))}. Give "
            f"splits, with sequences of {listed(self._available(), 100)}."
        )

    def _read(self, part: Part) -> list[Clip]:
        """Decode one sequence into its clips."""
        paths = image_paths(self._frames_root / part.name)
        chosen = paths[part.start : part.stop][: self.frames]
        if not chosen:
            raise VideoError(
                f"No frame to take from {self._frames_root / part.name}: it holds {len(paths)} frames, "
                f"wanted {part}. Lower start."
            )
        wanted = [f"Annotations/{self.resolution}/{part.name}/{path.stem}.png" for path in chosen]
        require(self._root, "DAVIS", wanted, "Finish the download, or leave the sequence out of splits.")
        labels, boxes = self._read_labels(part.name, chosen)
        frames = []
        for path, label, box in zip(chosen, labels, boxes, strict=True):
            image = read_frame(path)
            if label.shape != (image.height, image.width):
                raise VideoError(
                    f"Label of frame {path} must be of its size {image.width}x{image.height}, got "
                    f"{label.shape[1]}x{label.shape[0]}. Use frames and annotations of one resolution."
                )
            frames.append(resize_frame(image, self.size, box))
        sized = [resize_labels(label, self.size, box) for label, box in zip(labels, boxes, strict=True)]
        decoded = Decoded(
            frames=frames,
            labels=sized,
            part=replace(part, name=f"davis{self.year}/{part.name}"),
            first=part.start,
            stride=1,
            fps=self.fps,
            origin=str(self._frames_root / part.name),
        )
        return cut_clips(decoded, self.clip_frames)

    def _read_labels(
        self, name: str, frames: Sequence[Path]
    ) -> tuple[list[UInt8[np.ndarray, "h w"]], list[Box] | list[None]]:
        """Class indices of each frame at the size of the source, and the window to cut from it."""
        if self.year == 2016:
            mapping = {0: 0, 255: 1}
        elif self.objects is None:
            mapping = {0: 0, **dict.fromkeys(range(1, 255), 1), 255: IGNORE}
        else:
            mapping = {**{number: number for number in range(self.objects + 1)}, 255: IGNORE}
        paths = [self._labels_root / name / f"{frame.stem}.png" for frame in frames]
        labels = [map_labels(read_labels(path), mapping, path) for path in paths]
        if self.crop is None or self.size is None:
            return labels, [None] * len(labels)
        boxes = [object_box(label, self.crop_thickness) for label in labels]
        if not any(boxes):
            raise VideoError(
                f"No labelled object to crop around in {self._labels_root / name}: all {len(labels)} labels "
                "are empty. Leave the sequence out, or set crop to None."
            )
        return labels, follow(boxes, self.crop, self.size[0] / self.size[1])
