"""Searching static thresholds by layer group or layer: what a policy must beat to be worth its observation."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from resq_rl.errors import SettingsError
from resq_rl.policies.fixed import GroupThresholds, StaticResQ

__all__ = ["Strategy", "Tried", "best_for", "evolve_thresholds", "search_group_thresholds"]

Strategy = Literal["greedy", "random"]
# Probabilities that a greedy proposal changes one more group, and that it changes the keyframe interval instead.
ONE_MORE, OTHER_INTERVAL = 0.3, 0.15
# Consecutive repeats before the search falls back to random draws, and before it stops.
STUCK, MOST_MISSES = 200, 5000
# Of CMA-ES: values of lambda, and the first standard deviation of the logarithm of a threshold.
EVOLVED, FIRST_SIGMA = 3, 0.4


@dataclass(frozen=True)
class Tried:
    """A setting tried on some clips: its error as in the reward, and its BOPs as a share of W8A8."""

    policy: GroupThresholds | StaticResQ
    error: float
    bops: float
    accuracy: float = math.nan

    def loss(self, trade_off: float) -> float:
        """Error + lambda * BOPs, the negative of the reward but for a constant."""
        return self.error + trade_off * self.bops


def search_group_thresholds(
    evaluate: Callable[[GroupThresholds], Tried],
    known: Sequence[Tried],
    thresholds: Sequence[float],
    intervals: Sequence[int],
    trade_offs: Sequence[float],
    *,
    evaluations: int,
    strategy: Strategy = "greedy",
    seed: int = 0,
) -> list[Tried]:
    """Static thresholds by layer group or layer, as many as the known ones have, for a range of lambda.

    All evaluations serve all lambdas. "greedy" goes from lambda to lambda and tries a neighbour of the best setting
    known for it: another threshold, one or two places up or down, in one group or a few, or another keyframe interval;
    where it knows all neighbours, it draws at random. "random" draws every threshold on its own.

    Args:
        evaluate: measures a setting on training clips.
        known: settings to begin from, such as constant fields.
        thresholds: what a group may take, ascending.
        intervals: what the keyframe interval may be.
        trade_offs: values of lambda to search for.
        evaluations: how many settings to try besides the known ones.

    Returns:
        What was tried besides, in its order; fewer than `evaluations` only where no setting is left.

    Raises:
        SettingsError: there is nothing to start from, or to search over.
    """
    if not (trade_offs and intervals and list(thresholds) == sorted(set(thresholds)) and evaluations >= 0):
        raise SettingsError("A search needs lambdas, intervals, ascending thresholds and 0 evaluations or more.")
    first = _first(known)
    generator = np.random.default_rng(seed)
    tried = {t.policy: t for t in known}
    found: list[Tried] = []
    misses = 0
    while len(found) < evaluations and misses < MOST_MISSES:
        if strategy == "random" or misses >= STUCK:
            policy = _drawn(first, thresholds, intervals, generator)
        else:
            wanted = trade_offs[(len(tried) + misses) % len(trade_offs)]
            policy = _neighbour(_best(tried.values(), wanted), thresholds, intervals, generator)
        misses += 1
        if policy not in tried:
            misses = 0
            found.append(evaluate(policy))
            tried[policy] = found[-1]
    return found


def evolve_thresholds(
    evaluate: Callable[[GroupThresholds], Tried],
    known: Sequence[Tried],
    trade_offs: tuple[float, float],
    *,
    evaluations: int,
    seed: int = 0,
) -> list[Tried]:
    """Static thresholds for a range of lambda by CMA-ES (Hansen, arXiv 1604.00772) over their logarithms.

    The evaluations are shared by EVOLVED values of lambda, evenly by ratio, each with a run of its own that begins at
    the best setting known for it, those of the runs before included.

    Args:
        evaluate: measures a setting on training clips.
        known: settings to begin from, such as constant fields, with as many thresholds as are wanted.
        trade_offs: the range of lambda.
        evaluations: how many settings to try besides the known ones.

    Returns:
        What was tried besides, in its order.

    Raises:
        SettingsError: there is nothing to start from.
    """
    from cmaes import CMA  # brings SciPy's statistics, which take two seconds

    _first(known)
    found: list[Tried] = []
    for run, trade_off in enumerate(np.geomspace(*trade_offs, EVOLVED).tolist()):
        begin = _best((*known, *found), trade_off)
        evolution = CMA(mean=np.log(begin.taus), sigma=FIRST_SIGMA, seed=seed * EVOLVED + run)
        end = evaluations * (run + 1) // EVOLVED
        while len(found) < end:
            drawn = [evolution.ask() for _ in range(min(evolution.population_size, end - len(found)))]
            tried = [evaluate(replace(begin, taus=tuple(np.exp(x).tolist()))) for x in drawn]
            found += tried
            if len(drawn) == evolution.population_size:
                evolution.tell([(x, t.loss(trade_off)) for x, t in zip(drawn, tried, strict=True)])
    return found


def best_for(tried: Iterable[Tried], trade_offs: Sequence[float]) -> list[Tried]:
    """Settings that are best for some lambda between the lowest and the highest of `trade_offs`, by rising BOPs."""
    every = list(tried)
    dense = np.geomspace(min(trade_offs), max(trade_offs), 50)
    chosen = {t.policy: t for t in (min(every, key=lambda t: t.loss(trade_off)) for trade_off in dense)}
    return sorted(chosen.values(), key=lambda t: t.bops)


def _first(known: Sequence[Tried]) -> GroupThresholds:
    first = next((t.policy for t in known if isinstance(t.policy, GroupThresholds)), None)
    if first is None:
        raise SettingsError("A search needs thresholds to start from.")
    return first


def _best(tried: Iterable[Tried], trade_off: float) -> GroupThresholds:
    thresholds = ((t, t.policy) for t in tried if isinstance(t.policy, GroupThresholds))
    return min(thresholds, key=lambda pair: pair[0].loss(trade_off))[1]


def _drawn(
    like: GroupThresholds, thresholds: Sequence[float], intervals: Sequence[int], generator: np.random.Generator
) -> GroupThresholds:
    taus = tuple(float(t) for t in generator.choice(np.array(thresholds), size=len(like.taus)))
    return replace(like, taus=taus, interval=int(generator.choice(np.array(intervals))))


def _neighbour(
    policy: GroupThresholds, thresholds: Sequence[float], intervals: Sequence[int], generator: np.random.Generator
) -> GroupThresholds:
    if len(set(intervals)) > 1 and generator.uniform() < OTHER_INTERVAL:
        others = [i for i in intervals if i != policy.interval]
        return replace(policy, interval=int(generator.choice(np.array(others))))
    taus = list(policy.taus)
    for group in generator.permutation(len(taus)):
        place = int(np.argmin([abs(np.log(t / taus[group])) for t in thresholds]))
        moved = place + int(generator.choice(np.array([-2, -1, 1, 2])))
        taus[group] = float(thresholds[min(max(moved, 0), len(thresholds) - 1)])
        if generator.uniform() > ONE_MORE:
            break
    return replace(policy, taus=tuple(taus))
