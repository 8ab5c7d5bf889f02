"""`resq-rl compare`, the main job: tune, train, measure and compare every method on the same clips.

Everything is calibrated and trained on training clips, tuned on validation clips, and measured once on the reported
clips.
"""

import logging
import os
import sys
import time
from pathlib import Path

from rich.console import Console

from resq_rl.experiments.config.settings import Settings
from resq_rl.experiments.report import verdict_of, write_report
from resq_rl.experiments.results.comparison import Comparison, print_comparison
from resq_rl.experiments.results.methods import learned_method, method_of
from resq_rl.experiments.results.plots import plot_curves, plot_fronts
from resq_rl.experiments.runs.progress import stage
from resq_rl.experiments.study.decisions import TracedPair, comparable_pair, decisions_figure, trace_pair
from resq_rl.experiments.study.deployment import policy_words
from resq_rl.experiments.study.frame_level import is_frame_level, tabulated
from resq_rl.experiments.study.measurements import MEASUREMENTS
from resq_rl.experiments.study.measuring import (
    Learned,
    measure_heuristics,
    measure_learned,
    measure_oracle,
    measure_per_frame,
    measure_searches,
)
from resq_rl.experiments.study.scoreboard import Scoreboard
from resq_rl.experiments.study.start import prepare_training
from resq_rl.experiments.study.study import build_study
from resq_rl.experiments.study.training import load_policies
from resq_rl.experiments.tracking.tracker import Tracker

__all__ = ["run"]

log = logging.getLogger(__name__)


def run(settings: Settings, run_dir: Path, tracker: Tracker) -> str:
    """Run the comparison; writes `comparison.json`, `report.html`, plots, and a trained policy for each seed.

    Returns:
        What is useful next.
    """
    started = time.monotonic()
    given = load_policies(Path(settings.policy)) if settings.policy else {}
    study = build_study(settings, ["train", "validation", settings.split], run_dir / MEASUREMENTS)
    study, start = prepare_training(study)
    frame_level = is_frame_level(study)
    study = tabulated(study) if frame_level else study
    log.info("float network: %.4f on the %s clips", study.problem.float_accuracy, settings.split)

    board = Scoreboard(study, run_dir, tracker, started)
    measure_per_frame(board)
    measure_heuristics(board)
    learned = measure_learned(board, start, given)
    if frame_level:
        measure_oracle(board, learned)
    else:
        measure_searches(board, start)
    board.compare(learned.method, learned.measurements)

    _show(board, learned)
    trained = policy_words(Path(settings.policy or run_dir))
    return f"open the report; run a policy on a video: resq-rl run {trained} source=VIDEO"


def _show(board: Scoreboard, learned: Learned) -> None:
    """Write, print and record what was measured."""
    study, run_dir, tracker = board.study, board.run_dir, board.tracker
    comparison = board.write()
    _record(comparison, run_dir, tracker)
    if learned.curves:
        tracker.log_figure(plot_curves(learned.curves), "training")
    console = Console(width=None if sys.stdout.isatty() else 110)
    print_comparison(comparison, console, levels=study.settings.quantization.levels)
    pair = _traced_pair(board)
    if pair is not None:
        tracker.log_figure(decisions_figure(study, pair), "decisions")
    with stage("report", 1):
        report = write_report(run_dir, study, comparison, curves=learned.curves, pair=pair)
    tracker.log_artifact(report)
    log.info("Plots: %s", ", ".join(str(p.name) for p in sorted(run_dir.glob("*.png"))))
    log.info("Report: %s", os.path.relpath(report))


def _record(comparison: Comparison, run_dir: Path, tracker: Tracker) -> None:
    tracker.log_artifact(run_dir / "comparison.json")
    tracker.describe(verdict_of(comparison).sentence)
    tracker.log_figure(plot_fronts(comparison), "fronts")
    for name, effort in comparison.efforts.items():
        tracker.log_metrics({f"{name}/frames": float(effort.frames), f"{name}/seconds": effort.seconds})
    for name, entry in comparison.bd_bops.items():
        if entry.value is not None:
            tracker.log_metrics({f"bd_bops/{name}": entry.value})


def _traced_pair(board: Scoreboard) -> TracedPair | None:
    """The first tuned heuristic among the anchors, and a learned policy of about equal accuracy, traced."""
    own = learned_method(board.tuned)
    anchor = next((key for key in method_of(own).against if board.tuned.get(key)), "")
    float_accuracy = board.study.problem.float_accuracy
    pair = comparable_pair(board.tuned.get(anchor, []), board.tuned[own], float_accuracy)
    if pair is None:
        log.info("No decisions.png: it needs a tuned heuristic and a learned policy with an accuracy.")
        return None
    with stage("tracing two policies", 1):
        return trace_pair(board.study, (anchor, own), *pair)
