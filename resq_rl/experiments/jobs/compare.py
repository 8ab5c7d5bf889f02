"""`resq-rl compare`: the main job. Tune the heuristics, train PPO, measure all on the test clips, compare their fronts.

All tuning and every choice is made on the validation clips; the test clips are measured once, with what was chosen.
"""

import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from resq_rl.envs import Measurement, Policy
from resq_rl.experiments.config.settings import Settings
from resq_rl.experiments.report import verdict_of, write_report
from resq_rl.experiments.results.comparison import BdEntry, Comparison, Point, print_comparison
from resq_rl.experiments.results.fronts import bops_step, compare_fronts, points_of
from resq_rl.experiments.results.plots import plot_curves, plot_fronts
from resq_rl.experiments.runs.progress import stage
from resq_rl.experiments.study.decisions import Pair, comparable_pair, decisions_figure, trace_pair
from resq_rl.experiments.study.deployment import policy_words
from resq_rl.experiments.study.frame_level import frame_heuristics, gap_closed, is_frame_level, oracle_front, tabulated
from resq_rl.experiments.study.measurements import MEASUREMENTS
from resq_rl.experiments.study.start import Start, measure_constants, prepare_training, search
from resq_rl.experiments.study.study import Study, build_study
from resq_rl.experiments.study.training import front_candidates, load_policies, train_policy
from resq_rl.experiments.tracking.tracker import Tracker
from resq_rl.policies import Clairvoyant, GroupThresholds, LearnedPolicy, PerFrame, RandomLevels
from resq_rl.policies.search import Strategy, Tried, best_for
from resq_rl.policies.tuning import (
    Measured,
    best_of,
    best_policies,
    dynamic_resq_settings,
    skip_gate_settings,
    static_resq_settings,
    thinned,
)
from resq_rl.video import Split

__all__ = ["run"]

log = logging.getLogger(__name__)

METHODS = (
    "per_frame",
    "static_resq",
    "skip_gate",
    "random",
    "dynamic_resq",
    "frame_magnitude",
    "searched_thresholds",
    "random_search",
    "ppo",
    "oracle",
)
SEARCHES: dict[Strategy, str] = {"greedy": "searched_thresholds", "random": "random_search"}
# With which PPO is compared.
ANCHORS = ("dynamic_resq", "searched_thresholds", "random_search", "frame_magnitude", "static_resq")
HALF_BITS = 4
# Of each tuned front that is measured on the reported clips.
FRONT_POINTS = 12


@dataclass
class _Bench:
    """Measurements so far; `comparison.json` is written anew after each method, so that nothing is lost."""

    study: Study
    run_dir: Path
    tracker: Tracker
    started: float = field(default_factory=time.monotonic)
    measured: dict[str, list[Measurement]] = field(default_factory=dict)
    tuned: dict[str, list[Measured]] = field(default_factory=dict)
    deltas: dict[str, BdEntry] = field(default_factory=dict)
    training_frames: int = 0

    def add(self, method: str, measurements: Sequence[Measurement], policies: Sequence[Policy] = ()) -> None:
        """Take in a method's measurements on the reported clips, and the policies that were measured if tuned."""
        self.measured[method] = [*self.measured.get(method, []), *measurements]
        self.tuned.setdefault(method, []).extend(zip(policies, measurements, strict=False))
        self.write()
        for point in measurements:
            self.tracker.log_metrics(
                {f"{method}/accuracy": point.accuracy, f"{method}/bops": point.bops}, bops_step(point)
            )

    def measure(self, method: str, policies: Sequence[Policy]) -> list[Measurement]:
        """Measure policies on the reported clips, with progress."""
        split = self.study.settings.split
        frames = len(policies) * self.study.problems[split].frames
        with stage(f"{method.replace('_', ' ')} on {split}", frames) as advance:
            return [self.study.measure(policy, split, advance) for policy in policies]

    def comparison(self) -> Comparison:
        """What is known so far."""
        settings = self.study.settings
        problem, seed = self.study.problems[settings.split], settings.seed
        fronts: dict[str, Sequence[Point]] = {
            method: points_of(self.measured.get(method, []), seed=seed) for method in METHODS
        }
        agreement, metric = problem.source == "teacher", self.study.task.metric
        return Comparison(
            task=type(self.study.task).__name__.lower(),
            video=self.study.video,
            split=settings.split,
            clips=len(problem),
            frames=problem.frames,
            accuracy_metric=f"agreement with float ({metric})" if agreement else metric,
            float_accuracy=problem.float_accuracy,
            bops_convention=settings.quantization.bops_convention,
            reference_bops_per_frame=float(self.study.model.reference_bops()),
            env_frames_used_for_training=self.training_frames,
            wall_seconds=time.monotonic() - self.started,
            fronts=fronts,
            bd_bops=dict(self.deltas),
        )

    def write(self) -> Comparison:
        """Write `comparison.json`."""
        comparison = self.comparison()
        comparison.write(self.run_dir / "comparison.json")
        return comparison


