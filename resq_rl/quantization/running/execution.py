"""One quantized forward pass: the keyframe or residual arithmetic of every operator call, and its cost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from resq_rl.errors import NetworkError, PolicyError
from resq_rl.quantization.graph.operators import Geometry, Pair, ResidualOperator, own_types
from resq_rl.quantization.graph.tracing import Site
from resq_rl.quantization.kernels.plain import Choice, Kernels, Product
from resq_rl.quantization.quantizers.residual import ResidualTable, largest_code, threshold_row
from resq_rl.quantization.quantizers.rounding import IntegerWeight
from resq_rl.quantization.running.calibration import SiteRanges
from resq_rl.quantization.running.state import StreamState
from resq_rl.quantization.specification.config import Part, QuantizationConfig
from resq_rl.quantization.specification.fields import Field, LevelField, carry, cells_of
from resq_rl.quantization.specification.ledger import FrameCost, bit_cost

__all__ = ["Execution", "SitePlan", "check_order", "plan_site"]

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
        costs: BOPs of one multiply-accumulate by level, under residual weights.
    """

    site: Site
    ranges: SiteRanges
    group: int
    keyframe: Product
    residual: Product
    costs: tuple[float, ...]


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

    def product(part: Part) -> Product:
        weight = weights[part]
        precision: Literal["bf16", "ieee"] = "bf16" if exact and not narrow else "ieee"
        made = kernels.product(operator.geometry, weight.codes, weight.scale, exact=exact, precision=precision)
        return replace(made, any_order=part == "residual" and largest < EXACT_SUMS)

    costs = tuple(float(bit_cost(width, bits, config.bops_convention)) for bits in config.levels)
    return SitePlan(site, ranges, group, product("keyframe"), product("residual"), costs)


def check_order(sites: list[Site], position: int, operator: ResidualOperator) -> None:
    """Raise NetworkError unless the operator is the one that a pass calls at this position."""
    if position >= len(sites) or sites[position].operator is not operator:
        raise NetworkError(
            f"The network called layer {operator.name!r} out of the order seen when it was wrapped. Control flow "
            "that depends on the data is not supported: export the network, or wrap the part without it."
        )


