from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from resq_rl.errors import VideoError
from resq_rl.video.clip import IGNORE
from resq_rl.video.datasets.base import Recording, held_out
from resq_rl.video.datasets.points import points_box
from resq_rl.video.framing import Framing
from resq_rl.video.parts import Part
from tests.video.conftest import WriteImage

SPOTS = np.array([[20, 15], [30, 40], [44, 22]])  # x, y in a frame of 64x48


@pytest.fixture
def person(tmp_path: Path, write_image: WriteImage) -> Recording:
    """Three bright spots that move right by a pixel per frame, and a point that does not count."""
    points = np.zeros((6, 4, 3), np.float32)
    for number in range(6):
        pixels = np.zeros((48, 64, 3))
        for index, (x, y) in enumerate(SPOTS):
            pixels[y - 1 : y + 2, x + number - 1 : x + number + 2] = 255
            points[number, index] = (x + number, y, 1)
        write_image(tmp_path / f"{number}.png", pixels)
    boxes = [points_box(labels) for labels in points]
    return Recording(Part("who"), 0, [tmp_path / f"{number}.png" for number in range(6)], points, 25.0, boxes)


@pytest.mark.parametrize(
    ("size", "crop"), [(None, None), ((48, 64), None), ((24, 32), None), ((64, 64), 1.4), ((90, 60), 2.5)]
)
def test_points_stay_on_what_they_mark(person: Recording, size: tuple[int, int] | None, crop: float | None) -> None:
    (clip,) = person.clips(Framing(size, crop=crop))
    labels = torch.as_tensor(clip.labels)
    assert (clip.name, clip.fps, labels.shape, labels.dtype) == ("who", 25.0, (6, 4, 3), torch.float32)
    for frame, points in zip(clip.frames, labels, strict=True):
        for x, y, counts in points[:3].tolist():
            assert counts == 1
            assert frame[0, round(y), round(x)] > 120
        assert points[3, 2] == 0
    if size is None:
        assert np.array_equal(labels.numpy(), np.stack(list(person.labels)))


def test_a_window_follows_the_person(person: Recording) -> None:
    (clip,) = person.clips(Framing((64, 64), crop=1.4))
    middle = torch.as_tensor(clip.labels)[:, :3, :2].mean(1)
    assert (middle - middle[0]).abs().max() < 6  # it moved by 5 of 26 pixels, that is 9 of these, in the frame
    heights = torch.as_tensor(clip.labels)[:, :3, 1]
    assert float((heights.amax(1) - heights.amin(1)).mean()) == pytest.approx(25 * 64 / (26 * 1.4), rel=0.03)


def test_points_outside_the_window_do_not_count(person: Recording) -> None:
    alone = replace(person, boxes=[(20.0, 10.0, 30.0, 30.0)] * 6)  # around the first point alone
    (clip,) = alone.clips(Framing((32, 32), crop=1.0))
    assert torch.as_tensor(clip.labels)[0, :, 2].tolist() == [1, 0, 0, 0]


def test_clips_are_cut_and_named_by_their_frames(person: Recording) -> None:
    clips = person.clips(Framing(), 2)
    assert [(clip.name, len(clip)) for clip in clips] == [("who[0:2]", 2), ("who[2:4]", 2), ("who[4:6]", 2)]
    assert {clip.origin for clip in clips} == {str(person.frames[0])}


def test_label_maps_are_framed_with_their_frames(person: Recording) -> None:
    maps = [np.full((48, 64), number, np.uint8) for number in range(6)]
    (clip,) = replace(person, labels=maps).clips(Framing((96, 96), crop=3.0))
    labels = torch.as_tensor(clip.labels)
    assert (labels.shape, labels.dtype) == ((6, 96, 96), torch.uint8)
    assert [sorted(set(label.flatten().tolist())) for label in labels] == [[number, IGNORE] for number in range(6)]


def test_what_cannot_be_cropped_or_read_is_named(person: Recording, tmp_path: Path, write_image: WriteImage) -> None:
    with pytest.raises(VideoError, match=r"No labelled object to crop around in .*0\.png .who.: all 6"):
        replace(person, boxes=[None] * 6).clips(Framing((32, 32), crop=1.3))
    maps = [np.zeros((48, 63), np.uint8)] * 6
    with pytest.raises(VideoError, match=r"label of frame .*0\.png must be of the size of its frame, 64x48, got 63x48"):
        replace(person, labels=maps).clips(Framing())
    write_image(tmp_path / "3.png", np.zeros((48, 60, 3)))
    with pytest.raises(VideoError, match=r"Frame .*3\.png must be of the size of the ones before, 64x48, got 60x48"):
        person.clips(Framing((32, 32), crop=1.3))


def test_every_fifth_video_is_held_out() -> None:
    videos = [Part(name) for name in "abcdefghijk"]
    splits = held_out(videos, [Part("z")])
    assert {split: "".join(part.name for part in parts) for split, parts in splits.items()} == {
        "train": "abcdfghik",
        "validation": "ej",
        "test": "z",
    }
