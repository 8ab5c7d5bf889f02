"""Generated video of an articulated figure with its joints, for human pose.

A figure of capsules, seen from the front, walks, waves, leans and pauses before the ground and distractors of
`resq_rl.video.generated.scene`; shapes of other objects pass behind and in front of it.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Final

import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8

from resq_rl.video.generated.motion import Activity, Path, bounce, draw_activity, draw_path
from resq_rl.video.generated.scene import Scene, draw_scene
from resq_rl.video.generated.shapes import draw_colours, window
from resq_rl.video.generated.video import GeneratedVideo

__all__ = ["JOINTS", "Figure", "FigureVideo"]

JOINTS: Final = (
    "head",
    *(
        f"{side}_{joint}"
        for joint in ("shoulder", "elbow", "wrist", "hip", "knee", "ankle")
        for side in ("left", "right")
    ),
)
"""The figure's joints in the order of its labels; its left is on the right of the frame."""

# Shares of the figure's height: lengths of neck and torso, half widths of shoulders and hips, and lengths of limbs.
NECK, TORSO, SHOULDER, HIP = 0.13, 0.29, 0.11, 0.075
ARM, LEG = (0.17, 0.16), (0.24, 0.23)
# Radii of head, torso, arms and legs.
HEAD_RADIUS, TORSO_RADIUS, ARM_RADIUS, LEG_RADIUS = 0.085, 0.1, 0.034, 0.046
TEXELS = 32


@dataclass(frozen=True)
class Swing:
    """An angle that swings about a mean.

    Attributes:
        mean: radians.
        reach: radians to either side.
        rate: radians of phase per frame of progress.
        phase: radians at progress 0.
    """

    mean: float
    reach: float
    rate: float
    phase: float

    def at(self, progress: Float[np.ndarray, "t"]) -> Float[np.ndarray, "t"]:
        """The angle at each progress."""
        return np.asarray(self.mean + self.reach * np.sin(self.rate * progress + self.phase))


@dataclass(frozen=True)
class Figure:
    """A figure of capsules.

    Attributes:
        height: from ankles to the top of the head when it stands straight, in pixels.
        activity: when it moves.
        path: the way of its hips before it bounces off the frame.
        lean: angle of its torso.
        limbs: angles of upper arms, forearms, thighs and shanks, left before right; those of forearms and shanks are
            relative to the upper limb.
        fills: textures of head, torso, upper arms, forearms, thighs and shanks, RGB in [0, 1].
        arms_first: whether the arms are behind the torso.
    """

    height: float
    activity: Activity
    path: Path
    lean: Swing
    limbs: tuple[Swing, ...]
    fills: tuple[Float[np.ndarray, "3 n n"], ...]
    arms_first: bool

    def joints(self, time: Float[np.ndarray, "t"], size: tuple[int, int]) -> Float[np.ndarray, "t k 2"]:
        """Positions (y, x) in pixels of `JOINTS` at each scene time, in a frame of `size`."""
        progress, tall = self.activity.progress(time), self.height
        y, x = self.path.at(progress)
        legs = tall * sum(LEG)
        y = bounce(y, min(0.5 * tall, size[0] / 2), max(size[0] - 0.75 * legs, size[0] / 2 + 1))
        hips = np.stack([y, bounce(x, 0.2 * tall, size[1] - 1 - 0.2 * tall)], -1)
        lean = self.lean.at(progress)
        up, side = -_towards(lean), _towards(lean + math.pi / 2)
        neck = hips + tall * TORSO * up
        ends = [neck + tall * NECK * up]
        roots = [neck + sign * tall * SHOULDER * side for sign in (1, -1)]
        roots += [hips + sign * tall * HIP * side for sign in (1, -1)]
        angles = [swing.at(progress) for swing in self.limbs]
        for pair, lengths, first in ((roots[:2], ARM, 0), (roots[2:], LEG, 4)):
            upper = [lean + angle for angle in angles[first : first + 2]]
            middle = [root + tall * lengths[0] * _towards(a) for root, a in zip(pair, upper, strict=True)]
            lower = [a + bend for a, bend in zip(upper, angles[first + 2 : first + 4], strict=True)]
            ends += [*pair, *middle, *(m + tall * lengths[1] * _towards(a) for m, a in zip(middle, lower, strict=True))]
        return np.stack(ends, 1)

    def paint(self, frame: Float[np.ndarray, "3 h w"], joints: Float[np.ndarray, "k 2"]) -> None:
        """Draw the figure with its joints at these positions."""
        tall, at = self.height, dict(zip(JOINTS, joints, strict=True))
        head, torso, *fills = self.fills
        neck, hips = ((at[f"left_{j}"] + at[f"right_{j}"]) / 2 for j in ("shoulder", "hip"))

        def limbs(names: tuple[str, ...], radius: float, own: list[Float[np.ndarray, "3 n n"]]) -> None:
            for side in ("left", "right"):
                for (a, b), fill in reversed(list(zip(pairwise(names), own, strict=True))):
                    _capsule(frame, at[f"{side}_{a}"], at[f"{side}_{b}"], tall * radius, fill)

        arms = (("shoulder", "elbow", "wrist"), ARM_RADIUS, fills[:2])
        limbs(("hip", "knee", "ankle"), LEG_RADIUS, fills[2:])
        if self.arms_first:
            limbs(*arms)
        _capsule(frame, neck + 0.2 * (hips - neck), hips - 0.1 * (hips - neck), tall * TORSO_RADIUS, torso)
        if not self.arms_first:
            limbs(*arms)
        _capsule(frame, at["head"], at["head"], tall * HEAD_RADIUS, head)


