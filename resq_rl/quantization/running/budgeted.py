"""Frames that cost no more than a limit, whatever is decided for them.

What a layer will cost under any threshold follows from the magnitudes of its residual before it multiplies. So a layer
gets an allowance of what is left of the frame's limit, and where the decision's thresholds would cost more, the
smallest floor under them that fits: tau' = max(tau, floor), by clip. An infinite floor leaves the lowest level
everywhere, which costs least; as much is set aside for every layer from the beginning. With R what is left beyond that
and c_i what layer i of n costs at its highest level everywhere, beyond its least, it may spend its least and

    R w_i / (w_i + w_(i+1) + ... + w_n),      w_i = c_i^0.7 2^(-i/n),

more; what it does not spend is left to the layers after it. So cheap layers get finer codes than expensive ones, and
early layers, on whose outputs all others build, than late ones. What levels cost is known before the frame runs: they
are lowered to the highest cap that fits, one for the whole frame.

A keyframe that does not fit runs as the finest residual that does: under thresholds of 0 and the floors, with
quantizers for the range of keyframes. On the first frame of a stream that is a residual against nothing, which are
inputs of 0, and the frames that follow refine it. Later, a layer whose input is nearer to nothing than to its reference
begins again from nothing: after a cut, most do.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from resq_rl.errors import PolicyError
from resq_rl.quantization.graph.operators import Pair
from resq_rl.quantization.graph.tracing import Site
from resq_rl.quantization.kernels.plain import FLOORS, Allowance, Choice, choose, smallest_floor
from resq_rl.quantization.quantizers.residual import ResidualTable, threshold_row
from resq_rl.quantization.running.execution import Execution, Image, Run
from resq_rl.quantization.running.plans import ProductPlan, SitePlan, keyframe_output
from resq_rl.quantization.running.spending import by_tile, frame_bops
from resq_rl.quantization.specification.budget import exceeds
from resq_rl.quantization.specification.costs import Convention, CostTable
from resq_rl.quantization.specification.fields import DEFAULT_KAPPA, LevelField

__all__ = ["BudgetedExecution", "LayerCosts"]

# How a frame's budget is shared among layers, found on validation clips of generated video.
CHEAP, EARLY = 0.7, 2.0
# Standard deviations in the range of inputs, so that thresholds for it lie where those of residuals do.
DEVIATIONS = 8


class LayerCosts:
    """What each layer of a model costs at least, and its share of what a frame may cost.

    Args:
        plans: the plans of all sites.
        cost: the convention, or the table.

    Attributes:
        least: BOPs of a frame of which every layer runs at its lowest level: products and overheads.
        keyframe: BOPs of a keyframe.
        lowest: by site, BOPs at the lowest level; 0 for products.
        share: by site, of what is left when it runs.
        coverage: by site, how often each pixel or token is read; None for products.
        by_level: by site, as `Kernels.fit` takes them; None for products.
        openings: by site, the quantizers of keyframes that do not fit; None for products.
    """

    def __init__(self, plans: Sequence[SitePlan | ProductPlan], cost: Convention | CostTable) -> None:
        refresh = torch.tensor([True])
        self.keyframe = float(frame_bops(plans, {}, refresh, (1, 1), cost).sum())
        overhead = float(frame_bops(plans, {}, ~refresh, (1, 1), cost).sum())
        layers = [plan if isinstance(plan, SitePlan) else None for plan in plans]
        self.lowest = [0.0 if plan is None else float(_single(plan)[0]) * plan.site.macs for plan in layers]
        self.least = overhead + sum(self.lowest)
        extra = [0.0 if p is None else (max(p.costs) - p.costs[0]) * p.site.macs for p in layers]
        weights = [cost**CHEAP * EARLY ** (-i / len(extra)) for i, cost in enumerate(extra)]
        self.share = [w and w / sum(weights[i:]) for i, w in enumerate(weights)]
        self.coverage = [None if plan is None else _coverage(plan) for plan in layers]
        self.by_level = [None if plan is None else _by_level(plan) for plan in layers]
        self.openings = [None if plan is None else _opening(plan) for plan in layers]


def _coverage(plan: SitePlan) -> Tensor:
    """How often each pixel of the input is read; each token is read once."""
    site = plan.site
    if site.operator.channel_axis != 1:
        return torch.ones(1, math.prod(site.input_shape[:-1]), dtype=torch.int32)
    coverage = site.operator.geometry.coverage((site.input_shape[1], site.input_shape[2]))
    return coverage.to(torch.int32).contiguous()


def _single(plan: SitePlan) -> Float64[Tensor, " l"]:
    """Costs by level as the ledger adds them up: rounded to single precision."""
    return torch.tensor(plan.costs, dtype=torch.float32).double()


def _by_level(plan: SitePlan) -> Float64[Tensor, " l"]:
    costs = _single(plan)
    return torch.cat([costs[:1] * plan.site.macs, costs.diff() * plan.site.operator.macs_per_tap])


def _opening(plan: SitePlan) -> ResidualTable:
    """Quantizers like those of residuals, for the range of a keyframe's inputs."""
    table = plan.ranges.residual["previous"]
    step, low, high = (torch.as_tensor(bound, dtype=torch.float64).cpu() for bound in plan.ranges.keyframe.bounds)
    reach = float((torch.maximum(low.abs(), high.abs()) * step).max())
    return replace(table, sigma=reach / DEVIATIONS, step=reach / (table.limits[-1] * table.units[-1]))


