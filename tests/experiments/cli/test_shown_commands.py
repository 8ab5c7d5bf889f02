"""Every `resq-rl` and `mlflow` that README and docs show runs as it stands, with settings added that make it small.

`make test ARGS="-m slow -k shown"` runs all of them; by default only the tutorial's run.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from resq_rl.experiments.cli.app import main
from resq_rl.experiments.cli.commands import COMMANDS
from resq_rl.experiments.config.composition import load_settings
from resq_rl.perception import compact_ddrnet, save_weights
from resq_rl.video import stream
from tests.envs.problems import moving_frames
from tests.experiments.conftest import free_port, wait_for
from tests.experiments.jobs.test_jobs import write_video
from tests.perception.test_ddrnet23 import cityscapes_checkpoint
from tests.shown import ROOT, blocks, commands

SERVER = "http://host:5000"
# Fewer clips, frames, steps and tries; nothing that changes what a command does.
SMALL = [
    "threads=1",
    "environment.grid=[2,3]",
    "environment.clips_per_batch=2",
    "environment.keyframe_intervals=[2]",
    "environment.trade_off=[0.05,1.0]",  # with so little, a range may not be found
    "environment.thresholds=[0.3,1.0,100.0]",
    "training.frames=16",
    "training.search_frames=8",
    "training.warm_start=best",
    "training.n_steps=4",
    "training.batch_size=64",
    "training.trade_offs=2",
    "heuristic.intervals=[2]",
    "heuristic.references=[previous]",
    "heuristic.taus=[0.3,1.0]",
    "heuristic.other_kappas=[]",
    "heuristic.scene_changes=[]",
    "heuristic.searches=[greedy]",
    "quantization.calibration_clips=1",
    "quantization.weight_rounding=nearest",
    "pretraining.steps=2",
    "pretraining.batch=2",
    "pretraining.validate_every=1",
    "benchmark.batches=[1]",
    "benchmark.rounds=1",
    "benchmark.processes=2",
    "benchmark.soak_steps=4",
    "exporting.trade_offs=1",
    "running.frames=3",
]
FEW_CLIPS = ["video.train=2", "video.validation=1", "video.test=1", "video.frames=4"]
# By the class of the video.
SMALL_VIDEO = {
    "GeneratedVideo": [*FEW_CLIPS, "video.size=[32,48]"],
    "GeneratedObjects": [*FEW_CLIPS, "video.size=[32,48]"],
    "FigureVideo": [*FEW_CLIPS, "video.size=[32,48]"],
    "VideoFiles": ["++video.frames=3"],
    "DavisVideo": ["video.frames=3"],
    "CamVidVideo": ["video.frames=2"],
    "WarpedVideo": ["+video.source.frames=2", "video.train=1", "video.validation=1", "video.frames=2"],
    "JoinedVideo": [],
    "CompositedVideo": ["video.train=2", "video.frames=2", "pretraining.roll_out=1"],
    "CityscapesVideo": ["video.before=2", "video.size=[64,128]"],
}
REAL_DATA = ("selfie_", "_davis", "camvid", "still_camera")
ALONE = {"evaluate": "Which policy?"}  # commands that running text names, and what they ask for when run like that


def small(command: str, words: Sequence[str]) -> list[str]:
    """What makes a command small: settings that it does not give itself a value of its own for."""
    if "--config-dir" in words:
        return SMALL
    video = load_settings(COMMANDS[command].config, single(words)).video.path.rpartition(".")[2]
    return [*SMALL, *SMALL_VIDEO.get(video, [])]


def single(words: Sequence[str]) -> list[str]:
    """The overrides of a command; of several values for a sweep, each of which is tried alone, the first."""
    overrides = [word for word in words if not word.startswith("-")]
    return [word if "[" in word or "--multirun" not in words else word.split(",")[0] for word in overrides]


def run(words: Sequence[str], server: str = "") -> int:
    """A command as it is shown, made small."""
    command, *rest = [word.replace(SERVER, server) for word in words]
    return main([command, *rest, *(small(command, rest) if command in COMMANDS else ())])


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_store: Path) -> Path:
    """The folder in which a command is run, with a store."""
    (tmp_path / "results").mkdir()
    shutil.copy(empty_store, tmp_path / "results" / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_tutorials_commands_shown_run_in_their_order(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = commands("resq-rl", [ROOT / "docs" / "tutorial.md"])
    done = []
    for words in shown.values():
        if [word for word in words if not word.startswith("+")] == ["compare"]:
            continue  # the whole demo
        date = next(place.glob("results/compare/*"), place).name
        assert run([word.replace("DATE", date) for word in words]) == 0, words
        printed = capsys.readouterr()
        assert printed.err.splitlines()[-1].startswith("Next: "), words
        _assert_ends_as_the_readme_shows(words[0], printed.out + printed.err)
        done.append(words[0])
    assert done == ["compare", "run", "export"]
    assert list(place.glob("results/compare/*/report.html"))
    assert list(place.glob("results/run/*/overlay.mp4"))
    assert list(place.glob("results/export/*/thresholds.json"))


def _assert_ends_as_the_readme_shows(command: str, printed: str) -> None:
    """The README's last lines below the command are printed, though with other numbers and dates."""
    readme = (ROOT / "README.md").read_text("utf-8")
    below = readme.split("make demo" if command == "compare" else f"resq-rl {command} policy=", 1)[1]
    shown = below.split("```text\n", 1)[1].split("```", 1)[0].splitlines()
    assert len(shown) == 2
    for line in shown:
        constant = re.split(r"DATE|[-+]\d.*", line)
        assert re.search(r"\S+".join(map(re.escape, constant)), printed), (line, printed)


