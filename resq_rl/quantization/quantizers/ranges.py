"""Range estimation: from samples to the step of a quantizer.

Three estimators choose the range [low, high] that a quantizer covers, separately for each row of the samples:

    min_max         the extremes of the samples
    percentile      the 0.01 and 99.99 percentiles
    least_squares   the range with the least squared error after quantization, by search over shrunken extremes
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from resq_rl.errors import CalibrationError
from resq_rl.quantization.quantizers.quantizer import AffineQuantizer, symmetric_limit
from resq_rl.quantization.specification.config import RangeEstimator

__all__ = ["affine_quantizer", "output_quantizers", "symmetric_step"]

_PERCENTILE = 0.9999
# Geometric from the extremes down to 1/64 of them: ternary steps of heavy-tailed residuals lie far below the maximum.
_SHRINK = torch.logspace(0, -6, 73, base=2.0)
_SMALLEST_RANGE = 1e-8
_AT_ONCE = 1_000_000
# Samples per code from which sorting them is faster than quantizing them with every candidate.
_MANY = 2


def symmetric_step(samples: Float[Tensor, "rows n"], bits: int, estimator: RangeEstimator) -> Float[Tensor, " rows"]:
    """Step of a symmetric `bits`-bit quantizer for each row of `samples`.

    Raises:
        CalibrationError: there are no samples, or some are not finite.
    """
    _check(samples)
    limit = symmetric_limit(bits)
    extreme = _extremes(samples.abs(), estimator).clamp_min(_SMALLEST_RANGE)
    if estimator != "least_squares":
        return extreme / limit
    candidates = extreme[:, None] * _SHRINK.to(extreme) / limit
    best = _squared_errors(samples, candidates, limit).argmin(1, keepdim=True)
    return candidates.gather(1, best)[:, 0]


def _squared_errors(
    samples: Float[Tensor, "rows n"], steps: Float[Tensor, "rows candidates"], limit: int
) -> Float[Tensor, "rows candidates"]:
    """Squared error of each row after symmetric quantization with each step."""
    if samples.shape[1] < _MANY * limit:
        each = steps.T[:, :, None].split(max(1, _AT_ONCE // samples.numel()))
        errors = [(samples / s).round_().clamp_(-limit, limit).mul_(s).sub_(samples).square_().sum(2) for s in each]
        return torch.cat(errors).T
    at_once = max(1, _AT_ONCE // (steps.shape[1] * limit))
    parts = zip(samples.split(at_once), steps.split(at_once), strict=True)
    return torch.cat([_errors_of_many(*part, limit) for part in parts])


def _errors_of_many(
    samples: Float[Tensor, "rows n"], steps: Float[Tensor, "rows candidates"], limit: int
) -> Float[Tensor, "rows candidates"]:
    """The same from sorted magnitudes and their running sums.

    A magnitude's code is the number of k in 1..limit whose bound (k - 1/2) step it reaches, so the sums of
    code * magnitude and of code^2, and with them the error, follow from where the bounds fall among the sorted
    magnitudes.
    """
    ordered = samples.abs().sort(1).values.double()
    sums = torch.nn.functional.pad(ordered.cumsum(1), (1, 0))
    k = torch.arange(1, limit + 1, device=samples.device, dtype=torch.float64)
    wide = steps.double()
    below = torch.searchsorted(ordered, (wide[:, :, None] * (k - 0.5)).flatten(1))
    products = (sums[:, -1:] - sums.gather(1, below)).unflatten(1, (-1, limit)).sum(2)
    squares = (ordered.shape[1] - below).double().unflatten(1, (-1, limit)) @ (2 * k - 1)
    errors: Tensor = wide.square() * squares - 2 * wide * products + ordered.square().sum(1, keepdim=True)
    return errors.to(samples.dtype)


def affine_quantizer(samples: Float[Tensor, " n"], bits: int, estimator: RangeEstimator) -> AffineQuantizer:
    """Affine `bits`-bit quantizer for `samples`, with 0 inside its range.

    Raises:
        CalibrationError: there are no samples, or some are not finite.
    """
    _check(samples[None])
    high = max(float(_extremes(samples[None], estimator)[0]), 0.0)
    low = min(-float(_extremes(-samples[None], estimator)[0]), 0.0)
    if high - low < _SMALLEST_RANGE:
        high = low + _SMALLEST_RANGE
    if estimator == "least_squares":
        low, high = _shrink_affine(samples, low, high, bits)
    return _affine(low, high, bits)


def _affine(low: float, high: float, bits: int) -> AffineQuantizer:
    step = (high - low) / (2**bits - 1)
    return AffineQuantizer(bits, step, round(-low / step))


def _shrink_affine(samples: Float[Tensor, " n"], low: float, high: float, bits: int) -> tuple[float, float]:
    """The ends with the least squared error, one end at a time, starting from the extremes."""

    def error(ends: tuple[float, float]) -> float:
        return float((_affine(*ends, bits)(samples) - samples).square_().sum())

    shrinks = [float(s) for s in _SHRINK[:37]]
    ends = min(((low, high * s) for s in shrinks if high * s - low >= _SMALLEST_RANGE), key=error)
    if low < 0:
        ends = min(((low * s, ends[1]) for s in shrinks if ends[1] - low * s >= _SMALLEST_RANGE), key=error)
    return ends


def output_quantizers(
    patches: Float[Tensor, "g k n"],
    weights: Float[Tensor, "g o n"],
    low: Float[Tensor, " g"],
    high: Float[Tensor, " g"],
    bits: int,
) -> list[AffineQuantizer]:
    """The quantizer of each channel group with which what the weights make of its inputs has the least error.

    The squared error of the outputs is compared, not that of the inputs: an input that large weights multiply counts
    more, and the errors of clipped inputs, which all point one way, add up in a sum.

    Args:
        patches: inputs under the kernel at k output positions, by channel group.
        weights: one row for each output channel.
        low, high: extremes of each group's inputs; 0 lies between them.
    """

    def error(low: Tensor, high: Tensor) -> Float[Tensor, " g"]:
        step = ((high - low) / (2**bits - 1))[:, None, None]
        zero = torch.round(-low[:, None, None] / step)
        codes = (patches / step).round_().clamp_(-zero, 2**bits - 1 - zero)
        difference = codes.mul_(step).sub_(patches)
        errors: Tensor = (difference @ turned).square_().sum((1, 2))
        return errors

    turned = weights.transpose(1, 2).contiguous()
    shrinks = _SHRINK[:37:2].to(patches)
    low, high = low.clamp_max(0.0), torch.maximum(high.clamp_min(0.0), low + _SMALLEST_RANGE)
    highs = torch.maximum(high * shrinks[:, None], low + _SMALLEST_RANGE)
    high = highs.gather(0, torch.stack([error(low, h) for h in highs]).argmin(0, keepdim=True))[0]
    if bool((low < 0).any()):
        lows = torch.minimum(low * shrinks[:, None], high - _SMALLEST_RANGE)
        low = lows.gather(0, torch.stack([error(w, high) for w in lows]).argmin(0, keepdim=True))[0]
    return [_affine(*ends, bits) for ends in zip(low.tolist(), high.tolist(), strict=True)]


def _extremes(samples: Float[Tensor, "rows n"], estimator: RangeEstimator) -> Float[Tensor, " rows"]:
    if estimator != "percentile":
        return samples.amax(1)
    rank = math.ceil(_PERCENTILE * samples.shape[1])  # of few samples, the largest
    return torch.kthvalue(samples, rank, dim=1).values


def _check(samples: Float[Tensor, "rows n"]) -> None:
    if samples.shape[1] == 0:
        raise CalibrationError("No samples to calibrate on: give at least one clip with two frames.")
    if not bool(torch.isfinite(samples).all()):
        raise CalibrationError("Calibration met a value that is not finite: look for NaN in the frames or weights.")