class Execution:
    """Runs every operator of one pass, as a keyframe where `refresh`, else as a residual under `decision`.

    Args:
        plans: the plans of all sites, in order of execution.
        config: the configuration of the model.
        kernels: the kernels that run the arithmetic.
        state: the state of the clips; changed in place.
    """

    def __init__(
        self,
        plans: Sequence[SitePlan],
        config: QuantizationConfig,
        kernels: Kernels,
        state: StreamState,
        refresh: Bool[Tensor, " b"],
        decision: Field,
    ) -> None:
        self.plans, self.config, self.kernels = plans, config, kernels
        self.state, self.refresh, self.decision = state, refresh, decision
        self.sites = [plan.site for plan in plans]
        self.device = plans[0].keyframe.codes.device
        self.key = torch.nonzero(refresh)[:, 0].to(self.device)
        self.rest = torch.nonzero(~refresh)[:, 0].to(self.device)
        self.rest_decision = decision.rows(self.rest) if len(self.key) and len(self.rest) else decision
        self.position = 0
        rows = (decision.levels if isinstance(decision, LevelField) else decision.thresholds).shape[1]
        self._by_layer = rows > 1 + max(plan.group for plan in plans)
        self._costs: list[Tensor] = []
        self._carried: dict[tuple[int, Pair], tuple[Tensor | None, Tensor]] = {}  # by group or layer, and size
        self._rows: Tensor | None = None  # of thresholds in the residual tables

    def __call__(self, operator: ResidualOperator, x: Tensor) -> Tensor:
        """Compute the operator's quantized output and record its cost."""
        check_order(self.sites, self.position, operator)
        plan = self.plans[self.position]
        with own_types():
            y = self._run(plan, self._entering(plan.site, x))
        self.position += 1
        if y.dtype != plan.site.dtype:
            return y.to(plan.site.dtype)
        return y.clone() if plan.site.overwritten else y

    def _entering(self, site: Site, x: Tensor) -> Tensor:
        """An operator's input as float32, which everything behind this line computes in.

        Raises:
            NetworkError: the input is not one of those that the model was wrapped for.
        """
        shape = len(self.refresh), *site.input_shape
        if x.shape != shape or not x.is_floating_point() or x.layout != torch.strided or x.device != self.device:
            raise NetworkError(
                f"Layer {site.name!r} is called on {x.dtype} of shape {tuple(x.shape)} on {x.device}, and was wrapped "
                f"for floating-point numbers of shape {shape} on {self.device}."
            )
        x = x.float()
        return x if site.operator.channel_axis == 1 else x.contiguous()

    def _run(self, plan: SitePlan, x: Tensor) -> Tensor:
        state = self.state
        if len(state.inputs) == self.position:
            state.inputs.append(torch.empty_like(x))
            state.outputs.append(x.new_empty(0))
            state.versions.append(0)
        elif len(self.rest):
            if state.inputs[self.position].shape != x.shape or state.inputs[self.position].dtype != x.dtype:
                raise PolicyError(
                    f"The state holds {state.inputs[self.position].dtype} of shape "
                    f"{tuple(state.inputs[self.position].shape)} for layer {plan.site.name!r}, which takes shape "
                    f"{tuple(x.shape)}: it is of another model. Make one with new_state."
                )
            self._check_untouched(plan.site, self.position)
        if not len(self.rest):
            y = self._keyframe(plan, x, slice(None))
        elif not len(self.key):
            y = self._residual(plan, x, slice(None))
        else:
            y = state.outputs[self.position].clone()
            y[self.key] = self._keyframe(plan, x[self.key], self.key)
            y[self.rest] = self._residual(plan, x[self.rest], self.rest)
        self._store_output(y)
        return y

    def _keyframe(self, plan: SitePlan, x: Tensor, rows: Any) -> Tensor:
        operator, quantizer, state = plan.site.operator, plan.ranges.keyframe, self.state
        codes, values = self.kernels.encode_keyframe(x, *quantizer.bounds, plan.keyframe)
        if isinstance(rows, slice):
            state.inputs[self.position] = values
        else:
            state.inputs[self.position][rows] = values
        bias = None if operator.bias is None else operator.per_channel(operator.bias.float())
        return self.kernels.accumulate(plan.keyframe, codes, quantizer.step, bias)

    def _residual(self, plan: SitePlan, x: Tensor, rows: Any) -> Tensor:
        state, table = self.state, plan.ranges.residual[self.state.reference]
        reference = state.inputs[self.position][rows]  # of all clips a view, of some a copy
        every, moves = isinstance(rows, slice), state.reference == "previous"
        shape = x.shape if plan.site.operator.channel_axis == 1 else (len(x), -1, 1, 1)  # a linear layer has one level
        y, cost = self.kernels.residual(
            plan.residual,
            x.view(shape),
            reference.view(shape),
            self._choice(plan, table, x),
            table.step,
            state.outputs[self.position][rows],
            moves=moves,
            over=moves or not every,
        )
        self._costs.append(cost)
        if moves and not every:
            state.inputs[self.position][rows] = reference
        return y

    def _choice(self, plan: SitePlan, table: ResidualTable, x: Tensor) -> Choice:
        """The quantizer of each pixel of an operator's input."""
        decision = self.rest_decision
        tau, index = self._carried_to(plan, plan.site.map_size(x))
        kappa = None if isinstance(decision, LevelField) else tuple(decision.kappa)
        return Choice(table.lookup(kappa, plan.costs, x.device), index, tau, table.sigma, kappa or ())

    def _carried_to(self, plan: SitePlan, size: Pair) -> tuple[Tensor | None, Tensor]:
        """At a layer's resolution, its thresholds and their rows in residual tables; or None and its levels."""
        place = self.position if self._by_layer else plan.group, size
        if place not in self._carried:
            self._carried[place] = self._carry(*place)
        return self._carried[place]

    def _carry(self, index: int, size: Pair) -> tuple[Tensor | None, Tensor]:
        decision = self.rest_decision
        if isinstance(decision, LevelField):
            return None, carry(decision.levels[:, index], size, "max").contiguous()
        if self._rows is None:
            self._rows = threshold_row(decision.thresholds)
        tau, row = (carry(x[:, index], size, "min").contiguous() for x in (decision.thresholds, self._rows))
        return tau, row

    def _store_output(self, y: Tensor) -> None:
        state = self.state
        if state.reference == "previous" or not len(self.rest):
            state.outputs[self.position] = y
        elif len(self.key):
            state.outputs[self.position][self.key] = y[self.key]
        state.versions[self.position] = state.outputs[self.position]._version

    def finish(self) -> FrameCost:
        """Check that the pass made every call and changed no stored reference, and return its cost."""
        if self.position != len(self.plans):
            raise NetworkError(
                f"The network made {self.position} operator calls instead of the {len(self.plans)} seen when it "
                "was wrapped. Control flow that depends on the data is not supported."
            )
        for position, plan in enumerate(self.plans):
            self._check_untouched(plan.site, position)
        inputs, outputs = sum(s.input_elements for s in self.sites), sum(s.output_elements for s in self.sites)
        elementwise = torch.where(self.refresh, float(inputs), float(3 * inputs + outputs)).double()
        return FrameCost(self._bops(), self.refresh.clone(), elementwise)

    def _check_untouched(self, site: Site, position: int) -> None:
        if self.state.outputs[position]._version != self.state.versions[position]:
            raise NetworkError(
                f"The output of layer {site.operator.name!r} was overwritten in place by a path not seen when the "
                "network was wrapped. Use out-of-place operations there."
            )

    def _bops(self) -> Float64[Tensor, "b s gh gw"]:
        """BOPs by clip, site and region: sum over pixels of cost(w, a(p)) n(p), shared among the regions."""
        config, grid = self.config, self.decision.grid
        bops = torch.zeros(len(self.refresh), len(self.plans), *grid, dtype=torch.float64)
        if len(self.key):
            cost = bit_cost(config.key_weight_bits, config.key_activation_bits, config.bops_convention)
            bops[self.key.cpu()] = _keyframe_bops(self.sites, grid, cost)
        places: dict[tuple[Pair, torch.dtype], list[int]] = {}  # sites that are summed together
        for position, cost_map in enumerate(self._costs):
            pooling = self._pooling(position)
            places.setdefault(((cost_map.shape[1], cost_map.shape[2]), pooling.columns.dtype), []).append(position)
        for members in places.values():
            poolings = [self._pooling(position) for position in members]
            costs = torch.stack([self._costs[position] for position in members], 1).cpu()
            spent = (costs * torch.stack([pooling.coverage for pooling in poolings])).to(poolings[0].columns.dtype)
            by_region = poolings[0].rows @ (spent @ poolings[0].columns).double()
            macs = torch.tensor([float(self.plans[p].site.macs_per_pixel) for p in members], dtype=torch.float64)
            bops[self.rest.cpu()[:, None], torch.tensor(members)] = by_region * macs[:, None, None]
        return bops

    def _pooling(self, position: int) -> "_Pooling":
        plan, cost = self.plans[position], self._costs[position]
        size = (cost.shape[1], cost.shape[2])
        return _pooling(plan.site.operator.geometry, size, self.decision.grid, max(plan.costs))


