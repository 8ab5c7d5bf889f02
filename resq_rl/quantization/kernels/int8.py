"""Products of codes in bytes, by the int8 operators of oneDNN that PyTorch brings.

A code is held as the unsigned byte code + zero; oneDNN subtracts the zero point, multiplies by int8 weights and sums in
int32. Processors without instructions for such sums (VNNI, AMX) add pairs of products in int16, which saturates: there,
only weights and codes too small for that are multiplied so. Which processor does what is tried, not looked up.
"""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor

from resq_rl.quantization.graph.operators import Geometry

__all__ = ["ByteWeights", "byte_weights"]

BYTE = 255  # the largest
LARGEST_WEIGHT = 127
SATURATION = 2**15  # of int16
# With fewer input channels under a tap, bytes save nothing.
WORTH = 8


@dataclass
class ByteWeights:
    """The integer weights of an operator, for codes in bytes.

    Attributes:
        geometry: the operator: a convolution of one group or a linear layer.
        codes: the weights.
        zero: what is added to codes so that they are bytes.
    """

    geometry: Geometry
    codes: Int8[Tensor, "o ..."]
    zero: int
    _packed: dict[tuple[int, ...], Tensor] = field(default_factory=dict, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_packed": {}}  # what oneDNN lays out for this processor

    def totals(self, codes: UInt8[Tensor, "*b"], geometry: Geometry | None = None) -> Float[Tensor, "*c"]:
        """The sums of products, integers.

        Args:
            codes: inputs of the operator as bytes; of images, channels last.
            geometry: the operator with other padding, if the codes have theirs already.
        """
        geometry = geometry or self.geometry
        key = geometry.padding, *codes.shape
        if key not in self._packed:
            self._packed[key] = _packed(geometry, self.codes, self.zero, codes.shape)
        return _totals(geometry, codes, self._packed[key], len(self.codes), self.zero)


def byte_weights(geometry: Geometry, codes: Float[Tensor, "o ..."], span: tuple[int, int]) -> ByteWeights | None:
    """The weights for codes in bytes, or None where products are not exact or not faster in bytes.

    Args:
        codes: the weights as integers; the sums of their products with inputs must be below 2^24.
        span: the lowest and the highest code of inputs.
    """
    (low, high), largest = span, int(codes.abs().max()) if codes.numel() else 0
    fits = low <= 0 <= high and high - low <= BYTE and largest <= LARGEST_WEIGHT
    left, right, top, bottom = geometry.padding
    conv = geometry.operator == "conv2d" and geometry.groups == 1 and left == right and top == bottom
    if not fits or not (conv or geometry.operator == "linear") or codes.shape[1] < WORTH:
        return None
    if (high - low) * largest * 2 >= SATURATION and not _sums_in_int32():
        return None
    return ByteWeights(geometry, codes.to(torch.int8), -low) if _exact(1) else None


@lru_cache(maxsize=1)
def _sums_in_int32() -> bool:
    """Whether this processor adds any products of bytes exactly."""
    return _exact(LARGEST_WEIGHT)


@lru_cache(maxsize=2)
def _exact(largest: int) -> bool:
    """Whether sums of products with weights up to `largest` come out as they are, tried on a few operators."""
    cases = [
        (Geometry("conv2d", (3, 3), padding=(1, 1, 1, 1)), (2, 32, 9, 11), (40, 32, 3, 3)),
        (Geometry("conv2d", (3, 3), (2, 2), (1, 1, 1, 1)), (1, 12, 8, 8), (9, 12, 3, 3)),
        (Geometry("conv2d"), (1, 64, 12, 16), (64, 64, 1, 1)),
        (Geometry("linear"), (37, 48), (24, 48)),
    ]
    try:
        return all(_agrees(*case, sign * largest) for case in cases for sign in (1, -1))
    except (RuntimeError, NotImplementedError, AttributeError):  # a PyTorch or a processor without these operators
        return False


def _agrees(geometry: Geometry, shape: tuple[int, ...], weight_shape: tuple[int, ...], weight: int) -> bool:
    """Whether an operator gives the right sums for the largest bytes."""
    codes, zero = torch.full(shape, BYTE, dtype=torch.uint8, device="cpu"), 1
    weights = torch.full(weight_shape, weight, dtype=torch.int8, device="cpu")
    codes = codes.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else codes
    expected = geometry.apply(codes.double() - zero, weights.double())
    return torch.equal(ByteWeights(geometry, weights, zero).totals(codes).double(), expected)


def _packed(geometry: Geometry, weights: Tensor, zero: int, shape: torch.Size) -> Tensor:
    ones, operators = torch.ones(len(weights), dtype=torch.float32, device="cpu"), torch.ops.onednn
    if geometry.operator == "linear":
        packed: Tensor = operators.qlinear_prepack(weights, list(shape))
        return packed
    _, _, top, _ = geometry.padding
    spaces = list(geometry.stride), [top, geometry.padding[0]], list(geometry.dilation)
    packed = operators.qconv_prepack(weights, ones, 1.0, zero, *spaces, 1, list(shape))
    return packed


def _totals(geometry: Geometry, codes: Tensor, packed: Tensor, outputs: int, zero: int) -> Tensor:
    ones, zeros = _unit(outputs)
    read = codes, 1.0, zero, packed, ones, zeros, None
    write: tuple[Any, ...] = 1.0, 0, torch.float32, "none", [], ""
    if geometry.operator == "linear":
        total: Tensor = torch.ops.onednn.qlinear_pointwise(*read, *write)
        return total
    spaces = list(geometry.stride), [geometry.padding[2], geometry.padding[0]], list(geometry.dilation)
    total = torch.ops.onednn.qconv2d_pointwise(*read, *spaces, 1, *write)
    return total


@lru_cache(maxsize=256)
def _unit(outputs: int) -> tuple[Tensor, Tensor]:
    """Steps of 1 and zero points of 0 for the weights."""
    return torch.ones(outputs, dtype=torch.float32, device="cpu"), torch.zeros(outputs, dtype=torch.int64, device="cpu")
