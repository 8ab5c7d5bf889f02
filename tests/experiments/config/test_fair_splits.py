"""Shipped experiments on real video test on frames a second or more from all that they learn, calibrate or tune on."""

import math
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from resq_rl.experiments.config.composition import load_settings
from resq_rl.video import CamVidVideo, CompositedVideo, JoinedVideo, Split, WarpedVideo
from tests.experiments.config.test_configs import EXPERIMENTS

GENERATED = {"GeneratedVideo", "GeneratedObjects", "FigureVideo"}  # splits show different scenes
ELSEWHERE = {"cityscapes"}  # published splits by city, of a dataset that is not at hand
RATE = 30  # frames per second of CamVid's drives, and of files that do not say otherwise


class Span(NamedTuple):
    """Seconds of one video."""

    video: str
    begin: float
    end: float

    def gap(self, other: "Span") -> float:
        """Seconds between both."""
        if self.video != other.video:
            return math.inf
        return max(self.begin - other.end, other.begin - self.end)


def spans(dataset: Any, split: Split) -> list[Span]:
    """What a split shows."""
    if isinstance(dataset, JoinedVideo):
        return [span for source in dataset._datasets for span in spans(source, split)]
    if isinstance(dataset, CompositedVideo):
        more = [*dataset.objects.values(), *([dataset.grounds] if dataset.grounds else [])] if split == "train" else []
        return [span for source in (dataset.source, *more) for span in spans(source, split)]
    if isinstance(dataset, WarpedVideo):
        return spans(dataset.source, split)
    parts = dataset._parts()[split]
    if isinstance(dataset, CamVidVideo):  # each frame's file is named after its drive and number
        found = []
        for part in parts:
            group, _, drive = part.name.partition("/")
            names = sorted(path.stem for path in (Path(dataset.root) / group).iterdir() if path.stem.startswith(drive))
            times = [int(name.rpartition("_")[2].lstrip("f")) / RATE for name in names[part.start : part.stop]]
            found += [Span(drive, time, time) for time in times]
        return found
    rate = dataset.fps or RATE
    return [Span(p.name, p.start / rate, math.inf if p.stop is None else (p.stop - 1) / rate) for p in parts]


def test_real_video_is_tested_a_second_from_what_is_learned(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESQ_RL_SHARED", str(shared))
    checked = set()
    shown = [(name, [f"+experiment={name}"]) for name in sorted(set(EXPERIMENTS) - ELSEWHERE)]
    for experiment, overrides in [*shown, ("by_sequence", ["video=still_camera_by_sequence"])]:
        video = load_settings("compare", overrides).video
        if video.path.rpartition(".")[2] in GENERATED:
            continue
        dataset = video.build()
        used = [span for split in ("train", "validation") for span in spans(dataset, split)]
        tested = spans(dataset, "test")
        assert used
        assert tested
        for one, other in product(used, tested):
            assert one.gap(other) >= 1, f"{experiment}: {one} is used, {other} is tested"
        checked.add(experiment)
    assert {
        "camvid",
        "camvid_network",
        "selfie_carphone",
        "selfie_davis",
        "still_camera",
        "vos_davis_network",
    } <= checked
