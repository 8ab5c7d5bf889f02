"""Parts of videos, and the splits that they belong to."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from resq_rl.errors import VideoError
from resq_rl.video.clip import SPLITS, Split, check_split

__all__ = ["Part", "check_disjoint", "check_splits", "listed", "split_parts"]

_RANGE = re.compile(r"^(?P<name>.+)\[(?P<start>[0-9]*):(?P<stop>[0-9]*)\]$", re.DOTALL)


@dataclass(frozen=True)
class Part:
    """Consecutive frames of one video.

    Attributes:
        name: name or path of the video.
        start: number of the first frame, from 0.
        stop: number of the frame after the last one; None for the end of the video.
    """

    name: str
    start: int = 0
    stop: int | None = None

    def __post_init__(self) -> None:
        if self.start < 0 or (self.stop is not None and self.stop <= self.start):
            raise VideoError(
                f"A part of a video must hold a frame, got {self} from frame {self.start} to {self.stop}. "
                "Write it as NAME[start:stop] with start below stop."
            )

    def __str__(self) -> str:
        if self.start == 0 and self.stop is None:
            return self.name
        return f"{self.name}[{self.start}:{'' if self.stop is None else self.stop}]"

    @classmethod
    def parse(cls, text: str) -> "Part":
        """Read "NAME" or "NAME[start:stop]", where start and stop count frames and may be left out.

        Raises:
            VideoError: the range is empty.
        """
        found = _RANGE.match(text)
        if found is None:
            return cls(text)
        start, stop = found["start"], found["stop"]
        return cls(found["name"], int(start or 0), int(stop) if stop else None)

    def overlaps(self, other: "Part") -> bool:
        """Whether both hold some frame of the same video."""
        if self.name != other.name:
            return False
        before = other.stop is not None and other.stop <= self.start
        after = self.stop is not None and self.stop <= other.start
        return not (before or after)


def check_splits(splits: Mapping[Split, Iterable[object]], reader: str) -> None:
    """Check that `splits` maps split names to lists.

    Raises:
        VideoError: a key is not a split, or a value is a bare string.
    """
    for split, entries in splits.items():
        check_split(split)
        if isinstance(entries, str | bytes) or not isinstance(entries, Iterable):
            raise VideoError(f"Split {split} of {reader} must be a list of names, got {entries!r}. Put it into a list.")


def split_parts(splits: Mapping[Split, Iterable[object]], reader: str) -> dict[Split, list[Part]]:
    """Read every entry of `splits` into a part.

    Raises:
        VideoError: a key is not a split, a value is not a list, or a range is empty.
    """
    check_splits(splits, reader)
    return {
        split: [entry if isinstance(entry, Part) else Part.parse(str(entry)) for entry in entries]
        for split, entries in splits.items()
    }


def check_disjoint(parts: Mapping[Split, Iterable[Part]], reader: str) -> None:
    """Check that no frame is used twice, within a split or in two of them.

    Raises:
        VideoError: two parts overlap.
    """
    seen: list[tuple[Split, Part]] = []
    for split in SPLITS:
        for part in parts.get(split, ()):
            for other_split, other in seen:
                if part.overlaps(other):
                    raise VideoError(
                        f"Splits of {reader} must be disjoint, got {part} in {split} and {other} in "
                        f"{other_split}. Take one out, or give each a range of its own as NAME[start:stop]."
                    )
            seen.append((split, part))


def listed(names: Iterable[str], most: int = 8) -> str:
    """The first names in order, for a message, and how many more there are."""
    ordered = sorted(names)
    if not ordered:
        return "nothing"
    rest = len(ordered) - most
    return ", ".join(ordered[:most]) + (f" and {rest} more" if rest > 0 else "")
