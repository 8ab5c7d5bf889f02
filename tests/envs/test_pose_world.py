"""Simulator, measurement and tables with a task whose predictions are points: human pose."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch

from resq_rl.envs import ClipStore, TableCache, TableSimulator, measure, respond
from resq_rl.envs.clips import AccuracySource, gather
from resq_rl.errors import VideoError
from resq_rl.perception import CompactPose, Pose, load_network
from resq_rl.policies import DynamicResQ, Responses, StaticResQ
from resq_rl.quantization import ResQModel, to_float
from resq_rl.video import FigureVideo
from tests.envs.worlds import World, tiny_clips

SIZE, GRID = (32, 48), (2, 3)
TASK = Pose()


def pose_world(source: AccuracySource) -> World:
    """Random weights: predictions are wrong, and change with every frame."""
    clips = FigureVideo(size=SIZE, frames=4, speed=8, cuts=0.0).clips
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = CompactPose(width=8)
    with torch.no_grad():
        list(network.head.parameters())[-2].mul_(30.0)  # weights of the last convolution
    model = ResQModel(load_network(network), torch.zeros(1, 3, *SIZE)).calibrate([c.frames for c in clips("train")[:2]])
    store = ClipStore.prepare(model, TASK, clips("test")[:3], source=source)
    return World(model, cast(Any, TASK), store, GRID)  # whose task is a segmentation in most tests


@pytest.fixture(scope="module")
def world() -> World:
    return pose_world("labels")


@pytest.fixture(scope="module")
def agreeing() -> World:
    return pose_world("teacher")


def test_the_float_network_agrees_with_itself(world: World, agreeing: World) -> None:
    assert agreeing.store.float_accuracy == 1.0
    assert world.store.float_accuracy < 0.5
    assert world.store.targets[0] is world.store.clips[0].labels


def test_errors_by_region_average_to_the_share_of_wrong_points(agreeing: World) -> None:
    simulator = agreeing.simulator(3)
    result = simulator.start(range(3), range(3))
    target = gather(agreeing.store.targets, result.clip, result.time)
    right, counted = TASK.counts(result.prediction, target).sum(1).unbind(-1)
    expected = (counted - right).float() / len(TASK.points)
    assert expected.any()
    torch.testing.assert_close(result.error.mean((1, 2)), expected)
    assert not simulator.float_error(result).any()


def test_measuring_counts_what_the_network_predicts(agreeing: World) -> None:
    result = measure(agreeing.model, TASK, agreeing.store, DynamicResQ("previous", 1), grid=GRID)
    for index, clip in enumerate(agreeing.store.clips):
        counts = torch.zeros(13, 2, dtype=torch.int64)
        for t, frame in enumerate(clip.frames):
            state = agreeing.model.new_state(1, "previous")
            field = DynamicResQ("previous", 1).decide(agreeing.view(1)).field
            raw, _ = agreeing.model.step(to_float(frame[None]), state, torch.tensor([True]), field)
            prediction = TASK.predict(TASK.output(raw, SIZE))
            counts += TASK.counts(prediction, agreeing.store.targets[index][t : t + 1])[0]
        assert torch.equal(result.counts[index], counts)
    assert result.accuracy == float(TASK.accuracy(result.counts.sum(0)))


def test_tables_give_what_the_network_gives(agreeing: World, tmp_path: Path) -> None:
    cache = TableCache(tmp_path)
    tables = [cache.respond(agreeing.model, TASK, agreeing.store, i, grid=GRID) for i in range(3)]
    again = cache.respond(agreeing.model, TASK, agreeing.store, 1, grid=GRID)
    fresh = respond(agreeing.model, TASK, agreeing.store, 1, grid=GRID)
    assert torch.equal(again.counts, fresh.counts)
    assert again.counts.dtype == fresh.counts.dtype
    policy = StaticResQ("keyframe", 2, level=1)
    known = Responses(agreeing.model, TASK, agreeing.store, tuple(tables)).measure(policy)
    run = measure(agreeing.model, TASK, agreeing.store, policy, grid=GRID)
    assert torch.equal(known.counts, run.counts)
    torch.testing.assert_close(known.error, run.error)
    started = TableSimulator(agreeing.model, TASK, agreeing.store, tables, slots=1).start([0], [0])
    assert started.prediction.shape == (1, 0, 0)


def test_observations_show_the_heat_of_the_last_output(agreeing: World) -> None:
    simulator = agreeing.simulator(1)
    simulator.start([0], [0])
    names = agreeing.scheme().feature_names
    observed = simulator.observe().regions[0]
    raw, _ = agreeing.model.step(
        to_float(agreeing.store.clips[0].frames[:1]),
        agreeing.model.new_state(1, "previous"),
        torch.tensor([True]),
        DynamicResQ("previous", 1).decide(agreeing.view(1)).field,
    )
    output = TASK.output(raw, SIZE)
    heat = (output[0] - output[0].amax((1, 2), keepdim=True)).exp().amax(0)  # 8 x 12 for 2 x 3 regions
    expected = heat.unflatten(0, (2, 4)).unflatten(2, (3, 4)).mean((1, 3))
    torch.testing.assert_close(observed[..., names.index("foreground")], expected)


def test_clips_of_another_task_are_refused(world: World) -> None:
    with pytest.raises(VideoError, match="tiny/0: pose needs labels"):
        ClipStore.prepare(world.model, TASK, tiny_clips([2]))
