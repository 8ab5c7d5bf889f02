"""What one pass cost: bit-operations by clip, operator call and region, from the cost of every pixel or token."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from resq_rl.quantization.graph.operators import Geometry, Pair
from resq_rl.quantization.kernels.plain import EXACT_SUMS
from resq_rl.quantization.running.plans import ProductPlan, SitePlan
from resq_rl.quantization.specification.costs import Convention, CostTable
from resq_rl.quantization.specification.fields import cells_of

__all__ = ["by_tile", "frame_bops"]


def frame_bops(
    plans: Sequence[SitePlan | ProductPlan],
    maps: Mapping[int, Float[Tensor, "k h w"]],
    refresh: Bool[Tensor, " b"],
    grid: Pair,
    cost: Convention | CostTable,
) -> Float64[Tensor, "b s gh gw"]:
    """BOPs by clip, site and region: sum over pixels of cost(w, a(p)) n(p), shared among the regions.

    Args:
        plans: the plans of all sites.
        maps: by position of a layer, what a multiply-accumulate costs at every pixel of the clips without a keyframe,
            summed over the blocks of its channels.
        refresh: which clips ran a keyframe.
        grid: rows and columns of regions.
        cost: the convention, or the table, whose overheads are added.
    """
    refresh = refresh.cpu()
    bops = torch.zeros(len(refresh), len(plans), *grid, dtype=torch.float64)
    if bool(refresh.any()):
        bops[refresh] = _keyframe_bops(plans, grid)
    for position, plan in enumerate(plans):
        if isinstance(plan, ProductPlan):
            bops[:, position] = plan.cost / (grid[0] * grid[1])
    rest = torch.nonzero(~refresh)
    for group in _groups(tuple(_spending(plans[at], at, m) for at, m in maps.items()), grid):
        costs = torch.stack([maps[position] for position in group.positions], 1).cpu()
        by_region = group.rows @ ((costs.to(group.coverage.dtype) * group.coverage) @ group.columns).double()
        bops[rest, group.index] = by_region * group.macs
    if isinstance(cost, CostTable):
        bops += (cost.operator + cost.frame / len(plans)) / (grid[0] * grid[1])
    return bops


def by_tile(cost: Float[Tensor, "b h w"], tile: Pair) -> Float[Tensor, "b h w"]:
    """The cost of each pixel as that of the dearest pixel of its tile."""
    if tile == (1, 1):
        return cost
    highest = F.max_pool2d(cost, tile, ceil_mode=True)
    spread = highest.repeat_interleave(tile[0], 1).repeat_interleave(tile[1], 2)
    return spread[:, : cost.shape[1], : cost.shape[2]]


class _Spending(NamedTuple):
    """What decides how the costs of a layer's pixels or tokens are summed."""

    position: int
    geometry: Geometry
    size: Pair
    highest: float
    macs_per_tap: int  # of one block


