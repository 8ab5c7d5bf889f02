import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import savemat

from resq_rl.errors import SettingsError, VideoError
from resq_rl.video.datasets.jhmdb import JHMDBVideo
from tests.video.conftest import WriteImage

WALKS = [f"Scene{scene}_walk_f_nm_np1_fr_med_{number}" for scene in range(6) for number in (0, 1)]
JUMP = "Park_jump_f_cm_np1_ba_bad_0"


def write_video(root: Path, write_image: WriteImage, action: str, video: str, frames: int = 4) -> None:
    """A video whose joint j is a bright pixel at (10 + 2 j + number, 5 + 2 j), counted from 1 as MATLAB does."""
    positions = np.zeros((2, 15, frames))
    for number in range(frames):
        pixels = np.zeros((48, 64, 3))
        for joint in range(15):
            x, y = 10 + 2 * joint + number, 5 + 2 * joint
            positions[:, joint, number] = x, y
            pixels[y - 1, x - 1] = 255
        write_image(root / "Rename_Images" / action / video / f"{number + 1:05d}.png", pixels)
    folder = root / "joint_positions" / action / video
    folder.mkdir(parents=True)
    savemat(
        folder / "joint_positions.mat", {"pos_img": positions, "pos_world": positions / 100, "scale": np.ones(frames)}
    )


@pytest.fixture
def tree(tmp_path: Path, write_image: WriteImage) -> Path:
    root = tmp_path / "jhmdb"
    for video in WALKS:
        write_video(root, write_image, "walk", video)
    write_video(root, write_image, "jump", JUMP, frames=6)
    (root / "splits").mkdir()
    for fold, tested in ((1, WALKS[-2:]), (2, WALKS[:2])):
        lines = [f"{video}.avi {2 if video in tested else 1}" for video in WALKS]
        (root / "splits" / f"walk_test_split{fold}.txt").write_text("\n".join(lines) + "\n")
        (root / "splits" / f"jump_test_split{fold}.txt").write_text(f"{JUMP}.avi 2 \n")
    return root


def names(dataset: JHMDBVideo) -> dict[str, list[str]]:
    return {s: [clip.name.split("/")[2] for clip in dataset.clips(s)] for s in ("train", "validation", "test")}


def test_published_lists_give_splits_by_scene(tree: Path) -> None:
    assert names(JHMDBVideo(tree)) == {"train": WALKS[:8], "validation": WALKS[8:10], "test": [JUMP, *WALKS[10:]]}
    assert names(JHMDBVideo(tree, fold=2))["test"] == [JUMP, *WALKS[:2]]


def test_joints_are_points_that_count_from_zero(tree: Path) -> None:
    dataset = JHMDBVideo(tree, {"test": [f"walk/{WALKS[0]}"]})
    assert (len(dataset.classes), dataset.classes[0], dataset.classes[14]) == (15, "neck", "left_ankle")
    (clip,) = dataset.clips("test")
    labels = torch.as_tensor(clip.labels)
    assert (clip.name, clip.size, clip.fps, labels.shape) == (f"jhmdb/walk/{WALKS[0]}", (48, 64), 30.0, (4, 15, 3))
    for number, points in enumerate(labels):
        for joint, (x, y, counts) in enumerate(points.tolist()):
            assert (x, y, counts) == (9 + 2 * joint + number, 4 + 2 * joint, 1)
            assert (clip.frames[number, :, int(y), int(x)] == 255).all()


def test_joints_outside_the_frame_do_not_count(tree: Path) -> None:
    positions = np.full((2, 15, 4), 30.0)
    positions[0, 3], positions[1, 4] = 0.2, 60.0
    path = tree / "joint_positions" / "walk" / WALKS[0] / "joint_positions.mat"
    savemat(path, {"pos_img": positions})
    (clip,) = JHMDBVideo(tree, {"test": [f"walk/{WALKS[0]}"]}).clips("test")
    assert (torch.as_tensor(clip.labels)[:, :, 2] == 0).nonzero()[:, 1].unique().tolist() == [3, 4]


def test_points_ranges_crops_and_pieces(tree: Path) -> None:
    dataset = JHMDBVideo(
        tree,
        {"train": ["jump"], "test": [f"walk/{WALKS[1]}[1:3]"]},
        points=["face", "neck"],
        size=(64, 64),
        crop=1.5,
        clip_frames=3,
    )
    assert dataset.classes == ("face", "neck")
    assert [(clip.name, len(clip)) for clip in dataset.clips("train")] == [
        (f"jhmdb/jump/{JUMP}[0:3]", 3),
        (f"jhmdb/jump/{JUMP}[3:6]", 3),
    ]
    (clip,) = dataset.clips("test")
    labels = torch.as_tensor(clip.labels)
    assert (clip.name, clip.size, labels.shape) == (f"jhmdb/walk/{WALKS[1]}[1:3]", (64, 64), (2, 2, 3))
    assert float(labels[0, 0, 1] - labels[0, 1, 1]) == pytest.approx(4 * 64 / (29 * 1.5), rel=0.02)