class Foreground(nn.Module):
    """A network as a user might have one: a probability for each pixel."""

    def __init__(self) -> None:
        super().__init__()
        down, up = nn.Conv2d(3, 4, 3, stride=4, padding=1), nn.Upsample(scale_factor=4)
        self.layers = nn.Sequential(down, nn.ReLU(), nn.Conv2d(4, 1, 1), up)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.layers(frames))


@pytest.fixture(scope="module")
def furnished(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Path:
    """A folder with all that is named in commands: runs, policies, videos, networks and a tree of Cityscapes."""
    folder = tmp_path_factory.mktemp("furnished")
    (folder / "results").mkdir()
    shutil.copy(empty_store, folder / "results" / "mlflow.db")
    for name in ("drive", "drive1", "drive2", "drive3"):
        write_video(folder / f"{name}.mp4", frames=3)
    (folder / "frames" / "drive4").mkdir(parents=True)
    for number, pixels in enumerate(moving_frames(3, (48, 64))):
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / "frames" / "drive4" / f"{number}.png")
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    program = torch.export.export(Foreground().eval(), (torch.zeros(2, 3, 256, 256),), dynamic_shapes=(batch,))
    torch.export.save(program, folder / "my_network.pt2")
    torch.save(cityscapes_checkpoint(), folder / "best_val_smaller.pth")
    write_cityscapes(folder / "CITYSCAPES")
    (folder / "results" / "camvid_network").mkdir()
    untrained = compact_ddrnet(pretrained=False, classes=11)
    save_weights(untrained, folder / "results" / "camvid_network" / "weights.safetensors", {})
    for page, name in (("docs/adding_a_task.md", "coverage_task.py"), ("docs/adding_a_policy.md", "panning.py")):
        python = next(b for where, b in blocks("python") if where == page and re.search("class (Coverage|Panning)", b))
        (folder / name).write_text(python)
        group = "task" if "task" in name else "video"
        (folder / group).mkdir()
        (yaml,) = [block for where, block in blocks("yaml") if where == page]
        (folder / group / f"{name.split('_')[0].removesuffix('.py')}.yaml").write_text(yaml)
    trained = folder / "results" / "train" / "DATE"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run(["train", "+experiment=demo", "training.resume=results/train/DATE"]) == 0
    (folder / "FOLDER").symlink_to(trained / "seed0")
    (folder / "VIDEO").symlink_to(folder / "drive.mp4")
    for policies in ("policies", "POLICIES", "results/compare"):
        (folder / policies).symlink_to(trained if policies != "results/compare" else trained.parent)
    return folder


def write_cityscapes(root: Path) -> None:
    """A snippet of 20 frames and a label in every city that the experiment names."""
    random = np.random.default_rng(0)
    for city in ("train/aachen", "train/bochum", "train/ulm", "val/frankfurt", "val/lindau", "val/munster"):
        images, labels = root / "leftImg8bit_sequence" / city, root / "gtFine" / city
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        stem = f"{city.split('/')[1]}_000000"
        for number in range(30):
            pixels = random.integers(0, 256, (64, 128, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(images / f"{stem}_{number:06d}_leftImg8bit.png")
        values = (np.arange(64 * 128).reshape(64, 128) // 300 % 34).astype(np.uint8)
        Image.fromarray(values).save(labels / f"{stem}_000019_gtFine_labelIds.png")


SHOWN = commands("resq-rl")
WITHOUT_SETTINGS = ("list", "sync", "COMMAND", "--help")


@pytest.mark.parametrize("line", [line for line, (name, *_) in SHOWN.items() if name not in WITHOUT_SETTINGS])
def test_a_command_shown_has_valid_settings(line: str) -> None:
    command, *words = SHOWN[line]
    if "--config-dir" not in words:  # or they are of files that the page shows
        load_settings(COMMANDS[command].config, single(words))


@pytest.mark.slow
@pytest.mark.usefixtures("painted")
@pytest.mark.parametrize("line", SHOWN)
def test_a_command_shown_runs(
    line: str,
    furnished: Path,
    mlflow_server: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if any(name in line for name in REAL_DATA):
        monkeypatch.setenv("RESQ_RL_SHARED", str(request.getfixturevalue("shared")))
    monkeypatch.chdir(furnished)
    monkeypatch.syspath_prepend(furnished)
    monkeypatch.setitem(stream._CAMERAS, sys.platform, ("lavfi", "testsrc=size=64x48:rate=30"))
    words = SHOWN[line]
    if words[0] == "COMMAND":
        assert [main([command, *words[1:]]) for command in COMMANDS] == [0] * len(COMMANDS)
        return
    asked = ALONE.get(words[0]) if len(words) == 1 else None
    assert run(words, mlflow_server) == (0 if asked is None else 2)
    captured = capsys.readouterr()
    if asked is not None:
        assert asked in captured.err
    elif "training.resume" in line:
        assert "is finished already" in captured.err
    elif "--help" not in words:
        last = [text.splitlines()[-1] for text in captured if text]
        assert any(line.startswith("Next: ") for line in last), last


@pytest.mark.slow
@pytest.mark.parametrize("words", [w for w in commands("mlflow").values() if w], ids=" ".join)
def test_a_server_shown_answers(words: list[str], furnished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(furnished)
    assert run(["export", "policy=FOLDER"]) == 0  # registers a model
    port = str(free_port())
    words = [port if before == "--port" else word for before, word in zip(["", *words], words, strict=False)]
    words = words if "--port" in words else [*words, "--port", port]
    store = {"MLFLOW_TRACKING_URI": "sqlite:///results/mlflow.db", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # of an environment that is not active
    with (furnished / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *words],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | store | {"PATH": programs},
            start_new_session=True,
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, furnished / "log")
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)