@dataclass(frozen=True)
class _Pooling:
    """Coverage of an input, and the matrices that sum it over regions when multiplied from the left and the right.

    `columns`, which come first, are in single precision where their sums are exact in it.
    """

    coverage: Tensor
    rows: Tensor
    columns: Tensor


@lru_cache(maxsize=1024)
def _pooling(geometry: Geometry, size: Pair, grid: Pair, highest: float) -> _Pooling:
    """How costs of up to `highest` are summed over regions."""
    coverage = geometry.coverage(size)
    whole = size[1] >= grid[1]  # no pixel is shared between columns of regions
    small = size[1] * float(coverage.max()) * highest < EXACT_SUMS
    exact = torch.float32 if whole and small else torch.float64
    rows, columns = _exact_share(size[0], grid[0]), _exact_share(size[1], grid[1]).T.contiguous()
    return _Pooling(coverage, rows, columns.to(exact))


def _keyframe_bops(sites: Sequence[Site], grid: Pair, cost: int) -> Float64[Tensor, "s gh gw"]:
    """BOPs of a keyframe, of which every multiply-accumulate costs the same."""
    found = []
    for site in sites:
        size = (site.input_shape[1], site.input_shape[2]) if site.operator.channel_axis == 1 else (1, 1)
        found.append(_even_bops(site.operator.geometry, size, grid, cost) * site.macs_per_pixel)
    return torch.stack(found)


@lru_cache(maxsize=1024)
def _even_bops(geometry: Geometry, size: Pair, grid: Pair, cost: int) -> Float64[Tensor, "gh gw"]:
    """Costs of an input by region, for one channel in and out, where every pixel costs the same."""
    pooling = _pooling(geometry, size, grid, float(cost))
    spent = (cost * pooling.coverage).to(pooling.columns.dtype)
    return pooling.rows @ (spent @ pooling.columns).double()


def _exact_share(length: int, cells: int) -> Float64[Tensor, "cells length"]:
    """The share of each position's cost that each cell bears, in double precision: regions must sum to the whole."""
    members = (cells_of(length, cells)[1] > 0).double()
    return members / members.sum(0)
