from dataclasses import dataclass

import pytest
import torch

from resq_rl.errors import VideoError
from resq_rl.video import Clip, Framing, GeneratedVideo, JoinedVideo, Split


@dataclass(frozen=True)
class Named:
    """One clip of each split, named after its dataset."""

    name: str
    classes: tuple[str, ...] = ("ground", "car")
    size: tuple[int, int] | None = (4, 6)

    def clips(self, split: Split) -> list[Clip]:
        frames = torch.full((2, 3, 4, 6), len(self.name), dtype=torch.uint8)
        return [Clip(frames, None, 25.0, f"{self.name}/{split}", self.name)]


def test_clips_of_every_source_come_in_order() -> None:
    video = JoinedVideo([Named("a"), Named("bb")])
    assert [(clip.name, int(clip.frames[0, 0, 0, 0])) for clip in video.clips("test")] == [
        ("a/test", 1),
        ("bb/test", 2),
    ]
    assert video.classes == ("ground", "car")
    assert video.framing == Framing((4, 6))


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([], "needs at least one dataset, got none"),
        ([Named("a"), Named("b", classes=("ground",))], "must have the same classes: source 0 .* and source 1"),
        ([Named("a"), Named("b"), Named("c", size=None)], "must have the same framing: source 0 .* and source 2"),
    ],
)
def test_sources_that_do_not_fit_are_refused(sources: list[Named], message: str) -> None:
    with pytest.raises(VideoError, match=message):
        JoinedVideo(sources)


def test_clips_of_one_name_are_refused() -> None:
    with pytest.raises(VideoError, match="must have different names, got 'a/train' more than once"):
        JoinedVideo([Named("a"), Named("a")]).clips("train")


def test_generated_video_of_several_seeds_joins() -> None:
    """Clips of one seed are the same scenes, however they move, and so have the same names."""
    one, two, fast = (GeneratedVideo(frames=2, test=2, seed=s, speed=v) for s, v in ((0, 1.0), (1, 1.0), (1, 2.0)))
    assert [clip.name for clip in JoinedVideo([one, two]).clips("test")] == [
        *("generated/test-0", "generated/test-1", "generated-1/test-0", "generated-1/test-1")
    ]
    with pytest.raises(VideoError, match="got 'generated-1/test-0' more than once"):
        JoinedVideo([two, fast]).clips("test")
