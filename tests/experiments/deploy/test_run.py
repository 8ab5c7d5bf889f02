"""`resq-rl run`: what it writes equals what the runner gives, whatever the source, and an interrupt keeps it."""

import csv
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from resq_rl.envs import Problem
from resq_rl.experiments.cli.app import main
from resq_rl.perception import Segmentation
from resq_rl.policies import GradientSettings, LearnedPolicy, Runner, adaptation
from resq_rl.policies.gradient_policy import learn_policy
from resq_rl.quantization import save_model
from resq_rl.video import Framing, VideoFiles, VideoStream, stream
from tests.envs.problems import CLASSES, make_recurrent_problem, moving_frames, scheme, tiny_network
from tests.policies.test_learned import made

Capture = pytest.CaptureFixture[str]
SIZE = (32, 48)
FRAMING = Framing(SIZE).to_json()
TINY = ["tracking=disabled", "threads=1", "trusted=true"]  # the networks are code of the tests


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, problem: Problem) -> Path:
    """The folder of a run, as `resq-rl train` leaves it, of a tiny network for frames of 32x48."""
    folder = tmp_path_factory.mktemp("trained")
    made(scheme(problem), network=problem.model.groups, interval=3).save(folder / "seed0")
    save_model(problem.model, folder / "seed0")
    model = {"_target_": "tests.envs.problems.tiny_network"}
    task = {"_target_": "resq_rl.perception.Segmentation", "classes": CLASSES}
    (folder / "seed0" / "network.json").write_text(json.dumps({"model": model, "task": task, "framing": FRAMING}))
    return folder


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video of 9 frames, larger than the model's and of odd width."""
    path = tmp_path_factory.mktemp("video") / "clip.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 101, 64, "bgr0"
        for pixels in moving_frames(9, (64, 101)):
            frame = av.VideoFrame.from_ndarray(pixels.permute(1, 2, 0).numpy(), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def run(tmp_path: Path, *words: str, code: int = 0) -> Path:
    assert main(["run", *TINY, f"results={tmp_path}", *words]) == code
    return next((tmp_path / "run").iterdir())


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "frames.jsonl").read_text().splitlines()]


def pictures(path: Path) -> list[np.ndarray[Any, Any]]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_the_rule_for_changes_of_scene_may_be_given(trained: Path, video: Path, tmp_path: Path) -> None:
    folder = run(tmp_path, f"policy={trained}", f"source={video}", "running.interval=0", "running.scene_change=1e-6")
    assert all(record["keyframe"] for record in records(folder))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["settings"]["scene_change"] == 1e-6


def test_lines_and_summary_are_what_the_runner_gives(trained: Path, video: Path, tmp_path: Path) -> None:
    folder = run(tmp_path, f"policy={trained}", f"source={video}", "running.interval=4", "running.trade_off=0.1")
    runner = Runner.load(trained / "seed0", tiny_network(), Segmentation(CLASSES), trade_off=0.1, interval=4)
    (clip,) = VideoFiles({"test": [video]}, size=SIZE).clips("test")
    costs = [runner(frame)[1] for frame in clip.frames]
    found = records(folder)
    assert [r["frame"] for r in found] == list(range(9))
    assert [r["time"] for r in found] == [pytest.approx(t / 10) for t in range(9)]
    assert [(r["bops"], r["keyframe"], r["policy_bops"]) for r in found] == [
        (c.bops, c.keyframe, c.policy) for c in costs
    ]
    total = sum(c.bops for c in costs)
    assert found[-1]["total_bops"] == pytest.approx(total * runner.problem.reference_bops)
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["frames"], summary["keyframes"], summary["ended"]) == (9, 3, "finished")
    assert summary["bops"] == pytest.approx(total / 9)
    assert summary["peak_bops"] == max(c.bops for c in costs)
    parts = summary["keyframe_bops"] + summary["residual_bops"] + summary["policy_bops"]
    assert parts == pytest.approx(summary["bops"])


