"""A region policy learned by gradients, on problems of a tiny network."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from resq_rl.envs import Conditions, NetworkEngine, Problem, measure
from resq_rl.errors import PolicyError, SettingsError
from resq_rl.policies import GradientSettings, GroupThresholds, LearnedPolicy
from resq_rl.policies.gradient import descend, first_thresholds
from resq_rl.policies.gradient_policy import PassFigures, learn_policy
from resq_rl.policies.unrolled_clips import RegionOffsets, UnrolledClips
from tests.envs import problems

QUICK = GradientSettings(frames=300, window=3, clips=3)


@pytest.fixture(scope="module")
def learned() -> tuple[Problem, LearnedPolicy, list[PassFigures]]:
    problem, figures = problems.make_problem(), list[PassFigures]()
    return problem, learn_policy(problem, problems.scheme(problem), QUICK, on_pass=figures.append), figures


def test_it_begins_at_static_thresholds_and_moves_from_them(
    learned: tuple[Problem, LearnedPolicy, list[PassFigures]],
) -> None:
    problem, policy, _ = learned
    assert len(policy.scheme.base) == QUICK.knots
    assert len(policy.scheme.base[0]) == len(problem.model.sites)
    assert any(bool(weight.abs().max() > 0) for weight in policy.weights[-1:])
    assert policy.macs == sum(w.numel() for w in policy.weights) * policy.scheme.regions


def test_its_beginning_is_the_policy_of_its_thresholds(
    learned: tuple[Problem, LearnedPolicy, list[PassFigures]],
) -> None:
    """At the ends of the range of lambda, it gives what static thresholds per layer give, and costs nothing itself."""
    problem, policy, _ = learned
    for row, trade_off in zip((0, -1), policy.trade_off_range, strict=True):
        static = GroupThresholds(policy.reference, 0, taus=policy.scheme.base[row], kappa=policy.scheme.kappa)
        expected, found = measure(problem, static), measure(problem, policy.beginning().at(trade_off))
        assert found.bops == pytest.approx(expected.bops, rel=1e-3)
        assert found.accuracy == pytest.approx(expected.accuracy, abs=1e-3)
        assert not found.policy.any()
        assert found.settings["static"] is True


def test_the_thresholds_that_are_trained_are_those_that_are_deployed(
    learned: tuple[Problem, LearnedPolicy, list[PassFigures]],
) -> None:
    """The network of training and the deployed one in float decide alike for the same state."""
    problem, policy, _ = learned
    policy = replace(policy, bits=32)
    offsets = RegionOffsets(policy.scheme, (16, 16), torch.Generator())
    for layer, weight, bias in zip(offsets.layers, policy.weights, policy.biases, strict=True):
        layer.weight.data, layer.bias.data = weight.clone(), bias.clone()
    first = GroupThresholds(taus=policy.scheme.base[0], interval=0, kappa=policy.scheme.kappa)
    clips = UnrolledClips(problem, first, QUICK, 0)
    clips.offsets = offsets
    low, _ = policy.trade_off_range
    conditions = Conditions(torch.full((3,), low), policy.trade_off_range, torch.ones(3), torch.ones(3))
    clips.start(torch.tensor([0, 1, 2]).numpy(), conditions)
    (part,) = clips.parts
    inputs = clips.engine.inputs(part.clip, torch.ones(3, dtype=torch.int64))
    log_taus = torch.tensor(policy.scheme.base[0]).log().expand(3, -1)
    trained = clips._moved(part, log_taus, inputs).exp()
    observation = NetworkEngine(problem).observe(inputs, part.state, conditions)
    field = policy.decision(observation, part.state.age).field
    torch.testing.assert_close(trained, field.thresholds)  # type: ignore[union-attr]


def test_a_seed_gives_the_same_policy_again(
    learned: tuple[Problem, LearnedPolicy, list[PassFigures]], tmp_path: Path
) -> None:
    problem, policy, figures = learned
    again = learn_policy(problem, problems.scheme(problem), QUICK)
    for folder, one in (("a", policy), ("b", again)):
        one.save(tmp_path / folder)
    for name in ("policy.json", "policy.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert figures[-1].frames >= QUICK.frames
    assert [f.frames for f in figures] == sorted(f.frames for f in figures)


def test_files_keep_policies_with_a_network_and_without(
    learned: tuple[Problem, LearnedPolicy, list[PassFigures]], tmp_path: Path
) -> None:
    problem, policy, _ = learned
    for kept in (policy, policy.beginning()):
        kept.save(tmp_path)
        loaded = LearnedPolicy.load(tmp_path)
        assert (loaded.scheme, loaded.static, loaded.settings) == (kept.scheme, kept.static, kept.settings)
        assert measure(problem, loaded).bops == measure(problem, kept).bops


def test_gradients_move_network_and_thresholds(problem: Problem) -> None:
    clips = UnrolledClips(problem, GroupThresholds(taus=(1.0,) * 3, interval=0), QUICK, 0)
    knots, log_taus = first_thresholds(clips)
    before = log_taus.detach().clone()
    scheme = problems.scheme(problem).on(before.exp().tolist(), problem.model.group_of_site.tolist())
    clips.offsets = RegionOffsets(scheme, (4,), torch.Generator().manual_seed(0))
    head = clips.offsets.head.weight.detach().clone()
    assert not head.any()
    descend(clips, knots, log_taus)
    assert not torch.equal(before, log_taus.detach())
    assert not torch.equal(head, clips.offsets.head.weight.detach())


def test_other_actions_are_refused(problem: Problem) -> None:
    with pytest.raises(SettingsError, match="or train by PPO"):
        learn_policy(problem, problems.scheme(problem, "region_bits"), QUICK)


def test_too_few_frames_are_refused(problem: Problem) -> None:
    with pytest.raises(SettingsError, match="Of 20 environment frames nothing is left"):
        learn_policy(problem, problems.scheme(problem), GradientSettings(frames=20, clips=1))


def test_a_policy_without_a_base_has_no_beginning(problem: Problem) -> None:
    scheme = problems.scheme(problem)
    weights = (torch.zeros(len(scheme.nvec), scheme.observation_size),)
    policy = LearnedPolicy(weights, (torch.zeros(len(scheme.nvec)),), scheme, 0.2, (0.1, 1.0))
    with pytest.raises(PolicyError, match="no static beginning"):
        policy.beginning()


def test_factors_are_evenly_spaced(problem: Problem) -> None:
    scheme = problems.scheme(problem).on([[0.5, 1.0, 2.0]], [0, 1, 2])
    ratios = {round(math.log(b / a), 6) for a, b in zip(scheme.thresholds, scheme.thresholds[1:], strict=False)}
    assert len(ratios) == 1
    assert scheme.thresholds[scheme.neutral] == 1
