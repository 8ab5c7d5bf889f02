"""`resq-rl bench`: how fast the simulation is, as ratios to the float network in the same run."""

import logging
import os
import pickle
import platform
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from rich.console import Console
from rich.table import Table
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import ConvertCallback
from stable_baselines3.common.vec_env import SubprocVecEnv

from resq_rl.envs import (
    ActionScheme,
    BatchedEnvironment,
    EpisodeSettings,
    NetworkEngine,
    Problem,
    RegionThresholds,
    Streams,
    TableEngine,
    respond,
)
from resq_rl.envs.network_engine import clips_that_fit
from resq_rl.envs.sb3 import AgentsVecEnv
from resq_rl.experiments.bench import growth
from resq_rl.experiments.bench.timing import REFERENCE, alternate, shown, step_jobs, timed
from resq_rl.experiments.config.settings import Settings
from resq_rl.experiments.results.comparison import write_summary
from resq_rl.experiments.runs.progress import stage
from resq_rl.experiments.study.study import Study, build_study
from resq_rl.experiments.tracking.tracker import Tracker
from resq_rl.policies.ordinal import OrdinalPolicy
from resq_rl.policies.ppo import Progress, train_ppo, untrained
from resq_rl.quantization.kernels import PLAIN
from resq_rl.video import Clip

__all__ = ["run"]

log = logging.getLogger(__name__)

# Of the table environment.
TABLE_CLIPS, TABLE_FRAMES, TABLE_SLOTS, TABLE_STEPS = 2, 12, 1024, 100
TRAINING_ROLLOUTS = 2
RATE_STEPS = 20  # of region agents, and of environments in processes of their own


def run(settings: Settings, run_dir: Path, tracker: Tracker) -> str:
    """Measure; `bench.json` is written anew after each part. Returns the next useful command."""
    study = build_study(settings, ["train"])
    report: dict[str, Any] = {
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "compiled": study.model.kernels is not PLAIN,
        "frame_size": list(study.model.frame_size),
        "layers": len(study.model.sites),
        "macs": study.model.macs,
        "rounds": settings.benchmark.rounds,
        "parts": {},
    }
    parts: dict[str, Callable[[Study], dict[str, Any]]] = {
        **{f"steps, batch {b}": _steps_of(b) for b in settings.benchmark.batches},
        "grids": growth.regions,
        "resolutions": growth.resolutions,
        "layers": growth.layers,
        "widths": growth.widths,
        "groups": growth.groups,
        "clip lengths": growth.clip_lengths,
        "environment": _environment,
        "training": lambda study: _training(study, tracker),
        "processes": _processes,
        "tables": _tables,
        "memory": _memory,
    }
    for name, measure in parts.items():
        with stage(name, 1):
            report["parts"][name] = measure(study)
        write_summary(run_dir / "bench.json", report)
    tracker.log_artifact(run_dir / "bench.json")
    _print(report["parts"])
    return "resq-rl compare +experiment=demo"


def _print(parts: Mapping[str, Mapping[str, Any]]) -> None:
    table = Table("part", "what", "value", title="Ratios to a float forward pass unless a unit is given")
    for part, figures in parts.items():
        for i, (name, value) in enumerate(figures.items()):
            if isinstance(value, dict):
                spread = f"{value['lowest']:.2f} to {value['highest']:.2f}"
                text = f"{value['ratio']:.2f} ({spread}), {value['milliseconds']:.2f} ms a frame"
            else:
                text = f"{value:,.4g}"
            table.add_row("" if i else part, name, text)
    Console(width=None if sys.stdout.isatty() else 110).print(table)


# The model -------------------------------------------------------------------------------------------------------


def _steps_of(batch: int) -> Callable[[Study], dict[str, Any]]:
    return lambda study: shown(alternate(_jobs(study, batch), study.settings.benchmark.rounds))


def _jobs(study: Study, batch: int) -> dict[str, Callable[[], int]]:
    grid, kappa = study.settings.environment.grid, study.settings.heuristic.kappa
    return step_jobs(study.model, growth.moving(study, batch), grid, kappa)


# Environments and training ---------------------------------------------------------------------------------------


