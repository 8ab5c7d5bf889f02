"""The batched simulator against plain loops over pixels, regions and clips."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from resq_rl.envs import Decision, EpisodeSettings, FrameResult, Simulator
from resq_rl.errors import NetworkError, PolicyError, SettingsError
from resq_rl.perception import Segmentation
from resq_rl.quantization import LevelField, Reference, ThresholdField, to_float
from resq_rl.video import IGNORE
from tests.envs.worlds import GRID, SIZE, World, first_difference


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


def levels(world: World, slots: int, seed: int) -> LevelField:
    """Random levels for every layer group and region."""
    generator = torch.Generator().manual_seed(seed)
    shape = (slots, len(world.model.groups), *world.grid)
    return LevelField(torch.randint(0, 4, shape, generator=generator))


def refresh(*flags: bool) -> Tensor:
    return torch.tensor(flags)


def run(world: World, clips: list[int], steps: int, **settings: object) -> tuple[Simulator, list[FrameResult]]:
    """Random levels over some clips, forced keyframes first."""
    slots = len(clips)
    simulator = world.simulator(slots, **settings)
    results = [simulator.start(range(slots), clips)]
    for t in range(steps):
        results.append(simulator.step(Decision(torch.zeros(slots, dtype=torch.bool), levels(world, slots, t))))
    return simulator, results


# Errors and costs by region ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("divides", [True, False])
@pytest.mark.parametrize("weighting", ["iou", "pixel"])
def test_error_is_the_sum_of_the_error_table_over_each_regions_pixels(
    divides: bool, weighting: str, world: World, uneven_world: World
) -> None:
    base = world if divides else uneven_world
    own = base.with_clips([4, 5], weighting=weighting)  # type: ignore[arg-type]
    size, table = own.model.frame_size, own.store.error_table
    _, results = run(own, [1, 0], 2)
    mean_region = size[0] * size[1] / (own.grid[0] * own.grid[1])
    for t, result in enumerate(results):
        for slot, clip in enumerate((1, 0)):
            target, prediction = own.store.targets[clip][t].numpy(), result.prediction[slot].numpy()
            for r, row in enumerate(regions_of(size, own.grid)):
                for c, pixels in enumerate(row):
                    expected = 0.0
                    for y, x in pixels:
                        if target[y, x] != IGNORE:
                            expected += float(table[int(target[y, x]), int(prediction[y, x])])
                    assert float(result.error[slot, r, c]) == pytest.approx(expected / mean_region, rel=1e-5)


def test_mean_error_is_the_mean_over_pixels_whatever_the_grid(uneven_world: World) -> None:
    errors = []
    for grid in ((1, 1), (4, 5), (7, 9), (30, 46)):
        own = replace(uneven_world, grid=grid)
        simulator = own.simulator(1)
        errors.append(float(simulator.start([0], [0]).error.mean()))
    assert errors == pytest.approx([errors[0]] * 4, rel=1e-5)


def test_ignored_pixels_cost_nothing(world: World) -> None:
    ignored = tuple(torch.full_like(t, IGNORE) for t in world.store.targets)
    own = replace(world, store=replace(world.store, targets=ignored))
    _, results = run(own, [0], 2)
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


def test_shares_are_bops_over_the_regions_part_of_the_reference(world: World) -> None:
    reference = 64 * hand_counted_macs(SIZE)
    assert world.simulator().reference_bops == reference
    _, results = run(world, [0, 1], 3)
    for result in results:
        expected = result.cost.bops.sum(1) / (reference / (GRID[0] * GRID[1]))
        torch.testing.assert_close(result.share.double(), expected, rtol=1e-6, atol=0)
        total = result.cost.bops.sum((1, 2, 3)) / reference
        torch.testing.assert_close(result.share.double().mean((1, 2)), total, rtol=1e-6, atol=0)


def test_a_keyframe_costs_one(world: World) -> None:
    simulator = world.simulator(2)
    assert simulator.start([0, 1], [0, 1]).share.mean((1, 2)).tolist() == pytest.approx([1.0, 1.0])
    result = simulator.step(Decision(refresh(True, False), LevelField.constant(0, 2, 3)))
    assert result.cost.keyframe.tolist() == [True, False]
    assert result.share[0].mean().item() == pytest.approx(1.0)
    assert not result.share[1].any()


def test_spending_lands_in_the_region_it_was_decided_for(world: World) -> None:
    simulator = world.simulator(1)
    simulator.start([0], [0])
    field = LevelField.constant(0, 1, 3, GRID)
    field.levels[:, :, 1, 2] = 3
    share = simulator.step(Decision(refresh(False), field)).share[0]
    assert share[1, 2] > 0.3
    share[1, 2] = 0
    assert not share.any()


def test_a_decision_without_regions_is_one_for_all_regions(world: World) -> None:
    taus = ThresholdField.constant(0.5, 2, 3)
    spread = ThresholdField.constant(0.5, 2, 3, GRID)
    a, b = world.simulator(2), world.simulator(2)
    for simulator in (a, b):
        simulator.start([0, 1], [0, 1])
    first, second = a.step(Decision(refresh(False, False), taus)), b.step(Decision(refresh(False, False), spread))
    for name in ("prediction", "error", "share"):
        difference = first_difference(getattr(first, name).numpy(), getattr(second, name).numpy())
        assert difference is None, f"{name}: {difference}"
    assert first.share.shape == (2, *GRID)
    assert first.share.std() > 0


def test_rewards_by_region_average_to_the_frames(world: World, uneven_world: World) -> None:
    for own in (world, uneven_world):
        _, results = run(own, [0, 1], 3)
        trade_off = torch.tensor([0.1, 0.9])
        for result in results:
            frame = result.reward(trade_off)
            torch.testing.assert_close(result.region_reward(trade_off).mean((1, 2)), frame, rtol=0, atol=1e-6)
            for slot in range(2):
                bops = float(result.cost.total[slot]) / own.model.reference_bops()
                expected = 1 - float(result.error[slot].mean()) - float(trade_off[slot]) * bops
                assert float(frame[slot]) == pytest.approx(expected, abs=1e-6)


def test_the_float_networks_error_is_that_of_its_own_predictions(world: World) -> None:
    simulator, results = run(world, [1, 0], 2)
    table = world.store.error_table
    for slot, clip in enumerate((1, 0)):
        target, teacher = world.store.targets[clip][2], world.store.teacher[clip][2]
        counted = target != IGNORE
        expected = table[target[counted].long(), teacher[counted].long()].sum() / target.numel()
        assert float(simulator.float_error(results[-1])[slot].mean()) == pytest.approx(float(expected), rel=1e-5)


# Clips and slots ---------------------------------------------------------------------------------------------------


def alone(world: World, clip: int, fields: list[LevelField], reference: Reference) -> list[tuple[Tensor, float]]:
    """Predictions and costs of a clip run by itself, without a simulator."""
    state = world.model.new_state(1, reference)
    out = []
    for t, frame in enumerate(world.store.clips[clip].frames):
        field = fields[t - 1] if t else LevelField.constant(0, 1, len(world.model.groups), world.grid)
        raw, cost = world.model.step(to_float(frame[None]), state, refresh(t == 0), field)
        output = world.task.output(raw, world.model.frame_size)
        out.append((world.task.predict(output)[0], float(cost.total[0])))
    return out


@pytest.mark.parametrize("reference", ["previous", "keyframe"])
def test_clips_of_unequal_lengths_stream_through_the_slots(world: World, reference: Reference) -> None:
    """Whatever runs beside it and ran before it, a clip runs as it does alone."""
    simulator = world.simulator(2, reference=reference)
    waiting = [2, 3, 0]
    clips, times = [0, 1], [0, 0]
    fields = [[levels(world, 1, 100 * s + t) for t in range(12)] for s in range(8)]
    serial = [0, 1]  # of the clip in each slot, so that each has decisions of its own
    results = simulator.start([0, 1], clips)
    seen: dict[int, tuple[int, list[tuple[Tensor, float]]]] = {
        serial[s]: (clips[s], [(results.prediction[s], float(results.cost.total[s]))]) for s in range(2)
    }
    finished = 0
    while True:
        field = LevelField(torch.cat([fields[serial[s]][times[s]].levels for s in range(2)]))
        result = simulator.step(Decision(refresh(False, False), field))
        for s in range(2):
            times[s] += 1
            assert int(result.clip[s]) == clips[s]
            assert int(result.time[s]) == times[s]
            assert bool(result.last[s]) == (times[s] == len(world.store.clips[clips[s]]) - 1)
            seen[serial[s]][1].append((result.prediction[s], float(result.cost.total[s])))
        ended = [s for s in range(2) if result.last[s]]
        finished += len(ended)
        if not waiting and ended:
            break
        for s in ended:
            clips[s], times[s], serial[s] = waiting.pop(0), 0, max(serial) + 1
            started = simulator.start([s], [clips[s]])
            assert started.cost.keyframe.tolist() == [True]
            seen[serial[s]] = (clips[s], [(started.prediction[0], float(started.cost.total[0]))])
            if not waiting:
                break
    assert finished >= 3
    for number, (clip, frames) in seen.items():
        for t, (mine, expected) in enumerate(zip(frames, alone(world, clip, fields[number], reference), strict=False)):
            difference = first_difference(mine[0].numpy(), expected[0].numpy())
            assert difference is None, f"clip {clip}, frame {t}: {difference}"
            assert mine[1] == expected[1], f"clip {clip}, frame {t}"


def test_the_reference_modes_differ_after_the_first_residual_frame(world: World) -> None:
    outcomes = []
    for reference in ("previous", "keyframe"):
        simulator = world.simulator(1, reference=reference)
        simulator.start([0], [0])
        own = []
        for _ in range(2):
            result = simulator.step(Decision(refresh(False), ThresholdField.constant(0.3, 1, 3)))
            own.append((result.cost.total.item(), simulator.observe().regions.clone()))
        outcomes.append(own)
    (_, a1), (cost_a2, _) = outcomes[0]
    (_, b1), (cost_b2, _) = outcomes[1]
    assert (a1 != b1).any(), "the residual against the keyframe is another than that against the previous frame"
    assert cost_a2 != cost_b2


def test_an_output_that_is_not_finite_names_its_frame(world: World) -> None:
    calls = []

    class Breaking(Segmentation):
        """Loses one value of the second slot's output in the second step."""

        def output(self, raw: object, size: tuple[int, int] | None = None) -> Tensor:
            values = super().output(raw, size).clone()
            calls.append(raw)
            if len(calls) == 2:
                values[1, 0, 3, 4] = math.nan
            return values

    simulator = replace(world, task=Breaking(world.task.classes)).simulator(2)
    simulator.start([0, 1], [0, 2])
    with pytest.raises(NetworkError, match=r"tiny/2, frame 1, holds NaN"):
        simulator.step(Decision(refresh(False, False), LevelField.constant(1, 2, 3)))


