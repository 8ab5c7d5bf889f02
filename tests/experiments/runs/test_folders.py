"""Commands that want one folder at the same time, as processes."""

import json
import multiprocessing
import os
import time
from collections.abc import Mapping
from datetime import datetime
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace

import hydra.core.utils
import pytest

from resq_rl.errors import ResultsError
from resq_rl.experiments.cli import app
from resq_rl.experiments.cli.app import main
from resq_rl.experiments.cli.commands import Command
from resq_rl.experiments.config.settings import Settings
from resq_rl.experiments.runs import sweep
from resq_rl.experiments.runs.folders import LOCK, claimed, new_folder
from resq_rl.experiments.tracking.tracker import Tracker
from tests.experiments.killing import PRELOADED

COMMANDS = {"train": Command("train something", "train", f"{__name__}:run", resume="training.resume={folder}")}
GO_ON = "go on"  # a file in the working folder that running jobs wait for
PLAIN = ["threads=1", "tracking=disabled"]


def run(settings: Settings, run_dir: Path, tracker: Tracker) -> str | None:
    """Write lines until a file tells it to end."""
    while True:
        with (run_dir / "lines").open("a") as file:
            file.write(f"{os.getpid()}\n")
        if Path(GO_ON).exists():
            return None
        time.sleep(0.05)


def command(folder: str, log: str, arguments: list[str]) -> None:
    """One command of a process, whose clock stands still."""
    os.chdir(folder)
    output = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    hydra.core.utils.datetime = SimpleNamespace(now=lambda: datetime(2026, 1, 2, 3, 4, 5))  # type: ignore[assignment,attr-defined]
    raise SystemExit(main(["train", *arguments, *PLAIN], COMMANDS))


def start(folder: Path, log: str, *arguments: str) -> BaseProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED, __name__])
    process = context.Process(target=command, args=(str(folder), log, list(arguments)))
    process.start()
    return process


def wait_for(folder: Path, pattern: str, count: int) -> list[Path]:
    deadline = time.monotonic() + 60
    while len(found := sorted(folder.glob(pattern))) < count:
        logs = [path.read_text() for path in folder.glob("log*")]
        assert time.monotonic() < deadline, logs
        time.sleep(0.05)
    return found


def content(folder: Path) -> Mapping[str, bytes]:
    """All files but the one that a running job writes to."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "lines"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("arguments", [[], ["--multirun", "seed=1,2"]], ids=["run", "sweep"])
def test_commands_of_the_same_second_have_folders_of_their_own(arguments: list[str], tmp_path: Path) -> None:
    processes = [start(tmp_path, f"log{number}", *arguments, 'results="it\'s 0"') for number in range(2)]
    folders = wait_for(tmp_path, "it's 0/train/*", 2)
    wait_for(tmp_path, "it's 0/train/**/lines", 2)
    (tmp_path / GO_ON).touch()
    for process in processes:
        process.join(120)
    assert [p.exitcode for p in processes] == [0, 0], [path.read_text() for path in tmp_path.glob("log*")]
    assert [folder.name for folder in folders] == ["2026-01-02_03-04-05", "2026-01-02_03-04-05-2"]
    jobs = 2 if arguments else 1
    for folder in folders:
        written = [set(path.read_text().split()) for path in folder.rglob("lines")]
        assert len(written) == jobs
        assert len(set.union(*written)) == 1, "one process wrote all of a folder"
        records = [json.loads(path.read_text()) for path in folder.rglob("run.json")]
        assert [(record["status"], len(record["sessions"])) for record in records] == [("finished", 1)] * jobs


def test_a_folder_is_free_again_when_its_process_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    running = start(tmp_path, "log")
    (lines,) = wait_for(tmp_path, "results/train/*/lines", 1)
    resume = ["train", *PLAIN, f"training.resume={lines.parent}"]
    before = content(tmp_path)
    assert main(resume, COMMANDS) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"resq-rl train: Another process is writing to {lines.parent}.")
    assert said.count("\n") == 1
    assert content(tmp_path) == before, "nothing was written"
    running.kill()
    running.join()
    (tmp_path / GO_ON).touch()
    assert main(resume, COMMANDS) == 0
    record = json.loads((lines.parent / "run.json").read_text())
    assert (record["status"], len(record["sessions"])) == ("finished", 2)


@pytest.mark.parametrize("words", [["hydra.run.dir=taken"], ["--multirun", "training.resume=taken", "seed=1,2"]])
def test_a_folder_that_is_asked_for_and_taken_is_refused(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "PATIENCE", 0.1)
    with claimed(tmp_path / "taken", 0):
        assert main(["train", *words, *PLAIN], COMMANDS) == 2
    assert "Another process is writing to" in capsys.readouterr().err
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["taken", f"taken/{LOCK}"]


def test_a_job_of_a_sweep_whose_folder_is_taken_fails_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(app, "JOB_PATIENCE", 0.1)
    (tmp_path / GO_ON).touch()
    (tmp_path / "sweep" / "0").mkdir(parents=True)
    (tmp_path / "sweep" / "0" / "run.json").write_text('{"status": "running", "sessions": [{}]}')
    with claimed(tmp_path / "sweep" / "0", 0):
        assert main(["train", "--multirun", *PLAIN, "seed=1,2", "training.resume=sweep"], COMMANDS) == 1
    said = capsys.readouterr().err
    assert "Another process is writing to" in said
    assert "1 of 2 jobs failed" in said
    assert not (tmp_path / "sweep" / "0" / "lines").exists()
    assert (tmp_path / "sweep" / "0" / "run.json").read_text() == '{"status": "running", "sessions": [{}]}'
    assert json.loads((tmp_path / "sweep" / "1" / "run.json").read_text())["status"] == "finished"


def test_new_folders_are_never_those_of_others(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b.c"
    assert [new_folder(folder).name for _ in range(3)] == ["b.c", "b.c-2", "b.c-3"]
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Not a directory"):
        new_folder(tmp_path / "file" / "x")


def test_waiting_for_a_folder_ends(tmp_path: Path) -> None:
    with claimed(tmp_path, 0):
        started = time.monotonic()
        with pytest.raises(ResultsError, match="Another process is writing"), claimed(tmp_path, 0.2):
            pass
        assert 0.2 <= time.monotonic() - started < 5
    with claimed(tmp_path, 0):
        pass
