"""Agents that act on streams of clips: their keyframes, and the memory that is theirs."""

import numpy as np
import pytest
import torch

from resq_rl.envs import ActionKind, Agents, BatchedEnvironment, EpisodeSettings, Problem
from resq_rl.policies import DynamicResQ
from tests.envs import problems
from tests.envs.problems import first_difference


@pytest.mark.parametrize("interval", [0, 1, 2, 3, 6, 7, 20])
def test_periodic_keyframes_come_at_multiples_of_the_interval(interval: int, problem: Problem) -> None:
    own = problems.with_clips(problem, [8, 8])
    core = problems.agents(own, 2, episodes=EpisodeSettings(trade_off=0.3, intervals=(interval,)))
    core.reset([0, 1])
    scheme = core.scheme
    actions = np.tile(scheme.uniform_action(scheme.choices - 1), (core.agents, 1))
    for t in range(1, 8):
        step = core.step(actions)
        due = interval > 0 and t % interval == 0
        assert step.result.cost.keyframe.tolist() == [due, due], f"frame {t}"
        if due:
            assert step.result.share.mean((1, 2)).tolist() == pytest.approx([1.0, 1.0]), f"frame {t}"
        else:
            assert step.result.share.max() < 0.05, f"frame {t}"


def test_every_clip_draws_its_own_interval(problem: Problem) -> None:
    own = problems.with_clips(problem, [8])
    core = problems.agents(own, 8, episodes=EpisodeSettings(trade_off=0.3, intervals=(2, 3, 0)))
    core.reset(list(range(8)))
    actions = np.tile(core.scheme.uniform_action(core.scheme.choices - 1), (core.agents, 1))
    drawn = core.interval.tolist()
    assert set(drawn) == {0, 2, 3}
    flags = torch.stack([core.step(actions).result.cost.keyframe for _ in range(6)], 1)
    for slot, interval in enumerate(drawn):
        assert flags[slot].tolist() == [interval > 0 and t % interval == 0 for t in range(1, 7)], f"interval {interval}"


WAYS: list[tuple[ActionKind, Agents, bool]] = [
    ("region_thresholds", "region", False),
    ("region_bits", "frame", False),
    ("frame_bits", "frame", False),
    ("frame_level", "frame", False),
    ("frame_level", "frame", True),
    ("keyframe", "frame", False),
]


@pytest.mark.parametrize(("kind", "agents", "table"), WAYS)
def test_actions_are_only_read(kind: ActionKind, agents: Agents, table: bool, problem: Problem) -> None:
    """Agents that write their next actions into one array act as those that give a new array for every step."""

    def made() -> BatchedEnvironment:
        if table:
            streams = problems.table_streams(problem, 2, trade_off_range=(0.3, 0.3))
            scheme = problems.scheme(problem, kind, agents)
            return BatchedEnvironment(streams, scheme, EpisodeSettings(trade_off=0.3))
        fields = DynamicResQ("previous", 0, tau=0.5) if kind == "keyframe" else None
        return problems.agents(problem, 2, kind, agents, fields=fields)

    mine, twin = made(), made()
    assert first_difference(mine.reset([1, 2]), twin.reset([1, 2])) is None
    generator = np.random.default_rng(0)
    array, ended = np.zeros((mine.agents, len(mine.scheme.nvec)), dtype=np.int64), 0
    for t in range(12):
        array[:] = generator.integers(mine.scheme.nvec, size=array.shape)
        actions = array.copy()
        step = mine.step(array)
        assert first_difference(array, actions) is None, f"step {t}: actions were written to"
        array[:] = 0
        expected = twin.step(actions)
        assert first_difference(step.observations, expected.observations) is None, f"step {t}"
        assert first_difference(step.rewards, expected.rewards) is None, f"step {t}"
        ended += int(step.result.last.sum())
    assert ended > 2