def test_missing_things_are_named(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(
        VideoError, match=r"No JHMDB dataset at .*: looked for Rename_Images, joint_pos.*, found jhmdb in"
    ):
        JHMDBVideo(tmp_path)
    with pytest.raises(VideoError, match=r"looked for Rename_Images/wlak, found jump, walk in .*name of the action"):
        JHMDBVideo(tree, {"test": ["wlak"]})
    with pytest.raises(VideoError, match=r"No single video walk\[0:2\] of JHMDBVideo"):
        JHMDBVideo(tree, {"test": ["walk[:2]"]})
    with pytest.raises(VideoError, match=r"JHMDBVideo has no split train in .*: found test"):
        JHMDBVideo(tree, {"test": ["jump"]}).clips("train")
    with pytest.raises(VideoError, match=r"No frame to take of jump/.*\[6:\] of JHMDBVideo: 6 have joints"):
        JHMDBVideo(tree, {"test": [f"jump/{JUMP}[6:]"]}).clips("test")
    with pytest.raises(VideoError, match="must be disjoint"):
        JHMDBVideo(tree, {"train": ["jump"], "test": [f"jump/{JUMP}"]})
    with pytest.raises(VideoError, match="leads out of the JHMDB dataset"):
        JHMDBVideo(tree, {"test": ["walk/../../secret"]}).clips("test")
    with pytest.raises(SettingsError, match="Setting fold of JHMDBVideo must be from 1 to 3, got 4"):
        JHMDBVideo(tree, fold=4)
    with pytest.raises(SettingsError, match=r"Setting points of JHMDBVideo must name some of neck, .* got nose"):
        JHMDBVideo(tree, points=["nose"])
    with pytest.raises(SettingsError, match=r"Setting points of JHMDBVideo must name some of neck, .* got nothing"):
        JHMDBVideo(tree, points=[])


def test_a_tree_downloaded_in_part_is_described(tree: Path) -> None:
    shutil.rmtree(tree / "joint_positions" / "walk" / WALKS[10])
    shutil.rmtree(tree / "Rename_Images" / "jump" / JUMP)
    with pytest.raises(
        VideoError,
        match=rf"JHMDB dataset at .* is incomplete: of 6 .* 2 are missing: Rename_Images/jump/{JUMP}, "
        rf"joint_positions/walk/{WALKS[10]}/joint_positions\.mat; found nothing in .*/Rename_Images/jump",
    ):
        JHMDBVideo(tree).clips("test")
    (tree / "splits" / "walk_test_split1.txt").unlink()
    with pytest.raises(VideoError, match=r"looked for splits/walk_test_split1\.txt, found jump_test_split1\.txt, "):
        JHMDBVideo(tree)


@pytest.mark.parametrize("name", ["..", "../../secret.avi", "/etc/passwd"])
def test_a_list_cannot_lead_out_of_the_dataset(name: str, tree: Path) -> None:
    (tree.parent / "secret").mkdir()
    (tree / "splits" / "jump_test_split1.txt").write_text(f"{name} 2\n")
    with pytest.raises(VideoError, match=r"leads out of the JHMDB|is incomplete: .*Rename_Images/jump/(secret|passwd)"):
        JHMDBVideo(tree).clips("test")


def test_damaged_files_are_named(tree: Path) -> None:
    path = tree / "joint_positions" / "jump" / JUMP / "joint_positions.mat"
    dataset = JHMDBVideo(tree, {"test": ["jump"]})
    for content, message in (
        ({"pos_img": np.zeros((2, 13, 6))}, r"must be of shape \(2, 15, frames\), got \(2, 13, 6\)"),
        ({"pos_img": np.zeros((2, 15, 9))}, r"holds 6 frames, but joint positions are there for 9"),
        ({"other": np.zeros(3)}, r"Cannot read the joint positions .*has no pos_img"),
    ):
        savemat(path, content)
        with pytest.raises(VideoError, match=message):
            dataset.clips("test")
    path.write_bytes(b"MATLAB 5.0 cut off")
    with pytest.raises(VideoError, match=r"Cannot read the joint positions .*joint_positions\.mat"):
        dataset.clips("test")
    (tree / "splits" / "jump_test_split1.txt").write_text("only one word\n")
    with pytest.raises(
        VideoError, match=r"List .*jump_test_split1\.txt of JHMDB must hold lines .* got 'only one word'"
    ):
        JHMDBVideo(tree)