def _spending(plan: SitePlan | ProductPlan, position: int, cost: Float[Tensor, "k h w"]) -> _Spending:
    assert isinstance(plan, SitePlan)  # products have no map of costs
    operator = plan.site.operator
    crowd = 1.0 if operator.channel_axis == 1 else plan.site.tokens.crowd
    size, highest = (cost.shape[1], cost.shape[2]), _highest(plan.costs) * crowd * plan.blocks
    return _Spending(position, operator.geometry, size, highest, operator.macs_per_tap // plan.blocks)


@dataclass(frozen=True)
class _Group:
    """Layers that are summed together: their coverage, and what they share."""

    positions: tuple[int, ...]
    index: Tensor
    coverage: Tensor
    rows: Tensor
    columns: Tensor
    macs: Tensor


@lru_cache(maxsize=256)
def _groups(layers: tuple[_Spending, ...], grid: Pair) -> list[_Group]:
    alike: dict[tuple[Any, ...], list[tuple[_Spending, _Pooling]]] = {}
    for layer in layers:
        pooling = _pooling(layer.geometry, layer.size, grid, layer.highest)
        key = pooling.columns.dtype, layer.size, layer.geometry.line
        alike.setdefault(key, []).append((layer, pooling))
    groups = []
    for (exact, *_), members in alike.items():
        own, poolings = zip(*members, strict=True)
        positions = tuple(layer.position for layer in own)
        coverage = torch.stack([pooling.coverage for pooling in poolings]).to(exact)
        macs = torch.tensor([float(layer.macs_per_tap) for layer in own], dtype=torch.float64)[:, None, None]
        groups.append(_Group(positions, torch.tensor(positions), coverage, poolings[0].rows, poolings[0].columns, macs))
    return groups


@dataclass(frozen=True)
class _Pooling:
    """Coverage of an input, and the matrices that sum it over regions when multiplied from the left and the right.

    `columns`, which come first, are in single precision where their sums are exact in it.
    """

    coverage: Tensor
    rows: Tensor
    columns: Tensor


def _highest(costs: Sequence[float]) -> float:
    """The highest of whole costs; infinite if one is not whole, since then no sum is exact in single precision."""
    return max(costs) if all(float(cost).is_integer() for cost in costs) else math.inf


@lru_cache(maxsize=1024)
def _pooling(geometry: Geometry, size: Pair, grid: Pair, highest: float) -> _Pooling:
    """How whole costs of up to `highest` are summed over regions: along rows in single precision where it is exact."""
    coverage = geometry.coverage(size)
    whole = size[1] >= grid[1]  # no pixel is shared between columns of regions
    small = size[1] * float(coverage.max()) * highest < EXACT_SUMS
    exact = torch.float32 if whole and small else torch.float64
    if geometry.line:  # at no place of the frame: all regions share its cost
        rows = torch.full((grid[0], size[0]), 1 / grid[0], dtype=torch.float64)
        return _Pooling(coverage, rows, torch.full((size[1], grid[1]), 1 / grid[1], dtype=torch.float64))
    rows, columns = _exact_share(size[0], grid[0]), _exact_share(size[1], grid[1]).T.contiguous()
    return _Pooling(coverage, rows, columns.to(exact))


def _keyframe_bops(plans: Sequence["SitePlan | ProductPlan"], grid: Pair) -> Float64[Tensor, "s gh gw"]:
    """BOPs of a keyframe, of which each multiply-accumulate of a site costs the same; 0 for products."""
    found = []
    for plan in plans:
        if isinstance(plan, ProductPlan):
            found.append(torch.zeros(grid, dtype=torch.float64))
            continue
        site, operator, cost = plan.site, plan.site.operator, plan.keyframe_cost
        if operator.channel_axis == 1:
            spent = _even_bops(operator.geometry, (site.input_shape[1], site.input_shape[2]), grid, cost)
        else:
            tokens = site.tokens
            pooling = _pooling(operator.geometry, tokens.size, grid, math.inf)
            spent = (
                pooling.rows @ tokens.by_pixel(torch.full((1, 1, len(tokens.index)), float(cost)))[0] @ pooling.columns
            )
        found.append(spent * operator.macs_per_tap)
    return torch.stack(found)


@lru_cache(maxsize=1024)
def _even_bops(geometry: Geometry, size: Pair, grid: Pair, cost: float) -> Float64[Tensor, "gh gw"]:
    """Costs of an input by region, for one channel in and out, where every pixel costs the same."""
    pooling = _pooling(geometry, size, grid, _highest((cost,)))
    spent = pooling.coverage.to(pooling.columns.dtype) * cost
    return pooling.rows @ (spent @ pooling.columns).double()


def _exact_share(length: int, cells: int) -> Float64[Tensor, "cells length"]:
    """The share of each position's cost that each cell bears, in double precision: regions must sum to the whole."""
    members = (cells_of(length, cells)[1] > 0).double()
    return members / members.sum(0)
