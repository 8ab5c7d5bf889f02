"""`resq-rl train`: train a policy for each seed, and measure it on the validation clips."""

import os
from functools import partial
from pathlib import Path
from typing import Any

from resq_rl.experiments.config.settings import Settings
from resq_rl.experiments.results.comparison import print_policies, write_summary
from resq_rl.experiments.results.fronts import bops_step
from resq_rl.experiments.results.methods import LEARNED, scene_changes
from resq_rl.experiments.runs.record import RunRecord
from resq_rl.experiments.study.measurements import MEASUREMENTS
from resq_rl.experiments.study.start import begin, prepare_training
from resq_rl.experiments.study.study import build_study
from resq_rl.experiments.study.training import front_candidates, save_chosen, train_policy
from resq_rl.experiments.tracking.tracker import Tracker
from resq_rl.policies.tuning import best_of, best_policies

__all__ = ["run"]


def run(settings: Settings, run_dir: Path, tracker: Tracker) -> str:
    """Train; `summary.json` holds the validation front of each seed. Returns the next useful command."""
    prepared, shared = prepare_training(build_study(settings, ["train", "validation"], run_dir / MEASUREMENTS))
    resume, method = settings.training.resume is not None, LEARNED[settings.training.trainer]
    summary: list[dict[str, Any]] = []
    curves: dict[str, list[dict[str, float]]] = {}
    for seed in settings.training.seeds:
        folder = run_dir / f"seed{seed}"
        with tracker.child(f"{method} seed {seed}", {"seed": seed, "method": method}) as child:
            study, start = begin(prepared, shared, seed)
            policy, report = train_policy(study, seed, folder, child, start=start, resume=resume)
            evaluate = partial(study.measure, split="validation")
            front = best_policies(front_candidates(study, policy), evaluate)
            others = [other for p, _ in front for other in scene_changes(settings.heuristic, p)]
            front = best_of([*front, *best_policies(others, evaluate)])
            save_chosen(folder, policy, [chosen for chosen, _ in front], child)
            for _, m in front:
                for run in (child, tracker):
                    run.log_metrics({"validation/accuracy": m.accuracy, "validation/bops": m.bops}, bops_step(m))
            points = [{"accuracy": m.accuracy, "bops": m.bops, "settings": p.settings} for p, m in front]
        frames = report.frames + (start.frames if start and settings.training.trainer == "ppo" else 0)
        summary.append({"seed": seed, "policy": str(folder), "frames": frames, "validation_front": points})
        curves[str(seed)] = report.curve
        write_summary(run_dir / "summary.json", {"policies": summary, "curves": curves})
    tracker.log_artifact(run_dir / "summary.json")
    first = run_dir / f"seed{settings.training.seeds[0]}"
    rows = [{**p["settings"], **p, "seed": s["seed"]} for s in summary for p in s["validation_front"]]
    print_policies("validation clips", rows)
    return f"{RunRecord(run_dir).command_line('evaluate')} policy={os.path.relpath(first)}"
