"""JHMDB: short clips of one person each, with the positions of 15 joints in every frame."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from jaxtyping import Float32
from scipy.io import loadmat

from resq_rl.errors import VideoError
from resq_rl.video.clip import Clip, Split, check_split
from resq_rl.video.images import check_count, check_size, image_paths
from resq_rl.video.parts import Part, check_disjoint, listed, split_parts
from resq_rl.video.people import Person, choose_points, person_clips, points_box
from resq_rl.video.tracking import check_crop
from resq_rl.video.tree import below, require

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
class JHMDBVideo:
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

    Raises:
        SettingsError: a setting out of its range.
        VideoError: a missing root, list or video, or splits that overlap.
    """

    root: str | Path
    splits: Mapping[Split, Sequence[str | Part]] | None = None
    fold: int = 1
    points: Sequence[str] | None = None
    size: tuple[int, int] | None = None
    crop: float | None = None
    clip_frames: int | None = None

    def __post_init__(self) -> None:
        reader = "JHMDBVideo"
        object.__setattr__(self, "size", check_size(self.size, reader))
        check_count(self.fold, "fold", reader, most=3)
        check_count(self.clip_frames, "clip_frames", reader)
        check_crop(self.crop, self.size, reader)
        choose_points(_POINTS, self.points, reader)
        check_disjoint(self._parts(), reader)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the points."""
        return tuple(self.points or _POINTS)

    def clips(self, split: Split) -> list[Clip]:
        """Decode the clips of a split.

        Raises:
            VideoError: the split is unknown or empty; or frames or joint positions are missing or damaged.
        """
        parts = self._parts()
        if not parts.get(check_split(split)):
            raise VideoError(
                f"JHMDBVideo has no split {split}: found {listed(s for s in parts if parts[s])}. Add videos to it in "
                "splits, such as walk."
            )
        wanted = [name for part in parts[split] for name in (f"{_FRAMES}/{part.name}", _joints_file(part.name))]
        require(self._root, "JHMDB", wanted, "Finish the download, or leave the video out of splits.")
        people = [self._person(part) for part in parts[split]]
        return [
            clip for one in people for clip in person_clips(one, self._root, self.size, self.crop, self.clip_frames)
        ]

    @property
    def _root(self) -> Path:
        return Path(self.root).expanduser()

    def _parts(self) -> dict[Split, list[Part]]:
        """The videos of each split as ACTION/VIDEO."""
        mend = "Set root to the folder that holds them, as published."
        if self.splits is not None:
            require(self._root, "JHMDB", (_FRAMES, _JOINTS), mend)
            given = split_parts(self.splits, "JHMDBVideo")
            return {split: [own for part in entries for own in self._videos(part)] for split, entries in given.items()}
        require(self._root, "JHMDB", (_FRAMES, _JOINTS, _LISTS), mend)
        found: dict[Split, list[Part]] = {"train": [], "validation": [], "test": []}
        for action in self._folders(""):
            for split, videos in self._listed(action).items():
                found[split] += [Part(f"{action}/{video}") for video in videos]
        return found

    def _folders(self, below_frames: str) -> list[str]:
        folder = below(self._root, f"{_FRAMES}/{below_frames}", "JHMDB")
        return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))

    def _videos(self, part: Part) -> list[Part]:
        """An entry of `splits` spelled out as videos."""
        if "/" in part.name:
            return [part]
        require(self._root, "JHMDB", [f"{_FRAMES}/{part.name}"], "Correct the name of the action.")
        if part != Part(part.name):
            raise VideoError(
                f"A range needs a single video of JHMDBVideo, got {part}. Write ACTION, ACTION/VIDEO or "
                "ACTION/VIDEO[start:stop]."
            )
        return [Part(f"{part.name}/{video}") for video in self._folders(part.name)]

    def _listed(self, action: str) -> dict[Split, list[str]]:
        """The videos of an action by the published list."""
        name = f"{_LISTS}/{action}_test_split{self.fold}.txt"
        require(self._root, "JHMDB", [name], "Finish the download, or give splits.")
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

    def _person(self, part: Part) -> Person:
        """The person of a video."""
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
        frames = [str(path.relative_to(self._root)) for path in paths[part.start :][: len(chosen)]]
        boxes = [points_box(labels) for labels in chosen]
        order = choose_points(_POINTS, self.points, "JHMDBVideo")
        return Person(f"jhmdb/{part.name}", frames, chosen[:, order], boxes, part.start, _RATE)

    def _read_points(self, path: Path) -> Float32[np.ndarray, "t 15 3"]:
        """Joint positions of all frames, in pixels from the centre of the upper left one (the file counts from 1)."""
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
