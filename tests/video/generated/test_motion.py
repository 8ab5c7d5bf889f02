import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resq_rl.video.generated.motion import Activity, bounce, draw_activity, draw_path, draw_shake, tileable_noise

seeds = st.integers(0, 10_000)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@given(st.floats(-500, 500), st.floats(-20, 20), st.floats(1, 80))
def test_bounce_reflects_step_by_step(start: float, low: float, span: float) -> None:
    position, high = start, low + span
    while not low <= position <= high:  # reflect by hand, once at a time
        position = 2 * low - position if position < low else 2 * high - position
    assert bounce(np.array([start]), low, high)[0] == pytest.approx(position, abs=1e-6)


def test_activity_by_hand() -> None:
    activity = Activity(lengths=np.array([4.0, 6.0]), shift=0.0)  # moves for 4 frames, rests for 6
    time = np.array([0.0, 2.0, 4.0, 9.0, 10.0, 12.0, 14.0])
    assert activity.progress(time) == pytest.approx([0, 2, 4, 4, 4, 6, 8])


@given(seeds, st.sampled_from([0.0, 1.0]))
def test_progress_starts_at_zero_never_turns_back_and_pauses(seed: int, pausing: float) -> None:
    activity = draw_activity(rng(seed), pausing)
    time = np.arange(0, 400, 0.5)
    progress = activity.progress(time)
    steps = np.diff(progress)
    assert progress[0] == 0
    assert steps.min() >= -1e-9
    assert steps.max() <= 0.75 + 1e-9  # the smoothstep's steepest rate is 1.5 per frame
    assert (steps < 1e-9).any() == bool(pausing)


@given(seeds)
def test_paths_keep_to_the_speed_asked_for(seed: int) -> None:
    path = draw_path(rng(seed), (96, 160), (1.0, 2.0), unit=1.5)
    y, x = path.at(np.array([0.0, 10_000.0]))
    pace = math.hypot(y[1] - y[0], x[1] - x[0]) / 10_000
    assert 1.5 - 0.01 <= pace <= 3.0 + 0.01


def test_shake_stays_small() -> None:
    y, x = draw_shake(rng(), 0.5).at(np.arange(1000.0))
    assert 0.1 < np.abs(np.stack([y, x])).max() <= 0.5 * 0.8 * 3


@given(seeds, st.integers(8, 50), st.integers(8, 50), st.floats(3, 30), st.integers(1, 4))
def test_noise_fills_its_range_and_tiles(seed: int, height: int, width: int, cell: float, octaves: int) -> None:
    noise = tileable_noise(rng(seed), (height, width), cell, octaves)
    assert noise.shape == (height, width)
    assert noise.dtype == np.float32
    assert noise.min() == 0
    assert noise.max() == pytest.approx(1, abs=1e-5)
    inside = max(np.abs(np.diff(noise, axis=0)).max(), np.abs(np.diff(noise, axis=1)).max())
    around = max(np.abs(noise[0] - noise[-1]).max(), np.abs(noise[:, 0] - noise[:, -1]).max())
    assert around <= 2.5 * inside + 1e-5  # the seam is about as smooth as the rest


def test_finer_octaves_add_detail() -> None:
    coarse, fine = (tileable_noise(rng(1), (96, 96), 32, octaves) for octaves in (1, 4))
    assert np.abs(np.diff(fine)).mean() > 1.2 * np.abs(np.diff(coarse)).mean()
