"""Streams of clips, each at its own frame, over either engine."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from resq_rl.envs import Decision, Observation, Problem, StreamResult, Streams
from resq_rl.errors import PolicyError, SettingsError
from resq_rl.quantization import Budget, LevelField, Reference, to_float
from tests.envs import problems
from tests.envs.problems import assert_same, first_difference, random_levels, run_random_levels, values_of, written_over


def alone(problem: Problem, clip: int, fields: list[LevelField], reference: Reference) -> list[tuple[Tensor, float]]:
    """Predictions and costs of a clip run by itself, without streams."""
    state = problem.model.new_state(1, reference)
    out = []
    for t, frame in enumerate(problem.clips[clip].frames):
        field = fields[t - 1] if t else LevelField.constant(0, 1, problem.groups, problem.grid)
        raw, cost = problem.model.step(to_float(frame[None]), state, torch.tensor([t == 0]), field)
        output = problem.task.output(raw, problem.model.frame_size)
        out.append((problem.task.predict(output)[0], float(cost.total[0])))
    return out


@pytest.mark.parametrize("reference", ["previous", "keyframe"])
def test_clips_of_unequal_lengths_stream_through_the_slots(problem: Problem, reference: Reference) -> None:
    """Whatever runs beside it and ran before it, a clip runs as it does alone."""
    streams = problems.streams(problem, 2, reference=reference)
    waiting = [2, 3, 0]
    clips, times = [0, 1], [0, 0]
    fields = [[random_levels(problem, 1, 100 * s + t) for t in range(12)] for s in range(8)]
    serial = [0, 1]  # of the clip in each slot, so that each has decisions of its own
    results = streams.start([0, 1], clips)
    seen: dict[int, tuple[int, list[tuple[Tensor, float]]]] = {
        serial[s]: (clips[s], [(results.prediction[s], float(results.cost.total[s]))]) for s in range(2)
    }
    finished = 0
    while True:
        field = LevelField(torch.cat([fields[serial[s]][times[s]].levels for s in range(2)]))
        result = streams.step(Decision(torch.tensor([False, False]), field))
        for s in range(2):
            times[s] += 1
            assert int(result.clip[s]) == clips[s]
            assert int(result.time[s]) == times[s]
            assert bool(result.last[s]) == (times[s] == len(problem.clips[clips[s]]) - 1)
            seen[serial[s]][1].append((result.prediction[s], float(result.cost.total[s])))
        ended = [s for s in range(2) if result.last[s]]
        finished += len(ended)
        if not waiting and ended:
            break
        for s in ended:
            clips[s], times[s], serial[s] = waiting.pop(0), 0, max(serial) + 1
            started = streams.start([s], [clips[s]])
            assert started.cost.keyframe.tolist() == [True]
            seen[serial[s]] = (clips[s], [(started.prediction[0], float(started.cost.total[0]))])
            if not waiting:
                break
    assert finished >= 3
    for number, (clip, frames) in seen.items():
        for t, (mine, expected) in enumerate(
            zip(frames, alone(problem, clip, fields[number], reference), strict=False)
        ):
            difference = first_difference(mine[0].numpy(), expected[0].numpy())
            assert difference is None, f"clip {clip}, frame {t}: {difference}"
            assert mine[1] == expected[1], f"clip {clip}, frame {t}"


def test_a_step_after_the_end_names_the_slots(problem: Problem) -> None:
    streams, results = run_random_levels(problem, [0, 1], 4)
    assert results[-1].last.tolist() == [True, False]
    with pytest.raises(PolicyError, match=r"slots \[0\] are over"):
        streams.step(Decision(torch.tensor([False, False]), LevelField.constant(0, 2, 3)))
    streams.start([0], [2])
    streams.step(Decision(torch.tensor([False, False]), LevelField.constant(0, 2, 3)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"slots": 0}, "At least one clip"),
        ({"trade_off_range": (0.0, 1.0)}, "positive and ascending"),
        ({"trade_off_range": (math.nan, 1.0)}, "positive and ascending"),
        ({"reference": "none"}, "reference is"),
    ],
)
def test_impossible_streams_are_refused(
    settings: dict[str, object], message: str, problem: Problem, unchecked_types: None
) -> None:
    with pytest.raises(SettingsError, match=message):
        problems.streams(problem, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0.0, -0.1, math.nan])
def test_a_lambda_that_is_not_positive_is_refused(value: float, problem: Problem) -> None:
    with pytest.raises(PolicyError, match="lambda must be positive"):
        problems.streams(problem, 2).start([0, 1], [0, 1], [0.3, value])


def test_frame_features_age_lambda_and_budget(problem: Problem) -> None:
    low, high, mean, bucket = 0.1, 1.0, 0.2, 4.0
    budget = Budget(peak=0.5, mean=mean, bucket=bucket)
    streams = problems.streams(problem, 2, budget=budget, trade_off_range=(low, high))
    trade_off = [0.2, 1.0]
    results = [streams.start([0, 1], [0, 1], trade_off)]
    flags = [torch.tensor([False, False]), torch.tensor([True, False]), torch.tensor([False, False])]
    ages = [[0, 0], [1, 1], [0, 2], [1, 3]]
    for t in range(4):
        frame = streams.observe().frame
        for slot in range(2):
            credit = 0.5  # the peak
            for result in results:
                credit = min(credit - float(result.cost.total[slot]) / problem.reference_bops + mean, bucket * mean)
            left = credit / (bucket * mean)
            position = math.log(trade_off[slot] / low) / math.log(high / low)
            expected = [math.log2(1 + ages[t][slot]) / 6, position, left]
            assert frame[slot, :3].tolist() == pytest.approx(expected, abs=1e-6), f"after frame {t}, slot {slot}"
        if t < 3:
            results.append(streams.step(Decision(flags[t], random_levels(problem, 2, t))))


def test_without_a_budget_all_of_it_is_left(problem: Problem) -> None:
    streams, _ = run_random_levels(problem, [0], 3)
    assert streams.observe().frame[:, 2].tolist() == [1.0]


def test_one_lambda_lies_at_the_bottom_of_its_range(problem: Problem) -> None:
    streams = problems.streams(problem, 1, trade_off_range=(0.3, 0.3))
    streams.start([0], [0], [0.3])
    assert streams.observe().frame[0, 1].item() == 0


def test_after_the_end_the_last_frame_is_observed_once_more(problem: Problem) -> None:
    streams, results = run_random_levels(problem, [0], 4)
    assert results[-1].last.all()
    observation = streams.observe()
    assert not observation.regions[..., 0].any(), "the last frame does not differ from itself"


# Memory and engines ------------------------------------------------------------------------------------------------


def one_level_each(slots: int, groups: int, generator: torch.Generator) -> Decision:
    """One random level for each clip, and a keyframe for a third of them."""
    levels = torch.randint(4, (slots, 1, 1, 1), generator=generator).repeat(1, groups, 1, 1)
    return Decision(torch.rand(slots, generator=generator) < 0.3, LevelField(levels))


@pytest.mark.parametrize("kind", ["previous", "keyframe", "tables", "points", "a mask that is fed back"])
def test_streams_share_no_memory_with_decisions_and_results(
    kind: str, problem: Problem, pose_problem: Problem, recurrent_problem: Problem
) -> None:
    """Streams whose decisions and results are overwritten run as those whose results are read at the very end."""
    own = {"points": pose_problem, "a mask that is fed back": recurrent_problem}.get(kind, problem)

    def made() -> Streams:
        if kind == "tables":
            return problems.table_streams(own, 2)
        return problems.streams(own, 2, reference="keyframe" if kind == "keyframe" else "previous")

    overwritten, untouched = made(), made()
    kept: list[tuple[StreamResult, Observation]] = []
    read: list[tuple[dict[str, Tensor], Tensor, Tensor]] = []
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    for t in range(6):
        if t in (0, 3):  # in the midst of the clips, one slot begins another
            slots = [0, 1] if t == 0 else [1]
            mine, theirs = (s.start(slots, slots) for s in (overwritten, untouched))
        else:
            decision, same = (one_level_each(2, own.groups, generator) for generator in generators)
            mine, theirs = overwritten.step(decision), untouched.step(same)
        kept.append((theirs, untouched.observe()))
        observation = overwritten.observe()
        read.append((values_of(mine), observation.regions.clone(), observation.frame.clone()))
        for value in (mine, observation, *(() if t in (0, 3) else (decision, decision.field))):
            written_over(value)
        if bool((overwritten.time >= overwritten.length).any()):
            break
    assert len(read) > 4
    for t, ((result, seen), (values, regions, frame)) in enumerate(zip(kept, read, strict=True)):
        assert_same(values, values_of(result), values, f"step {t}")
        assert torch.equal(regions, seen.regions), t
        assert torch.equal(frame, seen.frame), t


@pytest.mark.parametrize("divides", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_both_engines_give_the_same_frames(seed: int, divides: bool, problem: Problem, uneven_problem: Problem) -> None:
    """Under random decisions, each slot beginning another clip where one ends."""
    own, slots = problem if divides else uneven_problem, 3
    settings: dict[str, Any] = {"trade_off_range": (0.1, 1.0)}
    real = problems.streams(own, slots, reference="keyframe", **settings)
    tables = problems.table_streams(own, slots, **settings)
    generator = torch.Generator().manual_seed(seed)
    over, ended = torch.ones(slots, dtype=torch.bool), 0
    for t in range(16):
        if bool(over.any()):
            rows = torch.nonzero(over)[:, 0].tolist()
            clips = torch.randint(len(own), (len(rows),), generator=generator).tolist()
            trade_off = (0.1 + 0.9 * torch.rand(len(rows), generator=generator)).tolist()
            mine, expected = (streams.start(rows, clips, trade_off) for streams in (tables, real))
            ended += len(rows)
        else:
            decision = one_level_each(slots, own.groups, generator)
            mine, expected = (streams.step(decision) for streams in (tables, real))
        found, wanted = values_of(mine), values_of(expected)
        assert found.pop("prediction").numel() == 0 < wanted.pop("prediction").numel()
        assert_same(found, wanted, wanted, f"step {t}")
        assert_same(tables.observe(), real.observe(), ("regions", "frame"), f"step {t}")
        over = real.time >= real.length
    assert ended > 2 * slots
