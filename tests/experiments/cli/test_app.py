import json
import logging
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium
import pytest
import torch
from omegaconf import OmegaConf

import resq_rl.configs
from resq_rl.errors import VideoError
from resq_rl.experiments.cli.app import main
from resq_rl.experiments.cli.catalogue import KINDS
from resq_rl.experiments.cli.commands import COMMANDS, Command
from resq_rl.experiments.config.composition import load_settings
from resq_rl.experiments.config.quoting import assignment
from resq_rl.experiments.config.settings import Settings
from resq_rl.experiments.tracking.tracker import Tracker

Run = Callable[..., int]
FAKE = {
    "train": Command("train something", "train", "fake_jobs:run", resume="training.resume={folder}"),
    "compare": Command("compare things", "compare", "fake_jobs:run"),
}


def job(settings: Settings, run_dir: Path, tracker: Tracker) -> str | None:
    """Writes what it was given; the seed says how it ends."""
    for frames, loss in ((960, 1.0), (1920, 0.5)):
        tracker.log_metrics({"loss": loss}, step=frames)
    (run_dir / "summary.json").write_text(json.dumps({"seed": settings.seed, "folder": str(run_dir)}))
    logging.getLogger("resq_rl.fake").info("a line of the job")
    match settings.seed:
        case 7:
            raise VideoError("No such video:\n  x.mp4. Check the path.")
        case 8:
            raise RuntimeError("a bug")
        case 9:
            raise KeyboardInterrupt
        case 4:
            return "resq-rl evaluate policy=here"
        case 10:
            torch.empty(1 << 50, dtype=torch.uint8)
        case 11:
            with (run_dir / "big").open("wb") as file:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
                file.write(bytes(10_000))
    return None


