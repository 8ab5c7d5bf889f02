"""The engine that runs the network, against plain loops over pixels and regions."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from resq_rl.envs import Decision, Problem
from resq_rl.errors import NetworkError, PolicyError
from resq_rl.perception import Segmentation
from resq_rl.quantization import LevelField, Reference, ThresholdField, to_float
from resq_rl.video import IGNORE
from tests.envs import problems
from tests.envs.problems import CLASSES, GRID, SIZE, assert_same, first_difference, random_levels, run_random_levels


def region_of(position: int, length: int, cells: int) -> int:
    """The cell of a grid under the centre of a position."""
    return min(int((position + 0.5) * cells / length), cells - 1)


def regions_of(size: tuple[int, int], grid: tuple[int, int]) -> list[list[list[tuple[int, int]]]]:
    """Pixels of each region, by row and column of regions."""
    cells: list[list[list[tuple[int, int]]]] = [[[] for _ in range(grid[1])] for _ in range(grid[0])]
    for y in range(size[0]):
        for x in range(size[1]):
            cells[region_of(y, size[0], grid[0])][region_of(x, size[1], grid[1])].append((y, x))
    return cells


def refresh(*flags: bool) -> Tensor:
    return torch.tensor(flags)


# Errors and costs by region -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divides", [True, False])
@pytest.mark.parametrize("weighting", ["iou", "pixel"])
def test_error_is_the_sum_of_the_error_table_over_each_regions_pixels(
    divides: bool, weighting: str, problem: Problem, uneven_problem: Problem
) -> None:
    base = problem if divides else uneven_problem
    own = problems.with_clips(base, [4, 5], weighting=weighting)
    size, table = own.model.frame_size, own.error_table
    _, results = run_random_levels(own, [1, 0], 2)
    mean_region = size[0] * size[1] / (own.grid[0] * own.grid[1])
    for t, result in enumerate(results):
        for slot, clip in enumerate((1, 0)):
            target, prediction = own.targets[clip][t].numpy(), result.prediction[slot].numpy()
            for r, row in enumerate(regions_of(size, own.grid)):
                for c, pixels in enumerate(row):
                    expected = 0.0
                    for y, x in pixels:
                        if target[y, x] != IGNORE:
                            expected += float(table[int(target[y, x]), int(prediction[y, x])])
                    assert float(result.error[slot, r, c]) == pytest.approx(expected / mean_region, rel=1e-5)


def test_mean_error_is_the_mean_over_pixels_whatever_the_grid(uneven_problem: Problem) -> None:
    errors = []
    for grid in ((1, 1), (4, 5), (7, 9), (30, 46)):
        own = replace(uneven_problem, grid=grid)
        streams = problems.streams(own, 1)
        errors.append(float(streams.start([0], [0]).error.mean()))
    assert errors == pytest.approx([errors[0]] * 4, rel=1e-5)


def test_ignored_pixels_cost_nothing(problem: Problem) -> None:
    ignored = tuple(torch.full_like(t, IGNORE) for t in problem.targets)
    own = replace(problem, targets=ignored)
    _, results = run_random_levels(own, [0], 2)
    assert all(not r.error.any() for r in results)


def hand_counted_macs(size: tuple[int, int]) -> int:
    """Multiply-accumulates of the tiny network, tap by tap; taps on padding do not count."""
    height, width = size[0] // 2, size[1] // 2
    stem = body = 0
    for y in range(height):
        for x in range(width):
            for dy in range(3):
                for dx in range(3):
                    stem += 0 <= 2 * y + dy - 1 < size[0] and 0 <= 2 * x + dx - 1 < size[1]
                    body += 0 <= y + dy - 1 < height and 0 <= x + dx - 1 < width
    return stem * 3 * 8 + body * (8 // 2) * 8 + height * width * 8 * 3


def test_shares_are_bops_over_the_regions_part_of_the_reference(problem: Problem) -> None:
    reference = 64 * hand_counted_macs(SIZE)
    assert problem.reference_bops == reference
    _, results = run_random_levels(problem, [0, 1], 3)
    for result in results:
        expected = result.cost.bops.sum(1) / (reference / (GRID[0] * GRID[1]))
        torch.testing.assert_close(result.share.double(), expected, rtol=1e-6, atol=0)
        total = result.cost.bops.sum((1, 2, 3)) / reference
        torch.testing.assert_close(result.share.double().mean((1, 2)), total, rtol=1e-6, atol=0)


def test_a_keyframe_costs_one(problem: Problem) -> None:
    streams = problems.streams(problem, 2)
    assert streams.start([0, 1], [0, 1]).share.mean((1, 2)).tolist() == pytest.approx([1.0, 1.0])
    result = streams.step(Decision(refresh(True, False), LevelField.constant(0, 2, 3)))
    assert result.cost.keyframe.tolist() == [True, False]
    assert result.share[0].mean().item() == pytest.approx(1.0)
    assert not result.share[1].any()


def test_spending_lands_in_the_region_it_was_decided_for(problem: Problem) -> None:
    streams = problems.streams(problem, 1)
    streams.start([0], [0])
    field = LevelField.constant(0, 1, 3, GRID)
    field.levels[:, :, 1, 2] = 3
    share = streams.step(Decision(refresh(False), field)).share[0]
    assert share[1, 2] > 0.3
    share[1, 2] = 0
    assert not share.any()


def test_a_decision_without_regions_is_one_for_all_regions(problem: Problem) -> None:
    taus = ThresholdField.constant(0.5, 2, 3)
    spread = ThresholdField.constant(0.5, 2, 3, GRID)
    a, b = problems.streams(problem, 2), problems.streams(problem, 2)
    for streams in (a, b):
        streams.start([0, 1], [0, 1])
    first, second = a.step(Decision(refresh(False, False), taus)), b.step(Decision(refresh(False, False), spread))
    assert_same(first, second, ("prediction", "error", "share"))
    assert first.share.shape == (2, *GRID)
    assert first.share.std() > 0


def test_rewards_by_region_average_to_the_frames(problem: Problem, uneven_problem: Problem) -> None:
    for own in (problem, uneven_problem):
        _, results = run_random_levels(own, [0, 1], 3)
        trade_off = torch.tensor([0.1, 0.9])
        for result in results:
            frame = result.reward(trade_off)
            torch.testing.assert_close(result.region_reward(trade_off).mean((1, 2)), frame, rtol=0, atol=1e-6)
            for slot in range(2):
                bops = float(result.cost.total[slot]) / own.reference_bops
                expected = 1 - float(result.error[slot].mean()) - float(trade_off[slot]) * bops
                assert float(frame[slot]) == pytest.approx(expected, abs=1e-6)


def test_the_float_networks_error_is_that_of_its_own_predictions(problem: Problem) -> None:
    streams, results = run_random_levels(problem, [1, 0], 2)
    table = problem.error_table
    for slot, clip in enumerate((1, 0)):
        target, teacher = problem.targets[clip][2], problem.teacher[clip][2]
        counted = target != IGNORE
        expected = table[target[counted].long(), teacher[counted].long()].sum() / target.numel()
        assert float(streams.engine.float_error(results[-1].clip, results[-1].time)[slot].mean()) == pytest.approx(
            float(expected), rel=1e-5
        )


def test_the_reference_modes_differ_after_the_first_residual_frame(problem: Problem) -> None:
    outcomes = []
    for reference in ("previous", "keyframe"):
        streams = problems.streams(problem, 1, reference=reference)
        streams.start([0], [0])
        own = []
        for _ in range(2):
            result = streams.step(Decision(refresh(False), ThresholdField.constant(0.3, 1, 3)))
            own.append((result.cost.total.item(), streams.observe().regions.clone()))
        outcomes.append(own)
    (_, a1), (cost_a2, _) = outcomes[0]
    (_, b1), (cost_b2, _) = outcomes[1]
    assert (a1 != b1).any(), "the residual against the keyframe is another than that against the previous frame"
    assert cost_a2 != cost_b2


# What is refused ------------------------------------------------------------------------------------------------------


def test_an_output_that_is_not_finite_names_its_frame(problem: Problem) -> None:
    calls = []

    class Breaking(Segmentation):
        """Loses one value of the second slot's output in the second step."""

        def output(self, raw: object, size: tuple[int, int] | None = None) -> Tensor:
            values = super().output(raw, size).clone()
            calls.append(raw)
            if len(calls) == 2:
                values[1, 0, 3, 4] = math.nan
            return values

    streams = problems.streams(replace(problem, task=Breaking(CLASSES)), 2)
    streams.start([0, 1], [0, 2])
    with pytest.raises(NetworkError, match=r"tiny/2, frame 1, holds NaN"):
        streams.step(Decision(refresh(False, False), LevelField.constant(1, 2, 3)))


