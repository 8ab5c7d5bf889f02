"""One scene of generated video: a camera over a textured ground, distractors, labelled shapes and light."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8

from resq_rl.video.generated.distractors import Distractor, Light, draw_distractor, draw_light
from resq_rl.video.generated.motion import Activity, Shake, draw_activity, draw_shake, tileable_noise
from resq_rl.video.generated.shapes import SHAPES, MovingShape, draw_colours, draw_shape

__all__ = ["Camera", "Scene", "draw_scene"]


@dataclass(frozen=True)
class Camera:
    """A view that drifts, trembles and zooms.

    Attributes:
        velocity: pixels per frame of progress, (y, x).
        activity: when it drifts.
        shake: its tremble.
        zoom: largest relative change of scale.
        zoom_rate: radians of the change of scale per frame.
        phase: radians at time 0.
    """

    velocity: tuple[float, float]
    activity: Activity
    shake: Shake
    zoom: float
    zoom_rate: float
    phase: float

    def view(self, time: Float[np.ndarray, "t"]) -> Float[np.ndarray, "5 t"]:
        """Drift y and x, shake y and x, all in pixels, and scale at each scene time."""
        progress = self.activity.progress(time)
        scale = 1.0 + self.zoom * np.sin(self.zoom_rate * time + self.phase)
        drift = [pace * progress for pace in self.velocity]
        return np.stack([*drift, *self.shake.at(time), scale])


@dataclass(frozen=True)
class Scene:
    """Everything that a clip shows between two cuts.

    Attributes:
        size: height and width in pixels.
        ground: background texture, RGB in [0, 1], tileable.
        camera: the view of it.
        distractors: unlabelled patches, first drawn first.
        shapes: labelled objects, first drawn first, so later ones hide earlier ones.
        light: gain over all.
    """

    size: tuple[int, int]
    ground: Float[np.ndarray, "3 gh gw"]
    camera: Camera
    distractors: tuple[Distractor, ...]
    shapes: tuple[MovingShape, ...]
    light: Light

    def render(self, time: Float[np.ndarray, "t"]) -> tuple[Float[np.ndarray, "t 3 h w"], UInt8[np.ndarray, "t h w"]]:
        """Frames, RGB in [0, 1] up to bright light, and labels at each scene time."""
        frames = np.empty((len(time), 3, *self.size), dtype=np.float32)
        labels = np.zeros((len(time), *self.size), dtype=np.uint8)
        poses = [(shape, shape.pose(time, self.size)) for shape in self.shapes]
        for step, shake in self.backdrop(frames, time):
            for shape, pose in poses:
                shape.paint_at(frames[step], labels[step], pose, step, shake)
        return frames, labels

    def backdrop(
        self, frames: Float[np.ndarray, "t 3 h w"], time: Float[np.ndarray, "t"]
    ) -> Iterator[tuple[int, tuple[float, float]]]:
        """Paint the background of each frame, and then the light, over the shapes that the caller painted meanwhile.

        Yields:
            The frame whose shapes are to be painted, and the tremble (y, x) in pixels by which the camera misses them.
        """
        view = self.camera.view(time)
        shake = view[2:4]
        seen = (view[0] + shake[0], view[1] + shake[1])
        patches = [(patch, *patch.centres(time, self.size, seen)) for patch in self.distractors]
        for step, moment in enumerate(time.tolist()):
            frame = frames[step]
            self._paint_ground(frame, float(seen[0][step]), float(seen[1][step]), float(view[4, step]))
            for patch, y, x in patches:
                patch.paint(frame, (float(y[step]), float(x[step])), moment)
            yield step, (float(shake[0, step]), float(shake[1, step]))
            self.light.apply(frame, moment)

    def _paint_ground(self, frame: Float[np.ndarray, "3 h w"], y: float, x: float, scale: float) -> None:
        """Sample the ground bilinearly, first along rows and then along columns."""
        height, width = self.size
        rows, row_part = _samples(height, y, scale, self.ground.shape[1])
        columns, column_part = _samples(width, x, scale, self.ground.shape[2])
        wide = self.ground.take(columns, axis=2)
        wide += column_part * (self.ground.take(columns + 1, axis=2, mode="wrap") - wide)
        np.take(wide, rows, axis=1, out=frame, mode="clip")
        frame += row_part[:, None] * (wide.take(rows + 1, axis=1, mode="wrap") - frame)


def _samples(length: int, offset: float, scale: float, period: int) -> tuple[np.ndarray, Float[np.ndarray, "length"]]:
    """Texture cells under the pixels of one axis, and how far each pixel lies towards the next cell."""
    position = (np.arange(length) - length / 2) * scale + length / 2 + offset
    cell = np.floor(position)
    return np.mod(cell.astype(np.intp), period), (position - cell).astype(np.float32)


def draw_scene(
    rng: np.random.Generator, size: tuple[int, int], shapes: tuple[int, int], distractors: tuple[int, int]
) -> Scene:
    """Draw a scene of `size` pixels; `shapes` and `distractors` are the least and greatest number of them."""
    unit = min(size) / 96
    count = int(rng.integers(shapes[0], shapes[1] + 1))
    labels = rng.integers(1, len(SHAPES) + 1, size=count)
    return Scene(
        size=size,
        ground=_draw_ground(rng, size, unit),
        camera=_draw_camera(rng, unit),
        distractors=tuple(
            draw_distractor(rng, size, unit) for _ in range(rng.integers(distractors[0], distractors[1] + 1))
        ),
        shapes=tuple(draw_shape(rng, int(label), size, unit) for label in labels),
        light=draw_light(rng),
    )


def _draw_camera(rng: np.random.Generator, unit: float) -> Camera:
    """A tripod (35%), a hand (25%), a slow drift (20%) or a pan (20%), some of them with a little zoom."""
    kind = rng.choice(4, p=[0.35, 0.25, 0.2, 0.2])
    shake = (0.0, 0.5, 0.15, 0.0)[kind] * unit
    pace = (0.0, 0.05, rng.uniform(0.15, 0.5), rng.uniform(0.8, 2.0))[kind] * unit
    angle = rng.uniform(0, 2 * math.pi)
    zoom = rng.uniform(0.03, 0.1) if kind and rng.random() < 0.3 else 0.0
    return Camera(
        velocity=(0.5 * pace * math.sin(angle), pace * math.cos(angle)),
        activity=draw_activity(rng, pausing=0.6 if kind == 3 else 0.0),
        shake=draw_shake(rng, shake),
        zoom=zoom,
        zoom_rate=rng.uniform(0.05, 0.12),
        phase=rng.uniform(0, 2 * math.pi),
    )


def _draw_ground(rng: np.random.Generator, size: tuple[int, int], unit: float) -> Float[np.ndarray, "3 gh gw"]:
    """Three colours blended by two fields of noise, with a grain of brightness; twice the frame's size."""
    extent = (2 * size[0], 2 * size[1])
    first = tileable_noise(rng, extent, cell=48 * unit, octaves=4)
    second = tileable_noise(rng, extent, cell=28 * unit, octaves=3)
    grain = tileable_noise(rng, extent, cell=6 * unit, octaves=2) - 0.5
    first = np.clip(0.5 + rng.uniform(1.2, 3.0) * (first - 0.5), 0.0, 1.0)
    colours = np.concatenate([draw_colours(rng, (0.1, 0.45)), draw_colours(rng, (0.1, 0.45))[:1]])
    low, high, other = colours[:, :, None, None]
    ground = low + first * (high - low)
    ground += 0.7 * second * (other - ground) + rng.uniform(0.05, 0.2) * grain
    return np.asarray(np.clip(ground, 0.0, 1.0), dtype=np.float32)
