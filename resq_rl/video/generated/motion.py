"""Closed-form motion over scene time, and the tileable noise that textures are made of.

Every path is a function of scene time alone. A clip samples it at `speed * frame`, so another speed plays the
very same scene faster or slower, and speed 0 is a still.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

__all__ = [
    "Activity",
    "Path",
    "Shake",
    "bounce",
    "draw_activity",
    "draw_path",
    "draw_shake",
    "tileable_noise",
]


def bounce(position: Float[np.ndarray, "t"], low: float, high: float) -> Float[np.ndarray, "t"]:
    """Fold positions on a line into [low, high], as if reflected at both ends."""
    span = max(high - low, 1e-6)
    phase = np.mod(position - low, 2.0 * span)
    return np.asarray(low + span - np.abs(phase - span))


@dataclass(frozen=True)
class Activity:
    """Alternating moves and pauses, repeated for ever; without lengths, one steady move.

    Attributes:
        lengths: lengths of move, pause, move, pause and so on within one cycle, in frames at speed 1.
        shift: where in the cycle time 0 lies, in frames at speed 1.
    """

    lengths: Float[np.ndarray, "n"]
    shift: float

    def progress(self, time: Float[np.ndarray, "t"]) -> Float[np.ndarray, "t"]:
        """Time spent moving from time 0 to each `time`; moves start and end smoothly, at mean rate 1."""
        if self.lengths.size == 0:
            return time
        return np.asarray(self._moved(time + self.shift) - self._moved(np.asarray([self.shift])))

    def _moved(self, time: Float[np.ndarray, "t"]) -> Float[np.ndarray, "t"]:
        moves = np.where(np.arange(self.lengths.size) % 2 == 0, self.lengths, 0.0)
        ends = np.cumsum(self.lengths)
        before = np.cumsum(moves) - moves
        turns, within = np.divmod(time, ends[-1])
        segment = np.minimum(np.searchsorted(ends, within, side="right"), self.lengths.size - 1)
        part = 1.0 - (ends[segment] - within) / self.lengths[segment]
        smooth = part * part * (3.0 - 2.0 * part)
        return np.asarray(turns * moves.sum() + before[segment] + moves[segment] * smooth)


def draw_activity(rng: np.random.Generator, pausing: float) -> Activity:
    """Draw moves of 10 to 26 frames with pauses of 6 to 18 between; steady with probability 1 - `pausing`."""
    lengths = np.stack([rng.uniform(10, 26, size=5), rng.uniform(6, 18, size=5)], axis=1).ravel()
    shift = rng.uniform(0.0, float(lengths.sum()))
    return Activity(lengths if rng.random() < pausing else np.zeros(0), shift)


@dataclass(frozen=True)
class Path:
    """A straight or curved way through the frame, in (y, x) pixels.

    Attributes:
        start: position at progress 0.
        velocity: pixels per frame of progress.
        curve: radii of the loop drawn around the straight way, in pixels.
        rate: loop angle per frame of progress, in radians.
        phase: loop angles at progress 0, in radians.
    """

    start: tuple[float, float]
    velocity: tuple[float, float]
    curve: tuple[float, float]
    rate: float
    phase: tuple[float, float]

    def at(self, progress: Float[np.ndarray, "t"]) -> tuple[Float[np.ndarray, "t"], Float[np.ndarray, "t"]]:
        """Positions y and x, not yet folded into any frame."""
        y, x = (
            self.start[axis]
            + self.velocity[axis] * progress
            + self.curve[axis] * np.sin(self.rate * progress + self.phase[axis])
            for axis in (0, 1)
        )
        return y, x


def draw_path(rng: np.random.Generator, size: tuple[int, int], speed: tuple[float, float], unit: float) -> Path:
    """Draw a way that starts anywhere in a frame of `size`, at a speed in pixels per frame at 96 rows.

    Args:
        rng: source of the draws.
        size: height and width of the frame in pixels.
        speed: smallest and largest speed.
        unit: pixels of this frame per pixel of a frame of 96 rows.
    """
    angle, pace = rng.uniform(0, 2 * math.pi), rng.uniform(*speed) * unit
    curved = rng.random() < 0.5
    radius = rng.uniform(4, 12, size=2) * unit if curved else np.zeros(2)
    phase = rng.uniform(0, 2 * math.pi, size=2)
    return Path(
        start=(rng.uniform(0, size[0]), rng.uniform(0, size[1])),
        velocity=(pace * math.sin(angle), pace * math.cos(angle)),
        curve=(float(radius[0]), float(radius[1])),
        rate=rng.uniform(0.08, 0.2),
        phase=(float(phase[0]), float(phase[1])),
    )


@dataclass(frozen=True)
class Shake:
    """The tremble of a camera in a hand: a few sine waves per axis.

    Attributes:
        amplitudes: pixels, (axis, wave).
        rates: radians per frame, (axis, wave).
        phases: radians, (axis, wave).
    """

    amplitudes: Float[np.ndarray, "2 n"]
    rates: Float[np.ndarray, "2 n"]
    phases: Float[np.ndarray, "2 n"]

    def at(self, time: Float[np.ndarray, "t"]) -> tuple[Float[np.ndarray, "t"], Float[np.ndarray, "t"]]:
        """Offsets y and x in pixels."""
        waves = np.sin(time[:, None, None] * self.rates + self.phases) * self.amplitudes
        offsets = waves.sum(axis=2)
        return offsets[:, 0], offsets[:, 1]


def draw_shake(rng: np.random.Generator, amplitude: float) -> Shake:
    """Draw a shake of about `amplitude` pixels with periods of 4 to 24 frames."""
    rates = 2 * math.pi / rng.uniform(4, 24, size=(2, 3))
    amplitudes = amplitude * rng.uniform(0.2, 0.8, size=(2, 3))
    return Shake(amplitudes, rates, rng.uniform(0, 2 * math.pi, size=(2, 3)))


def tileable_noise(
    rng: np.random.Generator, size: tuple[int, int], cell: float, octaves: int, roughness: float = 0.5
) -> Float[np.ndarray, "h w"]:
    """Smooth value noise in [0, 1] that continues over its own edges.

    Each octave is a random grid, interpolated with smoothstep weights; the next has cells half as wide and
    `roughness` times the weight.

    Args:
        rng: source of the draws.
        size: height and width in pixels.
        cell: width of the cells of the first octave, in pixels.
        octaves: number of octaves.
        roughness: weight of each octave relative to the one before it.
    """
    total = np.zeros(size, dtype=np.float32)
    for octave in range(octaves):
        cells = [max(2, round(length * 2**octave / cell)) for length in size]
        grid = rng.uniform(-1, 1, size=cells).astype(np.float32)
        rows, columns = (_interpolation(length, count) for length, count in zip(size, cells, strict=True))
        total += roughness**octave * (rows @ grid @ columns.T)
    low, high = float(total.min()), float(total.max())
    return (total - low) / max(high - low, 1e-6)


def _interpolation(length: int, count: int) -> Float[np.ndarray, "length count"]:
    """Weights that carry `count` grid values on a circle to `length` pixels."""
    position = np.arange(length) * (count / length)
    left = position.astype(np.int64)
    part = (position - left).astype(np.float32)
    part = part * part * (3.0 - 2.0 * part)
    weights = np.zeros((length, count), dtype=np.float32)
    pixels = np.arange(length)
    weights[pixels, left % count] += 1.0 - part
    weights[pixels, (left + 1) % count] += part
    return weights