def run(settings: Settings, run_dir: Path, tracker: Tracker) -> str:
    """Run the comparison; writes `comparison.json`, `report.html`, plots, and a trained policy for each seed.

    Returns:
        What is useful next.
    """
    started = time.monotonic()
    given = load_policies(Path(settings.policy)) if settings.policy else {}
    splits: list[Split] = ["train", "validation", settings.split]
    study, start = prepare_training(build_study(settings, splits, run_dir / MEASUREMENTS))
    frame_level = is_frame_level(study)
    study = tabulated(study) if frame_level else study
    bench = _Bench(study, run_dir, tracker, started)
    log.info("float network: %.4f on the %s clips", study.problems[settings.split].float_accuracy, settings.split)
    _measure_fixed(bench)
    if frame_level:
        _measure_tuned(bench, frame_heuristics(study))
    else:
        _measure_random(bench)
        _measure_heuristics(bench)
    by_seed, curves = _measure_ppo(bench, start, given)
    if settings.heuristic.searches and not frame_level:
        _measure_searches(bench, start)
    float_accuracy = study.problems[settings.split].float_accuracy
    if frame_level:
        bench.add("oracle", oracle_front(study, settings.split))
        policies = given or load_policies(run_dir)
        bench.deltas["gap_to_oracle_closed_by_ppo"] = gap_closed(study, policies, settings.split)
    for anchor in (a for a in ANCHORS if a in bench.measured):
        bench.deltas[f"ppo_vs_{anchor}"] = compare_fronts(
            by_seed, bench.measured[anchor], float_accuracy=float_accuracy, seed=settings.seed
        )
    comparison = bench.write()
    tracker.log_artifact(run_dir / "comparison.json")
    tracker.describe(verdict_of(comparison).sentence)
    tracker.log_figure(plot_fronts(comparison), "fronts")
    if curves:
        tracker.log_figure(plot_curves(curves), "training")
    for name, entry in bench.deltas.items():
        if entry.value is not None:
            tracker.log_metrics({f"bd_bops/{name}": entry.value})
    console = Console(width=None if sys.stdout.isatty() else 110)
    print_comparison(comparison, console, levels=settings.quantization.levels)
    pair = _traced_pair(bench)
    if pair is not None:
        tracker.log_figure(decisions_figure(study, pair), "decisions")
    with stage("report", 1):
        report = write_report(run_dir, study, comparison, curves=curves, pair=pair)
    tracker.log_artifact(report)
    log.info("Plots: %s", ", ".join(str(p.name) for p in sorted(run_dir.glob("*.png"))))
    log.info("Report: %s", os.path.relpath(report))
    trained = policy_words(Path(settings.policy or run_dir))
    return f"open the report; run a policy on a video: resq-rl run {trained} source=VIDEO"


def _traced_pair(bench: _Bench) -> Pair | None:
    """The first tuned heuristic among the anchors and a learned policy, of about equal accuracy, traced."""
    study = bench.study
    anchor = next((method for method in ANCHORS if bench.tuned.get(method)), "")
    float_accuracy = study.problems[study.settings.split].float_accuracy
    pair = comparable_pair(bench.tuned.get(anchor, []), bench.tuned["ppo"], float_accuracy)
    if pair is None:
        log.info("No decisions.png: it needs a tuned heuristic and a learned policy with an accuracy.")
        return None
    with stage("tracing two policies", 1):
        return trace_pair(study, anchor, *pair)


def _measure_fixed(bench: _Bench) -> None:
    settings, study = bench.study.settings, bench.study
    per_frame = bench.measure("per_frame", [PerFrame(settings.environment.reference)])
    quantization = settings.quantization
    bits: dict[str, object] = {
        "weight_bits": quantization.key_weight_bits,
        "activation_bits": quantization.key_activation_bits,
    }
    per_frame = [replace(m, settings=bits) for m in per_frame]
    halved = study.measure_per_frame(PerFrame(), HALF_BITS, settings.split)
    halved = replace(halved, settings={"weight_bits": HALF_BITS, "activation_bits": HALF_BITS})
    bench.add("per_frame", [*per_frame, halved])


def _measure_random(bench: _Bench) -> None:
    settings = bench.study.settings
    policy = RandomLevels(len(settings.quantization.levels), settings.seed, 16)
    bench.add("random", bench.measure("random", [policy]))


def _measure_heuristics(bench: _Bench) -> None:
    heuristic, levels = bench.study.settings.heuristic, len(bench.study.settings.quantization.levels)
    intervals, references = heuristic.intervals, heuristic.references
    candidates: dict[str, Sequence[Any]] = {
        "static_resq": static_resq_settings(intervals, references[:1], levels),
        "skip_gate": skip_gate_settings(intervals[:1], heuristic.taus[1::2], levels),
        "dynamic_resq": dynamic_resq_settings(intervals, references, heuristic.taus, heuristic.kappa),
    }
    _measure_tuned(bench, candidates)


