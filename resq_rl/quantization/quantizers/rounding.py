"""Integer weights for an operator: each rounded on its own, or all of an output channel together.

Rounding to nearest errs least in each weight. What matters is the operator's output, whose squared error over
calibration inputs is, for one output channel with weights w, codes q and step s,

    (s q - w) H (s q - w)^T        with H the second moment of the input patches that the weights multiply.

As patches are correlated, errors can cancel. The codes are found by coordinate descent, one input at a time over all
output channels at once (QuantEase, arXiv 2309.01885, for the objective of GPTQ, arXiv 2210.17323), in turn with the
best step for the codes.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from resq_rl.quantization.graph.operators import ResidualOperator
from resq_rl.quantization.quantizers.quantizer import symmetric_limit
from resq_rl.quantization.quantizers.ranges import symmetric_step
from resq_rl.quantization.specification.config import RangeEstimator

__all__ = ["FINE", "WIDEST", "IntegerWeight", "integer_weight", "positions_of", "second_moment"]

# From this many bits on, rounding to nearest loses next to nothing.
FINE = 8

POSITIONS_PER_FRAME = 64
# Second moments of wider operators would take too much memory; their weights are rounded to nearest.
WIDEST = 8192
SWEEPS = 4
# Steps to start from, as shares of the one that errs least in the weights.
STARTS = (1.0, 0.85, 0.7)
# Share of the mean of H's diagonal added to it, against inputs that calibration hardly met.
DAMPING = 0.01
BLOCK = 64


@dataclass(frozen=True)
class IntegerWeight:
    """Integer codes of a weight (as float32) and the step of each output channel, which broadcasts over the output."""

    codes: Tensor
    scale: Tensor


def integer_weight(
    operator: ResidualOperator, bits: int, estimator: RangeEstimator, moment: Float[Tensor, "g n n"] | None = None
) -> IntegerWeight:
    """Symmetric `bits`-bit weights with one step per output channel.

    Args:
        moment: second moment of the patches of each channel group (`second_moment`), or None to round to nearest, as
            weights of 8 bits or more always are.
    """
    rows = operator.weight_rows()
    step = symmetric_step(rows, bits, estimator)[:, None]
    if moment is None or bits >= FINE:
        codes = _nearest(rows, step, symmetric_limit(bits))
    else:
        by_group = (len(moment), -1)
        found = _descend(rows.unflatten(0, by_group), step.unflatten(0, by_group), moment, symmetric_limit(bits))
        codes, step = (part.flatten(0, 1) for part in found)
    return IntegerWeight(operator.rows_to_weight(codes).contiguous(), operator.per_channel(step[:, 0]))


def second_moment(patches: Float[Tensor, "g k n"]) -> Float[Tensor, "g n n"]:
    """Sum over k patches of their outer products, by channel group."""
    return patches.transpose(1, 2) @ patches


def positions_of(
    operator: ResidualOperator, output_shape: tuple[int, ...], generator: torch.Generator
) -> Int64[Tensor, " k"]:
    """Random output positions of one frame, as flat indices, with repetition."""
    size = output_shape[1:] if operator.channel_axis == 1 else output_shape[:-1]
    return torch.randint(max(1, torch.Size(size).numel()), (POSITIONS_PER_FRAME,), generator=generator)


def _nearest(weights: Tensor, step: Tensor, limit: int) -> Tensor:
    return torch.round(weights / step).clamp_(-limit, limit)


def _descend(
    weights: Float[Tensor, "g o n"], step: Float[Tensor, "g o 1"], moment: Float[Tensor, "g n n"], limit: int
) -> tuple[Float[Tensor, "g o n"], Float[Tensor, "g o 1"]]:
    """Codes and steps with the least error found from several first steps, by output channel."""
    device, (weights, step, moment) = weights.device, (part.cpu() for part in (weights, step, moment))
    moment, outputs = _conditioned(moment), weights.shape[1]
    nearest = _nearest(weights, step, limit), step
    scales = torch.cat([step * share for share in STARTS], 1)  # of all starts side by side
    wanted = weights.repeat(1, len(STARTS), 1)
    codes = _nearest(wanted, scales, limit)
    for _ in range(SWEEPS):
        _sweep(codes, scales, wanted, moment, limit)
        scales = _best_step(codes, scales, wanted, moment)
    errors = _error(codes, scales, wanted, moment)
    best, least = nearest, _error(*nearest, weights, moment)
    for own, scale, error in zip(*(part.split(outputs, 1) for part in (codes, scales, errors)), strict=True):
        better = error < least
        best = torch.where(better, own, best[0]), torch.where(better, scale, best[1])
        least = torch.where(better, error, least)
    return best[0].to(device), best[1].to(device)


def _conditioned(moment: Tensor) -> Tensor:
    """The moment with a positive diagonal of mean 1."""
    mean = moment.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    identity = torch.eye(moment.shape[1], dtype=moment.dtype, device=moment.device)
    scaled: Tensor = torch.where(mean > 0, moment / mean, identity)
    return (scaled + DAMPING * identity) / (1 + DAMPING)


def _sweep(codes: Tensor, step: Tensor, weights: Tensor, moment: Tensor, limit: int) -> None:
    """Set every code in turn to its best value given all others, in place.

    The slope of the error is kept up to date within a block of inputs, and beyond it once a block is done.
    """
    slope = (codes * step - weights) @ moment
    inputs = codes.shape[-1]
    for start in range(0, inputs, BLOCK):
        block = slice(start, min(inputs, start + BLOCK))
        before = codes[..., block].clone()
        _sweep_block(codes[..., block], step, slope[..., block], moment[:, block, block], limit)
        slope += ((codes[..., block] - before) * step) @ moment[:, block]


def _sweep_block(codes: Tensor, step: Tensor, slope: Tensor, moment: Tensor, limit: int) -> None:
    """`_sweep` over few inputs; in NumPy, which is several times as fast as PyTorch on operations as small as these."""
    by_input = codes.permute(2, 0, 1).contiguous()
    own, values, near = slope.permute(2, 0, 1).contiguous().numpy(), by_input.numpy(), moment.permute(1, 2, 0).numpy()
    scale = step[..., 0].numpy()
    for i in range(len(own)):
        curvature = near[i, i, :, None] * scale
        new = np.rint(values[i] - own[i] / curvature)
        np.minimum(np.maximum(new, -limit, out=new), limit, out=new)
        own[i + 1 :] += (new - values[i]) * scale * near[i, i + 1 :, :, None]
        values[i] = new
    codes.copy_(by_input.permute(1, 2, 0))


def _best_step(codes: Tensor, step: Tensor, weights: Tensor, moment: Tensor) -> Tensor:
    """The step with the least error for given codes; the old one where that is not positive."""
    weighted = codes @ moment
    share = (weights * weighted).sum(-1, keepdim=True) / (codes * weighted).sum(-1, keepdim=True)
    return torch.where(share > 0, share, step)


def _error(codes: Tensor, step: Tensor, weights: Tensor, moment: Tensor) -> Float[Tensor, "g o 1"]:
    difference = codes * step - weights
    error: Tensor = ((difference @ moment) * difference).sum(-1, keepdim=True)
    return error
