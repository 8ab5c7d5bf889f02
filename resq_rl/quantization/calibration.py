"""Ranges of every operator call, from calibration clips run through the float network."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from resq_rl.errors import CalibrationError
from resq_rl.quantization.operators import ResidualOperator
from resq_rl.quantization.quantizer import AffineQuantizer, symmetric_limit
from resq_rl.quantization.ranges import RangeEstimator, affine_quantizer, symmetric_step

__all__ = ["Reference", "ResidualTable", "SiteRanges", "SiteRecorder", "largest_code", "threshold_row"]

Reference = Literal["keyframe", "previous"]
REFERENCES: tuple[Reference, ...] = ("keyframe", "previous")

PIXELS_PER_FRAME = 24
# Thresholds for which the steps of threshold fields are calibrated: octaves from 2^-3 to 2^3.
LOWEST_OCTAVE, HIGHEST_OCTAVE = -3, 3
FEWEST_ROWS = 32
MOST_VALUES = 16_384
# Codes of coarse levels are multiples of the finest step; this keeps all codes, and so all sums, small integers.
LARGEST_CODE = 512


@dataclass(frozen=True)
class ResidualTable:
    """The residual quantizers of one operator call: symmetric, one step per level.

    The step of level l is `step * unit[l]` with `unit[l]` a power of two, so that the codes of all levels are integers
    in the same unit and one int32 accumulator serves pixels of mixed levels: hardware needs a shift, no rescaling.

    A bit field gives a level to pixels of any magnitude, a threshold field to pixels between tau * kappa_l and
    tau * kappa_(l+1) only, so the best step differs. Row 0 of the tables is for bit fields; rows 1 and up are for
    threshold fields, one per octave of tau.

    Attributes:
        sigma: standard deviation of the residual, by which magnitudes are normalised.
        step: step of the finest level; the unit of the codes.
        inverse: 1 / (step * unit) by row and level, 0 where the level has 0 bits.
        limit: largest code magnitude by row and level, before the unit is applied.
        unit: step in units of `step`, by row and level.
    """

    sigma: float
    step: float
    inverse: Float[Tensor, "rows levels"]
    limit: Float[Tensor, "rows levels"]
    unit: Float[Tensor, "rows levels"]

    def codes(
        self,
        residual: Float[Tensor, "*shape"],
        levels: Int64[Tensor, "*levels"],
        row: Int64[Tensor, "*levels"] | None = None,
    ) -> Float[Tensor, "*shape"]:
        """Integer codes of a residual in units of `step`, as float32.

        Args:
            residual: x - x^_ref.
            levels: level of each pixel; broadcasts over the channels.
            row: row of the tables for each pixel (`threshold_row`), or None for a bit field.
        """
        index = levels if row is None else levels + row * self.unit.shape[1]
        limit = self.limit.flatten()[index]
        codes = (residual * self.inverse.flatten()[index]).round_()
        return torch.clamp(codes, -limit, limit, out=codes).mul_(self.unit.flatten()[index])

    def to(self, device: torch.device) -> "ResidualTable":
        """The same table on another device."""
        moved = (t.to(device) for t in (self.inverse, self.limit, self.unit))
        return ResidualTable(self.sigma, self.step, *moved)


def threshold_row(tau: Float[Tensor, "*shape"]) -> Int64[Tensor, "*shape"]:
    """Row of a `ResidualTable` whose steps suit threshold tau: the octave at or below it.

    Rounding up instead costs more bits in the closed loop: the error that coarser steps leave exceeds the threshold
    anew.
    """
    octave = torch.log2(tau.clamp(2.0**LOWEST_OCTAVE, 2.0**HIGHEST_OCTAVE)).floor_()
    return octave.long() - LOWEST_OCTAVE + 1


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
        self.values.append(_pixels(x, operator, generator))
        low, high = float(x.min()), float(x.max())
        if not math.isfinite(low + high):
            raise CalibrationError(
                f"Layer {operator.name!r} meets NaN or infinity on the calibration clips: look at the network's "
                "weights and at divisions, roots and logarithms in it."
            )
        self.low, self.high = min(self.low, low), max(self.high, high)
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
        values = torch.cat([_thinned(torch.cat(self.values)), torch.tensor([self.low, self.high])])
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
    limits = [symmetric_limit(bits) for bits in level_bits]

    def best_step(chosen: Tensor, bits: int) -> float:
        return math.inf if bits == 0 else float(symmetric_step(_thinned(chosen)[None], bits, estimator))

    steps = [[best_step(rows, b) for b in level_bits]]
    step = steps[0][-1]
    for octave in range(LOWEST_OCTAVE, HIGHEST_OCTAVE + 1):
        bounds = [2.0**octave * k for k in kappa] + [math.inf]
        own = [(magnitude > low) & (magnitude <= high) for low, high in pairwise(bounds)]
        # The lowest level takes what no threshold passes, so its own range ends at the first bound.
        own.insert(0, magnitude <= bounds[0])
        few = [int(o.sum()) < FEWEST_ROWS for o in own]
        steps.append(
            [s if f else best_step(rows[o], b) for b, o, f, s in zip(level_bits, own, few, steps[0], strict=True)]
        )
    unit = torch.tensor(
        [[float(_power_of_two(s / step, n)) if n else 0.0 for s, n in zip(row, limits, strict=True)] for row in steps]
    )
    inverse = torch.where(unit > 0, 1.0 / (step * unit), 0.0)
    return ResidualTable(sigma, step, inverse, torch.tensor(limits).float().expand(len(steps), -1).contiguous(), unit)


def largest_code(level_bits: Sequence[int]) -> int:
    """Largest magnitude that a residual code can take, in units of the finest step."""
    return max(LARGEST_CODE, symmetric_limit(level_bits[-1]))


def _thinned(rows: Float[Tensor, "n c"]) -> Float[Tensor, " m"]:
    """About MOST_VALUES of the values; the stride shares no factor with the channels, so that all of them are met."""
    stride = max(1, rows.numel() // MOST_VALUES)
    while math.gcd(stride, rows.shape[1]) > 1:
        stride += 1
    return rows.flatten()[::stride]


def _power_of_two(ratio: float, limit: int) -> int:
    largest = max(0, int(math.log2(LARGEST_CODE / limit)))
    return int(2 ** min(max(round(math.log2(ratio)), 0), largest))
