"""Windows that follow a labelled object, as the crop of a tracker does."""

import numpy as np
from jaxtyping import Bool, Float, UInt8

from resq_rl.video.clip import IGNORE
from resq_rl.video.images import Box

__all__ = ["follow", "object_box"]

_LEAST_HEIGHT = 16.0


def object_box(labels: UInt8[np.ndarray, "h w"], thickness: int = 1) -> Box | None:
    """Left, top, right and bottom edge of all labelled objects together, in pixels; None where nothing is labelled.

    Parts into which no square of `thickness` pixels fits, such as ropes, count only where there are no others.
    """
    box = _extent((labels != 0) & (labels != IGNORE))
    if box is None or thickness <= 1:
        return box
    from scipy.ndimage import maximum_filter1d, minimum_filter1d  # takes half a second, and is seldom needed

    left, top, right, bottom = (int(edge) for edge in box)
    inner = labels[top:bottom, left:right]
    marked = ((inner != 0) & (inner != IGNORE)).astype(np.uint8)
    for axis in (0, 1):
        marked = minimum_filter1d(marked, thickness, axis=axis, mode="constant")
    back = -1 if thickness % 2 == 0 else 0  # an even square has its centre beside the middle, on the other side now
    for axis in (0, 1):
        marked = maximum_filter1d(marked, thickness, axis=axis, mode="constant", origin=back)
    thick = _extent(marked > 0)
    if thick is None:
        return box
    return left + thick[0], top + thick[1], left + thick[2], top + thick[3]


def _extent(marked: Bool[np.ndarray, "h w"]) -> Box | None:
    rows, columns = (np.flatnonzero(marked.any(axis=axis)) for axis in (1, 0))
    if rows.size == 0:
        return None
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def follow(boxes: list[Box | None], factor: float, aspect: float, smoothing: float = 4.0) -> list[Box]:
    """A window for each frame: the object's box, `factor` times as large, smoothed over time.

    All windows have the same proportions, and are high enough for the object's height and for its width. While the
    object is hidden, the window moves on a straight line between the frames before and after. Its centre and the
    logarithm of its height are then averaged over time with Gaussian weights, so that the window looks some frames
    ahead.

    Args:
        boxes: the object's box in each frame, at least one of them not None.
        factor: height of the window as a multiple of the object's.
        aspect: height of the window divided by its width; 1 for a square.
        smoothing: standard deviation of the Gaussian weights, in frames.
    """
    steps = np.arange(len(boxes))
    seen = np.array([step for step, box in zip(steps, boxes, strict=True) if box is not None])
    left, top, right, bottom = np.array([box for box in boxes if box is not None], dtype=np.float64).T
    height = np.maximum(factor * np.maximum(bottom - top, (right - left) * aspect), _LEAST_HEIGHT)
    tracks = ((top + bottom) / 2, (left + right) / 2, np.log(height))
    y, x, size = (_smooth(np.interp(steps, seen, track), smoothing) for track in tracks)
    down, across = np.exp(size) / 2, np.exp(size) / 2 / aspect
    edges = np.stack([x - across, y - down, x + across, y + down], axis=1)
    return [(row[0], row[1], row[2], row[3]) for row in edges.tolist()]


def _smooth(track: Float[np.ndarray, "t"], sigma: float) -> Float[np.ndarray, "t"]:
    """Gaussian average over time; the first and the last value stand for those beyond them."""
    if sigma <= 0:
        return track
    reach = int(np.ceil(3 * sigma))
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    padded = np.pad(track, reach, mode="edge")
    return np.convolve(padded, weights / weights.sum(), mode="valid")
