"""What all passes of a calibrated model share at one operator call."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from resq_rl.quantization.graph.operators import Geometry, Pair, ResidualOperator
from resq_rl.quantization.graph.products import ProductSite
from resq_rl.quantization.graph.tracing import AnySite, Site
from resq_rl.quantization.kernels.plain import Bound, Kernels, Product
from resq_rl.quantization.quantizers.quantizer import AffineQuantizer, symmetric_limit
from resq_rl.quantization.quantizers.residual import largest_code
from resq_rl.quantization.quantizers.rounding import IntegerWeight
from resq_rl.quantization.running.calibration import SiteRanges
from resq_rl.quantization.running.weights import Weights
from resq_rl.quantization.specification.config import Part, QuantizationConfig
from resq_rl.quantization.specification.costs import mac_cost

__all__ = ["ProductPlan", "SitePlan", "Spending", "highest_cost", "keyframe_output", "plan_sites"]


@dataclass(frozen=True, eq=False)
class Spending:
    """What decides how the costs of a layer's pixels or tokens are summed.

    Attributes:
        size: height and width of the map of costs.
        highest: the highest cost at a place of the map; infinite if one is not whole, since then no sum is exact in
            single precision.
        macs_per_tap: of one block.
    """

    geometry: Geometry
    size: Pair
    highest: float
    macs_per_tap: int


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
        blocks: into how many blocks the channels of a pixel are divided, each with a level of its own under thresholds.
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
    blocks: int

    @cached_property
    def decided_at(self) -> tuple[Pair, ...]:
        """Sizes at which decisions by region are needed for its pixels or tokens."""
        if self.site.operator.geometry.line:
            return ((1, 1),)
        return (self.spending.size,) if self.site.operator.channel_axis == 1 else (self.spending.size, (1, 1))

    @cached_property
    def spending(self) -> Spending:
        """How the costs of its pixels or tokens are summed."""
        operator, tokens = self.site.operator, self.site.tokens
        image = operator.channel_axis == 1
        size = (self.site.input_shape[1], self.site.input_shape[2]) if image else tokens.size
        highest = highest_cost(self.costs) * (1.0 if image else tokens.crowd) * self.blocks
        return Spending(operator.geometry, size, highest, operator.macs_per_tap // self.blocks)


def highest_cost(costs: Sequence[float]) -> float:
    """The highest of whole costs; infinite if one is not whole."""
    return max(costs) if all(float(cost).is_integer() for cost in costs) else math.inf


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


def plan_sites(
    sites: Sequence[AnySite],
    groups: Sequence[int],
    ranges: Sequence[SiteRanges],
    weights: Weights,
    config: QuantizationConfig,
    kernels: Kernels,
) -> list[SitePlan | ProductPlan]:
    """The plans of all sites.

    Args:
        sites: layers and products, in order of execution, with the index of the layer group of each.
        ranges: of the layers among them.
    """
    plans: list[SitePlan | ProductPlan] = []
    own, bits = iter(ranges), config.key_activation_bits
    for site, group in zip(sites, groups, strict=True):
        if isinstance(site, Site):
            plans.append(_plan(site, next(own), group, weights.of(site.operator), config, kernels))
        else:
            symmetric_limit(bits)  # refuses what the factors cannot have
            plans.append(ProductPlan(site, group, site.macs * mac_cost(config.cost, bits, bits, site.size)))
    return plans


def _plan(
    site: Site,
    ranges: SiteRanges,
    group: int,
    weights: Mapping[Part, IntegerWeight],
    config: QuantizationConfig,
    kernels: Kernels,
) -> SitePlan:
    operator = site.operator
    width = config.weight_bits(operator.layer_kind, operator.name)
    most = largest_code(config.levels)

    def product(part: Part, span: tuple[int, int], steps: Tensor | None = None) -> Product:
        weight = weights[part]
        scale = weight.scale if steps is None else weight.scale * steps
        return kernels.product(operator.geometry, weight.codes, scale, span)

    cost = float(mac_cost(config.cost, config.key_weight_bits, config.key_activation_bits, site.size))
    costs = tuple(float(mac_cost(config.cost, width, bits, site.size)) for bits in config.levels)
    device, residual = weights["keyframe"].codes.device, product("residual", (-most, most))
    quantizer, bias = ranges.keyframe, _bias(operator, ranges.correction, device)
    if isinstance(quantizer, AffineQuantizer):
        bounds: tuple[Bound, Bound, Bound] = quantizer.bounds
        key, step = product("keyframe", quantizer.span), quantizer.step
    else:
        steps, low, high = (bound.to(device) for bound in quantizer.bounds)
        span = int(low.min()), int(high.max())
        bounds, step = (steps, low, high), 1.0
        key = product("keyframe", span, operator.per_channel(operator.by_output(steps.flatten())))
    blocks = config.blocks(site.input_shape[0 if operator.channel_axis == 1 else -1])
    return SitePlan(site, ranges, group, key, residual, bounds, step, bias, cost, costs, blocks)


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