def test_a_step_after_the_end_names_the_slots(world: World) -> None:
    simulator, results = run(world, [0, 1], 4)
    assert results[-1].last.tolist() == [True, False]
    with pytest.raises(PolicyError, match=r"slots \[0\] are over"):
        simulator.step(Decision(refresh(False, False), LevelField.constant(0, 2, 3)))
    simulator.start([0], [2])
    simulator.step(Decision(refresh(False, False), LevelField.constant(0, 2, 3)))


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
    decision: Decision, message: str, world: World, unchecked_types: None
) -> None:
    simulator, twin = world.simulator(2), world.simulator(2)
    for s in (simulator, twin):
        s.start([0, 1], [0, 1])
    with pytest.raises(PolicyError, match=message):
        simulator.step(decision)
    assert first_difference(simulator.last_frame(0).numpy(), twin.last_frame(0).numpy()) is None
    good = Decision(refresh(False, False), levels(world, 2, 0))
    assert first_difference(simulator.step(good).share.numpy(), twin.step(good).share.numpy()) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"slots": 0}, "At least one clip"),
        ({"grid": (2, 0)}, "grid must be"),
        ({"grid": (2, 49)}, "grid must be 1x1 to 32x48"),
        ({"trade_off_range": (0.0, 1.0)}, "positive and ascending"),
        ({"trade_off_range": (math.nan, 1.0)}, "positive and ascending"),
        ({"budget": 0.0}, "budget must be a positive"),
        ({"reference": "none"}, "reference is"),
    ],
)
def test_impossible_simulators_are_refused(
    settings: dict[str, object], message: str, world: World, unchecked_types: None
) -> None:
    with pytest.raises(SettingsError, match=message):
        world.simulator(**settings)  # type: ignore[arg-type]


