"""The Cityscapes sequences: snippets of 30 frames with labels for one of them."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from resq_rl.errors import VideoError
from resq_rl.video.clip import IGNORE, Split
from resq_rl.video.datasets.base import LabelledVideo, Recording, held_out
from resq_rl.video.images import check_count, map_labels, read_labels
from resq_rl.video.parts import Part, listed

__all__ = ["CityscapesVideo"]

_FRAMES: Final = "leftImg8bit_sequence"
_LABELS: Final = "gtFine"
_LABEL_FILE: Final = re.compile(r"^(?P<city>.+)_(?P<sequence>\d+)_(?P<number>\d+)_gtFine_labelIds\.png$")
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
class CityscapesVideo(LabelledVideo):
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
        label_size: height and width in pixels of the labels where that is not the frames', to measure at it, such as
            their own; None for the frames'.
        before: frames of a clip before the labelled one, at most 19.
        after: frames of a clip after the labelled one, at most 10.

    Raises:
        SettingsError: a setting out of its range.
        VideoError: a missing root, set or city, or splits that overlap.
    """

    label_size: tuple[int, int] | None = None
    before: int = 19
    after: int = 0

    dataset: ClassVar[str] = "Cityscapes"
    spelling: ClassVar[str] = "SET, SET/CITY or SET/CITY[start:stop] (val/frankfurt)"
    counts: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_count(self.before, "before", self._reader, least=0, most=19)
        check_count(self.after, "after", self._reader, least=0, most=10)
        super().__post_init__()

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the label values."""
        return tuple(_CLASSES)

    def _published(self) -> dict[Split, list[Part]]:
        self._require_sets("train", "val")
        return held_out(self._spelled(Part("train")), self._spelled(Part("val")))

    def _require_sets(self, *names: str) -> None:
        wanted = [f"{top}/{name}" for name in names for top in (_FRAMES, _LABELS)]
        self._require(wanted, "Set root to the folder that holds both, as published.")

    def _videos(self, group: str) -> list[str]:
        self._require_sets(group)
        return sorted(path.name for path in self._below(f"{_LABELS}/{group}").iterdir() if path.is_dir())

    def _recordings(self, parts: Sequence[Part]) -> Iterator[Recording]:
        snippets = [snippet for part in parts for snippet in self._snippets(part)]
        wanted = [name for snippet in snippets for name in self._frame_names(snippet)]
        self._require(wanted, "Finish the download, or leave the city out of splits.")
        for snippet in snippets:
            yield Recording(
                part=Part(f"cityscapes/{snippet.folder.partition('/')[0]}/{snippet.name(snippet.number)}"),
                first=snippet.number - self.before,
                frames=[self._root / name for name in self._frame_names(snippet)],
                labels=self._labels(snippet),
                fps=_RATE,
                origin=self._root / self._label_name(snippet),
            )

    def _snippets(self, part: Part) -> list["_Snippet"]:
        """The snippets of a city, or some of them."""
        folder = self._below(f"{_LABELS}/{part.name}")
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

    def _label_name(self, snippet: "_Snippet") -> str:
        return f"{_LABELS}/{snippet.folder}/{snippet.name(snippet.number)}_gtFine_labelIds.png"

    def _labels(self, snippet: "_Snippet") -> list[np.ndarray]:
        """The label of the labelled frame; all others are ignored."""
        path = self._root / self._label_name(snippet)
        label = map_labels(read_labels(path), _VALUES, path)
        nothing = np.full_like(label, IGNORE)
        return [nothing] * self.before + [label] + [nothing] * self.after


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