def _environment(study: Study) -> dict[str, Any]:
    """Collecting a rollout with region agents under stable-baselines3, per frame."""
    environment = AgentsVecEnv(_agents(study))
    settings = study.settings.training.ppo()
    model = untrained(environment, settings, seed=0)
    _, callback = model._setup_learn(settings.n_steps * environment.num_envs, ConvertCallback(lambda *_: True))
    forward = _jobs(study, environment.core.clips)[REFERENCE]

    def collect() -> int:
        before = environment.frames
        model.collect_rollouts(environment, callback, model.rollout_buffer, settings.n_steps)
        return environment.frames - before

    jobs = {REFERENCE: forward, "rollout collection": collect}
    return shown(alternate(jobs, max(1, study.settings.benchmark.rounds // 3)))


def _agents(study: Study) -> BatchedEnvironment:
    """Agents on as many clips as the settings say, but no more than the steps measured, and than memory allows."""
    environment, most = study.settings.environment, max(study.settings.benchmark.batches)
    low, high = (0.05, 1.0) if environment.trade_off == "auto" else environment.trade_off_range
    slots = min(environment.clips_per_batch, most, max(1, clips_that_fit(study.model)))
    fixed = replace(environment, trade_off=(low, high), clips_per_batch=slots)
    return replace(study, settings=replace(study.settings, environment=fixed)).agents()


def _training(study: Study, tracker: Tracker) -> dict[str, Any]:
    """Shares of the time of training."""
    core = _agents(study)
    rollouts = TRAINING_ROLLOUTS * study.settings.training.n_steps * core.clips
    problem = core.streams.problem
    frames = rollouts * problem.frames // (problem.frames - len(problem)) + 1
    settings = study.settings.training.ppo(frames=frames)
    spent: dict[str, float] = {}
    methods = {
        "network and quantization": (problem.model, "step"),
        "observation": (core.streams.engine, "observe"),
        "choices of the policy": (OrdinalPolicy, "forward"),
        "update of the policy": (PPO, "train"),
        "logging": (tracker, "log_metrics"),
    }

    def on_rollout(progress: Progress) -> None:
        tracker.log_metrics({f"train/{k}": v for k, v in progress.metrics.items()}, step=progress.frames)

    with ExitStack() as stack:
        for owner, name in methods.values():
            stack.enter_context(timed(owner, name, spent))
        started = time.perf_counter()
        train_ppo(AgentsVecEnv(core), settings, on_rollout=on_rollout)
        whole = time.perf_counter() - started
    shares = {f"{title}, share of the time": spent[name] / whole for title, (_, name) in methods.items()}
    return {**shares, "the rest, share of the time": 1 - sum(shares.values())}


def _processes(study: Study) -> dict[str, Any]:
    """Frames per second of region agents in one batch, and of a process with an environment of its own per clip."""
    count = min(study.settings.benchmark.processes, max(1, clips_that_fit(study.model)))
    try:
        pickle.dumps(study.model)
    except (TypeError, AttributeError, pickle.PicklingError) as error:  # as exported programs do
        log.warning("The rate against processes is not measured: the network cannot be sent to them (%s).", error)
        return {}
    core = _agents(study)
    rate = _rate(AgentsVecEnv(core), core.clips, RATE_STEPS)
    alone: list[Callable[[], Any]] = [_Alone(study.problems["train"], core.scheme) for _ in range(count)]
    separate = SubprocVecEnv(alone, start_method="spawn")
    try:
        single = _rate(separate, count, RATE_STEPS)
    finally:
        separate.close()
    return {
        f"region agents, {core.clips} clips, frames a second": rate,
        f"{count} processes, frames a second": single,
        "region agents, times as many": rate / single,
    }


@dataclass(frozen=True)
class _Alone:
    """Makes an environment of one clip, in its own process."""

    problem: Problem
    scheme: ActionScheme

    def __call__(self) -> RegionThresholds:
        torch.set_num_threads(1)
        return RegionThresholds(self.problem, by_group=True, thresholds=self.scheme.thresholds, kappa=self.scheme.kappa)


def _rate(environment: Any, clips: int, steps: int) -> float:
    """Frames of all clips per second over some steps, under the same random actions again and again."""
    environment.seed(0)
    environment.reset()
    actions = np.stack([environment.action_space.sample() for _ in range(environment.num_envs)])
    environment.step(actions)
    started = time.perf_counter()
    for _ in range(steps):
        environment.step(actions)
    return steps * clips / (time.perf_counter() - started)


def _tables(study: Study) -> dict[str, Any]:
    """Steps per second of frame-level agents on tables."""
    whole = study.problems["train"]
    clips = [_shortened(clip) for clip in whole.clips[:TABLE_CLIPS]]
    problem = Problem.prepare(whole.model, whole.task, clips, grid=whole.grid, source=whole.source)
    engine = TableEngine(problem, [respond(problem, i) for i in range(len(problem))])
    streams = Streams(engine, slots=TABLE_SLOTS, reference="keyframe")
    scheme = ActionScheme("frame_level", "frame", problem.groups, problem.grid, len(study.model.config.levels))
    environment = AgentsVecEnv(BatchedEnvironment(streams, scheme, EpisodeSettings()))
    return {f"{TABLE_SLOTS:,} clips, steps a second": _rate(environment, TABLE_SLOTS, TABLE_STEPS)}


def _shortened(clip: Clip) -> Clip:
    labels = None if clip.labels is None else clip.labels[:TABLE_FRAMES]
    return replace(clip, frames=clip.frames[:TABLE_FRAMES], labels=labels)


def _memory(study: Study) -> dict[str, Any]:
    """Growth of the memory in use over many steps of one clip, after the first tenth."""
    environment, steps = study.settings.environment, study.settings.benchmark.soak_steps
    streams = Streams(NetworkEngine(study.problems["train"]), slots=1, reference=environment.reference)
    core = BatchedEnvironment(streams, study.scheme(), EpisodeSettings())
    core.reset([0])
    actions = np.stack([study.scheme().uniform_action(0)] * core.agents)
    before = 0.0
    for step in range(steps):
        before = mebibytes_in_use() if step == steps // 10 else before
        core.step(actions)
    after = mebibytes_in_use()
    return {"in use, MiB": after, f"growth over {steps:,} steps, MiB": after - before}


def mebibytes_in_use() -> float:
    """Memory that this process holds."""
    return float(psutil.Process().memory_info().rss / 2**20)
