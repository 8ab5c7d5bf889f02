import dataclasses
from typing import get_args

import numpy as np
import pytest

from resq_rl.video.generated.distractors import Distractor, Kind, Light, draw_distractor, draw_light

SIZE = (96, 160)


def drawn(kind: str) -> Distractor:
    for seed in range(100):
        distractor = draw_distractor(np.random.default_rng(seed), SIZE, unit=1.0)
        if distractor.kind == kind:
            return distractor
    raise LookupError(kind)


def painted(distractor: Distractor, centre: tuple[float, float], time: float) -> np.ndarray:
    frame = np.full((3, *SIZE), 0.5, dtype=np.float32)
    distractor.paint(frame, centre, time)
    return frame


@pytest.mark.parametrize("kind", get_args(Kind))
def test_patches_fade_out_towards_their_edge(kind: str) -> None:
    distractor = drawn(kind)
    change = np.abs(painted(distractor, (48, 80), 2.0) - 0.5).max(axis=0)
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    distance = np.hypot((y - 48) / distractor.radius[0], (x - 80) / distractor.radius[1])
    assert change[distance > 1].max() == 0
    assert change[(distance > 0.95) & (distance <= 1)].max() < 0.15
    assert change[distance < 0.5].max() > 0.05
    assert change.max() < 1


@pytest.mark.parametrize("kind", ["stripes", "flicker", "foliage"])
def test_patches_change_in_place(kind: str) -> None:
    distractor = drawn(kind)
    frames = np.stack([painted(distractor, (48, 80), float(time)) for time in range(24)])
    assert np.ptp(frames, axis=0).max() > 0.15
    assert np.array_equal(frames[3], painted(distractor, (48, 80), 3.0))


def test_blobs_wander() -> None:
    y, x = drawn("blob").centres(np.arange(48.0), SIZE, (np.zeros(48), np.zeros(48)))
    assert np.hypot(np.diff(y), np.diff(x)).max() > 0.2


def test_patches_move_against_the_camera_and_return_on_the_other_side() -> None:
    distractor = dataclasses.replace(drawn("flicker"))
    time, still = np.zeros(400), np.zeros(400)
    pan = np.arange(400.0)
    _, x = distractor.centres(time, SIZE, (still, pan))
    steps = np.diff(x)
    assert np.isclose(steps, -1).sum() == 399 - (steps > 0).sum()
    assert 1 <= (steps > 0).sum() <= 3
    assert x.min() >= -distractor.radius[1]
    assert x.max() <= SIZE[1] + distractor.radius[1]


def test_patch_outside_the_frame_changes_nothing() -> None:
    assert (painted(drawn("stripes"), (-200, 80), 0.0) == 0.5).all()


@pytest.mark.parametrize("kind", ["pulse", "lamp", "beam"])
def test_light_changes_brightness_and_nothing_else(kind: str) -> None:
    light = Light(kind=kind, gain=0.2, rate=0.2, phase=0.3)  # type: ignore[arg-type]  # from a list of kinds
    gains = []
    for time in range(40):
        frame = np.full((3, 8, 40), 0.5, dtype=np.float32)
        frame[1] = 0.25
        light.apply(frame, float(time))
        assert frame[0] == pytest.approx(2 * frame[1])
        gains.append(frame[0] / 0.5)
    assert np.max(gains) == pytest.approx(1.4 if kind == "beam" else 1.2, abs=0.02)
    assert np.min(gains) == pytest.approx(1.0 if kind == "beam" else 0.8, abs=0.02)


def test_half_of_the_scenes_have_steady_light() -> None:
    kinds = [draw_light(np.random.default_rng(seed)).kind for seed in range(400)]
    assert 150 < kinds.count("none") < 250
    assert set(kinds) == {"none", "pulse", "lamp", "beam"}
