"""Frames that cost no more than a limit, whatever is decided for them.

What a layer will cost under any threshold follows from the magnitudes of its residual before it multiplies. So a layer
gets an allowance of what is left of the frame's limit, and where the decision's thresholds would cost more, the
smallest floor under them that fits: tau' = max(tau, floor), by clip. An infinite floor leaves the lowest level
everywhere, which costs least; as much is set aside for every layer from the beginning. With R what is left beyond that
and w the weights of the layers, layer i may spend its least and

    R w_i / (w_i + w_(i+1) + ... + w_n)

more; what it does not spend is left to the layers after it. What levels cost is known before the frame runs: they are
lowered to the highest cap that fits, one for the whole frame.

A keyframe that does not fit runs as the finest residual that does (thresholds of 0 and the floors). On the first frame
of a stream that is a residual against nothing, inputs of 0, and the frames that follow refine it.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from resq_rl.errors import PolicyError
from resq_rl.quantization.graph.operators import Pair
from resq_rl.quantization.kernels.plain import Choice, choose, smallest_floor
from resq_rl.quantization.quantizers.residual import ResidualTable, threshold_row
from resq_rl.quantization.running.execution import Execution
from resq_rl.quantization.running.plans import ProductPlan, SitePlan, keyframe_output
from resq_rl.quantization.running.spending import by_tile, frame_bops
from resq_rl.quantization.specification.budget import ROUNDING, exceeds
from resq_rl.quantization.specification.costs import Convention, CostTable
from resq_rl.quantization.specification.fields import DEFAULT_KAPPA, Field, LevelField, ThresholdField

__all__ = ["BudgetedExecution", "LayerCosts"]


class LayerCosts:
    """What each layer of a model costs at least, and its weight where layers share what a frame may cost.

    The weight of a layer is what it costs at the highest level everywhere, beyond its least.

    Attributes:
        least: BOPs of a frame of which every layer runs at its lowest level: products and overheads.
        keyframe: BOPs of a keyframe.
        lowest: by site, BOPs at the lowest level; 0 for products.
        share: by site, its weight over the weights of the sites from it on.
        coverage: by site, how often each pixel or token is read; None for products.
        by_level: by site, as `Kernels.fit` takes them; None for products.
    """

    def __init__(self, plans: Sequence[SitePlan | ProductPlan], cost: Convention | CostTable) -> None:
        refresh = torch.tensor([True])
        self.keyframe = float(frame_bops(plans, {}, refresh, (1, 1), cost).sum())
        overhead = float(frame_bops(plans, {}, ~refresh, (1, 1), cost).sum())
        layers = [plan if isinstance(plan, SitePlan) else None for plan in plans]
        self.lowest = [0.0 if plan is None else float(_single(plan)[0]) * plan.site.macs for plan in layers]
        self.least = overhead + sum(self.lowest)
        weights = [0.0 if p is None else (max(p.costs) - p.costs[0]) * p.site.macs for p in layers]
        self.share = [w and w / sum(weights[i:]) for i, w in enumerate(weights)]
        self.coverage = [None if plan is None else _coverage(plan) for plan in layers]
        self.by_level = [None if plan is None else _by_level(plan) for plan in layers]


def _coverage(plan: SitePlan) -> Tensor:
    """How often each pixel of the input is read; each token is read once."""
    site = plan.site
    if site.operator.channel_axis != 1:
        return torch.ones(1, math.prod(site.input_shape[:-1]), dtype=torch.int32)
    return site.operator.geometry.coverage((site.input_shape[1], site.input_shape[2])).to(torch.int32)


def _single(plan: SitePlan) -> Float64[Tensor, " l"]:
    """Costs by level as the ledger adds them up: rounded to single precision."""
    return torch.tensor(plan.costs, dtype=torch.float32).double()


def _by_level(plan: SitePlan) -> Float64[Tensor, " l"]:
    site = plan.site
    costs = _single(plan)
    steps = costs.diff() * site.operator.macs_per_tap
    return torch.cat([costs[:1] * site.macs, steps])


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
        super().__init__(plans, config, kernels, state, refresh & ~over, _finest(decision, over), *rest)
        self._allowed = costs
        own = self.rest.cpu()
        self._over, self._limit = over[own], limit[own]
        self._left = self._limit - costs.least  # beyond the lowest levels, of the layers still to come
        if isinstance(self.rest_decision, LevelField) and len(own):
            self.rest_decision = self._lowered(self.rest_decision)

    def _lowered(self, field: LevelField) -> LevelField:
        """The levels under the highest cap, by clip, under which the frame fits its limit."""
        levels = field.levels
        for cap in range(len(self.config.levels) - 1, 0, -1):
            over = exceeds(self._level_bops(LevelField(levels)), self._limit)
            if not bool(over.any()):
                break
            levels = torch.where(over[:, None, None, None], levels.clamp_max(cap - 1), levels)
        return LevelField(levels)

    def _level_bops(self, field: LevelField) -> Float64[Tensor, " k"]:
        """BOPs of the frame under levels."""
        before, self.rest_decision = self.rest_decision, field
        for position, plan in enumerate(self.plans):
            if isinstance(plan, SitePlan):
                self.position = position
                coverage = self._allowed.coverage[position]
                assert coverage is not None  # as of all layers
                index = self._carried_to(plan, (coverage.shape[0], coverage.shape[1]))[1]
                self._note(plan.site, torch.tensor(plan.costs)[index])
        refresh = torch.zeros(len(field.levels), dtype=torch.bool)
        bops = frame_bops(self.plans, self._costs, refresh, (1, 1), self.config.cost).sum((1, 2, 3))
        self._costs, self._carried, self.position, self.rest_decision = {}, {}, 0, before
        return bops

    def _run(self, plan: SitePlan, x: Tensor) -> Tensor:
        if len(self.state.inputs) == self.position and len(self.rest):
            self._begin(plan, x)
        return super()._run(plan, x)

    def _begin(self, plan: SitePlan, x: Tensor) -> None:
        """Take nothing for the reference."""
        y, values = keyframe_output(plan, self.kernels, torch.zeros_like(x))
        self.state.inputs.append(values)
        self.state.outputs.append(y)
        self.state.versions.append(y._version)

    def _choice(
        self, plan: SitePlan, table: ResidualTable, image: Float[Tensor, "b c h w"], before: Float[Tensor, "b c h w"]
    ) -> Choice:
        """The quantizers under thresholds that keep to the layer's allowance."""
        choice = super()._choice(plan, table, image, before)
        if choice.tau is None and not bool(self._over.any()):
            return choice  # levels fit since they were lowered
        wanted = choice if choice.tau is not None else self._keyframe_choice(plan, table, choice)
        floor = self._fitting_floor(plan, wanted, image, before)
        if wanted is choice and not bool(floor.any()):
            return choice
        assert wanted.tau is not None  # as of all choices by thresholds
        tau = torch.maximum(wanted.tau, floor[:, None, None])
        row = torch.maximum(wanted.index, threshold_row(floor)[:, None, None])
        if wanted is not choice:
            return self._beside_levels(wanted, choice, tau, row)
        return Choice(wanted.steps, row, tau, wanted.sigma, wanted.kappa)

    def _fitting_floor(
        self, plan: SitePlan, choice: Choice, image: Float[Tensor, "b c h w"], before: Float[Tensor, "b c h w"]
    ) -> Float[Tensor, " b"]:
        """The floor of thresholds of each clip; its cost is taken from what is left."""
        own, at = self._allowed, self.position
        coverage, by_level = own.coverage[at], own.by_level[at]
        assert coverage is not None  # as of all layers
        assert by_level is not None
        allowance = (own.lowest[at] + self._left.clamp_min(0) * own.share[at]) * (1 + ROUNDING)
        tile = self.config.cost.tile if isinstance(self.config.cost, CostTable) else (1, 1)
        device = image.device
        if tile == (1, 1) or plan.site.operator.channel_axis != 1:
            given = (part.to(device) for part in (coverage, by_level, allowance))
            floor, spent = self.kernels.fit(image, before, choice, *given)
        else:
            floor, spent = smallest_floor(_by_tile(plan, choice, image, before, tile), allowance.to(device))
        self._left = self._left - (spent.cpu() - own.lowest[at])
        return floor

    def _keyframe_choice(self, plan: SitePlan, table: ResidualTable, levels: Choice) -> Choice:
        """Thresholds of 0, for keyframes that do not fit beside clips that run by levels."""
        kappa = _kappa(len(plan.costs))
        tau = torch.zeros(levels.index.shape, dtype=torch.float32, device=levels.index.device)
        steps = table.lookup(kappa, plan.costs, tau.device)
        return Choice(steps, threshold_row(tau), tau, table.sigma, kappa)

    def _beside_levels(self, wanted: Choice, levels: Choice, tau: Tensor, row: Tensor) -> Choice:
        """Thresholds for keyframes that do not fit, and levels for the other clips, in one table.

        A level has a row of its own below those of the thresholds, of which an infinite threshold takes the first entry.
        """
        width = len(wanted.kappa) + 1
        below = torch.zeros(4, width, width, dtype=torch.float32, device=tau.device)
        below[:, :, 0] = levels.steps
        by_threshold = self._over.to(tau.device)[:, None, None]
        first = wanted.steps.shape[1] // width
        return Choice(
            torch.cat([wanted.steps, below.flatten(1)], 1),
            torch.where(by_threshold, row, first + levels.index),
            torch.where(by_threshold, tau, math.inf),
            wanted.sigma,
            wanted.kappa,
        )