@pytest.mark.parametrize(
    ("decision", "message"),
    [
        (Decision(refresh(False), LevelField.constant(0, 2, 3)), "2 clips"),
        (Decision(refresh(False, False), LevelField.constant(0, 1, 3)), "2 clips"),
        (Decision(refresh(False, False), LevelField.constant(0, 2, 5)), "3 layer groups"),
        (Decision(refresh(False, False), LevelField.constant(4, 2, 3)), "Levels must be 0 to 3"),
        (Decision(refresh(False, False), LevelField.constant(-1, 2, 3)), "Levels must be 0 to 3"),
        (Decision(refresh(False, False), LevelField.constant(0, 2, 3, (3, 2))), r"grid of \(3, 2\).*\(2, 3\)"),
        (Decision(refresh(False, False), ThresholdField.constant(-1.0, 2, 3)), "Thresholds"),
        (Decision(refresh(False, False), ThresholdField.constant(math.nan, 2, 3)), "Thresholds"),
        (Decision(refresh(False, False), ThresholdField.constant(1.0, 2, 3, kappa=(1.0, 2.0))), "kappa"),
    ],
)
def test_decisions_that_do_not_fit_are_refused_and_change_nothing(
    decision: Decision, message: str, problem: Problem, unchecked_types: None
) -> None:
    streams, twin = problems.streams(problem, 2), problems.streams(problem, 2)
    for s in (streams, twin):
        s.start([0, 1], [0, 1])
    with pytest.raises(PolicyError, match=message):
        streams.step(decision)
    assert first_difference(streams.last_frame(0).numpy(), twin.last_frame(0).numpy()) is None
    good = Decision(refresh(False, False), random_levels(problem, 2, 0))
    assert first_difference(streams.step(good).share.numpy(), twin.step(good).share.numpy()) is None


