"""One description of how frames are brought to the network, for readers and for deployment alike."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from resq_rl.errors import SettingsError, VideoError
from resq_rl.video import (
    Clip,
    FigureVideo,
    Framing,
    GeneratedVideo,
    Split,
    VideoFiles,
    VideoStream,
    WarpedVideo,
    framing_of,
)
from resq_rl.video.clip import IGNORE
from resq_rl.video.framing import FITS, Fit
from tests.video.conftest import WriteVideo

sizes = st.none() | st.tuples(st.integers(1, 64), st.integers(1, 64))


@given(sizes, st.sampled_from(FITS), st.sampled_from([None, 0.5, 1.3]), st.integers(1, 9))
def test_it_survives_json(size: tuple[int, int] | None, fit: Fit, crop: float | None, stride: int) -> None:
    framing = Framing(size, fit, crop if size else None, stride)
    assert Framing.from_json(json.loads(json.dumps(framing.to_json()))) == framing


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"size": [8, 8], "fit": "crop", "crop": None},
        {"size": [8, 8], "fit": "crop", "crop": None, "stride": 1, "mean": 0},
        {"size": [8, 8], "fit": "squeeze", "crop": None, "stride": 1},
        {"size": [8], "fit": "crop", "crop": None, "stride": 1},
        {"size": "ab", "fit": "crop", "crop": None, "stride": 1},
        {"size": 8, "fit": "crop", "crop": None, "stride": 1},
        {"size": None, "fit": "crop", "crop": 1.3, "stride": 1},
        {"size": [8, 8], "fit": "crop", "crop": None, "stride": 0},
    ],
)
def test_damaged_json_is_refused(content: dict[str, object], unchecked_types: None) -> None:
    with pytest.raises(SettingsError, match=r"framing"):
        Framing.from_json(content)


@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40), st.integers(1, 40))
def test_crop_agrees_with_pillow(width: int, height: int, rows: int, columns: int) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))
    expected = np.asarray(ImageOps.fit(image, (columns, rows), Image.Resampling.BILINEAR)).astype(int)
    found = Framing((rows, columns), "crop").frame(image)
    assert np.abs(found - expected).max() <= 1


def test_pad_keeps_all_and_the_proportions() -> None:
    """A disk on grey stays a disk, and the borders repeat the edge and have no label."""
    y, x = np.mgrid[:40, :100]
    disk = (np.hypot(y - 19.5, x - 49.5) < 15).astype(np.uint8)
    framing = Framing((50, 50), "pad")
    picture = np.repeat((60 + 180 * disk)[..., None], 3, 2)
    frame, labels = framing.frame(picture), framing.labels(disk)
    bright = frame[..., 0] > 150
    assert (int(bright.sum(0).max()), int(bright.sum(1).max())) == pytest.approx((15, 15), abs=1)
    assert (frame[:15] == 60).all()
    assert (labels[:15] == IGNORE).all()
    assert (labels[15:35] != IGNORE).all()
    assert ((labels == 1) != bright).mean() < 0.01


@given(st.sampled_from(FITS), st.integers(20, 60), st.integers(20, 60))
def test_points_stay_on_what_they_mark(fit: Fit, rows: int, columns: int) -> None:
    picture = np.zeros((60, 80, 3), np.uint8)
    picture[28:33, 38:43] = 255
    framing = Framing((rows, columns), fit)
    points = np.array([[40, 30, 1], [0, 0, 0], [400, 30, 1]], np.float32)
    found = framing.points(points, (80, 60))
    frame = framing.frame(picture)[..., 0].astype(float)
    total, y, x = frame.sum(), *np.mgrid[:rows, :columns]
    assert (found[0, :2].tolist()) == pytest.approx([(x * frame).sum() / total, (y * frame).sum() / total], abs=0.5)
    assert found[:, 2].tolist() == [1, 0, 0]


def test_a_window_is_wanted_where_objects_are_followed() -> None:
    framing, picture = Framing((8, 8), crop=1.3), np.zeros((40, 60, 3), np.uint8)
    match = r"Frames are windows that follow an object, 1\.3 times as .*no window"
    with pytest.raises(VideoError, match=match):
        framing.frame(picture)
    with pytest.raises(VideoError, match=match):
        framing.labels(picture[..., 0])
    with pytest.raises(VideoError, match=match):
        framing.points(np.zeros((1, 3), np.float32), (60, 40))
    assert framing.frame(picture, (5.0, 5.0, 20.0, 20.0)).shape == (8, 8, 3)


class Own:
    """A dataset of a user's own, which knows nothing of framings."""

    size = (12, 16)

    @property
    def classes(self) -> tuple[str, ...]:
        return ()

    def clips(self, split: Split) -> list[Clip]:
        return []


@pytest.mark.parametrize(
    "window",
    [
        (5, 5, 5, 9),
        (0, 0, 0, 0),
        (10, 10, 5, 5),
        (0, 0, math.nan, 5),
        (0, 0, math.inf, 5),
        (0, 0, 5),
        (60, 0, 70, 10),
        (0, -9, 10, 0),
        ("left", 0, 5, 5),
        (0, 0, 1e9, 1e9),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_a_window_in_which_nothing_lies_is_refused(window: Any) -> None:
    framing = Framing((8, 8))
    with pytest.raises(VideoError, match=r"A window is|times as large"):
        framing.frame(np.zeros((40, 60, 3), np.uint8), window)
    with pytest.raises(VideoError, match=r"A window is|times as large"):
        framing.labels(np.zeros((40, 60), np.uint8), window)
    with pytest.raises(VideoError, match=r"A window is|times as large"):
        framing.points(np.zeros((1, 3), np.float32), (60, 40), window)


def test_a_window_is_not_left_out_without_a_size() -> None:
    with pytest.raises(VideoError, match="to a size"):
        Framing().frame(np.zeros((40, 60, 3), np.uint8), (0, 0, 10, 10))
    with pytest.raises(VideoError, match="to a size"):
        Framing().labels(np.zeros((40, 60), np.uint8), (0, 0, 10, 10))


def test_every_dataset_tells_its_framing() -> None:
    assert framing_of(GeneratedVideo(size=(32, 48))) == Framing((32, 48))
    assert framing_of(FigureVideo(size=(32, 48))) == Framing((32, 48))
    assert framing_of(Own()) == Framing((12, 16))
    assert framing_of(WarpedVideo(Own())) == Framing((12, 16))
    assert framing_of(WarpedVideo(Own(), size=(6, 8))) == Framing((6, 8))


def test_another_source_is_framed_as_the_clips_were(tmp_path: Path, write_video: WriteVideo) -> None:
    path = write_video(tmp_path / "a.mp4")
    for fit in FITS:
        dataset = VideoFiles({"test": [path]}, size=(20, 44), fit=fit, stride=3)
        framing = framing_of(dataset)
        frames = [framing.frame(picture) for picture in VideoStream(path, stride=framing.stride)]
        (clip,) = dataset.clips("test")
        assert torch.equal(torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2), clip.frames)
