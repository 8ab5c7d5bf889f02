"""What all passes of a calibrated model share at one operator call."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from resq_rl.quantization.graph.operators import ResidualOperator
from resq_rl.quantization.graph.products import ProductSite
from resq_rl.quantization.graph.tracing import Site
from resq_rl.quantization.kernels.plain import Bound, Kernels, Product
from resq_rl.quantization.quantizers.quantizer import AffineQuantizer
from resq_rl.quantization.quantizers.residual import largest_code
from resq_rl.quantization.quantizers.rounding import IntegerWeight
from resq_rl.quantization.running.calibration import SiteRanges
from resq_rl.quantization.specification.config import Part, QuantizationConfig
from resq_rl.quantization.specification.costs import mac_cost

__all__ = ["EXACT_SUMS", "ProductPlan", "SitePlan", "keyframe_output", "plan_site"]

# Codes of so many bits have no more significant bits than bfloat16.
EXACT_IN_BFLOAT16 = 8
# With fewer channels under a tap, converting to bfloat16 takes longer than its products save.
WORTH_CONVERTING = 16
# Integers of smaller magnitude, and so their sums, are exact in float32.
EXACT_SUMS = 2**24


@dataclass(frozen=True)
class SitePlan:
    """The data that all passes of a calibrated model share at one operator call.

    Attributes:
        group: index of its layer group.
        keyframe, residual: the integer weights that codes are multiplied by.
        bounds: step, lowest and highest code of the input at keyframes.
        step: the unit of the codes at keyframes; 1 where the weights' own steps hold those of the channels.
        bias: what is added to the sums at keyframes.
        keyframe_cost: BOPs of one multiply-accumulate of a keyframe.
        costs: BOPs of one multiply-accumulate by level, under residual weights.
    """

    site: Site
    ranges: SiteRanges
    group: int
    keyframe: Product
    residual: Product
    bounds: tuple[Bound, Bound, Bound]
    step: float
    bias: Tensor | None
    keyframe_cost: float
    costs: tuple[float, ...]


@dataclass(frozen=True)
class ProductPlan:
    """The same of a product of activations.

    Attributes:
        group: index of its layer group, which decides nothing about it.
        cost: BOPs of one frame.
    """

    site: ProductSite
    group: int
    cost: float


def plan_site(
    site: Site,
    ranges: SiteRanges,
    group: int,
    weights: Mapping[Part, IntegerWeight],
    config: QuantizationConfig,
    kernels: Kernels,
) -> SitePlan:
    """The plan of a site with integer `weights` of keyframes and residuals."""
    operator = site.operator
    width = config.weight_bits(operator.layer_kind)
    exact = max(config.key_weight_bits, config.key_activation_bits, width, *config.levels) <= EXACT_IN_BFLOAT16
    narrow = operator.channels_per_tap < WORTH_CONVERTING
    largest = float(weights["residual"].codes.flatten(1).abs().sum(1).max()) * largest_code(config.levels)

    def product(part: Part, steps: Tensor | None = None) -> Product:
        weight = weights[part]
        precision: Literal["bf16", "ieee"] = "bf16" if exact and not narrow else "ieee"
        scale = weight.scale if steps is None else weight.scale * steps
        made = kernels.product(operator.geometry, weight.codes, scale, exact=exact, precision=precision)
        return replace(made, any_order=part == "residual" and largest < EXACT_SUMS)

    cost = float(mac_cost(config.cost, config.key_weight_bits, config.key_activation_bits, site.size))
    costs = tuple(float(mac_cost(config.cost, width, bits, site.size)) for bits in config.levels)
    device, residual = weights["keyframe"].codes.device, product("residual")
    quantizer, bias = ranges.keyframe, _bias(operator, ranges.correction, device)
    if isinstance(quantizer, AffineQuantizer):
        key = product("keyframe")
        return SitePlan(site, ranges, group, key, residual, quantizer.bounds, quantizer.step, bias, cost, costs)
    step, low, high = (bound.to(device) for bound in quantizer.bounds)
    key = product("keyframe", operator.per_channel(operator.by_output(step.flatten())))
    return SitePlan(site, ranges, group, key, residual, (step, low, high), 1.0, bias, cost, costs)


def _bias(operator: ResidualOperator, correction: Sequence[float], device: torch.device) -> Tensor | None:
    """The operator's bias with the correction added, in float32, shaped to broadcast over the output."""
    bias = None if operator.bias is None else operator.bias.float()
    if correction:
        added = torch.tensor(correction, dtype=torch.float32, device=device)
        bias = added if bias is None else bias + added
    return None if bias is None else operator.per_channel(bias)


def keyframe_output(plan: SitePlan, kernels: Kernels, x: Tensor) -> tuple[Tensor, Tensor]:
    """The operator on the input quantized as at keyframes, and the values of that input."""
    codes, values = kernels.encode_keyframe(x, *plan.bounds, plan.keyframe)
    return kernels.accumulate(plan.keyframe, codes, plan.step, plan.bias), values