# Observations ---------------------------------------------------------------------------------------------------------


def reference_features(
    problem: Problem, clip: int, time: int, reference_time: int, key_time: int, prediction: np.ndarray, output: Tensor
) -> dict[str, np.ndarray]:
    """A clip's region features before frame `time`, pixel by pixel in float64."""
    frames = problem.clips[clip].frames.numpy().astype(np.float64) / 255
    size, cells = problem.model.frame_size, regions_of(problem.model.frame_size, problem.grid)

    def pooled(values: np.ndarray, how: str = "mean") -> np.ndarray:
        out = np.zeros(problem.grid)
        for r, row in enumerate(cells):
            for c, pixels in enumerate(row):
                own = [values[y, x] for y, x in pixels]
                out[r, c] = max(own) if how == "max" else sum(own) / len(own)
        return out

    def around(values: np.ndarray) -> np.ndarray:
        out = np.zeros(problem.grid)
        for r in range(problem.grid[0]):
            for c in range(problem.grid[1]):
                out[r, c] = values[max(0, r - 1) : r + 2, max(0, c - 1) : c + 2].mean()
        return out

    residual = np.abs(frames[time] - frames[reference_time]).max(0)
    edge, texture = np.zeros(size), np.zeros(size)
    for y in range(size[0]):
        for x in range(size[1]):
            right, below = min(x + 1, size[1] - 1), min(y + 1, size[0] - 1)
            edge[y, x] = prediction[y, right] != prediction[y, x] or prediction[below, x] != prediction[y, x]
            green = frames[time, 1]
            texture[y, x] = abs(green[y, right] - green[y, x]) / 2 + abs(green[below, x] - green[y, x]) / 2
    mean = np.sqrt(pooled(residual))
    return {
        "residual_mean": mean,
        "residual_max": pooled(residual, "max"),
        "drift_mean": np.sqrt(pooled(np.abs(frames[time] - frames[key_time]).max(0))),
        "residual_around": around(mean),
        "boundary": pooled(edge),
        "boundary_around": around(pooled(edge)),
        "foreground": pooled(prediction != 0),
        "texture": np.sqrt(pooled(texture)),
        "frame": np.array([math.sqrt(residual.mean()), (prediction != 0).mean()]),
    }


