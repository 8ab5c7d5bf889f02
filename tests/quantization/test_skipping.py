"""Convolutions by active tiles against those of the whole input."""

import copy

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from resq_rl.quantization import Reference, ResQModel, ThresholdField
from resq_rl.quantization.graph.operators import Geometry
from resq_rl.quantization.kernels import PLAIN, Choice, Kernels, Product, native
from resq_rl.quantization.kernels.skipping import PAUSE, Plan, Skipping, Tiling, rounded, tiling_of
from tests.quantization.networks import SmallNet, byte_clips, perturb_statistics

STEPS = torch.tensor([[0.0, 9.0, 90.0], [0.0, 7.0, 127.0], [0.0, 16.0, 1.0], [0.0, 1.0, 2.0]])


@pytest.fixture(scope="module")
def fast() -> Kernels:
    """The kernels in C."""
    if native() is PLAIN:
        pytest.skip("no C compiler on this machine")
    return native()


def always_tiles(own: Skipping, product: Product, shape: torch.Size, dense: object) -> Plan:
    """As `Skipping.planned` where tiles are always faster."""
    tiling = tiling_of(product.geometry, shape[0], (shape[2], shape[3]))
    return Plan(tiling, tiling.count if tiling else 0)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Tiles are multiplied however many are active. Holds the shares of active tiles met."""
    shares: list[float] = []
    find = Skipping.find

    def found(own: Skipping, tiling: Tiling, active: Tensor) -> Tensor:
        tiles = find(own, tiling, active)
        shares.append(len(tiles) / tiling.count)
        return tiles

    monkeypatch.setattr(Skipping, "planned", always_tiles)
    monkeypatch.setattr(Skipping, "find", found)
    return shares


def residual_of(
    kernels: Kernels, product: Product, x: Tensor, start: Tensor, base: Tensor, choice: Choice
) -> list[Tensor]:
    """Output, cost and moved reference of two steps, one against the closed loop and one against a keyframe."""
    found = []
    for moves in (True, False):
        reference, own = start.clone(), base.clone()
        y, cost = kernels.residual(product, x, reference, choice, 0.01, own, moves=moves, over=moves)
        found += [y, cost, reference] if moves else [y, cost, reference, own]
    return found


@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_tiles_give_the_numbers_of_the_whole_convolution(fast: Kernels, data: st.DataObject) -> None:
    def pair(low: int, high: int) -> tuple[int, int]:
        return data.draw(st.integers(low, high)), data.draw(st.integers(low, high))

    groups = data.draw(st.sampled_from([1, 1, 2, 8]))
    geometry = Geometry("conv2d", pair(1, 4), pair(1, 3), (*pair(0, 3), *pair(0, 3)), pair(1, 2), groups)
    clips, inside, outside = (data.draw(st.integers(1, most)) for most in (3, 12, 4))
    channels, outputs, size = groups * inside, groups * outside, pair(9, 44)
    tiling = tiling_of(geometry, clips, size)
    assume(tiling is not None)
    assert tiling is not None
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    largest = data.draw(st.sampled_from([7, 127]))
    weight = torch.randint(-largest, largest + 1, (outputs, inside, *geometry.kernel), generator=generator).float()
    scale = torch.rand(outputs, generator=generator)[None, :, None, None]
    x, start = (torch.randn(clips, channels, *size, generator=generator) for _ in range(2))
    changed = torch.rand(clips, 1, *size, generator=generator) < data.draw(st.sampled_from([0.0, 0.003, 0.05, 1.0]))
    x, start = (v.contiguous(memory_format=torch.channels_last) for v in (torch.where(changed, x, start), start))
    row = torch.randint(3, (clips, *size), generator=generator)
    tau = 2 * torch.rand(clips, *size, generator=generator)
    choice = data.draw(st.sampled_from([Choice(STEPS, row), Choice(STEPS, 0 * row, tau, 0.8, (1.0, 2.0))]))
    base = torch.randn(clips, outputs, *tiling.output, generator=generator).contiguous(
        memory_format=data.draw(st.sampled_from([torch.channels_last, torch.contiguous_format]))
    )
    plain, product = (kernels.product(geometry, weight, scale, (-127, 127)) for kernels in (PLAIN, fast))
    assert product.exact
    with pytest.MonkeyPatch.context() as patch:
        most = data.draw(st.sampled_from([1, tiling.count]))
        patch.setattr(Skipping, "planned", lambda *_: Plan(tiling, most))
        own = residual_of(fast, product, x, start, base, choice)
    assert all(map(torch.equal, own, residual_of(PLAIN, plain, x, start, base, choice)))


def test_one_tap_between_as_many_pixels_is_no_identity(fast: Kernels) -> None:
    """Of 3 x 3 pixels with a stride of 2 and padding of 1, the outputs read padding but for the middle one."""
    geometry = Geometry("conv2d", (1, 1), (2, 2), (1, 1, 1, 1))
    tiling = tiling_of(geometry, 1, (3, 3))
    assert tiling is not None
    for row, column, read in ((1, 1, [4]), (0, 0, []), (2, 2, []), (1, 0, [])):
        active = torch.zeros(1, 3, 3, dtype=torch.uint8)
        active[0, row, column] = 1
        found = fast.skipping.find(tiling, active).tolist()  # type: ignore[attr-defined]
        assert found == read, (row, column)


def test_tiles_are_found_where_their_windows_have_an_active_pixel(fast: Kernels) -> None:
    geometry = Geometry("conv2d", (3, 2), (2, 1), (1, 0, 2, 1), (1, 2))
    tiling = tiling_of(geometry, 2, (23, 17))
    assert tiling is not None
    ones = torch.ones(1, 1, *geometry.kernel)
    generator = torch.Generator().manual_seed(0)
    for share in (0.0, 0.01, 0.1, 1.0):
        active = (torch.rand(2, 23, 17, generator=generator) < share).to(torch.uint8)
        read = geometry.apply(active[:, None].float(), ones)[:, 0] > 0  # outputs that read an active pixel
        down, across = tiling.grid
        wanted = {(b * down + y // tiling.side) * across + x // tiling.side for b, y, x in torch.nonzero(read).tolist()}
        found = fast.skipping.find(tiling, active).tolist()  # type: ignore[attr-defined]
        assert found == sorted(found)
        assert wanted <= set(found)
        assert len(set(found) - wanted) <= 2 * 3  # windows that jut out between strides and dilated taps


@pytest.mark.parametrize("reference", ["previous", "keyframe"])
def test_steps_by_tiles_equal_plain_steps(reference: Reference, fast: Kernels, always: list[float]) -> None:
    size = (64, 96)
    torch.manual_seed(0)
    plain = ResQModel(perturb_statistics(SmallNet()), torch.zeros(1, 3, *size)).calibrate(byte_clips(1, 4, 3, size))
    compiled = copy.deepcopy(plain).compile()
    states = [model.new_state(2, reference) for model in (plain, compiled)]
    field = ThresholdField.constant(0.5, 2, len(plain.groups))
    frames, generator = torch.rand(2, 3, *size), torch.Generator().manual_seed(0)
    for t in range(5):
        frames = frames.clone()
        frames[0, :, 8 * t : 8 * t + 16, 24:40] = torch.rand(3, 16, 16, generator=generator)  # the other clip is still
        refresh = torch.tensor([t == 0, t in (0, 3)])
        (a, cost), (b, other) = (
            model.step(frames, state, refresh, field) for model, state in zip((plain, compiled), states, strict=True)
        )
        assert all(map(torch.equal, a, b))
        assert torch.equal(cost.bops, other.bops)
        for mine, its in zip(*(state.inputs + state.outputs for state in states), strict=True):
            assert torch.equal(mine, its)
    assert any(0 < share < 1 for share in always)


def test_numbers_of_tiles_are_rounded_up_to_few_sizes() -> None:
    sizes = [rounded(n) for n in range(1, 1025)]
    assert all(n <= size <= 1.25 * n + 0.5 for n, size in enumerate(sizes, 1))
    assert len(set(sizes)) <= 4 * 10


def test_the_break_even_is_measured_once_and_for_like_batches(fast: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    skipping = Skipping.__new__(Skipping)
    skipping._shares, skipping._plans = {}, {}
    seconds = iter([1.0, 0.4, 0.7, 0.9])  # the whole, then tiles of a half, three quarters and seven eighths
    monkeypatch.setattr("resq_rl.quantization.kernels.skipping._seconds", lambda _: next(seconds))
    geometry = Geometry("conv2d", (3, 3), (1, 1), (1, 1, 1, 1))
    product = Product(geometry, torch.zeros(4, 2, 3, 3), torch.ones(1, 4, 1, 1), exact=True)
    for clips in (3, 4, 3):
        plan = skipping.planned(product, torch.Size([clips, 2, 64, 64]), lambda *_: None)
        assert plan == Plan(tiling_of(geometry, clips, (64, 64)), int(0.75 * 64 * 64 * clips))


def test_tiles_are_not_sought_for_a_while_after_too_many_were_active() -> None:
    tiling = tiling_of(Geometry("conv2d"), 1, (64, 64))
    plan = Plan(tiling, 10)
    assert plan.sought() is tiling
    assert plan.few(10)
    assert plan.sought() is tiling
    assert not plan.few(11)
    assert [plan.sought() for _ in range(PAUSE + 1)] == [None] * PAUSE + [tiling]
    assert Plan(tiling, 0).sought() is None
