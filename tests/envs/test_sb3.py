"""The stable-baselines3 face: region agents and frame agents keep the contract and fit the library."""

import copy
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecMonitor, VecNormalize

from resq_rl.envs import DEFAULT_THRESHOLDS, Agents, Decision, EpisodeSettings, FrameBits, FrameView, Problem
from resq_rl.envs.batched import BatchedEnvironment
from resq_rl.envs.sb3 import AgentsVecEnv
from resq_rl.errors import PolicyError, SettingsError
from resq_rl.policies import DynamicResQ, GroupThresholds
from resq_rl.quantization import LevelField, Reference
from resq_rl.sealed import pack, unpack
from tests.envs import problems
from tests.envs.contract import BUDGETS, AgentsFace, EnvContract, Face
from tests.envs.problems import assert_same, first_difference

EPISODE = ("trade_off", "reward_scale", "intervals", "frame_share", "relative")


class AgentsContract(EnvContract):
    agents: ClassVar[Agents] = "region"

    def make(self, problem: Problem, **settings: Any) -> Face:
        episodes = EpisodeSettings(**({"trade_off": 0.3} | {k: settings.pop(k) for k in EPISODE if k in settings}))
        return AgentsFace(
            AgentsVecEnv(problems.agents(problem, 2, self.kind, self.agents, episodes=episodes, **settings))
        )


class TestRegionAgentsOfThresholds(AgentsContract):
    kind = "region_thresholds"


class TestRegionAgentsOfBits(AgentsContract):
    kind = "region_bits"
    budgets = BUDGETS[:2]


class TestFrameAgentsOfBits(AgentsContract):
    kind = "frame_bits"
    budgets = BUDGETS[2:]
    agents = "frame"


class TestFrameAgentsOfThresholds(AgentsContract):
    kind = "region_thresholds"
    budgets = BUDGETS[:2]
    agents = "frame"


class TestKeyframeAgents(AgentsContract):
    kind = "keyframe"
    budgets = BUDGETS[2:]
    agents = "frame"

    def make(self, problem: Problem, **settings: Any) -> Face:
        return super().make(problem, fields=DynamicResQ("previous", 0, tau=0.5), **settings)


def environment(problem: Problem, slots: int = 2, **episodes: Any) -> AgentsVecEnv:
    return AgentsVecEnv(problems.agents(problem, slots, episodes=EpisodeSettings(**({"trade_off": 0.3} | episodes))))


def random_actions(env: AgentsVecEnv, seed: int) -> np.ndarray:
    scheme = env.core.scheme
    return np.random.default_rng(seed).integers(scheme.nvec, size=(env.num_envs, len(scheme.nvec)))


def stepped(env: Any, actions: np.ndarray) -> Any:
    """The four results of a step; the library's types say that observations may be dictionaries."""
    return env.step(actions)


@pytest.mark.parametrize("reference", ["previous", "keyframe"])
def test_keyframe_agents_are_the_frame_agent_whose_fields_are_given(reference: Any, problem: Problem) -> None:
    """The policy's fields where the agent wants no keyframe, keyframes where it does and nowhere else."""
    episodes = EpisodeSettings(trade_off=(0.1, 1.0))
    choices = [7, 2, 4]
    fields = GroupThresholds(reference, 1, taus=tuple(DEFAULT_THRESHOLDS[c] for c in choices))  # its interval is unused
    timing = problems.agents(problem, 2, "keyframe", "frame", episodes=episodes, reference=reference, fields=fields)
    whole = problems.agents(problem, 2, "region_thresholds", "frame", episodes=episodes, reference=reference)
    timing.reset([3, 4])
    whole.reset([3, 4])
    generator = np.random.default_rng(0)
    for t in range(12):
        refresh = generator.integers(2, size=(2, 1))
        mine = timing.step(refresh)
        theirs = whole.step(np.concatenate([np.tile(whole.scheme.uniform_action(choices)[:-1], (2, 1)), refresh], 1))
        assert mine.result.cost.keyframe.tolist() == (refresh[:, 0] == 1).tolist(), f"step {t}"
        assert_same(mine.result, theirs.result, ("prediction", "error", "share", "clip", "last"), f"step {t}")
        assert first_difference(mine.rewards, theirs.rewards) is None, f"step {t}"