@pytest.mark.parametrize("reference", ["previous", "keyframe"])
def test_features_of_regions_equal_a_loop_over_pixels(problem: Problem, reference: Reference) -> None:
    streams = problems.streams(problem, 2, reference=reference)
    clips = [1, 3]
    result = streams.start([0, 1], clips)
    names = problems.scheme(problem).feature_names
    for t in range(3):
        observation = streams.observe()
        raw = problem.model.float_forward(to_float(streams.problem.clips[1].frames[:1]))
        for slot, clip in enumerate(clips):
            expected = reference_features(
                problem,
                clip,
                t + 1,
                t if reference == "previous" else 0,
                0,
                result.prediction[slot].numpy(),
                problem.task.output(raw, problem.model.frame_size),
            )
            frame = expected.pop("frame")
            for name, values in expected.items():
                index = names.index(name)
                np.testing.assert_allclose(
                    observation.regions[slot, ..., index].numpy(), values, atol=2e-5, err_msg=f"frame {t + 1}, {name}"
                )
            if reference == "previous" or t == 0:
                assert float(observation.frame[slot, 3]) == pytest.approx(frame[0], abs=2e-5)
            assert float(observation.frame[slot, 4]) == pytest.approx(frame[1], abs=2e-5)
        result = streams.step(Decision(refresh(False, False), random_levels(problem, 2, t)))


def test_uncertainty_is_the_last_outputs(problem: Problem) -> None:
    """One minus the margin of the two most probable classes at every fourth pixel, as in the task's definition."""
    streams = problems.streams(problem, 1)
    streams.start([0], [0])
    state = problem.model.new_state(1)
    raw, _ = problem.model.step(
        to_float(problem.clips[0].frames[:1]), state, refresh(True), LevelField.constant(0, 1, 3)
    )
    probability = problem.task.output(raw, SIZE)[0].softmax(0).sort(0, descending=True).values.numpy()
    margin = 1 - (probability[0] - probability[1])
    sample = margin[2::4, 2::4]  # 8 x 12 for 2 x 3 regions
    expected = sample.reshape(2, 4, 3, 4).mean((1, 3))
    index = problems.scheme(problem).feature_names.index("uncertainty")
    np.testing.assert_allclose(streams.observe().regions[0, ..., index].numpy(), expected, atol=1e-6)


def test_spending_is_observed_by_region_and_layer_group(problem: Problem) -> None:
    streams = problems.streams(problem, 1)
    streams.start([0], [0])
    names = problems.scheme(problem).feature_names
    columns = [names.index(f"spent_group{g}") for g in range(3)]
    torch.testing.assert_close(streams.observe().regions[..., columns], torch.ones(1, *GRID, 3), rtol=0, atol=0.06)
    field = LevelField.constant(0, 1, 3, GRID)
    field.levels[0, 1, 0, 1] = 2  # body: 4-bit activations, 4-bit weights
    streams.step(Decision(refresh(False), field))
    spent = streams.observe().regions[0, ..., columns]
    assert spent[0, 1, 1].item() == pytest.approx(16 / 64, rel=0.1)
    spent[0, 1, 1] = 0
    assert not spent.any()


@pytest.mark.parametrize("grid", [(1, 1), (5, 7), (32, 48)])
def test_any_grid_up_to_one_region_per_pixel_works(grid: tuple[int, int], problem: Problem) -> None:
    own = replace(problem, grid=grid)
    streams, results = run_random_levels(own, [0, 1], 2)
    observation = streams.observe()
    assert observation.regions.shape == (2, *grid, 12)
    assert torch.isfinite(observation.regions).all()
    for result in results:
        torch.testing.assert_close(
            result.share.double().mean((1, 2)), result.cost.total / own.reference_bops, rtol=1e-5, atol=0
        )
