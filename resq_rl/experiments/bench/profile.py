"""`resq-rl profile`: what operators and frames take on the clock of this machine, and the cost table that follows.

Methods are measured on the clips of one split, and of each the cheapest point at 0.5, 1 and 2 points of accuracy lost
is timed on the first of these clips, frame by frame in turn with the float network. The cost table is written as a file
that `cost=FILE` takes.
"""

import logging
import platform
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table
from torch import Tensor

from resq_rl.envs import Decision, FrameView, Measurement, Policy, Problem
from resq_rl.errors import VideoError
from resq_rl.experiments.bench.growth import moving
from resq_rl.experiments.bench.operators import NOTHING, cost_table, operator_times, whole_layers
from resq_rl.experiments.bench.timing import seconds
from resq_rl.experiments.config.settings import Settings
from resq_rl.experiments.results.comparison import write_summary
from resq_rl.experiments.results.methods import LEARNED, method_of
from resq_rl.experiments.runs.progress import stage
from resq_rl.experiments.study.deployment import policy_folder, trainer_of
from resq_rl.experiments.study.study import Study, build_study, learning_interval
from resq_rl.experiments.study.training import front_candidates
from resq_rl.experiments.tracking.tracker import Tracker
from resq_rl.files import write_atomic
from resq_rl.perception import example_inputs
from resq_rl.policies import DynamicResQ, GroupThresholds, LearnedPolicy, Runner, StaticResQ
from resq_rl.quantization import CostTable

__all__ = ["run"]

log = logging.getLogger(__name__)

LOST = (0.005, 0.01, 0.02)  # of accuracy, at which methods are timed


def run(settings: Settings, run_dir: Path, tracker: Tracker) -> str:
    """Write `profile.json` and the cost table `cost.yaml`. Returns the next useful command."""
    study = build_study(settings, ["train", settings.split])
    clip = study.problem.clips[0]
    if len(clip) < 2:
        raise VideoError(f"Clip {clip.name!r} has one frame, and residual frames are to be timed: give a longer one.")
    benchmark, machine = settings.benchmark, platform.processor() or platform.machine()
    with stage("operators", 1):
        operators = operator_times(study.model, moving(study, 1), benchmark.rounds)
    chosen = _chosen(study)
    with stage("frames", 1):
        frames = _Frames(study, benchmark.frames)
        still, _, _ = frames.run(_skip_all(study))
        table = cost_table(operators, 1e3 * statistics.median(still), f"{machine}, {torch.get_num_threads()} threads")
        rows = [_row(frames, point, table) for point in chosen]
    report = {
        "machine": {"processor": machine, "threads": torch.get_num_threads(), "torch": torch.__version__},
        "split": settings.split,
        "clip": clip.name,
        "frame_size": list(study.model.frame_size),
        "float_accuracy": study.problem.float_accuracy,
        "float_ms": 1e3 * frames.reference,
        "compiled_float_ms": _compiled(study) if benchmark.compiled else None,
        "operators": [asdict(one) for one in operators],
        "methods": rows,
    }
    write_summary(run_dir / "profile.json", report)
    write_atomic(run_dir / "cost.yaml", yaml.safe_dump(_plain(asdict(table)), sort_keys=False))
    for name in ("profile.json", "cost.yaml"):
        tracker.log_artifact(run_dir / name)
    _print(report)
    return f"train for this machine: resq-rl compare cost={run_dir / 'cost.yaml'}"


@dataclass(frozen=True)
class _Point:
    """A policy that is worth timing: the cheapest of its method at some loss of accuracy."""

    method: str
    policy: Policy
    measured: Measurement


def _chosen(study: Study) -> list[_Point]:
    """For each method, the cheapest policies that lose no more than each of LOST."""
    settings, split = study.settings, study.settings.split
    reference, interval = settings.environment.reference, learning_interval(settings.environment)
    candidates: dict[str, Sequence[Policy]] = {
        "static_resq": [StaticResQ(reference, interval, level=i) for i in range(len(settings.quantization.levels))],
        "dynamic_resq": [
            DynamicResQ(reference, interval, tau=tau, kappa=settings.heuristic.kappa) for tau in settings.heuristic.taus
        ],
    }
    if settings.policy is not None:
        policy = LearnedPolicy.load(policy_folder(settings.policy))
        candidates[LEARNED[trainer_of(settings.policy)]] = front_candidates(study, policy)
    chosen = []
    frames = sum(map(len, candidates.values())) * study.problem.frames
    with stage(f"methods on {split}", frames) as advance:
        for method, policies in candidates.items():
            points = [_Point(method, policy, study.measure(policy, split, advance)) for policy in policies]
            chosen += _cheapest(points, study.problem.float_accuracy)
    return chosen


def _cheapest(points: Sequence[_Point], float_accuracy: float) -> list[_Point]:
    """The point of fewest BOPs within each loss, each once; the most accurate one where none is within any."""
    found: list[_Point] = []
    for lost in LOST:
        near = [point for point in points if point.measured.accuracy >= float_accuracy - lost]
        best = min(near, key=lambda point: point.measured.bops, default=None)
        if best is not None and best not in found:
            found.append(best)
    return found or [max(points, key=lambda point: point.measured.accuracy)]


def _skip_all(study: Study) -> GroupThresholds:
    """Thresholds above which nothing lies."""
    taus = (NOTHING,) * len(study.model.groups)
    return GroupThresholds(study.settings.environment.reference, 0, taus=taus, kappa=study.settings.heuristic.kappa)


