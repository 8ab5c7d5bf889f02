"""Generated figures: joints lie where the figure is drawn, and count where they can be seen."""

import dataclasses

import numpy as np
import pytest
import torch

from resq_rl.errors import SettingsError
from resq_rl.video import JOINTS, FigureVideo
from resq_rl.video.generated.figures import ARM, LEG, TORSO, draw_figure, render_figure
from resq_rl.video.generated.scene import draw_scene

SIZE = (96, 160)


def test_a_clip_depends_on_its_settings_split_and_index_alone() -> None:
    video = FigureVideo(frames=3)
    one, two = video.clip("train", 1), FigureVideo(frames=3, train=2).clips("train")[1]
    assert torch.equal(one.frames, two.frames)
    assert one.labels is not None
    assert two.labels is not None
    assert torch.equal(one.labels, two.labels)
    assert one.name == "figures/train-1"
    assert one.labels.shape == (3, 13, 3)
    assert video.classes == JOINTS
    for other in (video.clip("test", 1), video.clip("train", 0), dataclasses.replace(video, seed=1).clip("train", 1)):
        assert not torch.equal(one.frames, other.frames)


def test_settings_out_of_range_name_this_video() -> None:
    with pytest.raises(SettingsError, match="noise of FigureVideo"):
        FigureVideo(noise=2.0)


@pytest.mark.parametrize("seed", range(6))
def test_limbs_keep_their_lengths(seed: int) -> None:
    figure = draw_figure(np.random.default_rng(seed), SIZE, 1.0)
    joints = dict(zip(JOINTS, figure.joints(np.arange(40.0), SIZE).transpose(1, 0, 2), strict=True))
    for side in ("left", "right"):
        for lengths, names in ((ARM, ("shoulder", "elbow", "wrist")), (LEG, ("hip", "knee", "ankle"))):
            for length, a, b in zip(lengths, names, names[1:], strict=False):
                found = np.hypot(*(joints[f"{side}_{a}"] - joints[f"{side}_{b}"]).T)
                np.testing.assert_allclose(found, length * figure.height, rtol=1e-9)
    middles = [(joints[f"left_{j}"] + joints[f"right_{j}"]) / 2 for j in ("shoulder", "hip")]
    np.testing.assert_allclose(np.hypot(*(middles[0] - middles[1]).T), TORSO * figure.height, rtol=1e-9)
    across = joints["left_shoulder"][:, 1] - joints["right_shoulder"][:, 1]
    assert (across > 0).all(), "its left is on the right of the frame"
    hips = middles[1]
    assert (hips >= 0).all()
    assert (hips < SIZE).all()


def test_the_figure_moves_smoothly_and_a_still_does_not() -> None:
    video = FigureVideo(frames=24, cuts=0.0)
    moves = []
    for index in range(8):
        labels = video.clip("train", index).labels
        assert labels is not None
        moves.append((labels[1:, :, :2] - labels[:-1, :, :2]).norm(dim=2))
    assert float(torch.cat(moves).max()) < 12
    assert float(torch.cat(moves).mean()) > 0.3
    still = dataclasses.replace(video, speed=0.0).clip("train", 0).labels
    assert still is not None
    assert torch.equal(still, still[:1].expand_as(still))


def test_joints_are_drawn_where_the_labels_say() -> None:
    """Painting the figure changes the pixels at its joints, and none far from all of them."""
    rng = np.random.default_rng(4)
    scene = draw_scene(rng, SIZE, (0, 0), (0, 0))
    scene = dataclasses.replace(scene, light=dataclasses.replace(scene.light, kind="none"))
    figure = draw_figure(rng, SIZE, 1.0)
    time = np.arange(5.0)
    frames, labels = render_figure(scene, figure, time)
    empty, _ = scene.render(time)
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    for t in range(5):
        changed = np.abs(frames[t] - empty[t]).max(0) > 1e-3
        distance = np.stack([np.hypot(columns - x, rows - y) for x, y, _ in labels[t]]).min(0)
        assert not changed[distance > 0.3 * figure.height].any()
        for x, y, counts in labels[t]:
            inside = 0 <= round(x) < SIZE[1] and 0 <= round(y) < SIZE[0]
            assert counts == inside, "nothing is in front of it"
            if inside:
                assert changed[round(y), round(x)]


def test_joints_behind_an_object_do_not_count() -> None:
    """The first shape is in front of the figure: where its own label covers a joint, the joint does not count."""
    hidden = seen = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        scene = draw_scene(rng, SIZE, (2, 2), (0, 0))
        figure = draw_figure(rng, SIZE, 1.0)
        time = np.arange(0.0, 40.0, 8.0)
        _, labels = render_figure(scene, figure, time)
        _, front = dataclasses.replace(scene, shapes=scene.shapes[:1]).render(time)
        for t in range(5):
            for x, y, counts in labels[t]:
                if 0 <= round(x) < SIZE[1] and 0 <= round(y) < SIZE[0]:
                    assert counts == (front[t, round(y), round(x)] == 0)
                    hidden, seen = hidden + (counts == 0), seen + (counts == 1)
    assert hidden > 20
    assert seen > 400
