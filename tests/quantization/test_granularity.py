"""Levels of blocks of channels against integer loops, plain against compiled kernels, and what they cost."""

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from resq_rl.errors import SettingsError
from resq_rl.quantization import CostTable, LevelField, QuantizationConfig, Reference, ResQModel, ThresholdField
from resq_rl.quantization.kernels import PLAIN
from resq_rl.quantization.kernels.skipping import Skipping
from tests.quantization.networks import CASES, Case, SmallNet, byte_clips, everywhere, perturb_statistics, wrapped
from tests.quantization.networks import video as video_of
from tests.quantization.reference import Floats, Ints, Oracle, count_bops, spread
from tests.quantization.test_skipping import always_tiles

pytestmark = pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")  # torch's own, once

CONVOLUTIONS = [case for case in CASES if case.setting.kind != "linear"]
ELEMENT = QuantizationConfig(granularity="element")


class BlockOracle(Oracle):
    """Replays a convolution whose blocks of `size` channels have levels of their own, (b, blocks, h, w)."""

    size: int = 1

    def _decide(self, r: Floats, decision: Any, size: tuple[int, int]) -> Ints:
        rows = super()._decide(r, decision, size)
        clips, channels, *rest = r.shape
        magnitude = np.abs(r).reshape(clips, channels // self.size, self.size, *rest).max(2)
        tau = spread(decision.thresholds[:, self.group].numpy(), size, min)
        bound = (tau * np.float32(self.table.sigma)).astype(np.float32)[:, None]
        self.levels = sum((magnitude > bound * np.float32(kappa)).astype(np.int64) for kappa in decision.kappa)
        return rows[:, None]

    def _broadcast(self, values: NDArray[np.float32], x: Floats) -> Floats:
        return values.repeat(self.size, 1)


def blocks_of(case: Case) -> list[int]:
    """Sizes of blocks to try: of one channel, of some, and of all."""
    channels = case.channels[0]
    return sorted({1, *(n for n in (2, 3) if channels % n == 0), channels})


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=lambda c: c.name)
def test_codes_and_costs_of_blocks_equal_loops_over_integers(case: Case) -> None:
    references: tuple[Reference, ...] = ("keyframe", "previous")
    frames = torch.stack([video_of(4, case.channels[0], case.size, seed) for seed in range(2)], 1)
    generator = torch.Generator().manual_seed(0)
    for size, reference in zip(blocks_of(case), itertools.cycle(references), strict=False):
        config = QuantizationConfig(granularity={"channels": size})
        torch.manual_seed(0)
        model = wrapped(case.make(), case.channels[0], case.size, config).compile()
        oracle = BlockOracle(model, 0, case.setting, reference)
        oracle.size = size
        state = model.new_state(2, reference)
        for t, frame in enumerate(frames):
            grid = (2, 3) if t % 2 else case.size
            decision = ThresholdField(torch.rand(2, 1, *grid, generator=generator).mul_(6).sub_(4).exp2_())
            out, cost = model.step(frame, state, everywhere(2, t == 0), decision)
            x = frame.numpy()
            expected = oracle.keyframe(x) if t == 0 else oracle.residual(x, decision)
            np.testing.assert_array_equal(out.numpy(), expected)
            np.testing.assert_array_equal(state.inputs[0].numpy(), oracle.x_ref)
            if t == 0:
                continue
            width = config.weight_bits(model.operators[0].layer_kind, "")
            for clip in range(2):
                bits = np.array(config.levels)[oracle.levels[clip]]
                spent = [count_bops(case.setting, case.channels, own, width, "product", grid) for own in bits]
                np.testing.assert_allclose(cost.bops[clip, 0].numpy(), sum(spent) / len(bits), rtol=1e-12)


def test_a_block_is_counted_by_hand() -> None:
    layer = nn.Conv2d(4, 3, 1, bias=False)
    model = ResQModel(layer, torch.zeros(1, 4, 1, 2), QuantizationConfig(granularity={"channels": 2}))
    model.calibrate(byte_clips(1, 8, 4, (1, 2)))
    state, field = model.new_state(1), ThresholdField.constant(1.0, 1, 1, kappa=(1.0, 100.0, 200.0))
    frame = torch.full((1, 4, 1, 2), 0.5)
    model.step(frame, state, everywhere(1, True), field)
    frame = state.inputs[0].clone()
    frame[0, 3, 0, 1] += 2 * model.ranges[0].residual["previous"].sigma  # one channel of one pixel, at 2 bits
    _, cost = model.step(frame, state, everywhere(1, False), field)
    assert float(cost.bops.sum()) == 2 * 3 * (4 * 2)  # its block's 2 channels, by 3 outputs, of 4 by 2 bits


SHARED: dict[str, ResQModel] = {}


def small(config: QuantizationConfig) -> ResQModel:
    """A calibrated model that tests share and do not change."""
    if str(config) not in SHARED:
        torch.manual_seed(0)
        size = (32, 48)
        model = ResQModel(perturb_statistics(SmallNet()), torch.zeros(1, 3, *size), config)
        SHARED[str(config)] = model.calibrate(byte_clips(1, 4, 3, size))
    return SHARED[str(config)]


