import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from resq_rl.errors import SettingsError, VideoError
from resq_rl.video.datasets.posetrack import PoseTrackVideo
from tests.video.conftest import WriteImage

TRAIN = [f"{number:06d}_bonn_train" for number in range(1, 7)]
VAL = "000342_mpii_test"
# Frames in which the persons 0 and 1 of a sequence are labelled; all sequences have 8 frames.
LABELLED = {0: (2, 3, 4, 6), 1: (4, 5)}


def keypoints(person: int, number: int) -> np.ndarray:
    """Point k of person 0 stands at (20 + 2 k + number, 10 + 3 k), of person 1 40 pixels further right."""
    points = np.array([[20 + 40 * person + 2 * k + number, 10 + 3 * k, 1] for k in range(17)], dtype=float)
    points[3:5] = 0  # the ears
    return points


def write_sequence(root: Path, write_image: WriteImage, name: str, folder: str = "annotations") -> Path:
    kind, sequence = name.split("/")
    images, annotations = [], []
    for number in range(8):
        file, pixels = f"images/{name}/{number:06d}.jpg", np.zeros((80, 120, 3))
        identity = 10_000_000_000 + int(sequence[:6]) * 10_000 + number
        labelled = any(number in numbers for numbers in LABELLED.values())
        images.append(
            {
                "file_name": file,
                "id": identity,
                "frame_id": identity,
                "vid_id": sequence[:6],
                "nframes": 8,
                "is_labeled": labelled,
            }
        )
        for person, numbers in LABELLED.items():
            points = keypoints(person, number)
            for x, y, counts in points.astype(int):
                if counts:
                    pixels[y - 1 : y + 2, x - 1 : x + 2] = 255
            if number in numbers:
                corner, extent = points[points[:, 2] > 0, :2].min(0), np.ptp(points[points[:, 2] > 0, :2], 0)
                own: dict[str, Any] = {"image_id": identity, "track_id": person, "category_id": 1}
                annotations.append({**own, "bbox": [*corner, *extent], "keypoints": points.ravel().tolist()})
        write_image(root / file, pixels)
    path = root / folder / kind / f"{sequence}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"images": images, "annotations": annotations, "categories": [{"name": "person", "id": 1}]}
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def tree(tmp_path: Path, write_image: WriteImage) -> Path:
    root = tmp_path / "posetrack"
    for sequence in TRAIN:
        write_sequence(root, write_image, f"train/{sequence}")
    write_sequence(root, write_image, f"val/{VAL}")
    return root


def test_a_clip_follows_the_person_labelled_most(tree: Path) -> None:
    dataset = PoseTrackVideo(tree, size=(128, 128), crop=1.5)
    assert (len(dataset.classes), dataset.classes[0], dataset.classes[16]) == (17, "nose", "right_ankle")
    (clip,) = dataset.clips("test")
    labels = torch.as_tensor(clip.labels)
    assert (clip.name, clip.size, labels.shape) == (f"posetrack/val/{VAL}/0[2:7]", (128, 128), (5, 17, 3))
    for number, (frame, points) in enumerate(zip(clip.frames, labels, strict=True), start=2):
        for k, (x, y, counts) in enumerate(points.tolist()):
            assert counts == (number in LABELLED[0] and k not in (3, 4))
            if counts:
                assert frame[0, round(y), round(x)] > 120


def test_more_people_points_and_pieces(tree: Path) -> None:
    clips = PoseTrackVideo(tree, people=5, points=["right_ankle", "nose"], clip_frames=2).clips("test")
    assert [clip.name.removeprefix(f"posetrack/val/{VAL}/") for clip in clips] == ["0[2:4]", "0[4:6]", "1[4:6]"]
    labels = torch.as_tensor(clips[2].labels)
    assert labels.shape == (2, 2, 3)
    assert (labels[:, 0, 1] > labels[:, 1, 1]).all()


def test_published_sets_give_disjoint_splits(tree: Path) -> None:
    dataset = PoseTrackVideo(tree, size=(16, 16))
    names = {s: [clip.name.split("/")[2] for clip in dataset.clips(s)] for s in ("train", "validation", "test")}
    assert names == {"train": [*TRAIN[:4], TRAIN[5]], "validation": [TRAIN[4]], "test": [VAL]}


def test_ranges_and_other_folders(tree: Path, write_image: WriteImage) -> None:
    write_sequence(tree, write_image, "val/000777_new_test", "posetrack_data")
    dataset = PoseTrackVideo(tree, {"test": ["val/000777_new_test[3:6]"]}, annotations="posetrack_data", size=(16, 16))
    assert [clip.name for clip in dataset.clips("test")] == ["posetrack/val/000777_new_test/0[3:5]"]


def test_missing_things_are_named(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(
        VideoError, match=r"No PoseTrack dataset at .*: looked for annotations/train, found posetrack in"
    ):
        PoseTrackVideo(tmp_path)
    with pytest.raises(VideoError, match=r"looked for annotations/test, found train, val in"):
        PoseTrackVideo(tree, {"test": ["test"]})
    with pytest.raises(VideoError, match=rf"No single video val/000001 of PoseTrackVideo .* found .*{VAL}"):
        PoseTrackVideo(tree, {"test": ["val/000001"]})
    with pytest.raises(VideoError, match=r"No single video train\[0:3\] of PoseTrackVideo"):
        PoseTrackVideo(tree, {"test": ["train[0:3]"]})
    with pytest.raises(VideoError, match=r"PoseTrackVideo has no split train in .*: found test"):
        PoseTrackVideo(tree, {"test": ["val"]}).clips("train")
    with pytest.raises(VideoError, match="must be disjoint"):
        PoseTrackVideo(tree, {"train": ["val"], "test": [f"val/{VAL}"]})
    with pytest.raises(SettingsError, match="Setting people of PoseTrackVideo must be 1 or more, got 0"):
        PoseTrackVideo(tree, people=0)


def test_a_tree_downloaded_in_part_is_described(tree: Path) -> None:
    for number in (3, 5):
        (tree / "images" / "val" / VAL / f"{number:06d}.jpg").unlink()
    with pytest.raises(
        VideoError,
        match=rf"PoseTrack dataset at .* is incomplete: of 5 .* 2 are missing: images/val/{VAL}/000003\.jpg, "
        rf"images/val/{VAL}/000005\.jpg; found 000000\.jpg, ",
    ):
        PoseTrackVideo(tree).clips("test")


def test_annotations_cannot_name_files_elsewhere(tree: Path) -> None:
    path = tree / "annotations" / "val" / f"{VAL}.json"
    path.write_text(path.read_text().replace("images/val", "../images/val"))
    with pytest.raises(VideoError, match=r"Name '\.\./images/val/.*' leads out of the PoseTrack dataset"):
        PoseTrackVideo(tree).clips("test")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"images": []}', '{"images": [{"id": 1}], "annotations": []}'])
def test_damaged_annotations_are_named(tree: Path, content: str) -> None:
    (tree / "annotations" / "val" / f"{VAL}.json").write_text(content)
    with pytest.raises(VideoError, match=rf"Cannot read the annotation .*{VAL}\.json .*not in the format of 2018"):
        PoseTrackVideo(tree).clips("test")
