"""A frozen network under residual quantization, stepped frame by frame over a batch of clips."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from jaxtyping import Bool, Float, Float64, UInt8
from torch import Tensor, nn

from resq_rl.errors import CalibrationError, NetworkError, PolicyError, SettingsError, VideoError
from resq_rl.quantization.calibration import (
    Reference,
    ResidualTable,
    SiteRanges,
    SiteRecorder,
    largest_code,
    threshold_row,
)
from resq_rl.quantization.fields import DEFAULT_KAPPA, Field, LevelField, carry, cells_of
from resq_rl.quantization.ledger import BopsConvention, FrameCost, bit_cost, check_convention
from resq_rl.quantization.operators import LayerKind, ResidualOperator, Switch
from resq_rl.quantization.quantizer import symmetric_limit
from resq_rl.quantization.ranges import RangeEstimator, check_estimator, symmetric_step
from resq_rl.quantization.tracing import Site, check_agreement, float_outputs, trace
from resq_rl.quantization.wrapping import copy_of, fold_batch_norm, insert_operators

__all__ = ["QuantizationConfig", "ResQModel", "StreamState", "to_float"]

LAYER_KINDS: tuple[LayerKind, ...] = ("conv", "depthwise", "grouped", "linear", "pointwise", "transposed")
MOST_GROUPS = 8


@dataclass(frozen=True)
class QuantizationConfig:
    """How a network is quantized.

    Attributes:
        key_weight_bits, key_activation_bits: bits of keyframes.
        levels: bit-widths a residual may take, ascending; 0 skips.
        residual_weight_bits: bits of residual weights, one number or one per layer kind (missing kinds take 4).
        range_estimator: how ranges are chosen from calibration samples.
        kappa: multipliers of the threshold at which a pixel takes the next level, one less than the levels.
        bops_convention: cost of a multiply-accumulate.
        groups: "auto", or layer groups as name -> patterns of layer names.
    """

    key_weight_bits: int = 8
    key_activation_bits: int = 8
    levels: tuple[int, ...] = (0, 2, 4, 8)
    residual_weight_bits: int | Mapping[LayerKind, int] = 4
    range_estimator: RangeEstimator = "least_squares"
    kappa: tuple[float, ...] = DEFAULT_KAPPA
    bops_convention: BopsConvention = "product"
    groups: str | Mapping[str, Sequence[str]] = "auto"

    def __post_init__(self) -> None:
        check_estimator(self.range_estimator)
        check_convention(self.bops_convention)
        if list(self.levels) != sorted(set(self.levels)) or len(self.levels) < 2:
            raise SettingsError(f"levels must be two or more ascending bit-widths, got {list(self.levels)}.")
        if not all(b == 0 or 2 <= b <= 16 for b in self.levels):
            raise SettingsError(f"levels must be 0 or 2 to 16 bits each, got {list(self.levels)}.")
        if len(self.kappa) != len(self.levels) - 1:
            raise SettingsError(
                f"kappa needs {len(self.levels) - 1} values for {len(self.levels)} levels, got {len(self.kappa)}."
            )
        if list(self.kappa) != sorted(self.kappa) or not all(k > 0 for k in self.kappa):
            raise SettingsError(f"kappa must be positive and ascending, got {list(self.kappa)}.")
        if not 1 <= self.key_activation_bits <= 16 or not 2 <= self.key_weight_bits <= 16:
            raise SettingsError(
                "key_activation_bits must be 1 to 16 and key_weight_bits 2 to 16, got "
                f"{self.key_activation_bits} and {self.key_weight_bits}."
            )
        given = self.residual_weight_bits
        widths = given if isinstance(given, Mapping) else {"all": given}
        unknown = sorted(set(given) - set(LAYER_KINDS)) if isinstance(given, Mapping) else []
        if unknown:
            raise SettingsError(
                f"residual_weight_bits names unknown layer kinds {unknown}; kinds are {list(LAYER_KINDS)}."
            )
        if not all(2 <= b <= 16 for b in widths.values()):
            raise SettingsError(f"residual_weight_bits must be 2 to 16, got {given}.")

    def weight_bits(self, kind: LayerKind) -> int:
        """Residual weight bits of a layer kind."""
        if isinstance(self.residual_weight_bits, Mapping):
            return self.residual_weight_bits.get(kind, 4)
        return self.residual_weight_bits


@dataclass
class StreamState:
    """What a device keeps between frames, for a batch of clips: per operator call the input and output reference.

    Attributes:
        reference: what residuals are taken against.
        inputs: x^_ref of each site, (clips, ...).
        outputs: y_ref of each site, (clips, ...).
        age: frames since each clip's keyframe; -1 before the first.
    """

    reference: Reference
    age: Tensor
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)

    def put(self, rows: Tensor, other: "StreamState") -> None:
        """Replace the clips in `rows` by those of `other`, in order; `other` may share memory and must not run on."""
        self.age[rows] = other.age
        if len(rows) == len(self.age) and bool((rows == torch.arange(len(rows))).all()):
            self.inputs, self.outputs = other.inputs, other.outputs
            self.versions = other.versions
            return
        if not self.inputs:
            self.inputs = [x.new_zeros(len(self.age), *x.shape[1:]) for x in other.inputs]
            self.outputs = [y.new_zeros(len(self.age), *y.shape[1:]) for y in other.outputs]
        for mine, new in zip(self.inputs + self.outputs, other.inputs + other.outputs, strict=True):
            mine[rows] = new
        self.versions = [y._version for y in self.outputs]


@dataclass
class _Weights:
    """Integer weights (as float32) with the scale of each output channel, shaped to broadcast over the output."""

    codes: Tensor
    scale: Tensor


def to_float(frames: UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Frames of 0..255 as float in 0..1."""
    return frames.to(torch.float32, copy=True).div_(255.0)


