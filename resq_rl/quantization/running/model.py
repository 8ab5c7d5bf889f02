"""A frozen network under residual quantization, stepped frame by frame over a batch of clips."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float64
from torch import Tensor, nn

from resq_rl.errors import CalibrationError, NetworkError, SettingsError
from resq_rl.quantization.graph.behaviour import Behaviour, kept_random_state, probe_clips
from resq_rl.quantization.graph.copying import copy_of
from resq_rl.quantization.graph.groups import layer_groups
from resq_rl.quantization.graph.operators import ResidualOperator, Switch, laid_out, own_types, undisturbed
from resq_rl.quantization.graph.products import ProductCalls, decomposed
from resq_rl.quantization.graph.tracing import AnySite, Site, trace
from resq_rl.quantization.graph.wrapping import fold_batch_norm, insert_operators
from resq_rl.quantization.kernels.compiled import native
from resq_rl.quantization.kernels.plain import PLAIN, Kernels
from resq_rl.quantization.running.budgeted import BudgetedExecution, LayerCosts
from resq_rl.quantization.running.calibration import SiteRanges, SiteRecorder
from resq_rl.quantization.running.checks import check_clips, check_decision, check_inputs
from resq_rl.quantization.running.execution import Execution, numbered
from resq_rl.quantization.running.keyframes import KeyframeFit, chosen_frames
from resq_rl.quantization.running.plans import ProductPlan, SitePlan, plan_sites
from resq_rl.quantization.running.state import StreamState
from resq_rl.quantization.running.unrolled import UnrolledExecution
from resq_rl.quantization.running.weights import Weights, weighed
from resq_rl.quantization.specification.config import QuantizationConfig, Reference
from resq_rl.quantization.specification.costs import Convention, CostTable, mac_cost
from resq_rl.quantization.specification.fields import Field
from resq_rl.quantization.specification.inputs import Inputs, as_tuple, float_frames
from resq_rl.quantization.specification.ledger import FrameCost

__all__ = ["ResQModel"]

log = logging.getLogger(__name__)


class ResQModel:
    """A frozen network wrapped for residual quantization.

        keyframe   x^ = Q_key(x)            y = W_key * x^ + b          (x^, y) become the reference
        residual   r^ = Q_level(x - x^_ref) y = y_ref + W_res * r^
        previous   x^_ref <- x^_ref + r^    y_ref <- y                  (closed loop only)

    holds for every operator call ("site"). Products of activations are sites too, which run at key precision in every
    frame (`running.products`); everything else in the network runs on the sums. Codes and weights are
    integers held in float32, so that accumulations are exact (`exact_sites` tells where the bound of 2^24 guarantees
    it). Scaling rounds once: y = fma(total, scale, bias) at a keyframe and fma(total, scale, y_ref) at a residual.

    Args:
        network: any `nn.Module` or the module of an exported program; it is copied and frozen, never changed.
        example: frames that the network accepts, (1 or more, C, H, W), float in 0..1, or a tuple of frames and the
            network's further inputs by position, such as the previous mask; sets the shape and type of all inputs.
        config: bit-widths, ranges, cost convention and layer groups.

    Raises:
        UnsupportedOperatorError, NetworkError: the network cannot be wrapped; the message names the layer.
    """

    @undisturbed()
    @kept_random_state()
    def __init__(self, network: nn.Module, example: Inputs, config: QuantizationConfig | None = None) -> None:
        self.config = config or QuantizationConfig()
        self._switch = Switch()
        inputs = as_tuple(example)
        if not inputs or inputs[0].dim() != 4 or not all(len(x) and x.is_floating_point() for x in inputs):
            raise NetworkError(
                "The example must be frames as float, (1 or more, C, H, W), and what else the network takes, got "
                f"{', '.join(f'{x.dtype} {tuple(x.shape)}' for x in inputs) or 'nothing'}."
            )
        self.device = inputs[0].device
        self.frame_size = (inputs[0].shape[-2], inputs[0].shape[-1])
        self.input_shapes = tuple(tuple(x.shape[1:]) for x in inputs)
        self.input_types = tuple(x.dtype for x in inputs)
        clips = probe_clips(inputs)
        original = Behaviour(type(network).__name__, copy_of(network, self.device), clips)
        self.network = copy_of(network, self.device)
        self.unfolded = fold_batch_norm(self.network)
        insert_operators(self.network, self._switch)
        traced = trace(self.network, self._switch, tuple(part[:2] for part in clips))
        self.sites: list[AnySite] = traced.sites
        self._constant_products, self._overwrites = traced.constant, traced.overwrites
        self._multiplies = bool(traced.constant) or len(self.layers) < len(self.sites)  # matrices, outside of layers
        if self.unplaced:
            log.info(
                "No place in the frame is known of the tokens of layers %s: all regions decide for them together, and "
                "share their cost.",
                ", ".join(self.unplaced),
            )
        original.check()
        self.layout = original.layout_of(self.network)
        self.groups, self.group_of_site = layer_groups(self.sites, self.config.groups)
        self.weights = Weights(self.operators, self.layout, self.config)
        self.ranges: list[SiteRanges] = []
        self.kernels: Kernels = PLAIN
        self._plan()

    def compile(self) -> "ResQModel":
        """Run the elementwise work of steps as compiled C where this machine can; results stay bit for bit."""
        self.kernels = native() if self.device.type == "cpu" else PLAIN
        self._plan()
        return self

    @property
    def layers(self) -> list[Site]:
        """The sites of operators, which have weights, ranges and levels; `sites` has products of activations too."""
        return [site for site in self.sites if isinstance(site, Site)]

    @property
    def unplaced(self) -> list[str]:
        """Names of layers of whose input the place in the frame could not be traced: one region decides.

        They are linear layers over tokens, and 1-D convolutions of more than one tap.
        """
        hidden = (site.name for site in self.layers if not site.tokens.known or site.operator.geometry.line)
        return list(dict.fromkeys(hidden))

    @property
    def operators(self) -> list[ResidualOperator]:
        """The distinct operators, in order of execution."""
        return list({id(s.operator): s.operator for s in self.layers}.values())

    # Weights ---------------------------------------------------------------------------------------------------------

    def set_residual_weight_bits(self, bits: int | Mapping[str, int]) -> None:
        """Quantize the residual weights anew, to one width, or to some by layer or kind of layer.

        Raises:
            SettingsError: a width or a layer is not known.
            CalibrationError: weights from a file cannot be rounded to that width. The model keeps the widths it has.
        """
        before, self.config = self.config, replace(self.config, residual_weight_bits=bits)
        try:
            self.round_weights()
        except (CalibrationError, SettingsError):
            self.config = before
            self.weights.round(before)
            raise

    def round_weights(self) -> None:
        """Round the weights as the configuration says, and plan with them."""
        self.weights.round(self.config)
        self._plan()

    def _plan(self) -> None:
        """Make the plan of every site, once it is calibrated."""
        self._plans = self._plans_of(self.ranges) if self.ranges else []
        self._layer_costs: LayerCosts | None = None

    def _plans_of(self, ranges: Sequence[SiteRanges]) -> list[SitePlan | ProductPlan]:
        groups = self.group_of_site.tolist()
        return plan_sites(self.sites, groups, ranges, self.weights, self.config, self.kernels)

    def _layer_plans(self, ranges: Sequence[SiteRanges]) -> list[SitePlan]:
        return [plan for plan in self._plans_of(ranges) if isinstance(plan, SitePlan)]

    def integer_weights(self, operator: ResidualOperator, *, residual: bool) -> tuple[Tensor, Tensor]:
        """Integer codes (float32) and per-channel steps of an operator's keyframe or residual weights."""
        weight = self.weights.of(operator)["residual" if residual else "keyframe"]
        return weight.codes, weight.scale

    @property
    def exact_sites(self) -> list[bool]:
        """Where no accumulation can reach 2^24, so float32 equals int32 arithmetic whatever the input.

        Products of activations are exact, because float64 takes over where their sums are longer. Only on a
        CPU: the libraries of other devices may multiply by algorithms that round.
        """
        if self.device.type != "cpu":
            return [False] * len(self.sites)
        return [not isinstance(site, Site) or self.weights.sums_are_exact(site.operator) for site in self.sites]

    # Calibration -----------------------------------------------------------------------------------------------------

    @undisturbed()
    def calibrate(self, clips: Sequence[Inputs], *, interval: int = 8, frames: int = 24, seed: int = 0) -> "ResQModel":
        """Fit all ranges and the rounding of weights on clips run through the float network.

        A clip is the bytes of its frames, (t, C, H, W), with a tuple's further inputs likewise, of 0..255 for 0..1.
        Keyframes lie `interval` frames apart, and the first `frames` frames of each clip are used.

        Raises:
            CalibrationError: there are no clips, none has two frames, they do not fit the network or do not move, or a
                value is not finite.
            SettingsError: `interval` or `frames` leaves no residual frame.
        """
        if interval < 2 or frames < 2:
            raise SettingsError(f"Calibration needs an interval and frames of 2 or more, got {interval} and {frames}.")
        check_clips(clips, self.input_shapes)
        generator = torch.Generator().manual_seed(seed)
        recorders = [SiteRecorder(site, weighed(self.config)) for site in self.layers]
        for clip in clips:
            for t, inputs in enumerate(float_frames(clip, frames, self.device)):
                self._record(inputs, recorders, t % interval, generator)
        if not any(sum(recorder.square_sum.values()) for recorder in recorders):
            raise CalibrationError("The calibration clips do not move, so residuals have no range: give other clips.")
        self.ranges = [
            recorder.ranges(self.config.key_activation_bits, self.config.levels, self.config.range_estimator)
            for recorder in recorders
        ]
        self.weights.weigh(recorders)
        self.round_weights()
        chosen = chosen_frames(clips, frames, self.layers, self.device)
        fit = KeyframeFit(self.layers, self._layer_plans, self._run, self.kernels, *chosen)
        search = self.config.range_estimator == "least_squares"
        self.ranges = fit.best(self.ranges, self.config.key_activation_bits, search=search, seed=seed)
        self._plan()
        return self

    def _record(
        self, inputs: tuple[Tensor, ...], recorders: list[SiteRecorder], age: int, generator: torch.Generator
    ) -> None:
        layers = self.layers

        def record(position: int, operator: ResidualOperator, value: Tensor) -> Tensor:
            with own_types():  # whatever the network's own code does
                recorders[position].record(layers[position].arrangement.gathered(value), age, generator)
            return operator.float_output(value)

        self._run(inputs, numbered(layers, record))

    # Running ---------------------------------------------------------------------------------------------------------

    def _run(self, inputs: tuple[Tensor, ...], execute: Any) -> Any:
        before, self._switch.execute = self._switch.execute, execute
        types, own = self.input_types, self._overwrites  # else the network would change the caller's frames
        given = (part.to(dtype, copy=own) for part, dtype in zip(inputs, types, strict=True))
        try:
            if not self._multiplies:
                return self.network(*given)
            with decomposed(), ProductCalls(execute.product) if isinstance(execute, Execution) else nullcontext():
                return self.network(*given)
        finally:
            self._switch.execute = before

    @torch.no_grad()
    def float_forward(self, inputs: Inputs) -> Any:
        """The float network's own output (BatchNorm folded), in its own types even under autocast."""
        with own_types():
            return self._run(as_tuple(inputs), ResidualOperator.float_output)

    def new_state(self, clips: int, reference: Reference = "previous") -> StreamState:
        """An empty state for a batch of clips; the first step must refresh every clip."""
        if reference not in ("keyframe", "previous"):
            raise SettingsError(f"reference is 'keyframe' or 'previous', got {reference!r}.")
        return StreamState(reference, torch.full((clips,), -1, dtype=torch.int64))

    @undisturbed()
    def step(
        self,
        inputs: Inputs,
        state: StreamState,
        refresh: Bool[Tensor, " b"],
        decision: Field,
        limit: Float64[Tensor, " b"] | None = None,
    ) -> tuple[Any, FrameCost]:
        """Run one frame of every clip: as a keyframe where `refresh`, else as a residual under `decision`.

        Args:
            inputs: one frame per clip, in 0..1, with the network's further inputs.
            state: changed in place.
            refresh: which clips run a keyframe; it must be all of them on the first step.
            decision: levels or thresholds by clip, layer group or layer (operator call), and region; ignored where
                `refresh`. As many rows as there are layer groups are those of the groups.
            limit: BOPs that the frame of each clip may cost at most (`running.budgeted`); None for no limit.

        Returns:
            The network's output and the exact cost by clip, site and region of the decision's grid.

        Raises:
            CalibrationError: `calibrate` was not called.
            VideoError: the frames do not fit the network, or hold NaN or infinity.
            PolicyError: the decision does not fit, or no frame can cost as little as a limit.
        """
        if limit is None:
            return self._stepped(inputs, state, refresh, decision, Execution)
        execution = partial(BudgetedExecution, limit=limit, costs=self.layer_costs)
        return self._stepped(inputs, state, refresh, decision, execution)

    @undisturbed()
    def unrolled_step(
        self,
        inputs: Inputs,
        state: StreamState,
        refresh: Bool[Tensor, " b"],
        decision: Field,
        *,
        sharpness: float = 3.0,
        smooth: bool = False,
    ) -> tuple[Any, FrameCost]:
        """Run one frame as `step` does, with gradients from output and cost to the thresholds (`UnrolledExecution`).

        References keep their gradients, so that those of later frames lead back to here; `StreamState.detach` ends
        that. Output, cost and state equal those of `step`, unless `smooth`.

        Args:
            inputs, state, refresh: as of `step`.
            decision: positive thresholds by clip, layer group or layer, and region, that require gradients.
            sharpness: slope of a level's gate over the logarithm of the magnitude, in the backward pass.
            smooth: run the surrogate itself, of which the gradient is exact.

        Raises:
            CalibrationError, VideoError, PolicyError: as of `step`; or the decision has levels, or a threshold of 0.
            SettingsError: the sharpness is not positive.
        """
        execution = partial(UnrolledExecution, sharpness=sharpness, smooth=smooth)
        with torch.enable_grad():
            return self._stepped(inputs, state, refresh, decision, execution)

    def _check_calibrated(self) -> None:
        if not self.ranges:
            raise CalibrationError("The model is not calibrated: call calibrate(clips) first.")

    def _stepped(
        self,
        inputs: Inputs,
        state: StreamState,
        refresh: Bool[Tensor, " b"],
        decision: Field,
        make: Callable[..., Execution],
    ) -> tuple[Any, FrameCost]:
        self._check_calibrated()
        given = as_tuple(inputs)
        check_inputs(given, self.input_shapes)
        shape = len(given[0]), len(self.groups), len(self.sites)
        check_decision(decision, refresh, state, *shape, levels=len(self.config.levels))
        execution = make(self._plans, self.config, self.kernels, state, refresh, decision, self._constant_products)
        output = self._run(laid_out(given, self.layout), execution)
        cost = execution.finish()
        state.age = torch.where(refresh, 0, state.age + 1)
        return output, cost

    # Cost ------------------------------------------------------------------------------------------------------------

    def priced(self, cost: Convention | CostTable) -> "ResQModel":
        """This model under another cost, with the same network and calibration; neither follows later changes.

        Raises:
            SettingsError: the cost table lacks a width or a kind of layer.
        """
        other = copy(self)
        other.weights = copy(self.weights)
        other.config = replace(self.config, bops_convention=cost)
        other._plan()
        return other

    def reference_bops(self, weight_bits: int = 8, activation_bits: int = 8) -> float:
        """BOPs of one frame with every operator at the given widths (W8A8 by default), at the example's resolution.

        Under a cost table: that cost in the table's unit, with its overheads.

        Raises:
            SettingsError: the cost table has no such widths.
        """
        cost = self.config.cost
        sizes = (site.size for site in self.sites)
        spent = sum(size.macs * mac_cost(cost, weight_bits, activation_bits, size) for size in sizes)
        return spent + (cost.operator * len(self.sites) + cost.frame if isinstance(cost, CostTable) else 0)

    @property
    def layer_costs(self) -> LayerCosts:
        """What the layers cost at least, and how they share what a frame may cost.

        Raises:
            CalibrationError: `calibrate` was not called.
        """
        self._check_calibrated()
        if self._layer_costs is None:
            self._layer_costs = LayerCosts(self._plans, self.config.cost)
        return self._layer_costs

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one frame; padding not counted."""
        return sum(site.macs for site in self.sites)

    @property
    def simulation_bytes(self) -> int:
        """An estimate of the memory that each clip takes in this simulation: its references and the work of one site.

        Unlike `state_bytes`, which a device needs, all is float32 here.
        """
        own = [site.input_elements + site.output_elements for site in self.sites]
        return 4 * (sum(s.input_elements + s.output_elements for s in self.layers) + 4 * max(own))

    def state_bytes(self, reference: Reference) -> int:
        """Bytes of reference state per clip on a device.

        Input references take 1 byte per element against the keyframe (2 for codes beyond 8 bits) and 2 in the closed
        loop, where they accumulate; output references are int32 accumulators.
        """
        width = 1 if reference == "keyframe" and self.config.key_activation_bits <= 8 else 2
        return sum(width * s.input_elements + 4 * s.output_elements for s in self.layers)
