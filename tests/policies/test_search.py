"""Searching thresholds per layer group, on objectives whose optimum is known."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from resq_rl.errors import SettingsError
from resq_rl.policies import GroupThresholds, search_group_thresholds

THRESHOLDS = (0.5, 1.0, 2.0, 4.0)
GROUPS = 3


def known() -> dict[GroupThresholds, tuple[float, float]]:
    constants = [GroupThresholds("previous", 16, taus=(t,) * GROUPS) for t in THRESHOLDS]
    return {policy: separable(policy) for policy in constants}


def separable(policy: GroupThresholds) -> tuple[float, float]:
    """A group's error grows with its threshold at its own rate, its BOPs fall; keyframes cost, and help a little."""
    error = sum(rate * tau for rate, tau in zip((0.01, 0.05, 0.2), policy.taus, strict=True))
    bops = sum(0.2 / tau for tau in policy.taus) + (0.06 if policy.interval else 0.0)
    return error - (0.02 if policy.interval else 0.0), bops


def recorded(calls: list[GroupThresholds]) -> Callable[[GroupThresholds], tuple[float, float]]:
    def evaluate(policy: GroupThresholds) -> tuple[float, float]:
        calls.append(policy)
        return separable(policy)

    return evaluate


@pytest.mark.parametrize("trade_off", [0.05, 0.3, 2.0])
def test_greedy_search_finds_the_optimum_that_brute_force_finds(trade_off: float) -> None:
    found = search_group_thresholds(separable, known(), THRESHOLDS, (16, 0), [trade_off], evaluations=100)
    every = [
        GroupThresholds("previous", interval, taus=taus)
        for taus in itertools.product(THRESHOLDS, repeat=GROUPS)
        for interval in (16, 0)
    ]

    def loss(policy: GroupThresholds) -> float:
        error, bops = separable(policy)
        return error + trade_off * bops

    assert min(loss(f.policy) for f in found) == pytest.approx(min(loss(p) for p in every))


@pytest.mark.parametrize("strategy", ["greedy", "random"])
def test_the_budget_is_kept_nothing_is_tried_twice_and_seeds_repeat(strategy: Any) -> None:
    runs = []
    for seed in (3, 3, 4):
        calls: list[GroupThresholds] = []
        search_group_thresholds(
            recorded(calls), known(), THRESHOLDS, (16, 0), (0.1, 1.0), evaluations=30, strategy=strategy, seed=seed
        )
        assert len(calls) == len(set(calls)) == 30
        assert not set(calls) & set(known())
        runs.append(calls)
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("strategy", ["greedy", "random"])
def test_a_small_space_is_searched_to_the_end_and_then_no_more(strategy: Any) -> None:
    calls: list[GroupThresholds] = []
    first = {GroupThresholds("previous", 0, taus=(1.0,)): (1.0, 1.0)}
    search_group_thresholds(recorded_small(calls), first, (1.0, 2.0), (0,), (0.1,), evaluations=500, strategy=strategy)
    assert [p.taus for p in calls] == [(2.0,)]


def recorded_small(calls: list[GroupThresholds]) -> Callable[[GroupThresholds], tuple[float, float]]:
    def evaluate(policy: GroupThresholds) -> tuple[float, float]:
        calls.append(policy)
        return policy.taus[0], 1.0

    return evaluate


def test_the_result_is_a_front() -> None:
    found = search_group_thresholds(separable, known(), THRESHOLDS, (16, 0), (0.02, 0.2, 2.0), evaluations=60)
    assert len(found) >= 3
    bops = [f.bops for f in found]
    errors = [f.error for f in found]
    assert bops == sorted(bops)
    assert errors == sorted(errors, reverse=True)
    assert all((f.error, f.bops) == separable(f.policy) for f in found)


def test_without_evaluations_what_is_known_is_the_front() -> None:
    found = search_group_thresholds(separable, known(), THRESHOLDS, (16,), (0.02, 2.0), evaluations=0)
    assert {f.policy for f in found} <= set(known())


@pytest.mark.parametrize(
    "changes",
    [{"known": {}}, {"trade_offs": ()}, {"intervals": ()}, {"thresholds": (2.0, 1.0)}, {"evaluations": -1}],
)
def test_nothing_to_search(changes: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"known": known(), "thresholds": THRESHOLDS, "intervals": (16,), "trade_offs": (0.1,)}
    with pytest.raises(SettingsError, match="A search needs"):
        search_group_thresholds(separable, **({"evaluations": 9} | arguments | changes))
