import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from resq_rl.errors import SettingsError, VideoError
from resq_rl.video.clip import IGNORE
from resq_rl.video.datasets.davis import DavisVideo
from tests.video.conftest import WriteImage

SEQUENCES = ("bear", "cows", "dog", "goat", "kite", "lion", "moth")


def mask(number: int, inside: int, size: tuple[int, int] = (40, 60)) -> np.ndarray:
    """A square of 10 pixels whose left edge is at 8 + number."""
    values = np.zeros(size, dtype=np.uint8)
    values[12:22, 8 + number : 18 + number] = inside
    return values


def write_tree(root: Path, write_image: WriteImage, year: int, frames: int = 6) -> Path:
    """A dataset in which what is labelled is bright."""
    for sequence in SEQUENCES:
        for number in range(frames):
            inside = 255 if year == 2016 else 1
            labels = mask(number, inside)
            if year == 2017:
                labels[30:36, 40:50] = 2
            name = f"480p/{sequence}/{number:05d}"
            write_image(root / "JPEGImages" / f"{name}.jpg", np.where(labels > 0, 220, 30))
            write_image(root / "Annotations" / f"{name}.png", labels, "L" if year == 2016 else "P")
    return root


def write_lists(root: Path, year: int) -> None:
    folder = root / "ImageSets" / ("480p" if year == 2016 else "2017")
    folder.mkdir(parents=True)
    for name, sequences in (("train", SEQUENCES[:5]), ("val", SEQUENCES[5:])):
        lines = list(sequences)
        if year == 2016:
            lines = [
                f"/JPEGImages/480p/{s}/{n:05d}.jpg /Annotations/480p/{s}/{n:05d}.png" for s in sequences for n in (0, 1)
            ]
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")


