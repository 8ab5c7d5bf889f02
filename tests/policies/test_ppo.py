"""Training: obvious optima are found, warm starts hold, and a killed run goes on where it stopped."""

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3 import PPO

from resq_rl.envs import ActionKind, Agents, Decision, EpisodeSettings, FrameView, Problem, measure
from resq_rl.envs.batched import BatchedEnvironment
from resq_rl.envs.sb3 import AgentsVecEnv
from resq_rl.errors import PolicyError, ResultsError, SettingsError
from resq_rl.policies import DynamicResQ, LearnedPolicy, ppo
from resq_rl.policies.ppo import (
    FirstChoice,
    PPOSettings,
    Progress,
    TrainingReport,
    choice_figures,
    train_ppo,
    untrained,
)
from resq_rl.quantization import LevelField, Reference
from resq_rl.sealed import Checkpoints, pack
from resq_rl.video import Clip
from tests.envs import problems
from tests.envs.problems import first_difference, moving_frames

# A pass over a rollout takes a fraction of the time of its frames: few frames and many passes.
FAST = PPOSettings(
    frames=1200,
    n_steps=14,
    batch_size=224,
    epochs=10,
    learning_rate=8e-3,
    gamma=0.5,
    ent_coef=0.0,
    checkpoint_every=1000,
)
TINY = replace(FAST, frames=200, n_steps=7, batch_size=84, epochs=2, learning_rate=3e-3, checkpoint_every=2)


@pytest.fixture(autouse=True)
def _checked_seldom(request: pytest.FixtureRequest) -> None:
    """Types are checked at run time in a few tests, which run what all others run again and again."""
    checked = (
        test_progress_comes_after_every_rollout,
        test_a_killed_run_goes_on_as_if_nothing_had_happened,
        test_a_warm_start_with_an_interval_begins_with_keyframes_at_it,
    )
    if request.function not in checked:
        request.getfixturevalue("unchecked_types")


