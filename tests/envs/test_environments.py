"""The registered environments, single and vector, keep the contract, and agree with each other."""

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import MultiDiscrete
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import DictInfoToList, RecordEpisodeStatistics

from resq_rl.envs import (
    ActionKind,
    FrameBits,
    FrameLevel,
    Problem,
    RegionBits,
    RegionThresholds,
    ResQEnv,
    ResQVectorEnv,
)
from resq_rl.errors import PolicyError, SettingsError, VideoError
from tests.envs import problems
from tests.envs.contract import BUDGETS, EnvContract, Face, SingleFace, VectorFace
from tests.envs.problems import first_difference

ENVIRONMENTS: dict[str, type[ResQEnv]] = {
    "resq_rl/FrameBits-v0": FrameBits,
    "resq_rl/FrameLevel-v0": FrameLevel,
    "resq_rl/RegionBits-v0": RegionBits,
    "resq_rl/RegionThresholds-v0": RegionThresholds,
}


def single(kind: ActionKind, problem: Problem, **settings: Any) -> ResQEnv:
    environment = next(e for e in ENVIRONMENTS.values() if e.kind == kind)
    return environment(problem=problem, **settings)


class SingleContract(EnvContract):
    def make(self, problem: Problem, **settings: Any) -> Face:
        return SingleFace(single(self.kind, problem, **settings))


class VectorContract(EnvContract):
    def make(self, problem: Problem, **settings: Any) -> Face:
        return VectorFace(ResQVectorEnv(self.kind, 3, problem=problem, **settings))


class TestFrameBits(SingleContract):
    kind = "frame_bits"
    budgets = BUDGETS[:2]


class TestFrameLevel(SingleContract):
    kind = "frame_level"
    budgets = BUDGETS[2:]


class TestRegionBits(SingleContract):
    kind = "region_bits"
    budgets = BUDGETS[:2]


class TestRegionThresholds(SingleContract):
    kind = "region_thresholds"


class TestRegionThresholdsByGroup(SingleContract):
    kind = "region_thresholds"
    budgets = BUDGETS[2:]

    def make(self, problem: Problem, **settings: Any) -> Face:
        return super().make(problem, by_group=True, **settings)


class TestVectorFrameBits(VectorContract):
    kind = "frame_bits"


class TestVectorFrameLevel(VectorContract):
    kind = "frame_level"
    budgets = BUDGETS[:2]


class TestVectorRegionBits(VectorContract):
    kind = "region_bits"
    budgets = BUDGETS[2:]


class TestVectorRegionThresholds(VectorContract):
    kind = "region_thresholds"
    budgets = BUDGETS[:2]


# Gymnasium ---------------------------------------------------------------------------------------------------------


def test_all_ids_are_registered() -> None:
    assert {name for name in gymnasium.registry if name.startswith("resq_rl/")} == set(ENVIRONMENTS)


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_the_checker_passes_every_id(name: str, problem: Problem) -> None:
    """With own parts, and one of them with the embedded default, which is the same for all."""
    check_env(gymnasium.make(name, render_mode="rgb_array", problem=problem).unwrapped)
    if name == "resq_rl/RegionThresholds-v0":
        environment = gymnasium.make(name, render_mode="rgb_array")
        check_env(environment.unwrapped)
        environment.close()


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_rollouts_of_two_instances_are_equal(name: str, problem: Problem) -> None:
    seed, steps = 11, 12
    first, second = (gymnasium.make(name, trade_off=(0.1, 1.0), problem=problem) for _ in range(2))
    assert first_difference(first.reset(seed=seed)[0], second.reset(seed=seed)[0]) is None
    first.action_space.seed(seed)
    for t in range(steps):
        action = first.action_space.sample()
        a, b = first.step(action), second.step(action)
        difference = first_difference(a[0], b[0])
        assert difference is None, f"seed {seed}, step {t}, observation: {difference}"
        assert a[1:] == b[1:], f"seed {seed}, step {t}: {a[1:]} and {b[1:]}"
        if a[3]:
            assert first_difference(first.reset()[0], second.reset()[0]) is None, f"seed {seed}, reset after step {t}"


