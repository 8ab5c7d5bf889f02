"""Generated clips with one object to follow."""

import dataclasses

import pytest
import torch

from resq_rl.errors import SettingsError
from resq_rl.video import GeneratedObjects, GeneratedVideo

OBJECTS = GeneratedObjects(size=(48, 64), frames=6, train=6, validation=2, test=2)


def test_frames_are_those_of_generated_video() -> None:
    """Only the labels differ: the object is part of one of the shapes, and visible from the start."""
    plain = GeneratedVideo(size=(48, 64), frames=6, train=6, cuts=0.0)
    assert OBJECTS.classes == ("background", "object")
    for one, two in zip(OBJECTS.clips("train"), plain.clips("train"), strict=True):
        assert torch.equal(one.frames, two.frames)
        assert one.labels is not None
        assert two.labels is not None
        assert one.name.startswith("generated-objects/train-")
        assert set(one.labels.unique().tolist()) == {0, 1}
        assert int(one.labels[0].sum()) >= 100 * (48 / 96) ** 2
        shown = two.labels[one.labels == 1]
        assert len(shown.unique()) == 1  # of one class only
        assert int(shown[0]) > 0


def test_the_object_is_not_always_the_one_in_front() -> None:
    """Some objects are partly hidden at some time by shapes that have no label."""
    video = dataclasses.replace(OBJECTS, frames=24, train=12)
    plain = GeneratedVideo(size=(48, 64), frames=24, train=12, cuts=0.0)
    shares = []
    for one, two in zip(video.clips("train"), plain.clips("train"), strict=True):
        assert one.labels is not None
        assert two.labels is not None
        area = (one.labels == 1).sum((1, 2)).float()
        shares.append(float(area.min() / area.max()))
        assert float((two.labels > 0).float().mean()) > float((one.labels > 0).float().mean())
    assert min(shares) < 0.5
    assert max(shares) > 0.5


@pytest.mark.parametrize(("name", "value"), [("cuts", 0.1), ("shapes", (0, 3))])
def test_settings_without_an_object_to_follow_are_refused(name: str, value: object) -> None:
    with pytest.raises(SettingsError, match=f"Setting {name} of GeneratedObjects must be"):
        GeneratedObjects(**{name: value})  # type: ignore[arg-type]