def frames_of(model: ResQModel, count: int = 4) -> list[Tensor]:
    """Frames in which little changes."""
    generator, found = torch.Generator().manual_seed(1), [torch.full((2, 3, *model.frame_size), 0.5)]
    for t in range(1, count):
        frame = found[-1].clone()
        frame[:, :, 4 * t : 4 * t + 6, 8:20] = torch.rand(2, 3, 6, 12, generator=generator)
        found.append(frame)
    return found


@pytest.mark.parametrize("reference", ["keyframe", "previous"])
@pytest.mark.parametrize("granularity", ["element", {"channels": 4}])
def test_compiled_blocks_and_skipped_ones_equal_plain_ones(
    granularity: Any, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = small(QuantizationConfig(granularity=granularity))
    compiled = copy.deepcopy(plain).compile()
    if compiled.kernels is PLAIN:
        pytest.skip("no C compiler on this machine")
    monkeypatch.setattr(Skipping, "planned", always_tiles)
    states = [model.new_state(2, reference) for model in (plain, compiled)]
    field = ThresholdField.constant(0.5, 2, len(plain.groups), (2, 3))
    for t, frame in enumerate(frames_of(plain)):
        (a, cost), (b, other) = (
            model.step(frame, state, everywhere(2, t == 0), field)
            for model, state in zip((plain, compiled), states, strict=True)
        )
        assert all(map(torch.equal, a, b))
        assert torch.equal(cost.bops, other.bops)
        for mine, its in zip(*(state.inputs + state.outputs for state in states), strict=True):
            assert torch.equal(mine, its)


def test_elements_cost_less_than_pixels_and_blocks_of_all_channels_as_much() -> None:
    totals, choices = {}, ("pixel", {"channels": 1000}, {"channels": 4}, "element")
    granularity: Any
    for granularity in choices:
        model = small(QuantizationConfig(granularity=granularity))
        state, field = model.new_state(2), ThresholdField.constant(0.5, 2, len(model.groups))
        costs = [model.step(f, state, everywhere(2, t == 0), field)[1] for t, f in enumerate(frames_of(model))]
        totals[str(granularity)] = float(sum(cost.bops.sum() for cost in costs[1:]))
    pixel, whole, some, element = totals.values()
    assert pixel == whole > some > element > 0


def test_fields_of_levels_cost_the_same_whatever_takes_one() -> None:
    costs = []
    for granularity in ("pixel", "element"):
        model = small(QuantizationConfig(granularity=granularity))
        state = model.new_state(2)
        field = LevelField(torch.randint(4, (2, len(model.groups), 2, 3), generator=torch.Generator().manual_seed(0)))
        steps = [model.step(f, state, everywhere(2, t == 0), field) for t, f in enumerate(frames_of(model))]
        costs.append([cost.bops for _, cost in steps])
    assert all(map(torch.equal, *costs))


def test_unrolled_frames_equal_steps() -> None:
    model = small(ELEMENT)
    states = model.new_state(2), model.new_state(2)
    for t, frame in enumerate(frames_of(model)):
        field = ThresholdField(torch.full((2, len(model.groups), 1, 1), 0.5).requires_grad_())
        refresh = everywhere(2, t == 0)
        a, cost = model.step(frame, states[0], refresh, field)
        b, other = model.unrolled_step(frame, states[1], refresh, field)
        assert all(torch.equal(x, y.detach()) for x, y in zip(a, b, strict=True))
        assert torch.equal(cost.bops, other.bops.detach())
        if t == 1:
            other.bops.sum().backward(retain_graph=True)
            assert float(field.thresholds.grad.abs().sum()) > 0  # type: ignore[union-attr] # it requires one


def test_limits_hold_for_elements() -> None:
    model = copy.deepcopy(small(ELEMENT)).compile()
    whole = model.reference_bops()
    for share in (0.05, 0.2):
        state, field = model.new_state(2), ThresholdField.constant(0.01, 2, len(model.groups))
        limit = torch.full((2,), share * whole, dtype=torch.float64)
        for t, frame in enumerate(frames_of(model)):
            _, cost = model.step(frame, state, everywhere(2, t == 0), field, limit)
            assert bool((cost.bops.sum((1, 2, 3)) <= limit * (1 + 1e-9)).all())


def test_blocks_divide_the_channels_of_a_layer() -> None:
    sizes = {8: QuantizationConfig(granularity={"channels": 4}), 3: QuantizationConfig(granularity={"channels": 2})}
    assert [config.blocks(channels) for channels, config in sizes.items()] == [2, 3]  # 2 does not divide 3
    assert QuantizationConfig(granularity={"channels": 4}).blocks(6) == 2
    assert [QuantizationConfig().blocks(5), ELEMENT.blocks(5)] == [1, 5]


@pytest.mark.parametrize("granularity", ["pixels", {}, {"channels": 0}, {"rows": 2}, 4, None])
@pytest.mark.usefixtures("unchecked_types")
def test_what_is_no_granularity_is_refused(granularity: Any) -> None:
    with pytest.raises(SettingsError, match=r"[Gg]ranularity"):
        QuantizationConfig(granularity=granularity)


def test_tiles_of_a_cost_table_ask_for_pixels() -> None:
    table = CostTable("tiled", "none", {"any": {8: {8: 1.0}}}, tile=(8, 8))
    with pytest.raises(SettingsError, match="must be 'pixel' under cost table 'tiled'"):
        QuantizationConfig(granularity="element", bops_convention=table)