def test_a_stream_keeps_the_budget_of_training_unless_another_is_given(
    trained: Path, video: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(trained, tmp_path / "trained")
    saved = json.loads((folder / "seed0" / "network.json").read_text())
    environment = {"id": "resq_rl/RegionThresholds-v0", "budget": {"peak": 0.3}}
    (folder / "seed0" / "network.json").write_text(json.dumps(saved | {"environment": environment}))

    def peak(name: str, *words: str) -> float:
        made = run(tmp_path / name, f"policy={folder}", f"source={video}", "running.overlay=false", *words)
        return max(float(record["bops"]) for record in records(made))

    assert peak("own") <= 0.3 * (1 + 1e-9)
    assert peak("other", "running.budget={peak: 0.2}") <= 0.2 * (1 + 1e-9)
    assert peak("none", "environment.budget=null") >= 1  # keyframes, and the policy itself


def test_a_policy_that_adapted_is_saved_with_all_that_it_needs(
    trained: Path, video: Path, problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adaptation, "EVERY", 4)
    monkeypatch.setattr(adaptation, "FRAMES", 4)
    before = learn_policy(problem, scheme(problem), GradientSettings(frames=200, window=3, clips=3))
    folder = shutil.copytree(trained, tmp_path / "trained")
    before.save(folder / "seed0")
    ran = run(tmp_path, f"policy={folder}", f"source={video}", "running.adapt=true", "running.overlay=false")
    assert json.loads((ran / "summary.json").read_text())["learned"] == 2
    assert LearnedPolicy.load(ran / "adapted").scheme.base != before.scheme.base
    assert LearnedPolicy.load(folder / "seed0").scheme.base == before.scheme.base
    again = run(tmp_path / "again", f"policy={ran / 'adapted'}", f"source={video}", "running.overlay=false")
    assert "learned" not in json.loads((again / "summary.json").read_text())


def test_the_overlay_shows_every_frame_beside_its_bits(trained: Path, video: Path, tmp_path: Path) -> None:
    folder = run(tmp_path, f"policy={trained}/seed0", f"source={video}", "running.height=120", "running.interval=4")
    shown, found = pictures(folder / "overlay.mp4"), records(folder)
    assert len(shown) == 9
    height, width = shown[0].shape[:2]
    assert (height % 2, width % 4) == (0, 0)
    assert width == 2 * 190  # twice 120 * 101 / 64, even
    right = [image[5:115, width // 2 + 5 : -5].astype(float) for image in shown]
    # Dear regions are yellow (little blue), cheap ones blue.
    warmth = [float(image[..., 0].mean() - image[..., 2].mean()) for image in right]
    key = [warmth[t] for t, r in enumerate(found) if r["keyframe"]]
    rest = [warmth[t] for t, r in enumerate(found) if not r["keyframe"]]
    assert min(key) > max(rest) + 20
    assert shown[0][120:].max() > 200  # the line of text


def test_a_folder_of_one_picture_as_csv_without_overlay(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "frames").mkdir()
    Image.fromarray(moving_frames(1, (50, 70))[0].permute(1, 2, 0).numpy()).save(tmp_path / "frames" / "a.png")
    words = [f"policy={trained}", f"source={tmp_path / 'frames'}", "running.overlay=false", "running.records=csv"]
    folder = run(tmp_path, *words)
    (row,) = csv.DictReader((folder / "frames.csv").read_text().splitlines())
    assert (row["frame"], row["keyframe"], row["bops"], row["bits"]) == ("0", "True", "1.0", "8.0")
    assert {p.name for p in folder.iterdir()} & {"overlay.mp4", "frames.jsonl"} == set()


def test_a_camera_is_run_on_until_it_has_given_enough(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """FFmpeg's generator of test pictures is an input device, as a camera is, and gives frames without end."""
    monkeypatch.setitem(stream._CAMERAS, sys.platform, ("lavfi", "testsrc=size=64x48:rate=30"))
    folder = run(tmp_path, f"policy={trained}", "source=0", "running.frames=3")
    assert json.loads((folder / "summary.json").read_text())["source"] == "camera 0"
    assert [record["time"] for record in records(folder)] == pytest.approx([0, 1 / 30, 2 / 30], abs=1e-6)
    assert len(pictures(folder / "overlay.mp4")) == 3
    last = capsys.readouterr().err.splitlines()[-1]
    overlay, policy = (os.path.relpath(path) for path in (folder / "overlay.mp4", trained / "seed0"))
    assert last == f"Next: look at {overlay}; ship the policy: resq-rl export policy={policy} trusted=true"


def test_no_more_frames_than_wanted(trained: Path, video: Path, tmp_path: Path) -> None:
    folder = run(tmp_path, f"policy={trained}", f"source={video}", "running.frames=2", "running.overlay=false")
    assert len(records(folder)) == 2


def test_times_and_the_overlay_follow_the_stamps_of_the_source(trained: Path, tmp_path: Path) -> None:
    """As a live recording has them: uneven, under a header that names 1000 frames per second."""
    times, path = [0.0, 0.03, 0.12, 0.2, 0.21, 0.4], tmp_path / "live.webm"
    with av.open(str(path), "w", options={"live": "1"}) as container:
        stream = container.add_stream("libvpx", rate=1000)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for pixels, time in zip(moving_frames(6, (48, 64)), times, strict=True):
            frame = av.VideoFrame.from_ndarray(pixels.permute(1, 2, 0).numpy(), format="rgb24")
            frame.pts, frame.time_base = round(1000 * time), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    folder = run(tmp_path, f"policy={trained}", f"source={path}", "running.height=48")
    assert [record["time"] for record in records(folder)] == pytest.approx(times, abs=1.5e-3)
    with av.open(str(folder / "overlay.mp4")) as shown:
        found = [frame.time or 0.0 for frame in shown.decode(video=0)]
    assert [time - found[0] for time in found] == pytest.approx(times, abs=2e-3)


def test_an_interrupt_keeps_what_is_done(
    trained: Path, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: VideoStream) -> Iterator[tuple[np.ndarray[Any, Any], float]]:
        for t, frame in enumerate(frames(self)):
            if t == 5:
                raise KeyboardInterrupt
            yield frame

    frames: Callable[[VideoStream], Iterator[tuple[np.ndarray[Any, Any], float]]] = VideoStream.timed
    monkeypatch.setattr(VideoStream, "timed", interrupted)
    folder = run(tmp_path, f"policy={trained}", f"source={video}", code=130)
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["frames"], summary["ended"]) == (5, "interrupted")
    assert len(records(folder)) == len(pictures(folder / "overlay.mp4")) == 5


def test_a_file_cut_short_is_one_error_and_keeps_what_is_done(
    trained: Path, video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = video.read_bytes()
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole[: len(whole) * 6 // 10])
    folder = run(tmp_path, f"policy={trained}", f"source={cut}", code=2)
    error = capsys.readouterr().err
    assert "cut.mkv" in error
    assert "Traceback" not in error
    assert json.loads((folder / "summary.json").read_text())["ended"] == "failed"
    assert 0 < len(records(folder)) == len(pictures(folder / "overlay.mp4")) < 9


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["source=x.mp4"], "Which policy?"),
        (["policy=nowhere", "source=x.mp4"], "nowhere"),
        (["policy={trained}"], "On which video?"),
        (["policy={trained}", "source=x.mp4"], "x.mp4"),
        (["policy={trained}", "source=987"], "camera"),
        (["policy={trained}", "source={video}", "running.trade_off=0"], "running.trade_off"),
        (["policy={trained}", "source={video}", "running.adapt=true"], "training.trainer=gradient"),
        (["policy={trained}", "source={video}", "model=compact_ddrnet"], "another network"),
        (["policy={bare}", "source={video}"], "model=OPTION"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], said: str, trained: Path, video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("policy.json", "policy.safetensors"):
        shutil.copy(trained / "seed0" / name, bare)
    run(tmp_path, *(word.format(trained=trained, video=video, bare=bare) for word in words), code=2)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("resq-rl run:")]
    assert len(lines) == 1
    assert said in lines[0]


def test_a_mask_to_follow_is_read_from_an_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    problem, folder = make_recurrent_problem(), tmp_path / "policy"
    made(scheme(problem), network=problem.model.groups).save(folder)
    save_model(problem.model, folder)
    making = {"model": {"_target_": "tests.envs.problems.follower_network"}}
    making["task"] = {"_target_": "resq_rl.perception.MaskPropagation"}
    (folder / "network.json").write_text(json.dumps(making | {"framing": FRAMING}))
    clip = problem.clips[0]
    assert clip.labels is not None
    (tmp_path / "frames").mkdir()
    for t, frame in enumerate(clip.frames):
        Image.fromarray(frame.permute(1, 2, 0).numpy()).save(tmp_path / "frames" / f"{t}.png")
    Image.fromarray(clip.labels[0].numpy() * 255).save(tmp_path / "mask.png")
    words = [f"policy={folder}", f"source={tmp_path / 'frames'}", "running.height=64"]
    done = run(tmp_path / "with", *words, f"running.label={tmp_path / 'mask.png'}")
    assert len(records(done)) == len(pictures(done / "overlay.mp4")) == len(clip)
    run(tmp_path / "without", *words, code=2)
    assert "begins with the label" in capsys.readouterr().err


@pytest.mark.parametrize(
    "making",
    [
        {"_target_": "evil.network"},
        {"_target_": "resq_rl.perception.load_network", "source": "evil.pt2"},  # a program, which is code
        {"_target_": "resq_rl.perception.save_weights", "path": "evil.safetensors"},  # none of the options
        {"_target_": "resq_rl.experiments.study.deployment.trained_network", "policy": "{folder}", "trusted": True},
        {"_target_": "resq_rl.perception.compact_ddrnet", "classes": {"_target_": "evil.classes"}},
        {"_target_": ["evil.network"]},
    ],
)
def test_code_that_a_policy_folder_names_is_not_run(
    making: dict[str, Any], trained: Path, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Not even imported, unless the command line says that the folder is trusted."""
    (tmp_path / "evil.py").write_text("from pathlib import Path\nPath('ran').touch()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    folder = Path(shutil.copytree(trained / "seed0", tmp_path / "policy"))
    task = {"_target_": "resq_rl.perception.Segmentation", "classes": CLASSES}
    (folder / "network.json").write_text(
        json.dumps({"model": making, "task": task, "framing": FRAMING}).replace("{folder}", str(folder))
    )
    words = [*TINY[:2], "results=results", f"policy={folder}", f"source={video}"]
    assert main(["run", *words]) == 2
    error = capsys.readouterr().err
    assert f"The policy in {folder} would run code that none of resq_rl's own options runs (model." in error
    assert "add trusted=true; or say how it is made: model=OPTION." in error
    assert not (tmp_path / "ran").exists()
    if making["_target_"] == "evil.network":
        assert main(["run", *words, "trusted=true"]) == 2, "evil has no network"
        assert (tmp_path / "ran").exists(), "else this test could not fail"


def test_another_task_can_be_set(trained: Path, video: Path, tmp_path: Path) -> None:
    words = ["task=segmentation", f"task.classes={CLASSES}", "running.overlay=false", "running.frames=3"]
    folder = run(tmp_path, f"policy={trained}", f"source={video}", *words)
    assert len(records(folder)) == 3
    assert torch.get_num_threads() == 1
