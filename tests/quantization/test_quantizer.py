import pytest
import torch
from hypothesis import given
from torch import Tensor

from resq_rl.errors import CalibrationError
from resq_rl.quantization import AffineQuantizer, ChannelQuantizer, symmetric_limit
from tests.quantization.strategies import affine_quantizers, samples

# A division and a product in float32 may each be off by half a unit in the last place.
SLACK = 1e-6


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


def test_steps_of_channels_are_quantizers_of_their_own() -> None:
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    steps, zeros = (0.01, 0.1, 1.0), (0, 100, 255)
    quantizers = tuple(AffineQuantizer(8, *both) for both in zip(steps, zeros, strict=True))
    together = ChannelQuantizer(quantizers)
    for c, alone in enumerate(quantizers):
        assert torch.equal(together.integers(x)[:, c], alone.integers(x[:, c]))
        assert torch.equal(together(x)[:, c], alone(x[:, c]))


@pytest.mark.parametrize("widths", [(), (4, 8)])
def test_channels_have_one_width(widths: tuple[int, ...]) -> None:
    with pytest.raises(CalibrationError, match="need one width"):
        ChannelQuantizer(tuple(AffineQuantizer(bits, 0.1, 0) for bits in widths))


def test_limits() -> None:
    assert [symmetric_limit(b) for b in (0, 2, 4, 8, 16)] == [0, 1, 7, 127, 32767]


@pytest.mark.parametrize("bits", [-1, 1, 17])
def test_impossible_symmetric_widths(bits: int) -> None:
    with pytest.raises(CalibrationError, match=f"got {bits}"):
        symmetric_limit(bits)


@pytest.mark.parametrize("bits", [0, 17])
def test_impossible_affine_widths(bits: int) -> None:
    with pytest.raises(CalibrationError, match=f"got {bits}"):
        AffineQuantizer(bits, 0.1, 0)
