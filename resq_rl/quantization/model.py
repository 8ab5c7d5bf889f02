"""A frozen network under residual quantization, stepped frame by frame over a batch of clips."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor, nn

from resq_rl.errors import CalibrationError, NetworkError, SettingsError
from resq_rl.quantization.calibration import Reference, SiteRanges, SiteRecorder
from resq_rl.quantization.checks import check_clips, check_decision, check_inputs
from resq_rl.quantization.config import QuantizationConfig
from resq_rl.quantization.fields import Field, LevelField, carry, cells_of
from resq_rl.quantization.groups import layer_groups
from resq_rl.quantization.inputs import Inputs, as_tuple, float_frames
from resq_rl.quantization.kernels import PLAIN, Kernels, choose, compiled
from resq_rl.quantization.ledger import FrameCost, bit_cost
from resq_rl.quantization.operators import LayerKind, ResidualOperator, Switch
from resq_rl.quantization.residual import ResidualTable, largest_code, threshold_row
from resq_rl.quantization.rounding import FINE, IntegerWeight, Part, integer_weight
from resq_rl.quantization.state import StreamState
from resq_rl.quantization.tracing import Site, check_agreement, float_outputs, trace
from resq_rl.quantization.wrapping import copy_of, fold_batch_norm, insert_operators

__all__ = ["ResQModel"]


class ResQModel:
    """A frozen network wrapped for residual quantization.

        keyframe   x^ = Q_key(x)            y = W_key * x^ + b          (x^, y) become the reference
        residual   r^ = Q_level(x - x^_ref) y = y_ref + W_res * r^
        previous   x^_ref <- x^_ref + r^    y_ref <- y                  (closed loop only)

    holds for every operator call ("site"); everything else in the network runs on the sums. Codes and weights are
    integers held in float32, so that accumulations are exact (`exact_sites` tells where the bound of 2^24 guarantees
    it). Scaling rounds once: y = fma(total, scale, bias) at a keyframe and fma(total, scale, y_ref) at a residual.

    Args:
        network: any `nn.Module` or the module of an exported program; it is copied and frozen, never changed.
        example: frames the network accepts, (1 or more, C, H, W), float in 0..1, or a tuple of frames and what else it
            takes by position, such as the previous mask; sets the resolution of all inputs.
        config: bit-widths, ranges, cost convention and layer groups.

    Raises:
        UnsupportedOperatorError, NetworkError: the network cannot be wrapped; the message names the layer.
    """

    @torch.inference_mode(False)  # stored references are versioned, which inference tensors are not
    def __init__(self, network: nn.Module, example: Inputs, config: QuantizationConfig | None = None) -> None:
        self.config = config or QuantizationConfig()
        self._switch = Switch()
        inputs = as_tuple(example)
        if not inputs or inputs[0].dim() != 4 or not all(len(x) and x.is_floating_point() for x in inputs):
            raise NetworkError(
                "The example must be frames as float, (1 or more, C, H, W), and what else the network takes, got "
                f"{', '.join(f'{x.dtype} {tuple(x.shape)}' for x in inputs) or 'nothing'}."
            )
        copied, generator = copy_of(network), torch.Generator().manual_seed(0)
        noise = tuple(torch.rand(2, *x.shape[1:], generator=generator).to(x) for x in inputs)
        expected = float_outputs(copied, tuple(x[:1].clone() for x in noise))
        self.unfolded = fold_batch_norm(copied)
        self.network = insert_operators(copied, self._switch)
        self.device = inputs[0].device
        self.frame_size = (inputs[0].shape[-2], inputs[0].shape[-1])
        self.input_shapes = tuple(tuple(x.shape[1:]) for x in inputs)
        self.frame_shape = self.input_shapes[0]
        self.sites: list[Site] = trace(self.network, self._switch, inputs)
        check_agreement(type(network).__name__, expected, float_outputs(self.network, noise))
        self.groups, self.group_of_site = layer_groups(self.sites, self.config.groups)
        self._moments: dict[tuple[ResidualOperator, Part], Tensor] = {}
        self._quantized: dict[tuple[ResidualOperator, Part, int], IntegerWeight] = {}
        self._round_weights()
        self.ranges: list[SiteRanges] = []
        self.kernels: Kernels = PLAIN

    def compile(self) -> "ResQModel":
        """Fuse the elementwise work of steps by `torch.compile` where this machine can; results stay bit for bit."""
        self.kernels = compiled(self.device)
        return self

    @property
    def operators(self) -> list[ResidualOperator]:
        """The distinct operators, in order of execution."""
        return list({id(s.operator): s.operator for s in self.sites}.values())

    # Weights ---------------------------------------------------------------------------------------------------------

    def set_residual_weight_bits(self, bits: int | Mapping[LayerKind, int]) -> None:
        """Quantize the residual weights anew, to one width or to one per layer kind."""
        self.config = replace(self.config, residual_weight_bits=bits)
        self._round_weights()

    def _round_weights(self) -> None:
        config = self.config
        self._weights: dict[Part, dict[ResidualOperator, IntegerWeight]] = {
            "keyframe": {o: self._rounded(o, "keyframe", config.key_weight_bits) for o in self.operators},
            "residual": {o: self._rounded(o, "residual", config.weight_bits(o.layer_kind)) for o in self.operators},
        }

    def _rounded(self, operator: ResidualOperator, part: Part, bits: int) -> IntegerWeight:
        if bits == self.config.key_weight_bits:
            part = "keyframe"  # the same weights serve for both, so residuals do not drift
        key = operator, part, bits
        if key not in self._quantized:
            if not all(bool(torch.isfinite(v).all()) for v in (operator.weight, operator.bias) if v is not None):
                raise NetworkError(f"Layer {operator.name!r} has weights that are not finite: load other weights.")
            moment = self._moments.get((operator, part))
            self._quantized[key] = integer_weight(operator, bits, self.config.range_estimator, moment)
        return self._quantized[key]

    def integer_weights(self, operator: ResidualOperator, *, residual: bool) -> tuple[Tensor, Tensor]:
        """Integer codes (float32) and per-channel steps of an operator's keyframe or residual weights."""
        weights = self._weights["residual" if residual else "keyframe"][operator]
        return weights.codes, weights.scale

    @property
    def exact_sites(self) -> list[bool]:
        """Where no accumulation can reach 2^24, so float32 equals int32 arithmetic whatever the input."""
        key, residual = 2**self.config.key_activation_bits - 1, largest_code(self.config.levels)
        return [
            max(
                self._row_sum(s.operator, "keyframe") * key,
                self._row_sum(s.operator, "residual") * residual,
            )
            < 2**24
            for s in self.sites
        ]

    def _row_sum(self, operator: ResidualOperator, part: Part) -> float:
        """The largest sum of code magnitudes over the weights of one output channel."""
        codes = self._weights[part][operator].codes
        probe = ResidualOperator(operator.name, operator.geometry, codes, None, self._switch)
        return float(probe.weight_rows().abs().sum(1).max())

    # Calibration -----------------------------------------------------------------------------------------------------

    @torch.inference_mode(False)
    @torch.no_grad()
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
        recorders = [SiteRecorder(site, self._weighed) for site in self.sites]
        for clip in clips:
            for t, inputs in enumerate(float_frames(clip, frames, self.device)):
                self._record(inputs, recorders, t % interval, generator)
        if not any(sum(recorder.square_sum.values()) for recorder in recorders):
            raise CalibrationError("The calibration clips do not move, so residuals have no range: give other clips.")
        self.ranges = [
            recorder.ranges(self.config.key_activation_bits, self.config.levels, self.config.range_estimator)
            for recorder in recorders
        ]
        self._moments, self._quantized = _moments(recorders), {}
        self._round_weights()
        return self

    @property
    def _weighed(self) -> tuple[Part, ...]:
        """The weights whose rounding is fitted to calibration clips."""
        if self.config.weight_rounding == "nearest":
            return ()
        return ("keyframe", "residual") if self.config.key_weight_bits < FINE else ("residual",)

    def _record(
        self, inputs: tuple[Tensor, ...], recorders: list[SiteRecorder], age: int, generator: torch.Generator
    ) -> None:
        position = 0

        def record(operator: ResidualOperator, value: Tensor) -> Tensor:
            nonlocal position
            self._expect(position, operator)
            recorders[position].record(value, age, generator)
            position += 1
            return operator.float_output(value)

        self._run(inputs, record)

    # Running ---------------------------------------------------------------------------------------------------------

    def _run(self, inputs: tuple[Tensor, ...], execute: Any) -> Any:
        before, self._switch.execute = self._switch.execute, execute
        try:
            return self.network(*inputs)
        finally:
            self._switch.execute = before

    def _expect(self, position: int, operator: ResidualOperator) -> None:
        if position >= len(self.sites) or self.sites[position].operator is not operator:
            raise NetworkError(
                f"The network called layer {operator.name!r} out of the order seen when it was wrapped. Control flow "
                "that depends on the data is not supported: export the network, or wrap the part without it."
            )

    @torch.no_grad()
    def float_forward(self, inputs: Inputs) -> Any:
        """The float network's own output (BatchNorm folded)."""
        return self._run(as_tuple(inputs), ResidualOperator.float_output)

    def new_state(self, clips: int, reference: Reference = "previous") -> StreamState:
        """An empty state for a batch of clips; the first step must refresh every clip."""
        if reference not in ("keyframe", "previous"):
            raise SettingsError(f"reference is 'keyframe' or 'previous', got {reference!r}.")
        return StreamState(reference, torch.full((clips,), -1, dtype=torch.int64))

    @torch.inference_mode(False)
    @torch.no_grad()
    def step(
        self,
        inputs: Inputs,
        state: StreamState,
        refresh: Bool[Tensor, " b"],
        decision: Field,
    ) -> tuple[Any, FrameCost]:
        """Run one frame of every clip: as a keyframe where `refresh`, else as a residual under `decision`.

        Args:
            inputs: one frame per clip, in 0..1, with what else the network takes.
            state: changed in place.
            refresh: which clips run a keyframe; it must be all of them on the first step.
            decision: levels or thresholds by clip, layer group and region; ignored where `refresh`.

        Returns:
            The network's output and the exact cost by clip, site and region of the decision's grid.

        Raises:
            CalibrationError: `calibrate` was not called.
            VideoError: the frames do not fit the network, or hold NaN or infinity.
            PolicyError: the decision does not fit.
        """
        if not self.ranges:
            raise CalibrationError("The model is not calibrated: call calibrate(clips) first.")
        given = as_tuple(inputs)
        check_inputs(given, self.input_shapes)
        check_decision(decision, refresh, state, len(given[0]), len(self.groups), len(self.config.levels))
        execution = _Execution(self, state, refresh, decision)
        output = self._run(given, execution)
        execution.finish()
        state.age = torch.where(refresh, 0, state.age + 1)
        return output, execution.cost()

    # Cost ------------------------------------------------------------------------------------------------------------

    def reference_bops(self, weight_bits: int = 8, activation_bits: int = 8) -> int:
        """BOPs of one frame with every operator at the given widths (W8A8 by default), at the example's resolution."""
        macs = sum(site.macs for site in self.sites)
        return macs * bit_cost(weight_bits, activation_bits, self.config.bops_convention)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one frame; padding not counted."""
        return sum(site.macs for site in self.sites)

    def state_bytes(self, reference: Reference) -> int:
        """Bytes of reference state per clip on a device.

        Input references take 1 byte per element against the keyframe (2 for codes beyond 8 bits) and 2 in the closed
        loop, where they accumulate; output references are int32 accumulators.
        """
        width = 1 if reference == "keyframe" and self.config.key_activation_bits <= 8 else 2
        return sum(width * s.input_elements + 4 * s.output_elements for s in self.sites)


def _moments(recorders: Sequence[SiteRecorder]) -> dict[tuple[ResidualOperator, Part], Tensor]:
    """Second moments by operator, summed over its calls."""
    total: dict[tuple[ResidualOperator, Part], Tensor] = {}
    for recorder in recorders:
        for part, moment in recorder.moments.items():
            key = recorder.site.operator, part
            total[key] = total[key] + moment if key in total else moment
    return total


class _Execution:
    """One quantized forward pass."""

    def __init__(self, model: ResQModel, state: StreamState, refresh: Tensor, decision: Field) -> None:
        self.model, self.state, self.decision = model, state, decision
        self.refresh = refresh
        self.key = torch.nonzero(refresh)[:, 0].to(model.device)
        self.rest = torch.nonzero(~refresh)[:, 0].to(model.device)
        self.rest_decision = decision.rows(self.rest) if len(self.key) and len(self.rest) else decision
        self.position = 0
        self.bops: list[Tensor] = []
        self.elementwise = torch.zeros(len(refresh), dtype=torch.float64)
        self._carried: dict[tuple[int, tuple[int, int]], tuple[Tensor, Tensor]] = {}
        self._shares: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def __call__(self, operator: ResidualOperator, x: Tensor) -> Tensor:
        model, state = self.model, self.state
        model._expect(self.position, operator)
        site, ranges = model.sites[self.position], model.ranges[self.position]
        if len(state.inputs) == self.position:
            state.inputs.append(torch.empty_like(x))
            state.outputs.append(torch.empty(0))
            state.versions.append(0)
        elif len(self.rest):
            self._check_untouched(site, self.position)
        grid = self.decision.grid
        bops = torch.zeros(len(x), *grid, dtype=torch.float64)
        if not len(self.rest):
            y = self._keyframe(site, ranges, x, slice(None))
            bops[:] = self._keyframe_bops(site, x)
        elif not len(self.key):
            y, bops = self._residual(site, ranges, x, slice(None))
        else:
            y = state.outputs[self.position].clone()
            y[self.key] = self._keyframe(site, ranges, x[self.key], self.key)
            bops[self.key.cpu()] = self._keyframe_bops(site, x)
            y[self.rest], bops[self.rest.cpu()] = self._residual(site, ranges, x[self.rest], self.rest)
        self._store_output(y)
        self.bops.append(bops)
        self.elementwise += torch.where(
            self.refresh, site.input_elements, 3 * site.input_elements + site.output_elements
        )
        self.position += 1
        return y.clone() if site.overwritten else y

    def _keyframe(self, site: Site, ranges: SiteRanges, x: Tensor, rows: Any) -> Tensor:
        operator, state = site.operator, self.state
        step, low, high = ranges.keyframe.bounds(x.device)
        codes, values = self.model.kernels.encode_keyframe(x, step, low, high)
        if isinstance(rows, slice):
            state.inputs[self.position] = values
        else:
            state.inputs[self.position][rows] = values
        weights = self.model._weights["keyframe"][operator]
        scale = weights.scale * ranges.keyframe.step
        total = operator.geometry.apply(codes, weights.codes)
        if operator.bias is None:
            return total.mul_(scale)
        return torch.addcmul(operator.per_channel(operator.bias), total, scale, out=total)

    def _residual(self, site: Site, ranges: SiteRanges, x: Tensor, rows: Any) -> tuple[Tensor, Tensor]:
        operator, table, state = site.operator, ranges.residual[self.state.reference], self.state
        reference = state.inputs[self.position][rows]  # of all clips a view, of some a copy
        step = torch.tensor(table.step, device=x.device) if state.reference == "previous" else None
        codes, cost = self._encode(site, x, reference, table, step)
        if step is not None and not isinstance(rows, slice):
            state.inputs[self.position][rows] = reference
        weights = self.model._weights["residual"][operator]
        total = operator.geometry.apply(codes, weights.codes)
        output = torch.addcmul(state.outputs[self.position][rows], total, weights.scale * table.step, out=total)
        return output, self._residual_bops(site, cost)

    def _encode(
        self, site: Site, x: Tensor, reference: Tensor, table: ResidualTable, step: Tensor | None
    ) -> tuple[Tensor, Float[Tensor, "b h w"]]:
        """Codes of the residual, and the cost of a multiply-accumulate by pixel (h = w = 1 for a linear layer)."""
        config, decision, group = self.model.config, self.rest_decision, int(self.model.group_of_site[self.position])
        width = config.weight_bits(site.operator.layer_kind)
        costs = tuple(float(bit_cost(width, bits, config.bops_convention)) for bits in config.levels)
        size = site.map_size(x)
        if (group, size) not in self._carried:
            self._carried[group, size] = _carried(decision, group, size)
        carried, row = self._carried[group, size]
        images = site.operator.channel_axis == 1
        kernels = self.model.kernels if images else PLAIN
        if isinstance(decision, LevelField):
            inverse, limit, unit, cost = table.lookup(None, costs, x.device)[:, carried]
        else:
            kappa, sigma = tuple(decision.kappa), torch.tensor(table.sigma, device=x.device)
            factors, steps = torch.tensor(kappa, device=x.device), table.lookup(kappa, costs, x.device)
            if images:
                codes, (*_, cost) = kernels.encode_by_thresholds(
                    x, reference, carried, row, sigma, factors, steps, step
                )
                return codes, cost
            magnitude = (x - reference).flatten(1).abs().amax(1)[:, None, None]
            inverse, limit, unit, cost = choose(magnitude, carried, row, sigma, factors, steps)
        shape = (-1, 1, *cost.shape[1:]) if images else (-1, *[1] * (x.dim() - 1))
        inverse, limit, unit = (part.reshape(shape) for part in (inverse, limit, unit))
        return kernels.encode(x, reference, inverse, limit, unit, step), cost

    def _share(self, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        if size not in self._shares:
            (h, w), (gh, gw) = size, self.decision.grid
            self._shares[size] = (_exact_share(h, gh), _exact_share(w, gw).T.contiguous())
        return self._shares[size]

    def _residual_bops(self, site: Site, cost: Float[Tensor, "b h w"]) -> Float64[Tensor, "b gh gw"]:
        """BOPs by clip and region: sum over pixels of cost(w, a(p)) n(p), shared among the regions."""
        size, grid = (cost.shape[1], cost.shape[2]), self.decision.grid
        config, coverage = self.model.config, site.coverage(size)
        width, convention = config.weight_bits(site.operator.layer_kind), config.bops_convention
        highest = max(bit_cost(width, bits, convention) for bits in config.levels)
        whole = size[0] >= grid[0] and size[1] >= grid[1]  # no pixel is shared between regions
        small = coverage.numel() * float(coverage.max()) * highest < 2**24
        exact = torch.float32 if whole and small else torch.float64
        spent = cost.cpu().to(exact) * coverage.to(exact)
        rows, columns = self._share(size)
        return (rows.to(exact) @ spent @ columns.to(exact)).double() * site.macs_per_pixel

    def _keyframe_bops(self, site: Site, x: Tensor) -> Tensor:
        config = self.model.config
        coverage = site.coverage(site.map_size(x)).double()
        rows, columns = self._share((coverage.shape[0], coverage.shape[1]))
        cost = bit_cost(config.key_weight_bits, config.key_activation_bits, config.bops_convention)
        return rows @ coverage @ columns * (site.macs_per_pixel * cost)

    def _store_output(self, y: Tensor) -> None:
        state = self.state
        if state.reference == "previous" or not len(self.rest):
            state.outputs[self.position] = y
        elif len(self.key):
            state.outputs[self.position][self.key] = y[self.key]
        state.versions[self.position] = state.outputs[self.position]._version

    def finish(self) -> None:
        """Check that the pass was whole and left the stored references alone."""
        if self.position != len(self.model.sites):
            raise NetworkError(
                f"The network made {self.position} operator calls instead of the {len(self.model.sites)} seen when it "
                "was wrapped. Control flow that depends on the data is not supported."
            )
        for position, site in enumerate(self.model.sites):
            self._check_untouched(site, position)

    def _check_untouched(self, site: Site, position: int) -> None:
        if self.state.outputs[position]._version != self.state.versions[position]:
            raise NetworkError(
                f"The output of layer {site.operator.name!r} was overwritten in place by a path not seen when the "
                "network was wrapped. Use out-of-place operations there."
            )

    def cost(self) -> FrameCost:
        """The cost of the pass."""
        return FrameCost(torch.stack(self.bops, 1), self.refresh.clone(), self.elementwise)


def _exact_share(length: int, cells: int) -> Float64[Tensor, "cells length"]:
    """The share of each position's cost that each cell bears, in double precision: regions must sum to the whole."""
    members = (cells_of(length, cells)[1] > 0).double()
    return members / members.sum(0)


def _carried(decision: Field, group: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """A group's decisions at a layer's resolution, levels or thresholds; and their rows in the residual tables."""
    if isinstance(decision, LevelField):
        levels = carry(decision.levels[:, group], size, "max")
        return levels, torch.zeros_like(levels)
    tau = decision.thresholds[:, group]
    return carry(tau, size, "min").contiguous(), carry(threshold_row(tau), size, "min").contiguous()