class ResQModel:
    """A frozen network wrapped for residual quantization.

        keyframe   x^ = Q_key(x)            y = W_key * x^ + b          (x^, y) become the reference
        residual   r^ = Q_level(x - x^_ref) y = y_ref + W_res * r^
        previous   x^_ref <- x^_ref + r^    y_ref <- y                  (closed loop only)

    holds for every operator call ("site"); everything else in the network runs on the sums. Codes and weights are
    integers held in float32, so that accumulations are exact (`exact_sites` tells where the bound of 2^24 guarantees it).
    Scaling rounds once: y = fma(total, scale, bias) at a keyframe and fma(total, scale, y_ref) at a residual.

    Args:
        network: any `nn.Module` or the module of an exported program; it is copied and frozen, never changed.
        example: frames the network accepts, (1 or more, C, H, W), float in 0..1; sets the resolution for `reference_bops`.
        config: bit-widths, ranges, cost convention and layer groups.

    Raises:
        UnsupportedOperatorError, NetworkError: the network cannot be wrapped; the message names the layer.
    """

    @torch.inference_mode(False)  # stored references are versioned, which inference tensors are not
    def __init__(
        self, network: nn.Module, example: Float[Tensor, "b c h w"], config: QuantizationConfig | None = None
    ) -> None:
        self.config = config or QuantizationConfig()
        self._switch = Switch()
        if example.dim() != 4 or not len(example) or not example.is_floating_point():
            raise NetworkError(
                f"The example must be frames as float, (1 or more, C, H, W), got {example.dtype} {tuple(example.shape)}."
            )
        copied = copy_of(network)
        noise = torch.rand(2, *example.shape[1:], generator=torch.Generator().manual_seed(0)).to(example)
        expected = float_outputs(copied, noise[:1].clone())
        self.unfolded = fold_batch_norm(copied)
        self.network = insert_operators(copied, self._switch)
        self.device = example.device
        self.frame_size = (example.shape[-2], example.shape[-1])
        self._frame_shape = tuple(example.shape[1:])
        self.sites: list[Site] = trace(self.network, self._switch, example)
        check_agreement(type(network).__name__, expected, float_outputs(self.network, noise))
        self.groups, self.group_of_site = _layer_groups(self.sites, self.config.groups)
        self._key_weights = {o: self._quantized_weight(o, self.config.key_weight_bits) for o in self.operators}
        self._residual_weights: dict[ResidualOperator, _Weights] = {}
        self.set_residual_weight_bits(self.config.residual_weight_bits)
        self.ranges: list[SiteRanges] = []

    @property
    def operators(self) -> list[ResidualOperator]:
        """The distinct operators, in order of execution."""
        return list({id(s.operator): s.operator for s in self.sites}.values())

    # Weights ---------------------------------------------------------------------------------------------------------

    def set_residual_weight_bits(self, bits: int | Mapping[LayerKind, int]) -> None:
        """Quantize the residual weights anew, to one width or to one per layer kind."""
        self.config = replace(self.config, residual_weight_bits=bits)
        self._residual_weights = {
            o: self._quantized_weight(o, self.config.weight_bits(o.layer_kind)) for o in self.operators
        }

    def _quantized_weight(self, operator: ResidualOperator, bits: int) -> _Weights:
        rows = operator.weight_rows()
        if not all(bool(torch.isfinite(v).all()) for v in (rows, operator.bias) if v is not None):
            raise NetworkError(f"Layer {operator.name!r} has weights that are not finite: load other weights.")
        step = symmetric_step(rows, bits, self.config.range_estimator)
        limit = symmetric_limit(bits)
        codes = torch.round(rows / step[:, None]).clamp_(-limit, limit)
        return _Weights(operator.rows_to_weight(codes).contiguous(), operator.per_channel(step))

    def integer_weights(self, operator: ResidualOperator, *, residual: bool) -> tuple[Tensor, Tensor]:
        """Integer codes (float32) and per-channel steps of an operator's keyframe or residual weights."""
        weights = (self._residual_weights if residual else self._key_weights)[operator]
        return weights.codes, weights.scale

    @property
    def exact_sites(self) -> list[bool]:
        """Where no accumulation can reach 2^24, so float32 equals int32 arithmetic whatever the input."""
        key, residual = 2**self.config.key_activation_bits - 1, largest_code(self.config.levels)
        return [
            max(
                self._row_sum(s.operator, self._key_weights) * key,
                self._row_sum(s.operator, self._residual_weights) * residual,
            )
            < 2**24
            for s in self.sites
        ]

    def _row_sum(self, operator: ResidualOperator, weights: dict[ResidualOperator, _Weights]) -> float:
        """The largest sum of code magnitudes over the weights of one output channel."""
        codes = weights[operator].codes
        probe = ResidualOperator(operator.name, operator.geometry, codes, None, self._switch)
        return float(probe.weight_rows().abs().sum(1).max())

    # Calibration -----------------------------------------------------------------------------------------------------

    @torch.inference_mode(False)
    @torch.no_grad()
    def calibrate(
        self, clips: Sequence[UInt8[Tensor, "t c h w"]], *, interval: int = 8, frames: int = 24, seed: int = 0
    ) -> "ResQModel":
        """Fit all ranges on clips run through the float network, with keyframes every `interval` frames.

        Raises:
            CalibrationError: there are no clips, none has two frames, they do not fit the network or do not move, or a value
                is not finite.
            SettingsError: `interval` or `frames` leaves no residual frame.
        """
        if interval < 2 or frames < 2:
            raise SettingsError(f"Calibration needs an interval and frames of 2 or more, got {interval} and {frames}.")
        self._check_clips(clips)
        generator = torch.Generator().manual_seed(seed)
        recorders = [SiteRecorder() for _ in self.sites]
        for clip in clips:
            for t, frame in enumerate(clip[:frames]):
                self._record(to_float(frame[None].to(self.device)), recorders, t % interval, generator)
        if not any(sum(recorder.square_sum.values()) for recorder in recorders):
            raise CalibrationError("The calibration clips do not move, so residuals have no range: give other clips.")
        self.ranges = [
            recorder.ranges(
                self.config.key_activation_bits,
                self.config.levels,
                self.config.kappa,
                self.config.range_estimator,
                self.device,
            )
            for recorder in recorders
        ]
        return self

    def _check_clips(self, clips: Sequence[Tensor]) -> None:
        if not any(len(clip) > 1 for clip in clips):
            raise CalibrationError(
                f"Calibration needs at least one clip with two frames, got {len(clips)} clips of "
                f"{sorted({len(clip) for clip in clips})} frames."
            )
        for i, clip in enumerate(clips):
            if clip.dtype != torch.uint8 or tuple(clip.shape[1:]) != self._frame_shape:
                raise CalibrationError(
                    f"Calibration clip {i} holds {clip.dtype} frames of shape {tuple(clip.shape[1:])}; the model was wrapped "
                    f"for uint8 frames of {self._frame_shape}."
                )

    def _record(self, x: Tensor, recorders: list[SiteRecorder], age: int, generator: torch.Generator) -> None:
        position = 0

        def record(operator: ResidualOperator, value: Tensor) -> Tensor:
            nonlocal position
            self._expect(position, operator)
            recorders[position].record(operator, value, age, generator)
            position += 1
            return operator.float_output(value)

        self._run(x, record)

    # Running ---------------------------------------------------------------------------------------------------------

    def _run(self, x: Tensor, execute: Any) -> Any:
        before, self._switch.execute = self._switch.execute, execute
        try:
            return self.network(x)
        finally:
            self._switch.execute = before

    def _expect(self, position: int, operator: ResidualOperator) -> None:
        if position >= len(self.sites) or self.sites[position].operator is not operator:
            raise NetworkError(
                f"The network called layer {operator.name!r} out of the order seen when it was wrapped. Control flow that "
                "depends on the data is not supported: export the network, or wrap the part without it."
            )

    @torch.no_grad()
    def float_forward(self, frames: Float[Tensor, "b c h w"]) -> Any:
        """The float network's own output (BatchNorm folded)."""
        return self._run(frames, ResidualOperator.float_output)

    def new_state(self, clips: int, reference: Reference = "previous") -> StreamState:
        """An empty state for a batch of clips; the first step must refresh every clip."""
        if reference not in ("keyframe", "previous"):
            raise SettingsError(f"reference is 'keyframe' or 'previous', got {reference!r}.")
        return StreamState(reference, torch.full((clips,), -1, dtype=torch.int64))

    @torch.inference_mode(False)
    @torch.no_grad()
    def step(
        self,
        frames: Float[Tensor, "b c h w"],
        state: StreamState,
        refresh: Bool[Tensor, " b"],
        decision: Field,
    ) -> tuple[Any, FrameCost]:
        """Run one frame of every clip: as a keyframe where `refresh`, else as a residual under `decision`.

        Args:
            frames: one frame per clip, in 0..1.
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
        self._check_step(frames, state, refresh, decision)
        execution = _Execution(self, state, refresh, decision)
        output = self._run(frames, execution)
        execution.finish()
        state.age = torch.where(refresh, 0, state.age + 1)
        return output, execution.cost()

    def _check_step(self, frames: Tensor, state: StreamState, refresh: Tensor, decision: Field) -> None:
        if not self.ranges:
            raise CalibrationError("The model is not calibrated: call calibrate(clips) first.")
        self._check_frames(frames)
        clips = len(frames)
        values = decision.levels if isinstance(decision, LevelField) else decision.thresholds
        fits = values.dim() == 4 and values.numel() and values.shape[:2] == (clips, len(self.groups))
        if not fits or refresh.shape != (clips,) or refresh.dtype != torch.bool:
            raise PolicyError(
                f"A field of shape ({clips} clips, {len(self.groups)} layer groups, rows, columns) and {clips} booleans are "
                f"needed, got a field of shape {tuple(values.shape)} and {refresh.dtype} of shape {tuple(refresh.shape)}."
            )
        if isinstance(decision, LevelField):
            if int(values.min()) < 0 or int(values.max()) >= len(self.config.levels):
                raise PolicyError(
                    f"Levels must be 0 to {len(self.config.levels) - 1}, got {int(values.min())} to {int(values.max())}."
                )
        elif len(decision.kappa) != len(self.config.levels) - 1 or bool((~(values >= 0)).any()):
            raise PolicyError("Thresholds must be 0 or more, with one kappa for each level above the first.")
        if len(state.age) != clips:
            raise PolicyError(f"The state holds {len(state.age)} clips, the batch {clips}.")
        if bool(((state.age < 0) & ~refresh).any()):
            raise PolicyError("A clip without a keyframe cannot run a residual frame: refresh it first.")

    def _check_frames(self, frames: Tensor) -> None:
        if not frames.is_floating_point() or tuple(frames.shape[1:]) != self._frame_shape:
            raise VideoError(
                f"Frames must be float of shape (clips, {', '.join(map(str, self._frame_shape))}), as the example was, got "
                f"{frames.dtype} of shape {tuple(frames.shape)}. Use to_float for uint8 frames."
            )
        if not math.isfinite(float(frames.sum())):  # a sum shows NaN and infinity at a tenth of isfinite's cost
            bad = torch.nonzero(~torch.isfinite(frames).flatten(1).all(1))[:, 0].tolist()
            raise VideoError(f"The frames of clips {bad} hold NaN or infinity. Repair or drop these frames.")

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

        Input references take 1 byte per element against the keyframe (2 for codes beyond 8 bits) and 2 in the closed loop,
        where they accumulate; output references are int32 accumulators.
        """
        width = 1 if reference == "keyframe" and self.config.key_activation_bits <= 8 else 2
        return sum(width * s.input_elements + 4 * s.output_elements for s in self.sites)


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
        self._carried: dict[tuple[int, tuple[int, int]], tuple[Tensor, Tensor | None]] = {}
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
        operator = site.operator
        codes = ranges.keyframe.integers(x)
        weights = self.model._key_weights[operator]
        scale = weights.scale * ranges.keyframe.step
        total = operator.geometry.apply(codes, weights.codes)
        self.state.inputs[self.position][rows] = codes.mul_(ranges.keyframe.step)
        if operator.bias is None:
            return total.mul_(scale)
        return torch.addcmul(operator.per_channel(operator.bias), total, scale)

    def _residual(self, site: Site, ranges: SiteRanges, x: Tensor, rows: Any) -> tuple[Tensor, Tensor]:
        operator, table = site.operator, ranges.residual[self.state.reference]
        reference = self.state.inputs[self.position]
        residual = x - reference[rows]
        levels, row = self._levels(site, residual, table)
        shape = (-1, 1, *levels.shape[1:]) if operator.channel_axis == 1 else (-1, *[1] * (x.dim() - 1))
        codes = table.codes(residual, levels.reshape(shape), None if row is None else row.reshape(shape))
        weights = self.model._residual_weights[operator]
        total = operator.geometry.apply(codes, weights.codes)
        output = torch.addcmul(self.state.outputs[self.position][rows], total, weights.scale * table.step)
        if self.state.reference == "previous":
            if isinstance(rows, slice):
                reference.add_(codes, alpha=table.step)
            else:
                reference[rows] = torch.add(reference[rows], codes, alpha=table.step)
        return output, self._residual_bops(site, levels)

    def _levels(self, site: Site, residual: Tensor, table: ResidualTable) -> tuple[Tensor, Tensor | None]:
        """Level of each pixel and, for thresholds, its row in the table, both (b, h, w); a linear layer has one pixel."""
        size = site.map_size(residual)
        decision, group = self.rest_decision, int(self.model.group_of_site[self.position])
        if (group, size) not in self._carried:
            self._carried[group, size] = _carried(decision, group, size)
        carried, row = self._carried[group, size]
        if row is None:
            return carried, None
        if site.operator.channel_axis == 1:
            magnitude = torch.maximum(residual.amax(1), -residual.amin(1))
        else:
            magnitude = residual.flatten(1).abs().amax(1)[:, None, None]
        tau = carried * table.sigma
        levels = torch.zeros(magnitude.shape, dtype=torch.int64, device=residual.device)
        for kappa in getattr(decision, "kappa", ()):
            levels += magnitude > tau * kappa
        return levels, row

    def _share(self, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        if size not in self._shares:
            (h, w), (gh, gw) = size, self.decision.grid
            self._shares[size] = (_exact_share(h, gh), _exact_share(w, gw).T.contiguous())
        return self._shares[size]

    def _residual_bops(self, site: Site, levels: Tensor) -> Tensor:
        """BOPs by clip and region: sum over pixels of cost(w, a(p)) n(p), shared among the regions."""
        config = self.model.config
        width = config.weight_bits(site.operator.layer_kind)
        costs = torch.tensor([float(bit_cost(width, b, config.bops_convention)) for b in config.levels])
        size, grid = (levels.shape[1], levels.shape[2]), self.decision.grid
        coverage = site.coverage(size)
        whole = size[0] >= grid[0] and size[1] >= grid[1]  # no pixel is shared between regions
        small = coverage.numel() * float(coverage.max() * costs.max()) < 2**24
        exact = torch.float32 if whole and small else torch.float64
        spent = costs.to(exact)[levels.cpu()] * coverage.to(exact)
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
                f"The network made {self.position} operator calls instead of the {len(self.model.sites)} seen when it was "
                "wrapped. Control flow that depends on the data is not supported."
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


def _carried(decision: Field, group: int, size: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
    """A group's decisions at a layer's resolution: levels, or thresholds with their rows in the residual tables."""
    if isinstance(decision, LevelField):
        return carry(decision.levels[:, group], size, "max"), None
    tau = carry(decision.thresholds[:, group], size, "min")
    return tau, threshold_row(tau)


# Layer groups --------------------------------------------------------------------------------------------------------


def _layer_groups(sites: list[Site], setting: str | Mapping[str, Sequence[str]]) -> tuple[tuple[str, ...], Tensor]:
    """Names of the layer groups, and the group index of each site."""
    if isinstance(setting, Mapping):
        return _given_groups(sites, setting)
    if setting != "auto":
        raise SettingsError(f"groups is 'auto' or a mapping of names to layer patterns, got {setting!r}.")
    tops = [s.operator.name.split(".")[0] for s in sites]
    names = list(dict.fromkeys(tops))
    if 2 <= len(names) <= MOST_GROUPS:
        return tuple(names), torch.tensor([names.index(t) for t in tops])
    return _groups_by_resolution(sites)


def _given_groups(sites: list[Site], setting: Mapping[str, Sequence[str]]) -> tuple[tuple[str, ...], Tensor]:
    patterns = [[p] if isinstance(p, str) else list(p) for p in setting.values()]
    index = []
    for site in sites:
        name = site.operator.name
        own = [i for i, ps in enumerate(patterns) if any(fnmatchcase(name, p) for p in ps)]
        if len(own) != 1:
            raise SettingsError(
                f"Layer {name!r} matches {len(own)} of the groups {list(setting)}; it must match exactly one. "
                f"Layers are {[s.operator.name for s in sites]}."
            )
        index.append(own[0])
    empty = [name for i, name in enumerate(setting) if i not in index]
    if empty:
        raise SettingsError(f"The groups {empty} match no layer. Layers are {[s.operator.name for s in sites]}.")
    return tuple(setting), torch.tensor(index)


def _groups_by_resolution(sites: list[Site], most: int = 5) -> tuple[tuple[str, ...], Tensor]:
    """Runs of consecutive sites with one output resolution, the cheapest merged into a neighbour until `most` are left."""
    runs: list[list[int]] = []
    for i, site in enumerate(sites):
        if runs and sites[runs[-1][0]].output_size == site.output_size:
            runs[-1].append(i)
        else:
            runs.append([i])
    while len(runs) > most:
        macs = [sum(sites[i].macs for i in run) for run in runs]
        pair = min(range(len(runs) - 1), key=lambda r: macs[r] + macs[r + 1])
        runs[pair : pair + 2] = [runs[pair] + runs[pair + 1]]
    index = torch.zeros(len(sites), dtype=torch.int64)
    for group, run in enumerate(runs):
        index[run] = group
    return tuple(f"group{g}" for g in range(len(runs))), index