def _kappa(levels: int) -> tuple[float, ...]:
    """Multipliers of a threshold for keyframes that do not fit and whose decision has none."""
    return DEFAULT_KAPPA if len(DEFAULT_KAPPA) == levels - 1 else tuple(2.0**j for j in range(levels - 1))


def _check_limit(limit: Float64[Tensor, " b"], costs: LayerCosts, clips: int) -> None:
    if limit.shape != (clips,) or bool((~(limit >= costs.least)).any()):
        raise PolicyError(
            f"A limit of at least {costs.least:g} BOPs is needed for each of {clips} clips, since products of "
            f"activations and overheads cost so much in every frame; got {limit.tolist()}. Raise the budget."
        )


def _finest(decision: Field, over: Bool[Tensor, " b"]) -> Field:
    """The decision with thresholds of 0 for the clips of keyframes that do not fit."""
    if isinstance(decision, LevelField) or not bool(over.any()):
        return decision
    every = over.to(decision.thresholds.device)[:, None, None, None]
    return ThresholdField(torch.where(every, 0.0, decision.thresholds), decision.kappa)


def _by_tile(
    plan: SitePlan, choice: Choice, image: Float[Tensor, "b c h w"], before: Float[Tensor, "b c h w"], tile: Pair
) -> Callable[[Float[Tensor, " b"]], Float64[Tensor, " b"]]:
    """The cost of a layer of each clip under floors of thresholds, where tiles are computed together."""
    assert choice.tau is not None  # as of all choices by thresholds
    wanted, magnitude, row = choice.tau, (image - before).abs().amax(1), torch.zeros_like(choice.index)
    geometry = plan.site.operator.geometry
    reads = geometry.coverage((image.shape[2], image.shape[3])).to(image.device).double()
    costs = torch.tensor(plan.costs, dtype=torch.float32, device=image.device)

    def spent(floor: Float[Tensor, " b"]) -> Float64[Tensor, " b"]:
        tau = torch.maximum(wanted, floor[:, None, None])
        cost = by_tile(costs[choose(magnitude, row, tau, choice.sigma, choice.kappa)], tile)
        total: Tensor = (cost.double() * reads).sum((1, 2)) * plan.site.operator.macs_per_tap
        return total

    return spent
