from pathlib import Path

import numpy as np
import pytest
import torch

from resq_rl.errors import SettingsError, VideoError
from resq_rl.video.people import Person, choose_points, person_clips, points_box
from tests.video.conftest import WriteImage

SPOTS = np.array([[20, 15], [30, 40], [44, 22]])  # x, y in a frame of 64x48


@pytest.fixture
def person(tmp_path: Path, write_image: WriteImage) -> Person:
    """Three bright spots that move right by a pixel per frame, and a point that does not count."""
    points = np.zeros((6, 4, 3), np.float32)
    for number in range(6):
        pixels = np.zeros((48, 64, 3))
        for index, (x, y) in enumerate(SPOTS):
            pixels[y - 1 : y + 2, x + number - 1 : x + number + 2] = 255
            points[number, index] = (x + number, y, 1)
        write_image(tmp_path / f"{number}.png", pixels)
    boxes = [points_box(labels) for labels in points]
    return Person("who", [f"{number}.png" for number in range(6)], points, boxes, 0, 25.0)


@pytest.mark.parametrize(
    ("size", "crop"), [(None, None), ((48, 64), None), ((24, 32), None), ((64, 64), 1.4), ((90, 60), 2.5)]
)
def test_points_stay_on_what_they_mark(
    person: Person, tmp_path: Path, size: tuple[int, int] | None, crop: float | None
) -> None:
    (clip,) = person_clips(person, tmp_path, size, crop, None)
    labels = torch.as_tensor(clip.labels)
    assert (clip.name, clip.fps, labels.shape, labels.dtype) == ("who", 25.0, (6, 4, 3), torch.float32)
    for frame, points in zip(clip.frames, labels, strict=True):
        for x, y, counts in points[:3].tolist():
            assert counts == 1
            assert frame[0, round(y), round(x)] > 120
        assert points[3, 2] == 0
    if size is None:
        assert np.array_equal(labels.numpy(), person.points)


def test_a_window_follows_the_person(person: Person, tmp_path: Path) -> None:
    (clip,) = person_clips(person, tmp_path, (64, 64), 1.4, None)
    middle = torch.as_tensor(clip.labels)[:, :3, :2].mean(1)
    assert (middle - middle[0]).abs().max() < 6  # it moved by 5 of 26 pixels, that is 9 of these, in the frame
    heights = torch.as_tensor(clip.labels)[:, :3, 1]
    assert float((heights.amax(1) - heights.amin(1)).mean()) == pytest.approx(25 * 64 / (26 * 1.4), rel=0.03)


def test_points_outside_the_window_do_not_count(person: Person, tmp_path: Path) -> None:
    boxes = [(20.0, 10.0, 30.0, 30.0)] * 6  # around the first point alone
    alone = Person("who", person.frames, person.points, boxes, 0, 25.0)
    (clip,) = person_clips(alone, tmp_path, (32, 32), 1.0, None)
    assert torch.as_tensor(clip.labels)[0, :, 2].tolist() == [1, 0, 0, 0]


def test_clips_are_cut_and_named_by_their_frames(person: Person, tmp_path: Path) -> None:
    clips = person_clips(person, tmp_path, None, None, 2)
    assert [(clip.name, len(clip)) for clip in clips] == [("who[0:2]", 2), ("who[2:4]", 2), ("who[4:6]", 2)]
    later = Person("who", person.frames[2:], person.points[2:], person.boxes[2:], 2, 25.0)
    assert [clip.name for clip in person_clips(later, tmp_path, None, None, None)] == ["who[2:6]"]


def test_points_are_chosen_by_name() -> None:
    assert choose_points(("a", "b", "c"), None, "Demo") == [0, 1, 2]
    assert choose_points(("a", "b", "c"), ["c", "a"], "Demo") == [2, 0]
    with pytest.raises(SettingsError, match="Setting points of Demo must name some of a, b, got d besides"):
        choose_points(("a", "b"), ["a", "d"], "Demo")
    with pytest.raises(SettingsError, match="Setting points of Demo must name some of a, b, got nothing"):
        choose_points(("a", "b"), [], "Demo")


def test_a_box_holds_the_points_that_count() -> None:
    points = np.array([[3, 5, 1], [7, 2, 1], [90, 90, 0]], np.float32)
    assert points_box(points) == (3.0, 2.0, 8.0, 6.0)
    assert points_box(points * np.float32(0)) is None


def test_what_cannot_be_cropped_or_read_is_named(person: Person, tmp_path: Path, write_image: WriteImage) -> None:
    nowhere = Person("who", person.frames, person.points, [None] * 6, 0, 25.0)
    with pytest.raises(VideoError, match="No labelled point to crop around in who"):
        person_clips(nowhere, tmp_path, (32, 32), 1.3, None)
    write_image(tmp_path / "3.png", np.zeros((48, 60, 3)))
    with pytest.raises(VideoError, match=r"Frame .*3\.png must be of the size of the ones before, 64x48, got 60x48"):
        person_clips(person, tmp_path, (32, 32), 1.3, None)
