"""A runner gives what the simulator measures, frame by frame, from files alone and in constant memory."""

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from resq_rl.envs import ClipStore, Policy, trace
from resq_rl.errors import NetworkError, PolicyError, VideoError
from resq_rl.perception import Segmentation, clip_inputs
from resq_rl.policies import DynamicResQ, LearnedPolicy, Runner
from resq_rl.quantization import ResQModel, ThresholdField, save_model, to_float
from tests.envs.worlds import CLASSES, SIZE, World, moving_frames, tiny_network
from tests.policies.test_learned import made


def learned(world: World, **more: Any) -> LearnedPolicy:
    """A random policy for a world, which decides otherwise for every frame."""
    return made(world.scheme(), network=world.model.groups, **({"interval": 3} | more))


def policies(world: World) -> dict[str, Policy]:
    keyframes = made(world.scheme("keyframe", "frame"), seed=13, network=world.model.groups)
    return {
        "periodic": learned(world),
        "learned keyframes": learned(world, keyframes=keyframes),
        "keyframe reference": learned(world, reference="keyframe", interval=0),
        "heuristic": DynamicResQ("previous", 4, tau=0.6),
    }


@pytest.mark.parametrize("name", ["periodic", "learned keyframes", "keyframe reference", "heuristic"])
@pytest.mark.parametrize("clip", [0, 1])
def test_predictions_and_costs_are_the_simulators_bit_for_bit(name: str, clip: int, world: World) -> None:
    policy = policies(world)[name]
    expected = trace(world.model, world.task, world.store, policy, clip=clip, grid=world.grid)
    runner = Runner(policy, world.model, world.task, world.grid)
    for t, frame in enumerate(world.store.clips[clip].frames):
        prediction, cost = runner(frame)
        assert torch.equal(prediction, expected.prediction[t]), t
        assert torch.equal(cost.regions, expected.share[t]), t
        assert cost.bops == pytest.approx(float(expected.bops[t]), rel=1e-12)
        assert cost.keyframe == bool(expected.keyframe[t])
    assert 0 < float(expected.share[~expected.keyframe].mean()) < 1
    assert name != "learned keyframes" or expected.keyframe[1:].any()


def test_from_files_it_runs_as_from_the_objects(world: World, tmp_path: Path) -> None:
    policy = learned(world)
    policy.save(tmp_path)
    save_model(world.model, tmp_path)
    runner = Runner.load(tmp_path, tiny_network(), Segmentation(CLASSES), trade_off=0.7, interval=2)
    same = Runner(policy.at(0.7, 2), world.model, world.task)
    for frame in world.store.clips[1].frames:
        (mine, cost), (theirs, expected) = runner(frame), same(frame)
        assert torch.equal(mine, theirs)
        assert (cost.bops, cost.keyframe) == (expected.bops, expected.keyframe)
        assert torch.equal(cost.regions, expected.regions)


def test_the_cost_is_what_the_model_itself_counts(world: World) -> None:
    tau, model = 0.5, world.model
    runner = Runner(DynamicResQ("previous", 0, tau=tau), model, world.task, (1, 1))
    state, field = model.new_state(1), ThresholdField.constant(tau, 1, len(model.groups))
    for t, frame in enumerate(world.store.clips[0].frames):
        _, expected = model.step(to_float(frame[None]), state, torch.tensor([t == 0]), field)
        _, cost = runner(frame)
        assert cost.bops == float(expected.total) / model.reference_bops()
        assert cost.bits == pytest.approx(8 * np.sqrt(cost.bops))


def test_reset_begins_anew(world: World) -> None:
    runner, frames = Runner(learned(world), world.model, world.task), world.store.clips[1].frames
    first = [runner(frame) for frame in frames]
    runner.reset()
    for (prediction, cost), (again, spent) in zip(first, [runner(frame) for frame in frames], strict=True):
        assert torch.equal(prediction, again)
        assert (cost.bops, cost.keyframe) == (spent.bops, spent.keyframe)


