"""Streams, measurement and tables with a task whose predictions are points: human pose."""

from pathlib import Path

import pytest
import torch

from resq_rl.envs import Problem, Streams, TableEngine, measure, respond, tabulate
from resq_rl.envs.problem import gather
from resq_rl.errors import VideoError
from resq_rl.perception import Pose
from resq_rl.policies import DynamicResQ, StaticResQ, measure_on_tables
from resq_rl.quantization import to_float
from resq_rl.sealed import ContentStore
from tests.envs import problems
from tests.envs.problems import SIZE, tiny_clips

TASK = Pose()


@pytest.fixture(scope="module")
def agreeing(pose_problem: Problem) -> Problem:
    """The same clips, compared with the float network."""
    own = pose_problem
    return Problem.prepare(own.model, TASK, own.clips, grid=own.grid, source="teacher")


def test_the_float_network_agrees_with_itself(pose_problem: Problem, agreeing: Problem) -> None:
    assert agreeing.float_accuracy == 1.0
    assert pose_problem.float_accuracy < 0.5
    assert pose_problem.targets[0] is pose_problem.clips[0].labels


def test_errors_by_region_average_to_the_share_of_wrong_points(agreeing: Problem) -> None:
    streams = problems.streams(agreeing, 3)
    result = streams.start(range(3), range(3))
    target = gather(agreeing.targets, result.clip, result.time)
    right, counted = TASK.counts(result.prediction, target).sum(1).unbind(-1)
    expected = (counted - right).float() / result.prediction.shape[1]
    assert expected.any()
    torch.testing.assert_close(result.error.mean((1, 2)), expected)
    assert not streams.engine.float_error(result.clip, result.time).any()


def test_measuring_counts_what_the_network_predicts(agreeing: Problem) -> None:
    result = measure(agreeing, DynamicResQ("previous", 1))
    for index, clip in enumerate(agreeing.clips):
        counts = torch.zeros(13, 2, dtype=torch.int64)
        for t, frame in enumerate(clip.frames):
            state = agreeing.model.new_state(1, "previous")
            field = DynamicResQ("previous", 1).decide(problems.view(agreeing, 1)).field
            raw, _ = agreeing.model.step(to_float(frame[None]), state, torch.tensor([True]), field)
            prediction = TASK.predict(TASK.output(raw, SIZE))
            counts += TASK.counts(prediction, agreeing.targets[index][t : t + 1])[0]
        assert torch.equal(result.counts[index], counts)
    assert result.accuracy == float(TASK.accuracy(result.counts.sum(0)))


def test_tables_give_what_the_network_gives(agreeing: Problem, tmp_path: Path) -> None:
    store = ContentStore(tmp_path)
    tables = [tabulate(agreeing, i, store) for i in range(3)]
    again = tabulate(agreeing, 1, store)
    fresh = respond(agreeing, 1)
    assert torch.equal(again.counts, fresh.counts)
    assert again.counts.dtype == fresh.counts.dtype
    policy = StaticResQ("keyframe", 2, level=1)
    engine = TableEngine(agreeing, tables)
    known = measure_on_tables(engine, policy)
    run = measure(agreeing, policy)
    assert torch.equal(known.counts, run.counts)
    torch.testing.assert_close(known.error, run.error)
    started = Streams(engine, slots=1, reference="keyframe").start([0], [0])
    assert started.prediction.shape == (1, 0, 0)


def test_observations_show_the_heat_of_the_last_output(agreeing: Problem) -> None:
    streams = problems.streams(agreeing, 1)
    streams.start([0], [0])
    names = problems.scheme(agreeing).feature_names
    observed = streams.observe().regions[0]
    raw, _ = agreeing.model.step(
        to_float(agreeing.clips[0].frames[:1]),
        agreeing.model.new_state(1, "previous"),
        torch.tensor([True]),
        DynamicResQ("previous", 1).decide(problems.view(agreeing, 1)).field,
    )
    output = TASK.output(raw, SIZE)
    heat = (output[0] - output[0].amax((1, 2), keepdim=True)).exp().amax(0)  # 8 x 12 for 2 x 3 regions
    expected = heat.unflatten(0, (2, 4)).unflatten(2, (3, 4)).mean((1, 3))
    torch.testing.assert_close(observed[..., names.index("foreground")], expected)


def test_clips_of_another_task_are_refused(pose_problem: Problem) -> None:
    with pytest.raises(VideoError, match="tiny/0: pose needs labels"):
        Problem.prepare(pose_problem.model, TASK, tiny_clips([2]))