@pytest.mark.parametrize(("name", "reference"), [*zip(ENVIRONMENTS, ["previous", "keyframe"] * 2, strict=True)])
def test_vector_equals_single_bit_for_bit_across_ends_of_clips(name: str, reference: str, problem: Problem) -> None:
    check_vector_equals_single(name, {"reference": reference, "problem": problem})


def test_vector_equals_single_where_the_grid_does_not_divide_the_frame(uneven_problem: Problem) -> None:
    check_vector_equals_single("resq_rl/RegionThresholds-v0", {"problem": uneven_problem})


def check_vector_equals_single(name: str, parts: dict[str, Any]) -> None:
    """Sub-environment i seeded s is the single environment seeded s + i: observations, rewards and infos."""
    seed, steps, count = 5, 10, 3
    settings = {"trade_off": (0.1, 1.0), "budget": {"peak": 0.5, "mean": 0.2}, **parts}
    vector = gymnasium.make_vec(name, num_envs=count, **settings)
    singles = [gymnasium.make(name, **settings) for _ in range(count)]
    observations, _ = vector.reset(seed=seed)
    for i, environment in enumerate(singles):
        assert first_difference(observations[i], environment.reset(seed=seed + i)[0]) is None, f"reset of {i}"
    vector.action_space.seed(seed)
    ends = 0
    for t in range(steps):
        actions = vector.action_space.sample()
        observations, rewards, _, truncated, infos = vector.step(actions)
        for i, environment in enumerate(singles):
            observation, reward, _, ended, info = environment.step(actions[i])
            where = f"step {t}, sub-environment {i}"
            assert rewards[i] == reward, f"{where}: rewards {rewards[i]!r} and {reward!r}"
            assert truncated[i] == ended, where
            for key, value in info.items():
                assert infos[key][i] == np.float32(value), f"{where}: {key} {infos[key][i]!r} and {value!r}"
            if ended:
                ends += 1
                assert infos["_final_obs"][i]
                assert first_difference(infos["final_obs"][i], observation) is None, where
                observation = environment.reset()[0]
            difference = first_difference(observations[i], observation)
            assert difference is None, f"{where}, observation: {difference}"
    assert ends >= count


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_make_vec_uses_the_batched_environment_and_can_use_gymnasiums_own(name: str, problem: Problem) -> None:
    batched = gymnasium.make_vec(name, num_envs=2, problem=problem)
    assert isinstance(batched.unwrapped, ResQVectorEnv)
    assert batched.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    sync = gymnasium.make_vec(
        name,
        num_envs=2,
        vectorization_mode="sync",
        vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP},
        problem=problem,
    )
    assert isinstance(sync.unwrapped, SyncVectorEnv)
    assert first_difference(batched.reset(seed=3)[0], sync.reset(seed=3)[0]) is None
    batched.action_space.seed(0)
    for t in range(8):
        actions = batched.action_space.sample()
        a, b = batched.step(actions), sync.step(actions)
        for x, y in zip(a[:4], b[:4], strict=True):
            difference = first_difference(np.asarray(x, np.float32), np.asarray(y, np.float32))
            assert difference is None, f"step {t}: {difference}"
        assert ("final_obs" in a[4]) == ("final_obs" in b[4])
        if "final_obs" in a[4]:
            assert (a[4]["_final_obs"] == b[4]["_final_obs"]).all()
            for x, y in zip(a[4]["final_obs"], b[4]["final_obs"], strict=True):
                assert (x is None) == (y is None)
                assert x is None or first_difference(x, y) is None
    batched.close()
    sync.close()


