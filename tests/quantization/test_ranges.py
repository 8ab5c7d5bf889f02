import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from resq_rl.errors import CalibrationError
from resq_rl.quantization import RangeEstimator
from resq_rl.quantization.quantizers.ranges import affine_quantizer, symmetric_step
from tests.quantization.strategies import samples, seeds, symmetric

ESTIMATORS: tuple[RangeEstimator, ...] = ("least_squares", "min_max", "percentile")


def squared(x: Tensor, out: Tensor) -> Tensor:
    return (x.double() - out.double()).square().sum(-1)


@given(samples(rows=2), st.integers(2, 8))
def test_least_squares_is_never_worse_than_min_max(x: Tensor, bits: int) -> None:
    errors = []
    for estimator in ("least_squares", "min_max"):
        step = symmetric_step(x, bits, estimator)
        assert bool((step > 0).all())
        errors.append(squared(x, symmetric(x, bits, step[:, None])))
    assert bool((errors[0] <= errors[1] * (1 + 1e-5) + 1e-12).all())


@given(samples(most=200), st.integers(2, 8))
def test_affine_least_squares_is_never_worse_than_min_max(x: Tensor, bits: int) -> None:
    errors = [float(squared(x, affine_quantizer(x, bits, e)(x))) for e in ("least_squares", "min_max")]
    assert errors[0] <= errors[1] * (1 + 1e-5) + 1e-12


@given(samples(), st.integers(1, 8), st.sampled_from(ESTIMATORS))
def test_affine_quantizers_hold_zero(x: Tensor, bits: int, estimator: RangeEstimator) -> None:
    quantizer = affine_quantizer(x, bits, estimator)
    assert 0 <= quantizer.zero_point <= 2**bits - 1
    assert float(quantizer(torch.zeros(1))) == 0.0


@given(samples(), st.integers(2, 8))
def test_min_max_covers_everything(x: Tensor, bits: int) -> None:
    step = float(symmetric_step(x[None], bits, "min_max"))
    error = (symmetric(x, bits, torch.tensor(step)) - x).abs()
    assert float(error.max()) <= step / 2 * (1 + 1e-5) + 1e-6 * float(x.abs().max())
    quantizer = affine_quantizer(x, bits, "min_max")
    # The zero point is an integer, so an end of the range may lie up to half a step inside the data.
    assert float((quantizer(x) - x).abs().max()) <= quantizer.step * (1 + 1e-5) + 1e-6 * float(x.abs().max())


@given(seeds, st.sampled_from([2, 4, 8]), st.sampled_from([7, 300, 5000]))
def test_the_search_finds_the_best_of_its_candidates(seed: int, bits: int, count: int) -> None:
    # Few samples are searched directly, many through running sums of sorted magnitudes: both against brute force.
    x = torch.randn(2, count, generator=torch.Generator().manual_seed(seed)).pow(3)
    limit = 2 ** (bits - 1) - 1
    candidates = x.abs().amax(1).double()[:, None] * 2.0 ** (-6 * torch.arange(73).double() / 72) / limit
    codes = (x[:, None].double() / candidates[:, :, None]).round().clamp(-limit, limit)
    errors = (codes * candidates[:, :, None] - x[:, None]).square().sum(2)
    step = symmetric_step(x, bits, "least_squares")
    found = squared(x, symmetric(x, bits, step[:, None]))
    np.testing.assert_allclose(found.numpy(), errors.amin(1).numpy(), rtol=1e-4)


def test_rows_do_not_influence_each_other() -> None:
    x = torch.randn(600, 40, generator=torch.Generator().manual_seed(0)) * torch.rand(600, 1).exp()
    for bits in (2, 4, 8):
        together = symmetric_step(x, bits, "least_squares")
        alone = torch.cat([symmetric_step(row[None], bits, "least_squares") for row in x[::50]])
        assert torch.equal(together[::50], alone)


def test_percentiles_drop_outliers_of_many_samples_only() -> None:
    x = torch.linspace(0, 1, 100_001)
    x[-1] = 1000.0
    assert float(symmetric_step(x[None], 8, "percentile")) * 127 == pytest.approx(0.9999, abs=1e-4)
    assert float(symmetric_step(x[None], 8, "min_max")) * 127 == pytest.approx(1000)
    nine = torch.tensor([[1.0, 2, 3, 4, 5, 6, 7, 8, 9]])  # the taps of a depthwise 3x3 kernel: none is an outlier
    assert float(symmetric_step(nine, 8, "percentile")) * 127 == pytest.approx(9)
    quantizer = affine_quantizer(nine[0] - 5, 8, "percentile")
    assert quantizer.step == pytest.approx(8 / 255)


def test_tiny_and_constant_samples() -> None:
    for values in ([0.0, 0.0], [-3e-9, 0.0], [1e-9, -9e-9], [-1e-8, 0.0], [5.0, 5.0], [-5.0]):
        for estimator in ESTIMATORS:
            quantizer = affine_quantizer(torch.tensor(values), 8, estimator)
            assert quantizer.step > 0
            assert float((quantizer(torch.tensor(values)) - torch.tensor(values)).abs().max()) <= quantizer.step
            assert float(symmetric_step(torch.tensor([values]), 4, estimator)) > 0


@given(st.floats(-1e-7, 0), st.floats(0, 1e-7), st.sampled_from(ESTIMATORS))
def test_ranges_near_nothing(low: float, high: float, estimator: RangeEstimator) -> None:
    assert affine_quantizer(torch.tensor([low, high]), 8, estimator).step > 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_samples_that_are_not_finite(bad: float) -> None:
    with pytest.raises(CalibrationError, match="not finite"):
        symmetric_step(torch.tensor([[1.0, bad]]), 8, "min_max")
    with pytest.raises(CalibrationError, match="not finite"):
        affine_quantizer(torch.tensor([1.0, bad]), 8, "min_max")


def test_no_samples() -> None:
    with pytest.raises(CalibrationError, match="No samples"):
        symmetric_step(torch.zeros(1, 0), 8, "min_max")
    with pytest.raises(CalibrationError, match="No samples"):
        affine_quantizer(torch.zeros(0), 8, "min_max")