def _towards(angle: Float[np.ndarray, "t"]) -> Float[np.ndarray, "t 2"]:
    """Unit vectors (y, x) at an angle from straight down, positive towards the right of the frame."""
    return np.stack([np.cos(angle), np.sin(angle)], -1)


def _capsule(
    frame: Float[np.ndarray, "3 h w"],
    start: Float[np.ndarray, "2"],
    stop: Float[np.ndarray, "2"],
    radius: float,
    fill: Float[np.ndarray, "3 n n"],
) -> None:
    """Draw all points within `radius` of a line, with a soft edge; the fill runs along and across it."""
    middle, half = (start + stop) / 2, np.abs(stop - start) / 2 + radius + 1
    top, bottom = window(float(middle[0]), float(half[0]), frame.shape[1])
    left, right = window(float(middle[1]), float(half[1]), frame.shape[2])
    if top >= bottom or left >= right:
        return
    y = np.arange(top, bottom)[:, None] - start[0]
    x = np.arange(left, right)[None, :] - start[1]
    length = float(np.hypot(*(stop - start)))
    down, across = (stop - start) / length if length > 0 else np.array([1.0, 0.0])
    along, beside = y * down + x * across, x * down - y * across
    beyond = along - np.clip(along, 0.0, length)
    alpha = np.clip(radius + 0.5 - np.hypot(beyond, beside), 0.0, 1.0).astype(np.float32)
    cells = fill.shape[1]
    index = (((along + radius) / (length + 2 * radius)) * cells).astype(np.intp).clip(0, cells - 1) * cells
    index += ((beside / radius + 1) * (cells / 2)).astype(np.intp).clip(0, cells - 1)
    region = frame[:, top:bottom, left:right]
    region += alpha * (fill.reshape(3, -1)[:, index] - region)


