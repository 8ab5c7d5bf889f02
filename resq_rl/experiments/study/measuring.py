"""How each method of a comparison is measured: tuned on validation clips, searched for, trained, or known exactly."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np

from resq_rl.envs import Measurement
from resq_rl.errors import SettingsError
from resq_rl.experiments.config.settings import Search
from resq_rl.experiments.results.entries import Effort
from resq_rl.experiments.results.fronts import bops_step
from resq_rl.experiments.results.methods import LEARNED, SCENE_CHANGE, Refinement, controlled, tuned_methods
from resq_rl.experiments.study.deployment import trainer_of
from resq_rl.experiments.study.frame_level import gap_closed, oracle_front
from resq_rl.experiments.study.scoreboard import FRONT_POINTS, Scoreboard
from resq_rl.experiments.study.start import Start, begin, learn, measure_constants, search
from resq_rl.experiments.study.training import front_candidates, save_chosen, train_policy
from resq_rl.policies import Clairvoyant, GroupThresholds, LearnedPolicy, PerFrame
from resq_rl.policies.search import Tried, best_for

__all__ = [
    "Learned",
    "measure_heuristics",
    "measure_learned",
    "measure_oracle",
    "measure_per_frame",
    "measure_searches",
]

log = logging.getLogger(__name__)

SEARCHES: Final[Mapping[Search, str]] = {
    "greedy": "searched_thresholds",
    "random": "random_search",
    "greedy_by_layer": "searched_by_layer",
    "cma_es": "cma_es",
}
HALF_BITS = 4


def measure_per_frame(board: Scoreboard) -> None:
    """Per-frame quantization at the keyframes' bits and at half of 8, whatever the budget."""
    settings = board.study.settings
    free = replace(settings, environment=replace(settings.environment, budget=None))
    quantization = settings.quantization
    bits: dict[str, object] = {
        "weight_bits": quantization.key_weight_bits,
        "activation_bits": quantization.key_activation_bits,
    }
    whole = replace(board, study=replace(board.study, settings=free)).measure(
        "per_frame", [PerFrame(settings.environment.reference)]
    )
    halved = board.study.measure_per_frame(PerFrame(), HALF_BITS, settings.split)
    half: dict[str, object] = {"weight_bits": HALF_BITS, "activation_bits": HALF_BITS}
    board.add("per_frame", [*(replace(m, settings=bits) for m in whole), replace(halved, settings=half)])


def measure_heuristics(board: Scoreboard) -> None:
    """Every method whose settings are tuned on the validation clips."""
    settings = board.study.settings
    for method in tuned_methods(settings):
        assert method.candidates is not None  # as of all tuned methods
        tuned = _tuned(board, method.key, method.candidates(settings), method.refinements)
        board.add(method.key, board.measure(method.key, tuned), tuned)


def _tuned(
    board: Scoreboard,
    name: str,
    policies: Sequence[Any],
    refinements: Sequence[tuple[str, Refinement]] = (SCENE_CHANGE,),
) -> list[Any]:
    """The best of the policies on the validation clips, and of what each refinement makes of them in turn."""
    front = board.tune(name, policies)
    for refinement, refine in refinements:
        others = [other for policy, _ in front for other in refine(board.study.settings.heuristic, policy)]
        front = board.refine(refinement, front, others)
    return [policy for policy, _ in front]


@dataclass
class Learned:
    """The learned policies of a comparison.

    Attributes:
        method: key of the way in which they were trained.
        policies: by training seed.
        measurements: by training seed, on the reported clips.
        curves: figures of each rollout by the name of the training run; none of policies that were given.
    """

    method: str
    policies: dict[int, LearnedPolicy] = field(default_factory=dict)
    measurements: dict[int, list[Measurement]] = field(default_factory=dict)
    curves: dict[str, list[dict[str, float]]] = field(default_factory=dict)