@pytest.fixture(autouse=True)
def _restored_limits() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs the command line in an empty folder, with a job of this file and without tracking."""
    module = ModuleType("fake_jobs")
    module.run = job  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fake_jobs", module)
    monkeypatch.chdir(tmp_path)
    for variable in ("RESQ_RL_DEBUG", "HYDRA_FULL_ERROR"):
        monkeypatch.delenv(variable, raising=False)

    def call(*arguments: str, tracking: str = "disabled") -> int:
        words = list(arguments)
        if len(words) > 0 and not words[0].startswith("-") and words[0] in FAKE:
            words.append(f"tracking={tracking}")
        return main(words, FAKE)

    return call


def test_the_page_of_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    page = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert f"  {name}" in page
        assert command.help in page
    assert "--multirun" in page
    assert main([]) == 0


def test_help_imports_neither_torch_nor_hydra() -> None:
    code = (
        "import sys; from resq_rl.experiments.cli.app import main; main(['--help']);"
        "sys.exit(any(name in sys.modules for name in ('torch', 'hydra', 'mlflow', 'matplotlib')))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("resq-rl 0.")


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("trian", "Did you mean 'train'?"),
        ("seed=3", "Write the command before 'seed=3'"),
        ("--cfg", "Write the command"),
    ],
)
def test_an_unknown_command_is_one_line_with_the_nearest(
    run: Run, word: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(word) == 2
    line = capsys.readouterr().err
    assert expected in line
    assert line.count("\n") == 1


def test_a_job_gets_its_settings_and_folder(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "seed=3", "training.frames=10") == 0
    (folder,) = (tmp_path / "results" / "train").iterdir()
    assert json.loads((folder / "summary.json").read_text()) == {"seed": 3, "folder": str(folder)}
    resolved = OmegaConf.load(folder / "config.yaml")
    assert (resolved.seed, resolved.training.frames) == (3, 10)
    assert "a line of the job" in (folder / "train.log").read_text()
    captured = capsys.readouterr()
    assert "a line of the job" in captured.err
    assert f"Results: results/train/{folder.name}" in captured.err
    assert captured.out == ""
    assert "HYDRA_FULL_ERROR" not in os.environ


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["sede=3"], "resq-rl train: Unknown setting 'sede'. Did you mean 'seed'?"),
        (["seed=x"], "resq-rl train: Setting 'seed' must be an integer of at least 0; received 'x'."),
        (["seed=1,2"], "resq-rl train: 'seed=1,2' gives several values"),
        (["seed"], "resq-rl train: Cannot read 'seed': write it as NAME=VALUE."),
        (["--multirun", "seed=1,2", "sede=3"], "resq-rl train: Unknown setting 'sede'. Did you mean 'seed'?"),
        (["--multirun", "video=generated,davsi"], "resq-rl train: Unknown option 'davsi' for 'video'."),
        (["--cfg", "job", "sede=3"], "resq-rl train: Unknown setting 'sede'."),
        (["--help", "sede=3"], "resq-rl train: Unknown setting 'sede'."),
        (["--config-dir", "nowhere"], "resq-rl train: Cannot compose the settings: Additional config directory"),
        (["--resolve"], "resq-rl train: Cannot compose the settings: The --resolve flag"),
        (["seed=7"], "resq-rl train: No such video: x.mp4. Check the path."),
        (["seed=10"], "resq-rl train: Out of memory with environment.clips_per_batch=32: lower it"),
        (["seed=11"], "resq-rl train: Cannot write a file: File too large. Free some space"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    run: Run, arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", *arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    own = [line for line in lines if line.startswith("resq-rl")]
    assert len(own) == 1
    assert own[0].startswith(expected)
    assert not any("Traceback" in line for line in lines)


def test_the_log_keeps_the_traceback_and_debugging_shows_it(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RESQ_RL_DEBUG", "1")
    assert run("train", "seed=7") == 2
    assert "Traceback" in capsys.readouterr().err
    (log,) = tmp_path.glob("results/train/*/train.log")
    assert "VideoError: No such video" in log.read_text()


def test_a_bug_is_one_line_that_says_where_its_traceback_is_and_exit_code_1(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", "seed=8") == 1
    (log,) = tmp_path.glob("results/train/*/train.log")
    error = capsys.readouterr().err
    assert error.endswith(f"resq-rl train: RuntimeError: a bug. This is a bug; its traceback is in {log}.\n")
    assert "Traceback" not in error
    assert "Traceback" in log.read_text()
    monkeypatch.setenv("RESQ_RL_DEBUG", "1")
    assert run("train", "seed=8") == 1
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupt_says_what_is_kept_and_how_to_go_on(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", "seed=9", "training.resume=before") == 130
    folder = tmp_path / "before"
    error = capsys.readouterr().err
    assert f"interrupted; what was computed so far is in {folder}." in error
    command = f"To go on: resq-rl train seed=9 tracking=disabled training.resume={folder}\n"
    assert error.endswith(command)
    assert (folder / "summary.json").is_file()
    assert run("compare", "seed=9") == 130
    assert "To go on" not in capsys.readouterr().err


def test_the_command_that_goes_on_can_be_read_whatever_the_folder_is_called(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", "seed=9", assignment("training.resume", "before, (1)")) == 130
    command = capsys.readouterr().err.partition("To go on: ")[2].strip()
    words = shlex.split(command)
    assert words[:2] == ["resq-rl", "train"]
    assert load_settings("train", words[2:]).training.resume == str(tmp_path / "before, (1)")


@pytest.mark.parametrize("name", ["my results (1)", "ünï/видео", "a,b", "50%"])
def test_results_go_to_a_folder_of_any_name(run: Run, tmp_path: Path, name: str) -> None:
    assert run("train", "seed=3", assignment("results", name)) == 0
    (folder,) = (tmp_path / name / "train").iterdir()
    assert json.loads((folder / "summary.json").read_text())["folder"] == str(folder)
    assert [path.name for path in tmp_path.iterdir()] == [Path(name).parts[0]]


@pytest.mark.parametrize("given", ["results=", "results=2026", "results=null", "results=[a]", "results='\\${x}'"])
def test_results_that_name_no_folder_are_refused_before_anything_is_written(
    run: Run, tmp_path: Path, given: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", given) == 2
    error = capsys.readouterr().err
    assert error.startswith("resq-rl train: Setting 'results' must be text, the name of a folder")
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_cost_is_short_for_the_setting_of_cost_tables(run: Run, tmp_path: Path) -> None:
    assert run("train", "seed=3", "cost=roofline") == 0
    (folder,) = (tmp_path / "results" / "train").iterdir()
    assert "bops_convention: roofline\n" in (folder / "config.yaml").read_text()


def test_a_command_says_what_it_does_and_what_is_useful_next(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "seed=4") == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Will train something. Results go to results/train/")
    assert lines[-1] == "Next: resq-rl evaluate policy=here"
    assert "\x1b" not in "".join(lines), "no colours where there is no terminal"


# What can be chosen --------------------------------------------------------------------------------------------------


def test_list_names_everything_with_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    parts = [part.splitlines() for part in capsys.readouterr().out.strip().split("\n\n")]
    listed = {head.split()[0]: dict(line.strip().split(maxsplit=1) for line in lines) for head, *lines in parts}
    assert list(listed) == list(KINDS)
    folder = Path(resq_rl.configs.__path__[0])
    for kind, group in (("models", "model"), ("tasks", "task"), ("datasets", "video"), ("experiments", "experiment")):
        files = list((folder / group).glob("*.yaml"))
        assert {file.stem for file in files} == set(listed[kind])
        for file in files:
            comment = next(line for line in file.read_text().splitlines() if not line.startswith("# @"))
            assert comment == f"# {listed[kind][file.stem]}", f"{file} begins with a comment that says what it is"
    assert set(listed["environments"]) == {name for name in gymnasium.registry if name.startswith("resq_rl/")}
    assert "environment=region_thresholds" in listed["environments"]["resq_rl/RegionThresholds-v0"]
    assert {"DynamicResQ", "LearnedPolicy", "StaticResQ"} <= set(listed["policies"])


def test_list_shows_one_kind_or_says_which_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "tasks"]) == 0
    page = capsys.readouterr().out
    assert "  segmentation  " in page
    assert "compact_ddrnet" not in page
    assert main(["list", "task"]) == 2
    assert "Did you mean 'tasks'?" in capsys.readouterr().err
    assert main(["list", "--help"]) == 0
    assert "datasets" in capsys.readouterr().out
    assert main(["lits"]) == 2
    assert "Did you mean 'list'?" in capsys.readouterr().err


@pytest.mark.parametrize("folder", ["/proc/nothing", "occupied/below"])
def test_an_unwritable_results_folder_is_one_clear_line(
    run: Run, tmp_path: Path, folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "occupied").write_text("a file, not a folder")
    assert run("train", f"results={folder}") == 2
    error = capsys.readouterr().err
    assert "Cannot write the results folder" in error
    assert folder in error
    assert "results=FOLDER" in error
    assert error.count("\n") == 1


def test_a_failing_job_does_not_end_a_sweep(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "--multirun", "seed=7,8,3") == 2
    error = capsys.readouterr().err
    assert "No such video: x.mp4. Check the path. [seed=7" in error
    assert "2 of 3 jobs failed" in error
    assert len(list(tmp_path.glob("results/train/*/*/summary.json"))) == 3


def test_flags_after_the_command(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "--help") == 0
    page = capsys.readouterr().out
    assert page.startswith("resq-rl train: train something\n")
    for expected in (
        " video        camvid, ",
        "training.learning_rate ",
        "what residuals are taken against",
        "--multirun",
    ):
        assert expected in page
    assert run("compare", "--cfg", "job", "--resolve", "seed=5") == 0
    assert OmegaConf.create(capsys.readouterr().out).seed == 5
    assert run("train", "--info", "searchpath") == 0
    assert "pkg://resq_rl.configs" in capsys.readouterr().out
    assert run("train", "--cfg", "jbo") == 2


def test_groups_of_a_user_join_the_shipped_ones(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own" / "video").mkdir(parents=True)
    (tmp_path / "own" / "video" / "short.yaml").write_text("_target_: resq_rl.video.GeneratedVideo\nframes: 4\n")
    assert run("train", "--config-dir", "own", "video=short") == 0
    assert run("train", "--config-dir", "own", "video=shrt") == 2
    assert "Did you mean 'short'?" in capsys.readouterr().err


@pytest.fixture
def results(tmp_path: Path, empty_store: Path) -> Path:
    """The results folder of `run`, with an empty store."""
    (tmp_path / "results").mkdir()
    shutil.copy(empty_store, tmp_path / "results" / "mlflow.db")
    return tmp_path / "results"


def runs(folder: Path) -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("resq_rl")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id], order_by=["attributes.start_time"]))


@contextmanager
def watched() -> Iterator[list[tuple[str, str]]]:
    """What is bound and started meanwhile."""
    seen: list[tuple[str, str]] = []
    watching = [True]

    def watch(event: str, arguments: tuple[Any, ...]) -> None:  # a hook cannot be removed
        if watching[0] and event in ("socket.bind", "subprocess.Popen", "os.fork", "os.posix_spawn"):
            seen.append((event, str(arguments[0] if event == "subprocess.Popen" else arguments)))

    sys.addaudithook(watch)
    yield seen
    watching[0] = False


def test_a_sweep_is_recorded_under_one_parent_and_starts_no_server_nor_another_process(
    run: Run, results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With Hydra's own launcher; only git is asked for the commit."""
    with watched() as seen:
        assert run("train", "--multirun", "seed=3,7", tracking="mlflow") == 2
    assert {(event, Path(what).name) for event, what in seen} <= {("subprocess.Popen", "git")}, seen
    (address,) = set(re.findall(r"^Tracking: (.+)$", capsys.readouterr().err, re.MULTILINE))
    assert address.startswith("mlflow ui ")
    parent, *children = runs(results)
    assert parent.info.run_name == "sweep train seed=3,7"
    assert [child.info.run_name for child in children] == ["seed=3", "seed=7"]
    assert children[0].data.tags["arguments"] == "seed=3 tracking=mlflow"
    assert parent.data.tags["arguments"] == "--multirun seed=3,7 tracking=mlflow"
    assert parent.data.params == {"seed": "3,7"}
    assert parent.data.metrics == {"jobs": 2.0, "failed_jobs": 1.0}
    assert [child.data.tags["mlflow.parentRunId"] for child in children] == [parent.info.run_id] * 2
    assert [child.info.status for child in (parent, *children)] == ["FAILED", "FINISHED", "FAILED"]
    assert [child.data.params["seed"] for child in children] == ["3", "7"]
    assert all((Path(c.info.artifact_uri.removeprefix("file://")) / "config.yaml").is_file() for c in children)


