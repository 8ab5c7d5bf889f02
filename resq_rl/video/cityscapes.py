"""The Cityscapes sequences: snippets of 30 frames with labels for one of them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np

from resq_rl.errors import VideoError
from resq_rl.video.assembly import Decoded, cut_clips
from resq_rl.video.clip import IGNORE, Clip, Split, check_split
from resq_rl.video.images import (
    check_count,
    check_size,
    map_labels,
    read_frame,
    read_labels,
    resize_frame,
    resize_labels,
)
from resq_rl.video.parts import Part, check_disjoint, listed, split_parts
from resq_rl.video.tree import below, require

__all__ = ["CityscapesVideo"]

_FRAMES: Final = "leftImg8bit_sequence"
_LABELS: Final = "gtFine"
_LABEL_FILE: Final = re.compile(r"^(?P<city>.+)_(?P<sequence>\d+)_(?P<number>\d+)_gtFine_labelIds\.png$")
_DATASET: Final = "Cityscapes"
# The values of the label files (labelIds) of the 19 classes that count, in the order of their training numbers.
_CLASSES: Final = {
    "road": 7,
    "sidewalk": 8,
    "building": 11,
    "wall": 12,
    "fence": 13,
    "pole": 17,
    "traffic light": 19,
    "traffic sign": 20,
    "vegetation": 21,
    "terrain": 22,
    "sky": 23,
    "person": 24,
    "rider": 25,
    "car": 26,
    "truck": 27,
    "bus": 28,
    "train": 31,
    "motorcycle": 32,
    "bicycle": 33,
}
_VALUES: Final = dict.fromkeys((*range(34), 255), IGNORE) | {
    value: index for index, value in enumerate(_CLASSES.values())
}
_RATE: Final = 17.0  # frames per second


@dataclass(frozen=True)
class CityscapesVideo:
    """Snippets of Cityscapes with its 19 classes; only one frame of each has labels, the others are ignored.

    Reads `leftImg8bit_sequence/SPLIT/CITY/CITY_SEQUENCE_FRAME_leftImg8bit.png` under `root`, and labels
    `gtFine/SPLIT/CITY/CITY_SEQUENCE_FRAME_gtFine_labelIds.png` of every 20th of 30 frames, decoded at each call. A
    clip is what lies around a labelled frame. Without `splits`, every fifth city of the published training set, in
    alphabetical order, is for validation and the rest for training; the published validation set, on which results
    are reported, is the test split.

    Clips are held in memory: 20 frames of 1024x2048 take 126 MB. `splits` and `size` keep them few and small.

    Attributes:
        root: folder that holds `leftImg8bit_sequence` and `gtFine`.
        splits: for each split "SET" for all cities of a published set, "SET/CITY" for one, or "SET/CITY[start:stop]"
            for some of its snippets, counted from 0 in order; None for the published ones.
        size: height and width in pixels that frames and labels are brought to; None for 1024x2048.
        before: frames of a clip before the labelled one, at most 19.
        after: frames of a clip after the labelled one, at most 10.

    Raises:
        SettingsError: a setting out of its range.
        VideoError: a missing root, set or city, or splits that overlap.
    """

    root: str | Path
    splits: Mapping[Split, Sequence[str | Part]] | None = None
    size: tuple[int, int] | None = None
    before: int = 19
    after: int = 0

    def __post_init__(self) -> None:
        reader = "CityscapesVideo"
        object.__setattr__(self, "size", check_size(self.size, reader))
        check_count(self.before, "before", reader, least=0, most=19)
        check_count(self.after, "after", reader, least=0, most=10)
        check_disjoint(self._parts(), reader)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the label values."""
        return tuple(_CLASSES)

    def clips(self, split: Split) -> list[Clip]:
        """Decode the clips of a split.

        Raises:
            VideoError: the split is unknown or not there; a frame is missing, damaged or of another size; or a label
                holds values that Cityscapes does not have.
        """
        parts = self._parts()
        if not parts.get(check_split(split)):
            raise VideoError(
                f"CityscapesVideo has no split {split} in {self._root}: found {listed(s for s in parts if parts[s])}. "
                "Add cities to it in splits, such as val/frankfurt."
            )
        snippets = [snippet for part in parts[split] for snippet in self._snippets(part)]
        wanted = [name for snippet in snippets for name in self._frame_names(snippet)]
        require(self._root, _DATASET, wanted, "Finish the download, or leave the city out of splits.")
        return [self._read(snippet) for snippet in snippets]

    @property
    def _root(self) -> Path:
        return Path(self.root).expanduser()

    def _parts(self) -> dict[Split, list[Part]]:
        """The cities of each split as SET/CITY."""
        mend = "Set root to the folder that holds both, as published."
        if self.splits is not None:
            given = split_parts(self.splits, "CityscapesVideo")
            sets = sorted({part.name.partition("/")[0] for entries in given.values() for part in entries})
            require(self._root, _DATASET, [f"{top}/{name}" for name in sets for top in (_FRAMES, _LABELS)], mend)
            return {
                split: [city for part in entries for city in self._cities(part)] for split, entries in given.items()
            }
        require(
            self._root, _DATASET, [f"{top}/{name}" for name in ("train", "val") for top in (_FRAMES, _LABELS)], mend
        )
        learn, report = self._cities(Part("train")), self._cities(Part("val"))
        return {
            "train": [city for number, city in enumerate(learn) if number % 5 != 4],
            "validation": learn[4::5],
            "test": report,
        }

    def _cities(self, part: Part) -> list[Part]:
        """An entry of `splits` spelled out as cities."""
        name, _, city = part.name.partition("/")
        folder = below(self._root, f"{_LABELS}/{name}", _DATASET)
        there = sorted(path.name for path in folder.iterdir() if path.is_dir())
        chosen = [own for own in there if city in ("", own)]
        if not chosen or (not city and part != Part(part.name)):
            raise VideoError(
                f"No single city {part} of CityscapesVideo in {folder}: found {listed(there)}. Write SET, SET/CITY or "
                "SET/CITY[start:stop]."
            )
        return [replace(part, name=f"{name}/{own}") for own in chosen]

    def _snippets(self, part: Part) -> list["_Snippet"]:
        """The snippets of a city, or some of them."""
        folder = below(self._root, f"{_LABELS}/{part.name}", _DATASET)
        files = sorted(path.name for path in folder.iterdir())
        matches = [match for match in map(_LABEL_FILE.match, files) if match is not None]
        found = [
            _Snippet(part.name, f"{m['city']}_{m['sequence']}", int(m["number"]), len(m["number"])) for m in matches
        ]
        if not found[part.start : part.stop]:
            raise VideoError(
                f"No snippet to take of {part} in {folder}: looked for CITY_SEQUENCE_FRAME_gtFine_labelIds.png, found "
                f"{len(found)} of these among {listed(files)}. Finish the download, or lower start."
            )
        return found[part.start : part.stop]

    def _frame_names(self, snippet: "_Snippet") -> list[str]:
        numbers = range(snippet.number - self.before, snippet.number + self.after + 1)
        return [f"{_FRAMES}/{snippet.folder}/{snippet.name(number)}_leftImg8bit.png" for number in numbers]

    def _read(self, snippet: "_Snippet") -> Clip:
        """Decode one snippet."""
        path = self._root / f"{_LABELS}/{snippet.folder}/{snippet.name(snippet.number)}_gtFine_labelIds.png"
        label = map_labels(read_labels(path), _VALUES, path)
        frames = []
        for name in self._frame_names(snippet):
            image = read_frame(self._root / name)
            if label.shape != (image.height, image.width):
                raise VideoError(
                    f"Frame {self._root / name} must be of the size of its snippet's label, "
                    f"{label.shape[1]}x{label.shape[0]}, got {image.width}x{image.height}. Copy it again."
                )
            frames.append(resize_frame(image, self.size))
        sized = resize_labels(label, self.size)
        labels = [np.full_like(sized, IGNORE) for _ in frames]
        labels[self.before] = sized
        decoded = Decoded(
            frames=frames,
            labels=labels,
            part=Part(f"cityscapes/{snippet.folder.partition('/')[0]}/{snippet.name(snippet.number)}"),
            first=snippet.number - self.before,
            stride=1,
            fps=_RATE,
            origin=str(path),
        )
        return cut_clips(decoded, None)[0]


@dataclass(frozen=True)
class _Snippet:
    """Frames around a labelled one.

    Attributes:
        folder: SET/CITY.
        sequence: CITY_SEQUENCE.
        number: number of the labelled frame.
        digits: of its number in file names.
    """

    folder: str
    sequence: str
    number: int
    digits: int

    def name(self, number: int) -> str:
        """What the file names of a frame begin with."""
        return f"{self.sequence}_{number:0{self.digits}d}"
