"""What every face of the environments must keep: the test class that their tests inherit."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import numpy as np
import pytest
import torch
from gymnasium import spaces

from resq_rl.envs import ActionKind, BatchedEnvironment, Problem, ResQEnv, ResQVectorEnv
from resq_rl.envs.sb3 import AgentsVecEnv
from resq_rl.errors import PolicyError, SettingsError
from resq_rl.quantization import Budget
from resq_rl.video import Clip
from tests.envs.problems import assert_same, first_difference

Array = np.ndarray[Any, Any]
BUDGET = Budget(peak=0.4, mean=0.2, bucket=4.0)
SPAN = (0.1, 1.0)  # of lambda
LONG = 20  # steps of a rollout in which every clip ends
BUDGETS = (BUDGET, Budget(peak=0.05), Budget(peak=1.0, mean=0.1, bucket=20.0), Budget(peak=0.3, mean=0.01))


@dataclass(frozen=True)
class Step:
    """One step of any face, agents along the first axis; `error`, `bops` and `trade_off` are what infos say."""

    observations: Array
    rewards: Array
    truncated: Array
    error: Array
    bops: Array
    trade_off: Array
    clip: Array


Rollout = tuple[list[Array], list[Step]]
RAN: dict[type["EnvContract"], Rollout] = {}


class Face(Protocol):
    """An environment with agents along the first axis, whatever its own interface is."""

    core: BatchedEnvironment
    observation_space: spaces.Box
    action_space: spaces.MultiDiscrete

    def reset(self, seed: int | None = None) -> Array: ...

    def step(self, actions: Array) -> Step: ...


class SingleFace:
    """A Gymnasium environment as a face of one agent; a clip that ended is reset by hand."""

    def __init__(self, environment: ResQEnv) -> None:
        self.environment, self.core = environment, environment.core
        assert isinstance(environment.observation_space, spaces.Box)
        assert isinstance(environment.action_space, spaces.MultiDiscrete)
        self.observation_space, self.action_space = environment.observation_space, environment.action_space
        self.next: Array | None = None

    def reset(self, seed: int | None = None) -> Array:
        self.next = None
        return self.environment.reset(seed=seed)[0][None]

    def step(self, actions: Array) -> Step:
        observation, reward, terminated, truncated, info = self.environment.step(actions[0])
        assert terminated is False
        assert isinstance(truncated, bool)
        assert isinstance(reward, float)
        assert observation.shape == self.observation_space.shape
        if truncated:
            observation = self.environment.reset()[0]
        values = {name: np.array([info[name]]) for name in ("error", "bops", "trade_off", "clip")}
        return Step(observation[None], np.array([reward], np.float32), np.array([truncated]), **values)


class VectorFace:
    """A Gymnasium vector environment as a face of one agent per clip."""

    def __init__(self, environment: ResQVectorEnv) -> None:
        self.environment, self.core = environment, environment.core
        assert isinstance(environment.single_observation_space, spaces.Box)
        assert isinstance(environment.single_action_space, spaces.MultiDiscrete)
        self.observation_space, self.action_space = (
            environment.single_observation_space,
            environment.single_action_space,
        )

    def reset(self, seed: int | None = None) -> Array:
        observations, _ = self.environment.reset(seed=seed)
        assert observations in self.environment.observation_space
        return observations

    def step(self, actions: Array) -> Step:
        observations, rewards, terminated, truncated, infos = self.environment.step(actions)
        assert observations in self.environment.observation_space
        assert not terminated.any()
        assert terminated.dtype == truncated.dtype == np.bool_
        return Step(observations, rewards, truncated, **{n: infos[n] for n in ("error", "bops", "trade_off", "clip")})


class AgentsFace:
    """A stable-baselines3 environment as a face; errors and BOPs of region agents are their own region's."""

    def __init__(self, environment: AgentsVecEnv) -> None:
        self.environment, self.core = environment, environment.core
        assert isinstance(environment.observation_space, spaces.Box)
        assert isinstance(environment.action_space, spaces.MultiDiscrete)
        self.observation_space, self.action_space = environment.observation_space, environment.action_space

    def reset(self, seed: int | None = None) -> Array:
        if seed is not None:
            self.environment.seed(seed)
        observations: Array = self.environment.reset()
        return observations

    def step(self, actions: Array) -> Step:
        result: Any = self.environment.step(actions)
        observations, rewards, dones, infos = result
        assert len(infos) == self.environment.num_envs
        last = self.environment.last
        assert last is not None
        per_clip = self.core.scheme.agents_per_clip
        error, bops = (self._by_agent(v) for v in (last.result.error, last.result.share))
        return Step(
            observations,
            rewards,
            dones,
            error,
            bops,
            last.trade_off.repeat(per_clip),
            last.result.clip.numpy().repeat(per_clip),
        )

    def _by_agent(self, values: torch.Tensor) -> Array:
        array: Array = (values.flatten() if self.core.scheme.agents == "region" else values.mean((1, 2))).numpy()
        return array


