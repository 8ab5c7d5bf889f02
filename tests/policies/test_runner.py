"""A runner gives what is measured in streams, frame by frame, from files alone and in constant memory."""

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from resq_rl.envs import Policy, Problem, trace
from resq_rl.envs.measure import policy_share
from resq_rl.errors import NetworkError, PolicyError, SettingsError, VideoError
from resq_rl.perception import Segmentation
from resq_rl.policies import DynamicResQ, LearnedPolicy, Runner
from resq_rl.quantization import Budget, ThresholdField, save_model, to_float
from tests.envs import problems
from tests.envs.problems import CLASSES, moving_frames, tiny_network
from tests.policies.test_learned import made


def learned(problem: Problem, **more: Any) -> LearnedPolicy:
    """A random policy for a problem, which decides otherwise for every frame."""
    return made(problems.scheme(problem), network=problem.model.groups, **({"interval": 3} | more))


def policies(problem: Problem) -> dict[str, Policy]:
    keyframes = made(problems.scheme(problem, "keyframe", "frame"), seed=13, network=problem.model.groups)
    return {
        "periodic": learned(problem),
        "learned keyframes": learned(problem, keyframes=keyframes),
        "keyframe reference": learned(problem, reference="keyframe", interval=0),
        "heuristic": DynamicResQ("previous", 4, tau=0.6),
    }


@pytest.mark.parametrize("name", ["periodic", "learned keyframes", "keyframe reference", "heuristic"])
@pytest.mark.parametrize("clip", [0, 1])
def test_predictions_and_costs_are_those_of_streams_bit_for_bit(name: str, clip: int, problem: Problem) -> None:
    policy = policies(problem)[name]
    expected = trace(problem, policy, clip=clip)
    runner = Runner(policy, problem)
    for t, frame in enumerate(problem.clips[clip].frames):
        prediction, cost = runner(frame)
        assert torch.equal(prediction, expected.prediction[t]), t
        assert torch.equal(cost.regions, expected.share[t]), t
        assert cost.bops == pytest.approx(float(expected.bops[t]), rel=1e-12)
        assert cost.keyframe == bool(expected.keyframe[t])
    assert 0 < float(expected.share[~expected.keyframe].mean()) < 1
    assert name != "learned keyframes" or expected.keyframe[1:].any()


def test_from_files_it_runs_as_from_the_objects(problem: Problem, tmp_path: Path) -> None:
    policy = learned(problem)
    policy.save(tmp_path)
    save_model(problem.model, tmp_path)
    runner = Runner.load(tmp_path, tiny_network(), Segmentation(CLASSES), trade_off=0.7, interval=2)
    same = Runner(policy.at(0.7, 2), problem)
    for frame in problem.clips[1].frames:
        (mine, cost), (theirs, expected) = runner(frame), same(frame)
        assert torch.equal(mine, theirs)
        assert (cost.bops, cost.keyframe) == (expected.bops, expected.keyframe)
        assert torch.equal(cost.regions, expected.regions)


def test_a_change_of_scene_is_a_keyframe_by_the_policys_rule_or_another(problem: Problem, tmp_path: Path) -> None:
    replace(learned(problem, interval=0), scene_change=0.3).save(tmp_path)
    save_model(problem.model, tmp_path)
    still = problem.clips[1].frames[0] // 2
    cut = [still, still + 1, still + 2, 255 - still, 254 - still, 253 - still]

    def keyframes(**settings: Any) -> list[int]:
        runner = Runner.load(tmp_path, tiny_network(), Segmentation(CLASSES), **settings)
        return [t for t, frame in enumerate(cut) if runner(frame)[1].keyframe]

    assert keyframes() == [0, 3]
    assert keyframes(scene_change=1.0) == [0]
    assert keyframes(scene_change=1e-6) == [0, 1, 2, 3, 4, 5]
    assert keyframes(interval=2) == [0, 2, 3, 5]


def test_the_cost_is_what_the_model_itself_counts(problem: Problem) -> None:
    tau, model = 0.5, problem.model
    runner = Runner(DynamicResQ("previous", 0, tau=tau), replace(problem, grid=(1, 1)))
    state, field = model.new_state(1), ThresholdField.constant(tau, 1, len(model.groups))
    for t, frame in enumerate(problem.clips[0].frames):
        _, expected = model.step(to_float(frame[None]), state, torch.tensor([t == 0]), field)
        _, cost = runner(frame)
        assert cost.bops == float(expected.total) / model.reference_bops()
        assert cost.bits == pytest.approx(8 * np.sqrt(cost.bops))


def test_reset_begins_anew(problem: Problem) -> None:
    runner, frames = Runner(learned(problem), problem), problem.clips[1].frames
    first = [runner(frame) for frame in frames]
    runner.reset()
    for (prediction, cost), (again, spent) in zip(first, [runner(frame) for frame in frames], strict=True):
        assert torch.equal(prediction, again)
        assert (cost.bops, cost.keyframe) == (spent.bops, spent.keyframe)


