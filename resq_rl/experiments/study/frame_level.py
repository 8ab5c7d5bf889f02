"""Frame-level decisions: how much of what an oracle saves over tuned heuristics does a learned policy save?

Against the keyframe reference every frame's accuracy and BOPs follow from its keyframe and level, so the responses of
each clip are tabulated once. From the tables policies are measured exactly, PPO trains without running the network, and
the best schedule of keyframes and levels is found by dynamic programming.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Float64, Int

from resq_rl.envs import Measurement, TableEngine, tabulate
from resq_rl.experiments.results.entries import BdEntry
from resq_rl.experiments.results.methods import tuned_methods
from resq_rl.experiments.results.statistics import bootstrap_intervals
from resq_rl.experiments.runs.progress import stage
from resq_rl.experiments.study.study import Study
from resq_rl.policies import LearnedPolicy, oracle_measurement
from resq_rl.sealed import ContentStore
from resq_rl.video import Split

__all__ = ["gap_closed", "is_frame_level", "oracle_front", "share_of_gap", "tabulated"]

REPLICATES = 1000
# Of the heuristic's objective: below it, a gap is rounding.
SMALLEST_GAP = 1e-9


def is_frame_level(study: Study) -> bool:
    """Whether the agents take the decisions for which an oracle is known."""
    return study.settings.environment.id == "resq_rl/FrameLevel-v0"


def tabulated(study: Study) -> Study:
    """The study with the tables of all its clips, kept in the folder `tables` of the settings."""
    engines: dict[Split, TableEngine] = {}
    store = ContentStore(Path(study.settings.tables) if study.settings.tables else None)
    for split, problem in study.problems.items():
        with stage(f"responses of {split} clips", len(problem)) as advance:
            tables = []
            for index in range(len(problem)):
                tables.append(tabulate(problem, index, store))
                advance(1)
        engines[split] = TableEngine(problem, tables)
    return replace(study, tables=engines)


def oracle_front(study: Study, split: Split) -> list[Measurement]:
    """Accuracy and BOPs of the best schedules of the split's clips, for values of lambda over its range."""
    return [oracle_measurement(study.task, study.tables[split].tables, t) for t in _trade_offs(study)]


def gap_closed(study: Study, policies: Mapping[int, LearnedPolicy], split: Split) -> BdEntry:
    """Share of the gap between heuristics and oracle that learned policies close on a split, in percent.

    For each lambda the gap is that of the objective, error + lambda * BOPs: of the heuristic whose objective is least
    on the validation clips, of the policy at that lambda, and of the oracle.

    Args:
        policies: by training seed.
    """
    trade_offs = _trade_offs(study)
    settings = study.settings
    candidates = [p for method in tuned_methods(settings) if method.candidates for p in method.candidates(settings)]
    tried = [(p, study.measure(p, "validation")) for p in candidates]
    base, best = [], []
    for t in trade_offs:
        chosen = min(tried, key=lambda pair: float(_objective(pair[1], t).mean()))[0]
        base.append(_objective(study.measure(chosen, split), t))
        best.append(_objective(oracle_measurement(study.task, study.tables[split].tables, t), t))
    own = [[_objective(study.measure(p.at(t), split), t) for t in trade_offs] for p in policies.values()]
    return share_of_gap(np.array(base), np.array(own), np.array(best), seed=study.settings.seed)


def share_of_gap(
    base: Float64[np.ndarray, "t n"],
    own: Float64[np.ndarray, "s t n"],
    best: Float64[np.ndarray, "t n"],
    *,
    seed: int,
) -> BdEntry:
    """100 * (base - own) / (base - best) of sums over clips, averaged over lambda; interval over clips and seeds.

    Args:
        base, own, best: objectives by lambda and clip, lower is better; `own` by training seed first.
    """

    def share(clips: Int[np.ndarray, " n"], seeds: Int[np.ndarray, " s"]) -> float:
        gap = (base - best)[:, clips].sum(1)
        closed = (base - own[seeds].mean(0))[:, clips].sum(1)
        return float(100 * (closed / gap).mean()) if bool((gap > SMALLEST_GAP * base.sum(1)).all()) else math.nan

    clips, seeds = base.shape[1], len(own)
    value = share(np.arange(clips), np.arange(seeds))
    if math.isnan(value):
        return BdEntry(None, None, None, "for some lambda the heuristic is as good as the oracle")
    (interval,) = bootstrap_intervals(
        share, clips=clips, seeds=seeds, generator=np.random.default_rng(seed), replicates=REPLICATES
    )
    return BdEntry(value, interval.bounds, None, interval.reason, interval.undefined)


def _trade_offs(study: Study) -> list[float]:
    return study.settings.training.spread(study.settings.environment.trade_off_range)


def _objective(result: Measurement, trade_off: float) -> Float64[np.ndarray, " n"]:
    """Error + lambda * BOPs per frame of each clip, the negative of its mean reward but for a constant."""
    value: np.ndarray = ((result.error + trade_off * result.clip_bops) / result.frames).numpy()
    return value
