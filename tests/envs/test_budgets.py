"""Budgets hold over very many frames, in a process of its own.

`make test ARGS="-m slow tests/envs/test_budgets.py -s"`.
"""

from collections.abc import Callable
from functools import partial
from itertools import cycle, product

import numpy as np
import pytest

from resq_rl.envs import ActionKind, Agents, Problem, ResQVectorEnv
from resq_rl.envs.sb3 import AgentsVecEnv
from resq_rl.policies import DynamicResQ
from resq_rl.quantization import Budget
from tests.envs import problems
from tests.envs.contract import SPAN, AgentsFace, Face, SingleFace, VectorFace, check_budget, recorded_costs
from tests.envs.problems import make_pose_problem, make_problem, make_recurrent_problem
from tests.envs.test_environments import single
from tests.envs.test_soak import run_alone

FRAMES = 100_000
STEPS = 60  # of a rollout
SLOTS = 8
KINDS: tuple[ActionKind, ...] = ("frame_bits", "frame_level", "region_bits", "region_thresholds")
BY_AGENT: tuple[tuple[ActionKind, Agents], ...] = (
    ("region_thresholds", "region"),
    ("region_bits", "region"),
    ("region_thresholds", "frame"),
    ("frame_bits", "frame"),
    ("keyframe", "frame"),
)


def random_budget(generator: np.random.Generator) -> Budget:
    """From less than any frame wants to more than any spends; one in four without a mean."""
    peak = float(generator.uniform(0.02, 1.0))
    if generator.random() < 0.25:
        return Budget(peak=peak)
    return Budget(
        peak=peak, mean=peak * float(generator.uniform(0.05, 1.0)), bucket=float(generator.uniform(1.0, 20.0))
    )


def faces() -> list[Callable[[Problem, Budget], Face]]:
    """Makers of every kind of environment, single and vector, and of every kind of agents."""
    singles = [partial(a_single, kind) for kind in KINDS]
    vectors = [partial(a_vector, kind) for kind in KINDS]
    return [*singles, *vectors, *(partial(some_agents, kind, agents) for kind, agents in BY_AGENT)]


def a_single(kind: ActionKind, problem: Problem, budget: Budget) -> Face:
    return SingleFace(single(kind, problem, trade_off=SPAN, budget=budget))


def a_vector(kind: ActionKind, problem: Problem, budget: Budget) -> Face:
    return VectorFace(ResQVectorEnv(kind, SLOTS, problem=problem, trade_off=SPAN, budget=budget))


def some_agents(kind: ActionKind, agents: Agents, problem: Problem, budget: Budget) -> Face:
    fields = DynamicResQ("previous", 0, tau=0.5) if kind == "keyframe" else None
    return AgentsFace(AgentsVecEnv(problems.agents(problem, SLOTS, kind, agents, fields=fields, budget=budget)))


def soak_in_budgets() -> None:
    """Random budgets and actions, over all tasks and faces, with clips of several lengths in the same batch."""
    generator, frames, rollouts = np.random.default_rng(0), 0, 0
    tasks = [make_problem((24, 5, 17, 9)), make_pose_problem(), make_recurrent_problem((5, 12, 8))]
    for problem, make in cycle(product(tasks, faces())):
        budget = random_budget(generator)
        face = make(problem, budget)
        costs = recorded_costs(face.core)
        face.reset(rollouts)
        for _ in range(STEPS):
            nvec = face.action_space.nvec
            face.step(generator.integers(nvec, size=(face.core.agents, len(nvec))))
        for spent in costs():
            check_budget(budget, spent)
            frames += len(spent)
        rollouts += 1
        if rollouts % 30 == 0:
            print(f"{frames:,} frames of {rollouts} rollouts within their budgets", flush=True)
        if frames >= FRAMES:
            break
    print(f"{frames:,} frames of {rollouts} rollouts within their budgets", flush=True)


@pytest.mark.slow
def test_no_budget_is_exceeded_in_very_many_frames() -> None:
    run_alone(soak_in_budgets)
