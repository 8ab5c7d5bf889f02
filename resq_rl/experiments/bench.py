"""`resq-rl bench`: how fast the simulation is, as ratios to the float network in the same run.

What is compared runs in turn, round by round, so that a machine that slows down slows all of it; a figure is the
median over the rounds of the ratio to the reference of the same round.
"""

import logging
import os
import pickle
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from stable_baselines3.common.callbacks import ConvertCallback
from stable_baselines3.common.vec_env import SubprocVecEnv

from resq_rl.envs import (
    ActionScheme,
    BatchedEnvironment,
    ClipStore,
    EpisodeSettings,
    RegionThresholds,
    Simulator,
    TableSimulator,
    respond,
)
from resq_rl.envs.sb3 import AgentsVecEnv
from resq_rl.experiments.progress import stage
from resq_rl.experiments.results import write_summary
from resq_rl.experiments.settings import Settings
from resq_rl.experiments.tracking import Tracker
from resq_rl.experiments.training import ppo_settings
from resq_rl.experiments.world import World, build_world
from resq_rl.perception import Recurrent, recurrent_inputs
from resq_rl.policies.ppo import untrained
from resq_rl.quantization import Field, Inputs, LevelField, ResQModel, ThresholdField, as_tuple, to_float
from resq_rl.quantization.kernels import PLAIN
from resq_rl.video import Clip

__all__ = ["Figure", "alternate", "run"]

log = logging.getLogger(__name__)

TAU = 0.5
REFERENCE = "float forward"
# Of the table environment.
TABLE_CLIPS, TABLE_FRAMES, TABLE_SLOTS, TABLE_STEPS = 2, 12, 1024, 100
RATE_STEPS = 20  # of region agents, and of environments in processes of their own


@dataclass(frozen=True)
class Figure:
    """A time as a ratio to the reference: the median over the rounds, the lowest and the highest.

    Attributes:
        milliseconds: median, per frame of a clip.
    """

    ratio: float
    lowest: float
    highest: float
    milliseconds: float


