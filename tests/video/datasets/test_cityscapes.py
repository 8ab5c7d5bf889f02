import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from resq_rl.errors import SettingsError, VideoError
from resq_rl.video.clip import IGNORE, Clip
from resq_rl.video.datasets.cityscapes import CityscapesVideo
from tests.video.conftest import WriteImage

TRAIN = ("aachen", "bochum", "bremen", "cologne", "darmstadt", "dusseldorf")
# From the table that the dataset's authors publish: label value and training number.
PUBLISHED = {
    7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13, 27: 14, 28: 15,
    31: 16, 32: 17, 33: 18,
}  # fmt: skip


def write_snippet(root: Path, write_image: WriteImage, folder: str, number: int, sequence: str = "000000") -> None:
    """Thirty frames, grey by their place, of which the 20th, `number`, has a label with every value there is."""
    stem = f"{folder.split('/')[1]}_{sequence}"
    for place in range(30):
        path = root / "leftImg8bit_sequence" / folder / f"{stem}_{number - 19 + place:06d}_leftImg8bit.png"
        write_image(path, np.full((16, 32, 3), 5 * place))
    values = np.arange(16 * 32).reshape(16, 32) // 10 % 34
    label = root / "gtFine" / folder / f"{stem}_{number:06d}_gtFine"
    write_image(label.with_name(label.name + "_labelIds.png"), values)
    write_image(label.with_name(label.name + "_instanceIds.png"), values)
    label.with_name(label.name + "_polygons.json").write_text("{}")


@pytest.fixture
def tree(tmp_path: Path, write_image: WriteImage) -> Path:
    root = tmp_path / "cityscapes"
    for city in TRAIN:
        write_snippet(root, write_image, f"train/{city}", 19)
    for number in (294, 576):
        write_snippet(root, write_image, "val/frankfurt", number)
    write_snippet(root, write_image, "val/lindau", 19, "000001")
    return root


def places(clip: Clip) -> list[int]:
    return [round(float(level) / 5) for level in clip.frames.float().mean(dim=(1, 2, 3))]


def test_clips_end_at_the_labelled_twentieth_frame(tree: Path) -> None:
    clips = CityscapesVideo(tree).clips("test")
    assert [clip.name for clip in clips] == [
        "cityscapes/val/frankfurt_000000_000294",
        "cityscapes/val/frankfurt_000000_000576",
        "cityscapes/val/lindau_000001_000019",
    ]
    for clip in clips:
        assert places(clip) == list(range(20))
        labels = torch.as_tensor(clip.labels)
        assert (labels[:19] == IGNORE).all()
        assert (labels[19] != IGNORE).any()
        assert (clip.size, clip.fps) == ((16, 32), 17.0)


def test_values_become_training_numbers(tree: Path) -> None:
    dataset = CityscapesVideo(tree)
    assert (len(dataset.classes), dataset.classes[0], dataset.classes[18]) == (19, "road", "bicycle")
    values = np.arange(16 * 32).reshape(16, 32) // 10 % 34
    expected = np.vectorize(lambda value: PUBLISHED.get(value, IGNORE))(values)
    assert np.array_equal(torch.as_tensor(dataset.clips("test")[0].labels)[19].numpy(), expected)


def test_more_frames_and_other_sizes(tree: Path) -> None:
    (clip,) = CityscapesVideo(tree, {"test": ["val/lindau"]}, size=(8, 16), before=3, after=10).clips("test")
    assert places(clip) == list(range(16, 30))
    assert clip.size == (8, 16)
    assert [bool((frame != IGNORE).any()) for frame in torch.as_tensor(clip.labels)] == [n == 3 for n in range(14)]


def test_published_sets_give_disjoint_splits(tree: Path) -> None:
    dataset = CityscapesVideo(tree, before=0)
    cities = {
        split: [clip.name.split("/")[2].split("_")[0] for clip in dataset.clips(split)]
        for split in ("train", "validation", "test")
    }
    assert cities == {
        "train": ["aachen", "bochum", "bremen", "cologne", "dusseldorf"],
        "validation": ["darmstadt"],
        "test": ["frankfurt", "frankfurt", "lindau"],
    }


