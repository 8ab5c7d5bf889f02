"""Labelled points of people: windows around them, and points brought along."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from resq_rl.errors import SettingsError, VideoError
from resq_rl.video.assembly import Decoded, cut_clips
from resq_rl.video.clip import Clip
from resq_rl.video.images import Box, read_frame, resize_frame
from resq_rl.video.parts import Part, listed
from resq_rl.video.tracking import follow

__all__ = ["Person", "choose_points", "person_clips", "points_box"]


@dataclass(frozen=True)
class Person:
    """One person in consecutive frames of a video.

    Attributes:
        name: of the clips.
        frames: names of the frames' files, relative to the root of the dataset.
        points: x, y and whether it counts, of each point in each frame, (t, k, 3), in pixels of the source from the
            centre of its upper left one.
        boxes: extent in each frame; None where it is not known.
        first: number of the first frame within the video.
        fps: frames per second.
    """

    name: str
    frames: Sequence[str]
    points: Float32[np.ndarray, "t k 3"]
    boxes: Sequence[Box | None]
    first: int
    fps: float


def choose_points(names: Sequence[str], wanted: Sequence[str] | None, reader: str) -> list[int]:
    """Where the wanted points stand among all; None for all of them.

    Raises:
        SettingsError: there is no point of a name.
    """
    unknown = sorted(set(wanted or ()) - set(names))
    if unknown or (wanted is not None and not wanted):
        raise SettingsError(
            f"Setting points of {reader} must name some of {', '.join(names)}, got {listed(unknown)} besides. "
            "Correct the names, or set None for all."
        )
    return [names.index(name) for name in wanted or names]


def points_box(points: Float32[np.ndarray, "k 3"]) -> Box | None:
    """Left, top, right and bottom edge of the points that count, in pixels; None without any."""
    known = points[points[:, 2] > 0, :2]
    if not len(known):
        return None
    (left, top), (right, bottom) = known.min(0), known.max(0) + 1
    return float(left), float(top), float(right), float(bottom)


def person_clips(
    person: Person, root: Path, size: tuple[int, int] | None, crop: float | None, clip_frames: int | None
) -> list[Clip]:
    """Decode a person's frames, or the window of them that follows the person, and bring the points along.

    Args:
        person: whose frames.
        root: folder of the dataset.
        size: height and width in pixels that frames are brought to; None for the size of the source.
        crop: height of the window as a multiple of the person's; None for full frames.
        clip_frames: cuts the frames into clips of so many; None for one clip.

    Raises:
        VideoError: a frame is missing, damaged or of another size; or the person is nowhere to be cropped to.
    """
    windows: Sequence[Box | None] = [None] * len(person.frames)
    if crop is not None and size is not None:
        if not any(person.boxes):
            raise VideoError(f"No labelled point to crop around in {person.name}. Leave it out, or set crop to None.")
        windows = follow(list(person.boxes), crop, size[0] / size[1])
    frames, points, extent = [], [], None
    for name, labels, window in zip(person.frames, person.points, windows, strict=True):
        image = read_frame(root / name)
        extent = extent or image.size
        if image.size != extent:
            raise VideoError(
                f"Frame {root / name} must be of the size of the ones before, {extent[0]}x{extent[1]}, got "
                f"{image.width}x{image.height}. Copy it again."
            )
        frames.append(resize_frame(image, size, window))
        points.append(_moved(labels, window or (0.0, 0.0, float(extent[0]), float(extent[1])), frames[-1].shape[:2]))
    decoded = Decoded(
        frames=frames,
        labels=points,
        part=Part(person.name, person.first, None if person.first == 0 else person.first + len(frames)),
        first=person.first,
        stride=1,
        fps=person.fps,
        origin=str(root / person.frames[0]),
    )
    return cut_clips(decoded, clip_frames)


def _moved(points: Float32[np.ndarray, "k 3"], window: Box, size: tuple[int, ...]) -> Float32[np.ndarray, "k 3"]:
    """Points in pixels of a window that was brought to `size`; those outside do not count."""
    left, top, right, bottom = window
    height, width = size
    scale = np.array([width / (right - left), height / (bottom - top)])
    place = (points[:, :2] + 0.5 - np.array([left, top])) * scale
    inside = ((place >= 0) & (place < np.array([width, height]))).all(1)
    return np.concatenate([place - 0.5, (points[:, 2] * inside)[:, None]], 1).astype(np.float32)
