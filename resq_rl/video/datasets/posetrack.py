"""PoseTrack: videos of several people, with the points of each in some of the frames (the JSON files of 2018)."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np

from resq_rl.errors import VideoError
from resq_rl.video.clip import Split
from resq_rl.video.datasets.base import Recording, held_out
from resq_rl.video.datasets.points import PointVideo, points_box
from resq_rl.video.images import Box
from resq_rl.video.parts import Part

__all__ = ["PoseTrackVideo"]

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
class PoseTrackVideo(PointVideo):
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
            Or lengths by split, such as {train: 48}.
        annotations: folder of the annotations below `root`; `posetrack_data` for PoseTrack21.
        fps: frames per second, which the dataset does not tell.

    Raises:
        SettingsError: a setting out of its range.
        VideoError: a missing root, set or sequence, or splits that overlap.
    """

    size: tuple[int, int] | None = (256, 256)
    crop: float | None = 1.3
    people: int = 1
    annotations: str = "annotations"
    fps: float = 25.0

    dataset: ClassVar[str] = "PoseTrack"
    spelling: ClassVar[str] = "SET, SET/SEQUENCE or SET/SEQUENCE[start:stop]"
    counts: ClassVar[tuple[str, ...]] = ("people",)
    names: ClassVar[tuple[str, ...]] = _POINTS

    def _published(self) -> dict[Split, list[Part]]:
        return held_out(self._spelled(Part("train")), self._spelled(Part("val")))

    def _videos(self, group: str) -> list[str]:
        name = f"{self.annotations}/{group}"
        self._require([name], "Set root to the folder that holds annotations and images.")
        return sorted(path.stem for path in self._below(name).glob("*.json"))

    def _recordings(self, parts: Sequence[Part]) -> list[Recording]:
        people = [person for part in parts for person in self._people(part)]
        wanted = [str(path.relative_to(self._root)) for person in people for path in person.frames]
        self._require(wanted, "Finish the download, or leave the sequence out of splits.")
        return people

    def _people(self, part: Part) -> list[Recording]:
        """The people of a sequence who are labelled most often."""
        path = self._below(f"{self.annotations}/{part.name}.json")
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

    def _person(
        self, part: Part, names: list[str], track: object, labelled: Mapping[int, Mapping[str, Any]]
    ) -> Recording:
        """One person, from the first labelled frame to the last; `labelled` by number of the frame in `names`."""
        first, last = min(labelled), max(labelled)
        points = np.zeros((last + 1 - first, len(_POINTS), 3), np.float32)
        boxes: list[Box | None] = [None] * len(points)
        for number, own in labelled.items():
            labels = np.asarray(own["keypoints"], np.float32).reshape(len(_POINTS), 3)
            labels[:, 2] = labels[:, 2] > 0
            points[number - first] = labels
            boxes[number - first] = _box(own.get("bbox")) or points_box(labels)
        start, name = part.start + first, f"posetrack/{part.name}/{track}"
        return Recording(
            part=Part(name, start, start + len(points) if start else None),
            first=start,
            frames=[self._below(own) for own in names[first : last + 1]],
            labels=points[:, self._order()],
            fps=self.fps,
            boxes=boxes,
        )


def _box(values: Sequence[float] | None) -> Box | None:
    """Left, top, right and bottom edge, of left, top, width and height; None where nothing is known."""
    if not values or len(values) != 4 or min(values[2:]) <= 0:
        return None
    left, top, width, height = map(float, values)
    return left, top, left + width, top + height
