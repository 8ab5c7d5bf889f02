"""The warm start of training: choices that are the same in all regions, tried on a few training clips."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise, product

from resq_rl.envs import ActionScheme, Measurement
from resq_rl.errors import SettingsError
from resq_rl.experiments.results.statistics import MAXIMUM_ACCURACY_LOSS
from resq_rl.experiments.runs.progress import stage
from resq_rl.experiments.study.study import Study
from resq_rl.policies import GroupThresholds, StaticResQ
from resq_rl.policies.ppo import FirstChoice
from resq_rl.policies.search import Strategy, Tried, search_group_thresholds
from resq_rl.quantization import Reference

__all__ = ["Start", "first_choice", "first_choices", "measure_constants", "prepare_training", "search"]

log = logging.getLogger(__name__)

SEARCH_CLIPS = 6


@dataclass(frozen=True)
class Start:
    """Policies that were tried on a few training clips.

    Attributes:
        constants: the same choice (threshold or level) for all layer groups, at every keyframe interval.
        searched: a threshold for each layer group.
        clip_frames: frames that each of them took.
    """

    constants: tuple[Tried, ...]
    searched: tuple[Tried, ...] = ()
    clip_frames: int = 0

    @property
    def frames(self) -> int:
        """How many frames were simulated for all of them."""
        return (len(self.constants) + len(self.searched)) * self.clip_frames

    def best(self, trade_off: float) -> GroupThresholds | StaticResQ:
        """The policy with the highest reward for a lambda."""
        return min((*self.constants, *self.searched), key=lambda t: t.loss(trade_off)).policy

    def even(self, place: float) -> GroupThresholds | StaticResQ:
        """The constant at a place, from 0 (most BOPs) to 1 (fewest), counting those of one keyframe interval."""
        interval = self.constants[0].policy.interval
        constants = sorted((t for t in self.constants if t.policy.interval == interval), key=lambda t: -t.bops)
        return constants[round(place * (len(constants) - 1))].policy

    def trade_off_range(self) -> tuple[float, float]:
        """Values of lambda for which constant choices within 10 points of the most accurate one are best.

        The ends are the slopes of error over BOPs at the two ends of that part of the lower convex hull, a quarter of
        the lower one, because learned policies go on where constant ones stop to gain. Where fewer than two choices
        come that near, all are looked at.

        Raises:
            SettingsError: no choice is more accurate for more BOPs.
        """
        points = sorted((t.bops, t.error, t.accuracy) for t in self.constants)
        hull: list[tuple[float, float, float]] = []
        for point in points:
            while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], point):
                hull.pop()
            hull.append(point)
        near = [p for p in hull if p[2] >= max(t.accuracy for t in self.constants) - MAXIMUM_ACCURACY_LOSS]
        slopes = [_slope(a, b) for a, b in pairwise(near if len(near) > 1 else hull) if b[1] < a[1]]
        if not slopes:
            raise SettingsError(
                "environment.trade_off=auto found no range: on the first training clips, no constant choice is more "
                "accurate for more bits. Look at the network and its task, or give a range such as [0.01,1.0]."
            )
        low, high = min(slopes) / 4, max(slopes)
        return float(f"{low:.1e}"), float(f"{high:.1e}")


def _slope(a: tuple[float, float, float], b: tuple[float, float, float]) -> float:
    """Error saved per BOPs spent from one point to a more expensive one."""
    return (a[1] - b[1]) / max(b[0] - a[0], 1e-12)


def prepare_training(study: Study) -> tuple[Study, Start | None]:
    """The study with its range of lambda settled, and what training begins from, where it was measured."""
    environment, training = study.settings.environment, study.settings.training
    if environment.trade_off != "auto" and training.warm_start == "none":
        return study, None
    scheme = study.scheme()
    start = measure_constants(study, scheme)
    if environment.trade_off == "auto":
        chosen = start.trade_off_range()
        log.info("lambda from %g to %g", *chosen)
        study = replace(study, settings=replace(study.settings, environment=replace(environment, trade_off=chosen)))
    if training.warm_start == "best" and training.search_frames and scheme.by_threshold and scheme.by_group:
        start = search(study, start, training.search_frames, "greedy")
    return study, start


def measure_constants(study: Study, scheme: ActionScheme) -> Start:
    """Measure every constant choice of a scheme at every keyframe interval."""
    environment, few = study.settings.environment, _few_clips(study)
    problem = few.problems["train"]
    policies = [
        _constant(scheme, choice, interval, environment.reference)
        for interval, choice in product(environment.keyframe_intervals, range(scheme.choices))
    ]
    with stage("constant fields", len(policies) * problem.frames) as advance:
        results = [few.measure(policy, "train", advance) for policy in policies]
    tried = (_tried(policy, result) for policy, result in zip(policies, results, strict=True))
    return Start(tuple(tried), clip_frames=problem.frames)


def search(study: Study, start: Start, frames: int, strategy: Strategy) -> Start:
    """Search static thresholds per layer group on a few training clips.

    Args:
        start: thresholds, from which the search begins.
        frames: environment frames to spend, rounded up to whole settings.

    Returns:
        The start with what was tried besides.
    """
    settings, few = study.settings, _few_clips(study)
    problem, environment = few.problems["train"], settings.environment
    evaluations = math.ceil(frames / problem.frames)
    with stage(f"{strategy} search", evaluations * problem.frames) as advance:
        found = search_group_thresholds(
            lambda policy: _tried(policy, few.measure(policy, "train", advance)),
            (*start.constants, *start.searched),
            environment.thresholds,
            environment.keyframe_intervals,
            settings.training.spread(environment.trade_off_range),
            evaluations=evaluations,
            strategy=strategy,
            seed=settings.seed,
        )
    if len(found) < evaluations:
        log.info("There are no more than %d thresholds per layer group to try.", len(found))
    return replace(start, searched=(*start.searched, *found))


def _tried(policy: GroupThresholds | StaticResQ, result: Measurement) -> Tried:
    return Tried(policy, result.mean_error, result.bops, result.accuracy)


def first_choices(study: Study, start: Start | None) -> Callable[[float], FirstChoice] | None:
    """The first choices of a policy by lambda; None for a random start."""
    scheme, kind = study.scheme(), study.settings.training.warm_start
    if start is None or kind == "none":
        return None
    low, high = study.settings.environment.trade_off_range

    def even(trade_off: float) -> FirstChoice:
        place = math.log(trade_off / low) / math.log(high / low) if high > low else 0.5
        return first_choice(scheme, start.even(min(max(place, 0.0), 1.0)))

    return even if kind == "even" else lambda trade_off: first_choice(scheme, start.best(trade_off))


def first_choice(scheme: ActionScheme, policy: GroupThresholds | StaticResQ) -> FirstChoice:
    """The choices with which a scheme's agents act as the policy does."""
    if isinstance(policy, StaticResQ):
        return FirstChoice(policy.level, policy.interval)
    return FirstChoice([scheme.thresholds.index(tau) for tau in policy.taus], policy.interval)


def _constant(scheme: ActionScheme, choice: int, interval: int, reference: Reference) -> GroupThresholds | StaticResQ:
    if scheme.by_threshold:
        taus = (scheme.thresholds[choice],) * scheme.groups
        return GroupThresholds(reference, interval, taus=taus, kappa=scheme.kappa)
    return StaticResQ(reference, interval, level=choice)


def _few_clips(study: Study) -> Study:
    problem = study.problems["train"]
    return replace(study, problems={"train": problem.subset(range(min(SEARCH_CLIPS, len(problem))))}, tables={})
