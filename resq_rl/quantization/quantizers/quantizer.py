"""Uniform quantizers.

Every quantizer maps a real x to an integer and back with one step per tensor or per channel (of a grouped layer, whose
outputs read one group of channels each, so that the steps of inputs fold into those of the weights):

    symmetric   q = clamp(round(x / step), -n, n),              n = 2^(bits-1) - 1
    affine      q = clamp(round(x / step) + z, 0, 2^bits - 1) - z

Both represent 0 exactly, so zero padding costs no error. Integers are kept as float32 tensors with integer values:
products and sums of them are exact as long as they stay below 2^24, which is what makes the simulation equal integer
arithmetic.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from resq_rl.errors import CalibrationError
from resq_rl.quantization.kernels.plain import affine_codes

__all__ = ["AffineQuantizer", "ChannelQuantizer", "symmetric_limit"]


def symmetric_limit(bits: int) -> int:
    """Largest magnitude of a symmetric `bits`-bit integer: 2^(bits-1) - 1, and 0 for 0 bits (nothing is kept)."""
    if bits == 0:
        return 0
    if not 2 <= bits <= 16:
        raise CalibrationError(f"A symmetric quantizer needs 2 to 16 bits (or 0 to skip), got {bits}.")
    return int(2 ** (bits - 1)) - 1


@dataclass(frozen=True)
class AffineQuantizer:
    """Affine uniform quantizer with an integer zero point; codes are returned with the zero point subtracted."""

    bits: int
    step: float
    zero_point: int

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 16:
            raise CalibrationError(f"An affine quantizer needs 1 to 16 bits, got {self.bits}.")

    def integers(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Integer codes of `x` minus the zero point, in [-z, 2^bits - 1 - z], as float32."""
        return affine_codes(x, *self.bounds)

    @property
    def span(self) -> tuple[int, int]:
        """Lowest and highest code less the zero point."""
        return -self.zero_point, 2**self.bits - 1 - self.zero_point

    @property
    def bounds(self) -> tuple[float, float, float]:
        """Step, lowest and highest code less the zero point."""
        low, high = self.span
        return self.step, float(low), float(high)

    def __call__(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Quantize and dequantize `x`."""
        return self.integers(x) * self.step


@dataclass(frozen=True)
class ChannelQuantizer:
    """An affine quantizer for each input channel of a grouped layer, all of one width.

    Channels of one group have one step: an output channel reads one group, so that the step folds into its weights'.
    """

    channels: tuple[AffineQuantizer, ...]

    def __post_init__(self) -> None:
        if len({quantizer.bits for quantizer in self.channels}) != 1:
            raise CalibrationError(
                "The quantizers of channels need one width, got "
                f"{sorted({quantizer.bits for quantizer in self.channels}) or 'no channels'}."
            )

    def integers(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Integer codes of `x` minus the zero points of its channels, as float32."""
        return affine_codes(x, *self.bounds)

    @property
    def bounds(self) -> tuple[Float[Tensor, "c 1 1"], Float[Tensor, "c 1 1"], Float[Tensor, "c 1 1"]]:
        """Step, lowest and highest code less the zero point, by channel."""
        rows = [quantizer.bounds for quantizer in self.channels]
        step, low, high = torch.tensor(rows, dtype=torch.float32, device="cpu").T[..., None, None].contiguous().unbind()
        return step, low, high

    def __call__(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Quantize and dequantize `x`."""
        step, low, high = self.bounds
        return affine_codes(x, step, low, high) * step
