"""A choice by region that knows the errors ahead, against trying everything by hand."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from resq_rl.envs import Decision, Problem, measure
from resq_rl.errors import PolicyError
from resq_rl.policies import Clairvoyant, GroupThresholds
from resq_rl.quantization import ThresholdField
from tests.envs import problems
from tests.envs.problems import first_difference

TAUS = (0.1, 1.0, 4.0, 100.0)
CANDIDATES = tuple(GroupThresholds("previous", 0, taus=(tau,) * 3) for tau in TAUS)


def objective(problem: Problem, policy: Clairvoyant | GroupThresholds, trade_off: float) -> torch.Tensor:
    """Reward of each clip summed over its residual frames."""
    streams = problems.streams(problem, len(problem), trade_off_range=policy.trade_off_range)
    rewards = [result.reward(torch.full((streams.slots,), trade_off)) for _, result in streams.run(policy)]
    return torch.stack(rewards[1:]).sum(0)


@pytest.mark.parametrize("trade_off", [0.02, 0.3, 3.0])
def test_where_there_is_one_choice_it_is_the_best_candidate(trade_off: float, problem: Problem) -> None:
    """One decision for one region: the best of the candidates, clip by clip."""
    own = replace(problems.with_clips(problem, [2] * 6), grid=(1, 1))
    policy = Clairvoyant(CANDIDATES, trade_off, 3)
    best = torch.stack([objective(own, candidate, trade_off) for candidate in CANDIDATES]).amax(0)
    torch.testing.assert_close(objective(own, policy, trade_off), best)


@pytest.mark.parametrize("trade_off", [0.02, 0.3, 3.0])
def test_it_takes_the_best_of_the_mixture_and_every_candidate(trade_off: float, problem: Problem) -> None:
    own, horizon = problems.with_clips(problem, [6] * 8), 3
    policy = Clairvoyant(CANDIDATES, trade_off, horizon)
    streams = problems.streams(own, 8, trade_off_range=policy.trade_off_range)
    streams.start(range(8), range(8))
    field = policy.decide(streams.view()).field
    assert isinstance(field, ThresholdField)

    def tried(first: Decision) -> torch.Tensor:
        """Sums of rewards by clip and region, on streams of their own."""
        fresh = problems.streams(own, 8, trade_off_range=policy.trade_off_range)
        fresh.start(range(8), range(8))
        results = [fresh.step(first)]
        results += [fresh.step(CANDIDATES[0].decide(fresh.view())) for _ in range(horizon - 1)]
        return torch.stack([r.region_reward(torch.full((8,), trade_off)) for r in results]).sum(0)

    sums = [tried(candidate.decide(streams.view())) for candidate in CANDIDATES]
    mixture = torch.zeros(8, 3, *own.grid)
    for clip, row, column in product(range(8), range(own.grid[0]), range(own.grid[1])):
        values = [float(s[clip, row, column]) for s in sums]
        mixture[clip, :, row, column] = TAUS[values.index(max(values))]
    still = torch.zeros(8, dtype=torch.bool)
    totals = [s.mean((1, 2)) for s in (*sums, tried(Decision(still, ThresholdField(mixture, CANDIDATES[0].kappa))))]
    fields = [*(torch.full((8, 3, *own.grid), tau) for tau in TAUS), mixture]
    for clip in range(8):
        own_totals = [float(total[clip]) for total in totals]
        expected = fields[own_totals.index(max(own_totals))][clip]
        assert first_difference(field.thresholds[clip], expected) is None


@pytest.mark.parametrize(("trade_off", "first"), [(0.02, 2), (0.3, 0), (3.0, 2)])
def test_seeing_to_the_end_it_never_does_worse_than_its_first_candidate(
    trade_off: float, first: int, problem: Problem
) -> None:
    own = problems.with_clips(problem, [7] * 6)
    candidates = (CANDIDATES[first], *(c for c in CANDIDATES if c != CANDIDATES[first]))
    gained = objective(own, Clairvoyant(candidates, trade_off), trade_off) - objective(own, candidates[0], trade_off)
    assert float(gained.min()) > -1e-5
    assert float(gained.max()) > 1e-3


def test_looking_ahead_changes_nothing(problem: Problem) -> None:
    own, single = problems.with_clips(problem, [5, 5]), CANDIDATES[1]
    plain = measure(own, single)
    ahead = measure(own, Clairvoyant((single,), 0.3))
    assert first_difference(plain.counts, ahead.counts) is None
    assert ahead.clip_bops.tolist() == pytest.approx(plain.clip_bops.tolist(), rel=1e-12)
    streams = problems.streams(own, 2)
    streams.start(range(2), range(2))
    seen = streams.view().observation
    streams.view().preview(single.decide(streams.view()), single, 9)
    after = streams.view().observation
    assert first_difference(seen.regions, after.regions) is None
    assert first_difference(seen.frame, after.frame) is None


def test_all_candidates_keep_to_the_keyframes_of_the_first(problem: Problem) -> None:
    own = problems.with_clips(problem, [7, 7])
    candidates = tuple(replace(c, interval=i) for c, i in zip(CANDIDATES, (3, 0, 2, 0), strict=True))
    result = measure(own, Clairvoyant(candidates, 0.3, 2))
    assert result.keyframes.tolist() == [3, 3]
    assert result.policy.tolist() == [0.0, 0.0]


def test_a_preview_ends_with_the_clip(problem: Problem) -> None:
    own = problems.with_clips(problem, [4, 4])
    streams = problems.streams(own, 2)
    streams.start(range(2), range(2))
    first: Decision = CANDIDATES[0].decide(streams.view())
    assert len(streams.view().preview(first, CANDIDATES[0], 2)) == 2
    assert len(streams.view().preview(first, CANDIDATES[0], 9)) == 3
    assert len(streams.view().preview(first, CANDIDATES[0], 0)) == 3


def test_impossible_clairvoyants_are_refused() -> None:
    for candidates, trade_off, horizon in [((), 0.3, 8), (CANDIDATES, 0.0, 8), (CANDIDATES, 0.3, -1)]:
        with pytest.raises(PolicyError, match="needs candidates, a horizon"):
            Clairvoyant(candidates, trade_off, horizon)
    with pytest.raises(PolicyError, match="one kappa"):
        Clairvoyant((CANDIDATES[0], replace(CANDIDATES[1], kappa=(1.0, 2.0, 4.0))), 0.3)
