"""How a network is quantized."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, cast

from pydantic import AfterValidator, Field

from resq_rl.checked import Bits, Checked, Count, Increasing
from resq_rl.errors import SettingsError
from resq_rl.quantization.specification.costs import Convention, Cost, CostTable, LayerKind, cost_name

__all__ = ["LayerKind", "Part", "QuantizationConfig", "RangeEstimator", "Reference", "WeightRounding"]

Part = Literal["keyframe", "residual"]
RangeEstimator = Literal["least_squares", "min_max", "percentile"]
Reference = Literal["keyframe", "previous"]
WeightRounding = Literal["nearest", "second_order"]
Granularity = Literal["pixel", "element"] | Mapping[Literal["channels"], Count]


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
        residual_weight_bits: bits of residual weights: one width, or some by layer or by kind of layer, such as
            {conv: 4, depthwise: 8, backbone.stem: 6}. A layer goes by its own name before its kind; one that is not
            named takes 4.
        weight_rounding: "nearest", or "second_order": the weights of a channel are rounded together, once calibration
            clips have shown what they multiply (`rounding`).
        granularity: what takes a level of its own under thresholds: "pixel", all channels of it; {channels: N}, blocks
            of N of its channels, or of the largest number below N that divides them; "element", every channel.
        range_estimator: how ranges are chosen from calibration clips.
        bops_convention: what a multiplication of w by a bits costs: w * a ("product"), the square of the larger
            ("max"), the product with both widths raised to at least 4 ("clipped"), or a `CostTable`, its fields, the
            path of its YAML file, or the name of a shipped one.
        groups: layers that share a decision: "auto", or patterns of layer names by name of the group.
    """

    key_weight_bits: Bits = 8
    key_activation_bits: Annotated[int, Field(ge=1, le=16)] = 8
    levels: Annotated[tuple[Level, ...], LEVELS, Increasing] = (0, 2, 4, 8)
    residual_weight_bits: Bits | Mapping[str, Bits] = 4
    weight_rounding: WeightRounding = "second_order"
    granularity: Granularity = "pixel"
    range_estimator: RangeEstimator = "least_squares"
    bops_convention: Cost = "product"
    groups: Literal["auto"] | Mapping[str, str | Sequence[str]] = "auto"

    @property
    def cost(self) -> Convention | CostTable:
        """`bops_convention` as it was read: a table in place of its name, path or fields."""
        return cast(Convention | CostTable, self.bops_convention)

    @property
    def cost_words(self) -> str:
        """What BOPs are counted by, as figures say it: the convention or table, and what takes a level."""
        name, granularity = cost_name(self.cost), self.granularity
        if granularity == "pixel":
            return name
        blocks = f"{granularity['channels']} channels" if isinstance(granularity, Mapping) else granularity
        return f"{name}, levels per {blocks}"

    def _check(self) -> None:
        if isinstance(self.granularity, Mapping) and "channels" not in self.granularity:
            raise SettingsError("Granularity must be 'pixel', 'element' or {channels: N}, received {}.")
        if isinstance(self.cost, CostTable) and self.cost.tile != (1, 1) and self.granularity != "pixel":
            raise SettingsError(
                f"Granularity must be 'pixel' under cost table {self.cost.name!r}, whose tiles of {self.cost.tile} "
                f"pixels run or are skipped with all their channels; received {self.granularity!r}."
            )

    def blocks(self, channels: int) -> int:
        """Into how many blocks of equal size, each with a level of its own, the channels of a pixel are divided."""
        if not isinstance(self.granularity, Mapping):
            return 1 if self.granularity == "pixel" else channels
        most = min(self.granularity["channels"], channels)
        return channels // max(n for n in range(1, most + 1) if channels % n == 0)

    def weight_bits(self, kind: LayerKind | Literal["product"], name: str) -> int:
        """Residual weight bits of a layer; for a product of activations, the bits of either factor."""
        if kind == "product":
            return self.key_activation_bits
        if isinstance(self.residual_weight_bits, Mapping):
            return self.residual_weight_bits.get(name, self.residual_weight_bits.get(kind, 4))
        return self.residual_weight_bits
