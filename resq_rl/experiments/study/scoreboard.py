"""The measurements of a comparison so far, and the files they go to."""

import copy
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

from resq_rl.envs import Measurement, Policy
from resq_rl.experiments.results.comparison import Comparison
from resq_rl.experiments.results.entries import BdEntry, Effort, Gain
from resq_rl.experiments.results.fronts import (
    at_budget,
    bops_step,
    compare_fronts,
    gain_at_budget,
    points_of,
)
from resq_rl.experiments.results.methods import METHODS, method_of
from resq_rl.experiments.runs.progress import stage
from resq_rl.experiments.study.study import Study
from resq_rl.experiments.tracking.tracker import Tracker
from resq_rl.policies.tuning import Measured, best_of, best_policies, thinned

__all__ = ["FRONT_POINTS", "Scoreboard"]

log = logging.getLogger(__name__)

FRONT_POINTS = 20  # measured on the reported clips of each tuned front

P = TypeVar("P", bound=Policy)


@dataclass
class Scoreboard:
    """Tunes policies on validation clips, measures them on the reported ones, and keeps what was measured.

    `comparison.json` is written anew after each method, so that nothing is lost.

    Attributes:
        measured: by method, on the reported clips.
        tuned: the policies among them that were tuned.
        best: by method, for each training seed the measurement of the policy that validated as the most accurate.
    """

    study: Study
    run_dir: Path
    tracker: Tracker
    started: float = field(default_factory=time.monotonic)
    measured: dict[str, list[Measurement]] = field(default_factory=dict)
    tuned: dict[str, list[Measured]] = field(default_factory=dict)
    deltas: dict[str, BdEntry] = field(default_factory=dict)
    best: dict[str, list[Measurement]] = field(default_factory=dict)
    gains: dict[str, Gain] = field(default_factory=dict)
    efforts: dict[str, Effort] = field(default_factory=dict)
    training_frames: int = 0

    def tune(self, name: str, policies: Sequence[P]) -> list[tuple[P, Measurement]]:
        """The envelope of the policies on the validation clips, at most FRONT_POINTS of it.

        Args:
            name: what is tuned, for progress.
            policies: what is tried. Each is measured as a copy, so that one that draws at random draws the same on the
                reported clips, whatever was tried before.
        """
        if not policies:
            return []
        frames = len(policies) * self.study.problems["validation"].frames
        with stage(f"tuning {name.replace('_', ' ')}", frames) as advance:
            front = best_policies(policies, lambda p: self.study.measure(copy.deepcopy(p), "validation", advance))
        return thinned(front, FRONT_POINTS)

    def refine(
        self, name: str, front: Sequence[tuple[P, Measurement]], others: Sequence[P]
    ) -> list[tuple[P, Measurement]]:
        """The envelope of a tuned front and of what is tried after it, such as its policies with another setting."""
        return thinned(best_of([*front, *self.tune(name, others)]), FRONT_POINTS)

    def measure(self, method: str, policies: Sequence[Policy]) -> list[Measurement]:
        """Measure policies on the reported clips."""
        split = self.study.settings.split
        with stage(f"{method.replace('_', ' ')} on {split}", len(policies) * self.study.problem.frames) as advance:
            return [self.study.measure(policy, split, advance) for policy in policies]

    def add(self, method: str, measurements: Sequence[Measurement], policies: Sequence[Policy] = ()) -> None:
        """Take in a method's measurements on the reported clips.

        Args:
            method: key of the method.
            measurements: one for each policy.
            policies: the policies if they were tuned, as `tune` returned them: the last one validated as the most
                accurate.
        """
        self.measured[method] = [*self.measured.get(method, []), *measurements]
        if policies:
            self.best.setdefault(method, []).append(measurements[-1])
        self.tuned.setdefault(method, []).extend(zip(policies, measurements, strict=False))
        self.write()
        for point in measurements:
            self.tracker.log_metrics(
                {f"{method}/accuracy": point.accuracy, f"{method}/bops": point.bops}, bops_step(point)
            )

    def compare(self, method: str, by_seed: Mapping[int, Sequence[Measurement]]) -> None:
        """Compare a method with those of its anchors that were measured; under a budget also at equal budget."""
        seed = self.study.settings.seed
        for anchor in (key for key in method_of(method).against if key in self.measured):
            if self.study.settings.environment.budget is not None and {method, anchor} <= set(self.best):
                gain = gain_at_budget(self.best[method], self.best[anchor], seed=seed)
                self.gains[f"{method}_vs_{anchor}"] = gain
            self.deltas[f"{method}_vs_{anchor}"] = compare_fronts(
                by_seed,
                self.measured[anchor],
                float_accuracy=self.study.problem.float_accuracy,
                seed=seed,
            )

    def comparison(self) -> Comparison:
        """The comparison of all that was measured so far."""
        settings, problem = self.study.settings, self.study.problem
        metric, budget, seed = problem.task.metric, settings.environment.budget, settings.seed
        return Comparison(
            task=type(problem.task).__name__.lower(),
            video=self.study.video,
            split=settings.split,
            clips=len(problem),
            frames=problem.frames,
            accuracy_metric=f"agreement with float ({metric})" if problem.source == "teacher" else metric,
            float_accuracy=problem.float_accuracy,
            bops_convention=settings.quantization.cost_words,
            reference_bops_per_frame=float(problem.reference_bops),
            env_frames_used_for_training=self.training_frames,
            wall_seconds=time.monotonic() - self.started,
            fronts={m.key: points_of(self.measured.get(m.key, []), seed=seed) for m in METHODS},
            bd_bops=dict(self.deltas),
            efforts=dict(self.efforts),
            budget=None if budget is None else asdict(budget),
            at_budget={} if budget is None else {m: at_budget(b, budget.mean, seed=seed) for m, b in self.best.items()},
            gains=dict(self.gains),
        )

    def write(self) -> Comparison:
        """Write `comparison.json`."""
        comparison = self.comparison()
        comparison.write(self.run_dir / "comparison.json")
        return comparison