def draw_figure(rng: np.random.Generator, size: tuple[int, int], unit: float) -> Figure:
    """Draw a figure for a frame of `size`, `unit` pixels per pixel at 96 rows."""
    gait = rng.uniform(0.15, 0.45)

    def swing(mean: tuple[float, float], reach: tuple[float, float], sign: int = 1) -> Swing:
        rate = gait * float(rng.choice([0.5, 1.0, 1.0]))
        return Swing(sign * rng.uniform(*mean), rng.uniform(*reach), rate, rng.uniform(0, 2 * math.pi))

    lean = swing((-0.35, 0.35), (0.0, 0.15))
    raised = [(0.1, 0.9), (0.9, 2.4)][int(rng.random() < 0.4)]
    limbs = [swing(raised, (0.1, 0.7), sign) for sign in (1, -1)]
    limbs += [swing((0.0, 1.3), (0.1, 0.6), sign) for sign in (1, -1)]
    limbs += [swing((0.05, 0.4), (0.05, 0.4), sign) for sign in (1, -1)]
    limbs += [swing((-0.5, 0.1), (0.05, 0.35), sign) for sign in (1, -1)]
    skin, shirt, trousers = (_fill(rng) for _ in range(3))
    sleeves = skin if rng.random() < 0.5 else shirt
    legs = skin if rng.random() < 0.3 else trousers
    return Figure(
        height=rng.uniform(56, 88) * unit,
        activity=draw_activity(rng, pausing=0.6),
        path=draw_path(rng, size, (0.2, 1.6), unit),
        lean=lean,
        limbs=tuple(limbs),
        fills=(_fill(rng), shirt, shirt, sleeves, trousers, legs),
        arms_first=rng.random() < 0.3,
    )


def _fill(rng: np.random.Generator) -> Float[np.ndarray, "3 n n"]:
    """Bands along or across a limb between two colours; darker at its edges, as a round body is."""
    axis = np.linspace(-1, 1, TEXELS, dtype=np.float32)
    bands = 0.5 + 0.5 * np.sin(axis * rng.uniform(1, 9) + rng.uniform(0, 2 * math.pi))
    mix = np.broadcast_to(bands[:, None] if rng.random() < 0.6 else bands[None, :], (TEXELS, TEXELS))
    first, second = draw_colours(rng, (0.05, 0.35))
    colour = first[:, None, None] + mix * (second - first)[:, None, None]
    return np.asarray(colour * (1.0 - 0.35 * axis * axis), dtype=np.float32)


@dataclass(frozen=True)
class FigureVideo(GeneratedVideo):
    """Clips of a figure that walks, waves and leans before a ground full of distractions, with its joints.

    Settings are those of `GeneratedVideo`; `shapes` are objects without labels, every second of which passes in front
    of the figure. A joint counts where it lies in the frame and no object hides it; the figure's own limbs never do.
    """

    shapes: tuple[int, int] = (1, 3)
    prefix: ClassVar[str] = "figures"

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the points in the order of the labels."""
        return JOINTS

    def _render(self, rng: np.random.Generator, time: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        scene = draw_scene(rng, self.size, self.shapes, self.distractors)
        return render_figure(scene, draw_figure(rng, self.size, min(self.size) / 96), time)


def render_figure(
    scene: Scene, figure: Figure, time: Float[np.ndarray, "t"]
) -> tuple[Float[np.ndarray, "t 3 h w"], Float32[np.ndarray, "t k 3"]]:
    """Frames, RGB in [0, 1], and joints (x, y, whether it counts) of a figure in a scene at each scene time."""
    frames = np.empty((len(time), 3, *scene.size), dtype=np.float32)
    joints = figure.joints(time, scene.size)
    counts = np.zeros(joints.shape[:2])
    poses = [(shape, shape.pose(time, scene.size)) for shape in scene.shapes]
    for step, shake in scene.backdrop(frames, time):
        hidden = np.zeros(scene.size, dtype=np.uint8)
        for shape, pose in poses[1::2]:
            shape.paint_at(frames[step], hidden, pose, step, shake)
        hidden[:] = 0
        joints[step] -= shake
        figure.paint(frames[step], joints[step])
        for shape, pose in poses[::2]:
            shape.paint_at(frames[step], hidden, pose, step, shake)
        counts[step] = _seen(joints[step], hidden)
    return frames, np.concatenate([joints[..., ::-1], counts[..., None]], -1).astype(np.float32)


def _seen(joints: Float[np.ndarray, "k 2"], hidden: UInt8[np.ndarray, "h w"]) -> Bool[np.ndarray, "k"]:
    """Which joints lie in the frame where nothing hides them."""
    place = np.round(joints).astype(np.intp)
    inside = np.asarray(((place >= 0) & (place < hidden.shape)).all(1))
    y, x = np.where(inside[:, None], place, 0).T
    return np.asarray(inside & (hidden[y, x] == 0))