class Noted:
    """A policy that notes which observations it was shown, and chooses levels by region from them."""

    reference: Reference = "previous"
    trade_off = 0.3
    trade_off_range = (0.3, 0.3)
    macs = 0
    bits = 8
    settings: ClassVar[dict[str, object]] = {}

    def __init__(self) -> None:
        self.seen: list[np.ndarray] = []
        self.levels: list[np.ndarray] = []

    def decide(self, view: FrameView) -> Decision:
        seen = view.observation.per_frame()
        levels = (view.observation.regions[..., 0] * 100).long() % 4
        self.seen.append(seen.numpy().copy())
        self.levels.append(levels.numpy().copy())
        field = LevelField(levels[:, None].expand(-1, view.groups, -1, -1))
        return Decision(torch.ones(view.clips, dtype=torch.bool), field)


def test_keyframe_agents_and_the_policy_of_the_fields_see_the_same_frame(problem: Problem) -> None:
    fields = Noted()
    core = problems.agents(problem, 2, "keyframe", "frame", fields=fields)
    bits = problems.agents(problem, 2, "region_bits", "frame", by_group=False)
    observations = core.reset([1, 2])
    bits.reset([1, 2])
    for t in range(10):
        step = core.step(np.zeros((2, 1), dtype=np.int64))
        assert first_difference(observations, fields.seen[-1]) is None, f"step {t}"
        assert not step.result.cost.keyframe.any(), "the keyframes of the policy of the fields are ignored"
        twin = bits.step(np.concatenate([fields.levels[-1].reshape(2, -1), np.zeros((2, 1), dtype=np.int64)], 1))
        assert first_difference(step.result.share.numpy(), twin.result.share.numpy()) is None, f"step {t}"
        observations = step.observations
    assert len({tuple(levels.flatten()) for levels in fields.levels}) > 3, "the fields change"


def test_keyframe_agents_need_a_policy_for_the_fields_and_no_others_do(problem: Problem) -> None:
    with pytest.raises(SettingsError, match="'keyframe' choose no fields: give a policy as 'fields'"):
        problems.agents(problem, 2, "keyframe", "frame")
    with pytest.raises(SettingsError, match="'frame_bits' choose their fields: give a policy as 'fields' with kind"):
        problems.agents(problem, 2, "frame_bits", "frame", fields=DynamicResQ("previous"))
    with pytest.raises(SettingsError, match="reference 'previous', the problem has 'keyframe'"):
        problems.agents(problem, 2, "keyframe", "frame", reference="keyframe", fields=DynamicResQ("previous"))


@pytest.mark.parametrize("kind", ["region_bits", "region_thresholds"])
def test_region_agents_are_the_frame_agent_that_takes_the_same_actions(kind: Any, problem: Problem) -> None:
    """One row of choices per region, or the same rows side by side in one action: the same frames come out."""
    episodes = EpisodeSettings(trade_off=(0.1, 1.0), intervals=(0,))
    regions = problems.agents(problem, 2, kind, "region", episodes=episodes)
    frame = problems.agents(problem, 2, kind, "frame", episodes=episodes)
    a, b = regions.reset([3, 4]), frame.reset([3, 4])
    count, features = regions.scheme.regions, 12  # of a region; the frame's follow
    generator = np.random.default_rng(0)
    for t in range(10):
        whole = np.concatenate([a.reshape(2, count, -1)[..., :features].reshape(2, -1), a[::count, features:]], 1)
        assert first_difference(whole, b) is None, f"step {t}"
        actions = generator.integers(regions.scheme.nvec, size=(2 * count, len(regions.scheme.nvec)))
        joined = np.concatenate([actions.reshape(2, -1), np.zeros((2, 1), dtype=np.int64)], 1)
        mine, theirs = regions.step(actions), frame.step(joined)
        assert_same(mine.result, theirs.result, ("prediction", "error", "share", "clip", "last"), f"step {t}")
        np.testing.assert_allclose(mine.rewards.reshape(2, -1).mean(1), theirs.rewards, atol=1e-6)
        a, b = mine.observations, theirs.observations


def test_an_agent_sees_and_decides_its_own_region_row_by_row(problem: Problem) -> None:
    env = environment(problem, 1, intervals=(0,))
    env.reset()
    scheme = env.core.scheme
    rows, columns = problem.grid
    for agent in range(env.num_envs):
        env.reset()
        actions = np.tile(scheme.uniform_action(scheme.choices - 1), (env.num_envs, 1))
        actions[agent] = 0
        observations, _, _, _ = stepped(env, actions)
        assert env.last is not None
        share = env.last.result.share[0]
        assert share.argmax() == agent
        spent = observations[:, [scheme.feature_names.index(f"spent_group{g}") for g in range(3)]].sum(1)
        assert spent.argmax() == agent
        assert divmod(agent, columns) == tuple(int(i) for i in np.argwhere(share.numpy() == share.max().item())[0])
    assert env.num_envs == rows * columns


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_frames_reward_can_be_mixed_in(share: float, problem: Problem) -> None:
    env = environment(problem, frame_share=share)
    env.seed(0)
    env.reset()
    _, rewards, _, _ = stepped(env, random_actions(env, 0))
    assert env.last is not None
    result = env.last.result
    local = (1 - result.error - 0.3 * result.share).numpy()
    frame = local.mean((1, 2), keepdims=True)
    np.testing.assert_allclose(rewards, ((1 - share) * local + share * frame).ravel(), atol=1e-6)