def test_vector_wrappers_of_gymnasium_work(problem: Problem) -> None:
    vector = ResQVectorEnv("frame_bits", 3, problem=problem)
    wrapped = DictInfoToList(RecordEpisodeStatistics(vector))
    wrapped.reset(seed=0)
    vector.action_space.seed(0)
    returns = np.zeros(3)
    episodes = 0
    for _ in range(12):
        _, rewards, _, truncated, infos = wrapped.step(vector.action_space.sample())
        returns += rewards
        for i in np.flatnonzero(truncated):
            assert infos[i]["episode"]["r"] == pytest.approx(returns[i], abs=1e-5)
            assert infos[i]["final_obs"] in vector.single_observation_space
            returns[i] = 0
            episodes += 1
    assert episodes >= 3


@pytest.mark.parametrize("seed", [4, np.int64(4), [4, 5]])
def test_vector_seeds_may_be_given_in_several_ways(seed: object, problem: Problem, unchecked_types: None) -> None:
    vector = ResQVectorEnv("frame_bits", 2, problem=problem)
    expected = vector.reset(seed=4)[0]
    vector.reset(seed=99)
    assert first_difference(vector.reset(seed=seed)[0], expected) is None  # type: ignore[arg-type]


def test_vector_refuses_what_it_cannot_do(problem: Problem) -> None:
    vector = ResQVectorEnv("frame_bits", 2, problem=problem)
    with pytest.raises(SettingsError, match="2 sub-environments need as many seeds, got 3"):
        vector.reset(seed=[1, 2, 3])
    with pytest.raises(SettingsError, match="reset_mask"):
        vector.reset(options={"reset_mask": np.array([True, False])})
    with pytest.raises(SettingsError, match="num_envs"):
        ResQVectorEnv("frame_bits", 0, problem=problem)


def test_seed_of_a_sub_environment_may_be_left_open(problem: Problem) -> None:
    vector = ResQVectorEnv("frame_bits", 2, problem=problem, trade_off=(0.1, 1.0))
    known = vector.reset(seed=[4, None])[1]["trade_off"]
    again = vector.reset(seed=[4, None])[1]["trade_off"]
    assert known[0] == again[0]
    assert known[1] != again[1]


def test_a_step_after_the_end_is_refused(problem: Problem) -> None:
    environment = single("frame_bits", problem)
    environment.reset(seed=0)
    action = environment.action_space.sample()
    while not environment.step(action)[3]:
        pass
    with pytest.raises(PolicyError, match=r"slots \[0\] are over.*reset"):
        environment.step(action)
    environment.reset()
    environment.step(action)


def test_infos_of_reset_tell_the_clip_and_lambda(problem: Problem) -> None:
    environment = single("frame_bits", problem, trade_off=(0.1, 1.0))
    for _ in range(5):
        _, at_reset = environment.reset()
        _, _, _, _, info = environment.step(environment.action_space.sample())
        assert {k: info[k] for k in at_reset} == at_reset
        assert set(info) == {"error", "bops", "keyframe", "clip", "trade_off"}


def test_a_keyframe_by_action_costs_a_whole_frame(problem: Problem) -> None:
    for kind in ("frame_bits", "frame_level", "region_bits", "region_thresholds"):
        environment = single(kind, problem)
        environment.reset(seed=0)
        skip = environment.core.scheme.uniform_action(
            0 if kind != "region_thresholds" else environment.core.scheme.choices - 1
        )
        _, _, _, _, info = environment.step(skip)
        assert info["keyframe"] is False
        assert info["bops"] < 0.02
        skip[-1] = 1
        _, _, _, _, info = environment.step(skip)
        assert info["keyframe"] is True
        assert info["bops"] == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("reference", ["previous", "keyframe"])
def test_a_frame_level_is_the_same_bits_for_every_layer_group(reference: str, problem: Problem) -> None:
    one, each = (
        single(kind, problem, reference=reference, budget={"peak": 0.6}) for kind in ("frame_level", "frame_bits")
    )
    assert isinstance(one.action_space, MultiDiscrete)
    assert one.action_space.nvec.tolist() == [4, 2]
    assert one.feature_names == each.feature_names
    assert first_difference(one.reset(seed=2)[0], each.reset(seed=2)[0]) is None
    one.action_space.seed(2)
    for t in range(12):
        level, refresh = one.action_space.sample()
        a, b = one.step(np.array([level, refresh])), each.step(np.array([level] * 3 + [refresh]))
        difference = first_difference(a[0], b[0])
        assert difference is None, f"step {t}, observation: {difference}"
        assert a[1:] == b[1:], f"step {t}: {a[1:]} and {b[1:]}"
        if a[3]:
            assert first_difference(one.reset()[0], each.reset()[0]) is None, f"reset after step {t}"