class _Frames:
    """Times whole frames of the first clip at batch 1, each right after the float network's."""

    def __init__(self, study: Study, frames: int) -> None:
        self.problem = study.problem.subset([0])
        self.clip = self.problem.clips[0]
        self._timed = self.clip.frames[1 : frames + 1]
        self._inputs = example_inputs(self.problem.task, self.clip)
        self._float: list[float] = []

    @property
    def reference(self) -> float:
        """Median seconds of the float network."""
        return statistics.median(self._float)

    def float_network(self) -> Tensor:
        """The float network's prediction."""
        model, task = self.problem.model, self.problem.task
        return task.predict(task.output(model.float_forward(self._inputs), model.frame_size))

    def bops(self, policy: Policy, problem: Problem) -> list[float]:
        """BOPs of each frame but the first, which is not timed, as shares of W8A8 under the problem's cost."""
        runner = self._begun(policy, problem)
        return [runner(frame)[1].bops for frame in self._timed]

    def _begun(self, policy: Policy, problem: Problem) -> Runner:
        """A runner after the first frame."""
        runner = Runner(policy, problem)
        labels = self.clip.labels
        runner.reset(None if self.problem.recurrent is None or labels is None else labels[0])
        runner(self.clip.frames[0])
        return runner

    def run(self, policy: Policy) -> tuple[list[float], list[float], list[float]]:
        """Seconds of each frame but the first, of the float network beside it, and the BOPs of each frame."""
        runner = self._begun(policy, self.problem)
        spent, beside, bops = [], [], []
        for frame in self._timed:
            beside.append(seconds(self.float_network))
            started = time.perf_counter()
            _, cost = runner(frame)
            spent.append(time.perf_counter() - started)
            bops.append(cost.bops)
        self._float += beside
        return spent, beside, bops


class _Recorded:
    """A policy whose decisions are kept, with the seconds that each took, or one that repeats them."""

    def __init__(self, policy: Policy, decisions: Iterable[Decision] | None = None) -> None:
        self.decisions: list[Decision] = []
        self.seconds: list[float] = []
        self._policy, self._given = policy, None if decisions is None else iter(decisions)

    def decide(self, view: FrameView) -> Decision:
        """The policy's decision, or the next of those given."""
        started = time.perf_counter()
        self.decisions.append(self._policy.decide(view) if self._given is None else next(self._given))
        self.seconds.append(time.perf_counter() - started)
        return self.decisions[-1]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)


def _row(frames: _Frames, point: _Point, table: CostTable) -> dict[str, Any]:
    """What one policy takes: on the clock, run whole, and as the cost table says."""
    problem, recorded = frames.problem, _Recorded(point.policy)
    frames.run(point.policy)  # so that the shapes of its tiles are known
    spent, beside, bops = frames.run(recorded)
    with whole_layers(problem.model):
        whole, _, _ = frames.run(_Recorded(point.policy, recorded.decisions))
    deciding = 1e3 * statistics.median(recorded.seconds)
    predicted = deciding + _predicted(frames, point.policy, recorded.decisions, table)
    milliseconds = 1e3 * statistics.mean(spent)
    return {
        "method": point.method,
        "settings": dict(point.measured.settings),
        "accuracy": point.measured.accuracy,
        "bops": point.measured.bops,
        "clip_bops": statistics.mean(bops),
        "ms": milliseconds,
        "worst_ms": 1e3 * max(spent),
        "of_float": statistics.median(a / b for a, b in zip(spent, beside, strict=True)),
        "deciding_ms": deciding,
        "of_whole_layers": statistics.mean(spent) / statistics.mean(whole),
        "predicted_ms": predicted,
        "predicted_over_measured": predicted / milliseconds,
    }


def _predicted(frames: _Frames, policy: Policy, decisions: Sequence[Decision], table: CostTable) -> float:
    """Mean milliseconds of the same frames by the cost table."""
    problem = replace(frames.problem, model=frames.problem.model.priced(table))
    shares = frames.bops(_Recorded(policy, decisions), problem)
    return statistics.mean(shares) * problem.model.reference_bops() / 1e6


def _compiled(study: Study) -> float | None:
    """Milliseconds of the float network under torch.compile; None where it cannot be compiled here."""
    network, inputs = study.network, example_inputs(study.task, study.problem.clips[0])
    given = inputs if isinstance(inputs, tuple) else (inputs,)
    with stage("torch.compile", 1):
        try:
            compiled = torch.compile(network.eval())
            with torch.no_grad():
                compiled(*given)
                spent = [seconds(lambda: compiled(*given)) for _ in range(study.settings.benchmark.rounds)]
        except Exception as error:  # whatever a compiler of the user's machine raises
            log.warning("The float network is not timed under torch.compile: %s.", str(error).strip().split("\n")[0])
            return None
    return 1e3 * statistics.median(spent)


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """A table's fields as YAML holds them."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _print(report: Mapping[str, Any]) -> None:
    float_ms, compiled = report["float_ms"], report["compiled_float_ms"]
    title = f"Milliseconds a frame at batch 1; float network {float_ms:.1f}"
    table = Table("method", "accuracy", "BOPs", "ms", "worst", "of float", "of whole layers", "predicted", title=title)
    for row in report["methods"]:
        table.add_row(
            method_of(row["method"]).title,
            f"{row['accuracy']:.3f}",
            f"{row['bops']:.3f}",
            f"{row['ms']:.1f}",
            f"{row['worst_ms']:.1f}",
            f"{row['of_float']:.2f}",
            f"{row['of_whole_layers']:.2f}",
            f"{row['predicted_ms']:.1f}",
        )
    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print(table)
    if compiled is not None:
        console.print(f"Float network under torch.compile: {compiled:.1f} ms.")
