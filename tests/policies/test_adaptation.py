"""A policy that goes on learning: on clips of other video, and from the stream that a runner runs."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from resq_rl.envs import Conditions, Decision, NetworkEngine, Policy, Problem
from resq_rl.errors import PolicyError, SettingsError
from resq_rl.policies import AdaptiveRunner, DynamicResQ, GradientSettings, LearnedPolicy, Runner, adaptation
from resq_rl.policies.gradient_policy import adapt_policy, learn_policy
from resq_rl.quantization import Budget, ThresholdField
from tests.envs import problems
from tests.policies.test_learned import made

QUICK = GradientSettings(frames=300, window=3, clips=3)
OTHER = GradientSettings(frames=450, window=3, clips=3, learning_rate=0.03, network_rate=0.004)
EVERY, FRAMES = 6, 4


@pytest.fixture(scope="module")
def policy(problem: Problem) -> LearnedPolicy:
    return learn_policy(problem, problems.scheme(problem), QUICK)


@pytest.fixture
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adaptation, "EVERY", EVERY)
    monkeypatch.setattr(adaptation, "FRAMES", FRAMES)


@pytest.fixture(scope="module")
def other(problem: Problem) -> Problem:
    """The same network before video with more noise than the policy has seen."""
    generator = torch.Generator().manual_seed(3)
    noisy = []
    for clip in problems.tiny_clips((8, 8, 8), seed=40, labels=False):
        noise = torch.rand(clip.frames.shape, generator=generator) * 50
        noisy.append(replace(clip, frames=(clip.frames * 0.8 + noise).byte()))
    return Problem.prepare(problem.model, problem.task, noisy, grid=problem.grid, source="teacher")


@torch.no_grad()
def loss(problem: Problem, policy: LearnedPolicy) -> float:
    """Mean divergence and lambda times BOPs over the residual frames of all clips, at the policy's own lambda."""
    engine, found = NetworkEngine(problem), []
    at = policy.scheme.learned_at
    trade_off = float(np.exp(np.interp(policy.place, np.linspace(0, 1, len(at)), np.log(at))))
    conditions = Conditions.alone(policy.trade_off, policy.trade_off_range)
    for clip in range(len(problem)):
        state = engine.new_state(1, policy.reference)
        for t in range(len(problem.clips[clip])):
            clips, times = torch.tensor([clip]), torch.tensor([t])
            inputs = engine.inputs(clips, times)
            if t:
                decision = policy.decision(engine.observe(inputs, state, conditions), state.age)
            else:
                decision = Decision(torch.tensor([True]), ThresholdField(torch.ones(1, problem.groups, 1, 1)))
            output, _, cost = engine.unrolled(inputs, state, decision, 3.0)
            divergence = problem.task.divergence(output, engine.float_output(clips, times))
            found += [float(divergence) + trade_off * float(cost.total) / problem.reference_bops] if t else []
    return float(np.mean(found))


def ran(runner: Runner, problem: Problem) -> list[tuple[torch.Tensor, float]]:
    """Predictions and BOPs of the frames of all clips as one stream."""
    results = (runner(frame) for clip in problem.clips for frame in clip.frames)
    return [(prediction, cost.bops) for prediction, cost in results]


@pytest.mark.parametrize("whole_range", [True, False])
def test_it_does_better_on_the_video_that_it_adapted_to(
    whole_range: bool, policy: LearnedPolicy, other: Problem
) -> None:
    """The policy is at the geometric middle of its range of lambda."""
    low, high = policy.trade_off_range
    adapted = adapt_policy(policy, other, OTHER, whole_range=whole_range)
    assert loss(other, adapted) < loss(other, policy)
    assert adapted.scheme.learned_at == policy.scheme.learned_at == pytest.approx((low, (low * high) ** 0.5, high))
    assert (adapted.trade_off, adapted.trade_off_range) == (policy.trade_off, policy.trade_off_range)


def test_its_beginning_adapts_too(policy: LearnedPolicy, other: Problem) -> None:
    static = policy.beginning()
    adapted = adapt_policy(static, other, OTHER)
    assert adapted.static
    assert loss(other, adapted) < loss(other, static)


