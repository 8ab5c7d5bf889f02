"""The ledger equals a count by brute force: one output position, tap and channel pair at a time."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from resq_rl.quantization import Convention, LevelField, QuantizationConfig, ThresholdField
from tests.quantization.networks import CASES, Case, SmallNet, everywhere, model_of, video, wrapped
from tests.quantization.reference import Oracle, Setting, count_bops, spread

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch's own, once

BITS = np.array([0, 2, 4, 8])
CONVENTIONS: tuple[Convention, ...] = ("product", "max", "clipped")


def assert_equal(got: Tensor, expected: NDArray[np.float64]) -> None:
    """Equal up to the last bits of a double: shares such as 1/3 have no exact form."""
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-14, atol=0)


def levels_of(clips: int, grid: tuple[int, int], seed: int) -> LevelField:
    return LevelField(torch.randint(0, 4, (clips, 1, *grid), generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_a_level_for_each_pixel(case: Case) -> None:
    model = model_of(case)
    frames = video(2, case.channels[0], case.size)[:, None].expand(-1, 2, -1, -1, -1)
    state = model.new_state(2)
    _, key = model.step(frames[0], state, everywhere(2, True), levels_of(2, case.size, 0))
    decision = levels_of(2, case.size, 1)
    _, cost = model.step(frames[1], state, everywhere(2, False), decision)
    for clip in range(2):
        bits = BITS[decision.levels[clip, 0].numpy()]
        expected = count_bops(case.setting, case.channels, bits, 4, "product", case.size)
        assert_equal(cost.bops[clip, 0], expected)
        assert float(cost.total[clip]) == expected.sum()
        eight = np.full(case.size, 8)
        assert_equal(key.bops[clip, 0], count_bops(case.setting, case.channels, eight, 8, "product", case.size))
    assert key.keyframe.all()
    assert not cost.keyframe.any()
    macs = len(case.setting.readers(case.size)) * case.channels[0] // case.setting.groups * case.channels[1]
    assert model.macs == macs
    assert model.reference_bops() == macs * 64
    assert model.reference_bops(4, 2) == macs * 8
    assert key.total.tolist() == [macs * 64] * 2


@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (3, 5), (7, 6), (11, 13)])
@pytest.mark.parametrize("case", [CASES[i] for i in (1, 3, 5, 7, 14)], ids=lambda c: c.name)
def test_grids_that_divide_the_size_and_grids_that_do_not(case: Case, grid: tuple[int, int]) -> None:
    model = model_of(case)
    frames = video(2, case.channels[0], case.size)[:, None]
    state = model.new_state(1)
    decision = levels_of(1, grid, 2)
    _, key = model.step(frames[0], state, everywhere(1, True), decision)
    _, cost = model.step(frames[1], state, everywhere(1, False), decision)
    bits = BITS[spread(decision.levels[:, 0].numpy(), case.size, max)[0].astype(int)]
    assert_equal(cost.bops[0, 0], count_bops(case.setting, case.channels, bits, 4, "product", grid))
    eight = np.full(case.size, 8)
    assert_equal(key.bops[0, 0], count_bops(case.setting, case.channels, eight, 8, "product", grid))
    assert float(key.total[0]) == pytest.approx(model.reference_bops(), rel=1e-14)


@pytest.mark.parametrize("weight_bits", [2, 4, 8])
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_conventions(convention: Convention, weight_bits: int) -> None:
    case = CASES[3]
    config = QuantizationConfig(bops_convention=convention, residual_weight_bits=weight_bits)
    model = model_of(case, config)
    frames = video(2, case.channels[0], case.size)[:, None]
    state = model.new_state(1)
    decision = levels_of(1, case.size, 3)
    _, key = model.step(frames[0], state, everywhere(1, True), decision)
    _, cost = model.step(frames[1], state, everywhere(1, False), decision)
    bits = BITS[decision.levels[0, 0].numpy()]
    assert_equal(cost.bops[0, 0], count_bops(case.setting, case.channels, bits, weight_bits, convention, case.size))
    assert float(key.total[0]) == model.macs * 64


@pytest.mark.parametrize("case", [CASES[i] for i in (0, 4, 8, 14)], ids=lambda c: c.name)
def test_thresholds(case: Case) -> None:
    model = model_of(case)
    frames = torch.stack([video(3, case.channels[0], case.size, s) for s in range(2)], 1)
    oracle = Oracle(model, 0, case.setting, "previous")
    state = model.new_state(2)
    oracle.keyframe(frames[0].numpy())
    model.step(frames[0], state, everywhere(2, True), levels_of(2, (1, 1), 0))
    for frame in frames[1:]:
        tau = torch.rand(2, 1, 3, 4, generator=torch.Generator().manual_seed(5)) * 2
        decision = ThresholdField(tau)
        _, cost = model.step(frame, state, everywhere(2, False), decision)
        oracle.residual(frame.numpy(), decision)
        for clip in range(2):
            bits = BITS[oracle.levels[clip]]
            assert_equal(cost.bops[clip, 0], count_bops(case.setting, case.channels, bits, 4, "product", (3, 4)))


def test_a_linear_layer_has_one_pixel_that_all_regions_share() -> None:
    network = nn.Sequential(nn.Linear(6, 5))  # over the last axis: 3 * 4 vectors of 6
    model = wrapped(network, 3, (4, 6))
    frames = video(2, 3, (4, 6))[:, None]
    state = model.new_state(1)
    decision = LevelField(torch.tensor([[[[0, 1, 0], [2, 0, 1]]]]))
    _, key = model.step(frames[0], state, everywhere(1, True), decision)
    _, cost = model.step(frames[1], state, everywhere(1, False), decision)
    vectors = 3 * 4
    assert model.macs == vectors * 6 * 5
    assert_equal(key.bops[0, 0], np.full((2, 3), vectors * 6 * 5 * 64 / 6))
    assert_equal(cost.bops[0, 0], np.full((2, 3), vectors * 6 * 5 * 4 * 4 / 6))  # the finest level of all: 4 bits


def test_a_convolution_along_one_axis_is_shared_by_all_regions() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(2), nn.Conv1d(4, 5, 3, padding=1), nn.Conv1d(5, 2, 1))
    model = wrapped(network, 3, (1, 6))  # the first layer's image is as large as the row of the second
    frames = video(2, 3, (1, 6))[:, None]
    state = model.new_state(1)
    _, key = model.step(frames[0], state, everywhere(1, True), LevelField.constant(0, 1, 3, (1, 3)))
    levels = torch.tensor([[[[0, 1, 2]]]]).expand(-1, 3, -1, -1)
    _, cost = model.step(frames[1], state, everywhere(1, False), LevelField(levels))
    taps = 6 * 3 - 2
    assert model.unplaced == ["2", "3"]
    assert [site.macs for site in model.sites] == [6 * 12, taps * 20, 6 * 10]
    assert_equal(key.bops[0, 0], np.full((1, 3), 2 * 12 * 64))
    assert_equal(cost.bops[0, 0], np.array([[0, 2 * 12 * 2 * 4, 2 * 12 * 4 * 4]], float))  # each column its own
    for site, macs in ((1, taps * 20), (2, 60)):  # the finest level of all: 4 bits
        assert cost.bops[0, site].flatten().tolist() == pytest.approx([macs * 4 * 4 / 3] * 3, rel=1e-14)


def test_a_grid_finer_than_a_squeezed_layer_shares_its_cost() -> None:
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 4, 1))
    model = wrapped(network, 3, (8, 8))
    frames = video(2, 3, (8, 8))[:, None]
    for grid in ((3, 3), (6, 10), (7, 1)):
        state = model.new_state(1)
        decision = levels_of(1, grid, 4)
        _, key = model.step(frames[0], state, everywhere(1, True), decision)
        _, cost = model.step(frames[1], state, everywhere(1, False), decision)
        regions = grid[0] * grid[1]
        bits = float(BITS[int(decision.levels.max())])
        assert_equal(key.bops[0, 0], np.full(grid, 12 * 64 / regions))
        assert_equal(cost.bops[0, 0], np.full(grid, 12 * 4 * bits / regions))
        assert float(cost.total[0]) == pytest.approx(12 * 4 * bits, rel=1e-14)


@pytest.mark.parametrize("level", range(4))
def test_a_whole_network_layer_by_layer(level: int) -> None:
    kinds = {"conv": 8, "depthwise": 6, "pointwise": 4, "transposed": 2, "linear": 3}
    config = QuantizationConfig(residual_weight_bits=kinds)
    model = wrapped(SmallNet().eval(), 3, (12, 16), config)
    # name, multiply-accumulates without padding, residual weight bits
    stem = 3 * 8 * len(Setting("conv2d", (3, 3), (2, 2), (1, 1, 1, 1)).readers((12, 16)))
    depthwise = 8 * len(Setting("conv2d", (3, 3), pads=(1, 1, 1, 1)).readers((6, 8)))
    expected = [
        ("stem.0", stem, 8),
        ("block.0", depthwise, 6),
        ("block.2", 8 * 8 * 48, 4),
        ("squeeze.1", 8 * 4, 4),
        ("squeeze.3", 4 * 8, 4),
        ("up", 8 * 6 * 4 * 48, 2),
        ("head", 6 * 2 * 12 * 16, 4),
        ("score", 8 * 3, 3),
    ]
    assert [s.name for s in model.sites] == [name for name, _, _ in expected]
    assert [s.macs for s in model.sites] == [macs for _, macs, _ in expected]
    frames = video(2, 3, (12, 16))[:, None]
    state = model.new_state(1)
    decision = LevelField.constant(level, 1, len(model.groups), (5, 7))
    _, key = model.step(frames[0], state, everywhere(1, True), decision)
    _, cost = model.step(frames[1], state, everywhere(1, False), decision)
    for k, (name, macs, width) in enumerate(expected):
        assert float(cost.per_layer[0, k]) == pytest.approx(macs * width * int(BITS[level]), rel=1e-14), name
        assert float(key.per_layer[0, k]) == pytest.approx(macs * 64, rel=1e-14), name
    total = sum(macs * width for _, macs, width in expected) * int(BITS[level])
    assert float(cost.total[0]) == pytest.approx(total, rel=1e-14)
    assert float(cost.per_region.sum()) == pytest.approx(total, rel=1e-14)
    by_group = cost.per_group(model.group_of_site, len(model.groups))
    assert by_group.shape == (1, len(model.groups), 5, 7)
    np.testing.assert_allclose(by_group.sum(1).numpy(), cost.per_region.numpy(), rtol=1e-14)


def test_clips_of_one_batch_pay_for_their_own_frame() -> None:
    model = wrapped(SmallNet().eval(), 3, (8, 8))
    frames = video(2, 3, (8, 8))[:, None].expand(-1, 3, -1, -1, -1)
    state = model.new_state(3)
    groups = len(model.groups)
    decision = LevelField(torch.tensor([1, 2, 3])[:, None, None, None].expand(3, groups, 1, 1))
    model.step(frames[0], state, everywhere(3, True), decision)
    _, cost = model.step(frames[1], state, torch.tensor([False, True, False]), decision)
    macs = model.macs
    assert cost.keyframe.tolist() == [False, True, False]
    assert cost.total.tolist() == [macs * 4 * 2, macs * 64, macs * 4 * 8]


def test_elementwise_operations_by_hand() -> None:
    model = wrapped(nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)), 3, (8, 6))
    frames = video(2, 3, (8, 6))[:, None].expand(-1, 2, -1, -1, -1)
    state = model.new_state(2)
    decision = LevelField.constant(2, 2, len(model.groups))
    _, key = model.step(frames[0], state, everywhere(2, True), decision)
    _, cost = model.step(frames[1], state, torch.tensor([True, False]), decision)
    ins, middle, outs = 3 * 8 * 6, 4 * 4 * 3, 2 * 4 * 3
    keyframe = ins + middle  # quantize each layer's input
    residual = 3 * ins + middle + 3 * middle + outs  # residual, magnitude, quantization; accumulation
    assert key.elementwise.tolist() == [keyframe, keyframe]
    assert cost.elementwise.tolist() == [keyframe, residual]


def test_sums_stay_exact_beyond_single_precision() -> None:
    # 16 input pixels under 2^22 multiplies of 64 BOPs each: the sum has more digits than float32 holds.
    layer = nn.Conv2d(3, 5, 31, padding=15)
    model = wrapped(layer, 3, (61, 67))
    frames = video(2, 3, (61, 67))[:, None]
    state = model.new_state(1)
    decision = LevelField.constant(3, 1, 1, (61, 67))
    model.step(frames[0], state, everywhere(1, True), decision)
    _, cost = model.step(frames[1], state, everywhere(1, False), decision)
    # Output position p reads taps p-15..p+15 inside the frame, along each axis on its own.
    along = [sum(min(n - 1, p + 15) - max(0, p - 15) + 1 for p in range(n)) for n in (61, 67)]
    assert int(cost.total[0]) == along[0] * along[1] * 15 * 4 * 8
    assert model.macs == along[0] * along[1] * 15
