import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from resq_rl.errors import SettingsError, VideoError
from resq_rl.video.clip import IGNORE, Clip
from resq_rl.video.datasets.camvid import CamVidVideo
from tests.video.conftest import WriteImage

SUFFIXES = {"0001TP": "png", "0006R0": "jpg"}


def numbers(clip: Clip) -> list[int]:
    """Frame numbers over 10, which are the grey level of the test images."""
    return [round(float(level)) for level in clip.frames[:, 0].float().mean(dim=(1, 2))]


def write_frame(root: Path, write_image: WriteImage, folder: str, stem: str, suffix: str = "png") -> None:
    level = int(stem.split("_")[1].lstrip("f")) // 10
    write_image(root / folder / f"{stem}.{suffix}", np.full((24, 36, 3), level))
    labels = np.arange(24 * 36).reshape(24, 36) % 12
    write_image(root / f"{folder}annot" / f"{stem}.png", labels)


@pytest.fixture
def tree(tmp_path: Path, write_image: WriteImage) -> Path:
    root = tmp_path / "camvid"
    for number in (390, 420, 450, 480, 660, 690, 720):  # seconds 16 to 21 are missing
        write_frame(root, write_image, "train", f"0006R0_f{number:05d}", "jpg")
    for number in (30, 60, 90):
        write_frame(root, write_image, "train", f"0001TP_{number:06d}")
    for number in range(1000, 1012, 2):
        write_frame(root, write_image, "val", f"0016E5_{number:05d}")
    return root


def test_drives_become_clips(tree: Path) -> None:
    dataset = CamVidVideo(tree)
    assert len(dataset.classes) == 11
    clips = dataset.clips("train")
    assert {clip.name: numbers(clip) for clip in clips} == {
        "camvid/train/0001TP": [3, 6, 9],
        "camvid/train/0006R0_00390": [39, 42, 45, 48],
        "camvid/train/0006R0_00660": [66, 69, 72],
    }
    assert {clip.fps for clip in clips} == {1.0}
    (clip,) = dataset.clips("validation")
    assert (len(clip), clip.fps, clip.size) == (6, 15.0, (24, 36))


def test_labels_keep_a_size_of_their_own(tree: Path) -> None:
    (clip,) = CamVidVideo(tree, size=(12, 18), label_size=(24, 36)).clips("validation")
    written = np.arange(24 * 36).reshape(24, 36) % 12
    assert clip.size == (12, 18)
    assert np.array_equal(torch.as_tensor(clip.labels)[0].numpy(), np.where(written == 11, IGNORE, written))


def test_void_is_ignored_and_other_labels_are_kept(tree: Path) -> None:
    (clip,) = CamVidVideo(tree).clips("validation")
    written = np.arange(24 * 36).reshape(24, 36) % 12
    expected = np.where(written == 11, IGNORE, written)
    assert all(np.array_equal(label.numpy(), expected) for label in torch.as_tensor(clip.labels))


def test_splits_by_folder_drive_and_range(tree: Path) -> None:
    dataset = CamVidVideo(
        tree,
        {"train": ["train/0001TP"], "validation": ["val/0016E5[:2]"], "test": ["val/0016E5[2:]", "train/0006R0[5:]"]},
    )
    assert [clip.name for clip in dataset.clips("train")] == ["camvid/train/0001TP"]
    assert [(clip.name, len(clip)) for clip in dataset.clips("validation")] == [("camvid/val/0016E5[0:2]", 2)]
    assert [(clip.name, len(clip)) for clip in dataset.clips("test")] == [
        ("camvid/val/0016E5[2:]", 4),
        ("camvid/train/0006R0[5:]", 2),
    ]


def test_frames_pieces_and_size(tree: Path) -> None:
    clips = CamVidVideo(tree, {"test": ["val"]}, size=(12, 18), frames=5, clip_frames=2).clips("test")
    assert [(clip.name, clip.size) for clip in clips] == [
        ("camvid/val/0016E5[0:2]", (12, 18)),
        ("camvid/val/0016E5[2:4]", (12, 18)),
    ]


def test_overlapping_splits_are_refused(tree: Path) -> None:
    with pytest.raises(VideoError, match="must be disjoint, got train/0001TP in test and train/0001TP in train"):
        CamVidVideo(tree, {"train": ["train"], "test": ["train/0001TP"]})