def check_budget(budget: Budget, spent: list[float]) -> None:
    """What the frames of a stream cost, from its first one on, is within the budget."""
    rounding = 1 + 1e-9
    assert max(spent) <= budget.peak * rounding
    if budget.mean is None:
        return
    for end in range(1, len(spent) + 1):
        first = min(budget.peak, budget.bucket * budget.mean)
        assert sum(spent[:end]) <= (first + (end - 1) * budget.mean) * rounding
        for start in range(end):
            assert sum(spent[start:end]) <= (end - start + budget.bucket - 1) * budget.mean * rounding


def recorded_costs(core: BatchedEnvironment) -> Callable[[], Iterator[list[float]]]:
    """Keep what every frame costs from now on; what is returned gives it by clip that was run."""
    streams, spent = core.streams, list[tuple[int, int, float]]()
    run = streams._run

    def recorded(rows: torch.Tensor, state: Any, decision: Any) -> Any:
        result = run(rows, state, decision)
        spent.extend(zip(rows.tolist(), result.time.tolist(), result.bops.tolist(), strict=True))
        return result

    def by_clip() -> Iterator[list[float]]:
        for slot in range(streams.slots):
            own = [(time, bops) for row, time, bops in spent if row == slot]
            starts = [i for i, (time, _) in enumerate(own) if time == 0]
            for first, end in zip(starts, [*starts[1:], len(own)], strict=True):
                yield [bops for _, bops in own[first:end]]

    streams._run = recorded  # type: ignore[method-assign]
    return by_clip


