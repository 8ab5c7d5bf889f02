"""Searching thresholds per layer group, on objectives whose optimum is known."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from resq_rl.errors import SettingsError
from resq_rl.policies import GroupThresholds, Tried, best_for, evolve_thresholds, search_group_thresholds

THRESHOLDS = (0.5, 1.0, 2.0, 4.0)
GROUPS = 3


def known() -> list[Tried]:
    return [measured(GroupThresholds("previous", 16, taus=(t,) * GROUPS)) for t in THRESHOLDS]


def measured(policy: GroupThresholds) -> Tried:
    return Tried(policy, *separable(policy))


def separable(policy: GroupThresholds) -> tuple[float, float]:
    """A group's error grows with its threshold at its own rate, its BOPs fall; keyframes cost, and help a little."""
    error = sum(rate * tau for rate, tau in zip((0.01, 0.05, 0.2), policy.taus, strict=True))
    bops = sum(0.2 / tau for tau in policy.taus) + (0.06 if policy.interval else 0.0)
    return error - (0.02 if policy.interval else 0.0), bops


def recorded(calls: list[GroupThresholds]) -> Callable[[GroupThresholds], Tried]:
    def evaluate(policy: GroupThresholds) -> Tried:
        calls.append(policy)
        return measured(policy)

    return evaluate


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("trade_off", [0.05, 0.3, 2.0])
def test_greedy_search_finds_the_optimum_that_brute_force_finds(trade_off: float) -> None:
    found = search_group_thresholds(measured, known(), THRESHOLDS, (16, 0), [trade_off], evaluations=100)
    every = [
        GroupThresholds("previous", interval, taus=taus)
        for taus in itertools.product(THRESHOLDS, repeat=GROUPS)
        for interval in (16, 0)
    ]

    best = min(measured(p).loss(trade_off) for p in every)
    assert min(t.loss(trade_off) for t in found) == pytest.approx(best)


@pytest.mark.parametrize("strategy", ["greedy", "random"])
def test_the_budget_is_kept_nothing_is_tried_twice_and_seeds_repeat(strategy: Any) -> None:
    runs = []
    for seed in (3, 3, 4):
        calls: list[GroupThresholds] = []
        search_group_thresholds(
            recorded(calls), known(), THRESHOLDS, (16, 0), (0.1, 1.0), evaluations=30, strategy=strategy, seed=seed
        )
        assert len(calls) == len(set(calls)) == 30
        assert not set(calls) & {t.policy for t in known()}
        runs.append(calls)
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("strategy", ["greedy", "random"])
def test_a_small_space_is_searched_to_the_end_and_then_no_more(strategy: Any) -> None:
    calls: list[GroupThresholds] = []
    first = [Tried(GroupThresholds("previous", 0, taus=(1.0,)), 1.0, 1.0)]
    search_group_thresholds(recorded_small(calls), first, (1.0, 2.0), (0,), (0.1,), evaluations=500, strategy=strategy)
    assert [p.taus for p in calls] == [(2.0,)]


def recorded_small(calls: list[GroupThresholds]) -> Callable[[GroupThresholds], Tried]:
    def evaluate(policy: GroupThresholds) -> Tried:
        calls.append(policy)
        return Tried(policy, policy.taus[0], 1.0)

    return evaluate


@pytest.mark.usefixtures("unchecked_types")
def test_all_evaluations_are_used_while_settings_are_left() -> None:
    """Neighbours of the best settings run out long before all settings do."""
    left = 2 * len(THRESHOLDS) ** GROUPS - len(known())
    for evaluations in (left // 2, left):
        found = search_group_thresholds(measured, known(), THRESHOLDS, (16, 0), (0.1, 1.0), evaluations=evaluations)
        assert len({t.policy for t in found}) == evaluations


def test_the_best_for_some_lambda_are_a_front() -> None:
    found = search_group_thresholds(measured, known(), THRESHOLDS, (16, 0), (0.02, 0.2, 2.0), evaluations=60)
    front = best_for([*known(), *found], (0.02, 2.0))
    assert len(front) >= 3
    bops, errors = [t.bops for t in front], [t.error for t in front]
    assert bops == sorted(bops)
    assert errors == sorted(errors, reverse=True)
    assert min(t.loss(0.02) for t in found) >= min(t.loss(0.02) for t in front)


@pytest.mark.parametrize(
    "changes", [{"known": []}, {"trade_offs": ()}, {"intervals": ()}, {"thresholds": (2.0, 1.0)}, {"evaluations": -1}]
)
def test_nothing_to_search(changes: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"known": known(), "thresholds": THRESHOLDS, "intervals": (16,), "trade_offs": (0.1,)}
    with pytest.raises(SettingsError, match="A search needs"):
        search_group_thresholds(measured, **({"evaluations": 9} | arguments | changes))


@pytest.mark.parametrize("trade_off", [0.05, 0.3, 2.0])
def test_evolution_comes_near_the_optimum_that_calculus_finds(trade_off: float) -> None:
    found = evolve_thresholds(measured, known(), (trade_off, trade_off), evaluations=600, seed=1)

    # rate * tau + lambda * 0.2 / tau is least at tau = sqrt(0.2 lambda / rate), where it is 2 sqrt(0.2 lambda rate)
    best = sum(2 * (0.2 * trade_off * rate) ** 0.5 for rate in (0.01, 0.05, 0.2))
    interval = min(known(), key=lambda t: t.loss(trade_off)).policy.interval
    assert interval == 16
    least = min(t.loss(trade_off) for t in found)
    assert best + 0.06 * trade_off - 0.02 <= least < best + 0.06 * trade_off - 0.02 + 0.002


def test_evolution_spends_what_it_was_given_and_seeds_repeat() -> None:
    runs = []
    for seed in (3, 3, 4):
        calls: list[GroupThresholds] = []
        found = evolve_thresholds(recorded(calls), known(), (0.1, 1.0), evaluations=31, seed=seed)
        assert len(calls) == len(found) == 31
        runs.append(calls)
    assert runs[0] == runs[1] != runs[2]


def test_evolution_needs_thresholds_to_start_from() -> None:
    with pytest.raises(SettingsError, match="start from"):
        evolve_thresholds(measured, [], (0.1, 1.0), evaluations=3)