def test_splits_by_city_and_range(tree: Path) -> None:
    dataset = CityscapesVideo(
        tree, {"train": ["val/frankfurt[:1]"], "test": ["val/frankfurt[1:]", "val/lindau"]}, before=0
    )
    assert [len(dataset.clips(split)) for split in ("train", "test")] == [1, 2]
    with pytest.raises(VideoError, match="must be disjoint, got val/frankfurt in test and val/frankfurt"):
        CityscapesVideo(tree, {"train": ["val/frankfurt[:1]"], "test": ["val"]})


def test_missing_things_are_named(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(
        VideoError, match=r"No Cityscapes dataset at .*: looked for gtFine/train, .* found cityscapes in"
    ):
        CityscapesVideo(tmp_path)
    with pytest.raises(VideoError, match=r"looked for gtFine/test, leftImg8bit_sequence/test, found train, val in"):
        CityscapesVideo(tree, {"test": ["test"]})
    with pytest.raises(VideoError, match=r"No single video val/ulm of CityscapesVideo in .*: found frankfurt, lindau"):
        CityscapesVideo(tree, {"test": ["val/ulm"]})
    with pytest.raises(VideoError, match=r"No single video val\[0:2\] of CityscapesVideo"):
        CityscapesVideo(tree, {"test": ["val[:2]"]})
    with pytest.raises(
        VideoError, match=r"No snippet to take of val/lindau\[1:\] in .* found 1 of these among lindau_"
    ):
        CityscapesVideo(tree, {"test": ["val/lindau[1:]"]}).clips("test")
    with pytest.raises(VideoError, match=r"has no split train in .*: found test\. Add it .*val/frankfurt"):
        CityscapesVideo(tree, {"test": ["val"]}).clips("train")
    with pytest.raises(VideoError, match=r"Name '.*/\.\.' leads out of the Cityscapes dataset"):
        CityscapesVideo(tree, {"test": ["../val"]})
    with pytest.raises(SettingsError, match="Setting before of CityscapesVideo must be from 0 to 19, got 20"):
        CityscapesVideo(tree, before=20)


def test_a_tree_downloaded_in_part_is_described(tree: Path) -> None:
    folder = tree / "leftImg8bit_sequence" / "val" / "frankfurt"
    for number in (280, 281, 300):  # the last of them is not needed
        (folder / f"frankfurt_000000_{number:06d}_leftImg8bit.png").unlink()
    with pytest.raises(
        VideoError,
        match=r"Cityscapes dataset at .* is incomplete: of 60 files .* 2 are missing: leftImg8bit_sequence/val/"
        r"frankfurt/frankfurt_000000_000280_leftImg8bit\.png, .*; found frankfurt_000000_000275_leftImg8bit\.png, ",
    ):
        CityscapesVideo(tree).clips("test")
    shutil.rmtree(tree / "leftImg8bit_sequence" / "train")
    with pytest.raises(VideoError, match=r"incomplete: of 4 .* missing: leftImg8bit_sequence/train; found val in"):
        CityscapesVideo(tree)


def test_damaged_frames_and_labels_are_named(tree: Path, write_image: WriteImage) -> None:
    name = "frankfurt_000000_000294"
    write_image(tree / "gtFine" / "val" / "frankfurt" / f"{name}_gtFine_labelIds.png", np.full((16, 32), 77))
    with pytest.raises(VideoError, match=r"labelIds\.png holds values outside the classes: 77"):
        CityscapesVideo(tree).clips("test")
    write_image(tree / "gtFine" / "val" / "frankfurt" / f"{name}_gtFine_labelIds.png", np.full((16, 30), 7))
    with pytest.raises(VideoError, match=r"must be of the size of its frame, 32x16, got 30x16"):
        CityscapesVideo(tree).clips("test")