class EnvContract:
    """Inherit, set `kind`, and override `make`: everything below must hold."""

    kind: ClassVar[ActionKind]
    budgets: ClassVar[tuple[Budget, ...]] = BUDGETS  # kept to; where few are, other classes keep to the others
    budgeted: ClassVar[bool] = True  # whether budgets are kept; else they are refused

    @pytest.fixture(autouse=True)
    def _checked_once(self, request: pytest.FixtureRequest) -> None:
        """Types are checked at run time in the first test, which runs what all others run again and again."""
        if request.function.__name__ != "test_spaces_shapes_and_types":
            request.getfixturevalue("unchecked_types")

    def make(self, problem: Problem, **settings: Any) -> Face:
        """An environment of `kind` in `problem`, of lambda 0.3 unless `settings` say otherwise."""
        raise NotImplementedError

    @staticmethod
    def actions(face: Face, seed: int) -> Callable[[], Array]:
        """Random actions that do not depend on the face's own generators."""
        generator = np.random.default_rng(seed)
        nvec, agents = face.action_space.nvec, face.core.agents
        return lambda: generator.integers(nvec, size=(agents, len(nvec)))

    def rollout(self, face: Face, steps: int, seed: int | None = 0, action_seed: int = 0) -> Rollout:
        """Observations (one more than steps) and steps under random actions."""
        act = self.actions(face, action_seed)
        observations = [face.reset(seed)]
        taken = []
        for _ in range(steps):
            taken.append(face.step(act()))
            observations.append(taken[-1].observations)
        return observations, taken

    def ran(self, problem: Problem, steps: int = LONG) -> Rollout:
        """The first steps of a rollout over a range of lambda, which many tests look at and compare with."""
        if type(self) not in RAN:
            RAN[type(self)] = self.rollout(self.make(problem, trade_off=SPAN), LONG)
        observations, taken = RAN[type(self)]
        return observations[: steps + 1], taken[:steps]

    def test_spaces_shapes_and_types(self, problem: Problem) -> None:
        face = self.make(problem, trade_off=SPAN, **self.budget())
        agents, names = face.core.agents, face.core.scheme.feature_names
        size = len(names)
        assert face.observation_space.shape == (size,)
        assert face.observation_space.dtype == np.float32
        observations, steps = self.rollout(face, 10)
        for t, observation in enumerate(observations):
            assert observation.shape == (agents, size), f"step {t}"
            assert observation.dtype == np.float32, f"step {t}"
            assert all(row in face.observation_space for row in observation), f"step {t}"
        for t, step in enumerate(steps):
            assert step.rewards.shape == step.truncated.shape == (agents,), f"step {t}"
            assert step.rewards.dtype == np.float32, f"step {t}"
            assert step.truncated.dtype == np.bool_, f"step {t}"
        values = np.concatenate(observations)
        assert np.isfinite(values).all()
        assert 0 <= values.min() < values.max() <= 1
        constant = np.flatnonzero(np.ptp(values, 0) == 0)
        never = [names[i] for i in constant if self.budgeted or names[i] != "budget_left"]
        assert not never, f"features that never vary: {never}"

    def test_sampled_actions_are_accepted(self, problem: Problem) -> None:
        face = self.make(problem)
        face.reset(0)
        face.action_space.seed(0)
        for _ in range(3):
            face.step(np.stack([face.action_space.sample() for _ in range(face.core.agents)]))

    def budget(self) -> dict[str, Budget]:
        """A budget among the settings, where budgets are kept."""
        return {"budget": BUDGET} if self.budgeted else {}

    def test_no_budget_is_ever_exceeded(self, problem: Problem) -> None:
        """Nor by any first frames of a clip together, nor by any window of later ones."""
        for budget in self.budgets:
            if self.budgeted:
                self.keep_to(budget, problem)
                continue
            with pytest.raises(SettingsError, match="no frames under a budget"):
                self.make(problem, budget=budget)

    def keep_to(self, budget: Budget, problem: Problem) -> None:
        """Random actions under a budget."""
        face = self.make(problem, budget=budget)
        costs = recorded_costs(face.core)
        self.rollout(face, 14)
        clips = list(costs())
        assert sum(map(len, clips)) >= 14 * face.core.streams.slots
        for spent in clips:
            check_budget(budget, spent)

    def test_reward_is_accuracy_minus_lambda_bops_of_the_infos(self, problem: Problem) -> None:
        for trade_off in (0.3, SPAN):
            _, steps = self.ran(problem) if trade_off == SPAN else self.rollout(self.make(problem), 3)
            for t, step in enumerate(steps):
                assert np.isfinite(step.rewards).all(), f"step {t}"
                expected = 1 - step.error - step.trade_off * step.bops
                np.testing.assert_allclose(step.rewards, expected, rtol=0, atol=1e-6, err_msg=f"step {t}")
            seen = np.concatenate([s.trade_off for s in steps])
            low, high = trade_off if isinstance(trade_off, tuple) else (trade_off, trade_off)
            assert np.all((seen >= np.float32(low)) & (seen <= np.float32(high)))
            assert (len(np.unique(seen)) > 1) == (low < high)

    def test_reward_scale_multiplies_rewards(self, problem: Problem) -> None:
        _, scaled = self.rollout(self.make(problem, trade_off=SPAN, reward_scale=20.0), 6)
        for a, b in zip(self.ran(problem, 6)[1], scaled, strict=True):
            np.testing.assert_allclose(20 * a.rewards, b.rewards, rtol=1e-5, atol=1e-6)

    def test_clips_end_by_truncation_after_their_last_frame_only(self, problem: Problem) -> None:
        _, steps = self.ran(problem)
        done = np.zeros(len(steps[0].clip), dtype=int)  # frames since the forced keyframe
        for t, step in enumerate(steps):
            done += 1
            lengths = np.array([len(problem.clips[c]) for c in step.clip])
            expected = done == lengths - 1
            assert (step.truncated == expected).all(), (
                f"step {t}: truncated {step.truncated.tolist()} at frames {done.tolist()} of {lengths.tolist()}"
            )
            done[step.truncated] = 0

    def test_every_clip_comes_once_before_any_comes_again(self, problem: Problem) -> None:
        _, steps = self.ran(problem)
        ended: list[list[int]] = [[] for _ in steps[0].clip]
        for step in steps:
            for agent in np.flatnonzero(step.truncated):
                ended[agent].append(int(step.clip[agent]))
        for clips in ended:
            assert sorted(clips[: len(problem)]) == list(range(len(problem)))

    def test_a_seed_fixes_everything_and_what_was_returned_is_not_changed_later(self, problem: Problem) -> None:
        face = self.make(problem, trade_off=SPAN)
        act = self.actions(face, 0)
        kept, taken = [face.reset(0)], []
        copies = [kept[0].copy()]
        for _ in range(8):
            step = face.step(act())
            taken.append(Step(**{name: np.array(value) for name, value in vars(step).items()}))
            kept += vars(step).values()
            copies += vars(taken[-1]).values()
        for i, (value, copy) in enumerate(zip(kept, copies, strict=True)):
            assert first_difference(value, copy) is None, f"value {i} was changed after it was returned"
        self.assert_same(([copies[0], *(step.observations for step in taken)], taken), self.ran(problem, 8))

    def test_a_seed_fixes_everything_whatever_ran_before(self, problem: Problem) -> None:
        face = self.make(problem, trade_off=SPAN, **self.budget())
        first = self.rollout(face, 6, seed=7)
        self.rollout(face, 4, seed=3, action_seed=1)
        self.assert_same(first, self.rollout(face, 6, seed=7))

    def test_other_seeds_and_later_resets_give_other_episodes(self, problem: Problem) -> None:
        face = self.make(problem, trade_off=SPAN)
        first, other, later = face.reset(1).copy(), face.reset(2).copy(), face.reset().copy()
        assert (first != other).any()
        assert (other != later).any()

    @staticmethod
    def assert_same(a: Rollout, b: Rollout) -> None:
        for t, (x, y) in enumerate(zip(a[0], b[0], strict=True)):
            difference = first_difference(x, y)
            assert difference is None, f"observation {t}: {difference}"
        for t, (s, u) in enumerate(zip(a[1], b[1], strict=True)):
            assert_same(s, u, ("rewards", "truncated", "error", "bops", "clip", "trade_off"), f"step {t}")

    def test_labels_are_not_observed(self, problem: Problem) -> None:
        """Neither the current frame's labels nor any other's reach an observation."""
        shuffled = tuple((2 - t.clamp_max(2)).to(torch.uint8) for t in problem.targets)
        mine, theirs = self.ran(problem, 9), self.changed(9, problem, targets=shuffled)
        for t, (a, b) in enumerate(zip(mine[0], theirs[0], strict=True)):
            assert first_difference(a, b) is None, f"observation {t} depends on labels"
        assert any((a.rewards != b.rewards).any() for a, b in zip(mine[1], theirs[1], strict=True))

    def changed(self, steps: int, problem: Problem, **parts: Any) -> Rollout:
        """The beginning of `ran` where parts of the problem are others."""
        return self.rollout(self.make(replace(problem, **parts), trade_off=SPAN), steps)

    def test_the_future_is_not_observed(self, problem: Problem) -> None:
        """Observation t, of the choice for frame t + 1, depends on frames up to t + 1 only."""
        changed_from = 3
        clips = tuple(_with_changed_future(clip, changed_from) for clip in problem.clips)
        mine, theirs = self.ran(problem, 4), self.changed(4, problem, clips=clips)
        for t in range(changed_from - 1):
            difference = first_difference(mine[0][t], theirs[0][t])
            assert difference is None, f"observation {t} depends on later frames: {difference}"
        assert first_difference(mine[0][changed_from - 1], theirs[0][changed_from - 1]) is not None

    def test_the_current_output_is_not_observed(self, problem: Problem) -> None:
        """An observation comes before its frame runs: a float network of other predictions changes none of them."""
        silent = tuple(torch.zeros_like(t) for t in problem.teacher)
        mine, theirs = self.ran(problem, 6), self.changed(6, problem, teacher=silent)
        for t, (a, b) in enumerate(zip(mine[0], theirs[0], strict=True)):
            assert first_difference(a, b) is None, f"observation {t} depends on the float output"

    def test_a_step_before_reset_is_refused(self, problem: Problem) -> None:
        face = self.make(problem)
        with pytest.raises(PolicyError, match=r"over|reset"):
            face.step(self.actions(face, 0)())

    def test_wrong_actions_are_refused_and_change_nothing(self, problem: Problem) -> None:
        face = self.make(problem, trade_off=SPAN)
        face.reset(0)
        good = self.actions(face, 0)()
        wrong = {
            "above": np.where(np.arange(good.shape[1]) == 0, face.action_space.nvec[0], good),
            "below": np.where(np.arange(good.shape[1]) == good.shape[1] - 1, -1, good),
            "float": good + 0.5,
            "long": np.concatenate([good, good[:, :1]], 1),
            "short": good[:, :-1],
            "missing agent": good[:-1] if len(good) > 1 else good[:, :0],
        }
        refused = []
        for name, bad in wrong.items():
            with suppress(PolicyError):
                face.step(bad)
                continue
            refused.append(name)
        assert refused == list(wrong)
        difference = first_difference(face.step(good).observations, self.ran(problem)[0][1])
        assert difference is None, difference


def _with_changed_future(clip: Clip, start: int) -> Clip:
    """The same clip with other pixels from frame `start` on."""
    frames = clip.frames.clone()
    frames[start:] = 255 - frames[start:]
    return replace(clip, frames=frames)