class BudgetedExecution(Execution):
    """Runs every operator of one pass as `Execution` does, at no more than `limit`.

    Args:
        limit: BOPs that the frame of each clip may cost.
        costs: of the layers.

    Raises:
        PolicyError: a limit is below what every frame costs.
    """

    def __init__(
        self,
        plans: Sequence[SitePlan | ProductPlan],
        *execution: Any,
        limit: Float64[Tensor, " b"],
        costs: LayerCosts,
    ) -> None:
        config, kernels, state, refresh, decision, *rest = execution
        _check_limit(limit, costs, len(refresh))
        over = refresh & exceeds(torch.full_like(limit, costs.keyframe), limit)
        super().__init__(plans, config, kernels, state, refresh & ~over, decision, *rest)
        self.layer_costs = costs
        self.rest, self.opened, self._moved = (
            torch.nonzero(which)[:, 0].to(self.device) for which in (~refresh, over, refresh)
        )
        self.rest_decision = decision.rows(self.rest)
        self._residual_rows = torch.nonzero(~self.refresh)[:, 0]
        left = limit - costs.least  # beyond the lowest levels, of the layers still to come
        self._rest_left, self._opened_left = left[self.rest.cpu()], left[self.opened.cpu()]
        self._noted: dict[int, Tensor] = {}  # costs of all clips, by position
        if isinstance(self.rest_decision, LevelField) and len(self.rest):
            self.rest_decision = self._lowered(self.rest_decision, limit[self.rest.cpu()])

    def _parts(self) -> list[tuple[Tensor, Run]]:
        return [*super()._parts(), (self.opened, self._opened)]

    def _lowered(self, field: LevelField, limit: Float64[Tensor, " k"]) -> LevelField:
        """The levels under the highest cap, by clip, under which the frame fits its limit."""
        levels = field.levels
        for cap in range(len(self.config.levels) - 1, 0, -1):
            over = exceeds(self._level_bops(LevelField(levels)), limit)
            if not bool(over.any()):
                break
            levels = torch.where(over[:, None, None, None], levels.clamp_max(cap - 1), levels)
        return LevelField(levels)

    def _level_bops(self, field: LevelField) -> Float64[Tensor, " k"]:
        """BOPs of the frame under levels."""
        before, self.rest_decision, maps = self.rest_decision, field, {}
        for position, plan in enumerate(self.plans):
            if isinstance(plan, SitePlan):
                self.position = position
                coverage = self.layer_costs.coverage[position]
                assert coverage is not None  # as of all layers
                index = self._carried_to(plan, (coverage.shape[0], coverage.shape[1]))[1]
                maps[position] = self._placed(plan.site, torch.tensor(plan.costs)[index] * plan.blocks)
        self._carried, self.position, self.rest_decision = {}, 0, before
        refresh = torch.zeros(len(field.levels), dtype=torch.bool)
        return frame_bops(self.plans, maps, refresh, (1, 1), self.config.cost).sum((1, 2, 3))

    def _run(self, plan: SitePlan, x: Tensor) -> Tensor:
        if len(self.state.inputs) == self.position and len(self._residual_rows):  # a stream begins with nothing
            y, values = self._nothing(plan, x)
            self.state.inputs.append(values)
            self.state.outputs.append(y)
            self.state.versions.append(y._version)
        y = super()._run(plan, x)
        if self.position in self._noted:
            self._costs[self.position] = self._noted[self.position][self._residual_rows]
        return y

    def _nothing(self, plan: SitePlan, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output of inputs of 0 in the shape of `x`, and the values that stand for them."""
        return keyframe_output(plan, self.kernels, torch.zeros_like(x))

    def _note(self, site: Site, cost: Float[Tensor, "b h w"], rows: Any) -> None:
        placed = self._placed(site, cost)
        if isinstance(rows, slice):
            self._costs[self.position] = placed
            return
        if self.position not in self._noted:
            self._noted[self.position] = placed.new_zeros(len(self.refresh), *placed.shape[1:])
        self._noted[self.position][rows] = placed

    def _opened(self, plan: SitePlan, x: Tensor, rows: Any) -> Tensor:
        """The finest residual that fits, in place of a keyframe."""
        self._forget(plan, x, rows)
        table = self.layer_costs.openings[self.position]
        assert table is not None  # as of all layers
        y, cost = self._added(plan, x, rows, table, self._opening_choice, moves=True)
        self._note(plan.site, cost, rows)
        return y

    def _forget(self, plan: SitePlan, x: Tensor, rows: Any) -> None:
        """Begin the references of a layer again from nothing in those clips whose input is nearer to that."""
        state, at = self.state, self.position
        residual = (x - state.inputs[at][rows]).abs().flatten(1).sum(1)
        nearer = x.abs().flatten(1).sum(1) < residual
        if not bool(nearer.any()):
            return
        own = torch.arange(len(self.refresh), device=x.device)[rows][nearer]
        y, values = self._nothing(plan, x[:1])
        # What is held may be in other hands: what the last frame returned, or a keyframe that many clips share.
        state.inputs[at], state.outputs[at] = state.inputs[at].clone(), state.outputs[at].clone()
        state.inputs[at][own], state.outputs[at][own] = values, y

    def _opening_choice(self, plan: SitePlan, table: ResidualTable, image: Image, before: Image) -> Choice:
        tau = image.new_zeros(len(image), *image.shape[2:])
        levels = len(plan.costs)
        kappa = DEFAULT_KAPPA if len(DEFAULT_KAPPA) == levels - 1 else tuple(2.0**j for j in range(levels - 1))
        steps = table.lookup(kappa, plan.costs, tau.device)
        choice = Choice(steps, threshold_row(tau), tau, table.sigma, kappa, plan.blocks)
        return self._within(self._opened_left, plan, choice, image, before)

    def _choice(self, plan: SitePlan, table: ResidualTable, image: Image, before: Image) -> Choice:
        """The quantizers under thresholds that keep to the layer's allowance; levels were lowered before."""
        choice = super()._choice(plan, table, image, before)
        return choice if choice.tau is None else self._within(self._rest_left, plan, choice, image, before)

    def _within(
        self, left: Float64[Tensor, " k"], plan: SitePlan, choice: Choice, image: Image, before: Image
    ) -> Choice:
        """The choice under which a layer keeps to its share of what is left, from which its cost is taken."""
        own, at, device = self.layer_costs, self.position, image.device
        coverage, by_level = own.coverage[at], own.by_level[at]
        assert coverage is not None  # as of all layers
        assert by_level is not None
        allowance = Allowance(left, own.share[at], by_level.to(device), coverage.to(device), _rows())
        tile = self.config.cost.tile if isinstance(self.config.cost, CostTable) else (1, 1)
        if tile == (1, 1) or plan.site.operator.channel_axis != 1:
            return replace(choice, allowance=allowance)
        spent = _by_tile(plan, choice, image, before, tile)
        return choice.raised(*smallest_floor(spent, allowance, own.lowest[at]))


@lru_cache(maxsize=1)
def _rows() -> Int64[Tensor, " n"]:
    return threshold_row(FLOORS)


def _check_limit(limit: Float64[Tensor, " b"], costs: LayerCosts, clips: int) -> None:
    if limit.shape != (clips,) or bool((~(limit >= costs.least)).any()):
        raise PolicyError(
            f"A limit of at least {costs.least:g} BOPs is needed for each of {clips} clips, since products of "
            f"activations and overheads cost so much in every frame; got {limit.tolist()}. Raise the budget."
        )


def _by_tile(
    plan: SitePlan, choice: Choice, image: Image, before: Image, tile: Pair
) -> Callable[[Float[Tensor, " b"]], Float64[Tensor, " b"]]:
    """The cost of a layer of each clip under floors of thresholds, where tiles are computed together."""
    assert choice.tau is not None  # as of all choices by thresholds
    wanted, magnitude, row = choice.tau, (image - before).abs().amax(1), torch.zeros_like(choice.index)
    geometry = plan.site.operator.geometry
    reads = geometry.coverage((image.shape[2], image.shape[3])).to(image.device).double()
    costs = torch.tensor(plan.costs, dtype=torch.float32, device=image.device)

    def spent(floor: Float[Tensor, " b"]) -> Float64[Tensor, " b"]:
        tau = torch.maximum(wanted, floor.to(wanted.device)[:, None, None])
        cost = by_tile(costs[choose(magnitude, row, tau, choice.sigma, choice.kappa)], tile)
        total: Tensor = (cost.double() * reads).sum((1, 2)) * plan.site.operator.macs_per_tap
        return total.cpu()

    return spent
