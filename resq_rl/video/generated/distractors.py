"""Unlabelled change in generated video: blobs, stripes, flicker, foliage and light.

None of them has a hard outline, by which a network can tell them from the labelled shapes.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float

from resq_rl.video.generated.motion import Activity, Path, draw_activity, draw_path, tileable_noise
from resq_rl.video.generated.shapes import draw_colours, window

__all__ = ["Distractor", "Light", "draw_distractor", "draw_light"]

Kind = Literal["blob", "stripes", "flicker", "foliage"]


@dataclass(frozen=True)
class Distractor:
    """A soft patch of the background that changes by itself.

    Attributes:
        kind: a plain "blob" that wanders, "stripes" that wave, a "flicker" between two colours, or
            swaying "foliage".
        radius: half height and half width in pixels.
        strength: largest opacity in [0, 1].
        rate: radians of its own change per frame.
        phase: radians at time 0.
        waves: radians per pixel across stripes, or the sway of foliage in pixels.
        colours: two RGB colours in [0, 1].
        texture: the share of the second colour in foliage, tileable.
        activity: when it moves.
        path: its way, before the frame wraps it around.
    """

    kind: Kind
    radius: tuple[float, float]
    strength: float
    rate: float
    phase: float
    waves: float
    colours: Float[np.ndarray, "2 3"]
    texture: Float[np.ndarray, "n n"]
    activity: Activity
    path: Path

    def centres(
        self, time: Float[np.ndarray, "t"], size: tuple[int, int], view: tuple[np.ndarray, np.ndarray]
    ) -> tuple[Float[np.ndarray, "t"], Float[np.ndarray, "t"]]:
        """Centres y and x at each scene time, seen by a camera at `view`.

        What leaves the frame on one side returns on the other.
        """
        progress = self.activity.progress(time)
        y, x = (
            np.mod(way - seen + radius, length + 2 * radius) - radius
            for way, seen, radius, length in zip(self.path.at(progress), view, self.radius, size, strict=True)
        )
        return y, x

    def paint(self, frame: Float[np.ndarray, "3 h w"], centre: tuple[float, float], time: float) -> None:
        """Draw the patch over `frame` as it is at scene time `time`."""
        top, bottom = window(centre[0], self.radius[0], frame.shape[1])
        left, right = window(centre[1], self.radius[1], frame.shape[2])
        if top >= bottom or left >= right:
            return
        y = (np.arange(top, bottom) - centre[0]).astype(np.float32)
        x = (np.arange(left, right) - centre[1]).astype(np.float32)
        rest = 1.0 - np.square(y / self.radius[0])[:, None] - np.square(x / self.radius[1])[None, :]
        np.maximum(rest, 0.0, out=rest)
        fade = self.strength * rest * (2.0 - rest)
        first, second = self.colours
        mix = self._mix(y, x, time)
        region = frame[:, top:bottom, left:right]
        if isinstance(mix, float):
            region += fade * ((first + mix * (second - first))[:, None, None] - region)
        else:
            region += fade * (first[:, None, None] + mix * (second - first)[:, None, None] - region)

    def _mix(
        self, y: Float[np.ndarray, "h"], x: Float[np.ndarray, "w"], time: float
    ) -> float | Float[np.ndarray, "h w"]:
        """Share of the second colour at each pixel of the patch, or one share for all."""
        turn = self.rate * time + self.phase
        if self.kind == "blob":
            return 0.0
        if self.kind == "flicker":
            return 0.5 + 0.5 * math.tanh(3.0 * math.sin(turn))
        if self.kind == "stripes":
            bend = (1.5 * np.sin(0.12 * y + turn)).astype(np.float32)[:, None] + (self.waves * x)[None, :]
            return np.asarray(0.5 + 0.5 * np.sin(bend))
        cells = self.texture.shape[0]
        sway = self.waves * np.sin(0.15 * y + turn)
        rows = np.mod(np.floor(y).astype(np.intp), cells)[:, None]
        columns = np.mod(np.floor(x[None, :] + sway[:, None]).astype(np.intp), cells)
        return np.asarray(self.texture[rows, columns])


def draw_distractor(rng: np.random.Generator, size: tuple[int, int], unit: float) -> Distractor:
    """Draw a distractor for a frame of `size`, `unit` pixels per pixel at 96 rows."""
    kind: Kind = get_args(Kind)[rng.integers(4)]
    height, width = rng.uniform(15, 36, size=2) * unit
    return Distractor(
        kind=kind,
        radius=(float(height), float(width)),
        strength=rng.uniform(0.7, 0.95),
        rate=rng.uniform(0.25, 1.1),
        phase=rng.uniform(0, 2 * math.pi),
        waves=rng.uniform(1.5, 4.0) * unit if kind == "foliage" else rng.uniform(0.35, 0.8) / unit,
        colours=draw_colours(rng, (0.3, 0.7)),
        texture=tileable_noise(rng, (64, 64), cell=8 * unit, octaves=2),
        activity=draw_activity(rng, pausing=0.4),
        path=draw_path(rng, size, (0.5, 2.5) if kind == "blob" else (0.0, 0.4), unit),
    )


@dataclass(frozen=True)
class Light:
    """Lighting that changes over time, as a gain on every pixel.

    Attributes:
        kind: "none"; "pulse", all pixels brighten and darken; "lamp", all switch between two levels;
            "beam", a soft bright column sweeps over the frame.
        gain: largest relative change of brightness.
        rate: radians per frame.
        phase: radians at time 0.
    """

    kind: Literal["none", "pulse", "lamp", "beam"]
    gain: float
    rate: float
    phase: float

    def apply(self, frame: Float[np.ndarray, "3 h w"], time: float) -> None:
        """Multiply `frame` by the gain at scene time `time`."""
        turn = self.rate * time + self.phase
        if self.kind == "none":
            return
        if self.kind == "pulse":
            frame *= 1.0 + self.gain * math.sin(turn)
        elif self.kind == "lamp":
            frame *= 1.0 + self.gain * math.tanh(6.0 * math.sin(turn))
        else:
            width = frame.shape[2]
            offset = (np.arange(width) - width * (0.5 + 0.7 * math.sin(turn))) / (0.15 * width)
            frame *= (1.0 + 2.0 * self.gain * np.exp(-offset * offset)).astype(np.float32)


def draw_light(rng: np.random.Generator) -> Light:
    """Draw the lighting of a scene: steady in half of them."""
    steady, kind = rng.random() < 0.5, rng.integers(3)
    gain, rate, phase = rng.uniform(0.12, 0.3), rng.uniform(0.1, 0.3), rng.uniform(0, 2 * math.pi)
    kinds: tuple[Literal["pulse"], Literal["lamp"], Literal["beam"]] = ("pulse", "lamp", "beam")
    return Light("none" if steady else kinds[kind], gain, rate, phase)
