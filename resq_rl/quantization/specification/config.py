"""How a network is quantized."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from resq_rl.errors import SettingsError
from resq_rl.quantization.specification.ledger import BopsConvention

__all__ = ["LayerKind", "Part", "QuantizationConfig", "RangeEstimator", "Reference", "WeightRounding"]

LayerKind = Literal["conv", "depthwise", "grouped", "linear", "pointwise", "transposed"]
Part = Literal["keyframe", "residual"]
RangeEstimator = Literal["least_squares", "min_max", "percentile"]
Reference = Literal["keyframe", "previous"]
WeightRounding = Literal["nearest", "second_order"]


@dataclass(frozen=True)
class QuantizationConfig:
    """How a network is quantized.

    Attributes:
        key_weight_bits, key_activation_bits: bits of keyframes.
        levels: bit-widths a residual may take, ascending; 0 skips.
        residual_weight_bits: bits of residual weights, one number or one per layer kind (missing kinds take 4).
        weight_rounding: "nearest", or "second_order" to round the weights of a channel together once calibration clips
            have shown what they multiply (`rounding`).
        range_estimator: how ranges are chosen from calibration samples.
        bops_convention: cost of a multiply-accumulate.
        groups: "auto", or layer groups as name -> patterns of layer names.
    """

    key_weight_bits: int = 8
    key_activation_bits: int = 8
    levels: tuple[int, ...] = (0, 2, 4, 8)
    residual_weight_bits: int | Mapping[LayerKind, int] = 4
    weight_rounding: WeightRounding = "second_order"
    range_estimator: RangeEstimator = "least_squares"
    bops_convention: BopsConvention = "product"
    groups: str | Mapping[str, Sequence[str]] = "auto"

    def __post_init__(self) -> None:
        for name, known in (
            ("range_estimator", RangeEstimator),
            ("weight_rounding", WeightRounding),
            ("bops_convention", BopsConvention),
        ):
            _check_choice(name, getattr(self, name), known)
        if list(self.levels) != sorted(set(self.levels)) or len(self.levels) < 2:
            raise SettingsError(f"levels must be two or more ascending bit-widths, got {list(self.levels)}.")
        if not all(b == 0 or 2 <= b <= 16 for b in self.levels):
            raise SettingsError(f"levels must be 0 or 2 to 16 bits each, got {list(self.levels)}.")
        if not 1 <= self.key_activation_bits <= 16 or not 2 <= self.key_weight_bits <= 16:
            raise SettingsError(
                "key_activation_bits must be 1 to 16 and key_weight_bits 2 to 16, got "
                f"{self.key_activation_bits} and {self.key_weight_bits}."
            )
        given = self.residual_weight_bits
        widths = given if isinstance(given, Mapping) else {"all": given}
        unknown = sorted(set(given) - set(get_args(LayerKind))) if isinstance(given, Mapping) else []
        if unknown:
            raise SettingsError(
                f"residual_weight_bits names unknown layer kinds {unknown}; kinds are {list(get_args(LayerKind))}."
            )
        if not all(2 <= b <= 16 for b in widths.values()):
            raise SettingsError(f"residual_weight_bits must be 2 to 16, got {given}.")

    def weight_bits(self, kind: LayerKind) -> int:
        """Residual weight bits of a layer kind."""
        if isinstance(self.residual_weight_bits, Mapping):
            return self.residual_weight_bits.get(kind, 4)
        return self.residual_weight_bits


def _check_choice(name: str, value: str, known: Any) -> None:
    if value not in get_args(known):
        raise SettingsError(f"{name} is one of {', '.join(get_args(known))}, got {value!r}.")
