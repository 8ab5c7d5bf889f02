"""`resq-rl evaluate`: measure a trained policy, at its trade-offs, on the clips of one split."""

import logging
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from resq_rl.errors import SettingsError
from resq_rl.experiments.fronts import points_of
from resq_rl.experiments.progress import stage
from resq_rl.experiments.results import write_summary
from resq_rl.experiments.settings import Settings
from resq_rl.experiments.tracking import Tracker
from resq_rl.experiments.training import front_candidates
from resq_rl.experiments.world import build_world
from resq_rl.policies import LearnedPolicy

__all__ = ["run"]

log = logging.getLogger(__name__)


def run(settings: Settings, run_dir: Path, tracker: Tracker) -> None:
    """Measure; `summary.json` holds a point for each trade-off and each interval or learned timing of keyframes."""
    if settings.policy is None:
        raise SettingsError("Which policy? Set policy=FOLDER, a folder that `resq-rl train` or `compare` wrote.")
    policy = LearnedPolicy.load(Path(settings.policy))
    world = build_world(settings, [settings.split])
    policies = front_candidates(world, policy)
    store = world.stores[settings.split]
    with stage(f"policy on {settings.split}", len(policies) * store.frames) as advance:
        measurements = [world.measure(p, settings.split, advance) for p in policies]
    points = points_of(measurements, seed=settings.seed)
    write_summary(
        run_dir / "summary.json",
        {
            "policy": settings.policy,
            "split": settings.split,
            "clips": len(store),
            "float_accuracy": store.float_accuracy,
            "points": [asdict(point) for point in points],
        },
    )
    tracker.log_artifact(run_dir / "summary.json")
    table = Table("lambda", "interval", "BOPs, share of W8A8", "accuracy", "peak", title=f"{settings.policy}")
    for step, point in enumerate(points):
        tracker.log_metrics({"accuracy": point.accuracy, "bops": point.bops}, step)
        shown = (point.bops, point.accuracy, point.peak_bops)
        lead = (f"{point.settings['trade_off']:.3g}", str(point.settings.get("interval", "learned")))
        table.add_row(*lead, *(f"{value:.4f}" for value in shown))
    Console().print(table)
