"""Sweeps whose jobs a launcher runs in other processes."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from omegaconf import OmegaConf

from tests.experiments.conftest import free_port
from tests.experiments.killing import SMALL
from tests.experiments.ray_nodes import LOOPBACK, Nodes
from tests.experiments.sweeping import BROKEN, ENDED

MAIN = (
    "import sys; from resq_rl.experiments.cli.app import main; from tests.experiments.sweeping import COMMANDS;"
    "sys.exit(main(['train', '--multirun', 'threads=1', *sys.argv[1:]], COMMANDS))"
)
Sweep = Callable[..., tuple[int, str]]


@pytest.fixture
def environment(root: Path) -> dict[str, str]:
    """Of processes that import this checkout."""
    return os.environ | {"PYTHONPATH": str(root)}


@pytest.fixture
def sweep(tmp_path: Path, empty_store: Path, environment: dict[str, str]) -> Sweep:
    """Runs a sweep of `sweeping.run` from an empty folder, and gives its exit code and what it said."""
    (tmp_path / "results").mkdir()
    shutil.copy(empty_store, tmp_path / "results" / "mlflow.db")

    def call(*words: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-c", MAIN, *words],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        return done.returncode, done.stderr

    return call


def folder_of(root: Path) -> Path:
    (folder,) = (root / "results" / "train").iterdir()
    return folder


def results(folder: Path) -> list[int]:
    """Seeds of the jobs that came to their end."""
    return sorted(json.loads(path.read_text())["seed"] for path in folder.glob("*/summary.json"))


def check_recorded(root: Path, jobs: dict[int, str]) -> None:
    """One parent, and one child for each seed, with its status and its metric."""
    client = MlflowClient(tracking_uri=f"sqlite:///{root}/results/mlflow.db")
    experiment = client.get_experiment_by_name("resq_rl")
    assert experiment is not None
    runs: list[Any] = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time"])
    parent, *children = runs
    assert parent.data.metrics["jobs"] == len(jobs)
    assert {child.data.tags["mlflow.parentRunId"] for child in children} == {parent.info.run_id}
    assert sorted((int(c.data.params["seed"]), c.info.status) for c in children) == sorted(jobs.items())
    assert all(child.data.metrics == {"seed": int(child.data.params["seed"])} for child in children)


def check_journals(folder: Path, jobs: int) -> None:
    """One run for the sweep and one below it for each job, however often it was begun."""

    def starts(path: Path) -> list[dict[str, Any]]:
        operations = [json.loads(line) for line in path.read_text().splitlines()]
        return [operation for operation in operations if operation["kind"] == "start"]

    (parent,) = starts(folder / "tracking.jsonl")
    for job in range(jobs):
        (child,) = starts(folder / str(job) / "tracking.jsonl")
        assert child["payload"]["parent"] == parent["run"]


def test_processes_of_joblib_run_the_jobs_and_one_that_fails_does_not_end_the_sweep(
    sweep: Sweep, tmp_path: Path
) -> None:
    code, said = sweep(f"seed=1,{BROKEN},2", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "tracking=offline")
    folder = folder_of(tmp_path)
    assert code == 2, said
    assert "1 of 3 jobs failed" in said
    assert f"{folder.relative_to(tmp_path)}/1: No such video. Check the path." in said
    assert f"training.resume={folder}" in said
    assert "[0] Will train something." in said
    assert results(folder) == [1, 2]
    check_journals(folder, jobs=3)


def test_jobs_on_ray_go_on_in_another_process_when_theirs_is_lost(sweep: Sweep, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs the extra `ray`")
    code, said = sweep(f"seed=1,{BROKEN},{ENDED}", "hydra/launcher=ray", "tracking=offline")
    folder = folder_of(tmp_path)
    assert code == 2, said
    assert "1 of 3 jobs failed" in said
    assert "Job 2 lost its process (WorkerCrashedError" in said
    assert results(folder) == [1, ENDED]
    assert json.loads((folder / "2" / "summary.json").read_text())["resumed"]
    (folder_started_in,) = {line.split()[1] for line in (folder / "2" / "beginnings").read_text().splitlines()}
    assert folder_started_in == str(tmp_path)
    check_journals(folder, jobs=3)


@pytest.mark.slow
def test_jobs_of_submitit_are_recorded_under_one_parent(sweep: Sweep, tmp_path: Path) -> None:
    pytest.importorskip("submitit", reason="needs the extra `submitit`")
    code, said = sweep(f"seed=1,{BROKEN}", "hydra/launcher=submitit_local")
    assert code == 2, said
    assert "1 of 2 jobs failed" in said
    assert results(folder_of(tmp_path)) == [1]
    check_recorded(tmp_path, {1: "FINISHED", BROKEN: "FAILED"})


@pytest.fixture
def nodes(tmp_path: Path, environment: dict[str, str]) -> Iterator[Nodes]:
    pytest.importorskip("ray", reason="needs the extra `ray`")
    made = Nodes(free_port(), tmp_path, environment)
    yield made
    made.stop()


TRAIN = "import sys; from resq_rl.experiments.cli.app import main; sys.exit(main(['train', *sys.argv[1:]]))"


def statuses(folder: Path) -> list[str]:
    return [json.loads(path.read_text())["status"] for path in folder.glob("*/run.json")]


def training(folder: Path) -> int:
    """How many jobs run and have a checkpoint."""
    running = [path.parent for path in folder.glob("*/run.json") if '"status": "running"' in path.read_text()]
    return sum(any(job.glob("seed0/checkpoints/*.checkpoint")) for job in running)


@pytest.mark.slow
def test_twelve_trainings_on_two_nodes_of_which_one_is_killed(
    nodes: Nodes, environment: dict[str, str], tmp_path: Path, empty_store: Path
) -> None:
    (tmp_path / "results").mkdir()
    shutil.copy(empty_store, tmp_path / "results" / "mlflow.db")
    nodes.start()
    nodes.start()
    few = [*SMALL, "training.seeds=[0]", "training.frames=1500", "training.keyframe_frames=0"]
    words = ["--multirun", *few, "training.learning_rate=0.001,0.002", "seed=0,1,2,3,4,5", "hydra.sweep.dir=sweep"]
    words += ["hydra/launcher=ray", f"hydra.launcher.address={nodes.address}"]
    with (tmp_path / "said").open("w") as said:
        running = subprocess.Popen(
            [sys.executable, "-c", TRAIN, *words], cwd=tmp_path, env=nodes.environment, stdout=said, stderr=said
        )
    try:
        deadline = time.monotonic() + 900
        while statuses(tmp_path / "sweep").count("finished") < 3 or training(tmp_path / "sweep") < 2:
            assert running.poll() is None, (tmp_path / "said").read_text()
            assert time.monotonic() < deadline, (tmp_path / "said").read_text()
            time.sleep(0.2)
        assert nodes.listening() <= LOOPBACK
        before = statuses(tmp_path / "sweep")
        nodes.kill(1)
        code = running.wait(900)
    finally:
        running.kill()
    output = (tmp_path / "said").read_text()
    print(f"at the kill: {before}", *[line for line in output.splitlines() if "lost its" in line], sep="\n")
    assert code == 0, output
    assert output.count("lost its process") == 1
    assert statuses(tmp_path / "sweep") == ["finished"] * 12
    assert len(list(tmp_path.glob("sweep/*/seed0/policy.safetensors"))) == 12
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/results/mlflow.db")
    runs: list[Any] = client.search_runs(["1"], order_by=["attributes.start_time"])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert [run.info.status for run in (parent, *children)] == ["FINISHED"] * 13
    lost = re.findall(r"Job (\d+) lost its process", output)[0]
    overrides = [str(word) for word in OmegaConf.load(tmp_path / "sweep" / lost / ".hydra" / "overrides.yaml")]
    alone = [sys.executable, "-c", TRAIN, *overrides, "hydra.run.dir=alone", "tracking=disabled"]
    subprocess.run(alone, cwd=tmp_path, env=environment, capture_output=True, timeout=600, check=True)
    policies = [tmp_path / folder / "seed0" / "policy.safetensors" for folder in (f"sweep/{lost}", "alone")]
    assert policies[0].read_bytes() == policies[1].read_bytes(), "it learned what it would have learned undisturbed"
