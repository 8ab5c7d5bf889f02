"""Runs of the command line in processes that can be killed, and what such a run leaves behind."""

import json
import multiprocessing
import os
import shutil
import sys
import time
from collections import Counter
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from resq_rl.perception.weight_files import read_weights
from resq_rl.sealed import checksum

PRELOADED = [f"resq_rl.experiments.jobs.{command}" for command in ("compare", "pretrain", "train")]
PRELOADED += [
    "tests.experiments.killing",
    "tests.envs.problems",
    "mlflow.tracking",
    "torch._dynamo",
    "matplotlib.figure",
]
SMALL = [
    "threads=1",
    "model=custom",
    "model._target_=tests.envs.problems.tiny_network",
    "task.classes=3",
    "environment.accuracy=teacher",
    "video.size=[32,48]",
    "video.frames=6",
    "video.train=3",
    "video.validation=2",
    "video.test=2",
    "environment.grid=[2,3]",
    "environment.clips_per_batch=3",
    "environment.keyframe_intervals=[4]",
    "environment.trade_off=[0.05,1.0]",
    "environment.thresholds=[0.3,1.0,3.0]",
    "training.frames=150",
    "training.seeds=[0,1]",
    "training.n_steps=4",
    "training.trade_offs=2",
    "training.search_frames=30",
    "training.warm_start=best",
    "training.checkpoint_every=2",
    "training.keyframe_frames=200",
    "heuristic.intervals=[4]",
    "heuristic.references=[previous]",
    "heuristic.taus=[0.3,1.0]",
    "heuristic.other_kappas=[]",
    "heuristic.scene_changes=[]",
    "quantization.calibration_clips=1",
    "quantization.weight_rounding=nearest",
    "quantization.range_estimator=min_max",
]


def _command(arguments: list[str], log: str) -> None:
    """What a process does: one command, with its output in a file."""
    from resq_rl.experiments.cli.app import main

    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.exit(main(arguments))


@dataclass
class Runs:
    """Commands on a world so small that they take seconds, each in a results folder of its own below `folder`.

    Processes are forked from one that has imported everything, so that a kill falls into the run and not its imports.
    """

    folder: Path
    store: Path
    command: str
    overrides: tuple[str, ...] = ()

    def results(self, name: str) -> Path:
        """Made with an empty MLflow store when first asked for."""
        folder = self.folder / name
        if not folder.exists():
            folder.mkdir()
            shutil.copy(self.store, folder / "mlflow.db")
        return folder

    def run_folder(self, name: str) -> Path:
        return self.results(name) / "run"

    def start(self, name: str, *, resume: bool = False) -> BaseProcess:
        """Begin a run, or go on with it by the settings in its folder, as far as it had come to write them."""
        run = self.run_folder(name)
        where = f"training.resume={run}" if resume else f"hydra.run.dir={run}"
        asked = [*SMALL, *self.overrides, f"results={self.results(name)}"]
        if resume and (run / "config.yaml").exists():
            asked = ["trusted=true"]  # the network is made by code of the tests
        arguments = [self.command, *asked, where]
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        process = context.Process(target=_command, args=(arguments, str(self.results(name) / "log")))
        process.start()
        return process

    def finish(self, name: str, *, resume: bool = False) -> float:
        """Run to the end; its seconds."""
        started = time.monotonic()
        process = self.start(name, resume=resume)
        process.join(600)
        assert process.exitcode == 0, (self.results(name) / "log").read_text()
        return time.monotonic() - started

    def kill(self, name: str, after: float, *, resume: bool = False) -> bool:
        """Kill a run after some seconds, as by SIGKILL; whether it had not come to its end."""
        process = self.start(name, resume=resume)
        process.join(after)
        process.kill()
        process.join()
        return process.exitcode != 0

    def kill_once_there_is(self, name: str, pattern: str) -> bool:
        """Kill a run once its folder has a file of a pattern; whether it had not come to its end."""
        process = self.start(name)
        while process.is_alive() and not any(self.run_folder(name).glob(pattern)):
            time.sleep(0.01)
        process.kill()
        process.join()
        return process.exitcode != 0

    def forget(self, name: str) -> None:
        """Remove all of a run."""
        shutil.rmtree(self.results(name))

    def left_behind(self, name: str) -> dict[str, Any]:
        """All that must be equal in two runs of the same settings, by file and MLflow run."""
        run = self.run_folder(name)
        found: dict[str, Any] = {}
        for path in sorted(run.rglob("*")):
            if path.name == "weights.safetensors":  # the format keeps no order of several metadata
                tensors, metadata = read_weights(path)
                found[path.name] = (checksum(metadata, tensors), metadata)
            elif path.suffix in (".safetensors", ".checkpoint") or path.name == "policy.json":
                found[str(path.relative_to(run))] = path.read_bytes()
        for path in (run / "summary.json", run / "comparison.json"):
            if path.exists():
                values = json.loads(path.read_text().replace(str(run), "RUN"))
                found[path.name] = {key: value for key, value in values.items() if "seconds" not in key}
        return found | self._tracked(name)

    def _tracked(self, name: str) -> dict[str, Any]:
        client = MlflowClient(tracking_uri=f"sqlite:///{self.results(name)}/mlflow.db")
        experiment = client.get_experiment_by_name("resq_rl")
        assert experiment is not None
        runs = client.search_runs([experiment.experiment_id])
        assert len({run.info.run_name for run in runs}) == len(runs), "a run was recorded twice"
        own = str(self.results(name))
        found: dict[str, Any] = {}
        for run in runs:
            metrics = Counter(
                (key, m.step, m.value)
                for key in run.data.metrics
                for m in client.get_metric_history(run.info.run_id, key)
            )
            parameters = {key: value.replace(own, "RESULTS") for key, value in run.data.params.items()}
            artifacts = sorted(item.path for item in client.list_artifacts(run.info.run_id))
            found[f"MLflow {run.info.run_name}"] = (run.info.status, metrics, parameters, artifacts)
        return found


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of what is not the same."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
