"""The bit-operations (BOPs) ledger: exact counts per layer, region and clip.

For an operator with weight bits w and the activation bits a(p) of its input pixels,

    BOPs = sum over output positions and kernel taps of cost(w, a(tap)) * (C_in / groups) * C_out
         = sum over input pixels p of cost(w, a(p)) * n(p) * (C_in / groups) * C_out

where n(p), the coverage, counts the (output position, tap) pairs that read pixel p. Padding is no pixel and costs
nothing. cost is a convention or a table (`costs`); a table's tile makes a(p) the dearest width of its pixels, and its
overheads are shared evenly among the regions.
"""

from dataclasses import dataclass

from jaxtyping import Bool, Float, Float64
from torch import Tensor

__all__ = ["FrameCost"]


@dataclass(frozen=True)
class FrameCost:
    """The cost of one frame of each clip.

    Attributes:
        bops: BOPs of each clip, site (operator call, in order of execution), and region.
        keyframe: whether each clip's frame ran as a keyframe.
        elementwise: elementwise operations of each clip (residual, magnitude, quantization, accumulation).
    """

    bops: Float64[Tensor, "b s gh gw"]
    keyframe: Bool[Tensor, " b"]
    elementwise: Float64[Tensor, " b"]

    @property
    def total(self) -> Float64[Tensor, " b"]:
        """BOPs of each clip's frame."""
        return self.bops.sum((1, 2, 3))

    @property
    def per_layer(self) -> Float64[Tensor, "b s"]:
        """BOPs by site."""
        return self.bops.sum((2, 3))

    @property
    def per_region(self) -> Float64[Tensor, "b gh gw"]:
        """BOPs by region of the frame."""
        return self.bops.sum(1)

    def per_group(self, group_of_site: Tensor, groups: int) -> Float64[Tensor, "b g gh gw"]:
        """BOPs by layer group and region; `group_of_site` holds the group index of each site."""
        out = self.bops.new_zeros(self.bops.shape[0], groups, *self.bops.shape[2:])
        return out.index_add_(1, group_of_site, self.bops)


def coverage_total(coverage: Float[Tensor, "h w"]) -> int:
    """Sum of a coverage map, exactly."""
    return int(coverage.double().sum())
