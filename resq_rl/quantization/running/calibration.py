"""Ranges of every operator call, from calibration clips run through the float network."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from resq_rl.errors import CalibrationError
from resq_rl.quantization.graph.tracing import Site
from resq_rl.quantization.quantizers.quantizer import AffineQuantizer, ChannelQuantizer
from resq_rl.quantization.quantizers.ranges import affine_quantizer
from resq_rl.quantization.quantizers.residual import ResidualTable, residual_table
from resq_rl.quantization.quantizers.rounding import WIDEST, positions_of, second_moment
from resq_rl.quantization.specification.config import Part, RangeEstimator, Reference

__all__ = ["SiteRanges", "SiteRecorder"]

REFERENCES: tuple[Reference, ...] = ("keyframe", "previous")

PIXELS_PER_FRAME = 24
MOST_VALUES = 16_384


@dataclass(frozen=True)
class SiteRanges:
    """Calibrated quantizers of one operator call.

    Attributes:
        keyframe: of inputs at keyframes.
        residual: of residuals, by reference.
        correction: what is added to the bias of each output channel at keyframes; empty for nothing.
    """

    keyframe: AffineQuantizer | ChannelQuantizer
    residual: dict[Reference, ResidualTable]
    correction: tuple[float, ...] = ()


@dataclass
class SiteRecorder:
    """Collects samples of the inputs of one operator call over the calibration clips.

    Rows are the channel vectors of randomly drawn pixels; sums of squares are over all values.

    Attributes:
        site: the call.
        parts: the weights to be rounded by second moments.
        moments: second moments of the patches that the weights multiply: of the inputs for keyframes; for residuals of
            their change since the keyframe, which in the closed loop the difference between residual and keyframe
            weights multiplies.
    """

    site: Site
    parts: tuple[Part, ...]
    moments: dict[Part, Tensor] = field(default_factory=dict)
    values: list[Tensor] = field(default_factory=list)
    low: float = math.inf
    high: float = -math.inf
    rows: dict[Reference, list[Tensor]] = field(default_factory=lambda: {r: [] for r in REFERENCES})
    square_sum: dict[Reference, float] = field(default_factory=lambda: dict.fromkeys(REFERENCES, 0.0))
    count: dict[Reference, int] = field(default_factory=lambda: dict.fromkeys(REFERENCES, 0))
    reference: dict[Reference, Tensor] = field(default_factory=dict)

    def record(self, x: Tensor, age: int, generator: torch.Generator) -> None:
        """Take in the input `x` of one frame, `age` frames after its keyframe (0 at the keyframe itself)."""
        x = x.detach().to(torch.float32, copy=True)  # which the network may overwrite once the operator has read it
        self.values.append(self._pixels(x, generator))
        low, high = float(x.min()), float(x.max())
        if not math.isfinite(low + high):
            raise CalibrationError(
                f"Layer {self.site.name!r} meets NaN or infinity on the calibration clips: look at the network's "
                "weights and at divisions, roots and logarithms in it."
            )
        self.low, self.high = min(self.low, low), max(self.high, high)
        if age > 0:
            for reference in REFERENCES:
                residual = x - self.reference[reference]
                self.rows[reference].append(self._pixels(residual, generator))
                self.square_sum[reference] += float(residual.square().sum())
                self.count[reference] += residual.numel()
        else:
            self.reference["keyframe"] = x
        self.reference["previous"] = x
        if self.parts and self.site.operator.weight_rows().shape[1] <= WIDEST:
            self._weigh(x, age, generator)

    def _weigh(self, x: Tensor, age: int, generator: torch.Generator) -> None:
        operator, size = self.site.operator, self.site.output_size
        positions = positions_of(operator, self.site.output_shape, generator)
        if "keyframe" in self.parts:
            self._add("keyframe", operator.geometry.patches(x, size, positions))
        if "residual" in self.parts and age > 0:
            self._add("residual", operator.geometry.patches(x - self.reference["keyframe"], size, positions))

    def _add(self, part: Part, patches: Float[Tensor, "g k n"]) -> None:
        moment = second_moment(patches)
        self.moments[part] = self.moments[part].add_(moment) if part in self.moments else moment

    def _pixels(self, x: Tensor, generator: torch.Generator) -> Float[Tensor, "n c"]:
        rows = x.movedim(self.site.operator.channel_axis, -1).flatten(0, -2)
        chosen = torch.randint(len(rows), (PIXELS_PER_FRAME * len(x),), generator=generator)
        return rows[chosen.to(x.device)].cpu()

    def ranges(
        self,
        key_bits: int,
        level_bits: Sequence[int],
        estimator: RangeEstimator,
    ) -> SiteRanges:
        """Quantizers for the recorded samples."""
        if not all(self.count.values()):
            raise CalibrationError("Calibration saw no residual frame: give at least one clip with two frames or more.")
        values = torch.cat(
            [_thinned(torch.cat(self.values)), torch.tensor([self.low, self.high], dtype=torch.float32, device="cpu")]
        )
        keyframe = affine_quantizer(values, key_bits, estimator)
        reach = keyframe.step * (2**key_bits - 1)
        tables = {
            r: residual_table(
                _thinned(torch.cat(self.rows[r])),
                math.sqrt(self.square_sum[r] / self.count[r]),
                level_bits,
                estimator,
                reach,
            )
            for r in REFERENCES
        }
        return SiteRanges(keyframe, tables)


def _thinned(rows: Float[Tensor, "n c"]) -> Float[Tensor, " m"]:
    """About MOST_VALUES of the values; the stride shares no factor with the channels, so that all of them are met."""
    stride = max(1, rows.numel() // MOST_VALUES)
    while math.gcd(stride, rows.shape[1]) > 1:
        stride += 1
    return rows.flatten()[::stride]