def _measure_tuned(bench: _Bench, candidates: Mapping[str, Sequence[Any]]) -> None:
    heuristic = bench.study.settings.heuristic
    for method, policies in candidates.items():
        chosen = _tuned(bench, method, policies)
        if method == "dynamic_resq":
            others = [replace(policy, kappa=kappa) for policy, _ in chosen for kappa in heuristic.other_kappas]
            chosen = thinned(best_of([*chosen, *_tuned(bench, "kappa", others)]), FRONT_POINTS)
            others = [replace(policy, scene_change=s) for policy, _ in chosen for s in heuristic.scene_changes]
            chosen = thinned(best_of([*chosen, *_tuned(bench, "scene change", others)]), FRONT_POINTS)
        tuned = [policy for policy, _ in chosen]
        bench.add(method, bench.measure(method, tuned), tuned)


def _tuned(bench: _Bench, name: str, policies: Sequence[Any]) -> list[tuple[Any, Measurement]]:
    """The envelope of the policies on the validation clips, at most FRONT_POINTS of it."""
    if not policies:
        return []
    frames = bench.study.problems["validation"].frames
    with stage(f"tuning {name.replace('_', ' ')}", len(policies) * frames) as advance:
        front = best_policies(policies, lambda p: bench.study.measure(p, "validation", advance))
    return thinned(front, FRONT_POINTS)


def _measure_searches(bench: _Bench, start: Start | None) -> None:
    """Searched thresholds, with as many environment frames as the training of one policy.

    The greedy search goes on from what training began with, whose frames count for both.
    """
    study, settings = bench.study, bench.study.settings
    if start is None or study.scheme().kind != "region_thresholds":
        start = measure_constants(study, replace(study.scheme(), kind="region_thresholds"))
    for strategy in settings.heuristic.searches:
        known = start if strategy == "greedy" else replace(start, searched=())
        known = search(study, known, max(0, bench.training_frames - known.frames), strategy)
        found = best_for((*known.constants, *known.searched), settings.environment.trade_off_range)
        method = SEARCHES[strategy]
        chosen = _tuned(bench, method, [tried.policy for tried in found])
        bench.add(method, bench.measure(method, [policy for policy, _ in chosen]))
        if strategy == "greedy" and settings.heuristic.clairvoyant_points:
            _measure_clairvoyant(bench, found)


def _measure_clairvoyant(bench: _Bench, found: Sequence[Tried]) -> None:
    """What regions that know the errors ahead save when they choose among searched thresholds."""
    settings = bench.study.settings
    heuristic, policies = settings.heuristic, []
    losses = {tried.policy: tried.loss for tried in found if isinstance(tried.policy, GroupThresholds)}
    for trade_off in map(float, np.geomspace(*settings.environment.trade_off_range, heuristic.clairvoyant_points)):
        best = min(losses, key=lambda policy: losses[policy](trade_off))
        skip = replace(best, taus=(max(settings.environment.thresholds),) * len(best.taus))
        candidates = (best, *(policy for policy in losses if policy != best), skip)
        policies.append(Clairvoyant(candidates, trade_off, heuristic.clairvoyant_horizon))
    bench.add("oracle", bench.measure("oracle", policies))
    bench.deltas["oracle_vs_searched_thresholds"] = compare_fronts(
        {settings.seed: bench.measured["oracle"]},
        bench.measured["searched_thresholds"],
        float_accuracy=bench.study.problems[settings.split].float_accuracy,
        seed=settings.seed,
    )


def _measure_ppo(
    bench: _Bench, start: Start | None, given: Mapping[int, LearnedPolicy]
) -> tuple[dict[int, list[Measurement]], dict[str, list[dict[str, float]]]]:
    """Measure a policy for each training seed: those given, or else trained here."""
    study, settings = bench.study, bench.study.settings
    resume = settings.training.resume is not None
    by_seed: dict[int, list[Measurement]] = {}
    curves: dict[str, list[dict[str, float]]] = {}
    for seed in given or settings.training.seeds:
        folder = bench.run_dir / f"seed{seed}"
        with bench.tracker.child(f"ppo seed {seed}", {"seed": seed, "method": "ppo"}) as child:
            frames = settings.training.frames
            if given:
                policy = given[seed]
            else:
                policy, report = train_policy(study, seed, folder, child, start=start, resume=resume)
                frames, curves[f"seed {seed}"] = report.frames, report.curve
            bench.training_frames = max(bench.training_frames, frames + (start.frames if start else 0))
            candidates = front_candidates(study, policy)
            chosen = _tuned(bench, "lambda", candidates)
            tuned = [policy for policy, _ in chosen]
            results = bench.measure("ppo", tuned)
            by_seed[seed] = [replace(m, settings={**m.settings, "seed": seed}) for m in results]
            for m in by_seed[seed]:
                child.log_metrics({"accuracy": m.accuracy, "bops": m.bops}, bops_step(m))
        bench.add("ppo", by_seed[seed], tuned)
    return by_seed, curves
