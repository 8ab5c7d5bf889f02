from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from resq_rl.errors import SettingsError, VideoError
from resq_rl.video.clip import IGNORE, Clip, Split
from resq_rl.video.generated.composited import CompositedVideo
from resq_rl.video.generated.warped import WarpedVideo

RED, GREEN, BLUE = (torch.tensor(colour, dtype=torch.uint8)[:, None, None] for colour in np.eye(3) * 200)
PLAIN = {"noise": 0.0, "real": 0.0}


def clip_of(colour: Tensor, name: str, *, size: tuple[int, int] = (48, 64), frames: int = 5, side: int = 12) -> Clip:
    """A square of a colour that moves to the right over black; its fourth frame is unlabelled."""
    pictures, labels = torch.zeros(frames, 3, *size, dtype=torch.uint8), torch.zeros(frames, *size, dtype=torch.uint8)
    for time in range(frames):
        rows, columns = slice(10, 10 + side), slice(8 + 4 * time, 8 + 4 * time + side)
        pictures[time, :, rows, columns] = colour
        labels[time, rows, columns] = 1
    labels[3:4] = IGNORE
    return Clip(pictures, labels, 10.0, name, "test")


@dataclass(frozen=True)
class Source:
    """The same clips in every split."""

    found: Sequence[Clip]
    classes: tuple[str, ...] = ("background", "object")

    def clips(self, split: Split) -> list[Clip]:
        return list(self.found)


def composited(*clips: Clip, **settings: object) -> CompositedVideo:
    settings = {"train": 12, "frames": 6, **settings}
    return CompositedVideo(Source(clips or (clip_of(RED, "red"),)), **settings)  # type: ignore[arg-type]


def test_labels_are_where_the_object_is_seen() -> None:
    """One red object over green, before and behind blue ones: what is labelled is red, and what is red is labelled."""
    grounds = Source([Clip(GREEN.expand(4, 3, 30, 40).contiguous(), None, 1.0, "green", "test")])
    video = composited(clip_of(RED, "red"), grounds=grounds, **PLAIN)
    for clip in video.clips("train"):
        labels, frames = torch.as_tensor(clip.labels), clip.frames
        assert labels[0].any(), "the object is in the first frame"
        assert set(labels.unique().tolist()) <= {0, 1}
        red = (frames[:, 0] > 120) & (frames[:, 1] < 60)
        assert (red & (labels == 1)).sum() >= 0.8 * (labels == 1).sum(), "the rest is mixed at its border"
        assert clip.size == (48, 64)


def test_other_objects_are_background() -> None:
    """Of a red and a blue object, one is followed; the other is not labelled even where it hides the first."""
    video = composited(clip_of(RED, "red"), clip_of(BLUE, "blue"), train=40, **PLAIN)
    both = 0
    for clip in video.clips("train"):
        labels = torch.as_tensor(clip.labels) == 1
        colours = [((clip.frames[:, c] > 150) & labels).sum().item() for c in (0, 2)]
        shown = [(clip.frames[:, c] > 150).sum().item() for c in (0, 2)]
        assert min(colours) == 0, "pixels of one object alone are labelled"
        both += min(shown) > 0
    assert both > 5


def test_the_object_moves_and_its_ground_does() -> None:
    moved = 0
    for clip in composited(clip_of(RED, "red", size=(96, 128), side=40), **PLAIN).clips("train"):
        labels = torch.as_tensor(clip.labels)
        places = [torch.nonzero(label).float().mean(0) for label in (labels[0], labels[-1]) if label.any()]
        moved += len(places) == 2 and float((places[0] - places[1]).norm()) > 1
    assert moved >= 6


def test_real_clips_are_frames_as_they_are_from_one_that_shows_the_object() -> None:
    source = clip_of(RED, "red", frames=7)
    labelled = torch.as_tensor(source.labels)
    starts = set()
    for clip in composited(source, train=30, real=1.0).clips("train"):
        start = next(t for t in range(7) if torch.equal(clip.frames[0], source.frames[t]))
        times = [t if t < 7 else 12 - t for t in range(start, start + 6)]
        assert torch.equal(clip.frames, source.frames[times])
        assert torch.equal(torch.as_tensor(clip.labels), labelled[times])
        starts.add(start)
    assert starts == {0, 1, 2, 4, 5, 6}, "the fourth frame shows no object"


def test_a_still_is_enough() -> None:
    clips = composited(clip_of(RED, "red", frames=1), **PLAIN).clips("train")
    assert all(len(clip) == 6 for clip in clips)


def test_a_clip_depends_on_its_number_and_the_settings() -> None:
    one, other = composited(train=3), composited(train=5)
    for first, second in zip(one.clips("train"), other.clips("train"), strict=False):
        assert first.name == second.name
        assert torch.equal(first.frames, second.frames)
    again = composited(train=3, seed=1).clips("train")
    assert again[0].name == "composited-1/train-0"
    assert not torch.equal(again[0].frames, one.clips("train")[0].frames)


def test_other_splits_are_those_of_the_source() -> None:
    source = clip_of(RED, "red")
    video = composited(source, objects={"more": Source([clip_of(BLUE, "blue")])})
    assert video.clips("validation") == [source]
    assert video.clips("test") == [source]
    assert video.classes == ("background", "object")


def test_what_cannot_be_cut_out_is_refused() -> None:
    unlabelled = Clip(clip_of(RED, "a").frames, None, 10.0, "bare", "test")
    for clips, words in (
        ((unlabelled,), "'bare'.*needs masks"),
        ((clip_of(RED, "a"), clip_of(RED, "wide", size=(48, 80))), "'wide'.*size"),
        ((clip_of(RED, "a", side=2),), "None of 1 training clips shows an object of 0.2%"),
    ):
        with pytest.raises(VideoError, match=words):
            composited(*clips).clips("train")
    with pytest.raises(SettingsError, match="background and object"):
        CompositedVideo(Source((), ("a", "b", "c")))
    for name, value in (("real", 1.5), ("noise", -1.0), ("seed", -1)):
        with pytest.raises(SettingsError, match=f"Setting {name}"):
            composited(**{name: value})
    for name in ("frames", "train"):
        with pytest.raises(SettingsError, match=name):
            composited(**{name: 0})


def test_grounds_may_be_warped_frames() -> None:
    source = Source([clip_of(BLUE, "blue", size=(60, 80))])
    grounds = WarpedVideo(source, size=(48, 64), frames=6)
    assert len(composited(grounds=grounds, **PLAIN).clips("train")) == 12
