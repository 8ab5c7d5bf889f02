"""Choosing the policies that no other beats."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from resq_rl.envs import Measurement
from resq_rl.perception import Segmentation
from resq_rl.policies import StaticResQ, best_policies, thinned

PIXELS = 10
TASK = Segmentation(classes=2)


def measurement(right: int, bops: int) -> Measurement:
    """A measurement of one frame of which `right` of ten pixels of one class are right."""
    confusion = torch.tensor([[[right, PIXELS - right], [0, PIXELS]]])
    one, zero = torch.ones(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    spent = torch.tensor([float(bops)], dtype=torch.float64)
    return Measurement(TASK, confusion, zero, one, spent, zero, zero, spent, one, zero, 0, {})


@given(st.lists(st.tuples(st.integers(0, PIXELS), st.integers(1, 6)), max_size=12))
def test_the_envelope_equals_brute_force(points: list[tuple[int, int]]) -> None:
    """A point is kept if none is at least as accurate for no more BOPs, except its equals, of which one is kept."""
    policies = [StaticResQ(level=i) for i in range(len(points))]
    results = [measurement(*point) for point in points]
    front = best_policies(policies, lambda p: results[p.level])
    accuracy = [r.accuracy for r in results]
    best = {
        (accuracy[i], points[i][1])
        for i in range(len(points))
        if not any(
            accuracy[j] >= accuracy[i]
            and points[j][1] <= points[i][1]
            and (accuracy[j], points[j][1]) != (accuracy[i], points[i][1])
            for j in range(len(points))
        )
    }
    found = [(m.accuracy, m.bops) for _, m in front]
    assert found == sorted(best, key=lambda pair: pair[1])
    assert len(found) == len(best)
    for policy, result in front:
        assert result is results[policy.level]


def test_every_policy_is_evaluated_once() -> None:
    calls: list[int] = []

    def evaluate(policy: StaticResQ) -> Measurement:
        calls.append(policy.level)
        return measurement(5, 1 + policy.level)

    best_policies([StaticResQ(level=i) for i in range(4)], evaluate)
    assert sorted(calls) == [0, 1, 2, 3]


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=30, unique=True), st.integers(2, 8))
def test_a_thinned_front_keeps_its_ends_and_its_order(bops: list[int], most: int) -> None:
    front = [(StaticResQ(level=b), measurement(5, b)) for b in sorted(bops)]
    kept = [m.bops for _, m in thinned(front, most)]
    assert kept == sorted(set(kept))
    assert len(kept) <= most
    assert (kept[0], kept[-1]) == (min(bops), max(bops))
    if len(bops) <= most:
        assert kept == sorted(bops)
