import dataclasses

import numpy as np
import pytest
from scipy.ndimage import binary_dilation, map_coordinates

from resq_rl.video.generated.scene import Scene, draw_scene

SIZE = (96, 160)
TIME = np.arange(0, 48, 6.0)


def scene(seed: int) -> Scene:
    return draw_scene(np.random.default_rng(seed), SIZE, (3, 6), (2, 4))


@pytest.mark.parametrize("seed", range(4))
def test_what_is_not_labelled_looks_as_without_shapes(seed: int) -> None:
    full = scene(seed)
    frames, labels = full.render(TIME)
    bare, none = dataclasses.replace(full, shapes=()).render(TIME)
    assert not none.any()
    differs = np.abs(frames - bare).max(axis=1) > 0
    for step in range(len(TIME)):
        assert not (differs[step] & ~binary_dilation(labels[step] > 0, iterations=2)).any()
    assert differs[labels > 0].mean() > 0.98


def test_labels_name_the_shapes_of_the_scene() -> None:
    full = scene(1)
    _, labels = full.render(np.arange(48.0))
    assert set(np.unique(labels)) - {0} <= {shape.label for shape in full.shapes}
    assert len(np.unique(labels)) >= 3


def test_ground_is_the_texture_seen_by_the_camera() -> None:
    """Against spline interpolation of order 1 from another library, on a torus."""
    full = next(s for s in map(scene, range(100)) if s.camera.zoom > 0)
    bare = dataclasses.replace(full, shapes=(), distractors=(), light=dataclasses.replace(full.light, kind="none"))
    frames, _ = bare.render(TIME)
    drift_y, drift_x, shake_y, shake_x, scale = full.camera.view(TIME)
    for step in range(len(TIME)):
        y, x = np.mgrid[: SIZE[0], : SIZE[1]].astype(np.float64)
        y = (y - SIZE[0] / 2) * scale[step] + SIZE[0] / 2 + drift_y[step] + shake_y[step]
        x = (x - SIZE[1] / 2) * scale[step] + SIZE[1] / 2 + drift_x[step] + shake_x[step]
        for channel in range(3):
            expected = map_coordinates(full.ground[channel], [y, x], order=1, mode="grid-wrap")
            assert frames[step, channel] == pytest.approx(expected, abs=2e-4)


def test_scenes_are_varied() -> None:
    scenes = [scene(seed) for seed in range(60)]
    still = [s for s in scenes if not any(s.camera.velocity) and not s.camera.shake.amplitudes.any()]
    panning = [s for s in scenes if np.hypot(*s.camera.velocity) > 0.35]
    assert 10 <= len(still) <= 32
    assert 4 <= len(panning) <= 30
    assert any(s.camera.zoom > 0 for s in scenes)
    assert {len(s.shapes) for s in scenes} == {3, 4, 5, 6}
    assert {len(s.distractors) for s in scenes} == {2, 3, 4}
    assert {shape.label for s in scenes for shape in s.shapes} == {1, 2, 3, 4, 5}


def test_distractions_change_pixels_without_a_label() -> None:
    changed = 0
    for seed in range(20):
        bare = dataclasses.replace(scene(seed), shapes=())
        frames, labels = bare.render(np.arange(24.0))
        assert not labels.any()
        changed += bool((np.ptp(frames, axis=0).max(axis=0) > 0.15).mean() > 0.02)
    assert changed >= 17
