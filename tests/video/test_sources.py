"""What a user calls a source is what is opened: an existing path of the very name first."""

from pathlib import Path

import numpy as np
import pytest

from resq_rl.errors import VideoError
from resq_rl.video import Part, VideoFiles, VideoStream
from resq_rl.video.sources import locate
from tests.video.conftest import WriteImage, WriteVideo, grey


def greys(source: str | Path | int) -> list[int]:
    return [round(float(frame[-1, -1].mean()) / 12) for frame in VideoStream(source)]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["0001", "7", "0", "٣"])
def test_a_folder_named_like_a_number_is_no_camera(name: str, here: Path, write_image: WriteImage) -> None:
    for number in (4, 5):
        write_image(here / name / f"{number:010d}.png", grey(number))
    assert greys(name) == [4, 5]
    if name in ("0", "7"):
        assert greys(int(name)) == [4, 5]  # as it comes from a command line


@pytest.mark.parametrize("name", ["0001", "007", "٣", "²", "1.5", "-1"])
def test_names_that_are_no_index_are_no_camera(name: str, here: Path) -> None:
    with pytest.raises(VideoError, match=f"No video file or folder of frames at {name}"):
        VideoStream(name)


NAMES = [
    "two words.mp4",
    "a[1:3].mp4",
    "[x]",
    "видео.mp4",
    "映像 [1].mp4",
    "a,b={c}.mp4",
    "a%03d.mp4",
    "b:c.mp4",
    "d#e?f.mp4",
    "12",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("relative", [True, False])
def test_names_of_every_kind_are_opened(name: str, relative: bool, here: Path, write_video: WriteVideo) -> None:
    whole = write_video(here / "source.mp4", frames=8)
    path = here / name
    path.write_bytes(whole.read_bytes())
    given = name if relative else str(path)
    assert greys(given) == list(range(8))
    assert greys(f"{given}[2:5]") == [2, 3, 4]
    (clip,) = VideoFiles({"test": [f"{given}[2:5]"]}).clips("test")
    assert len(clip) == 3


def test_an_existing_path_is_no_part_of_another(here: Path, write_video: WriteVideo, write_image: WriteImage) -> None:
    write_video(here / "a.mp4", frames=8)
    assert locate("a.mp4[2:5]") == Part(str(here / "a.mp4"), 2, 5)
    for number in (6, 7):
        write_image(here / "a.mp4[2:5]" / f"{number}.png", grey(number))
    assert locate("a.mp4[2:5]") == Part(str(here / "a.mp4[2:5]"))
    assert greys("a.mp4[2:5]") == [6, 7]
    assert [len(clip) for clip in VideoFiles({"test": ["a.mp4[2:5]"]}).clips("test")] == [2]
    assert locate("a.mp4[2:5][1:]") == Part(str(here / "a.mp4[2:5]"), 1)
    # What is given as a part is one.
    assert locate(Part("a.mp4", 2, 5)) == Part(str(here / "a.mp4"), 2, 5)


def test_a_home_is_found_and_other_tildes_are_names(
    here: Path, write_video: WriteVideo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(here))
    write_video(here / "a.mp4", frames=2)
    write_video(here / "~nobody.mp4", frames=3)
    assert (len(greys("~/a.mp4")), len(greys("~nobody.mp4"))) == (2, 3)


def test_names_that_no_file_can_have_are_named(here: Path) -> None:
    for name in ("x" * 5000, "a\0b"):
        with pytest.raises(VideoError, match="No video file or folder of frames at"):
            locate(name)


def test_a_single_picture_is_a_source_as_a_folder_of_it_is(here: Path, write_image: WriteImage) -> None:
    path = write_image(here / "frames" / "a.jpg", grey(3))
    (one,), (other,) = VideoStream(path), VideoStream(here / "frames")
    assert np.array_equal(one, other)
