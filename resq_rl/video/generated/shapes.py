"""The labelled objects of generated video: five textured shapes that move, turn and grow."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, UInt8

from resq_rl.video.generated.motion import Activity, Path, bounce, draw_activity, draw_path, tileable_noise

__all__ = ["SHAPES", "MovingShape", "Pose", "draw_colours", "draw_shape", "window"]

Array = Float[np.ndarray, "..."]


def _disk(u: Array, v: Array) -> Array:
    return np.asarray(1.0 - np.sqrt(u * u + v * v))


def _box(u: Array, v: Array) -> Array:
    return np.asarray(np.minimum(0.92 - np.abs(u), 0.72 - np.abs(v)))


def _triangle(u: Array, v: Array) -> Array:
    low = np.maximum(0.866 * np.abs(u) + 0.5 * v, -v)
    return np.asarray(0.64 - low)


def _cross(u: Array, v: Array) -> Array:
    across, down = np.abs(u), np.abs(v)
    return np.asarray(np.minimum(1.0 - np.maximum(across, down), 0.34 - np.minimum(across, down)))


def _ring(u: Array, v: Array) -> Array:
    return np.asarray(0.24 - np.abs(np.sqrt(u * u + v * v) - 0.76))


SHAPES: dict[str, Callable[[Array, Array], Array]] = {
    "disk": _disk,
    "box": _box,
    "triangle": _triangle,
    "cross": _cross,
    "ring": _ring,
}
"""Distance to the edge, positive inside, over coordinates in which the shape has a radius of about 1."""

REACH = 1.3
"""No shape reaches farther than this from its centre, in radii."""


def window(centre: float, reach: float, length: int) -> tuple[int, int]:
    """First and one past the last pixel within `reach` of `centre`, cut to a line of `length` pixels."""
    return max(0, math.floor(centre - reach)), min(length, math.ceil(centre + reach) + 1)


def draw_colours(rng: np.random.Generator, contrast: tuple[float, float]) -> Float[np.ndarray, "2 3"]:
    """Two RGB colours in [0, 1] of any hue, their brightness apart by an amount drawn from `contrast`."""
    middle = rng.uniform(0.25, 0.75)
    half = rng.uniform(*contrast) / 2 * rng.choice([-1.0, 1.0])
    tints = rng.uniform(-0.3, 0.3, size=(2, 3))
    tints -= tints.mean(axis=1, keepdims=True)
    brightness = np.array([[middle - half], [middle + half]])
    return np.clip(brightness + tints, 0.02, 0.98).astype(np.float32)


@dataclass(frozen=True)
class Pose:
    """Where a shape is in each frame: centre (y, x) and radius in pixels, angle in radians, each (t,)."""

    y: Float[np.ndarray, "t"]
    x: Float[np.ndarray, "t"]
    radius: Float[np.ndarray, "t"]
    angle: Float[np.ndarray, "t"]


@dataclass(frozen=True)
class MovingShape:
    """One labelled object.

    Attributes:
        label: class index, 1 for the first of `SHAPES`.
        edge: distance to the edge over the shape's own coordinates.
        radius: mean radius in pixels.
        swell: share by which the radius grows and shrinks.
        swell_rate: radians of this change per frame of progress.
        angle: angle at progress 0, in radians.
        spin: radians per frame of progress.
        activity: when it moves.
        path: the way of its centre before it bounces off the frame.
        fill: texture over the shape's own coordinates from -REACH to REACH, RGB in [0, 1].
    """

    label: int
    edge: Callable[[Array, Array], Array]
    radius: float
    swell: float
    swell_rate: float
    angle: float
    spin: float
    activity: Activity
    path: Path
    fill: Float[np.ndarray, "3 n n"]

    def pose(self, time: Float[np.ndarray, "t"], size: tuple[int, int]) -> Pose:
        """Place the shape at each scene time in a frame of `size`; its centre stays inside."""
        progress = self.activity.progress(time)
        y, x = self.path.at(progress)
        margin = 0.4 * self.radius
        return Pose(
            y=bounce(y, margin, size[0] - 1 - margin),
            x=bounce(x, margin, size[1] - 1 - margin),
            radius=self.radius * (1.0 + self.swell * np.sin(self.swell_rate * progress + self.angle)),
            angle=self.angle + self.spin * progress,
        )

    def paint_at(
        self,
        frame: Float[np.ndarray, "3 h w"],
        labels: UInt8[np.ndarray, "h w"],
        pose: Pose,
        step: int,
        shake: tuple[float, float],
    ) -> None:
        """Draw the shape as it is in frame `step` of its `pose`, missed by the camera by `shake` (y, x) pixels."""
        centre = float(pose.y[step] - shake[0]), float(pose.x[step] - shake[1])
        self.paint(frame, labels, centre, float(pose.radius[step]), float(pose.angle[step]))

    def paint(
        self,
        frame: Float[np.ndarray, "3 h w"],
        labels: UInt8[np.ndarray, "h w"],
        centre: tuple[float, float],
        radius: float,
        angle: float,
    ) -> None:
        """Draw the shape over `frame` with a soft edge, and its label where it covers half a pixel."""
        top, bottom = window(centre[0], REACH * radius + 1, frame.shape[1])
        left, right = window(centre[1], REACH * radius + 1, frame.shape[2])
        if top >= bottom or left >= right:
            return
        rows = ((np.arange(top, bottom) - centre[0]) / radius).astype(np.float32)[:, None]
        columns = ((np.arange(left, right) - centre[1]) / radius).astype(np.float32)[None, :]
        cosine, sine = math.cos(angle), math.sin(angle)
        u, v = cosine * columns + sine * rows, cosine * rows - sine * columns
        alpha = np.clip(self.edge(u, v) * radius + 0.5, 0.0, 1.0)
        cells = self.fill.shape[1]
        scale = cells / (2 * REACH)
        index = ((v + REACH) * scale).astype(np.intp).clip(0, cells - 1) * cells
        index += ((u + REACH) * scale).astype(np.intp).clip(0, cells - 1)
        region = frame[:, top:bottom, left:right]
        region += alpha * (self.fill.reshape(3, -1)[:, index] - region)
        labels[top:bottom, left:right][alpha > 0.5] = self.label


def draw_shape(rng: np.random.Generator, label: int, size: tuple[int, int], unit: float) -> MovingShape:
    """Draw an object of class `label` (1 to 5) for a frame of `size`, `unit` pixels per pixel at 96 rows."""
    radius = 0.5 * rng.uniform(11, 46) * unit
    parked = rng.random() < 0.15
    path = draw_path(rng, size, (0.4, 2.6), unit)
    if parked:
        path = replace(path, velocity=(0.0, 0.0), curve=(0.0, 0.0))
    activity = draw_activity(rng, pausing=0.6)
    return MovingShape(
        label=label,
        edge=list(SHAPES.values())[label - 1],
        radius=radius,
        swell=0.0 if parked else rng.uniform(0.0, 0.18),
        swell_rate=rng.uniform(0.05, 0.2),
        angle=rng.uniform(0, 2 * math.pi),
        spin=0.0 if parked else rng.uniform(-0.09, 0.09),
        activity=activity,
        path=path,
        fill=_fill(rng, 64),
    )


def _fill(rng: np.random.Generator, cells: int) -> Float[np.ndarray, "3 n n"]:
    """Stripes, a gradient or noise between two colours."""
    axis = np.linspace(-1, 1, cells, dtype=np.float32)
    angle = rng.uniform(0, 2 * math.pi)
    along = axis[None, :] * math.cos(angle) + axis[:, None] * math.sin(angle)
    kind = rng.integers(3)
    if kind == 0:
        mix = 0.5 + 0.5 * np.sin(along * rng.uniform(5, 14) + angle)
    elif kind == 1:
        mix = np.clip(0.5 + 0.5 * along, 0.0, 1.0)
    else:
        mix = tileable_noise(rng, (cells, cells), cell=24, octaves=2)
    first, second = draw_colours(rng, (0.15, 0.5))
    return np.asarray(first[:, None, None] + mix * (second - first)[:, None, None], dtype=np.float32)
