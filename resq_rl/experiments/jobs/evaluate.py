"""`resq-rl evaluate`: measure a trained policy, at its trade-offs, on the clips of one split."""

import logging
from dataclasses import asdict
from pathlib import Path

from resq_rl.experiments.config.settings import Settings
from resq_rl.experiments.results.comparison import print_policies, write_summary
from resq_rl.experiments.results.fronts import points_of
from resq_rl.experiments.runs.progress import stage
from resq_rl.experiments.runs.record import RunRecord
from resq_rl.experiments.study.deployment import policy_folder
from resq_rl.experiments.study.study import build_study
from resq_rl.experiments.study.training import front_candidates
from resq_rl.experiments.tracking.tracker import Tracker
from resq_rl.policies import LearnedPolicy

__all__ = ["run"]

log = logging.getLogger(__name__)


def run(settings: Settings, run_dir: Path, tracker: Tracker) -> str:
    """Measure; `summary.json` holds a point for each trade-off and each interval or learned timing of keyframes.

    Returns:
        What is useful next.
    """
    folder = policy_folder(settings.policy)
    policy = LearnedPolicy.load(folder)
    study = build_study(settings, [settings.split])
    policies = front_candidates(study, policy)
    problem = study.problems[settings.split]
    with stage(f"policy on {settings.split}", len(policies) * problem.frames) as advance:
        measurements = [study.measure(p, settings.split, advance) for p in policies]
    points = points_of(measurements, seed=settings.seed)
    write_summary(
        run_dir / "summary.json",
        {
            "policy": str(folder),
            "split": settings.split,
            "clips": len(problem),
            "float_accuracy": problem.float_accuracy,
            "points": [asdict(point) for point in points],
        },
    )
    tracker.log_artifact(run_dir / "summary.json")
    for step, point in enumerate(points):
        tracker.log_metrics({"accuracy": point.accuracy, "bops": point.bops}, step)
    print_policies(f"{folder}, {settings.split} clips", [{**p.settings, **asdict(p)} for p in points])
    return f"for the same against tuned heuristics: {RunRecord(run_dir).command_line('compare')}"