@pytest.fixture(params=[2016, 2017])
def year(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def tree(tmp_path: Path, write_image: WriteImage, year: int) -> Path:
    return write_tree(tmp_path / "davis", write_image, year)


@pytest.mark.parametrize("name", ["..", "../../secret", "/JPEGImages/480p/../00000.jpg x", "/etc/passwd x"])
def test_a_list_cannot_lead_out_of_the_dataset(name: str, tree: Path, year: int) -> None:
    write_lists(tree, year)
    (tree.parent / "secret").mkdir()
    for path in (tree / "ImageSets").rglob("val.txt"):
        path.write_text(f"{name}\n")
    with pytest.raises(VideoError, match=r"leads out of the DAVIS|is incomplete: .*JPEGImages/480p/(secret|etc)"):
        DavisVideo(tree)


def test_both_years_are_read_and_told_apart(tree: Path, year: int) -> None:
    dataset = DavisVideo(tree, {"train": ["bear"], "test": ["dog", "cows"]})
    assert (dataset.year, dataset.classes) == (year, ("background", "object"))
    clips = dataset.clips("test")
    assert [clip.name for clip in clips] == [f"davis{year}/dog", f"davis{year}/cows"]
    for clip in clips:
        assert (len(clip), clip.size, clip.fps) == (6, (40, 60), 24.0)
        for number in range(6):
            expected = mask(number, 1)
            if year == 2017:
                expected[30:36, 40:50] = 1
            assert torch.as_tensor(clip.labels)[number].tolist() == expected.tolist()
        bright = clip.frames.float().mean(dim=1) > 125
        assert (bright != (torch.as_tensor(clip.labels) == 1)).float().mean() < 0.01


def test_object_numbers_can_be_classes(tmp_path: Path, write_image: WriteImage) -> None:
    tree = write_tree(tmp_path, write_image, 2017)
    dataset = DavisVideo(tree, {"test": ["bear"]}, objects=2)
    assert dataset.classes == ("background", "object 1", "object 2")
    (clip,) = dataset.clips("test")
    assert torch.unique(torch.as_tensor(clip.labels)).tolist() == [0, 1, 2]
    with pytest.raises(VideoError, match=r"00000\.png holds values outside the classes: 2, where 0, 1, 255 are"):
        DavisVideo(tree, {"test": ["bear"]}, objects=1).clips("test")


def test_official_lists_give_disjoint_splits(tree: Path, year: int) -> None:
    write_lists(tree, year)
    dataset = DavisVideo(tree, frames=1)
    names = {split: [c.name.split("/")[1] for c in dataset.clips(split)] for split in ("train", "validation", "test")}
    assert names == {"train": list(SEQUENCES[:4]), "validation": ["kite"], "test": ["lion", "moth"]}
    assert dataset.year == year


def test_ranges_frames_and_pieces(tree: Path, year: int) -> None:
    def shifts(splits: str, **options: Any) -> dict[str, list[int]]:
        clips = DavisVideo(tree, {"test": [splits]}, **options).clips("test")
        return {
            clip.name.split("/")[1]: [int((row > 0).nonzero()[0]) - 8 for row in torch.as_tensor(clip.labels)[:, 15]]
            for clip in clips
        }

    assert shifts("dog[2:5]") == {"dog[2:5]": [2, 3, 4]}
    assert shifts("dog", frames=2) == {"dog": [0, 1]}
    assert shifts("dog[1:]", clip_frames=2) == {"dog[1:3]": [1, 2], "dog[3:5]": [3, 4]}
    assert shifts("dog[1:]", clip_frames={"test": 2}) == {"dog[1:3]": [1, 2], "dog[3:5]": [3, 4]}
    assert shifts("dog[1:]", clip_frames={"train": 2}) == {"dog[1:]": [1, 2, 3, 4, 5]}
    dataset = DavisVideo(tree, {"train": ["dog[:3]"], "test": ["dog[3:]"]})
    assert [len(clip) for split in ("train", "test") for clip in dataset.clips(split)] == [3, 3]


def test_resized_frames_and_labels_agree(tree: Path) -> None:
    (clip,) = DavisVideo(tree, {"test": ["dog"]}, size=(20, 30)).clips("test")
    assert clip.size == (20, 30)
    bright = clip.frames.float().mean(dim=1) > 125
    assert (bright != (torch.as_tensor(clip.labels) == 1)).float().mean() < 0.03


def test_crop_follows_the_object(tmp_path: Path, write_image: WriteImage) -> None:
    tree = write_tree(tmp_path, write_image, 2016, frames=24)
    (clip,) = DavisVideo(tree, {"test": ["dog"]}, size=(64, 64), crop=1.6).clips("test")
    labels = torch.as_tensor(clip.labels)
    for number in range(6, 18):  # away from the ends, where smoothing lags behind a steady motion
        rows, columns = (labels[number] == 1).nonzero(as_tuple=True)
        assert float(rows.float().mean()) == pytest.approx(31.5, abs=2)
        assert float(columns.float().mean()) == pytest.approx(31.5, abs=2)
        assert len(rows) == pytest.approx((64 / 1.6) ** 2, rel=0.1)
    bright = clip.frames.float().mean(dim=1) > 125
    assert (bright != (labels == 1))[labels != IGNORE].float().mean() < 0.03


def test_crop_beyond_the_border_is_padded_and_unlabelled(tree: Path, year: int) -> None:
    (clip,) = DavisVideo(tree, {"test": ["dog"]}, size=(50, 50), crop=5 if year == 2016 else 2).clips("test")
    labels = torch.as_tensor(clip.labels)
    share = (labels == IGNORE).float().mean()
    assert 0.1 < share < 0.7
    assert (labels[:, :2] == IGNORE).all()
    assert (clip.frames[:, :, :2, :2] < 60).all()  # the dark edge goes on
    assert (labels == 1).any()


def test_crop_has_the_proportions_of_the_size(tree: Path, year: int) -> None:
    if year == 2016:
        (clip,) = DavisVideo(tree, {"test": ["dog"]}, size=(30, 60), crop=2).clips("test")
        rows, columns = (torch.as_tensor(clip.labels)[3] == 1).nonzero(as_tuple=True)
        assert int(rows.max() - rows.min()) == pytest.approx(int(columns.max() - columns.min()), abs=2)


def test_crop_needs_an_object(tree: Path) -> None:
    for path in (tree / "Annotations" / "480p" / "dog").iterdir():
        Image.fromarray(np.zeros((40, 60), dtype=np.uint8)).save(path)
    with pytest.raises(VideoError, match=r"No labelled object to crop around in .*dog .*: all 6 labels are empty"):
        DavisVideo(tree, {"test": ["dog"], "train": ["bear"]}, size=(8, 8), crop=1.3).clips("test")


def test_missing_things_are_named(tree: Path, tmp_path: Path, unchecked_types: None) -> None:
    with pytest.raises(VideoError, match=r"No DAVIS dataset at .*looked for Annotations/480p, JPEG.*, found davis in"):
        DavisVideo(tmp_path, {"test": ["dog"]})
    with pytest.raises(VideoError, match=r"No DAVIS dataset at .*nowhere: .* found davis in"):
        DavisVideo(tmp_path / "nowhere", {"test": ["dog"]})
    with pytest.raises(VideoError, match=r"looked for Annotations/1080p, JPEGImages/1080p, found 480p in"):
        DavisVideo(tree, {"test": ["dog"]}, resolution="1080p")
    with pytest.raises(VideoError, match=r"looked for .*JPEGImages/480p/dgo, found bear, cows, dog, goat, kite"):
        DavisVideo(tree, {"test": ["dgo"]})
    with pytest.raises(VideoError, match=r"No official list train\.txt of DAVIS: .*Give splits, with .* bear, cows"):
        DavisVideo(tree)
    with pytest.raises(VideoError, match=r"DavisVideo has no split train in .*: found test"):
        DavisVideo(tree, {"test": ["dog"]}).clips("train")
    with pytest.raises(VideoError, match="Unknown split 'val'"):
        DavisVideo(tree, {"test": ["dog"]}).clips("val")  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(VideoError, match=r"No frame to take from .*dog: it holds 6 frames, wanted dog\[6:\]"):
        DavisVideo(tree, {"test": ["dog[6:]"]}).clips("test")


def test_a_tree_downloaded_in_part_is_described(tree: Path, year: int) -> None:
    write_lists(tree, year)
    (tree / "Annotations" / "480p" / "dog" / "00003.png").unlink()
    with pytest.raises(
        VideoError, match=r"incomplete: of 6 .* missing: Annotations/480p/dog/00003\.png; found 00000\.png"
    ):
        DavisVideo(tree, {"test": ["dog"]}).clips("test")
    for name in ("bear", "goat"):
        shutil.rmtree(tree / "JPEGImages" / "480p" / name)
    with pytest.raises(
        VideoError,
        match=r"DAVIS dataset at .* is incomplete: of 14 .* 2 are missing: JPEGImages/480p/bear, JPEGImages/480p/goat; "
        "found cows, dog",
    ):
        DavisVideo(tree)


def test_overlapping_splits_are_refused(tree: Path) -> None:
    with pytest.raises(VideoError, match=r"must be disjoint, got dog\[2:\] in test and dog in train"):
        DavisVideo(tree, {"train": ["dog"], "test": ["dog[2:]"]})


def test_labels_of_another_size_or_value_are_named(tree: Path, year: int, write_image: WriteImage) -> None:
    path = tree / "Annotations" / "480p" / "dog" / "00002.png"
    write_image(path, mask(2, 1 if year == 2017 else 255, (30, 60)))
    dataset = DavisVideo(tree, {"test": ["dog"]})
    with pytest.raises(
        VideoError, match=r"label of frame .*00002\.jpg must be of the size of its frame, 60x40, got 60x30"
    ):
        dataset.clips("test")
    if year == 2016:
        write_image(path, mask(2, 7))
        with pytest.raises(VideoError, match=r"00002\.png holds values outside the classes: 7, where 0, 255 are"):
            dataset.clips("test")


def test_void_of_2017_is_ignored(tmp_path: Path, write_image: WriteImage) -> None:
    tree = write_tree(tmp_path, write_image, 2017)
    write_image(tree / "Annotations" / "480p" / "dog" / "00001.png", mask(1, 255))
    (clip,) = DavisVideo(tree, {"test": ["dog"]}).clips("test")
    assert torch.unique(torch.as_tensor(clip.labels)[1]).tolist() == [0, IGNORE]


@pytest.mark.parametrize(
    "options",
    [{"crop": 1.3}, {"crop": 0.0, "size": (8, 8)}, {"year": 2018}, {"objects": 2, "year": 2016}, {"frames": 0}],
)
def test_settings_out_of_range_are_named(tree: Path, options: dict[str, object]) -> None:
    with pytest.raises(SettingsError, match=r"Setting \w+ of DavisVideo must be .*, got "):
        DavisVideo(tree, {"test": ["dog"]}, **options)  # type: ignore[arg-type]


@pytest.mark.real_data
def test_real_sequences(shared: Path) -> None:
    root = shared / "data" / "davis2016"
    dataset = DavisVideo(
        root,
        {"test": ["kite-surf[:12]", "scooter-black[:12]"]},
        size=(96, 96),
        crop=1.3,
        clip_frames=6,
        crop_thickness=11,
    )
    clips = dataset.clips("test")
    assert (dataset.year, len(clips)) == (2016, 4)
    for clip in clips:
        labels = torch.as_tensor(clip.labels)
        assert set(torch.unique(labels).tolist()) <= {0, 1, IGNORE}
        assert ((labels == 1).float().mean(dim=(1, 2)) > 0.15).all()
    full = DavisVideo(root, {"test": ["dog"]}, frames=2).clips("test")[0]
    assert full.size == (480, 854)
    truth = np.array(Image.open(root / "Annotations" / "480p" / "dog" / "00001.png")) > 0
    assert np.array_equal(torch.as_tensor(full.labels)[1].numpy() == 1, truth)
