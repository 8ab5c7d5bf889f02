"""What one pass cost: bit-operations by clip, operator call and region, from the cost of every pixel or token."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from resq_rl.quantization.graph.operators import Geometry, Pair
from resq_rl.quantization.kernels.plain import EXACT_SUMS
from resq_rl.quantization.running.plans import ProductPlan, SitePlan, Spending, highest_cost
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
    if maps:
        groups, order = _groups(tuple(_spending(plans[position]) for position in maps), grid)
        costs = list(maps.values())
        residual = torch.cat([_group_bops(group, costs) for group in groups], 1)
        bops[torch.nonzero(~refresh), torch.tensor(list(maps))[order]] = residual
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


def _spending(plan: SitePlan | ProductPlan) -> Spending:
    assert isinstance(plan, SitePlan)  # products have no map of costs
    return plan.spending


@dataclass(frozen=True)
class _Group:
    """Layers that are summed together: which they are among those given, their coverage, and what they share."""

    members: list[int]
    coverage: Tensor
    rows: Tensor
    columns: Tensor
    macs: Tensor


@lru_cache(maxsize=256)
def _groups(layers: tuple[Spending, ...], grid: Pair) -> tuple[list[_Group], Int64[Tensor, " n"]]:
    """The groups of some layers, and the members of all groups, one after the other."""
    alike: dict[tuple[Any, ...], list[tuple[int, _Pooling]]] = {}
    for i, layer in enumerate(layers):
        pooling = _pooling(layer.geometry, layer.size, grid, layer.highest)
        key = pooling.columns.dtype, layer.size, layer.geometry.line
        alike.setdefault(key, []).append((i, pooling))
    groups = []
    for (exact, *_), own in alike.items():
        members, poolings = [i for i, _ in own], [pooling for _, pooling in own]
        coverage = torch.stack([pooling.coverage for pooling in poolings]).to(exact)
        macs = torch.tensor([float(layers[i].macs_per_tap) for i in members], dtype=torch.float64)[:, None, None]
        groups.append(_Group(members, coverage, poolings[0].rows, poolings[0].columns, macs))
    return groups, torch.tensor([i for group in groups for i in group.members])


def _group_bops(group: _Group, maps: Sequence[Float[Tensor, "k h w"]]) -> Float64[Tensor, "k n gh gw"]:
    costs = torch.stack([maps[i] for i in group.members], 1).cpu()
    along_rows = (costs.to(group.coverage.dtype) * group.coverage) @ group.columns
    by_region: Tensor = group.rows @ along_rows.double() * group.macs
    return by_region


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
    pooling = _pooling(geometry, size, grid, highest_cost((cost,)))
    spent = pooling.coverage.to(pooling.columns.dtype) * cost
    return pooling.rows @ (spent @ pooling.columns).double()


def _exact_share(length: int, cells: int) -> Float64[Tensor, "cells length"]:
    """The share of each position's cost that each cell bears, in double precision: regions must sum to the whole."""
    members = (cells_of(length, cells)[1] > 0).double()
    return members / members.sum(0)