@pytest.fixture(scope="module")
def moving(problem: Problem) -> Problem:
    """Four clips of 8 frames, compared with the float network."""
    return problems.with_clips(problem, [8] * 4, source="teacher", weighting="pixel")


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[PPO]:
    """The library's models, in the order in which they begin to learn."""
    models: list[PPO] = []
    original = PPO.learn

    def learn(self: PPO, *args: Any, **kwargs: Any) -> PPO:
        models.append(self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(PPO, "learn", learn)
    return models


def agents_of(
    problem: Problem,
    trade_off: float | tuple[float, float] = 0.3,
    *,
    kind: ActionKind = "region_thresholds",
    agents: Agents = "region",
    slots: int = 4,
    **episodes: Any,
) -> AgentsVecEnv:
    settings = EpisodeSettings(**({"trade_off": trade_off, "intervals": (0,)} | episodes))
    return AgentsVecEnv(problems.agents(problem, slots, kind, agents, episodes=settings))


def bops_without_policy(problem: Problem, policy: LearnedPolicy) -> float:
    result = measure(problem, policy)
    return float((result.keyframe + result.residual).sum() / result.frames.sum())


def same_policy(a: LearnedPolicy, b: LearnedPolicy) -> bool:
    return all((x == y).all() for x, y in zip((*a.weights, *a.biases), (*b.weights, *b.biases), strict=True))


# Obvious optima ----------------------------------------------------------------------------------------------------

CASES: list[tuple[ActionKind, Agents]] = [
    ("region_thresholds", "region"),
    ("region_bits", "region"),
    ("frame_bits", "frame"),
]


@pytest.mark.parametrize(("kind", "agents"), CASES[::2])
def test_where_bits_are_dear_ppo_learns_to_skip(kind: ActionKind, agents: Agents, moving: Problem) -> None:
    env = agents_of(moving, 30.0, kind=kind, agents=agents, slots=8, reward_scale=0.1)
    policy, report = train_ppo(env, replace(FAST, frames=FAST.frames if agents == "region" else 2000), seed=0)
    first, last = report.curve[0], report.curve[-1]
    assert last["bops"] < 0.1 * first["bops"]
    if kind == "region_thresholds":
        assert last["mean_choice"] > first["mean_choice"] + 1, "thresholds rise"
    else:
        assert last["mean_choice"] < first["mean_choice"] - 1, "levels fall"
    assert bops_without_policy(moving, policy) == pytest.approx(1 / 8, rel=0.02), "the forced keyframes alone"


@pytest.mark.parametrize(("kind", "agents"), CASES[:2])
def test_where_errors_are_dear_ppo_learns_to_spend(kind: ActionKind, agents: Agents, moving: Problem) -> None:
    env = agents_of(moving, 0.001, kind=kind, agents=agents, slots=8, reward_scale=20.0)
    policy, report = train_ppo(env, FAST, seed=0)
    first, last = report.curve[0], report.curve[-1]
    assert last["error"] < 0.5 * first["error"]
    assert last["bops"] > 1.3 * first["bops"]
    result = measure(moving, policy)
    skipping = measure(moving, DynamicResQ("previous", 0, tau=100.0))
    assert result.accuracy > 0.9 > 0.7 > skipping.accuracy


def test_one_policy_serves_a_range_of_lambda(moving: Problem) -> None:
    env = agents_of(moving, (0.003, 30.0), kind="region_bits", slots=8, relative=True)
    policy, _ = train_ppo(env, replace(FAST, frames=1500), seed=0)
    assert policy.trade_off == pytest.approx(0.3)
    assert policy.trade_off_range == (0.003, 30.0)
    cheap, dear = (bops_without_policy(moving, policy.at(t)) for t in (0.003, 30.0))
    assert cheap > dear + 0.1


def clips_with_cuts(problem: Problem, cuts: Sequence[int]) -> Problem:
    """Still clips of 8 frames, each with a cut to another still at a frame of its own."""
    a, b = moving_frames(1, seed=7), 255 - moving_frames(1, seed=8)
    clips = [
        Clip(torch.cat([a.expand(cut, -1, -1, -1), b.expand(8 - cut, -1, -1, -1)]), None, 25.0, f"cut/{cut}", "test")
        for cut in cuts
    ]
    settings: dict[str, Any] = {"grid": problem.grid, "source": "teacher", "weighting": "pixel"}
    return Problem.prepare(problem.model, problem.task, clips, **settings)


def skipping(problem: Problem, trade_off: float) -> LearnedPolicy:
    """Region agents that spend nothing on any residual."""
    scheme = problems.scheme(problem, "region_bits")
    weight, bias = torch.zeros(scheme.groups, scheme.observation_size), torch.zeros(scheme.groups)
    span = (trade_off, trade_off)
    return LearnedPolicy((weight,), (bias,), scheme, trade_off, span, network=problem.model.groups)


@pytest.mark.parametrize(("trade_off", "at_the_cut"), [(0.2, True), (30.0, False)])
def test_ppo_learns_to_run_a_keyframe_at_a_cut_where_it_pays(
    trade_off: float, at_the_cut: bool, problem: Problem
) -> None:
    """Beside agents that skip every residual, all else staying still."""
    cuts = (2, 3, 4, 5, 6)
    own, fields = clips_with_cuts(problem, cuts), skipping(problem, trade_off)
    core = problems.agents(
        own, 8, "keyframe", "frame", episodes=EpisodeSettings(trade_off=trade_off, relative=True), fields=fields
    )
    frames = 2000 if at_the_cut else 800
    settings = replace(FAST, frames=frames, n_steps=16, batch_size=64, learning_rate=6e-3, gamma=0.9)
    keyframes, report = train_ppo(AgentsVecEnv(core), settings, seed=0, warm_start=lambda _: FirstChoice(0))
    assert report.curve[0]["keyframes"] < 0.15, "few keyframes to begin with"
    joint = replace(fields, keyframes=keyframes)
    streams = problems.streams(own, len(cuts), trade_off_range=joint.trade_off_range)
    ran = torch.stack([result.cost.keyframe for _, result in streams.run(joint)], 1)
    for row, cut in zip(ran.tolist(), cuts, strict=True):
        assert [t for t, keyframe in enumerate(row) if keyframe] == ([0, cut] if at_the_cut else [0])


# Warm start --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "agents"), CASES)
def test_a_warm_start_begins_as_the_constant_field_for_every_lambda(
    kind: ActionKind, agents: Agents, moving: Problem
) -> None:
    def best(trade_off: float) -> int:
        return 1 if trade_off < 0.3 else 3

    class Recorded:
        """The policy, remembering what it chose."""

        def __init__(self, policy: LearnedPolicy) -> None:
            self.policy, self.chosen = policy, set[float]()
            self.reference, self.trade_off, self.macs = policy.reference, policy.trade_off, policy.macs
            self.bits, self.settings = policy.bits, policy.settings
            self.trade_off_range = policy.trade_off_range

        def decide(self, view: FrameView) -> Decision:
            decision = self.policy.decide(view)
            field = decision.field
            values = field.levels if isinstance(field, LevelField) else field.thresholds
            self.chosen |= set(values.flatten().tolist())
            assert not decision.refresh.any()
            return decision

    env = agents_of(moving, (0.03, 3.0), kind=kind, agents=agents)
    settings = replace(TINY, frames=1, n_steps=2, learning_rate=1e-9)
    policy, report = train_ppo(env, settings, seed=0, warm_start=lambda t: FirstChoice(best(t)))
    scheme = policy.scheme
    for trade_off in (0.03, 0.1, 1.0, 3.0):
        recorded = Recorded(policy.at(trade_off))
        measure(moving, recorded)
        choice = best(trade_off)
        expected = float(np.float32(scheme.thresholds[choice])) if kind == "region_thresholds" else choice
        assert recorded.chosen == {expected}, f"lambda {trade_off}"
    assert report.curve[0]["keyframes"] < 0.3, "few keyframes to begin with"


@pytest.mark.parametrize("interval", [2, 5])
def test_a_warm_start_with_an_interval_begins_with_keyframes_at_it(interval: int, moving: Problem) -> None:
    env = agents_of(moving, (0.03, 3.0), kind="frame_level", agents="frame")
    settings = replace(TINY, frames=1, n_steps=2, learning_rate=1e-9)
    policy, _ = train_ppo(env, settings, seed=0, warm_start=lambda t: FirstChoice(1, interval if t < 0.3 else 0))
    own = problems.with_clips(moving, [11, 11])
    for trade_off, count in ((0.03, -(-11 // interval)), (3.0, 1)):
        result = measure(own, policy.at(trade_off))
        assert result.keyframes.tolist() == [count, count]


# The run itself ----------------------------------------------------------------------------------------------------


def test_the_same_seed_trains_the_same_policy(moving: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ppo, "_fit_first_choices", partial(ppo._fit_first_choices, steps=100))
    runs = [
        train_ppo(agents_of(moving, (0.1, 1.0)), TINY, seed=s, warm_start=lambda _: FirstChoice(4)) for s in (3, 3, 4)
    ]
    assert same_policy(runs[0][0], runs[1][0])
    assert runs[0][1].curve == runs[1][1].curve
    assert not same_policy(runs[0][0], runs[2][0])


def test_training_leaves_nothing_among_the_temporary_files(
    problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    train_ppo(agents_of(problem), TINY, seed=0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("lengths", "frames"), [([8] * 4, 400), ([2] * 6, 1), ([2] * 6, 200), ([2, 9], 200)])
def test_as_many_frames_are_simulated_as_were_asked_for(lengths: list[int], frames: int, problem: Problem) -> None:
    """Forced keyframes included, and up to a rollout more."""
    own = problems.with_clips(problem, lengths, source="teacher")
    env = agents_of(own)
    _, report = train_ppo(env, replace(TINY, frames=frames), seed=0)
    per_rollout = 4 * (TINY.n_steps * 2 + 1)  # each frame decided may bring a keyframe
    assert report.frames == env.frames
    assert 0.75 * frames - per_rollout <= report.frames <= 1.25 * frames + per_rollout
    assert report.rollouts == len(report.curve)


def test_progress_comes_after_every_rollout(moving: Problem) -> None:
    seen: list[Progress] = []
    env = agents_of(moving)
    _, report = train_ppo(env, TINY, seed=0, on_rollout=seen.append)
    assert [p.rollout for p in seen] == list(range(1, report.rollouts + 1))
    assert seen[-1].frames == report.frames
    for progress, row in zip(seen, report.curve, strict=True):
        assert row == {"frames": progress.frames, **progress.metrics}
        assert {"reward", "bops", "error", "keyframes", "mean_choice"} <= set(progress.metrics)
    assert {"loss", "approx_kl", "entropy_loss"} <= set(seen[-1].metrics)


def test_figures_of_a_rollout_are_of_its_frames(moving: Problem) -> None:
    """Mean reward, BOPs and error of every frame simulated, and the mean choice without the keyframe's column."""
    env = agents_of(moving, 0.3, kind="frame_bits", agents="frame")
    steps, actions = [], []
    plain = env.step_wait

    def recorded() -> Any:
        out = plain()
        assert env.last is not None
        steps.append(env.last)
        assert env._actions is not None
        actions.append(env._actions.copy())
        return out

    env.step_wait = recorded  # type: ignore[method-assign]
    _, report = train_ppo(env, replace(TINY, frames=1), seed=0)
    row = report.curve[0]
    assert row["reward"] == pytest.approx(float(np.mean([s.frame_rewards for s in steps])), rel=1e-5)
    assert row["bops"] == pytest.approx(float(np.mean([s.result.share.mean() for s in steps])), rel=1e-5)
    assert row["error"] == pytest.approx(float(np.mean([s.result.error.mean() for s in steps])), rel=1e-5)
    assert row["keyframes"] == pytest.approx(float(np.mean([s.result.cost.keyframe.float().mean() for s in steps])))
    assert row["mean_choice"] == pytest.approx(np.concatenate(actions)[:, :-1].mean())


WAYS: list[tuple[ActionKind, Agents]] = [*CASES, ("frame_level", "frame"), ("region_bits", "frame")]


@pytest.mark.parametrize(("kind", "agents"), WAYS)
def test_figures_of_choices_belong_to_the_observations_they_were_made_for(
    kind: ActionKind, agents: Agents, moving: Problem
) -> None:
    """Each choice counted, and paired by hand with the residual that its agent saw before it."""
    env = agents_of(moving, kind=kind, agents=agents)
    scheme = env.core.scheme
    seen, chosen = [], []
    reset, step = env.reset, env.step_wait

    def first() -> Any:
        seen.append(reset())
        return seen[-1]

    def following() -> Any:
        out = step()
        assert env._actions is not None
        chosen.append(env._actions.copy())
        seen.append(out[0])
        return out

    env.reset, env.step_wait = first, following  # type: ignore[method-assign]
    _, report = train_ppo(env, replace(TINY, frames=1), seed=0)
    row, counts = report.curve[0], np.zeros(scheme.choices)
    means, residuals = [], []
    for observations, actions in zip(seen, chosen, strict=False):
        for observed, action in zip(observations.tolist(), actions.tolist(), strict=True):
            own = action if agents == "region" else action[:-1]
            for choice in own:
                counts[choice] += 1
            named = dict(zip(scheme.feature_names, observed, strict=True))
            if (kind, agents) == ("region_bits", "frame"):
                per_region = len(own) // scheme.regions
                for region in range(scheme.regions):
                    means.append(np.mean(own[region * per_region : (region + 1) * per_region]))
                    residuals.append(named[f"residual_mean[{region // scheme.grid[1]},{region % scheme.grid[1]}]"])
            else:
                means.append(np.mean(own))
                residuals.append(named["residual_mean" if agents == "region" else "mean_residual_mean"])
    assert len(chosen) == TINY.n_steps
    assert [row[f"choice_{i}"] for i in range(scheme.choices)] == pytest.approx(counts / counts.sum())
    assert row["choice_residual_correlation"] == pytest.approx(np.corrcoef(means, residuals)[0, 1], abs=1e-6)
    assert 0.9 < row["entropy"] < 1.05, "a new network chooses almost evenly"


def test_a_collapsed_policy_shows(moving: Problem) -> None:
    """One choice has all of the share, nothing is left of the entropy, and a correlation is undefined."""
    scheme = problems.scheme(moving)
    observations = np.random.default_rng(0).uniform(size=(2, 5, scheme.observation_size)).astype(np.float32)
    figures = choice_figures(scheme, observations, np.full((2, 5, len(scheme.nvec)), 7))
    assert figures == {"mean_choice": 7.0} | {f"choice_{i}": float(i == 7) for i in range(scheme.choices)}
    still = np.full_like(observations, 0.1)
    actions = np.random.default_rng(0).integers(scheme.choices, size=(2, 5, len(scheme.nvec)))
    assert "choice_residual_correlation" not in choice_figures(scheme, still, actions)
    env = agents_of(moving, 30.0, kind="frame_level", agents="frame", slots=8, reward_scale=0.1)
    _, report = train_ppo(env, replace(FAST, frames=1500), seed=0)
    assert report.curve[-1]["entropy"] < 0.5 * report.curve[0]["entropy"]
    assert report.curve[-1]["choice_0"] > 0.9


def test_the_deployed_policy_knows_what_it_was_trained_for(moving: Problem) -> None:
    env = agents_of(moving, (0.1, 0.4), intervals=(5, 0))
    policy, _ = train_ppo(env, replace(TINY, frames=1, hidden=(6, 7, 4), policy_bits=4), seed=0)
    assert policy.scheme == env.core.scheme
    assert policy.trade_off == pytest.approx(0.2)
    assert policy.trade_off_range == (0.1, 0.4)
    assert (policy.interval, policy.reference, policy.bits) == (5, "previous", 4)
    assert policy.frame_size == (32, 48)
    assert policy.network == ("stem", "body", "head")
    assert [tuple(w.shape) for w in policy.weights] == [(6, 17), (7, 6), (4, 7), (3, 4)]


@pytest.mark.parametrize("batch_size", [5, 84, 100, 10_000])
def test_any_batch_size_will_do(batch_size: int, moving: Problem) -> None:
    """Warnings are errors: the library warns of minibatches that do not divide a rollout."""
    _, report = train_ppo(agents_of(moving), replace(TINY, frames=1, batch_size=batch_size), seed=0)
    assert report.rollouts == 1


def test_rewards_that_are_not_finite_end_the_training(moving: Problem) -> None:
    env = agents_of(moving, reward_scale=float("inf"))
    with pytest.raises(PolicyError, match=r"The reward of .*, frame 1, is not finite, after \d+ frames"):
        train_ppo(env, replace(TINY, frames=400), seed=0)


def test_observations_that_are_not_finite_end_the_training(moving: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    env, made = agents_of(moving), BatchedEnvironment._observe

    def observe(core: BatchedEnvironment) -> Any:
        observations = made(core)
        if int(core.streams.time[2]) == 4:
            observations[2 * core.scheme.agents_per_clip + 1] = np.nan
        return observations

    monkeypatch.setattr(BatchedEnvironment, "_observe", observe)
    with pytest.raises(PolicyError, match=r"The observation of .*, frame 3, is not finite"):
        train_ppo(env, TINY, seed=0)


def test_weights_that_are_not_finite_end_the_training_and_the_last_good_checkpoint_stays(
    trained: list[PPO], moving: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(progress: Progress) -> None:
        if progress.rollout == 4:  # the update that follows is spoiled, in which the checkpoint would be due
            next(trained[0].policy.parameters()).data.fill_(float("nan"))

    monkeypatch.setattr(PPO, "train", lambda self: None)
    with pytest.raises(PolicyError, match=r"The update after rollout 4 .* not finite"):
        train_ppo(agents_of(moving), TINY, seed=0, checkpoints=tmp_path, on_rollout=spoil)
    assert [path.name for path in Checkpoints(tmp_path).paths()] == ["00000002.checkpoint"]


@pytest.mark.parametrize(
    "settings",
    [
        {"frames": 0},
        {"n_steps": 1},
        {"hidden": ()},
        {"hidden": (8, 0)},
        {"value_hidden": (0,)},
        {"policy_bits": 1},
        {"policy_bits": 17},
        {"policy_bits": 33},
        {"batch_size": 1},
        {"epochs": 0},
        {"ent_coef": -0.1},
        {"checkpoint_every": 0},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"clip_range": 0.0},
        {"gamma": 1.1},
        {"gae_lambda": -0.1},
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any]) -> None:
    value = next(iter(settings.values()))
    with pytest.raises(SettingsError) as caught:
        PPOSettings(**settings)
    shown = list(value) if isinstance(value, tuple) else value
    assert f"'{next(iter(settings))}' must be" in str(caught.value)
    assert f"received {shown}" in str(caught.value)


# Checkpoints -------------------------------------------------------------------------------------------------------


class KilledError(Exception):
    """Stands for whatever ends a run."""


def killed_after(rollouts: int) -> Callable[[Progress], None]:
    def on_rollout(progress: Progress) -> None:
        if progress.rollout > rollouts:
            raise KilledError

    return on_rollout


@pytest.fixture(scope="module")
def whole(moving: Problem) -> tuple[LearnedPolicy, TrainingReport]:
    """What the interrupted run gives that nobody interrupts."""
    return train_ppo(agents_of(moving, (0.1, 1.0)), TINY, seed=1)


@pytest.fixture(scope="module")
def killed(moving: Problem, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    with pytest.raises(KilledError):
        train_ppo(agents_of(moving, (0.1, 1.0)), TINY, seed=1, checkpoints=folder, on_rollout=killed_after(5))
    assert [p.name for p in Checkpoints(folder).paths()] == ["00000002.checkpoint", "00000004.checkpoint"]
    return folder


@pytest.fixture
def interrupted(killed: Path, tmp_path: Path) -> Path:
    """Checkpoints of a run of 8 rollouts that was killed in its 6th; they are of the 2nd and the 4th."""
    return Path(shutil.copytree(killed, tmp_path / "run"))


def resumed(
    problem: Problem, folder: Path, settings: PPOSettings = TINY, seed: int = 1, **episodes: Any
) -> tuple[LearnedPolicy, TrainingReport, list[Progress], AgentsVecEnv]:
    env = agents_of(problem, **({"trade_off": (0.1, 1.0)} | episodes))
    seen: list[Progress] = []
    policy, report = train_ppo(env, settings, seed=seed, checkpoints=folder, resume=True, on_rollout=seen.append)
    return policy, report, seen, env


def parts_of(folder: Path) -> dict[str, bytes]:
    """The newest checkpoint, of the optimizer each parameter's own."""
    state = Checkpoints(folder).load()
    assert state is not None
    del state["random"]["python"]  # beartype draws from it
    parts = {name: {"": value} for name, value in state.items()} | {"optimizer": state["optimizer"]}
    return {f"{name}.{key}": pack({"": value}) for name, part in parts.items() for key, value in part.items()}


@pytest.mark.parametrize(("kind", "reference"), [("region_thresholds", "previous"), ("frame_bits", "keyframe")])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    kind: ActionKind, reference: Reference, moving: Problem, tmp_path: Path
) -> None:
    """Clips of 8 frames against rollouts of 7: most clips are in progress at a checkpoint."""
    agents: Agents = "frame" if kind == "frame_bits" else "region"

    def env() -> AgentsVecEnv:
        settings = EpisodeSettings(trade_off=(0.1, 1.0), intervals=(0, 3))
        return AgentsVecEnv(problems.agents(moving, 3, kind, agents, episodes=settings, reference=reference))

    policy, whole = train_ppo(env(), TINY, seed=1, checkpoints=tmp_path / "whole")
    with pytest.raises(KilledError):
        train_ppo(env(), TINY, seed=1, checkpoints=tmp_path / "killed", on_rollout=killed_after(5))
    torch.manual_seed(77)
    np.random.seed(77)  # noqa: NPY002 - what another process has drawn
    again, report = train_ppo(env(), TINY, seed=1, checkpoints=tmp_path / "killed", resume=True)
    assert report == whole
    assert same_policy(policy, again)
    before, after = (parts_of(tmp_path / name) for name in ("whole", "killed"))
    assert before == after


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(
    interrupted: Path, whole: tuple[LearnedPolicy, TrainingReport], moving: Problem, caplog: pytest.LogCaptureFixture
) -> None:
    newest = Checkpoints(interrupted).paths()[-1]
    newest.write_bytes(newest.read_bytes()[:-1])
    policy, report, seen, _ = resumed(moving, interrupted)
    assert f"{newest} cannot be used: its checksum is wrong. Trying the one before it." in caplog.text
    assert seen[0].rollout == 3
    assert same_policy(policy, whole[0])
    assert report == whole[1]


def test_a_finished_run_comes_back_without_training(
    whole: tuple[LearnedPolicy, TrainingReport], moving: Problem, tmp_path: Path
) -> None:
    policy, report = train_ppo(agents_of(moving, (0.1, 1.0)), TINY, seed=1, checkpoints=tmp_path)
    assert same_policy(whole[0], policy), "checkpoints change nothing in the training"
    again, same, seen, env = resumed(moving, tmp_path)
    assert same_policy(policy, again)
    assert seen == []
    assert (same.frames, same.rollouts, same.curve) == (report.frames, report.rollouts, report.curve)
    assert env.frames == report.frames


def test_without_a_checkpoint_resuming_starts(
    whole: tuple[LearnedPolicy, TrainingReport], moving: Problem, tmp_path: Path
) -> None:
    policy, _, seen, _ = resumed(moving, tmp_path / "new")
    assert seen[0].rollout == 1
    assert same_policy(policy, whole[0])


def test_a_new_run_in_an_old_folder_can_be_resumed(moving: Problem, tmp_path: Path) -> None:
    """Checkpoints of an earlier, longer run must not crowd out those of the new one."""
    train_ppo(agents_of(moving, (0.1, 1.0)), replace(TINY, frames=400), seed=9, checkpoints=tmp_path)
    with pytest.raises(KilledError):
        train_ppo(agents_of(moving, (0.1, 1.0)), TINY, seed=1, checkpoints=tmp_path, on_rollout=killed_after(3))
    _, _, seen, _ = resumed(moving, tmp_path)
    assert seen[0].rollout == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": replace(TINY, learning_rate=1e-5)}, r"settings.learning_rate was 0.003 and is 1e-05"),
        ({"settings": replace(TINY, frames=400)}, r"settings.frames was 200 and is 400"),
        ({"settings": replace(TINY, hidden=(8,))}, r"settings.hidden was \[16, 16\] and is \[8\]"),
        ({"seed": 2}, "seed was 1 and is 2"),
        ({"trade_off": 0.3}, "episodes.trade_off was"),
        ({"slots": 2}, "clips was 4 and is 2"),
        ({"kind": "region_bits"}, "actions.kind was 'region_thresholds' and is 'region_bits'"),
    ],
)
def test_checkpoints_of_other_settings_are_refused(
    change: dict[str, Any], message: str, interrupted: Path, moving: Problem
) -> None:
    with pytest.raises(PolicyError, match=f"other settings.*{message}.*started"):
        resumed(moving, interrupted, **change)


@pytest.mark.parametrize("damage", ["empty", "half", "text", "a bit"])
def test_damaged_checkpoints_are_refused(damage: str, interrupted: Path, moving: Problem) -> None:
    for path in Checkpoints(interrupted).paths():
        content = path.read_bytes()
        middle = len(content) // 2
        changed = content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]
        path.write_bytes({"empty": b"", "half": content[:middle], "text": b"{}" * 99, "a bit": changed}[damage])
    with pytest.raises(ResultsError, match=r"No checkpoint in .* can be read") as caught:
        resumed(moving, interrupted)
    assert str(interrupted) in str(caught.value)


def test_checkpoints_of_another_version_are_refused(interrupted: Path, moving: Problem) -> None:
    state = Checkpoints(interrupted).load()
    assert state is not None
    del state["environment"]
    Checkpoints(interrupted).save(9, state)
    with pytest.raises(PolicyError, match=r"of another version .*environment"):
        resumed(moving, interrupted)


def test_checkpoints_of_other_clips_are_refused(interrupted: Path, problem: Problem) -> None:
    other = problems.with_clips(problem, [8] * 3 + [7], source="teacher", weighting="pixel")
    with pytest.raises(PolicyError, match="network and clips was"):
        resumed(other, interrupted)


def test_a_folder_that_cannot_be_written_is_reported(moving: Problem, tmp_path: Path) -> None:
    taken = tmp_path / "file"
    taken.write_text("not a folder")
    with pytest.raises(ResultsError, match=r"Cannot write .*checkpoint.* Then resume"):
        train_ppo(agents_of(moving), TINY, seed=0, checkpoints=taken)


def test_a_trained_policy_survives_its_files(moving: Problem, tmp_path: Path) -> None:
    policy, _ = train_ppo(agents_of(moving), replace(TINY, frames=1), seed=0)
    policy.save(tmp_path)
    loaded = LearnedPolicy.load(tmp_path)
    assert same_policy(policy, loaded)
    x = torch.rand(5, policy.scheme.observation_size)
    assert first_difference(policy.places(x), loaded.places(x)) is None


def test_the_deployed_network_is_the_trained_one(trained: list[PPO], moving: Problem) -> None:
    """In float its nearest choices are those that the library's own model predicts."""
    env = agents_of(moving)
    policy, _ = train_ppo(env, replace(TINY, policy_bits=32), seed=0)
    observations = env.reset()
    expected, _ = trained[0].predict(observations, deterministic=True)
    assert first_difference(policy.choose(torch.from_numpy(observations)), expected) is None


def test_the_worth_of_what_follows_a_clip_is_the_librarys(moving: Problem) -> None:
    """Values added for all agents at once are those that stable-baselines3 adds one by one."""
    buffers = []
    for own in (True, False):
        environment = agents_of(moving, (0.1, 1.0))
        environment.seed(0)
        model = untrained(environment, replace(TINY, n_steps=16), seed=0)
        if not own:
            environment.bootstrap = None
        model.learn(16 * environment.num_envs)
        buffers.append(model.rollout_buffer)
    assert buffers[0].episode_starts[1:].any()
    np.testing.assert_allclose(buffers[0].rewards, buffers[1].rewards, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(buffers[0].returns, buffers[1].returns, rtol=1e-4, atol=1e-4)
