"""What the readers of labelled points share: choosing the points, and the extent of those that count."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float32

from resq_rl.errors import SettingsError
from resq_rl.video.assembly import ClipFrames
from resq_rl.video.datasets.base import LabelledVideo
from resq_rl.video.framing import Framing
from resq_rl.video.images import Box
from resq_rl.video.parts import listed

__all__ = ["PointVideo", "points_box"]


@dataclass(frozen=True)
class PointVideo(LabelledVideo):
    """A dataset whose labels are the points of people.

    Attributes:
        points: names of the points wanted, in that order; None for all of them.
        crop: height of a window that follows the person, as a multiple of the person's; None for whole frames.
        clip_frames: cuts a person's frames into clips of this many, and drops a shorter rest; None for one clip.
            Or lengths by split, such as {train: 48}.
    """

    points: Sequence[str] | None = None
    crop: float | None = None
    clip_frames: ClipFrames = None

    names: ClassVar[tuple[str, ...]]  # of all points of the dataset

    def __post_init__(self) -> None:
        unknown = sorted(set(self.points or ()) - set(self.names))
        if unknown or (self.points is not None and not self.points):
            raise SettingsError(
                f"Setting points of {self._reader} must name some of {', '.join(self.names)}, got {listed(unknown)} "
                "besides. Correct the names, or set None for all."
            )
        super().__post_init__()

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the points in the order of the labels."""
        return tuple(self.points or self.names)

    @property
    def framing(self) -> Framing:
        """Windows that follow the person, or whole frames stretched to `size`."""
        return Framing(self.size, crop=self.crop, reader=self._reader)

    def _order(self) -> list[int]:
        """The places of the wanted points among all points of the dataset."""
        return [self.names.index(name) for name in self.classes]


def points_box(points: Float32[np.ndarray, "k 3"]) -> Box | None:
    """Left, top, right and bottom edge of the points that count, in pixels; None where none does."""
    known = points[points[:, 2] > 0, :2]
    if not len(known):
        return None
    (left, top), (right, bottom) = known.min(0), known.max(0) + 1
    return float(left), float(top), float(right), float(bottom)