@pytest.mark.parametrize("agents", ["region", "frame"])
def test_relative_rewards_leave_out_what_the_float_network_gets_wrong(agents: Any, problem: Problem) -> None:
    episodes = EpisodeSettings(trade_off=(0.1, 1.0), relative=True, reward_scale=3.0)
    env = AgentsVecEnv(problems.agents(problem, 2, agents=agents, episodes=episodes))
    env.seed(1)
    env.reset()
    _, rewards, _, _ = stepped(env, random_actions(env, 0))
    assert env.last is not None
    result, trade_off = env.last.result, env.last.trade_off
    float_error = env.core.streams.engine.float_error(result.clip, result.time).numpy()
    local = 3.0 * (float_error - result.error.numpy() - trade_off[:, None, None] * result.share.numpy())
    expected = local.ravel() if agents == "region" else local.mean((1, 2))
    np.testing.assert_allclose(rewards, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(env.last.frame_rewards, result.reward(torch.tensor(trade_off)).numpy())


def test_ends_of_clips_are_reported_as_the_library_wants_them(problem: Problem) -> None:
    env = environment(problem, 2)
    env.seed(0)
    env.reset()
    per_clip = env.core.scheme.agents_per_clip
    returns, lengths, ends = np.zeros(2), np.zeros(2, dtype=int), 0
    for t in range(15):
        observations, _, dones, infos = stepped(env, random_actions(env, t))
        assert env.last is not None
        returns += env.last.frame_rewards
        lengths += 1
        for clip in range(2):
            own = slice(clip * per_clip, (clip + 1) * per_clip)
            assert dones[own].all() or not dones[own].any()
            for agent in range(own.start, own.stop):
                assert ("terminal_observation" in infos[agent]) == dones[agent]
                assert infos[agent].get("TimeLimit.truncated", False) == dones[agent]
                if dones[agent]:
                    last, first = infos[agent]["terminal_observation"], observations[agent]
                    age = env.core.scheme.feature_names.index("keyframe_age")
                    assert last[0] == 0, "the last frame does not differ from itself"
                    assert last[age] > first[age] == 0
            if dones[own.start]:
                episode = infos[own.start]["episode"]
                assert episode["r"] == pytest.approx(returns[clip], abs=1e-5)
                assert episode["l"] == lengths[clip]
                returns[clip], lengths[clip] = 0, 0
                ends += 1
    assert ends >= 4


def test_frames_are_counted_with_forced_keyframes(problem: Problem) -> None:
    env = environment(problem, 2)
    ran = 0
    model, start = env.core.streams, env.core.streams.start

    def counting(slots: Any, *rest: Any) -> Any:
        nonlocal ran
        ran += len(list(slots))
        return start(slots, *rest)

    model.start = counting  # type: ignore[method-assign, assignment]
    env.reset()
    for t in range(13):
        env.step(random_actions(env, t))
        ran += 2
        assert env.frames == ran


def test_seeding_is_for_the_next_reset_only(problem: Problem) -> None:
    env = environment(problem, 2, trade_off=(0.1, 1.0))
    env.seed(5)
    first = env.reset().copy()
    second = env.reset().copy()
    env.seed(5)
    assert first_difference(env.reset(), first) is None
    assert first_difference(env.reset(), second) is None
    assert first_difference(first, second) is not None


def test_a_snapshot_brings_back_the_order_of_clips_and_lambdas(problem: Problem) -> None:
    def following(core: BatchedEnvironment) -> list[tuple[list[int], list[float]]]:
        out = []
        for _ in range(6):
            core.reset()
            out.append((core.streams.clip.tolist(), core.streams.trade_off.tolist()))
        return out

    episodes = EpisodeSettings(trade_off=(0.1, 1.0))
    core = problems.agents(problem, 2, episodes=episodes)
    core.reset([1, 2])
    snapshot = copy.deepcopy(core.snapshot(streams=False))
    expected = following(core)
    other = problems.agents(problem, 2, episodes=episodes)
    other.restore(snapshot)
    assert following(other) == expected


@pytest.mark.parametrize("reference", ["previous", "keyframe"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_clips_in_progress_go_on_from_a_snapshot(reference: Reference, steps: int, problem: Problem) -> None:
    """After a keyframe, a residual, and clips that ended and were followed."""

    def made() -> AgentsVecEnv:
        episodes = EpisodeSettings(trade_off=(0.1, 1.0), intervals=(2, 0))
        return AgentsVecEnv(problems.agents(problem, 2, episodes=episodes, reference=reference))

    def following(env: AgentsVecEnv) -> list[Any]:
        out = []
        for t in range(steps, steps + 8):
            observations, rewards, dones, infos = stepped(env, random_actions(env, t))
            out.append((observations.tolist(), rewards.tolist(), dones.tolist(), [i.get("episode") for i in infos]))
        return out

    first = made()
    first.seed(3)
    first.reset()
    for t in range(steps):
        stepped(first, random_actions(first, t))
    snapshot = unpack(pack(first.snapshot()))
    second = made()
    second.restore(snapshot)
    assert following(second) == following(first)
    assert second.frames == first.frames


@pytest.mark.parametrize("wrapper", [VecMonitor, VecNormalize])
def test_wrappers_of_the_library_fit(wrapper: Any, problem: Problem) -> None:
    env = environment(problem, 2)
    wrapped = wrapper(env)
    wrapped.seed(0)
    observations = wrapped.reset()
    for t in range(8):
        observations, rewards, dones, infos = stepped(wrapped, random_actions(env, t))
        assert np.isfinite(observations).all()
        assert np.isfinite(rewards).all()
        if wrapper is VecMonitor:
            assert all("episode" in infos[i] for i in np.flatnonzero(dones))


def test_ppo_predicts_for_all_agents_at_once(problem: Problem) -> None:
    env = environment(problem, 2)
    model = PPO("MlpPolicy", env, n_steps=4, batch_size=48, n_epochs=1, seed=0, device="cpu")
    observations = env.reset()
    actions, _ = model.predict(observations, deterministic=True)
    assert actions.shape == (env.num_envs, 3)
    env.step(actions)
    model.learn(96)


def test_methods_for_sub_environments_reach_the_whole(problem: Problem) -> None:
    env = environment(problem, 2)
    assert env.get_attr("frames") == [0] * env.num_envs
    assert env.get_attr("frames", indices=[0, 3]) == [0, 0]
    env.set_attr("frames", 7)
    assert env.frames == 7
    assert env.env_is_wrapped(VecMonitor, indices=0) == [False]
    assert len(env.env_method("close")) == env.num_envs
    with pytest.raises(RuntimeError, match="step_async"):
        env.step_wait()


def test_impossible_combinations_are_refused(problem: Problem) -> None:
    with pytest.raises(SettingsError, match="autoreset"):
        AgentsVecEnv(problems.agents(problem, 2, autoreset=False))
    with pytest.raises(SettingsError, match="lambda"):
        BatchedEnvironment(problems.streams(problem, 1), problems.scheme(problem), EpisodeSettings(trade_off=0.3))
    streams = problems.streams(replace(problem, grid=(1, 1)), 1, trade_off_range=(0.3, 0.3))
    with pytest.raises(SettingsError, match="groups and grid"):
        BatchedEnvironment(streams, problems.scheme(problem), EpisodeSettings(trade_off=0.3))
    core = problems.agents(problem, 2)
    with pytest.raises(SettingsError, match="One seed for each of 2 clips"):
        core.reset([1])
    core.reset([1, 2])
    with pytest.raises(PolicyError):
        core.step(np.zeros((6, 3), dtype=np.int64))  # the agents of one clip only


@pytest.mark.parametrize(
    "settings",
    [
        {"trade_off": 0.0},
        {"trade_off": (0.2, 0.1)},
        {"trade_off": float("nan")},
        {"intervals": ()},
        {"intervals": (8, -1)},
        {"frame_share": 1.5},
    ],
)
def test_impossible_episodes_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=next(iter(settings))):
        EpisodeSettings(**settings)


def test_the_single_environment_and_a_frame_agent_agree(problem: Problem) -> None:
    env = AgentsVecEnv(problems.agents(problem, 1, "frame_bits", "frame"))
    single = FrameBits(problem=problem)
    env.seed(9)
    assert first_difference(env.reset()[0], single.reset(seed=9)[0]) is None
    for t in range(10):
        actions = random_actions(env, t)
        observations, rewards, dones, infos = stepped(env, actions)
        observation, reward, _, truncated, _ = single.step(actions[0])
        assert rewards[0] == reward
        assert dones[0] == truncated
        if truncated:
            assert first_difference(infos[0]["terminal_observation"], observation) is None
            observation = single.reset()[0]
        assert first_difference(observations[0], observation) is None, f"step {t}"
