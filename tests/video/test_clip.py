import math

import pytest
import torch

from resq_rl.errors import VideoError
from resq_rl.video.clip import IGNORE, SPLITS, Clip, VideoDataset, check_split
from resq_rl.video.datasets.camvid import CamVidVideo
from resq_rl.video.datasets.davis import DavisVideo
from resq_rl.video.files import VideoFiles
from resq_rl.video.generated.video import GeneratedVideo


def frames(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


def test_clip_knows_its_length_and_size() -> None:
    clip = Clip(frames(5, 3, 4, 6), frames(5, 4, 6), 24.0, "a/b", "here")
    assert (len(clip), clip.size) == (5, (4, 6))
    assert Clip(frames(1, 3, 4, 6), None, 1.0, "a", "here").labels is None
    assert IGNORE == 255


@pytest.mark.parametrize(
    ("shape", "dtype"), [((5, 4, 6), torch.uint8), ((5, 1, 4, 6), torch.uint8), ((5, 3, 4, 6), torch.float32)]
)
def test_frames_of_another_kind_are_refused(shape: tuple[int, ...], dtype: torch.dtype, unchecked_types: None) -> None:
    with pytest.raises(VideoError, match=r"clip 'a' \(here\).*uint8 of shape \(t, 3, h, w\).*Convert"):
        Clip(torch.zeros(shape, dtype=dtype), None, 24.0, "a", "here")


@pytest.mark.parametrize("shape", [(0, 3, 4, 6), (2, 3, 0, 6)])
def test_clip_without_a_pixel_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(VideoError, match=r"at least one frame of one pixel, got shape \(.*Check"):
        Clip(frames(*shape), None, 24.0, "a", "here")


@pytest.mark.parametrize(
    "labels", [frames(4, 4, 6), frames(5, 0, 4), frames(5, 1, 4, 6), torch.zeros(5, 4, 6, dtype=torch.int64)]
)
def test_labels_that_do_not_fit_are_refused(labels: torch.Tensor, unchecked_types: None) -> None:
    with pytest.raises(VideoError, match=r"must be uint8 of shape \(5, h, w\).*got torch"):
        Clip(frames(5, 3, 4, 6), labels, 24.0, "a", "here")


@pytest.mark.parametrize("fps", [0.0, -1.0, math.nan, math.inf])
def test_frame_rate_must_be_positive(fps: float) -> None:
    with pytest.raises(VideoError, match="Frame rate of clip 'a'"):
        Clip(frames(1, 3, 4, 6), None, fps, "a", "here")


def test_split_names_are_checked() -> None:
    assert [check_split(split) for split in SPLITS] == ["train", "validation", "test"]
    with pytest.raises(VideoError, match="Unknown split 'val': use one of train, validation, test"):
        check_split("val")


def test_every_reader_is_a_dataset() -> None:
    readers: list[type[VideoDataset]] = [CamVidVideo, DavisVideo, GeneratedVideo, VideoFiles]  # mypy compares
    assert all(callable(reader.clips) and isinstance(reader.classes, property) for reader in readers)
    assert isinstance(GeneratedVideo(), VideoDataset)