def test_clips_of_another_size_than_the_network_are_refused(world: World, uneven_world: World) -> None:
    with pytest.raises(SettingsError, match="30x46 do not fit a model wrapped for"):
        Simulator(world.model, world.task, uneven_world.store, slots=1, grid=GRID)


@pytest.mark.parametrize("value", [0.0, -0.1, math.nan])
def test_a_lambda_that_is_not_positive_is_refused(value: float, world: World) -> None:
    with pytest.raises(PolicyError, match="lambda must be positive"):
        world.simulator(2).start([0, 1], [0, 1], [0.3, value])


# Observations ------------------------------------------------------------------------------------------------------


def reference_features(
    world: World, clip: int, time: int, reference_time: int, key_time: int, prediction: np.ndarray, output: Tensor
) -> dict[str, np.ndarray]:
    """A clip's region features before frame `time`, pixel by pixel in float64."""
    frames = world.store.clips[clip].frames.numpy().astype(np.float64) / 255
    size, cells = world.model.frame_size, regions_of(world.model.frame_size, world.grid)

    def pooled(values: np.ndarray, how: str = "mean") -> np.ndarray:
        out = np.zeros(world.grid)
        for r, row in enumerate(cells):
            for c, pixels in enumerate(row):
                own = [values[y, x] for y, x in pixels]
                out[r, c] = max(own) if how == "max" else sum(own) / len(own)
        return out

    def around(values: np.ndarray) -> np.ndarray:
        out = np.zeros(world.grid)
        for r in range(world.grid[0]):
            for c in range(world.grid[1]):
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
def test_features_of_regions_equal_a_loop_over_pixels(world: World, reference: Reference) -> None:
    simulator = world.simulator(2, reference=reference)
    clips = [1, 3]
    result = simulator.start([0, 1], clips)
    names = world.scheme().feature_names
    for t in range(3):
        observation = simulator.observe()
        raw = world.model.float_forward(to_float(simulator.store.clips[1].frames[:1]))
        for slot, clip in enumerate(clips):
            expected = reference_features(
                world,
                clip,
                t + 1,
                t if reference == "previous" else 0,
                0,
                result.prediction[slot].numpy(),
                world.task.output(raw, world.model.frame_size),
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
        result = simulator.step(Decision(refresh(False, False), levels(world, 2, t)))


def test_uncertainty_is_the_last_outputs(world: World) -> None:
    """One minus the margin of the two most probable classes at every fourth pixel, as in the task's definition."""
    simulator = world.simulator(1)
    simulator.start([0], [0])
    state = world.model.new_state(1)
    raw, _ = world.model.step(
        to_float(world.store.clips[0].frames[:1]), state, refresh(True), LevelField.constant(0, 1, 3)
    )
    probability = world.task.output(raw, SIZE)[0].softmax(0).sort(0, descending=True).values.numpy()
    margin = 1 - (probability[0] - probability[1])
    sample = margin[2::4, 2::4]  # 8 x 12 for 2 x 3 regions
    expected = sample.reshape(2, 4, 3, 4).mean((1, 3))
    index = world.scheme().feature_names.index("uncertainty")
    np.testing.assert_allclose(simulator.observe().regions[0, ..., index].numpy(), expected, atol=1e-6)


def test_spending_is_observed_by_region_and_layer_group(world: World) -> None:
    simulator = world.simulator(1)
    simulator.start([0], [0])
    names = world.scheme().feature_names
    columns = [names.index(f"spent_group{g}") for g in range(3)]
    torch.testing.assert_close(simulator.observe().regions[..., columns], torch.ones(1, *GRID, 3), rtol=0, atol=0.06)
    field = LevelField.constant(0, 1, 3, GRID)
    field.levels[0, 1, 0, 1] = 2  # body: 4-bit activations, 4-bit weights
    simulator.step(Decision(refresh(False), field))
    spent = simulator.observe().regions[0, ..., columns]
    assert spent[0, 1, 1].item() == pytest.approx(16 / 64, rel=0.1)
    spent[0, 1, 1] = 0
    assert not spent.any()


def test_frame_features_age_lambda_and_budget(world: World) -> None:
    budget, low, high = 0.4, 0.1, 1.0
    simulator = world.simulator(2, budget=budget, trade_off_range=(low, high))
    trade_off = [0.2, 1.0]
    results = [simulator.start([0, 1], [0, 1], trade_off)]
    flags = [refresh(False, False), refresh(True, False), refresh(False, False)]
    ages = [[0, 0], [1, 1], [0, 2], [1, 3]]
    for t in range(4):
        frame = simulator.observe().frame
        for slot, clip in enumerate((0, 1)):
            spent = sum(float(r.cost.total[slot]) for r in results) / world.model.reference_bops()
            left = max(0.0, 1 - spent / (budget * len(world.store.clips[clip])))
            position = math.log(trade_off[slot] / low) / math.log(high / low)
            expected = [math.log2(1 + ages[t][slot]) / 6, position, left]
            assert frame[slot, :3].tolist() == pytest.approx(expected, abs=1e-6), f"after frame {t}, slot {slot}"
        if t < 3:
            results.append(simulator.step(Decision(flags[t], levels(world, 2, t))))


def test_without_a_budget_all_of_it_is_left(world: World) -> None:
    simulator, _ = run(world, [0], 3)
    assert simulator.observe().frame[:, 2].tolist() == [1.0]


def test_one_lambda_lies_at_the_bottom_of_its_range(world: World) -> None:
    simulator = world.simulator(1, trade_off_range=(0.3, 0.3))
    simulator.start([0], [0], [0.3])
    assert simulator.observe().frame[0, 1].item() == 0


def test_after_the_end_the_last_frame_is_observed_once_more(world: World) -> None:
    simulator, results = run(world, [0], 4)
    assert results[-1].last.all()
    observation = simulator.observe()
    assert not observation.regions[..., 0].any(), "the last frame does not differ from itself"


@pytest.mark.parametrize("grid", [(1, 1), (5, 7), (32, 48)])
def test_any_grid_up_to_one_region_per_pixel_works(grid: tuple[int, int], world: World) -> None:
    own = replace(world, grid=grid)
    simulator, results = run(own, [0, 1], 2)
    observation = simulator.observe()
    assert observation.regions.shape == (2, *grid, 12)
    assert torch.isfinite(observation.regions).all()
    for result in results:
        torch.testing.assert_close(
            result.share.double().mean((1, 2)), result.cost.total / own.model.reference_bops(), rtol=1e-5, atol=0
        )


# Keyframes of region agents ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("interval", [0, 1, 2, 3, 6, 7, 20])
def test_periodic_keyframes_come_at_multiples_of_the_interval(interval: int, world: World) -> None:
    own = world.with_clips([8, 8])
    core = own.core(2, episodes=EpisodeSettings(trade_off=0.3, intervals=(interval,)))
    core.reset([0, 1])
    scheme = core.scheme
    actions = np.tile(scheme.uniform_action(scheme.choices - 1), (core.agents, 1))
    for t in range(1, 8):
        step = core.step(actions)
        due = interval > 0 and t % interval == 0
        assert step.result.cost.keyframe.tolist() == [due, due], f"frame {t}"
        if due:
            assert step.result.share.mean((1, 2)).tolist() == pytest.approx([1.0, 1.0]), f"frame {t}"
        else:
            assert step.result.share.max() < 0.05, f"frame {t}"


def test_every_clip_draws_its_own_interval(world: World) -> None:
    own = world.with_clips([8])
    core = own.core(8, episodes=EpisodeSettings(trade_off=0.3, intervals=(2, 3, 0)))
    core.reset(list(range(8)))
    actions = np.tile(core.scheme.uniform_action(core.scheme.choices - 1), (core.agents, 1))
    drawn = core.interval.tolist()
    assert set(drawn) == {0, 2, 3}
    flags = torch.stack([core.step(actions).result.cost.keyframe for _ in range(6)], 1)
    for slot, interval in enumerate(drawn):
        assert flags[slot].tolist() == [interval > 0 and t % interval == 0 for t in range(1, 7)], f"interval {interval}"
