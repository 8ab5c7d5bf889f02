"""Ranges of every operator call, from calibration clips run through the float network."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from resq_rl.errors import CalibrationError
from resq_rl.quantization.operators import ResidualOperator
from resq_rl.quantization.quantizer import AffineQuantizer, symmetric_limit
from resq_rl.quantization.ranges import RangeEstimator, affine_quantizer, symmetric_step

__all__ = ["Reference", "ResidualTable", "SiteRanges", "SiteRecorder"]

Reference = Literal["keyframe", "previous"]
REFERENCES: tuple[Reference, ...] = ("keyframe", "previous")

PIXELS_PER_FRAME = 24
# A level's range is fitted to the pixels that the heuristic gives that level at this threshold.
TYPICAL_TAU = 1.0
FEWEST_ROWS = 32
# Codes of coarse levels are multiples of the finest step; this keeps all codes, and so all sums, small integers.
LARGEST_CODE = 512


@dataclass(frozen=True)
class ResidualTable:
    """The residual quantizers of one operator call: one symmetric quantizer per level.

    The step of level l is `step * unit[l]` with `unit[l]` a power of two, so that the codes of all levels are integers in
    the same unit and one int32 accumulator serves pixels of mixed levels: hardware needs a shift, no rescaling.

    Attributes:
        sigma: standard deviation of the residual, by which magnitudes are normalised.
        step: step of the finest level; the unit of the codes.
        inverse: 1 / (step * unit) by level, 0 where the level has 0 bits.
        limit: largest code magnitude by level, before the unit is applied.
        unit: step of each level in units of `step`.
    """

    sigma: float
    step: float
    inverse: Float[Tensor, " levels"]
    limit: Float[Tensor, " levels"]
    unit: Float[Tensor, " levels"]

    def codes(self, residual: Float[Tensor, "*shape"], levels: Int64[Tensor, "*levels"]) -> Float[Tensor, "*shape"]:
        """Integer codes of a residual in units of `step`, as float32; `levels` broadcasts over the channels."""
        limit = self.limit[levels]
        codes = (residual * self.inverse[levels]).round_()
        return torch.clamp(codes, -limit, limit, out=codes).mul_(self.unit[levels])

    def to(self, device: torch.device) -> "ResidualTable":
        """The same table on another device."""
        moved = (t.to(device) for t in (self.inverse, self.limit, self.unit))
        return ResidualTable(self.sigma, self.step, *moved)


@dataclass(frozen=True)
class SiteRanges:
    """Calibrated quantizers of one operator call."""

    keyframe: AffineQuantizer
    residual: dict[Reference, ResidualTable]


@dataclass
class SiteRecorder:
    """Collects what one operator call sees over the calibration clips.

    Rows are the channel vectors of randomly drawn pixels; moments are over all values.
    """

    values: list[Tensor] = field(default_factory=list)
    low: float = math.inf
    high: float = -math.inf
    rows: dict[Reference, list[Tensor]] = field(default_factory=lambda: {r: [] for r in REFERENCES})
    square_sum: dict[Reference, float] = field(default_factory=lambda: dict.fromkeys(REFERENCES, 0.0))
    count: dict[Reference, int] = field(default_factory=lambda: dict.fromkeys(REFERENCES, 0))
    reference: dict[Reference, Tensor] = field(default_factory=dict)

    def record(self, operator: ResidualOperator, x: Tensor, age: int, generator: torch.Generator) -> None:
        """Take in the input `x` of one frame, `age` frames after its keyframe (0 at the keyframe itself)."""
        x = x.detach()
        self.values.append(_pixels(x, operator, generator).flatten())
        self.low, self.high = min(self.low, float(x.min())), max(self.high, float(x.max()))
        if age > 0:
            for reference in REFERENCES:
                residual = x - self.reference[reference]
                self.rows[reference].append(_pixels(residual, operator, generator))
                self.square_sum[reference] += float(residual.square().sum())
                self.count[reference] += residual.numel()
        else:
            self.reference["keyframe"] = x
        self.reference["previous"] = x

    def ranges(
        self,
        key_bits: int,
        level_bits: Sequence[int],
        kappa: Sequence[float],
        estimator: RangeEstimator,
        device: torch.device,
    ) -> SiteRanges:
        """Quantizers for what was recorded."""
        if not all(self.count.values()):
            raise CalibrationError("Calibration saw no residual frame: give at least one clip with two frames or more.")
        values = torch.cat([*self.values, torch.tensor([self.low, self.high])])
        tables = {
            r: _residual_table(
                torch.cat(self.rows[r]),
                math.sqrt(self.square_sum[r] / self.count[r]),
                level_bits,
                kappa,
                estimator,
            ).to(device)
            for r in REFERENCES
        }
        return SiteRanges(affine_quantizer(values, key_bits, estimator), tables)


def _pixels(x: Tensor, operator: ResidualOperator, generator: torch.Generator) -> Float[Tensor, "n c"]:
    rows = x.movedim(operator.channel_axis, -1).flatten(0, -2)
    chosen = torch.randint(len(rows), (PIXELS_PER_FRAME * len(x),), generator=generator)
    return rows[chosen.to(x.device)].cpu()


def _residual_table(
    rows: Float[Tensor, "n c"],
    sigma: float,
    level_bits: Sequence[int],
    kappa: Sequence[float],
    estimator: RangeEstimator,
) -> ResidualTable:
    sigma = max(sigma, 1e-8)
    magnitude = rows.abs().amax(1) / sigma
    bounds = [TYPICAL_TAU * k for k in kappa] + [math.inf]
    finest = len(level_bits) - 1
    steps = []
    for level, bits in enumerate(level_bits):
        if bits == 0:
            steps.append(math.inf)
            continue
        own = rows[(magnitude > bounds[max(level - 1, 0)]) & (magnitude <= bounds[max(level, 1)])]
        chosen = own if len(own) >= FEWEST_ROWS else rows
        steps.append(float(symmetric_step(chosen.reshape(1, -1), bits, estimator)))
    step = steps[finest]
    limits = [symmetric_limit(bits) for bits in level_bits]
    units = [0.0 if n == 0 else float(_power_of_two(s / step, n)) for s, n in zip(steps, limits, strict=True)]
    inverse = [0.0 if u == 0 else 1.0 / (step * u) for u in units]
    return ResidualTable(
        sigma, step, torch.tensor(inverse), torch.tensor([float(n) for n in limits]), torch.tensor(units)
    )


def _power_of_two(ratio: float, limit: int) -> int:
    largest = max(0, int(math.log2(LARGEST_CODE / limit)))
    return int(2 ** min(max(round(math.log2(ratio)), 0), largest))
