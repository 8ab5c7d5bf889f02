"""Policies measured on tables against the same policies measured on the network."""

import math
from dataclasses import replace
from functools import lru_cache

import pytest
import torch

from resq_rl.envs import Measurement, Policy, TableSimulator
from resq_rl.errors import PolicyError
from resq_rl.perception import Segmentation
from resq_rl.policies import (
    DynamicResQ,
    FrameMagnitude,
    LearnedPolicy,
    PerFrame,
    Responses,
    Schedule,
    Scheduled,
    StaticResQ,
    measure_schedules,
    rollout,
)
from tests.envs.worlds import World
from tests.policies.test_learned import RANGE, made
from tests.policies.test_oracle import random_table, run, same, tables_of

MAGNITUDES = [
    FrameMagnitude("keyframe", interval, tau=tau, kappa=(0.5, 1.0, 1.4), scene_change=scene_change)
    for interval, tau, scene_change in [
        (0, 0.01, math.inf),
        (0, 0.3, math.inf),
        (3, 0.3, math.inf),
        (0, 0.3, 0.41),
        (2, 0.25, 0.35),
        (0, 0.9, 0.9),
    ]
]

SEEDS = (1, 3, 4, 5)
TASK = Segmentation(classes=2)


def responses_of(world: World) -> Responses:
    return Responses(world.model, world.task, world.store, tables_of(world))


def learned(world: World, seed: int, trade_off: float = 0.2) -> LearnedPolicy:
    """Of random weights, about a typical observation, so that levels and keyframes change from frame to frame."""
    policy = made(world.scheme("frame_level", "frame"), seed=seed, reference="keyframe")
    seen = policy.scheme.observe(world.view(len(world.store), reference="keyframe").observation)
    first, *others = policy.weights
    hidden = [torch.zeros_like(b) for b in policy.biases[1:-1]]
    middle = (torch.tensor(policy.scheme.nvec) - 1) / 2
    biases = (-10 * first @ torch.from_numpy(seen).mean(0), *hidden, middle)
    return replace(policy, weights=(10 * first, *others), biases=biases, trade_off=trade_off)


def replayed(world: World, policy: Policy) -> list[Schedule]:
    """The schedules of a world whose clips are of one length."""
    simulator = TableSimulator(
        world.model,
        world.task,
        world.store,
        tables_of(world),
        slots=len(world.store),
        trade_off_range=policy.trade_off_range,
    )
    return rollout(simulator, policy)


@lru_cache(maxsize=1)
def of_one_length(world: World) -> World:
    return world.with_clips([7, 7, 7], seed=20)


def assert_equal(mine: Measurement, expected: Measurement) -> None:
    same(mine, expected)
    assert mine.settings == expected.settings


# Measured on tables as on the network ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy",
    [
        *(
            StaticResQ("keyframe", interval, level=level)
            for interval, level in [(0, 0), (0, 3), (1, 2), (2, 1), (4, 2)]
        ),
        *MAGNITUDES,
        PerFrame("keyframe"),
    ],
    ids=repr,
)
def test_fixed_policies_measure_on_tables_as_on_the_network(policy: Policy, world: World, uneven_world: World) -> None:
    for own in (world, uneven_world):
        assert len({len(clip) for clip in own.store.clips}) > 1
        assert_equal(responses_of(own).measure(policy), run(own, policy))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("trade_off", [*RANGE, 0.2])
def test_learned_policies_measure_on_tables_as_on_the_network(seed: int, trade_off: float, world: World) -> None:
    policy = learned(world, seed, trade_off)
    result = responses_of(world).measure(policy)
    assert (result.policy > 0).all()
    assert_equal(result, run(world, policy))


def test_these_policies_choose_various_levels_and_keyframes(world: World) -> None:
    """The comparisons above mean something."""
    own = of_one_length(world)
    for policies in (MAGNITUDES, [learned(world, seed) for seed in SEEDS]):
        schedules = [schedule.levels for policy in policies for schedule in replayed(own, policy)]
        assert len(set(schedules)) > 5
        assert {level for levels in schedules for level in levels} == {None, 0, 1, 2, 3}


def test_the_schedules_of_a_rollout_replay_the_policy(world: World) -> None:
    own = of_one_length(world)
    policy = MAGNITUDES[3]
    schedules = tuple(replayed(own, policy))
    assert len(set(schedules)) > 1
    same(run(own, Scheduled(own.store, schedules)), run(own, policy))


def test_a_policy_of_more_than_one_level_is_refused(world: World) -> None:
    for policy in (DynamicResQ("keyframe"), made(world.scheme("region_bits", "frame"), reference="keyframe")):
        with pytest.raises(PolicyError, match="one level for all layer groups and regions"):
            responses_of(world).measure(policy)
        with pytest.raises(PolicyError, match="one level for all layer groups and regions"):
            replayed(of_one_length(world), policy)


# What deciding costs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("levels", "dearest"),
    [
        # By hand, from BOPs of 0.1, 0.2, 0.4 by level and 1 of a keyframe.
        ((None, 2, 0), 1.0),
        ((None, 2, None), 1.0 + 0.25),
        ((None,), 1.0),
        ((None, 1, 1), 1.0),
    ],
)
def test_every_frame_but_the_first_is_charged_for_the_decision(levels: tuple[int | None, ...], dearest: float) -> None:
    table = random_table(len(levels), 3, seed=1)
    table.bops[:] = table.bops.new_tensor([0.1, 0.2, 0.4, 1.0])
    result = measure_schedules(TASK, [table], [Schedule(levels)], {"a": 1}, policy_share=0.25)
    free = measure_schedules(TASK, [table], [Schedule(levels)], {"a": 1})
    assert result.policy.tolist() == [0.25 * (len(levels) - 1)]
    assert result.peak.tolist() == pytest.approx([dearest])
    assert not free.policy.any()
    assert free.peak.tolist() == [1.0]
    assert (result.keyframe, result.residual) == (free.keyframe, free.residual)
    assert result.keyframe.tolist() == [float(levels.count(None))]
    spent = sum((0.1, 0.2, 0.4)[level] for level in levels if level is not None)
    assert result.residual.tolist() == pytest.approx([spent])
    assert result.settings == {"a": 1}


def test_a_dear_policy_makes_a_residual_the_dearest_frame() -> None:
    table = random_table(2, 3, seed=1)
    table.bops[:] = table.bops.new_tensor([0.1, 0.2, 0.4, 1.0])
    result = measure_schedules(TASK, [table], [Schedule((None, 2))], {}, policy_share=0.7)
    assert result.peak.tolist() == pytest.approx([1.1])


@pytest.mark.parametrize(("tables", "schedules"), [(0, 0), (0, 1), (2, 1), (1, 2)])
def test_each_table_needs_a_schedule(tables: int, schedules: int) -> None:
    table, schedule = random_table(3, 2, seed=0), Schedule((None, 1, 0))
    with pytest.raises(PolicyError, match="A schedule for each clip is needed"):
        measure_schedules(TASK, [table] * tables, [schedule] * schedules, {})
