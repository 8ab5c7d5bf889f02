"""One quantized forward pass: the keyframe or residual arithmetic of every operator call, and its cost."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch._ops import OpOverload

from resq_rl.errors import NetworkError, PolicyError
from resq_rl.quantization.graph.operators import Pair, ResidualOperator, own_types
from resq_rl.quantization.graph.products import ProductSite, product_macs
from resq_rl.quantization.graph.tracing import AnySite, Site
from resq_rl.quantization.kernels.plain import Choice, Kernels
from resq_rl.quantization.quantizers.residual import ResidualTable, threshold_row
from resq_rl.quantization.running.plans import ProductPlan, SitePlan, keyframe_output
from resq_rl.quantization.running.products import quantized_product
from resq_rl.quantization.running.spending import by_tile, frame_bops
from resq_rl.quantization.running.state import StreamState
from resq_rl.quantization.specification.config import QuantizationConfig
from resq_rl.quantization.specification.costs import CostTable
from resq_rl.quantization.specification.fields import Field, LevelField, ThresholdField, carry
from resq_rl.quantization.specification.ledger import FrameCost

__all__ = ["Execution", "Image", "Run", "as_image", "numbered"]


Image = Float[Tensor, "b c h w"]
Run = Callable[[SitePlan, Tensor, Any], Tensor]
Chooser = Callable[[SitePlan, ResidualTable, Image, Image], Choice]


def check_order(sites: Sequence[AnySite], position: int, operator: ResidualOperator) -> None:
    """Raise NetworkError unless the operator is the one that a pass calls at this position."""
    site = sites[position] if position < len(sites) else None
    if not isinstance(site, Site) or site.operator is not operator:
        raise _out_of_order(f"layer {operator.name!r}")


def numbered(
    sites: Sequence[AnySite], execute: Callable[[int, ResidualOperator, Tensor], Tensor]
) -> Callable[[ResidualOperator, Tensor], Tensor]:
    """What runs the operators of one pass by `execute`, which gets the position of each call among `sites`."""
    position = 0

    def call(operator: ResidualOperator, x: Tensor) -> Tensor:
        nonlocal position
        check_order(sites, position, operator)
        position += 1
        return execute(position - 1, operator, x)

    return call


def _out_of_order(what: str) -> NetworkError:
    return NetworkError(
        f"The network called {what} out of the order seen when it was wrapped. Control flow that depends on the data "
        "is not supported: export the network, or wrap the part without it."
    )


class Execution:
    """Runs every operator of one pass, as a keyframe where `refresh`, else as a residual under `decision`.

    Products of activations run at key precision in either case.

    Args:
        plans: the plans of all sites, in order of execution.
        config: the configuration of the model.
        kernels: the kernels that run the arithmetic.
        state: the state of the clips; changed in place.
        constant: as of `Traced`.
    """

    def __init__(
        self,
        plans: Sequence[SitePlan | ProductPlan],
        config: QuantizationConfig,
        kernels: Kernels,
        state: StreamState,
        refresh: Bool[Tensor, " b"],
        decision: Field,
        constant: frozenset[int] = frozenset(),
    ) -> None:
        self.plans, self.config, self.kernels, self.constant = plans, config, kernels, constant
        self.state, self.refresh, self.decision = state, refresh, decision
        self.sites = [plan.site for plan in plans]
        self.device = next(plan.keyframe.codes.device for plan in plans if isinstance(plan, SitePlan))
        self.key = torch.nonzero(refresh)[:, 0].to(self.device)
        self.rest = torch.nonzero(~refresh)[:, 0].to(self.device)
        self.rest_decision = decision.rows(self.rest) if len(self.key) and len(self.rest) else decision
        self.position = 0  # among all sites
        self.products = 0  # products of matrices so far
        rows = (decision.levels if isinstance(decision, LevelField) else decision.thresholds).shape[1]
        self._by_layer = rows > 1 + max(plan.group for plan in plans)
        self._costs: dict[int, Tensor] = {}  # of residuals, by position
        self._carried: dict[tuple[int, Pair], tuple[Tensor | None, Tensor]] = {}  # by row of the decision, and size
        self._moved = self.key  # clips whose references are new whatever the reference mode

    def __call__(self, operator: ResidualOperator, x: Tensor) -> Tensor:
        """Compute the operator's quantized output and record its cost."""
        check_order(self.sites, self.position, operator)
        plan = self.plans[self.position]
        assert isinstance(plan, SitePlan)  # as the order says
        with own_types(), torch._C._DisableTorchDispatch():  # else `ProductCalls` would see the operator's own products
            y = plan.site.arrangement.returned(self._run(plan, self._entering(plan.site, x)))
        self.position += 1
        if y.dtype != plan.site.dtype:
            return y.to(plan.site.dtype)
        return y.clone() if plan.site.overwritten else y

    def product(self, func: OpOverload, args: Any, kwargs: Any) -> Tensor:
        """Compute a product of matrices, at key precision if it depends on the frame."""
        self.products += 1
        if self.products - 1 in self.constant:
            constant: Tensor = func(*args, **kwargs)
            return constant
        site = self.sites[self.position] if self.position < len(self.sites) else None
        if not isinstance(site, ProductSite) or site.macs * len(self.refresh) != product_macs(func, args):
            raise _out_of_order(f"a product of matrices ({func.name()})")
        if len(self.state.inputs) == self.position:  # it keeps no reference: what stands for one is empty
            self._append(torch.empty(len(self.refresh), 0, device=self.device))
        self.position += 1
        return quantized_product(func, args, kwargs, self.config.key_activation_bits, site.contracted)

    def _append(self, reference: Tensor) -> None:
        """Begin the references of the site at this position."""
        self.state.inputs.append(reference)
        self.state.outputs.append(reference.new_empty(len(reference), 0))
        self.state.versions.append(0)

    def _entering(self, site: Site, x: Tensor) -> Tensor:
        """An operator's input as float32, which everything behind this line computes in.

        Raises:
            NetworkError: the input is not one of those that the model was wrapped for.
        """
        fits = site.arrangement.fits(x, site.input_shape, len(self.refresh)) and x.is_floating_point()
        if not fits or x.layout != torch.strided or x.device != self.device:
            shape = len(self.refresh), *site.input_shape
            raise NetworkError(
                f"Layer {site.name!r} is called on {x.dtype} of shape {tuple(x.shape)} on {x.device}, and was wrapped "
                f"for floating-point numbers of shape {shape} on {self.device}."
            )
        x = site.arrangement.gathered(x.float())
        return x if site.operator.channel_axis == 1 else x.contiguous()

    def _run(self, plan: SitePlan, x: Tensor) -> Tensor:
        state = self.state
        if len(state.inputs) == self.position:
            self._append(torch.empty_like(x))
        elif len(self.rest):
            if state.inputs[self.position].shape != x.shape or state.inputs[self.position].dtype != x.dtype:
                raise PolicyError(
                    f"The state holds {state.inputs[self.position].dtype} of shape "
                    f"{tuple(state.inputs[self.position].shape)} for layer {plan.site.name!r}, which takes shape "
                    f"{tuple(x.shape)}: it is of another model. Make one with new_state."
                )
            self._check_untouched(plan.site, self.position)
        if len(self._running) == 1:
            y = self._running[0][1](plan, x, slice(None))
        else:
            y = state.outputs[self.position].clone()
            for rows, run in self._running:
                y[rows] = run(plan, x[rows], rows)
        self._store_output(y)
        return y

    @cached_property
    def _running(self) -> list[tuple[Tensor, Run]]:
        """Which clips run how, of the ways in which some run."""
        return [(rows, run) for rows, run in self._parts() if len(rows)]

    def _parts(self) -> list[tuple[Tensor, Run]]:
        """Which clips run how."""
        return [(self.key, self._keyframe), (self.rest, self._residual)]

    def _keyframe(self, plan: SitePlan, x: Tensor, rows: Any) -> Tensor:
        y, values = keyframe_output(plan, self.kernels, x)
        if isinstance(rows, slice):
            self.state.inputs[self.position] = values
        else:
            self.state.inputs[self.position][rows] = values
        return y

    def _residual(self, plan: SitePlan, x: Tensor, rows: Any) -> Tensor:
        table = plan.ranges.residual[self.state.reference]
        y, cost = self._added(plan, x, rows, table, self._choice, moves=self.state.reference == "previous")
        self._note(plan.site, cost, rows)
        return y

    def _added(
        self, plan: SitePlan, x: Tensor, rows: Any, table: ResidualTable, choose: Chooser, *, moves: bool
    ) -> tuple[Tensor, Float[Tensor, "b h w"]]:
        """The reference outputs of some clips and the products of their residuals, and what the blocks of a pixel cost.

        Args:
            rows: the clips.
            table: the quantizers of the residuals.
            choose: chooses among them, given the input and the reference as images.
            moves: whether the references move by the codes.
        """
        state, every = self.state, isinstance(rows, slice)
        reference, base = state.inputs[self.position], state.outputs[self.position]
        if not every:
            reference, base = reference[rows], base[rows]  # copies
        image, before = as_image(plan.site, x), as_image(plan.site, reference)
        choice = choose(plan, table, image, before)
        y, cost = self.kernels.residual(
            plan.residual,
            image,
            before,
            choice,
            table.step,
            base,
            moves=moves,
            over=moves or not every,
        )
        if moves and not every:
            state.inputs[self.position][rows] = reference
        return y, cost * (plan.blocks // choice.blocks) if plan.blocks > choice.blocks else cost

    def _choice(self, plan: SitePlan, table: ResidualTable, image: Image, before: Image) -> Choice:
        """The quantizer of each pixel or token of an operator's input."""
        decision = self.rest_decision
        tau, index = self._carried_to(plan, (image.shape[2], image.shape[3]))
        if isinstance(decision, LevelField):  # all blocks of a pixel take its level
            return Choice(table.lookup(None, plan.costs, image.device), index)
        kappa = tuple(decision.kappa)
        return Choice(table.lookup(kappa, plan.costs, image.device), index, tau, table.sigma, kappa, plan.blocks)

    def _note(self, site: Site, cost: Float[Tensor, "b h w"], rows: Any) -> None:
        """Keep what a multiply-accumulate of the clips in `rows` costs at each place of the frame."""
        self._costs[self.position] = self._placed(site, cost)

    def _placed(self, site: Site, cost: Float[Tensor, "b h w"]) -> Tensor:
        """Costs of pixels or tokens by place of the frame."""
        if site.operator.channel_axis != 1:
            return site.tokens.by_pixel(cost)
        return by_tile(cost, self.config.cost.tile) if isinstance(self.config.cost, CostTable) else cost

    def _carried_to(self, plan: SitePlan, size: Pair) -> tuple[Tensor | None, Tensor]:
        """For an image of `size` or for tokens, thresholds and their rows in residual tables; or None and levels."""
        if plan.site.operator.geometry.line:
            tau, index = self._at(plan, (1, 1))
            spread = None if tau is None else tau.expand(-1, *size).contiguous()
            return spread, index.expand(-1, *size).contiguous()
        if plan.site.operator.channel_axis == 1:
            return self._at(plan, size)
        tokens = plan.site.tokens
        (tau, index), (whole_tau, whole_index) = self._at(plan, tokens.size), self._at(plan, (1, 1))
        by_token = None if tau is None or whole_tau is None else tokens.of_pixels(tau, whole_tau)
        return by_token, tokens.of_pixels(index, whole_index)

    def _at(self, plan: SitePlan, size: Pair) -> tuple[Tensor | None, Tensor]:
        row = self._row(self.position, plan)
        if (row, size) not in self._carried:
            self._carry(size)
        return self._carried[row, size]

    def _row(self, position: int, plan: SitePlan | ProductPlan) -> int:
        """The row of the decision that a site takes."""
        return position if self._by_layer else plan.group

    def _carry(self, size: Pair) -> None:
        """Carry the decision of all layers that need it at a size, together."""
        plans = [(at, plan) for at, plan in enumerate(self.plans) if isinstance(plan, SitePlan)]
        rows = sorted({self._row(at, plan) for at, plan in plans if size in plan.decided_at})
        decision = self.rest_decision
        tau: Sequence[Tensor | None] = [None] * len(rows)
        if isinstance(decision, LevelField):
            index = carry(decision.levels[:, rows].long(), size, "max")
        else:
            thresholds, entries = (part[:, rows] for part in self._thresholds)
            tau, index = carry(thresholds, size, "min").unbind(), carry(entries, size, "min")
        for row, *own in zip(rows, tau, index, strict=True):
            self._carried[row, size] = own[0], own[1]

    @cached_property
    def _thresholds(self) -> tuple[Tensor, Tensor]:
        """The thresholds decided on, of whatever type they are given, and their rows in residual tables."""
        assert isinstance(self.rest_decision, ThresholdField)
        thresholds = self.rest_decision.thresholds.float()
        return thresholds, threshold_row(thresholds)

    def _store_output(self, y: Tensor) -> None:
        state = self.state
        if state.reference == "previous" or len(self._moved) == len(self.refresh):
            state.outputs[self.position] = y
        elif len(self._moved):
            state.outputs[self.position][self._moved] = y[self._moved]
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
        layers = [site for site in self.sites if isinstance(site, Site)]
        inputs, outputs = sum(s.input_elements for s in layers), sum(s.output_elements for s in layers)
        factors = sum(s.input_elements for s in self.sites) - inputs  # quantized in every frame
        elementwise = torch.where(self.refresh, float(inputs), float(3 * inputs + outputs)).double() + factors
        bops = frame_bops(self.plans, self._costs, self.refresh, self.decision.grid, self.config.cost)
        return FrameCost(bops, self.refresh.clone(), elementwise)

    def _check_untouched(self, site: AnySite, position: int) -> None:
        if self.state.outputs[position]._version != self.state.versions[position]:
            raise NetworkError(
                f"The output of layer {site.name!r} was overwritten in place by a path not seen when the "
                "network was wrapped. Use out-of-place operations there."
            )


def as_image(site: Site, x: Tensor) -> Float[Tensor, "b c h w"]:
    """An input as an image, one pixel for each vector of a linear layer: a view, whose channels lie last in memory."""
    if site.operator.channel_axis == 1:
        return x
    return x.view(len(x), 1, -1, x.shape[-1]).permute(0, 3, 1, 2)
