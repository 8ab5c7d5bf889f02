"""What each fixed policy decides, and which of them are the same thing."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from resq_rl.envs import Decision, FrameView, Policy, Problem, measure
from resq_rl.envs.observation import FRAME_FEATURES
from resq_rl.errors import PolicyError
from resq_rl.policies import (
    DynamicResQ,
    FrameMagnitude,
    GroupThresholds,
    PerFrame,
    RandomLevels,
    SkipGate,
    StaticResQ,
    periodic,
)
from resq_rl.quantization import DEFAULT_KAPPA, LevelField, Reference, ThresholdField
from tests.envs import problems
from tests.envs.problems import assert_same, first_difference


def measures_the_same(problem: Problem, one: Policy, other: Policy) -> None:
    names = ("counts", "keyframe", "residual", "peak", "keyframes")
    assert_same(measure(problem, one), measure(problem, other), names)


def levels_of(decision: Decision) -> torch.Tensor:
    assert isinstance(decision.field, LevelField)
    return decision.field.levels


def thresholds_of(decision: Decision) -> torch.Tensor:
    assert isinstance(decision.field, ThresholdField)
    return decision.field.thresholds


@pytest.mark.parametrize("interval", [1, 2, 5])
def test_periodic_keyframes_fall_on_multiples_of_the_interval(interval: int, problem: Problem) -> None:
    view = problems.view(problem, 3)
    view.age = torch.tensor([0, interval - 2, interval - 1])
    assert periodic(view.age, interval).tolist() == [a + 1 >= interval for a in view.age.tolist()]
    assert not periodic(view.age, 0).any()


def test_per_frame_refreshes_always(problem: Problem) -> None:
    assert PerFrame().decide(problems.view(problem, 3)).refresh.tolist() == [True, True, True]


def test_static_resq_decides_one_level(problem: Problem) -> None:
    decision = StaticResQ("keyframe", 4, level=1).decide(problems.view(problem, 2))
    assert decision.refresh.tolist() == [False, False]
    assert (levels_of(decision) == 1).all()


def test_dynamic_resq_decides_one_threshold(problem: Problem) -> None:
    decision = DynamicResQ(tau=0.7, kappa=(1.0, 3.0, 9.0)).decide(problems.view(problem, 2))
    assert (thresholds_of(decision) == torch.tensor(0.7)).all()
    assert isinstance(decision.field, ThresholdField)
    assert tuple(decision.field.kappa) == (1.0, 3.0, 9.0)
    assert DynamicResQ().kappa == DEFAULT_KAPPA


def test_group_thresholds_differ_by_layer_group_only(problem: Problem) -> None:
    decision = GroupThresholds(taus=(0.5, 1.0, 2.0)).decide(problems.view(problem, 2))
    assert thresholds_of(decision).flatten(2).mean(2).tolist() == [[0.5, 1.0, 2.0], [0.5, 1.0, 2.0]]
    with pytest.raises(PolicyError, match="3 layer groups, or 3 layers, need as many thresholds, got 2"):
        GroupThresholds(taus=(0.5, 1.0)).decide(problems.view(problem, 2))


@pytest.mark.parametrize("reference", ["previous", "keyframe"])
def test_dynamic_resq_is_group_thresholds_all_equal(reference: Reference, problem: Problem) -> None:
    dynamic = DynamicResQ(reference, 3, tau=0.6)
    measures_the_same(problem, dynamic, GroupThresholds(reference, 3, taus=(0.6, 0.6, 0.6)))


def test_raising_one_groups_threshold_saves_in_that_group(problem: Problem) -> None:
    equal = measure(problem, GroupThresholds("previous", 0, taus=(0.5, 0.5, 0.5)))
    for group in range(3):
        taus = [0.5, 0.5, 0.5]
        taus[group] = 1000.0
        assert measure(problem, GroupThresholds("previous", 0, taus=tuple(taus))).bops < equal.bops


@pytest.mark.parametrize("by_group", [True, False])
def test_dynamic_resq_is_the_constant_action_of_region_thresholds(by_group: bool, problem: Problem) -> None:
    scheme = problems.scheme(problem, "region_thresholds", "frame", by_group=by_group)
    index = 4
    core = problems.agents(problem, 2, "region_thresholds", "frame", by_group=by_group)
    core.reset([0, 1])
    action = scheme.uniform_action(index)
    clips = core.streams.clip.tolist()
    heuristic = problems.streams(problem.subset(clips), len(clips), trade_off_range=(0.3, 1.0)).run(
        DynamicResQ("previous", 0, tau=scheme.thresholds[index])
    )
    next(heuristic)
    for t, (_, expected) in enumerate(heuristic):
        step = core.step(torch.tensor(action).expand(2, -1).numpy())
        assert_same(step.result, expected, ("prediction", "share", "error"), f"frame {t + 1}")


def test_a_scene_change_runs_as_a_keyframe(problem: Problem) -> None:
    view = problems.view(problem, 2)
    residual = view.observation.frame[:, FRAME_FEATURES.index("frame_residual_mean")]
    between = float(residual.mean())
    assert len(residual.unique()) == 2
    decision = DynamicResQ(interval=0, scene_change=between).decide(view)
    assert decision.refresh.tolist() == (residual > between).tolist()
    assert DynamicResQ(interval=0, scene_change=1.0).decide(view).refresh.tolist() == [False, False]
    assert DynamicResQ(scene_change=0.4).settings["scene_change"] == 0.4
    thresholds = GroupThresholds(interval=0, taus=(1.0,) * problem.groups, scene_change=between)
    assert thresholds.decide(view).refresh.tolist() == decision.refresh.tolist()
    with pytest.raises(PolicyError, match="change of scene must be positive"):
        SkipGate(scene_change=-0.1)


def residuals_by_hand(problem: Problem, clips: int) -> list[float]:
    """Square root of the mean over pixels of the largest difference of a channel between the first two frames."""
    found = []
    for clip in problem.clips[:clips]:
        first, second = clip.frames[:2].double() / 255
        found.append(float((second - first).abs().amax(0).mean().sqrt()))
    return found


@pytest.mark.parametrize("reference", ["previous", "keyframe"])
@pytest.mark.parametrize("tau", [0.01, 0.2, 0.25, 0.3, 0.4, 1.0])
@pytest.mark.parametrize("kappa", [(0.5, 1.0, 1.4), (0.9, 1.3)])
def test_the_frames_residual_chooses_its_level(
    tau: float, kappa: tuple[float, ...], reference: Reference, problem: Problem
) -> None:
    view = problems.view(problem, 4, reference=reference)
    residuals = residuals_by_hand(problem, 4)
    assert view.observation.frame[:, FRAME_FEATURES.index("frame_residual_mean")].tolist() == pytest.approx(residuals)
    decision = FrameMagnitude(reference, 0, tau=tau, kappa=kappa).decide(view)
    levels = [len([k for k in kappa if m > tau * k]) for m in residuals]
    assert levels_of(decision).amax((1, 2, 3)).tolist() == levels_of(decision).amin((1, 2, 3)).tolist() == levels
    assert decision.refresh.tolist() == [False] * 4


def test_the_frames_residual_must_exceed_its_thresholds(problem: Problem) -> None:
    view = problems.view(problem, 2)
    own = view.observation.frame[:, FRAME_FEATURES.index("frame_residual_mean")].tolist()
    assert own[0] < own[1]
    for index, level in ((0, [0, 1]), (1, [0, 0])):
        policy = FrameMagnitude("keyframe", 0, tau=own[index], kappa=(1.0, 4.0), scene_change=own[index])
        decision = policy.decide(view)
        assert levels_of(decision)[:, 0, 0, 0].tolist() == level
        assert decision.refresh.tolist() == [bool(n) for n in level]


@pytest.mark.parametrize(("interval", "scene_change"), [(0, 0.25), (3, 1.0), (3, 0.25), (0, 1.0), (1, 1.0)])
def test_keyframes_come_with_the_interval_or_a_large_residual(
    interval: int, scene_change: float, problem: Problem
) -> None:
    view = problems.view(problem, 4)
    view.age = torch.tensor([0, 1, 2, 5])
    residuals = residuals_by_hand(problem, 4)
    assert min(residuals) < 0.25 < max(residuals)
    due = [interval > 0 and age + 1 >= interval for age in (0, 1, 2, 5)]
    expected = [d or m > scene_change for d, m in zip(due, residuals, strict=True)]
    decided = FrameMagnitude("keyframe", interval, tau=0.3, scene_change=scene_change).decide(view)
    assert decided.refresh.tolist() == expected


def test_a_higher_threshold_of_frames_spends_less(problem: Problem) -> None:
    bops = [measure(problem, FrameMagnitude("keyframe", 0, tau=tau)).bops for tau in (0.01, 0.2, 0.3, 0.4, 100.0)]
    assert bops == sorted(bops, reverse=True)
    assert len(set(bops)) > 3
    assert bops[-1] == pytest.approx(4 / problem.frames)


def test_one_magnitude_for_all_levels_is_static_resq(problem: Problem) -> None:
    for tau, level in ((0.01, 3), (1.0, 0)):
        static = StaticResQ("keyframe", 4, level=level)
        measures_the_same(problem, FrameMagnitude("keyframe", 4, tau=tau, kappa=(1.0, 2.0, 3.0)), static)


def test_a_higher_threshold_spends_less(problem: Problem) -> None:
    bops = [measure(problem, DynamicResQ("previous", 0, tau=tau)).bops for tau in (0.1, 0.5, 1.0, 3.0, 1000.0)]
    assert bops == sorted(bops, reverse=True)
    assert bops[-1] == pytest.approx(4 / problem.frames)


def bits_of_head_pixels(problem: Problem, policy: Policy) -> set[float]:
    """Activation bits of every pixel of the 1x1 head, from its cost: one region per pixel of the head."""
    own = replace(problem, grid=(16, 24))
    frames = problems.streams(own, 1).run(policy)
    next(frames)
    seen: set[float] = set()
    for _, result in frames:
        seen |= {round(v, 9) for v in (result.cost.bops[0, -1] / (4 * 8 * 3)).flatten().tolist()}
    return seen


def test_skip_gate_uses_the_first_and_the_last_level_only(problem: Problem) -> None:
    assert bits_of_head_pixels(problem, SkipGate("previous", 0, tau=0.5)) == {0.0, 8.0}
    assert bits_of_head_pixels(problem, DynamicResQ("previous", 0, tau=0.2)) == {0.0, 2.0, 4.0, 8.0}


def test_random_levels_are_reproducible_and_uniform(problem: Problem) -> None:
    view = problems.view(problem, 4)
    drawn = [levels_of(RandomLevels(levels=4, seed=s).decide(view)) for s in (0, 0, 1)]
    assert (drawn[0] == drawn[1]).all()
    assert (drawn[0] != drawn[2]).any()
    assert drawn[0].shape == (4, 3, *problem.grid)
    policy = RandomLevels(levels=4, seed=3)
    many = torch.cat([levels_of(policy.decide(view)).flatten() for _ in range(50)])
    assert torch.bincount(many).tolist() == pytest.approx([len(many) / 4] * 4, rel=0.1)
    assert (
        first_difference(
            measure(problem, RandomLevels(levels=4)).residual, measure(problem, RandomLevels(levels=4)).residual
        )
        is None
    )


@pytest.mark.parametrize(
    ("policy", "settings"),
    [
        (PerFrame(), {"reference": "previous", "interval": 1}),
        (StaticResQ("keyframe", 4, level=1), {"reference": "keyframe", "interval": 4, "level": 1}),
        (DynamicResQ(tau=0.7), {"reference": "previous", "interval": 8, "tau": 0.7, "kappa": [1.0, 2.0, 8.0]}),
        (
            FrameMagnitude("keyframe", 3, tau=0.3, kappa=(0.5, 1.0)),
            {"reference": "keyframe", "interval": 3, "tau": 0.3, "kappa": [0.5, 1.0]},
        ),
        (
            FrameMagnitude(tau=0.3, kappa=(0.5, 1.0), scene_change=0.4),
            {"reference": "previous", "interval": 8, "tau": 0.3, "kappa": [0.5, 1.0], "scene_change": 0.4},
        ),
        (SkipGate(tau=0.7), {"reference": "previous", "interval": 8, "tau": 0.7}),
        (
            GroupThresholds(interval=0, taus=(1.0,)),
            {"reference": "previous", "interval": 0, "taus": [1.0], "kappa": [1.0, 2.0, 8.0]},
        ),
        (RandomLevels(levels=4, seed=2, interval=16), {"reference": "previous", "interval": 16, "seed": 2}),
    ],
)
def test_settings_identify_a_policy_that_costs_nothing(policy: Policy, settings: dict[str, Any]) -> None:
    assert policy.settings == settings
    assert policy.macs == 0
    assert isinstance(policy, Policy)


def test_an_interval_below_zero_is_refused() -> None:
    for kind in (StaticResQ, FrameMagnitude):
        with pytest.raises(PolicyError, match=r"interval must be 0 .* or more, got -1"):
            kind("previous", -1)


def test_the_observation_is_not_computed_for_policies_that_do_not_look(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    def looked(view: FrameView) -> None:
        raise AssertionError("a fixed policy looked at the observation")

    monkeypatch.setattr(FrameView, "observation", property(looked))
    for policy in (PerFrame(), StaticResQ(), DynamicResQ(), SkipGate(), RandomLevels(levels=4)):
        measure(problem, policy)
