"""The arithmetic of products of activations: both factors as integers, at key precision.

Every vector that is multiplied, a row of the first factor and a column of the second, has a symmetric quantizer of its
own, whose range is that of the vector in this very frame:

    s_i = max_k |a_ik| / n,   A_ik = round(a_ik / s_i),    n = 2^(bits-1) - 1,   and t_j, B_kj likewise,
    (a b)_ij = s_i t_j * sum over k of A_ik B_kj.

No vector meets those of another clip, so clips stay apart, and nothing clips however far a frame is from the ones of
calibration. The sums are exact in integers (`exact_type`).
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch._ops import OpOverload

from resq_rl.quantization.graph.operators import Geometry, exact_products
from resq_rl.quantization.graph.products import FACTORS, factors_of
from resq_rl.quantization.quantizers.quantizer import symmetric_limit

__all__ = ["exact_type", "quantized_product"]


def exact_type(bits: int, contracted: int) -> torch.dtype:
    """The type in which a sum of so many products of two integers of `bits` bits is exact.

    float32 holds all integers below 2^24, and float64 those below 2^53: enough for 16 bits and two million summands.
    """
    return torch.float32 if contracted * symmetric_limit(bits) ** 2 < 2**24 else torch.float64


def quantized_product(func: OpOverload, args: Any, kwargs: Any, bits: int, contracted: int) -> Tensor:
    """The result of a call of one of `FACTORS`, with both factors quantized to `bits` bits, in the type of the factors.

    Args:
        contracted: `ProductSite.contracted`.
    """
    a, b = factors_of(func, args)
    exact = exact_type(bits, contracted)
    vector = b.dim() == 1
    left, rows = _codes(a, -1, bits)
    right, columns = _codes(b[:, None] if vector else b, -2, bits)
    with exact_products(Geometry("linear"), a.device.type):
        total = torch.matmul(left.to(exact), right.to(exact)).float()
    y = total * (rows * columns)
    if vector:
        y = y[..., 0]
    if FACTORS[func]:  # something is added to the product
        if func is torch.ops.aten.addbmm.default:
            y = y.sum(0)
        y, beta = kwargs.get("alpha", 1) * y, kwargs.get("beta", 1)
        if beta != 0:  # else, as in torch, what is added is ignored and may hold anything
            y = beta * args[0].float() + y
    return y.to(a.dtype)


def _codes(x: Tensor, axis: int, bits: int) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """Integer codes of the vectors along an axis, and the step of each vector."""
    x, limit = x.float(), symmetric_limit(bits)
    step = (x.abs().amax(axis, keepdim=True) / limit).clamp_min(torch.finfo(torch.float32).tiny)
    return (x / step).round_(), step