def test_pictures_of_any_size_are_brought_to_the_models(problem: Problem) -> None:
    large = np.asarray(Image.fromarray(moving_frames(2)[1].permute(1, 2, 0).numpy()).resize((131, 77)))
    small = torch.from_numpy(np.array(Image.fromarray(large).resize((48, 32), Image.Resampling.BILINEAR)))
    runner = Runner(learned(problem), problem)
    results = []
    for frame in (large, torch.from_numpy(large.copy()).permute(2, 0, 1), small.permute(2, 0, 1)):
        runner.reset()
        results.append(runner(frame)[0])
    assert results[0].shape == (32, 48)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_memory_stays_as_it_is(problem: Problem) -> None:
    """Tensors alive after 10 frames are as many, and as large, as after 60."""

    def alive() -> tuple[int, int]:
        gc.collect()
        tensors = [o for o in gc.get_objects() if type(o) is torch.Tensor]
        return len(tensors), sum(tensor.numel() for tensor in tensors)

    runner, frames = Runner(learned(problem, interval=7), problem), moving_frames(20)
    counts = []
    for t in range(60):
        runner(frames[t % 20])
        if t in (9, 59):
            counts.append(alive())
    assert counts[0] == counts[1]


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    "frame",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((3, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        torch.zeros(3),
        torch.zeros(3, 4, 4, dtype=torch.uint8).to_sparse(),
        torch.empty(3, 4, 4, dtype=torch.uint8, device="meta"),
        Image.new("RGB", (4, 4)),
        [[[0, 0, 0]]],
        None,
    ],
)
def test_what_is_no_picture_is_refused_and_the_stream_goes_on(frame: Any, problem: Problem) -> None:
    runner, same = (Runner(learned(problem), problem) for _ in range(2))
    good = problem.clips[0].frames
    for one in (runner, same):
        one(good[0])
    with pytest.raises(VideoError, match=r"RGB bytes|dense tensor"):
        runner(frame)
    (found, cost), (expected, its) = runner(good[1]), same(good[1])
    assert torch.equal(found, expected)
    assert cost.bops == its.bops


def test_a_policy_of_another_network_is_refused_before_the_first_frame(problem: Problem, tmp_path: Path) -> None:
    save_model(problem.model, tmp_path)
    learned(problem).save(tmp_path)
    with pytest.raises(NetworkError, match="another network"):
        Runner.load(tmp_path, tiny_network(seed=1), problem.task)
    replace(learned(problem), network=("other",)).save(tmp_path)
    with pytest.raises(PolicyError, match="trained with a network"):
        Runner.load(tmp_path, tiny_network(), problem.task)


@pytest.mark.parametrize("trade_off", [0.04, 1.1])
def test_a_lambda_that_the_policy_does_not_know_is_refused(trade_off: float, problem: Problem, tmp_path: Path) -> None:
    save_model(problem.model, tmp_path)
    learned(problem).save(tmp_path)
    with pytest.raises(PolicyError, match=r"from 0\.05 to 1"):
        Runner.load(tmp_path, tiny_network(), problem.task, trade_off=trade_off)


@pytest.mark.parametrize("kind", ["points", "a mask that is fed back"])
def test_every_task_runs_as_in_streams(kind: str, pose_problem: Problem, recurrent_problem: Problem) -> None:
    """The caller's frames and label are only read, and what it writes to them, or to results, afterwards is its own."""
    problem = pose_problem if kind == "points" else recurrent_problem
    clip = problem.clips[0]
    policy = DynamicResQ("previous", 3, tau=0.4)
    expected = trace(problem, policy)
    runner = Runner(policy, problem)
    assert clip.labels is not None
    for _ in range(2):  # a second video leaves nothing of the first
        label = clip.labels[0].clone()
        runner.reset(None if kind == "points" else label)
        label.zero_()
        for t, frame in enumerate(clip.frames):
            given = frame.clone()
            prediction, cost = runner(given)
            assert torch.equal(given, frame), t
            assert torch.equal(prediction, expected.prediction[t]), t
            assert torch.equal(cost.regions, expected.share[t]), t
            for own in (given, prediction, cost.regions):
                own.fill_(1)
    assert (expected.prediction[1:] != expected.prediction[:-1]).any()


def test_a_mask_to_begin_with_is_asked_for_and_brought_to_size(recurrent_problem: Problem) -> None:
    problem = recurrent_problem
    clip = problem.clips[0]
    assert clip.labels is not None
    runner = Runner(DynamicResQ("previous", 3, tau=0.4), problem)
    with pytest.raises(VideoError, match=r"reset\(label\)"):
        runner(clip.frames[0])
    runner.reset(clip.labels[0].repeat_interleave(2, 0).repeat_interleave(2, 1))
    assert torch.equal(runner(clip.frames[0])[0], clip.labels[0])


@pytest.mark.parametrize("name", ["periodic", "heuristic"])
def test_a_budget_is_kept_as_in_streams_bit_for_bit(name: str, problem: Problem) -> None:
    """The policy's own cost is paid from it too; a new video begins with a new bucket."""
    policy, budget = policies(problem)[name], Budget(peak=0.6, mean=0.3, bucket=3.0)
    expected = trace(problem, policy, clip=1, budget=budget)
    runner = Runner(policy, problem, budget=budget)
    for _ in range(2):
        spent = 0.0
        for t, frame in enumerate(problem.clips[1].frames):
            prediction, cost = runner(frame)
            assert torch.equal(prediction, expected.prediction[t]), t
            assert cost.bops == pytest.approx(float(expected.bops[t]), rel=1e-12)
            assert cost.bops <= budget.peak * (1 + 1e-9)
            spent += cost.bops
            assert spent <= (budget.peak + t * (budget.mean or 1)) * (1 + 1e-9)
        runner.reset()
    assert policy_share(problem, policy) > 0 or name == "heuristic"


def test_a_budget_below_the_policys_own_cost_is_refused(problem: Problem) -> None:
    policy = learned(problem)
    with pytest.raises(SettingsError, match=r"the policy's own network cost .* raise budget.mean"):
        Runner(policy, problem, budget=Budget(peak=0.5, mean=policy_share(problem, policy) / 2))
