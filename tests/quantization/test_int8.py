"""Products of bytes against products of integers in double precision."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resq_rl.errors import NetworkError
from resq_rl.quantization.graph.operators import Geometry
from resq_rl.quantization.kernels import PLAIN, Choice, Kernels, int8, native
from resq_rl.quantization.kernels.int8 import ByteWeights, byte_weights
from resq_rl.quantization.quantizers.residual import ResidualTable


@pytest.fixture(scope="module")
def fast() -> Kernels:
    """The kernels in C."""
    if native() is PLAIN:
        pytest.skip("no C compiler on this machine")
    return native()


@pytest.fixture(scope="module", autouse=True)
def at_hand() -> None:
    if byte_weights(Geometry("linear"), torch.ones(8, 8), (-127, 127)) is None:
        pytest.skip("no int8 operators on this machine")


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_sums_are_those_of_the_codes(data: st.DataObject) -> None:
    def pair(low: int, high: int) -> tuple[int, int]:
        return data.draw(st.integers(low, high)), data.draw(st.integers(low, high))

    vertical, horizontal = pair(0, 2)
    geometry = Geometry("conv2d", pair(1, 4), pair(1, 3), (horizontal, horizontal, vertical, vertical), pair(1, 2))
    low, high = data.draw(st.sampled_from([(-127, 127), (0, 255), (-255, 0), (-7, 7), (-3, 252)]))
    largest = data.draw(st.sampled_from([1, 7, 64, 127]))
    channels, outputs = data.draw(st.integers(8, 70)), data.draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    shape = (outputs, channels, *geometry.kernel)
    weight = torch.randint(-largest, largest + 1, shape, generator=generator).float()
    weights = byte_weights(geometry, weight, (low, high))
    if weights is None:  # this processor adds pairs in int16
        assert (high - low) * int(weight.abs().max()) * 2 >= 2**15
        return
    codes = torch.randint(low, high + 1, (2, channels, *pair(8, 20)), generator=generator)
    if data.draw(st.booleans()):  # the largest sums there are
        codes, weights.codes[:] = torch.full_like(codes, high), largest
    as_bytes = (codes - low).to(torch.uint8).contiguous(memory_format=torch.channels_last)
    assert torch.equal(weights.totals(as_bytes).double(), geometry.apply(codes.double(), weights.codes.double()))


@pytest.mark.parametrize("largest", [7, 64])
def test_sums_of_linear_layers_are_those_of_the_codes(largest: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-largest, largest + 1, (24, 96), generator=generator).float()
    weights = byte_weights(Geometry("linear"), weight, (-127, 127))
    assert weights is not None
    codes = torch.randint(-127, 128, (3, 50, 96), generator=generator)
    assert torch.equal(weights.totals((codes + 127).to(torch.uint8)).double(), codes.double() @ weight.double().T)


@pytest.mark.parametrize(
    ("geometry", "shape", "span", "largest"),
    [
        (Geometry("conv2d", groups=4), (8, 2, 1, 1), (-127, 127), 7),
        (Geometry("conv_transpose2d", (2, 2), (2, 2)), (16, 8, 2, 2), (-127, 127), 7),
        (Geometry("conv2d", (2, 2), padding=(0, 1, 0, 1)), (8, 16, 2, 2), (-127, 127), 7),
        (Geometry("conv2d"), (8, 16, 1, 1), (-128, 128), 7),
        (Geometry("conv2d"), (8, 16, 1, 1), (1, 200), 7),
        (Geometry("conv2d"), (8, 16, 1, 1), (-127, 127), 128),
        (Geometry("conv2d"), (8, 3, 1, 1), (-127, 127), 7),
    ],
    ids=["groups", "transposed", "uneven padding", "wide codes", "no zero", "wide weights", "few channels"],
)
def test_what_bytes_cannot_do_stays_in_float(
    geometry: Geometry, shape: tuple[int, ...], span: tuple[int, int], largest: int
) -> None:
    assert byte_weights(geometry, torch.full(shape, float(largest)), span) is None


def test_a_processor_that_saturates_multiplies_small_weights_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "_sums_in_int32", lambda: False)
    within, beyond = (torch.full((8, 16, 1, 1), largest) for largest in (64.0, 65.0))
    assert byte_weights(Geometry("conv2d"), within, (-127, 127)) is not None
    assert byte_weights(Geometry("conv2d"), beyond, (-127, 127)) is None
    monkeypatch.setattr(int8, "_exact", lambda _: False)
    assert byte_weights(Geometry("conv2d"), within, (-127, 127)) is None


def test_copies_multiply_alike() -> None:
    weights = byte_weights(Geometry("linear"), torch.arange(-32.0, 32.0).reshape(4, 16), (-127, 127))
    assert weights is not None
    codes = torch.arange(48, dtype=torch.uint8).reshape(3, 16)
    expected = weights.totals(codes)
    copies: list[ByteWeights] = [copy.deepcopy(weights), pickle.loads(pickle.dumps(weights))]
    assert all(torch.equal(own.totals(codes), expected) for own in copies)


def test_double_precision_around_makes_no_difference() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        weights = byte_weights(Geometry("linear"), torch.full((5, 24), 7.0), (-127, 127))
        assert weights is not None
        assert weights.totals(torch.full((2, 24), 128, dtype=torch.uint8)).tolist() == [[7.0 * 24] * 5] * 2
    finally:
        torch.set_default_dtype(torch.float32)


def test_inputs_that_are_not_numbers_are_refused(fast: Kernels) -> None:
    scale, steps = torch.ones(1, 8, 1, 1), torch.tensor([[2.0], [7.0], [1.0], [4.0]])
    product = fast.product(Geometry("conv2d"), torch.full((8, 16, 1, 1), 3.0), scale, (-127, 127))
    assert product.int8 is not None
    x = torch.zeros(1, 16, 5, 7).contiguous(memory_format=torch.channels_last)
    x[0, 3, 2, 2] = torch.nan
    choice = Choice(steps, torch.zeros(1, 5, 7, dtype=torch.int64))
    with pytest.raises(NetworkError, match="input holds NaN"):
        fast.encode(x, torch.zeros_like(x), choice, 0.5, product)
    with pytest.raises(NetworkError, match="input holds NaN"):
        fast.encode_keyframe(x, 0.1, -9.0, 9.0, product)
    x[0, 3, 2, 2] = torch.inf  # is clipped
    assert int(fast.encode(x, torch.zeros_like(x), choice, None, product)[0].max()) == 127 + 7


@pytest.mark.parametrize("channels", [4, 8, 20])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_no_layer_skips_an_input_that_is_not_a_number(
    channels: int, layout: torch.memory_format, fast: Kernels
) -> None:
    weights, geometry = torch.ones(channels, 1, 3, 3), Geometry("conv2d", (3, 3), padding=(1,) * 4, groups=channels)
    product = fast.product(geometry, weights, torch.ones(1, channels, 1, 1), (-127, 127))
    assert product.int8 is None
    table = ResidualTable(0.5, 0.25, (0, 7), (0, 2))
    x = torch.zeros(1, channels, 9, 7).contiguous(memory_format=layout)
    zero, level = torch.zeros_like(x), torch.zeros(1, 9, 7, dtype=torch.int64)
    thresholds = Choice(table.lookup((1.0,)), level, torch.ones(1, 9, 7), 0.5, (1.0,))
    for choice in (Choice(table.lookup(), level), thresholds):
        x[0, 3, 2, 2] = torch.nan
        with pytest.raises(NetworkError, match="input holds NaN"):
            fast.residual(product, x, zero.clone(), choice, 0.25, zero.clone(), moves=True)
        x[0, 3, 2, 2] = -torch.inf  # is clipped to the codes of its level: none, or 2 units up to 7 times
        for kernels in (PLAIN, fast):
            y, _ = kernels.residual(product, x, zero.clone(), choice, 0.25, zero.clone(), moves=True)
            assert float(y.min()) == (0.0 if choice.tau is None else -0.25 * 2 * 7)
    x[0, 3, 2, 2] = torch.nan
    with pytest.raises(NetworkError, match="input holds NaN"):
        fast.encode_keyframe(x, 0.1, -9.0, 9.0, product)
