from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from resq_rl.errors import SettingsError, VideoError
from resq_rl.video.clip import IGNORE, Clip, Split
from resq_rl.video.generated.warped import WarpedVideo

STILL = {"speed": 0.0, "turn": 0.0, "shake": 0.0, "noise": 0.0}


def striped(frames: int, size: tuple[int, int] = (60, 80)) -> Clip:
    """Rows of five classes, 6 pixels high, each with its grey level; a third of each frame is a sixth."""
    rows = (torch.arange(size[0]) // 6 % 5)[:, None].expand(*size).clone()
    rows[:, : size[1] // 3] = 5
    labels = torch.stack([rows.roll(number, 0) for number in range(frames)]).byte()
    return Clip((labels[:, None] * 40 + 10).expand(-1, 3, -1, -1).contiguous(), labels, 1.0, "stripes", "test")


@dataclass(frozen=True)
class Source:
    """Two clips in every split."""

    size: tuple[int, int] = (60, 80)
    labelled: bool = True
    classes: tuple[str, ...] = tuple("abcdef")
    asked: list[Split] = field(default_factory=list)

    def clips(self, split: Split) -> list[Clip]:
        self.asked.append(split)
        clips = [striped(5, self.size), striped(3, self.size)]
        return [c if self.labelled else Clip(c.frames, None, c.fps, c.name, c.origin) for c in clips]


def test_a_camera_at_rest_sees_the_frame() -> None:
    clips = WarpedVideo(Source(), frames=4, **STILL).clips("train")  # type: ignore[arg-type]
    assert [clip.name for clip in clips[4:6]] == ["warped/stripes#4", "warped/stripes#0"]
    assert len(clips) == 8
    assert {clip.fps for clip in clips} == {15.0}
    for time in range(4):
        assert torch.equal(clips[2].frames[time], striped(5).frames[2])
        assert torch.equal(torch.as_tensor(clips[2].labels)[time], torch.as_tensor(striped(5).labels)[2])


@pytest.mark.parametrize("seed", range(3))
def test_labels_move_with_what_they_label(seed: int) -> None:
    clips = WarpedVideo(Source(), frames=8, speed=0.2, turn=0.02, noise=0.0, seed=seed).clips("validation")
    for clip in clips:
        labels = torch.as_tensor(clip.labels)
        known = labels != IGNORE
        level = (clip.frames[:, 0].float() - 10) / 40
        agrees = (level - labels).abs() < 0.5
        assert agrees[known].float().mean() > 0.9  # the rest are mixed at borders
        assert known[0].float().mean() > 0.95
        assert not torch.equal(clip.frames[0], clip.frames[-1])


def test_the_ground_comes_nearer_as_in_perspective() -> None:
    """A line on the ground z ahead of a camera of height 1 is seen 1/z under the horizon; driving d leaves z - d."""
    size, row = (400, 4), 270
    labels = torch.zeros(1, *size, dtype=torch.uint8)
    labels[:, row:] = 1
    line = Clip(labels[:, None].expand(-1, 3, -1, -1) * 200, labels, 1.0, "line", "test")
    source = Source()
    object.__setattr__(source, "clips", lambda split: [line])
    video = WarpedVideo(source, frames=6, speed=1.5, turn=0.0, shake=0.0, noise=0.0, seed=1)
    drive = video._draw(torch.Generator().manual_seed(1_000_003))
    (clip,) = video.clips("train")
    seen = [int((frame[:, 2] == 0).sum()) for frame in torch.as_tensor(clip.labels)]
    lower_edge = 1 - drive.horizon  # is seen at depth 1
    depth = lower_edge / ((row * 2 / size[0] - 1) - drive.horizon)
    expected = [(drive.horizon + lower_edge / (depth - float(way)) + 1) * size[0] / 2 for way in drive.distance]
    assert seen[-1] > seen[0] + 10
    assert np.allclose(seen, expected, atol=1.0)


def test_what_the_frame_does_not_show_is_unlabelled() -> None:
    clips = WarpedVideo(Source(), frames=12, speed=0.0, turn=0.1, noise=0.0).clips("train")
    shares = [float((torch.as_tensor(clip.labels)[-1] == IGNORE).float().mean()) for clip in clips]
    assert 0.02 < np.mean(shares) < 0.9


def test_clips_come_alike_each_time_and_differ() -> None:
    first, second = (WarpedVideo(Source(), frames=3, train=2).clips("train") for _ in range(2))
    assert all(torch.equal(a.frames, b.frames) for a, b in zip(first, second, strict=True))
    other = WarpedVideo(Source(), frames=3, train=2, seed=1).clips("train")
    validation = WarpedVideo(Source(), frames=3, validation=2).clips("validation")
    assert not torch.equal(first[0].frames, other[0].frames)
    assert not torch.equal(first[0].frames, validation[0].frames)


def test_frames_are_spread_over_the_split() -> None:
    names = [clip.name for clip in WarpedVideo(Source(), frames=2, train=4, validation=20).clips("train")]
    assert names == ["warped/stripes#0", "warped/stripes#2", "warped/stripes#4", "warped/stripes#1"]
    assert len(WarpedVideo(Source(), frames=2, train=4, validation=20).clips("validation")) == 8


def test_test_clips_are_the_source_but_for_their_size() -> None:
    source = Source((60, 80))
    clips = WarpedVideo(source, frames=2).clips("test")
    assert source.asked == ["test"]
    assert [clip.name for clip in clips] == ["stripes", "stripes"]
    assert torch.equal(clips[0].frames, striped(5).frames)
    for clip in WarpedVideo(source, size=(30, 40), frames=2).clips("test"):
        assert clip.size == (30, 40)
        assert ((clip.frames[:, 0].float() - 10) / 40 - torch.as_tensor(clip.labels)).abs().median() < 0.1


def test_noise_is_as_strong_as_asked_for() -> None:
    (clip,) = WarpedVideo(Source(), frames=40, train=1, speed=0.0, turn=0.0, shake=0.0, noise=0.02).clips("train")
    inside = clip.frames[:, :, 8:11, 60:70].float()  # a grey that is not cut off
    assert float(inside.std(0).mean()) == pytest.approx(0.02 * 255, rel=0.1)


def test_what_cannot_be_used_is_named() -> None:
    with pytest.raises(VideoError, match=r"Clip 'stripes' \(test\) has no labels to move along"):
        WarpedVideo(Source(labelled=False)).clips("train")
    with pytest.raises(SettingsError, match="Setting speed of WarpedVideo must be 0 or more, got -1"):
        WarpedVideo(Source(), speed=-1.0)
    with pytest.raises(SettingsError, match="Setting frames of WarpedVideo must be 1 or more, got 0"):
        WarpedVideo(Source(), frames=0)
