"""Searching static thresholds per layer group: what a policy must beat to be worth its observation."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from resq_rl.errors import SettingsError
from resq_rl.policies.fixed import GroupThresholds

__all__ = ["Searched", "Strategy", "search_group_thresholds"]

Strategy = Literal["greedy", "random"]
# Of a greedy proposal: chance to change one more group, and to change the keyframe interval instead.
ONE_MORE, OTHER_INTERVAL = 0.3, 0.15
# So many proposals in a row that were tried before: there is nothing left to find.
MOST_MISSES = 1000


@dataclass(frozen=True)
class Searched:
    """A setting that was tried, with its mean error and BOPs (share of W8A8) on the clips of the search."""

    policy: GroupThresholds
    error: float
    bops: float


def search_group_thresholds(
    evaluate: Callable[[GroupThresholds], tuple[float, float]],
    known: Mapping[GroupThresholds, tuple[float, float]],
    thresholds: Sequence[float],
    intervals: Sequence[int],
    trade_offs: Sequence[float],
    *,
    evaluations: int,
    strategy: Strategy = "greedy",
    seed: int = 0,
) -> list[Searched]:
    """Static thresholds per layer group for a range of lambda.

    All evaluations serve all lambdas. "greedy" goes from lambda to lambda and tries a neighbour of the best setting
    known for it: another threshold, one or two places up or down, in one group or a few, or another keyframe interval.
    "random" draws every threshold on its own.

    Args:
        evaluate: error and BOPs of a setting, on training clips.
        known: settings to begin from, such as constant fields, with their error and BOPs.
        thresholds: what a group may take, ascending.
        intervals: what the keyframe interval may be.
        trade_offs: values of lambda to search for; a setting is the better, the lower error + lambda * BOPs.
        evaluations: how many settings to try besides.

    Returns:
        Settings that are best for some lambda between the lowest and the highest of `trade_offs`, by rising BOPs.

    Raises:
        SettingsError: there is nothing to start from, or to search over.
    """
    ascending = list(thresholds) == sorted(set(thresholds))
    if not (known and trade_offs and intervals and ascending and evaluations >= 0):
        raise SettingsError(
            "A search needs settings to start from, lambdas, intervals, ascending thresholds and 0 evaluations or more."
        )
    generator = np.random.default_rng(seed)
    tried = {policy: Searched(policy, *measured) for policy, measured in known.items()}
    first, most = next(iter(tried)), len(tried) + evaluations
    misses = 0
    while len(tried) < most and misses < MOST_MISSES:
        wanted = trade_offs[len(tried) % len(trade_offs)]
        if strategy == "random":
            drawn = generator.choice(np.array(thresholds), size=len(first.taus))
            taus = tuple(float(t) for t in drawn)
            policy = replace(first, taus=taus, interval=int(generator.choice(np.array(intervals))))
        else:
            policy = _neighbour(_best(tried, wanted).policy, thresholds, intervals, generator)
        if policy in tried:
            misses += 1
            continue
        misses = 0
        tried[policy] = Searched(policy, *evaluate(policy))
    dense = np.geomspace(min(trade_offs), max(trade_offs), 50)
    chosen = {found.policy: found for found in (_best(tried, float(t)) for t in dense)}
    return sorted(chosen.values(), key=lambda found: found.bops)


def _best(tried: dict[GroupThresholds, Searched], trade_off: float) -> Searched:
    return min(tried.values(), key=lambda found: found.error + trade_off * found.bops)


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