def test_one_lambda_moves_the_thresholds_between_which_it_lies(policy: LearnedPolicy, other: Problem) -> None:
    adapted = adapt_policy(policy.at(policy.trade_off_range[0]), other, OTHER, whole_range=False)
    changed = [a != b for a, b in zip(adapted.scheme.base, policy.scheme.base, strict=True)]
    assert changed == [True, False, False]


@pytest.mark.usefixtures("_often")
def test_a_runner_learns_from_its_stream_again_and_again(policy: LearnedPolicy, other: Problem) -> None:
    """Until it first has, it runs as one that does not; the same stream teaches the same."""
    frames = sum(len(clip) for clip in other.clips)
    plain, adaptive = Runner(policy, other), AdaptiveRunner(policy, other)
    expected, found = ran(plain, other), ran(adaptive, other)
    assert adaptive.learned == frames // EVERY
    assert [cost for _, cost in found[:EVERY]] == [cost for _, cost in expected[:EVERY]]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(found[:EVERY], expected[:EVERY], strict=True))
    assert [cost for _, cost in found[EVERY:]] != [cost for _, cost in expected[EVERY:]]
    assert isinstance(adaptive.policy, LearnedPolicy)
    assert loss(other, adaptive.policy) < loss(other, policy)
    assert ran(AdaptiveRunner(policy, other), other)[-1][1] == found[-1][1]


@pytest.mark.usefixtures("_often")
def test_a_new_video_begins_with_what_was_learned(policy: LearnedPolicy, other: Problem) -> None:
    runner = AdaptiveRunner(policy, other)
    ran(runner, other.subset([0]))
    adapted, times = runner.policy, runner.learned
    assert times == 1
    runner.reset()
    _, cost = runner(other.clips[1].frames[0])
    assert cost.keyframe
    assert runner.policy is adapted
    for frame in other.clips[1].frames[1 : EVERY - 1]:
        runner(frame)
    assert runner.learned == times  # frames of the video before do not count


@pytest.mark.usefixtures("_often")
def test_gradients_stay_off_outside_of_learning(policy: LearnedPolicy, other: Problem) -> None:
    runner = AdaptiveRunner(policy, other)
    results = ran(runner, other)
    assert not any(prediction.requires_grad for prediction, _ in results)
    with torch.no_grad():  # as an application may run it
        assert ran(AdaptiveRunner(policy, other), other)[-1][1] == results[-1][1]
    with torch.inference_mode():
        assert ran(AdaptiveRunner(policy, other), other)[-1][1] == results[-1][1]


def refused(problem: Problem) -> dict[str, Policy]:
    scheme = problems.scheme(problem)
    layers = problem.model.group_of_site.tolist()
    return {
        "heuristic": DynamicResQ("previous", 4, tau=0.6),
        "thresholds": made(scheme, network=problem.model.groups),
        "searched base": made(scheme.on([[1.0] * len(layers)], layers), network=problem.model.groups),
    }


@pytest.mark.parametrize("name", ["heuristic", "thresholds", "searched base"])
def test_what_was_not_learned_by_gradients_is_refused(name: str, problem: Problem) -> None:
    with pytest.raises(PolicyError, match=r"cannot adapt: .* training\.trainer=gradient"):
        AdaptiveRunner(refused(problem)[name], problem)


def test_budgets_and_masks_to_begin_with_are_refused(
    policy: LearnedPolicy, problem: Problem, recurrent_problem: Problem
) -> None:
    with pytest.raises(SettingsError, match=r"running\.budget"):
        AdaptiveRunner(policy, problem, budget=Budget(peak=0.5))
    with pytest.raises(SettingsError, match="MaskPropagation"):
        AdaptiveRunner(DynamicResQ("previous", 4, tau=0.6), recurrent_problem)


def test_a_base_is_learned_at_as_many_values_as_it_has_rows(policy: LearnedPolicy) -> None:
    for wrong in (policy.scheme.learned_at[:1], (0.0, 1.0, 2.0)):
        with pytest.raises(SettingsError, match="as many positive values of lambda"):
            replace(policy.scheme, learned_at=wrong)