def test_clips_come_in_turn_without_shuffling(problem: Problem) -> None:
    environment = single("frame_bits", problem, shuffle=False)
    assert [environment.reset()[1]["clip"] for _ in range(9)] == [0, 1, 2, 3, 0, 1, 2, 3, 0]


def test_rendering_shows_the_frame_beside_the_spending(problem: Problem) -> None:
    environment = single("region_bits", problem, render_mode="rgb_array")
    _, info = environment.reset(seed=0)
    height, width = problem.model.frame_size
    picture = environment.render()
    assert picture is not None
    assert picture.shape == (height, 2 * width, 3)
    clip = problem.clips[info["clip"]]
    assert (picture[:, :width] == clip.frames[0].permute(1, 2, 0).numpy()).all()
    assert (picture[:, width:] == 255).all(), "the forced keyframe spent everything everywhere"
    action = environment.core.scheme.uniform_action(0)
    action[0] = 3
    environment.step(action)
    picture = environment.render()
    assert picture is not None
    assert (picture[:, :width] == clip.frames[1].permute(1, 2, 0).numpy()).all()
    rows, columns = height // problem.grid[0], width // problem.grid[1]
    spent = picture[:, width:]
    assert spent[: rows // 2, : columns // 2].min() > spent[rows:, columns:].max()


def test_without_a_render_mode_nothing_is_rendered(problem: Problem) -> None:
    environment = single("frame_bits", problem)
    environment.reset(seed=0)
    assert environment.render() is None
    with pytest.raises(SettingsError, match="render_mode"):
        single("frame_bits", problem, render_mode="human")


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_arguments_that_no_environment_takes_are_named(name: str, problem: Problem) -> None:
    for make in (gymnasium.make, gymnasium.make_vec):
        with pytest.raises(TypeError, match="unexpected keyword argument 'wrong_argument'"):
            make(name, problem=problem, wrong_argument=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trade_off": 0.0}, "trade_off"),
        ({"trade_off": (1.0, 0.5)}, "trade_off"),
        ({"budget": 0.1}, "A budget is null, or a mapping with some of peak, mean, bucket"),
        ({"budget": {"top": 0.1}}, "A budget is null, or a mapping with some of peak, mean, bucket"),
        ({"budget": {"peak": -0.1}}, "budget.peak"),
        ({"thresholds": (1.0, 0.5)}, "ascending"),
        ({"thresholds": ()}, "thresholds"),
        ({"reference": "next"}, "reference"),
    ],
)
def test_impossible_settings_are_refused(
    settings: dict[str, Any], message: str, problem: Problem, unchecked_types: None
) -> None:
    with pytest.raises(SettingsError, match=message):
        RegionThresholds(problem=problem, **settings)


def test_clips_of_one_frame_are_refused_by_name(problem: Problem) -> None:
    short = problems.with_clips(problem, [5, 1, 4])
    with pytest.raises(VideoError, match=r"2 frames or more.*tiny/1 \(1 of 3 clips\)"):
        FrameBits(problem=short)


def test_clips_of_two_frames_are_episodes_of_one_step(problem: Problem) -> None:
    short = problems.with_clips(problem, [2, 2])
    environment = FrameBits(problem=short)
    for seed in range(3):
        environment.reset(seed=seed)
        assert environment.step(environment.action_space.sample())[3] is True
    vector = ResQVectorEnv("region_bits", 2, problem=short)
    vector.reset(seed=0)
    for _ in range(4):
        assert vector.step(vector.action_space.sample())[3].all()