def alternate(
    jobs: Mapping[str, Callable[[], int]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Figure]:
    """Time jobs in turn, after each ran once to warm up.

    Args:
        jobs: by name; each returns the number of frames it ran. Ratios are to the first, per frame.
        rounds: how often.
    """
    spent: dict[str, list[float]] = {name: [] for name in jobs}
    for job in jobs.values():
        job()
    for _ in range(rounds):
        for name, job in jobs.items():
            started = clock()
            frames = job()
            spent[name].append((clock() - started) / frames)
    base = spent[next(iter(jobs))]
    figures = {}
    for name, values in spent.items():
        ratios = [value / reference for value, reference in zip(values, base, strict=True)]
        milliseconds = 1e3 * statistics.median(values)
        figures[name] = Figure(statistics.median(ratios), min(ratios), max(ratios), milliseconds)
    return figures


def run(settings: Settings, run_dir: Path, tracker: Tracker) -> str:
    """Measure; `bench.json` is written anew after each part. Returns the next useful command."""
    world = build_world(settings, ["train"])
    report: dict[str, Any] = {
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "compiled": world.model.kernels is not PLAIN,
        "frame_size": list(world.model.frame_size),
        "layers": len(world.model.sites),
        "macs": world.model.macs,
        "rounds": settings.benchmark.rounds,
        "parts": {},
    }
    parts: dict[str, Callable[[World], dict[str, Any]]] = {
        **{f"steps, batch {b}": _steps_of(b) for b in settings.benchmark.batches},
        "grids": _grids,
        "environment": _environment,
        "training": _training,
        "processes": _processes,
        "tables": _tables,
        "memory": _memory,
    }
    for name, measure in parts.items():
        with stage(name, 1):
            report["parts"][name] = measure(world)
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
                shown = f"{value['ratio']:.2f} ({spread}), {value['milliseconds']:.2f} ms a frame"
            else:
                shown = f"{value:,.4g}"
            table.add_row("" if i else part, name, shown)
    Console(width=None if sys.stdout.isatty() else 110).print(table)


# The model -------------------------------------------------------------------------------------------------------


def _steps_of(batch: int) -> Callable[[World], dict[str, Any]]:
    return lambda world: _shown(alternate(_step_jobs(world, batch), world.settings.benchmark.rounds))


def _shown(figures: Mapping[str, Figure]) -> dict[str, Any]:
    return {name: asdict(figure) for name, figure in figures.items()}


def _step_jobs(world: World, batch: int, grid: tuple[int, int] | None = None) -> dict[str, Callable[[], int]]:
    """A float forward pass, a keyframe and residual steps of `batch` clips in motion."""
    model, grid = world.model, grid or world.settings.environment.grid
    frames = _moving(world, batch)
    every = torch.ones(batch, dtype=torch.bool)
    fields: dict[str, Field] = {
        "thresholds": ThresholdField.constant(TAU, batch, len(model.groups), grid, world.settings.heuristic.kappa),
        "levels": LevelField.constant(len(model.config.levels) - 2, batch, len(model.groups), grid),
    }
    states = {reference: model.new_state(batch, reference) for reference in ("previous", "keyframe")}
    for state in states.values():
        model.step(frames[0], state, every, fields["levels"])

    def step(reference: Any, name: str, refresh: torch.Tensor) -> int:
        frames.reverse()  # so that every step sees motion
        model.step(frames[0], states[reference], refresh, fields[name])
        return batch

    def forward() -> int:
        model.float_forward(frames[0])
        return batch

    jobs: dict[str, Callable[[], int]] = {REFERENCE: forward, "keyframe": lambda: step("previous", "levels", every)}
    for reference in states:
        for name in fields:
            jobs[f"residual, {name}, {reference}"] = lambda r=reference, n=name: step(r, n, ~every)  # type: ignore[misc]
    return jobs


def _moving(world: World, batch: int) -> list[tuple[torch.Tensor, ...]]:
    """What the network takes for two frames that follow each other in each of `batch` clips."""
    store = world.stores["train"]
    longer = [i for i, clip in enumerate(store.clips) if len(clip) > 1]
    chosen = [longer[i % len(longer)] for i in range(batch)]
    starts = [store.starts[i] for i in chosen] if store.starts else []
    found = []
    for t in (0, 1):
        inputs: Inputs = torch.stack([store.clips[i].frames[t] for i in chosen])
        if isinstance(world.task, Recurrent):
            previous = torch.stack([start.prediction for start in starts])
            inputs = recurrent_inputs(world.task, as_tuple(inputs)[0], previous, starts)
        found.append(tuple(map(to_float, as_tuple(inputs))))
    return found


def _grids(world: World) -> dict[str, Any]:
    """A residual step under thresholds for one region and for four times as many as the settings say."""
    rows, columns = world.settings.environment.grid
    batch, found = max(world.settings.benchmark.batches), {}
    for grid in ((1, 1), (rows, columns), (2 * rows, 2 * columns)):
        jobs = _step_jobs(world, batch, grid)
        chosen = {name: jobs[name] for name in (REFERENCE, "residual, thresholds, previous")}
        figures = alternate(chosen, world.settings.benchmark.rounds)
        found[f"residual, {grid[0]}x{grid[1]} regions"] = asdict(figures["residual, thresholds, previous"])
    return found


# Environments and training ---------------------------------------------------------------------------------------


def _environment(world: World) -> dict[str, Any]:
    """Collecting a rollout with region agents under stable-baselines3, per frame."""
    environment = AgentsVecEnv(_agents(world))
    settings = ppo_settings(world.settings)
    model = untrained(environment, settings, seed=0)
    _, callback = model._setup_learn(settings.n_steps * environment.num_envs, ConvertCallback(lambda *_: True))
    forward = _step_jobs(world, environment.core.clips)[REFERENCE]

    def collect() -> int:
        before = environment.frames
        model.collect_rollouts(environment, callback, model.rollout_buffer, settings.n_steps)
        return environment.frames - before

    jobs = {REFERENCE: forward, "rollout collection": collect}
    return _shown(alternate(jobs, max(1, world.settings.benchmark.rounds // 3)))


def _agents(world: World) -> BatchedEnvironment:
    environment = world.settings.environment
    low, high = (0.05, 1.0) if environment.trade_off == "auto" else environment.trade_off_range
    fixed = replace(environment, trade_off=(low, high))
    return replace(world, settings=replace(world.settings, environment=fixed)).agents()


def _training(world: World) -> dict[str, Any]:
    """Shares of the time of training."""
    core = _agents(world)
    settings = ppo_settings(world.settings)
    model = untrained(AgentsVecEnv(core), settings, seed=0)
    spent: dict[str, float] = {}
    simulator, network = core.simulator, core.simulator.model
    with _timed(network, "step", spent), _timed(simulator, "observe", spent), _timed(model, "train", spent):
        started = time.perf_counter()
        model.learn(2 * settings.n_steps * core.agents)
        whole = time.perf_counter() - started
    names = {"step": "network and quantization", "observe": "observation", "train": "update of the policy"}
    shares = {f"{title}, share of the time": spent[name] / whole for name, title in names.items()}
    return {**shares, "the rest, share of the time": 1 - sum(shares.values())}


@contextmanager
def _timed(owner: Any, name: str, spent: dict[str, float]) -> Iterator[None]:
    """Add up the time that a method of one object takes."""
    method = getattr(owner, name)

    def timed(*arguments: Any, **settings: Any) -> Any:
        started = time.perf_counter()
        try:
            return method(*arguments, **settings)
        finally:
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - started

    setattr(owner, name, timed)
    try:
        yield
    finally:
        delattr(owner, name)


def _processes(world: World) -> dict[str, Any]:
    """Frames per second of region agents in one batch, and of a process with an environment of its own per clip."""
    count = world.settings.benchmark.processes
    try:
        pickle.dumps(world.model)
    except (TypeError, AttributeError, pickle.PicklingError) as error:  # as exported programs do
        log.warning("The rate against processes is not measured: the network cannot be sent to them (%s).", error)
        return {}
    core = _agents(world)
    rate = _rate(AgentsVecEnv(core), core.clips, RATE_STEPS)
    alone: list[Callable[[], Any]] = [
        _Alone(world.model, world.task, world.stores["train"], core.scheme) for _ in range(count)
    ]
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

    model: ResQModel
    task: Any
    store: ClipStore
    scheme: ActionScheme

    def __call__(self) -> RegionThresholds:
        torch.set_num_threads(1)
        return RegionThresholds(
            model=self.model,
            task=self.task,
            store=self.store,
            grid=self.scheme.grid,
            by_group=True,
            thresholds=self.scheme.thresholds,
            kappa=self.scheme.kappa,
        )


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


def _tables(world: World) -> dict[str, Any]:
    """Steps per second of frame-level agents on tables."""
    store = world.stores["train"]
    clips = [_shortened(clip) for clip in store.clips[:TABLE_CLIPS]]
    store = ClipStore.prepare(world.model, world.task, clips, source=store.source)
    grid = world.settings.environment.grid
    tables = [respond(world.model, world.task, store, i, grid=grid) for i in range(len(store))]
    simulator = TableSimulator(world.model, world.task, store, tables, slots=TABLE_SLOTS)
    scheme = ActionScheme("frame_level", "frame", simulator.groups, grid, len(world.model.config.levels))
    environment = AgentsVecEnv(BatchedEnvironment(simulator, scheme, EpisodeSettings()))
    return {f"{TABLE_SLOTS:,} clips, steps a second": _rate(environment, TABLE_SLOTS, TABLE_STEPS)}


def _shortened(clip: Clip) -> Clip:
    labels = None if clip.labels is None else clip.labels[:TABLE_FRAMES]
    return replace(clip, frames=clip.frames[:TABLE_FRAMES], labels=labels)


def _memory(world: World) -> dict[str, Any]:
    """Growth of the memory in use over many steps of one clip, after the first tenth."""
    environment, steps = world.settings.environment, world.settings.benchmark.soak_steps
    parts = world.model, world.task, world.stores["train"]
    simulator = Simulator(*parts, slots=1, grid=environment.grid, reference=environment.reference)
    core = BatchedEnvironment(simulator, world.scheme(), EpisodeSettings())
    core.reset([0])
    actions = np.stack([world.scheme().uniform_action(0)] * core.agents)
    before = 0.0
    for step in range(steps):
        before = _mebibytes() if step == steps // 10 else before
        core.step(actions)
    after = _mebibytes()
    return {"in use, MiB": after, f"growth over {steps:,} steps, MiB": after - before}


def _mebibytes() -> float:
    """Memory that this process holds; where the system does not tell, the most it has held."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
