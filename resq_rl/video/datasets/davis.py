"""The DAVIS video object segmentation datasets, in the arrangements of 2016 and 2017."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np

from resq_rl.errors import SettingsError, VideoError
from resq_rl.video.assembly import ClipFrames
from resq_rl.video.clip import IGNORE, Split
from resq_rl.video.datasets.base import LabelledVideo, Recording, held_out
from resq_rl.video.datasets.tracking import object_box
from resq_rl.video.framing import Framing
from resq_rl.video.images import image_paths, map_labels, read_labels
from resq_rl.video.parts import Part, listed

__all__ = ["DavisVideo"]


@dataclass(frozen=True)
class DavisVideo(LabelledVideo):
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
        label_size: height and width in pixels of the labels where that is not the frames', to measure at it, such as
            their own; None for the frames'.
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
            clip. Or lengths by split, such as {train: 48}.
        fps: frames per second of the dataset.

    Raises:
        SettingsError: a setting out of its range.
        VideoError: a missing root, list or sequence, or splits that overlap.
    """

    label_size: tuple[int, int] | None = None
    crop: float | None = None
    crop_thickness: int = 1
    objects: int | None = None
    year: int | None = None
    resolution: str = "480p"
    frames: int | None = None
    clip_frames: ClipFrames = None
    fps: float = 24.0

    dataset: ClassVar[str] = "DAVIS"
    spelling: ClassVar[str] = "SEQUENCE or SEQUENCE[start:stop]"
    counts: ClassVar[tuple[str, ...]] = ("frames", "objects", "crop_thickness")

    def __post_init__(self) -> None:
        if self.year not in (None, 2016, 2017):
            raise SettingsError(f"Setting year of {self._reader} must be 2016, 2017 or None, got {self.year!r}.")
        available = self._videos()
        super().__post_init__()
        names = [part.name for parts in self._parts().values() for part in parts]
        wanted = [f"{top}/{self.resolution}/{name}" for name in names for top in ("JPEGImages", "Annotations")]
        self._require(wanted, "Correct the names, or finish the download.")
        object.__setattr__(self, "year", self.year or self._tell_year([*names, *available]))
        if self.year == 2016 and self.objects is not None:
            raise SettingsError(
                f"Setting objects of {self._reader} must be None for DAVIS 2016, got {self.objects}: its masks do not "
                "tell objects apart."
            )

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the label values."""
        if self.objects is None:
            return ("background", "object")
        return ("background", *(f"object {number}" for number in range(1, self.objects + 1)))

    @property
    def framing(self) -> Framing:
        """Whole frames stretched to `size`, or windows that follow the labelled objects."""
        return Framing(self.size, crop=self.crop, label_size=self.label_size, reader=self._reader)

    @property
    def _frames_root(self) -> Path:
        return self._below(f"JPEGImages/{self.resolution}")

    @property
    def _labels_root(self) -> Path:
        return self._below(f"Annotations/{self.resolution}")

    def _videos(self, group: str = "") -> list[str]:
        self._require(
            (f"JPEGImages/{self.resolution}", f"Annotations/{self.resolution}"),
            "Set root to the folder that holds JPEGImages and Annotations, and resolution to a folder in them.",
        )
        return sorted(path.name for path in self._frames_root.iterdir() if path.is_dir())

    def _spelled(self, part: Part) -> list[Part]:
        return [part]  # there are no groups

    def _tell_year(self, names: Sequence[str]) -> int:
        """2017 where the first mask of the first sequence that is not empty holds object numbers, or else 2016."""
        for name in names[:1]:
            for path in image_paths(self._labels_root / name):
                values = read_labels(path)
                if values.any():
                    return 2017 if ((values > 0) & (values < IGNORE)).any() else 2016
        return 2016

    def _published(self) -> dict[Split, list[Part]]:
        return held_out(self._official("train"), self._official("val"))

    def _official(self, name: str) -> list[Part]:
        """The sequences of an official list, of either arrangement."""
        lists = self._root / "ImageSets"
        folders = [str(self.year)] if self.year else ["2017", "2016"]
        candidates = [lists / folder / f"{name}.txt" for folder in [*folders, self.resolution]]
        for path in candidates:
            if path.is_file():
                lines = path.read_text(encoding="utf-8").split("\n")
                words = [line.split()[0] for line in lines if line.strip()]
                names = [Path(word).parent.name if "/" in word else word for word in words]
                return [Part(name) for name in dict.fromkeys(names)]
        raise VideoError(
            f"No official list {name}.txt of DAVIS: looked for {', '.join(map(str, candidates))}. Give "
            f"splits, with sequences of {listed(self._videos(''), 100)}."
        )

    def _recordings(self, parts: Sequence[Part]) -> Iterator[Recording]:
        for part in parts:
            folder = self._frames_root / part.name
            paths = image_paths(folder)
            chosen = paths[part.start : part.stop][: self.frames]
            if not chosen:
                raise VideoError(
                    f"No frame to take from {folder}: it holds {len(paths)} frames, wanted {part}. Lower start."
                )
            wanted = [f"Annotations/{self.resolution}/{part.name}/{path.stem}.png" for path in chosen]
            self._require(wanted, "Finish the download, or leave the sequence out of splits.")
            labels: Iterable[np.ndarray] = self._labels([self._root / name for name in wanted])
            if self.crop is not None:  # the window's way depends on all labels
                labels = list(labels)
            yield Recording(
                part=replace(part, name=f"davis{self.year}/{part.name}"),
                first=part.start,
                frames=chosen,
                labels=labels,
                fps=self.fps,
                boxes=[object_box(one, self.crop_thickness) for one in labels] if isinstance(labels, list) else (),
                origin=folder,
            )

    def _labels(self, paths: Sequence[Path]) -> Iterator[np.ndarray]:
        """Class indices of each frame at the size of the source."""
        if self.year == 2016:
            mapping: Mapping[int, int] = {0: 0, 255: 1}
        elif self.objects is None:
            mapping = {0: 0, **dict.fromkeys(range(1, 255), 1), 255: IGNORE}
        else:
            mapping = {**{number: number for number in range(self.objects + 1)}, 255: IGNORE}
        return (map_labels(read_labels(path), mapping, path) for path in paths)