def test_pictures_of_any_size_are_brought_to_the_models(world: World) -> None:
    large = np.asarray(Image.fromarray(moving_frames(2)[1].permute(1, 2, 0).numpy()).resize((131, 77)))
    small = torch.from_numpy(np.array(Image.fromarray(large).resize((48, 32), Image.Resampling.BILINEAR)))
    runner = Runner(learned(world), world.model, world.task)
    results = []
    for frame in (large, torch.from_numpy(large.copy()).permute(2, 0, 1), small.permute(2, 0, 1)):
        runner.reset()
        results.append(runner(frame)[0])
    assert results[0].shape == (32, 48)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_memory_stays_as_it_is(world: World) -> None:
    """Tensors alive after 10 frames are as many, and as large, as after 60."""

    def alive() -> tuple[int, int]:
        gc.collect()
        tensors = [o for o in gc.get_objects() if type(o) is torch.Tensor]
        return len(tensors), sum(tensor.numel() for tensor in tensors)

    runner, frames = Runner(learned(world, interval=7), world.model, world.task), moving_frames(20)
    counts = []
    for t in range(60):
        runner(frames[t % 20])
        if t in (9, 59):
            counts.append(alive())
    assert counts[0] == counts[1]


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    "frame",
    [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((3, 4, 4), np.uint8), torch.zeros(3)],
)
def test_what_is_no_picture_is_refused(frame: np.ndarray | torch.Tensor, world: World) -> None:
    with pytest.raises(VideoError, match="RGB bytes"):
        Runner(learned(world), world.model, world.task)(frame)


def test_a_policy_of_another_network_is_refused_before_the_first_frame(world: World, tmp_path: Path) -> None:
    save_model(world.model, tmp_path)
    learned(world).save(tmp_path)
    with pytest.raises(NetworkError, match="another network"):
        Runner.load(tmp_path, tiny_network(seed=1), world.task)
    replace(learned(world), network=("other",)).save(tmp_path)
    with pytest.raises(PolicyError, match="trained with a network"):
        Runner.load(tmp_path, tiny_network(), world.task)


@pytest.mark.parametrize("trade_off", [0.04, 1.1])
def test_a_lambda_that_the_policy_does_not_know_is_refused(trade_off: float, world: World, tmp_path: Path) -> None:
    save_model(world.model, tmp_path)
    learned(world).save(tmp_path)
    with pytest.raises(PolicyError, match=r"from 0\.05 to 1"):
        Runner.load(tmp_path, tiny_network(), world.task, trade_off=trade_off)


def pose_world() -> World:
    from tests.envs.test_pose_world import pose_world as made_pose_world

    return made_pose_world("labels")


def follower_world() -> World:
    from tests.envs.test_recurrent import TASK, Follower, objects

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = Follower().eval()
    model = ResQModel(network, (torch.zeros(1, 3, *SIZE), torch.zeros(1, 1, *SIZE), torch.zeros(1, 6, 1, 1)))
    model.calibrate([clip_inputs(model.float_forward, TASK, clip) for clip in objects([6, 6], seed=50)])
    return World(model, TASK, ClipStore.prepare(model, TASK, objects([7])))


@pytest.mark.parametrize("kind", ["points", "a mask that is fed back"])
def test_every_task_runs_as_in_the_simulator(kind: str) -> None:
    world = pose_world() if kind == "points" else follower_world()
    clip = world.store.clips[0]
    policy = DynamicResQ("previous", 3, tau=0.4)
    expected = trace(world.model, world.task, world.store, policy, grid=world.grid)
    runner = Runner(policy, world.model, world.task, world.grid)
    for _ in range(2):  # a second video leaves nothing of the first
        assert clip.labels is not None
        runner.reset(None if kind == "points" else clip.labels[0])
        for t, frame in enumerate(clip.frames):
            prediction, cost = runner(frame)
            assert torch.equal(prediction, expected.prediction[t]), t
            assert torch.equal(cost.regions, expected.share[t]), t
    assert (expected.prediction[1:] != expected.prediction[:-1]).any()


def test_a_mask_to_begin_with_is_asked_for_and_brought_to_size() -> None:
    world = follower_world()
    clip = world.store.clips[0]
    assert clip.labels is not None
    runner = Runner(DynamicResQ("previous", 3, tau=0.4), world.model, world.task, world.grid)
    with pytest.raises(VideoError, match=r"reset\(label\)"):
        runner(clip.frames[0])
    runner.reset(clip.labels[0].repeat_interleave(2, 0).repeat_interleave(2, 1))
    assert torch.equal(runner(clip.frames[0])[0], clip.labels[0])
