"""The oracle against brute force, and its schedules against really running them."""

from dataclasses import replace
from functools import lru_cache
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from resq_rl.envs import Measurement, Policy, ResponseTable, measure, respond
from resq_rl.errors import PolicyError
from resq_rl.perception import mean_iou
from resq_rl.policies import Schedule, Scheduled, StaticResQ, best_schedule, oracle_measurement
from resq_rl.quantization import FrameCost
from tests.envs.worlds import World, first_difference

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


@lru_cache(maxsize=4)
def tables_of(world: World) -> tuple[ResponseTable, ...]:
    return tuple(respond(world.model, world.task, world.store, i, grid=world.grid) for i in range(len(world.store)))


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


def test_no_schedule_is_better_on_a_real_network(world: World) -> None:
    for index in (0, 2):
        table = tables_of(world)[index]
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


def test_where_bits_are_free_or_dear(world: World) -> None:
    table = tables_of(world)[1]
    assert best_schedule(table, 1e6).levels == (None, *[0] * 6)
    equal = replace(table, region_error=torch.zeros_like(table.region_error))
    equal.region_error[:, 0] = -1.0
    assert best_schedule(equal, 1e-6).levels == (None,) * 7


def test_lambda_is_positive() -> None:
    with pytest.raises(PolicyError, match=r"lambda must be positive, got 0\.0"):
        best_schedule(random_table(3, 2, 0), 0.0)


# What it gives -----------------------------------------------------------------------------------------------------


def same(mine: Measurement, expected: Measurement) -> None:
    for name in ("counts", "frames", "keyframes"):
        difference = first_difference(getattr(mine, name), getattr(expected, name))
        assert difference is None, f"{name}: {difference}"
    for name in ("error", "keyframe", "residual", "policy", "peak", "elementwise"):
        torch.testing.assert_close(getattr(mine, name), getattr(expected, name), rtol=1e-12, atol=0, msg=name)
    assert mine.state_bytes == expected.state_bytes
    assert mine.accuracy == expected.accuracy
    assert mine.bops == pytest.approx(expected.bops, rel=1e-12)


def run(world: World, policy: Policy, **settings: Any) -> Measurement:
    return measure(world.model, world.task, world.store, policy, grid=world.grid, **settings)


@pytest.mark.parametrize("slots", [1, 2, 32])
@pytest.mark.parametrize("trade_off", [0.003, 0.1, 1.0])
def test_the_network_gives_what_the_oracle_says(trade_off: float, slots: int, world: World) -> None:
    tables = tables_of(world)
    schedules = tuple(best_schedule(table, trade_off) for table in tables)
    assert len(set(schedules)) > 1 or trade_off == 1.0
    same(oracle_measurement(world.task, tables, trade_off), run(world, Scheduled(world.store, schedules), slots=slots))


def test_random_schedules_cost_what_the_table_says(world: World) -> None:
    generator = torch.Generator().manual_seed(3)
    schedules = []
    for clip in world.store.clips:
        drawn = torch.randint(-2, 4, (len(clip),), generator=generator).tolist()
        schedules.append(Schedule((None, *(None if n < 0 else n for n in drawn[1:]))))
    result = run(world, Scheduled(world.store, tuple(schedules)))
    for index, (table, schedule) in enumerate(zip(tables_of(world), schedules, strict=True)):
        assert float(result.clip_bops[index]) == pytest.approx(walk(table, schedule.levels)[1], rel=1e-12)
        assert int(result.keyframes[index]) == schedule.levels.count(None)
        key, age, level = schedule.rows
        assert (result.counts[index] == table.counts[key, age, level].sum(0)).all()


@pytest.mark.parametrize("trade_off", TRADE_OFFS)
def test_no_static_policy_is_better_on_the_network(trade_off: float, world: World) -> None:
    """Error and BOPs summed over frames, the former from the confusion that was measured."""

    def total(result: Measurement) -> float:
        weights = world.store.error_table.double()
        height, width = world.model.frame_size
        error = float((result.counts.double() * weights).sum()) / (height * width)
        return error + trade_off * float(result.clip_bops.sum())

    least = total(oracle_measurement(world.task, tables_of(world), trade_off))
    for interval, level in product((0, 1, 2, 3), range(4)):
        assert least <= total(run(world, StaticResQ("keyframe", interval, level=level))) + 1e-6


def test_the_oracle_stands_beside_policies(world: World) -> None:
    result = oracle_measurement(world.task, tables_of(world), 0.1)
    assert result.settings == {"trade_off": 0.1, "reference": "keyframe"}
    assert result.frames.tolist() == [5, 7, 5, 6]
    assert not result.policy.any()
    assert result.state_bytes == world.model.state_bytes("keyframe")
    assert result.accuracy == float(mean_iou(result.counts.sum(0)))
    assert result.peak.tolist() == pytest.approx([1.0] * 4)
    with pytest.raises(PolicyError, match="A schedule for each clip is needed"):
        oracle_measurement(world.task, [], 0.1)


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


def test_a_replay_is_a_policy_for_its_own_clips(world: World) -> None:
    schedules = tuple(Schedule((None,) * len(clip)) for clip in world.store.clips)
    policy = Scheduled(world.store, schedules)
    assert isinstance(policy, Policy)
    assert policy.settings["schedules"] == [[None] * len(clip) for clip in world.store.clips]
    with pytest.raises(PolicyError, match=r"Clips of \[5, 7, 5, 6\] frames need schedules of as many, got \[5, 7\]"):
        Scheduled(world.store, schedules[:2])
    with pytest.raises(PolicyError, match="no schedule"):
        run(world.with_clips([5, 7, 5, 6], seed=9), policy)
