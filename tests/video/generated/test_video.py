import dataclasses
import math
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resq_rl.errors import SettingsError, VideoError
from resq_rl.video.clip import IGNORE, SPLITS, Clip, Split
from resq_rl.video.generated.video import GeneratedVideo

SMALL = GeneratedVideo(size=(48, 64), frames=8, train=3, validation=2, test=2)
SHARES = [0.8388, 0.0389, 0.049, 0.0256, 0.0123, 0.0354]  # of the classes, in the first six default test clips
CLEAN = dataclasses.replace(SMALL, noise=0.0, cuts=0.0)


def same(one: Clip, two: Clip) -> bool:
    assert one.labels is not None
    assert two.labels is not None
    return torch.equal(one.frames, two.frames) and torch.equal(one.labels, two.labels)


@pytest.mark.parametrize("split", SPLITS)
def test_clips_are_as_asked_for(split: Split) -> None:
    clips = SMALL.clips(split)
    assert len(clips) == getattr(SMALL, split)
    assert SMALL.classes == ("background", "disk", "box", "triangle", "cross", "ring")
    assert len({clip.name for clip in clips}) == len(clips)
    for clip in clips:
        assert (len(clip), clip.size, clip.fps) == (8, (48, 64), 24.0)
        assert clip.labels is not None
        assert int(clip.labels.max()) < len(SMALL.classes)
        assert IGNORE not in clip.labels
        assert clip.origin.startswith("GeneratedVideo(")


@given(st.integers(0, 2**40), st.sampled_from(SPLITS), st.integers(0, 500))
@settings(max_examples=15)
def test_a_clip_depends_on_seed_split_and_index_alone(seed: int, split: Split, index: int) -> None:
    video = dataclasses.replace(SMALL, seed=seed, frames=2)
    again = dataclasses.replace(video, train=7, validation=0, test=1)
    first = video.clip(split, index)
    assert same(first, again.clip(split, index))
    for other in SPLITS:
        if other != split:
            assert not torch.equal(first.frames, video.clip(other, index).frames)
    assert not torch.equal(first.frames, video.clip(split, index + 1).frames)
    assert not torch.equal(first.frames, dataclasses.replace(video, seed=seed + 1).clip(split, index).frames)


def test_number_of_clips_changes_no_clip() -> None:
    more = dataclasses.replace(SMALL, train=5)
    for one, two in zip(SMALL.clips("train"), more.clips("train"), strict=False):
        assert same(one, two)


