"""The warm start of training: choices that are the same in all regions, tried on a few training clips."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise, product
from typing import Final

import numpy as np

from resq_rl.envs import ActionScheme, Measurement
from resq_rl.errors import SettingsError, ShortMemoryError
from resq_rl.experiments.config.settings import Search
from resq_rl.experiments.results.statistics import MAXIMUM_ACCURACY_LOSS
from resq_rl.experiments.runs.progress import stage
from resq_rl.experiments.study.study import Base, Study, learning_interval
from resq_rl.policies import GradientSettings, GroupThresholds, LearnedThresholds, StaticResQ, learn_thresholds
from resq_rl.policies.ppo import FirstChoice
from resq_rl.policies.search import Tried, evolve_thresholds, search_group_thresholds
from resq_rl.policies.unrolled_clips import clips_together
from resq_rl.quantization import Reference

__all__ = [
    "Start",
    "begin",
    "first_choice",
    "first_choices",
    "learn",
    "measure_constants",
    "prepare_training",
    "search",
]

log = logging.getLogger(__name__)

SEARCH_CLIPS = 6
SPREAD = 12  # of learned thresholds, measured by reward
BY_LAYER: Final[tuple[Search, ...]] = ("greedy_by_layer", "cma_es")  # of which each begins at constants
BASE_KNOTS = 5  # values of lambda for which one of them is the base


@dataclass(frozen=True)
class Start:
    """Policies that were tried on a few training clips.

    Attributes:
        constants: the same choice (threshold or level) for all layer groups, at every keyframe interval.
        searched: a threshold for each layer group.
        clip_frames: frames that each of them took.
        learned: a threshold for each layer, learned by gradients.
        learned_at: the lambda of each of them, which weighs BOPs against `Task.divergence`.
        learning_frames: frames that learning them took.
        seconds: wall time of all that.
    """

    constants: tuple[Tried, ...]
    searched: tuple[Tried, ...] = ()
    clip_frames: int = 0
    learned: tuple[Tried, ...] = ()
    learned_at: tuple[float, ...] = ()
    learning_frames: int = 0
    seconds: float = field(default=0.0, compare=False)

    @property
    def frames(self) -> int:
        """How many frames were simulated for all of them."""
        tried = len(self.constants) + len(self.searched) + len(self.learned)
        return tried * self.clip_frames + self.learning_frames

    def best(self, trade_off: float) -> GroupThresholds | StaticResQ:
        """The policy with the highest reward for a lambda."""
        return min((*self.constants, *self.searched), key=lambda t: t.loss(trade_off)).policy

    def base(self, trade_offs: Sequence[float]) -> Base:
        """For each lambda, those learned thresholds of the layers that have the highest reward."""
        best = [min(range(len(self.learned)), key=lambda i: self.learned[i].loss(t)) for t in trade_offs]
        taus = (policy.taus for i in best if isinstance(policy := self.learned[i].policy, GroupThresholds))
        return Base(tuple(taus), tuple(self.learned_at[i] for i in best))

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
    """The study with its range of lambda settled, and that part of its start which all seeds share.

    Returns:
        The study, and None for the start where nothing was measured.

    Raises:
        ShortMemoryError: thresholds are to be learned by gradients, which takes more memory than is free. They are not
            searched for instead, so that what training begins from does not depend on the machine.
    """
    environment, training = study.settings.environment, study.settings.training
    if training.trainer == "gradient" or _by_gradients(study):
        clips_together(study.problems["train"].model, GradientSettings().window, 1)
    if environment.trade_off != "auto" and (training.warm_start == "none" or training.trainer == "gradient"):
        return study, None
    start = measure_constants(study, study.scheme())
    if environment.trade_off == "auto":
        chosen = start.trade_off_range()
        log.info("lambda from %g to %g", *chosen)
        study = replace(study, settings=replace(study.settings, environment=replace(environment, trade_off=chosen)))
    if training.trainer == "gradient" or _by_gradients(study):
        return study, start
    return study, _searched(study, start)


def begin(study: Study, start: Start | None, seed: int) -> tuple[Study, Start | None]:
    """What one seed of training begins from: thresholds that it learns itself, where training begins at such.

    Args:
        study, start: from `prepare_training`.
        seed: of the training.

    Returns:
        The study whose agents choose factors of those thresholds, and the start with them; both as they were where
        training begins elsewhere.

    Raises:
        SettingsError: `training.warm_start=gradient`, and they cannot be learned. ShortMemoryError: as of
            `prepare_training`.
    """
    training = study.settings.training
    if start is None or training.trainer == "gradient" or not _by_gradients(study):
        return study, start
    try:
        start = _learned(study, start, max(1, training.search_frames), seed)
    except SettingsError as error:
        if training.warm_start == "gradient" or isinstance(error, ShortMemoryError):
            raise
        log.warning("Training begins at searched thresholds instead of learned ones: %s", error)
        return study, _searched(study, start)
    low, high = study.settings.environment.trade_off_range
    base = start.base(np.geomspace(low, high, BASE_KNOTS if high > low else 1).tolist())
    return replace(study, base=base), start


def _by_gradients(study: Study) -> bool:
    """Whether training begins at thresholds that are learned by gradients, if they can be."""
    kind = study.settings.training.warm_start
    return kind == "gradient" or (kind == "auto" and _improves(study))


def _searched(study: Study, start: Start) -> Start:
    """The start with thresholds that were searched for, where training begins at such."""
    training = study.settings.training
    if training.warm_start not in ("auto", "best") or not _improves(study):
        return start
    return search(study, start, training.search_frames, "greedy")


def _improves(study: Study) -> bool:
    """Whether frames are spent on better thresholds than constant ones, for agents that choose thresholds by region."""
    scheme = study.scheme()
    return bool(scheme.by_threshold and scheme.by_group and study.settings.training.search_frames)


def learn(study: Study, frames: int, seed: int) -> LearnedThresholds:
    """Learn thresholds per layer by gradients on all training clips.

    Raises:
        SettingsError: there is nothing to learn, or memory is short.
    """
    environment = study.settings.environment
    with stage("gradient thresholds", frames) as advance:
        return learn_thresholds(
            study.problems["train"],
            GradientSettings(frames),
            interval=learning_interval(environment),
            reference=environment.reference,
            kappa=study.settings.heuristic.kappa,
            seed=seed,
            progress=advance,
        )


def _learned(study: Study, start: Start, frames: int, seed: int) -> Start:
    """The start with thresholds that were learned, and measured as what it began with."""
    begun = time.monotonic()
    learned, few = learn(study, frames, seed), _few_clips(study)
    policies = learned.spread(SPREAD)
    with stage("learned thresholds", len(policies) * few.problems["train"].frames) as advance:
        tried = tuple(_tried(policy, few.measure(policy, "train", advance)) for policy in policies)
    seconds = start.seconds + time.monotonic() - begun
    at = learned.spread_trade_offs(SPREAD)
    return replace(start, learned=tried, learned_at=at, learning_frames=learned.frames, seconds=seconds)


def measure_constants(study: Study, scheme: ActionScheme) -> Start:
    """Measure every constant choice of a scheme at every keyframe interval."""
    environment, few, begun = study.settings.environment, _few_clips(study), time.monotonic()
    problem = few.problems["train"]
    policies = [
        _constant(scheme, choice, interval, environment.reference)
        for interval, choice in product(environment.keyframe_intervals, range(scheme.choices))
    ]
    with stage("constant fields", len(policies) * problem.frames) as advance:
        results = [few.measure(policy, "train", advance) for policy in policies]
    tried = (_tried(policy, result) for policy, result in zip(policies, results, strict=True))
    return Start(tuple(tried), clip_frames=problem.frames, seconds=time.monotonic() - begun)


def search(study: Study, start: Start, frames: int, way: Search) -> Start:
    """Search static thresholds by layer group or layer on a few training clips.

    Args:
        start: thresholds, from which the search begins; constant ones for a search by layer.
        frames: environment frames to spend, rounded up to whole settings.

    Returns:
        The start with what was tried besides.
    """
    settings, few, begun = study.settings, _few_clips(study), time.monotonic()
    problem, environment = few.problems["train"], settings.environment
    limits, evaluations = environment.trade_off_range, math.ceil(frames / problem.frames)
    known = [*start.constants, *start.searched]
    if way in BY_LAYER:
        known = [replace(t, policy=_by_layer(t.policy, len(study.model.sites))) for t in known]
    with stage(f"{way.replace('_', ' ')} search", evaluations * problem.frames) as advance:

        def evaluate(policy: GroupThresholds) -> Tried:
            return _tried(policy, few.measure(policy, "train", advance))

        if way == "cma_es":
            found = evolve_thresholds(evaluate, known, limits, evaluations=evaluations, seed=settings.seed)
        else:
            found = search_group_thresholds(
                evaluate,
                known,
                environment.thresholds,
                environment.keyframe_intervals,
                settings.training.spread(limits),
                evaluations=evaluations,
                strategy="random" if way == "random" else "greedy",
                seed=settings.seed,
            )
    if len(found) < evaluations:
        log.info("There are no more than %d static thresholds to try.", len(found))
    return replace(start, searched=(*start.searched, *found), seconds=start.seconds + time.monotonic() - begun)


def _by_layer(policy: GroupThresholds | StaticResQ, layers: int) -> GroupThresholds:
    """Constant thresholds by layer group as equal ones by layer."""
    assert isinstance(policy, GroupThresholds)  # as of all starts by thresholds
    return replace(policy, taus=policy.taus[:1] * layers)


def _tried(policy: GroupThresholds | StaticResQ, result: Measurement) -> Tried:
    return Tried(policy, result.mean_error, result.bops, result.accuracy)


def first_choices(study: Study, start: Start | None) -> Callable[[float], FirstChoice] | None:
    """The first choices of a policy by lambda; None for a random start."""
    scheme, kind = study.scheme(), study.settings.training.warm_start
    if start is None or kind == "none":
        return None
    if scheme.base:
        return lambda _: FirstChoice(scheme.neutral)
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
