"""Tabulated responses against really running the network."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from resq_rl.envs import (
    ActionScheme,
    BatchedEnvironment,
    Decision,
    EpisodeSettings,
    Problem,
    StreamResult,
    Streams,
    TableEngine,
    respond,
)
from resq_rl.envs.sb3 import AgentsVecEnv
from resq_rl.errors import PolicyError, SettingsError
from resq_rl.policies.ppo import PPOSettings, train_ppo
from resq_rl.quantization import Budget, LevelField, ThresholdField
from tests.envs import problems
from tests.envs.contract import AgentsFace, EnvContract, Face
from tests.envs.problems import assert_same, first_difference, table_engine, table_streams, values_of

LEVELS = 4


def level_of(level: int, clips: int = 1) -> LevelField:
    return LevelField.constant(level, clips, 3)


def core(problem: Problem, *, table: bool, slots: int = 2, budget: Budget | None = None, **episodes: Any) -> Any:
    """Frame agents of one level, on the table or on the network."""
    settings = EpisodeSettings(**({"trade_off": 0.3} | episodes))
    kinds: dict[str, Any] = {"trade_off_range": settings.trade_off_range, "budget": budget}
    streams = (
        table_streams(problem, slots, **kinds)
        if table
        else problems.streams(problem, slots, reference="keyframe", **kinds)
    )
    return BatchedEnvironment(streams, problems.scheme(problem, "frame_level", "frame"), settings)


# The table ---------------------------------------------------------------------------------------------------------


def random_schedule(frames: int, generator: torch.Generator) -> list[int | None]:
    """A level for each frame, or None for a keyframe."""
    drawn = torch.randint(LEVELS + 2, (frames,), generator=generator).tolist()
    return [None, *(None if level >= LEVELS else level for level in drawn[1:])]


def replay(streams: Streams, clip: int, schedule: list[int | None]) -> list[StreamResult]:
    results = [streams.start([0], [clip])]
    for level in schedule[1:]:
        results.append(streams.step(Decision(torch.tensor([level is None]), level_of(level or 0))))
    return results


@pytest.mark.parametrize(("seed", "divides"), [(0, True), (1, False), (2, True), (3, False)])
def test_a_table_holds_what_the_network_gives_under_any_schedule(
    seed: int, divides: bool, problem: Problem, uneven_problem: Problem
) -> None:
    own = problem if divides else uneven_problem
    generator = torch.Generator().manual_seed(seed)
    streams = problems.streams(own, reference="keyframe")
    for clip, table in enumerate(table_engine(own).tables):
        schedule = random_schedule(table.frames, generator)
        key = 0
        for t, result in enumerate(replay(streams, clip, schedule)):
            key = t if schedule[t] is None else key
            level = schedule[t] or 0
            row = LEVELS if key == t else level
            targets = own.targets[clip][t : t + 1]
            for name, mine, expected in (
                ("confusion", table.counts[key, t - key, level], own.task.counts(result.prediction, targets)[0]),
                ("error", table.region_error[key, t - key, level], result.error[0]),
                ("bops", table.bops[row], result.cost.total[0] / own.reference_bops),
                ("bops by layer and region", table.cost.bops[row], result.cost.bops[0]),
                ("elementwise", table.cost.elementwise[row], result.cost.elementwise[0]),
            ):
                difference = first_difference(mine, expected)
                assert difference is None, f"clip {clip}, frame {t}, {schedule[: t + 1]}, {name}: {difference}"


def test_levels_differ_and_so_do_ages(problem: Problem) -> None:
    """The comparison above means something."""
    error = table_engine(problem).tables[1].error
    assert len(error[0, 3].unique()) == LEVELS
    assert len(error[0, 1:, 2].unique()) == 6
    assert len(error[:, 1, 2][:-1].unique()) == 6


def test_rows_beyond_the_clip_are_empty(problem: Problem) -> None:
    table = table_engine(problem).tables[0]
    assert (table.frames, table.ages, table.levels, table.grid) == (5, 5, LEVELS, problem.grid)
    beyond = torch.arange(5)[:, None] + torch.arange(5)[None] >= 5
    assert (torch.isnan(table.error) == beyond[..., None]).all()
    pixels = table.counts.sum((3, 4))
    assert not pixels[beyond].any()
    assert (pixels[~beyond] > 0).all()


def test_a_level_costs_its_share_of_the_bits(problem: Problem) -> None:
    assert problem.model.config.residual_weight_bits == 4
    assert problem.model.config.levels == (0, 2, 4, 8)
    assert table_engine(problem).tables[0].bops.tolist() == pytest.approx(
        [4 * bits / 64 for bits in (0, 2, 4, 8)] + [1.0]
    )


@pytest.mark.parametrize("longest", [0, 2, 100])
def test_longest_bounds_the_age_of_keyframes(longest: int, problem: Problem) -> None:
    whole = table_engine(problem).tables[1]
    seen: list[int] = []
    table = respond(problem, 1, longest=longest, progress=seen.append)
    assert table.ages == min(longest + 1, 7)
    for name in ("counts", "region_error", "output"):
        mine, expected = getattr(table, name), getattr(whole, name)[:, : table.ages]
        assert torch.equal(torch.nan_to_num(mine), torch.nan_to_num(expected)), name
    pairs = sum(1 for k in range(7) for t in range(k + 1, 7) if t - k <= longest)
    assert sum(seen) == 7 + LEVELS + LEVELS * pairs


def test_a_clip_of_one_frame_is_its_keyframe(problem: Problem) -> None:
    table = respond(problems.with_clips(problem, [1]), 0)
    assert table.error.shape == (1, 1, LEVELS)
    assert table.bops[-1] == 1.0


def test_longest_is_not_negative(problem: Problem) -> None:
    with pytest.raises(SettingsError, match="longest must be 0 frames or more, or None for the whole clip, got -1"):
        respond(problem, 0, longest=-1)


# The engine on tables ---------------------------------------------------------------------------------------------


class TestTableContract(EnvContract):
    """Agents on tables are an environment like any other."""

    kind = "frame_level"
    budgeted = False

    def make(self, problem: Problem, **settings: Any) -> Face:
        return AgentsFace(AgentsVecEnv(core(problem, table=True, **settings)))


@pytest.mark.parametrize(
    ("settings", "divides"),
    [
        ({"trade_off": 0.3}, True),
        ({"trade_off": (0.05, 1.0)}, False),
        ({"trade_off": (0.05, 1.0), "relative": True, "reward_scale": 20.0}, True),
        ({"slots": 5, "shuffle": False}, False),
    ],
)
def test_rollouts_on_tables_equal_those_on_the_network(
    settings: dict[str, Any], divides: bool, problem: Problem, uneven_problem: Problem
) -> None:
    own = problem if divides else uneven_problem
    real, table = (core(own, table=tabled, **settings) for tabled in (False, True))
    seeds = list(range(real.clips))
    assert first_difference(real.reset(seeds), table.reset(seeds)) is None
    generator = np.random.default_rng(1)
    ended = 0
    for t in range(30):
        actions = generator.integers(real.scheme.nvec, size=(real.agents, 2))
        mine, expected = table.step(actions), real.step(actions)
        for name in ("observations", "rewards", "truncated", "frame_rewards", "trade_off", "final_observations"):
            a, b = getattr(mine, name), getattr(expected, name)
            assert (a is None) == (b is None)
            difference = None if a is None else first_difference(a, b)
            assert difference is None, f"step {t}, {name}: {difference}"
        found, wanted = values_of(mine.result), values_of(expected.result)
        assert_same(found, wanted, wanted.keys() - {"prediction"}, f"step {t}")
        ended += int(mine.truncated.sum())
    assert ended >= 10


def test_training_on_tables_gives_the_policy_that_the_network_gives(problem: Problem) -> None:
    settings = PPOSettings(frames=120, n_steps=7, batch_size=84, epochs=2)
    real, table = (
        train_ppo(AgentsVecEnv(core(problem, table=tabled, trade_off=(0.05, 1.0))), settings)[0]
        for tabled in (False, True)
    )
    for mine, expected in zip(table.weights + table.biases, real.weights + real.biases, strict=True):
        assert first_difference(mine, expected) is None
    assert table.reference == "keyframe"


def test_predictions_are_empty(problem: Problem) -> None:
    assert table_streams(problem, 2).start([0, 1], [0, 1]).prediction.shape == (2, 0, 0)


def by_group(clips: int = 1) -> LevelField:
    return LevelField(torch.tensor([[0, 0, 1]] * clips)[:, :, None, None])


@pytest.mark.parametrize(
    "field",
    [
        by_group(),
        LevelField(torch.tensor([[[[0, 0, 2], [0, 0, 0]]] * 3])),
        level_of(LEVELS),
        level_of(-1),
        level_of(1, clips=2),
        ThresholdField.constant(1.0, 1, 3),
    ],
)
def test_other_fields_than_one_level_are_refused_and_change_nothing(field: Any, problem: Problem) -> None:
    streams, stay = table_streams(problem), torch.tensor([False])
    streams.start([0], [0])
    with pytest.raises(PolicyError, match=r"one level for all layer groups and regions.* 1 clips with levels 0 to 3"):
        streams.step(Decision(stay, field))
    assert (streams.time.tolist(), streams.age.tolist()) == ([1], [0])


def test_keyframes_older_than_the_table_are_refused(problem: Problem) -> None:
    tables = [respond(problem, i, longest=2) for i in range(4)]
    streams = Streams(TableEngine(problem, tables), slots=2, reference="keyframe")
    streams.start([0, 1], [0, 1])

    def step(*refresh: bool) -> Tensor:
        return streams.step(Decision(torch.tensor(refresh), level_of(1, 2))).cost.keyframe

    step(False, True)
    step(False, False)
    with pytest.raises(PolicyError, match=r"clips \[0\] would be \[3\] frames old, the tables know ages up to \[2\]"):
        step(False, False)
    assert step(True, False).tolist() == [True, False]
    assert streams.age.tolist() == [0, 2]


def test_a_step_after_the_end_names_the_slots(problem: Problem) -> None:
    streams = table_streams(problem)
    replay(streams, 0, [None] * 5)
    with pytest.raises(PolicyError, match=r"slots \[0\] are over"):
        streams.step(Decision(torch.tensor([False]), level_of(0)))


def test_lambda_is_positive(problem: Problem) -> None:
    with pytest.raises(PolicyError, match="lambda must be positive"):
        table_streams(problem).start([0], [0], [0.0])


def test_tables_must_fit_the_clips(problem: Problem, uneven_problem: Problem) -> None:
    first, *others = table_engine(problem).tables
    for tables in ([first], [first, *reversed(others)], []):
        with pytest.raises(SettingsError, match=r"Clips of \[5, 7, 5, 6\] frames and a grid of \(2, 3\) need tables"):
            TableEngine(problem, tables)
    coarse = respond(replace(problem, grid=(1, 1)), 0)
    with pytest.raises(SettingsError, match="that grid"):
        TableEngine(problem, [coarse, *others])


# Actions of one level ----------------------------------------------------------------------------------------------


def test_one_level_is_one_number_beside_the_keyframe_decision() -> None:
    scheme = ActionScheme("frame_level", "frame", 3, (2, 4))
    assert scheme.nvec == (4, 2)
    assert scheme.feature_names == ActionScheme("frame_bits", "frame", 3, (2, 4)).feature_names
    decision = scheme.decide(np.array([[3, 0], [1, 1]]))
    assert isinstance(decision.field, LevelField)
    assert decision.field.levels[..., 0, 0].tolist() == [[3, 3, 3], [1, 1, 1]]
    assert decision.refresh.tolist() == [False, True]
    assert scheme.uniform_action(2).tolist() == [2, 0]


def test_one_level_is_frame_bits_of_equal_levels(problem: Problem) -> None:
    levels, groups = (problems.agents(problem, 2, kind, "frame") for kind in ("frame_level", "frame_bits"))
    levels.reset([0, 1])
    groups.reset([0, 1])
    actions = np.array([[1, 0], [3, 1]])
    mine, expected = levels.step(actions), groups.step(actions[:, [0, 0, 0, 1]])
    assert first_difference(mine.observations, expected.observations) is None
    assert first_difference(mine.rewards, expected.rewards) is None


def test_one_level_decides_for_the_whole_frame() -> None:
    with pytest.raises(SettingsError, match="frame_level decides for the whole frame"):
        ActionScheme("frame_level", "region", 3, (2, 4))
