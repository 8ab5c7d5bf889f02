"""A choice by region that knows the errors ahead, against trying everything by hand."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from resq_rl.envs import Decision, FrameView, measure
from resq_rl.envs.measure import frames_of
from resq_rl.errors import PolicyError
from resq_rl.policies import Clairvoyant, GroupThresholds
from resq_rl.quantization import ThresholdField
from tests.envs.worlds import World, first_difference

TAUS = (0.1, 1.0, 4.0, 100.0)
CANDIDATES = tuple(GroupThresholds("previous", 0, taus=(tau,) * 3) for tau in TAUS)


def objective(world: World, policy: Clairvoyant | GroupThresholds, trade_off: float) -> torch.Tensor:
    """Reward of each clip summed over its residual frames."""
    simulator = world.simulator(len(world.store), trade_off_range=policy.trade_off_range)
    rewards = [result.reward(torch.full((simulator.slots,), trade_off)) for result in frames_of(simulator, policy)]
    return torch.stack(rewards[1:]).sum(0)


@pytest.mark.parametrize("trade_off", [0.02, 0.3, 3.0])
def test_where_there_is_one_choice_it_is_the_best_candidate(trade_off: float, world: World) -> None:
    """One decision for one region: the best of the candidates, clip by clip."""
    own = replace(world.with_clips([2] * 6), grid=(1, 1))
    policy = Clairvoyant(CANDIDATES, trade_off, 3)
    best = torch.stack([objective(own, candidate, trade_off) for candidate in CANDIDATES]).amax(0)
    torch.testing.assert_close(objective(own, policy, trade_off), best)


def test_every_region_takes_what_gave_it_most_over_the_horizon(world: World) -> None:
    own, trade_off = world.with_clips([6] * 4), 0.3
    policy = Clairvoyant(CANDIDATES, trade_off, 3)
    simulator = own.simulator(4, trade_off_range=policy.trade_off_range)
    simulator.start(range(4), range(4))
    field = policy.decide(FrameView(simulator)).field
    assert isinstance(field, ThresholdField)
    sums = []
    for candidate in CANDIDATES:
        fresh = own.simulator(4, trade_off_range=policy.trade_off_range)
        fresh.start(range(4), range(4))
        following = [candidate, CANDIDATES[0], CANDIDATES[0]]
        results = [fresh.step(p.decide(FrameView(fresh))) for p in following]
        sums.append(torch.stack([r.region_reward(torch.full((4,), trade_off)) for r in results]).sum(0))
    chosen = set()
    for clip, row, column in product(range(4), range(own.grid[0]), range(own.grid[1])):
        values = [float(s[clip, row, column]) for s in sums]
        tau = TAUS[values.index(max(values))]
        chosen.add(tau)
        assert field.thresholds[clip, :, row, column].tolist() == pytest.approx([tau] * 3)
    assert len(chosen) > 1


def test_looking_ahead_changes_nothing(world: World) -> None:
    own, single = world.with_clips([5, 5]), CANDIDATES[1]
    plain = measure(own.model, own.task, own.store, single, grid=own.grid)
    ahead = measure(own.model, own.task, own.store, Clairvoyant((single,), 0.3), grid=own.grid)
    assert first_difference(plain.confusion, ahead.confusion) is None
    assert ahead.clip_bops.tolist() == pytest.approx(plain.clip_bops.tolist(), rel=1e-12)
    simulator = own.simulator(2)
    simulator.start(range(2), range(2))
    seen = FrameView(simulator).observation
    FrameView(simulator).preview(single.decide(FrameView(simulator)), single, 9)
    after = FrameView(simulator).observation
    assert first_difference(seen.regions, after.regions) is None
    assert first_difference(seen.frame, after.frame) is None


def test_all_candidates_keep_to_the_keyframes_of_the_first(world: World) -> None:
    own = world.with_clips([7, 7])
    candidates = tuple(replace(c, interval=i) for c, i in zip(CANDIDATES, (3, 0, 2, 0), strict=True))
    result = measure(own.model, own.task, own.store, Clairvoyant(candidates, 0.3, 2), grid=own.grid)
    assert result.keyframes.tolist() == [3, 3]
    assert result.policy.tolist() == [0.0, 0.0]


def test_a_preview_ends_with_the_clip(world: World) -> None:
    own = world.with_clips([4, 4])
    simulator = own.simulator(2)
    simulator.start(range(2), range(2))
    first: Decision = CANDIDATES[0].decide(FrameView(simulator))
    assert len(FrameView(simulator).preview(first, CANDIDATES[0], 2)) == 2
    assert len(FrameView(simulator).preview(first, CANDIDATES[0], 9)) == 3


def test_impossible_clairvoyants_are_refused() -> None:
    for candidates, trade_off, horizon in [((), 0.3, 8), (CANDIDATES, 0.0, 8), (CANDIDATES, 0.3, 0)]:
        with pytest.raises(PolicyError, match="needs candidates, a horizon"):
            Clairvoyant(candidates, trade_off, horizon)
    with pytest.raises(PolicyError, match="one kappa"):
        Clairvoyant((CANDIDATES[0], replace(CANDIDATES[1], kappa=(1.0, 2.0, 4.0))), 0.3)