def test_a_sweep_that_goes_on_runs_only_what_is_missing(run: Run, results: Path, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    words = ["--multirun", "seed=3,7", f"training.resume={sweep}"]
    assert run("train", *words, tracking="mlflow") == 2
    done = sweep / "0" / "summary.json"
    done.unlink()
    assert run("train", *words, tracking="mlflow") == 2
    assert not done.exists(), "a job that is finished is not run again"
    statuses = {(r.data.params.get("seed"), r.info.status) for r in runs(results)}
    assert statuses == {("3,7", "FAILED"), ("3", "FINISHED"), ("7", "FAILED")}
    assert len(runs(results)) == 3, "each is one run of MLflow, however often it was begun"


def test_a_sweep_without_a_store_is_sent_later(
    run: Run, results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", "--multirun", "seed=3,7", tracking="offline") == 2
    (sweep,) = (tmp_path / "results" / "train").iterdir()
    assert main(["sync", str(sweep)]) == 0
    assert main(["sync", str(sweep)]) == 0, "sending again changes nothing"
    parent, *children = runs(results)
    assert parent.data.metrics == {"jobs": 2.0, "failed_jobs": 1.0}
    assert [child.data.tags["mlflow.parentRunId"] for child in children] == [parent.info.run_id] * 2
    assert [child.info.status for child in (parent, *children)] == ["FAILED", "FINISHED", "FAILED"]
    assert [child.data.metrics for child in children] == [{"loss": 0.5}] * 2
    capsys.readouterr()
    assert main(["sync", str(tmp_path / "nothing")]) == 2
    assert "There is no tracking.jsonl" in capsys.readouterr().err


def test_an_interrupted_run_is_recorded_as_killed(run: Run, results: Path) -> None:
    assert run("train", "seed=9", tracking="mlflow") == 130
    (recorded,) = runs(results)
    assert recorded.info.status == "KILLED"
    assert recorded.data.metrics == {"loss": 0.5}


def test_an_unreachable_server_is_one_clear_line(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "tracking.uri=http://127.0.0.1:9", tracking="mlflow") == 2
    error = capsys.readouterr().err
    assert "Cannot use the tracking store http://127.0.0.1:9: no connection" in error
    assert "tracking.enabled=false" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_job(command: str) -> None:
    module, _, function = COMMANDS[command].job.partition(":")
    assert module.startswith("resq_rl.experiments.")
    assert function == "run"
