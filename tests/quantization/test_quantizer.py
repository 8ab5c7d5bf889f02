import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from resq_rl.errors import CalibrationError
from resq_rl.quantization import AffineQuantizer, SymmetricQuantizer, symmetric_limit
from tests.quantization.strategies import affine_quantizers, bit_widths, samples, symmetric_quantizers

# A division and a product in float32 may each be off by half a unit in the last place.
SLACK = 1e-6


@given(symmetric_quantizers(), samples())
def test_symmetric_quantizers(quantizer: SymmetricQuantizer, x: Tensor) -> None:
    codes, out = quantizer.integers(x), quantizer(x)
    limit, step = 2 ** (quantizer.bits - 1) - 1, float(quantizer.step)
    assert torch.equal(codes, codes.round())
    assert float(codes.abs().max()) <= limit
    assert torch.equal(quantizer(out), out)
    assert torch.equal(quantizer(-x), -out)
    assert torch.equal(quantizer(torch.zeros(3)), torch.zeros(3))
    covered = x.abs() <= (limit + 0.5) * step
    error = (out.double() - x.double()).abs()
    assert bool((error[covered] <= step / 2 + SLACK * x.double().abs()[covered]).all())
    assert bool((codes.abs()[x.abs() > (limit + 0.5) * step * (1 + SLACK)] == limit).all())


@given(affine_quantizers(), samples())
def test_affine_quantizers(quantizer: AffineQuantizer, x: Tensor) -> None:
    codes, out = quantizer.integers(x), quantizer(x)
    low, high = -quantizer.zero_point, 2**quantizer.bits - 1 - quantizer.zero_point
    assert torch.equal(codes, codes.round())
    assert low <= float(codes.min())
    assert float(codes.max()) <= high
    assert torch.equal(quantizer(out), out)
    assert torch.equal(quantizer(torch.zeros(3)), torch.zeros(3))
    covered = (x >= (low - 0.5) * quantizer.step) & (x <= (high + 0.5) * quantizer.step)
    error = (out.double() - x.double()).abs()
    assert bool((error[covered] <= quantizer.step / 2 + SLACK * x.double().abs()[covered]).all())


@given(bit_widths, samples(rows=3))
def test_a_step_for_each_channel(bits: int, x: Tensor) -> None:
    steps = torch.tensor([0.1, 1.0, 7.0])
    together = SymmetricQuantizer(bits, steps[:, None])(x)
    for row in range(3):
        assert torch.equal(together[row], SymmetricQuantizer(bits, steps[row])(x[row]))


@given(symmetric_quantizers(), st.integers(-5, 5))
def test_a_tie_rounds_to_the_even_code(quantizer: SymmetricQuantizer, k: int) -> None:
    limit = symmetric_limit(quantizer.bits)
    middle = torch.tensor([(k + 0.5)])  # of step 1
    code = int(SymmetricQuantizer(quantizer.bits, torch.tensor(1.0)).integers(middle))
    even = k if k % 2 == 0 else k + 1
    assert code == max(-limit, min(limit, even))


def test_limits() -> None:
    assert [symmetric_limit(b) for b in (0, 2, 4, 8, 16)] == [0, 1, 7, 127, 32767]
    assert torch.equal(SymmetricQuantizer(0, torch.tensor(1.0))(torch.tensor([5.0, -5.0])), torch.zeros(2))


@pytest.mark.parametrize("bits", [-1, 1, 17])
def test_impossible_symmetric_widths(bits: int) -> None:
    with pytest.raises(CalibrationError, match=f"got {bits}"):
        symmetric_limit(bits)


@pytest.mark.parametrize("bits", [0, 17])
def test_impossible_affine_widths(bits: int) -> None:
    with pytest.raises(CalibrationError, match=f"got {bits}"):
        AffineQuantizer(bits, 0.1, 0)