def test_missing_things_are_named(tree: Path, tmp_path: Path, unchecked_types: None) -> None:
    with pytest.raises(VideoError, match=r"No CamVid dataset at .*: looked for test, train, val, found camvid in"):
        CamVidVideo(tmp_path)
    with pytest.raises(VideoError, match=r"CamVidVideo has no split test .*: found train, validation. .*FOLDERannot"):
        CamVidVideo(tree).clips("test")
    with pytest.raises(VideoError, match=r"looked for valid, validannot, found train, trainannot, val, valannot"):
        CamVidVideo(tree, {"test": ["valid"]})
    with pytest.raises(VideoError, match=r"No single video train/0001 of CamVidVideo .*: found 0001TP, 0006R0"):
        CamVidVideo(tree, {"test": ["train/0001"]})
    with pytest.raises(VideoError, match=r"No single video train\[0:3\] of CamVidVideo .*Write FOLDER"):
        CamVidVideo(tree, {"test": ["train[:3]"]})
    with pytest.raises(VideoError, match=r"No frame to take of drive 0001TP in .*: it holds 3 images, wanted"):
        CamVidVideo(tree, {"test": ["train/0001TP[3:]"]}).clips("test")
    with pytest.raises(VideoError, match="Unknown split 'val'"):
        CamVidVideo(tree).clips("val")  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(VideoError, match=r"Name '\.\.' leads out of the CamVid dataset"):
        CamVidVideo(tree, {"test": ["../camvid/train"]})


def test_a_tree_downloaded_in_part_is_described(tree: Path) -> None:
    for number in (1004, 1008):
        (tree / "valannot" / f"0016E5_0{number}.png").unlink()
    with pytest.raises(
        VideoError,
        match=r"CamVid dataset at .* is incomplete: of 6 files .* 2 are missing: valannot/0016E5_01004\.png, "
        r"valannot/0016E5_01008\.png; found 0016E5_01000\.png, 0016E5_01002\.png, .* Finish the download",
    ):
        CamVidVideo(tree).clips("validation")
    shutil.rmtree(tree / "valannot")
    with pytest.raises(VideoError, match=r"incomplete: of 2 .* looked for, 1 are missing: valannot; found train, "):
        CamVidVideo(tree)


def test_bad_labels_and_names_are_named(tree: Path, write_image: WriteImage) -> None:
    path = tree / "valannot" / "0016E5_01002.png"
    write_image(path, np.full((24, 36), 12))
    with pytest.raises(VideoError, match=r"0016E5_01002\.png holds values outside the classes: 12, where 0, 1"):
        CamVidVideo(tree).clips("validation")
    write_image(path, np.zeros((24, 30)))
    with pytest.raises(VideoError, match=r"0016E5_01002\.png must be of the size of its frame, 36x24, got 30x24"):
        CamVidVideo(tree).clips("validation")
    write_image(tree / "val" / "cover.png", np.zeros((24, 36)))
    with pytest.raises(VideoError, match=r"Image .*cover\.png of CamVid must end with its frame number"):
        CamVidVideo(tree)


def test_settings_out_of_range_are_named(tree: Path) -> None:
    with pytest.raises(SettingsError, match="Setting clip_frames of CamVidVideo must be 1 or more, got 0"):
        CamVidVideo(tree, clip_frames=0)
    with pytest.raises(SettingsError, match=r"Setting clip_frames\.train of CamVidVideo must be 1 or more, got 0"):
        CamVidVideo(tree, clip_frames={"train": 0})


@pytest.mark.real_data
def test_real_drives(shared: Path) -> None:
    dataset = CamVidVideo(shared / "data" / "camvid", size=(90, 120), frames=30)
    (clip,) = dataset.clips("validation")
    assert (clip.name, len(clip), clip.fps) == ("camvid/val/0016E5", 30, 15.0)
    labels = torch.as_tensor(clip.labels)
    shares = torch.bincount(labels.flatten().long(), minlength=256) / labels.numel()
    assert shares[:11].sum() + shares[IGNORE] == pytest.approx(1.0)
    assert shares[3] > 0.15  # a good part of every drive is road
    above, below = labels[:, :20], labels[:, -20:]
    assert (above == 3).float().mean() < 0.01 < 0.4 < (below == 3).float().mean()
