"""How a network is quantized."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, cast

from pydantic import AfterValidator, Field

from resq_rl.checked import Bits, Checked, Increasing
from resq_rl.quantization.specification.costs import Convention, Cost, CostTable, LayerKind

__all__ = ["LayerKind", "Part", "QuantizationConfig", "RangeEstimator", "Reference", "WeightRounding"]

Part = Literal["keyframe", "residual"]
RangeEstimator = Literal["least_squares", "min_max", "percentile"]
Reference = Literal["keyframe", "previous"]
WeightRounding = Literal["nearest", "second_order"]


def _symmetric(bits: int) -> int:
    if bits == 1:
        raise ValueError("a symmetric quantizer needs a sign")
    return bits


Level = Annotated[int, Field(ge=0, le=16), AfterValidator(_symmetric)]
LEVELS = Field(min_length=2, description="two or more increasing values, each 0 or at least 2 bits and at most 16")


@dataclass(frozen=True)
class QuantizationConfig(Checked):
    """How a network is quantized.

    Attributes:
        key_weight_bits, key_activation_bits: bits of a keyframe.
        levels: activation bits that a residual may take, increasing; 0 skips.
        residual_weight_bits: bits of residual weights: one width, or one per kind of layer, such as
            {conv: 4, depthwise: 8} (kinds that are not named take 4).
        weight_rounding: "nearest", or "second_order": the weights of a channel are rounded together, once calibration
            clips have shown what they multiply (`rounding`).
        range_estimator: how ranges are chosen from calibration clips.
        bops_convention: what a multiplication of w by a bits costs: w * a ("product"), the square of the larger
            ("max"), the product with both widths raised to at least 4 ("clipped"), or a `CostTable`, its fields, the
            path of its YAML file, or the name of a shipped one.
        groups: layers that share a decision: "auto", or patterns of layer names by name of the group.
    """

    key_weight_bits: Bits = 8
    key_activation_bits: Annotated[int, Field(ge=1, le=16)] = 8
    levels: Annotated[tuple[Level, ...], LEVELS, Increasing] = (0, 2, 4, 8)
    residual_weight_bits: Bits | Mapping[LayerKind, Bits] = 4
    weight_rounding: WeightRounding = "second_order"
    range_estimator: RangeEstimator = "least_squares"
    bops_convention: Cost = "product"
    groups: Literal["auto"] | Mapping[str, str | Sequence[str]] = "auto"

    @property
    def cost(self) -> Convention | CostTable:
        """`bops_convention` as it was read: a table in place of its name, path or fields."""
        return cast(Convention | CostTable, self.bops_convention)

    def weight_bits(self, kind: LayerKind | Literal["product"]) -> int:
        """Residual weight bits of a layer kind; for a product of activations, the bits of either factor."""
        if kind == "product":
            return self.key_activation_bits
        if isinstance(self.residual_weight_bits, Mapping):
            return self.residual_weight_bits.get(kind, 4)
        return self.residual_weight_bits
