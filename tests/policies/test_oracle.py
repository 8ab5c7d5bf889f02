"""The oracle against brute force, and its schedules against really running them."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from resq_rl.envs import Decision, FrameView, Measurement, Policy, Problem, ResponseTable, measure
from resq_rl.envs.measure import batches
from resq_rl.errors import PolicyError
from resq_rl.perception import Segmentation, mean_iou
from resq_rl.policies import (
    DynamicResQ,
    FrameMagnitude,
    LearnedPolicy,
    PerFrame,
    Schedule,
    StaticResQ,
    best_schedule,
    best_schedule_within,
    measure_on_tables,
    measure_schedules,
    oracle_measurement,
)
from resq_rl.quantization import Budget, FrameCost, LevelField, Reference
from tests.envs import problems
from tests.envs.problems import assert_same, table_engine
from tests.policies.test_learned import RANGE, made

TRADE_OFFS = (0.001, 0.03, 0.1, 0.3, 1.0, 10.0)
Levels = tuple[int | None, ...]


def random_table(frames: int, levels: int, seed: int, ages: int | None = None) -> ResponseTable:
    """Errors that fall with the level and grow with age on average; costs rise with the level."""
    generator = torch.Generator().manual_seed(seed)
    ages = ages or frames

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    error = uniform(frames, ages, levels, 1, 1)
    error += 0.1 * torch.arange(ages)[:, None, None, None] - 0.2 * torch.arange(levels)[:, None, None]
    error[:, 0] = uniform(frames, 1, 1, 1)
    error[torch.arange(frames)[:, None] + torch.arange(ages) >= frames] = torch.nan
    bops = torch.cat([uniform(levels).sort().values, torch.ones(1)]).double()
    return ResponseTable(
        torch.randint(9, (frames, ages, levels, 2, 2), generator=generator),
        error,
        torch.zeros(frames, ages, levels, 1, 1, 3),
        torch.zeros(frames, ages, 1, 1, 2),
        torch.zeros(frames, ages),
        torch.zeros(frames, 1, 1),
        torch.zeros(frames, 1, 1),
        FrameCost(bops[:, None, None, None], torch.arange(levels + 1) == levels, uniform(levels + 1).double()),
        bops,
        100,
    )


def walk(table: ResponseTable, levels: Levels) -> tuple[float, float]:
    """Error and BOPs of a schedule, frame by frame; infinite where a keyframe is older than the table knows."""
    error = bops = 0.0
    key = 0
    for t, level in enumerate(levels):
        key = t if level is None else key
        if t - key >= table.ages:
            return float("inf"), float("inf")
        error += float(table.region_error[key, t - key, level or 0].double().mean())
        bops += float(table.bops[table.levels if level is None else level])
    return error, bops


def cost(table: ResponseTable, levels: Levels, trade_off: float) -> float:
    error, bops = walk(table, levels)
    return error + trade_off * bops


def all_schedules(frames: int, levels: int) -> list[Levels]:
    return [(None, *rest) for rest in product((None, *range(levels)), repeat=frames - 1)]


# The best schedule -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [3, 4])
@pytest.mark.parametrize("ages", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", range(3))
def test_no_schedule_is_better_on_random_tables(levels: int, ages: int, seed: int) -> None:
    table = random_table(5, levels, seed, ages)
    walked = {s: walk(table, s) for s in all_schedules(5, levels)}
    chosen = set()
    for trade_off in TRADE_OFFS:
        best = min(walked, key=lambda s: walked[s][0] + trade_off * walked[s][1])
        found = best_schedule(table, trade_off).levels
        assert found == best, f"lambda {trade_off}"
        chosen.add(found)
    assert len(chosen) > 1 or ages == 1


def test_no_schedule_is_better_on_a_real_network(problem: Problem) -> None:
    for index in (0, 2):
        table = table_engine(problem).tables[index]
        assert (table.frames, table.levels) == (5, 4)
        walked = [walk(table, s) for s in all_schedules(5, 4)]
        for trade_off in TRADE_OFFS:
            least = min(error + trade_off * bops for error, bops in walked)
            assert cost(table, best_schedule(table, trade_off).levels, trade_off) == pytest.approx(least, rel=1e-9)


@pytest.mark.parametrize("trade_off", TRADE_OFFS)
def test_no_static_or_random_schedule_is_better_on_long_clips(trade_off: float) -> None:
    table = random_table(24, 4, seed=5)
    least = cost(table, best_schedule(table, trade_off).levels, trade_off)
    static = [
        tuple(None if t % (interval or 24) == 0 else level for t in range(24))
        for interval, level in product(range(24), range(4))
    ]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(-1, 4, (300, 24), generator=generator).tolist()
    for levels in static + [(None, *(None if n < 0 else n for n in own[1:])) for own in drawn]:
        assert least <= cost(table, levels, trade_off) + 1e-12, f"{levels}"


@pytest.mark.parametrize("seed", range(10))
def test_a_larger_lambda_never_spends_more_nor_errs_less(seed: int) -> None:
    table = random_table(16, 4, seed)
    walked = [walk(table, best_schedule(table, 0.001 * 1.3**i).levels) for i in range(40)]
    errors, bops = [error for error, _ in walked], [spent for _, spent in walked]
    assert bops == sorted(bops, reverse=True)
    assert errors == sorted(errors)
    assert len(set(bops)) > 5


def test_where_bits_are_free_or_dear(problem: Problem) -> None:
    table = table_engine(problem).tables[1]
    assert best_schedule(table, 1e6).levels == (None, *[0] * 6)
    equal = replace(table, region_error=torch.zeros_like(table.region_error))
    equal.region_error[:, 0] = -1.0
    assert best_schedule(equal, 1e-6).levels == (None,) * 7


def test_lambda_is_positive() -> None:
    with pytest.raises(PolicyError, match=r"lambda must be positive, got 0\.0"):
        best_schedule(random_table(3, 2, 0), 0.0)


# Under a budget ----------------------------------------------------------------------------------------------------


def keeps(table: ResponseTable, levels: Levels, budget: Budget) -> bool:
    """Whether every frame of a schedule costs no more than the peak and the credit of the bucket."""
    mean = budget.mean or 1.0
    credit = min(budget.peak, budget.bucket * mean)
    for level in levels:
        spent = float(table.bops[table.levels if level is None else level])
        if spent > min(budget.peak, credit) + 1e-9:
            return False
        credit = min(credit - spent + mean, budget.bucket * mean)
    return True


@given(
    st.integers(1, 5), st.integers(1, 3), st.integers(1, 5), st.floats(0.15, 1.0), st.floats(1, 12), st.integers(0, 99)
)
@settings(max_examples=40)
def test_no_schedule_within_a_budget_is_better(
    frames: int, levels: int, ages: int, mean: float, bucket: float, seed: int
) -> None:
    table, budget = random_table(frames, levels, seed, min(ages, frames)), Budget(mean=mean, bucket=bucket)
    within = [s for s in all_schedules(frames, levels) if keeps(table, s, budget)]
    errors = {s: walk(table, s)[0] for s in within}
    if not errors or min(errors.values()) == math.inf:
        with pytest.raises(PolicyError, match="budget"):
            best_schedule_within(table, budget)
        return
    best = best_schedule_within(table, budget).levels
    assert keeps(table, best, budget)
    assert errors[best] == pytest.approx(min(errors.values()), abs=1e-12)


def test_a_budget_that_never_binds_leaves_the_best_keyframe_or_level_of_each_frame() -> None:
    table = random_table(6, 3, seed=1)
    free = best_schedule_within(table, Budget())
    assert walk(table, free.levels)[0] == pytest.approx(min(walk(table, s)[0] for s in all_schedules(6, 3)))
    assert best_schedule_within(table, Budget(mean=0.9, bucket=5)) != free


def test_a_budget_without_a_first_keyframe_is_refused() -> None:
    for budget in (Budget(peak=0.9), Budget(mean=0.1, bucket=8)):
        with pytest.raises(PolicyError, match=r"begins with a keyframe, which costs 1, and the budget allows"):
            best_schedule_within(random_table(3, 2, 0), budget)


# What it gives -----------------------------------------------------------------------------------------------------


def same(mine: Measurement, expected: Measurement) -> None:
    assert_same(mine, expected, ("counts", "frames", "keyframes"))
    for name in ("error", "keyframe", "residual", "policy", "peak", "elementwise"):
        torch.testing.assert_close(getattr(mine, name), getattr(expected, name), rtol=1e-12, atol=0, msg=name)
    assert mine.state_bytes == expected.state_bytes
    assert mine.accuracy == expected.accuracy
    assert mine.bops == pytest.approx(expected.bops, rel=1e-12)


class Replay:
    """Plays one schedule in each slot. A view tells neither clip nor frame, so it counts the frames itself."""

    reference: Reference = "keyframe"
    trade_off = 1.0
    trade_off_range = (1.0, 1.0)
    macs = 0
    bits = 8
    settings: ClassVar[dict[str, object]] = {}

    def __init__(self, schedules: Sequence[Schedule]) -> None:
        self.schedules = schedules
        self.time = 0

    def decide(self, view: FrameView) -> Decision:
        """The next frame of every schedule."""
        self.time += 1
        chosen = [schedule.levels[self.time] for schedule in self.schedules]
        levels = torch.tensor([level or 0 for level in chosen])[:, None, None, None]
        return Decision(torch.tensor([n is None for n in chosen]), LevelField(levels.expand(-1, view.groups, 1, 1)))


def check_on_network(problem: Problem, schedules: Sequence[Schedule], slots: int = 32) -> None:
    """Schedules measured on tables equal the same schedules run on the network, so many clips at a time."""
    tables = table_engine(problem).tables
    for batch in batches(problem, slots):
        own = [schedules[i] for i in batch]
        expected = measure(problem.subset(batch), Replay(own), slots=slots)
        same(measure_schedules(problem.task, [tables[i] for i in batch], own, {}), expected)


@pytest.mark.parametrize(("trade_off", "slots"), [(0.003, 1), (0.1, 2), (0.1, 32), (1.0, 32)])
def test_the_network_gives_what_the_oracle_says(trade_off: float, slots: int, problem: Problem) -> None:
    tables = table_engine(problem).tables
    schedules = [best_schedule(table, trade_off) for table in tables]
    assert len(set(schedules)) > 1 or trade_off == 1.0
    check_on_network(problem, schedules, slots)
    same(oracle_measurement(problem.task, tables, trade_off), measure_schedules(problem.task, tables, schedules, {}))


def test_random_schedules_cost_what_the_table_says(problem: Problem) -> None:
    generator, tables = torch.Generator().manual_seed(3), table_engine(problem).tables
    schedules = []
    for clip in problem.clips:
        drawn = torch.randint(-2, 4, (len(clip),), generator=generator).tolist()
        schedules.append(Schedule((None, *(None if n < 0 else n for n in drawn[1:]))))
    check_on_network(problem, schedules)
    result = measure_schedules(problem.task, tables, schedules, {})
    for index, (table, schedule) in enumerate(zip(tables, schedules, strict=True)):
        assert float(result.clip_bops[index]) == pytest.approx(walk(table, schedule.levels)[1], rel=1e-12)
        assert int(result.keyframes[index]) == schedule.levels.count(None)


def test_no_static_policy_is_better_on_the_network(problem: Problem) -> None:
    """Error and BOPs summed over frames, the former from the confusion that was measured."""

    def total(result: Measurement, trade_off: float) -> float:
        weights = problem.error_table.double()
        height, width = problem.model.frame_size
        error = float((result.counts.double() * weights).sum()) / (height * width)
        return error + trade_off * float(result.clip_bops.sum())

    policies = [StaticResQ("keyframe", interval, level=level) for interval, level in product((0, 1, 2, 3), range(4))]
    measured = [measure(problem, policy) for policy in policies]
    for trade_off in TRADE_OFFS:
        least = total(oracle_measurement(problem.task, table_engine(problem).tables, trade_off), trade_off)
        for policy, result in zip(policies, measured, strict=True):
            assert least <= total(result, trade_off) + 1e-6, f"lambda {trade_off}, {policy}"


def test_the_oracle_stands_beside_policies(problem: Problem) -> None:
    result = oracle_measurement(problem.task, table_engine(problem).tables, 0.1)
    assert result.settings == {"trade_off": 0.1, "reference": "keyframe"}
    assert result.frames.tolist() == [5, 7, 5, 6]
    assert not result.policy.any()
    assert result.state_bytes == problem.model.state_bytes("keyframe")
    assert result.accuracy == float(mean_iou(result.counts.sum(0)))
    assert result.peak.tolist() == pytest.approx([1.0] * 4)
    with pytest.raises(PolicyError, match="A schedule for each clip is needed"):
        oracle_measurement(problem.task, [], 0.1)


# Schedules ---------------------------------------------------------------------------------------------------------


def test_rows_of_a_schedule() -> None:
    key, age, level = Schedule((None, 2, 0, None, None, 1)).rows
    assert key.tolist() == [0, 0, 0, 3, 4, 4]
    assert age.tolist() == [0, 1, 2, 0, 0, 1]
    assert level.tolist() == [0, 2, 0, 0, 0, 1]


@pytest.mark.parametrize("levels", [(), (0, None), (3,)])
def test_a_schedule_begins_with_a_keyframe(levels: Levels) -> None:
    with pytest.raises(PolicyError, match="first frame of a clip is a keyframe"):
        Schedule(levels)


# Policies measured on tables as on the network ----------------------------------------------------------------------

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


def learned(problem: Problem, seed: int, trade_off: float = 0.2) -> LearnedPolicy:
    """Of random weights, about a typical observation, so that levels and keyframes change from frame to frame."""
    policy = made(problems.scheme(problem, "frame_level", "frame"), seed=seed, reference="keyframe")
    seen = policy.scheme.observe(problems.view(problem, len(problem), reference="keyframe").observation)
    first, *others = policy.weights
    hidden = [torch.zeros_like(b) for b in policy.biases[1:-1]]
    middle = (torch.tensor(policy.scheme.nvec) - 1) / 2
    biases = (-10 * first @ seen.mean(0), *hidden, middle)
    return replace(policy, weights=(10 * first, *others), biases=biases, trade_off=trade_off)


def decided(problem: Problem, policy: Policy) -> list[Schedule]:
    """The schedules that a policy makes on tables of clips of one length."""
    streams = problems.table_streams(problem, len(problem), trade_off_range=policy.trade_off_range)
    chosen: list[list[int | None]] = [[] for _ in range(len(problem))]
    for decision, _ in streams.run(policy):
        assert isinstance(decision.field, LevelField)
        for own, refresh, level in zip(chosen, decision.refresh, decision.field.levels[:, 0, 0, 0], strict=True):
            own.append(None if refresh else int(level))
    return [Schedule(tuple(own)) for own in chosen]


def assert_equal(mine: Measurement, expected: Measurement) -> None:
    same(mine, expected)
    assert mine.settings == expected.settings


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
def test_fixed_policies_measure_on_tables_as_on_the_network(
    policy: Policy, problem: Problem, uneven_problem: Problem
) -> None:
    for own in (problem, uneven_problem):
        assert len({len(clip) for clip in own.clips}) > 1
        assert_equal(measure_on_tables(table_engine(own), policy), measure(own, policy))


@pytest.mark.parametrize(("seed", "trade_off"), [*zip(SEEDS, (*RANGE, 0.2, 0.2), strict=True), (SEEDS[0], 0.2)])
def test_learned_policies_measure_on_tables_as_on_the_network(seed: int, trade_off: float, problem: Problem) -> None:
    policy = learned(problem, seed, trade_off)
    result = measure_on_tables(table_engine(problem), policy)
    assert (result.policy > 0).all()
    assert_equal(result, measure(problem, policy))


def test_these_policies_choose_various_levels_and_keyframes(problem: Problem) -> None:
    """The comparisons above mean something."""
    own = problems.with_clips(problem, [7, 7, 7], seed=20)
    for policies in (MAGNITUDES, [learned(problem, seed) for seed in SEEDS]):
        schedules = [schedule.levels for policy in policies for schedule in decided(own, policy)]
        assert len(set(schedules)) > 5
        assert {level for levels in schedules for level in levels} == {None, 0, 1, 2, 3}


def test_the_schedules_that_a_policy_makes_replay_it(problem: Problem) -> None:
    own = problems.with_clips(problem, [7, 7, 7], seed=20)
    policy = MAGNITUDES[3]
    schedules = decided(own, policy)
    assert len(set(schedules)) > 1
    same(measure(own, Replay(schedules)), measure(own, policy))


def test_a_policy_of_more_than_one_level_is_refused(problem: Problem) -> None:
    for policy in (
        DynamicResQ("keyframe"),
        made(problems.scheme(problem, "region_bits", "frame"), reference="keyframe"),
    ):
        with pytest.raises(PolicyError, match="one level for all layer groups and regions"):
            measure_on_tables(table_engine(problem), policy)


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
