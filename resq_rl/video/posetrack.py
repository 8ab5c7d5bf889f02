"""PoseTrack: videos of several people, with the points of each in some of the frames (the JSON files of 2018)."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from resq_rl.errors import VideoError
from resq_rl.video.clip import Clip, Split, check_split
from resq_rl.video.images import Box, check_count, check_size
from resq_rl.video.parts import Part, check_disjoint, listed, split_parts
from resq_rl.video.people import Person, choose_points, person_clips, points_box
from resq_rl.video.tracking import check_crop
from resq_rl.video.tree import below, require

__all__ = ["PoseTrackVideo"]

_DATASET: Final = "PoseTrack"
_POINTS: Final = (
    "nose",
    "head_bottom",
    "head_top",
    "left_ear",
    "right_ear",
    "left_shoulder",
    "right_shoulder",
    "left_elbow",
    "right_elbow",
    "left_wrist",
    "right_wrist",
    "left_hip",
    "right_hip",
    "left_knee",
    "right_knee",
    "left_ankle",
    "right_ankle",
)


@dataclass(frozen=True)
class PoseTrackVideo:
    """Clips of PoseTrack, each a window that follows one person, whose 17 points are the labels.

    Reads `annotations/SET/SEQUENCE.json` under `root` and the frames that they name, decoded at each call. A clip
    reaches from the first frame to the last in which the person is labelled; frames between that are not labelled, and
    points that are not, do not count (the ears never are). Without `splits`, every fifth sequence of the published
    training set is for validation and the rest for training; the published validation set is the test split.

    Attributes:
        root: folder that holds `annotations` and `images`.
        splits: for each split "SET" for all sequences of a published set, or "SET/SEQUENCE", or
            "SET/SEQUENCE[start:stop]" for some of its frames; None for the published ones.
        people: most people of each sequence, those labelled most often.
        points: names of the points wanted, in that order; None for all 17.
        size: height and width in pixels of the clips.
        crop: height of the window as a multiple of the person's; it follows them smoothly and repeats the edge of
            frames that it leaves.
        clip_frames: cuts each person's frames into clips of this many, and drops a shorter rest; None for one clip.
        annotations: folder of the annotations below `root`; `posetrack_data` for PoseTrack21.
        fps: frames per second, which the dataset does not tell.

    Raises:
        SettingsError: a setting out of its range.
        VideoError: a missing root, set or sequence, or splits that overlap.
    """

    root: str | Path
    splits: Mapping[Split, Sequence[str | Part]] | None = None
    people: int = 1
    points: Sequence[str] | None = None
    size: tuple[int, int] = (256, 256)
    crop: float = 1.3
    clip_frames: int | None = None
    annotations: str = "annotations"
    fps: float = 25.0

    def __post_init__(self) -> None:
        reader = "PoseTrackVideo"
        object.__setattr__(self, "size", check_size(self.size, reader))
        check_count(self.people, "people", reader)
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
            VideoError: the split is unknown or empty; or an annotation or frame is missing or damaged.
        """
        parts = self._parts()
        if not parts.get(check_split(split)):
            raise VideoError(
                f"PoseTrackVideo has no split {split}: found {listed(s for s in parts if parts[s])}. Add sequences to "
                "it in splits, such as val/000342_mpii_test."
            )
        people = [person for part in parts[split] for person in self._people(part)]
        wanted = [name for person in people for name in person.frames]
        require(self._root, _DATASET, wanted, "Finish the download, or leave the sequence out of splits.")
        return [
            clip for one in people for clip in person_clips(one, self._root, self.size, self.crop, self.clip_frames)
        ]

    @property
    def _root(self) -> Path:
        return Path(self.root).expanduser()

    def _parts(self) -> dict[Split, list[Part]]:
        """The sequences of each split as SET/SEQUENCE."""
        if self.splits is not None:
            given = split_parts(self.splits, "PoseTrackVideo")
            return {
                split: [own for part in entries for own in self._sequences(part)] for split, entries in given.items()
            }
        learn, report = self._sequences(Part("train")), self._sequences(Part("val"))
        return {
            "train": [part for number, part in enumerate(learn) if number % 5 != 4],
            "validation": learn[4::5],
            "test": report,
        }

    def _sequences(self, part: Part) -> list[Part]:
        """An entry of `splits` spelled out as sequences."""
        name, _, sequence = part.name.partition("/")
        wanted = f"{self.annotations}/{name}" + (f"/{sequence}.json" if sequence else "")
        require(self._root, _DATASET, [wanted], "Set root to the folder that holds annotations and images.")
        if sequence:
            return [part]
        if part != Part(part.name):
            raise VideoError(
                f"A range needs a single sequence of PoseTrackVideo, got {part}. Write SET, SET/SEQUENCE or "
                "SET/SEQUENCE[start:stop]."
            )
        folder = below(self._root, wanted, _DATASET)
        return [replace(part, name=f"{name}/{path.stem}") for path in sorted(folder.glob("*.json"))]

    def _people(self, part: Part) -> list[Person]:
        """The people of a sequence who are labelled most often."""
        path = below(self._root, f"{self.annotations}/{part.name}.json", _DATASET)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            images = sorted(content["images"], key=lambda image: str(image["file_name"]))[part.start : part.stop]
            numbers = {image["id"]: number for number, image in enumerate(images)}
            labelled = [own for own in content["annotations"] if own["image_id"] in numbers and any(own["keypoints"])]
            tracks = [track for track, _ in Counter(own["track_id"] for own in labelled).most_common(self.people)]
            names = [str(image["file_name"]) for image in images]
            return [
                self._person(
                    part, names, track, {numbers[o["image_id"]]: o for o in labelled if o["track_id"] == track}
                )
                for track in tracks
            ]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise VideoError(
                f"Cannot read the annotation {path} ({type(error).__name__}: {error}). It is damaged, or not in the "
                "format of 2018 (images, annotations with keypoints and track_id); copy it again."
            ) from error

    def _person(self, part: Part, names: list[str], track: object, labelled: Mapping[int, Mapping[str, Any]]) -> Person:
        """One person, from the first labelled frame to the last; `labelled` by number of the frame in `names`."""
        first, last = min(labelled), max(labelled)
        points = np.zeros((last + 1 - first, len(_POINTS), 3), np.float32)
        boxes: list[Box | None] = [None] * len(points)
        for number, own in labelled.items():
            labels = np.asarray(own["keypoints"], np.float32).reshape(len(_POINTS), 3)
            labels[:, 2] = labels[:, 2] > 0
            points[number - first] = labels
            boxes[number - first] = _box(own.get("bbox")) or points_box(labels)
        order = choose_points(_POINTS, self.points, "PoseTrackVideo")
        name = f"posetrack/{part.name}/{track}"
        return Person(name, names[first : last + 1], points[:, order], boxes, part.start + first, self.fps)


def _box(values: Sequence[float] | None) -> Box | None:
    """Left, top, right and bottom edge, of left, top, width and height; None where nothing is known."""
    if not values or len(values) != 4 or min(values[2:]) <= 0:
        return None
    left, top, width, height = map(float, values)
    return left, top, left + width, top + height
