"""A stream gives the frames that `VideoFiles` gives, one at a time."""

import tracemalloc
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from resq_rl.errors import VideoError
from resq_rl.video import VideoFiles, VideoStream
from resq_rl.video.stream import CameraFrames
from tests.video.conftest import WriteImage, WriteVideo


@pytest.mark.parametrize("size", [None, (17, 30)])
def test_files_and_folders_give_what_video_files_gives(
    size: tuple[int, int] | None, tmp_path: Path, write_video: WriteVideo, write_image: WriteImage
) -> None:
    for number in range(11):
        write_image(tmp_path / "frames" / f"f{number}.png", np.full((48, 64, 3), number * 12))
    for path, rate, length in ((write_video(tmp_path / "a.mp4"), 24.0, 20), (tmp_path / "frames", 25.0, 11)):
        (clip,) = VideoFiles({"test": [path]}, size=size).clips("test")
        stream = VideoStream(path, size)
        frames = [torch.from_numpy(frame).permute(2, 0, 1) for frame in stream]
        assert torch.equal(torch.stack(frames), clip.frames)
        assert (stream.rate, stream.length, stream.name) == (rate, length, str(path))
        assert [time for _, time in stream.timed()] == pytest.approx([n / rate for n in range(length)], abs=1e-6)


@pytest.mark.parametrize("name", ["a.mkv", "a.ts"])
def test_the_length_is_told_where_the_file_holds_its_duration(
    name: str, tmp_path: Path, write_video: WriteVideo
) -> None:
    stream = VideoStream(write_video(tmp_path / name))
    next(iter(stream))
    assert stream.length is not None
    assert abs(stream.length - 20) <= 2


def test_frames_are_decoded_as_they_are_asked_for(tmp_path: Path, write_video: WriteVideo) -> None:
    path = write_video(tmp_path / "long.mp4", frames=300)
    frames = iter(VideoStream(path, (480, 640)))
    list(islice(frames, 20))
    tracemalloc.start()
    for _ in frames:
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * 480 * 640 * 3  # of 280 frames


def test_a_camera_is_read_until_the_caller_stops() -> None:
    """FFmpeg's generator of test pictures is an input device, as a camera is."""
    camera = CameraFrames("testsrc=size=64x48:rate=30", "lavfi")
    pictures = list(islice(camera.frames(0, 1, None), 5))
    assert camera.rate == 30.0
    assert [picture.time for picture in pictures] == pytest.approx([n / 30 for n in range(5)])
    frames = [np.asarray(picture.image) for picture in pictures]
    assert [frame.shape for frame in frames] == [(48, 64, 3)] * 5
    assert (frames[0] != frames[4]).any()
    assert len(list(camera.frames(2, 3, 9))) == 3


def test_a_camera_that_is_not_there_is_one_error() -> None:
    with pytest.raises(VideoError, match="camera"):
        next(iter(VideoStream(987)))


@pytest.mark.parametrize("kind", ["empty", "text", "cut", "no file", "empty folder"])
def test_what_cannot_be_read_is_one_error(kind: str, tmp_path: Path, write_video: WriteVideo) -> None:
    path = tmp_path / "bad.mp4"
    match kind:
        case "empty":
            path.touch()
        case "text":
            path.write_text("no video " * 100)
        case "cut":
            whole = write_video(tmp_path / "whole.mp4", frames=200, flags=("faststart",)).read_bytes()
            path.write_bytes(whole[: len(whole) // 2])
        case "empty folder":
            path.mkdir()
    with pytest.raises(VideoError, match=r"bad\.mp4"):
        list(VideoStream(path))


def test_one_frame_is_a_stream(tmp_path: Path, write_video: WriteVideo) -> None:
    (frame,) = VideoStream(write_video(tmp_path / "one.mp4", frames=1))
    assert frame.shape == (48, 64, 3)