def measure_learned(board: Scoreboard, start: Start | None, given: Mapping[int, LearnedPolicy]) -> Learned:
    """Measure a policy for each training seed: those given, or else trained here."""
    training = board.study.settings.training
    trainer = training.trainer if not given else trainer_of(board.study.settings.policy)
    learned = Learned(LEARNED[trainer])
    for seed in given or training.seeds:
        with board.tracker.child(f"{learned.method} seed {seed}", {"seed": seed, "method": learned.method}) as child:
            frames, begun, begins_at = training.frames, time.monotonic(), start
            if given:
                policy = given[seed]
            else:
                folder, resume = board.run_dir / f"seed{seed}", training.resume is not None
                own, begins_at = begin(board.study, start, seed)
                policy, report = train_policy(own, seed, folder, child, start=begins_at, resume=resume)
                frames, learned.curves[f"seed {seed}"] = report.frames, report.curve
            frames += begins_at.frames if begins_at and trainer == "ppo" else 0
            board.training_frames = max(board.training_frames, frames)
            if not given:
                shared = start.seconds if start and trainer == "ppo" else 0.0
                board.efforts[learned.method] = Effort(frames, time.monotonic() - begun + shared)
            tuned = _tuned(board, "lambda", front_candidates(board.study, policy))
            if not given:
                save_chosen(board.run_dir / f"seed{seed}", policy, tuned, child)
            measured = board.measure(learned.method, tuned)
            results = [replace(m, settings={**m.settings, "seed": seed}) for m in measured]
            for m in results:
                child.log_metrics({"accuracy": m.accuracy, "bops": m.bops}, bops_step(m))
        learned.policies[seed], learned.measurements[seed] = policy, results
        board.add(learned.method, results, tuned)
    return learned


def measure_searches(board: Scoreboard, start: Start | None) -> None:
    """Searched and learned thresholds, with as many environment frames as the training of one policy.

    The greedy search goes on from what training began with, whose frames count for both.
    """
    study, settings = board.study, board.study.settings
    ways = [way for way in SEARCHES if way in settings.heuristic.searches]
    if ways and (start is None or not study.scheme().by_threshold):
        start = measure_constants(study, replace(study.scheme(), kind="region_thresholds"))
    for way in ways:
        assert start is not None  # as it was just measured
        known = replace(start, searched=start.searched if way == "greedy" else (), learned=(), learning_frames=0)
        known = search(study, known, max(0, board.training_frames - known.frames), way)
        found = best_for((*known.constants, *known.searched), settings.environment.trade_off_range)
        method = SEARCHES[way]
        board.efforts[method] = Effort(known.frames, known.seconds)
        chosen = _tuned(board, method, [tried.policy for tried in found])
        board.add(method, board.measure(method, chosen), chosen)
        if way == "greedy" and settings.heuristic.clairvoyant_points:
            _measure_clairvoyant(board, found)
    if "gradient" in settings.heuristic.searches:
        _measure_gradient(board)


def _measure_gradient(board: Scoreboard) -> None:
    """Thresholds per layer that are learned by gradients, tried with every keyframe interval.

    Under a mean, they are tried with a rate controller too.
    """
    study, method = board.study, "gradient_thresholds"
    intervals, begun = study.settings.environment.keyframe_intervals, time.monotonic()
    try:
        learned = learn(study, max(1, board.training_frames), study.settings.seed)
    except SettingsError as error:  # what was measured so far is still worth a report
        log.warning("No gradient thresholds: %s", error)
        return
    seconds = time.monotonic() - begun
    board.efforts[method] = Effort(learned.frames, seconds)
    spread = learned.spread(FRONT_POINTS)
    tried = [replace(policy, interval=interval) for policy in spread for interval in intervals]
    budget = study.settings.environment.budget
    if budget is not None and budget.mean is not None:
        tried += [controller for policy in spread for controller in controlled(policy)]
    chosen = _tuned(board, method, tried)
    board.add(method, board.measure(method, chosen), chosen)


def _measure_clairvoyant(board: Scoreboard, found: Sequence[Tried]) -> None:
    """The saving of regions that know the errors ahead when they choose among searched thresholds."""
    settings = board.study.settings
    heuristic, policies = settings.heuristic, []
    losses = {tried.policy: tried.loss for tried in found if isinstance(tried.policy, GroupThresholds)}
    low, high = settings.environment.trade_off_range
    for trade_off in map(float, np.geomspace(low, high, heuristic.clairvoyant_points if high > low else 1)):
        best = min(losses, key=lambda policy: losses[policy](trade_off))
        skip = replace(best, taus=(max(settings.environment.thresholds),) * len(best.taus))
        candidates = (best, *(policy for policy in losses if policy != best), skip)
        policies.append(Clairvoyant(candidates, trade_off, heuristic.clairvoyant_horizon))
    board.add("oracle", board.measure("oracle", policies))
    board.compare("oracle", {settings.seed: board.measured["oracle"]})


def measure_oracle(board: Scoreboard, learned: Learned) -> None:
    """The exact oracle of frame-level decisions, and the share of its saving that the learned policies achieve."""
    split = board.study.settings.split
    board.add("oracle", oracle_front(board.study, split))
    board.deltas["gap_to_oracle_closed_by_ppo"] = gap_closed(board.study, learned.policies, split)
