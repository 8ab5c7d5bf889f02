"""JHMDB: short clips of one person each, with the positions of 15 joints in every frame."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

import numpy as np
from jaxtyping import Float32

from resq_rl.errors import VideoError
from resq_rl.video.clip import Split
from resq_rl.video.datasets.base import Recording
from resq_rl.video.datasets.points import PointVideo, points_box
from resq_rl.video.images import check_count, image_paths
from resq_rl.video.parts import Part

__all__ = ["JHMDBVideo"]

_FRAMES: Final = "Rename_Images"
_JOINTS: Final = "joint_positions"
_LISTS: Final = "splits"
_POINTS: Final = (
    "neck",
    "belly",
    "face",
    "right_shoulder",
    "left_shoulder",
    "right_hip",
    "left_hip",
    "right_elbow",
    "left_elbow",
    "right_knee",
    "left_knee",
    "right_wrist",
    "left_wrist",
    "right_ankle",
    "left_ankle",
)
_RATE: Final = 30.0  # frames per second


@dataclass(frozen=True)
class JHMDBVideo(PointVideo):
    """Clips of JHMDB with the joint positions of its puppets as points.

    Reads `Rename_Images/ACTION/VIDEO/NUMBER.png` and `joint_positions/ACTION/VIDEO/joint_positions.mat` under `root`,
    decoded at each call. Without `splits`, the published lists `splits/ACTION_test_splitFOLD.txt` are used: their test
    videos are the test split, and of the videos for training every fifth scene of an action (videos named alike but
    for their last number are of one scene) is for validation.

    Attributes:
        root: folder that holds `Rename_Images`, `joint_positions` and `splits`.
        splits: for each split "ACTION" for all videos of an action, "ACTION/VIDEO" for one, or
            "ACTION/VIDEO[start:stop]" for some of its frames; None for the published lists.
        fold: which of the three published lists, 1 to 3.
        points: names of the joints wanted, in that order; None for all 15.
        size: height and width in pixels that frames are brought to; None for the size of the source.
        crop: height of a window around the joints as a multiple of theirs, such as 1.3; it follows them smoothly and
            repeats the edge of frames that it leaves. None for full frames.
        clip_frames: cuts each video into clips of this many frames, and drops a shorter rest; None for one clip.
            Or lengths by split, such as {train: 48}.

    Raises:
        SettingsError: a setting out of its range.
        VideoError: a missing root, list or video, or splits that overlap.
    """

    fold: int = 1

    dataset: ClassVar[str] = "JHMDB"
    spelling: ClassVar[str] = "ACTION, ACTION/VIDEO or ACTION/VIDEO[start:stop]"
    names: ClassVar[tuple[str, ...]] = _POINTS

    def __post_init__(self) -> None:
        check_count(self.fold, "fold", self._reader, most=3)
        super().__post_init__()

    def _published(self) -> dict[Split, list[Part]]:
        self._require((_FRAMES, _JOINTS, _LISTS), "Set root to the folder that holds them, as published.")
        found: dict[Split, list[Part]] = {"train": [], "validation": [], "test": []}
        for action in self._folders(""):
            for split, videos in self._listed(action).items():
                found[split] += [Part(f"{action}/{video}") for video in videos]
        return found

    def _folders(self, below_frames: str) -> list[str]:
        folder = self._below(f"{_FRAMES}/{below_frames}")
        return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))

    def _videos(self, group: str) -> list[str]:
        self._require((_FRAMES, _JOINTS), "Set root to the folder that holds them, as published.")
        self._require([f"{_FRAMES}/{group}"], "Correct the name of the action.")
        return self._folders(group)

    def _listed(self, action: str) -> dict[Split, list[str]]:
        """The videos of an action by the published list."""
        name = f"{_LISTS}/{action}_test_split{self.fold}.txt"
        self._require([name], "Finish the download, or give splits.")
        path = self._root / name
        lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if wrong := [" ".join(line) for line in lines if len(line) != 2 or line[1] not in ("0", "1", "2")]:
            raise VideoError(
                f"List {path} of JHMDB must hold lines of a video and 1 (training) or 2 (test), got {wrong[0]!r}. Copy "
                "it again."
            )
        learn = [Path(video).stem for video, use in lines if use == "1"]
        scenes = list(dict.fromkeys(video.rpartition("_")[0] for video in learn))
        held = set(scenes[4::5])
        return {
            "train": [video for video in learn if video.rpartition("_")[0] not in held],
            "validation": [video for video in learn if video.rpartition("_")[0] in held],
            "test": [Path(video).stem for video, use in lines if use == "2"],
        }

    def _recordings(self, parts: Sequence[Part]) -> Iterator[Recording]:
        wanted = [name for part in parts for name in (f"{_FRAMES}/{part.name}", _joints_file(part.name))]
        self._require(wanted, "Finish the download, or leave the video out of splits.")
        return map(self._recording, parts)

    def _recording(self, part: Part) -> Recording:
        """The frames of a video that have joints, or some of them."""
        paths = image_paths(self._root / _FRAMES / part.name)
        points = self._read_points(self._root / _joints_file(part.name))
        if len(points) > len(paths):
            raise VideoError(
                f"{self._root / _FRAMES / part.name} holds {len(paths)} frames, but joint positions are there for "
                f"{len(points)}. Finish the download."
            )
        chosen = points[part.start : part.stop]
        if not len(chosen):
            raise VideoError(f"No frame to take of {part} of JHMDBVideo: {len(points)} have joints. Lower start.")
        return Recording(
            part=Part(f"jhmdb/{part.name}", part.start, part.start + len(chosen) if part.start else None),
            first=part.start,
            frames=paths[part.start :][: len(chosen)],
            labels=chosen[:, self._order()],
            fps=_RATE,
            boxes=[points_box(labels) for labels in chosen],
        )

    def _read_points(self, path: Path) -> Float32[np.ndarray, "t 15 3"]:
        """Joint positions of all frames, in pixels from the centre of the upper left one (the file counts from 1)."""
        from scipy.io import loadmat  # takes half a second, and is needed for this dataset only

        try:
            positions = loadmat(path, variable_names=["pos_img"])["pos_img"]
        except Exception as error:  # damaged files fail in many ways
            raise VideoError(
                f"Cannot read the joint positions {path} ({type(error).__name__}: {error}). The file is damaged or has "
                "no pos_img; copy it again."
            ) from error
        if positions.ndim == 2:  # of a single frame
            positions = positions[:, :, None]
        if positions.shape[:2] != (2, len(_POINTS)):
            raise VideoError(
                f"Joint positions {path} must be of shape (2, {len(_POINTS)}, frames), got {positions.shape}. Copy "
                "them again."
            )
        places = positions.transpose(2, 1, 0).astype(np.float32) - 1
        return np.concatenate([places, np.ones((*places.shape[:2], 1), np.float32)], 2)


def _joints_file(video: str) -> str:
    return f"{_JOINTS}/{video}/joint_positions.mat"
