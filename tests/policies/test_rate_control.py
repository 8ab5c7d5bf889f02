"""A rate controller: its formula, and what it does with a bucket."""

import math

import pytest
import torch

from resq_rl.envs import Problem
from resq_rl.errors import PolicyError
from resq_rl.policies import RateControl
from resq_rl.quantization import Budget, ThresholdField
from tests.envs import problems


@pytest.mark.parametrize("taus", [(0.5,), (0.3, 0.5, 0.9)])
def test_the_factor_by_hand(taus: tuple[float, ...], problem: Problem) -> None:
    """After two frames, of which what was spent is known."""
    budget = Budget(peak=0.6, mean=0.2, bucket=4.0)
    policy = RateControl(taus=taus, integral=2.0, proportional=0.5, fill=0.6)
    streams = problems.streams(problem, 2, budget=budget)
    streams.start([0, 1], [0, 1])
    result = streams.step(policy.decide(streams.view()))
    field = policy.decide(streams.view()).field
    assert isinstance(field, ThresholdField)
    for slot in range(2):
        left = float(streams.credit[slot]) / (4.0 * 0.2)
        factor = math.exp(2.0 * (0.6 - left) + 0.5 * (float(result.bops[slot]) / 0.2 - 1))
        wanted = [tau * factor for tau in (taus * 3 if len(taus) == 1 else taus)]
        assert field.thresholds[slot, :, 0, 0].tolist() == pytest.approx(wanted, rel=1e-5)


def test_what_a_quiet_stream_saves_is_spent_after_a_change(problem: Problem) -> None:
    """The bucket lets the first frame of other content cost more than the mean, up to the peak."""
    budget = Budget(peak=0.4, mean=0.1, bucket=6.0)
    streams = problems.streams(problem, 1, budget=budget)
    policy = RateControl(taus=(2.0,), fill=1.0)
    streams.start([0], [1])
    still = streams.engine.inputs(torch.tensor([1]), torch.tensor([0]))
    for _ in range(12):  # the first frame again and again
        limit = budget.limit(streams.credit)
        result = streams.engine.step(still, streams.state, policy.decide(streams.view()), limit)
        streams.credit = budget.after(streams.credit, result.bops)
    assert float(budget.left(streams.credit)) > 0.9
    changed = streams.engine.inputs(torch.tensor([2]), torch.tensor([3]))
    finest = RateControl(taus=(0.05,), integral=0.0).decide(streams.view())
    result = streams.engine.step(changed, streams.state, finest, budget.limit(streams.credit))
    assert 0.2 < float(result.bops) <= 0.4


def test_impossible_controllers_are_refused() -> None:
    with pytest.raises(PolicyError, match="gains of 0 or more and a fill from 0 to 1"):
        RateControl(taus=(1.0,), fill=1.5)