def test_another_process_renders_the_same(root: Path) -> None:
    code = (
        "from resq_rl.video import GeneratedVideo; import zlib;"
        "clip = GeneratedVideo(size=(48, 64), frames=8).clip('test', 1);"
        "print(zlib.crc32(clip.frames.numpy().tobytes()), zlib.crc32(clip.labels.numpy().tobytes()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, check=True, text=True)
    clip = SMALL.clip("test", 1)
    here = [zlib.crc32(torch.as_tensor(part).numpy().tobytes()) for part in (clip.frames, clip.labels)]
    assert [int(word) for word in done.stdout.split()] == here


def test_shipped_weights_still_fit_the_generator() -> None:
    """The default clips have not changed since the figures were measured: their shares of classes are as then."""
    labels = torch.cat([torch.as_tensor(GeneratedVideo().clip("test", index).labels) for index in range(6)])
    shares = torch.bincount(labels.flatten().long(), minlength=6) / labels.numel()
    assert shares.tolist() == pytest.approx(SHARES, abs=2e-4)


def test_clips_are_kept_per_instance() -> None:
    video = dataclasses.replace(SMALL)
    first = video.clips("test")
    assert video.clips("test")[0] is first[0]
    assert dataclasses.replace(SMALL).clips("test")[0] is not first[0]
    assert video == dataclasses.replace(SMALL)
    assert hash(video) == hash(SMALL)


@pytest.mark.parametrize("index", range(4))
def test_speed_plays_the_same_scene_faster(index: int) -> None:
    double = dataclasses.replace(CLEAN, speed=2.0).clip("train", index)
    slow = CLEAN.clip("train", index)
    still = dataclasses.replace(CLEAN, speed=0.0).clip("train", index)
    assert torch.equal(double.frames[:4], slow.frames[::2])
    assert slow.labels is not None
    assert torch.equal(torch.as_tensor(double.labels)[:4], slow.labels[::2])
    assert torch.equal(still.frames, slow.frames[:1].expand_as(still.frames))


def test_motion_grows_with_speed() -> None:
    def motion(speed: float) -> float:
        clips = [dataclasses.replace(CLEAN, speed=speed).clip("train", index) for index in range(6)]
        return float(np.mean([clip.frames.float().diff(dim=0).abs().mean() for clip in clips]))

    assert 0 == motion(0.0) < motion(0.3) < motion(1.0) < motion(2.5)


def test_noise_has_the_deviation_asked_for_and_leaves_labels_alone() -> None:
    quiet = CLEAN.clip("train", 0)
    for noise in (0.01, 0.05):
        noisy = dataclasses.replace(CLEAN, noise=noise).clip("train", 0)
        assert torch.equal(torch.as_tensor(noisy.labels), torch.as_tensor(quiet.labels))
        middle = (quiet.frames > 64) & (quiet.frames < 190)
        difference = (noisy.frames.float() - quiet.frames.float())[middle]
        assert float(difference.std()) == pytest.approx(255 * noise, rel=0.05)
        assert abs(float(difference.mean())) < 0.3


def test_cuts_change_the_scene_and_nothing_before() -> None:
    video = dataclasses.replace(CLEAN, frames=24, cuts=1.0)
    counts = []
    for index in range(12):
        clip, plain = video.clip("train", index), dataclasses.replace(video, cuts=0.0).clip("train", index)
        alike = [torch.equal(one, two) for one, two in zip(clip.frames, plain.frames, strict=True)]
        first = alike.index(False)
        assert first >= 1
        assert not any(alike[first:])
        jumps = clip.frames.float().diff(dim=0).abs().mean(dim=(1, 2, 3))
        usual = plain.frames.float().diff(dim=0).abs().mean(dim=(1, 2, 3)).max()
        assert jumps[first - 1] > usual
        counts.append(len(video._scene_starts("train", index)) - 1)
    assert set(counts) == {1, 2}


def test_about_as_many_clips_are_cut_as_asked_for() -> None:
    video = dataclasses.replace(SMALL, cuts=0.3)
    cut = sum(len(video._scene_starts("train", index)) > 1 for index in range(1000))
    assert 250 < cut < 350
    assert all(len(dataclasses.replace(video, frames=1)._scene_starts("train", i)) == 1 for i in range(20))


@pytest.mark.parametrize("size", [(48, 48), (64, 33), (120, 200)])
def test_any_size_is_filled(size: tuple[int, int]) -> None:
    clip = GeneratedVideo(size=size, frames=3).clip("train", 0)
    assert clip.size == size
    assert len(torch.unique(torch.as_tensor(clip.labels))) >= 2


def test_shapes_grow_with_the_frame() -> None:
    shares = []
    for size in ((48, 80), (192, 320)):
        clips = [GeneratedVideo(size=size, frames=1).clip("train", index) for index in range(20)]
        shares.append(float(np.mean([(torch.as_tensor(clip.labels) > 0).float().mean() for clip in clips])))
    assert shares[0] == pytest.approx(shares[1], rel=0.1)


def test_every_class_is_seen_often_enough_to_learn() -> None:
    labels = torch.cat([torch.as_tensor(c.labels) for c in GeneratedVideo(frames=2, train=60).clips("train")])
    shares = torch.bincount(labels.flatten().long(), minlength=6) / labels.numel()
    assert 0.6 < shares[0] < 0.9
    assert shares[1:].min() > 0.01


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("size", (16, 64)),
        ("size", (64, 64, 3)),
        ("frames", 0),
        ("train", -1),
        ("seed", -1),
        ("speed", -0.1),
        ("speed", math.nan),
        ("noise", 1.5),
        ("noise", math.nan),
        ("cuts", -0.1),
        ("shapes", (4, 3)),
        ("distractors", (-1, 3)),
        ("fps", 0.0),
    ],
)
def test_settings_out_of_range_are_named(name: str, value: object, unchecked_types: None) -> None:
    with pytest.raises(SettingsError, match=f"Setting {name} of GeneratedVideo must be .*, got "):
        dataclasses.replace(SMALL, **{name: value})  # type: ignore[arg-type]  # wrong on purpose


def test_unknown_clips_are_refused(unchecked_types: None) -> None:
    with pytest.raises(VideoError, match="Unknown split 'val'"):
        SMALL.clips("val")  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(VideoError, match="Unknown split 'val'"):
        SMALL.clip("val", 0)  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(SettingsError, match="Clip index must be 0 or more, got -1"):
        SMALL.clip("train", -1)


def test_lists_from_settings_files_are_taken(unchecked_types: None) -> None:
    video = GeneratedVideo(size=[48, 64], shapes=[1, 1], frames=1)  # type: ignore[arg-type]
    assert video.size == (48, 64)
    assert len(torch.unique(torch.as_tensor(video.clip("train", 0).labels))) == 2
