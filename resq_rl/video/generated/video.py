"""Seeded video with labels, for training and measuring without any data."""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch

from resq_rl.errors import SettingsError
from resq_rl.video.clip import SPLITS, Clip, Split, check_split
from resq_rl.video.generated.scene import draw_scene
from resq_rl.video.generated.shapes import SHAPES

__all__ = ["GeneratedVideo"]

_SCENE, _NOISE, _CUTS = 0, 1, 2


@dataclass(frozen=True)
class GeneratedVideo:
    """Clips of textured shapes that move, turn, pause and hide each other over a ground full of distractions.

    A moving camera looks at a noise ground (label 0) with soft blobs, waving stripes, flickering patches,
    swaying foliage and changing light, none of which has a label. Three to six shapes of five classes move in
    front. Colour, texture, size and motion are drawn alike for all classes, so only the outline tells them
    apart. Lengths grow with the shorter side of the frame.

    Clip `index` of a split depends on the settings, the split and `index` alone, never on how many clips are
    asked for; splits never share a random stream. Changing `speed`, `noise` or `cuts` keeps what the first
    scene holds.

    Attributes:
        size: height and width in pixels, 32 or more each.
        frames: frames per clip.
        train: clips in the training split.
        validation: clips in the validation split.
        test: clips in the test split.
        seed: a number of 0 or more; another seed gives other clips.
        speed: factor on all motion and change; 0 gives stills under sensor noise.
        noise: standard deviation of the sensor noise, 1 being the range from black to white.
        cuts: probability that a clip changes its scene once or twice.
        shapes: least and greatest number of labelled shapes in a scene.
        distractors: least and greatest number of distractors in a scene, light aside.
        fps: frames per second that the clips declare.

    Raises:
        SettingsError: a setting out of its range.
    """

    size: tuple[int, int] = (96, 160)
    frames: int = 48
    train: int = 96
    validation: int = 24
    test: int = 48
    seed: int = 0
    speed: float = 1.0
    noise: float = 0.02
    cuts: float = 0.1
    shapes: tuple[int, int] = (3, 6)
    distractors: tuple[int, int] = (2, 4)
    fps: float = 24.0
    prefix: ClassVar[str] = "generated"  # of the names of clips
    _rendered: dict[tuple[Split, int], Clip] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("size", "shapes", "distractors"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        self._check("size", len(self.size) == 2 and min(self.size) >= 32, "two lengths of 32 pixels or more")
        self._check("frames", self.frames >= 1, "1 or more")
        for split in SPLITS:
            self._check(split, getattr(self, split) >= 0, "0 clips or more")
        self._check("seed", self.seed >= 0, "0 or more")
        self._check("speed", math.isfinite(self.speed) and self.speed >= 0, "a finite factor of 0 or more")
        self._check("noise", 0 <= self.noise <= 1, "between 0 and 1")
        self._check("cuts", 0 <= self.cuts <= 1, "a probability between 0 and 1")
        for name in ("shapes", "distractors"):
            limits = getattr(self, name)
            valid = len(limits) == 2 and 0 <= limits[0] <= limits[1]
            self._check(name, valid, "two counts, least and greatest, of 0 or more")
        self._check("fps", math.isfinite(self.fps) and self.fps > 0, "a positive number of frames per second")

    def _check(self, name: str, valid: bool, rule: str) -> None:
        if not valid:
            raise SettingsError(
                f"Setting {name} of {type(self).__name__} must be {rule}, got {getattr(self, name)!r}. Choose another "
                "value."
            )

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the label values."""
        return ("background", *SHAPES)

    def clips(self, split: Split) -> list[Clip]:
        """All clips of a split, rendered once per instance and then kept.

        Raises:
            VideoError: the split is unknown.
        """
        count: int = getattr(self, check_split(split))
        for index in range(count):
            if (split, index) not in self._rendered:
                self._rendered[split, index] = self.clip(split, index)
        return [self._rendered[split, index] for index in range(count)]

    def clip(self, split: Split, index: int) -> Clip:
        """Render clip `index` of a split, which may lie beyond the number that `clips` returns.

        Raises:
            VideoError: the split is unknown.
            SettingsError: the index is negative.
        """
        check_split(split)
        if index < 0:
            raise SettingsError(f"Clip index must be 0 or more, got {index}. Count clips from 0.")
        time = np.arange(self.frames, dtype=np.float64) * self.speed
        starts = self._scene_starts(split, index)
        frames, labels = np.empty((self.frames, 3, *self.size), dtype=np.uint8), []
        sensor = self._generator(split, index, _NOISE)
        for number, (start, stop) in enumerate(zip(starts, [*starts[1:], self.frames], strict=True)):
            rng = self._generator(split, index, _SCENE, number)
            light, own = self._render(rng, time[start:stop])
            frames[start:stop] = self._expose(light, sensor)
            labels.append(own)
        seed = f"-{self.seed}" if self.seed else ""
        return Clip(
            frames=torch.from_numpy(frames),
            labels=torch.from_numpy(np.concatenate(labels)),
            fps=self.fps,
            name=f"{self.prefix}{seed}/{split}-{index}",
            origin=f"{self!r} {split} {index}",
        )

    def _render(self, rng: np.random.Generator, time: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Draw a scene and render it: frames, RGB in [0, 1], and labels at each scene time."""
        return draw_scene(rng, self.size, self.shapes, self.distractors).render(time)

    def _expose(self, light: np.ndarray, sensor: np.random.Generator) -> np.ndarray:
        """The bytes that a noisy sensor reads from `light` in [0, 1], which is overwritten."""
        light *= 255.0
        light += 0.5
        if self.noise > 0:
            sigma = np.float32(255.0 * self.noise)
            for frame in light:
                frame += sigma * sensor.standard_normal(frame.shape, dtype=np.float32)
        return np.asarray(np.clip(light, 0.0, 255.0, out=light).astype(np.uint8))

    def _scene_starts(self, split: Split, index: int) -> list[int]:
        """First frame of every scene: 0 and the cuts."""
        rng = self._generator(split, index, _CUTS)
        chosen, count = rng.random() < self.cuts, int(rng.integers(1, 3))
        if not chosen or self.frames < 2:
            return [0]
        cuts = rng.choice(np.arange(1, self.frames), size=min(count, self.frames - 1), replace=False)
        return [0, *sorted(int(cut) for cut in cuts)]

    def _generator(self, split: Split, index: int, *purpose: int) -> np.random.Generator:
        """A stream of its own for each seed, split, clip and purpose."""
        key = (SPLITS.index(split), index, *purpose)
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence(self.seed, spawn_key=key)))
