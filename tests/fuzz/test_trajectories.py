"""Recorded actions replayed give the same observations, rewards and costs, in every face of every environment."""

import os
from typing import Any

import gymnasium
import numpy as np
import pytest

import resq_rl.envs  # noqa: F401 - registers the ids
from resq_rl.envs import EpisodeSettings, Problem, ResQEnv, ResQVectorEnv
from resq_rl.envs.sb3 import AgentsVecEnv
from tests.envs import problems
from tests.envs.contract import AgentsFace, Array, Face, SingleFace, Step, VectorFace
from tests.envs.problems import first_difference

FEW, MANY = 3, int(os.environ.get("RESQ_RL_FUZZ_CASES", "1000")) // 5
IDS = ["FrameBits", "RegionBits", "RegionThresholds"]
KINDS = {"FrameBits": "frame_bits", "RegionBits": "region_bits", "RegionThresholds": "region_thresholds"}
SLOTS, LONGEST = 3, 24
NAMES = ("rewards", "truncated", "error", "bops", "clip", "trade_off")


def made(name: str, problem: Problem, **settings: Any) -> SingleFace:
    environment = gymnasium.make(
        f"resq_rl/{name}-v0", problem=problem, by_group=name != "FrameBits", **settings
    ).unwrapped
    assert isinstance(environment, ResQEnv)
    return SingleFace(environment)


def played(face: Face, seed: int, actions: list[Array], rows: slice) -> tuple[list[Array], list[Step]]:
    """What a face gives under actions of all its agents; observations and steps of some agents."""
    observations, steps = [face.reset(seed)[rows].copy()], []
    for action in actions:
        step = face.step(action)
        steps.append(Step(*(getattr(step, name)[rows] for name in ("observations", *NAMES))))
        observations.append(steps[-1].observations.copy())
    return observations, steps


def assert_same(one: tuple[list[Array], list[Step]], other: tuple[list[Array], list[Step]], what: str) -> None:
    for t, (a, b) in enumerate(zip(one[0], other[0], strict=True)):
        assert first_difference(a, b) is None, f"{what}, observation {t}: {first_difference(a, b)}"
    for t, (s, u) in enumerate(zip(one[1], other[1], strict=True)):
        for name in NAMES:
            difference = first_difference(np.asarray(getattr(s, name)), np.asarray(getattr(u, name)))
            assert difference is None, f"{what}, step {t}, {name}: {difference}"


def replay(name: str, seed: int, problem: Problem) -> None:
    """One random trajectory: again in the single face, as a slot of the vector face, and by region agents."""
    generator = np.random.default_rng(seed)
    settings: dict[str, Any] = {"reference": str(generator.choice(np.array(["previous", "keyframe"])))}
    settings["trade_off"] = (0.1, 1.0)
    single = made(name, problem, **settings)
    nvec, length = single.action_space.nvec, int(generator.integers(2, LONGEST))
    actions = [generator.integers(nvec, size=(1, len(nvec))) for _ in range(length)]
    recorded = played(single, seed, actions, slice(0, 1))
    what = f"{name}, seed {seed}"
    assert_same(recorded, played(made(name, problem, **settings), seed, actions, slice(0, 1)), f"{what}, again")

    slot = int(generator.integers(SLOTS))
    vector = ResQVectorEnv(KINDS[name], SLOTS, problem=problem, by_group=name != "FrameBits", **settings)  # type: ignore[arg-type]
    among = []
    for action in actions:
        others = generator.integers(nvec, size=(SLOTS, len(nvec)))
        others[slot] = action[0]
        among.append(others)
    assert_same(recorded, played(VectorFace(vector), seed - slot, among, slice(slot, slot + 1)), f"{what}, vector")
    if name != "FrameBits":
        by_regions(name, seed, problem, settings, actions, what)


def by_regions(
    name: str, seed: int, problem: Problem, settings: dict[str, Any], actions: list[Array], what: str
) -> None:
    """Region agents, whose keyframes come at an interval, against the frame agent that asks for the same ones."""
    interval = 3
    episodes = EpisodeSettings(trade_off=settings["trade_off"], intervals=(interval,))
    core = problems.agents(problem, 1, KINDS[name], "region", episodes=episodes, reference=settings["reference"])  # type: ignore[arg-type]
    regions, single = AgentsFace(AgentsVecEnv(core)), made(name, problem, **settings)
    regions.reset(seed)
    single.reset(seed)
    single.core.streams.start([0], core.streams.clip.tolist(), core.streams.trade_off.tolist())
    for t, action in enumerate(actions):
        due = bool((core.streams.age + 1 >= interval).all())
        whole = action.copy()
        whole[0, -1] = int(due)
        parts, frame = regions.step(action[0, :-1].reshape(core.agents, -1)), single.step(whole)
        where = f"{what}, regions, step {t}"
        assert parts.bops.mean() == pytest.approx(float(frame.bops[0]), rel=1e-6), where
        assert parts.error.mean() == pytest.approx(float(frame.error[0]), rel=1e-6, abs=1e-9), where
        rounding = 4 * float(np.finfo(np.float32).eps)  # of 1 minus error minus price, which may leave next to nothing
        assert parts.rewards.mean() == pytest.approx(float(frame.rewards[0]), rel=1e-5, abs=rounding), where
        if parts.truncated[0]:
            return  # the next clip is drawn by each face's own generator
        seen = core.streams.observe().whole().numpy()
        assert first_difference(seen, frame.observations) is None, where


@pytest.mark.parametrize("name", IDS)
def test_trajectories_replay(name: str, problem: Problem) -> None:
    for seed in range(10, 10 + FEW):
        replay(name, seed, problem)


@pytest.mark.slow
@pytest.mark.parametrize("name", IDS)
def test_many_trajectories_replay(name: str, problem: Problem) -> None:
    for seed in range(10, 10 + MANY):
        replay(name, seed, problem)
    print(f"{name}: {MANY} trajectories of 2 to {LONGEST - 1} steps, replayed alike in all faces")
