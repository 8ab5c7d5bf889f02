"""Independent truth for the quantization tests: NumPy integers and explicit loops.

`Oracle` replays one wrapped operator: it reads the calibrated steps and integer weights from the model, and does all
arithmetic itself, with int64 accumulators and one float32 rounding per documented operation.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from resq_rl.quantization import AffineQuantizer, LevelField, Reference, ResQModel, ThresholdField

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Pair = tuple[int, int]
Number = TypeVar("Number", np.int64, np.float32)


@dataclass(frozen=True)
class Setting:
    """A linear operator's arithmetic, as torch.nn names it. `pads` are left, right, top, bottom."""

    kind: str
    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    output_padding: Pair = (0, 0)

    def output_size(self, size: Pair) -> Pair:
        """Height and width of the output."""
        left, right, top, bottom = self.pads
        spans = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True)]
        sides = (top + bottom, left + right)
        if self.kind == "conv_transpose2d":
            height, width = (
                (size[a] - 1) * self.stride[a] - sides[a] + spans[a] + self.output_padding[a] for a in range(2)
            )
        else:
            height, width = ((size[a] + sides[a] - spans[a]) // self.stride[a] + 1 for a in range(2))
        return height, width

    def readers(self, size: Pair) -> list[tuple[Pair, Pair, Pair]]:
        """Every (output position, tap, input position) that the operator multiplies, by brute force; no padding."""
        height, width = self.output_size(size)
        left, _, top, _ = self.pads
        found = []
        taps = list(product(range(self.kernel[0]), range(self.kernel[1])))
        if self.kind == "conv_transpose2d":
            for y, x in product(range(size[0]), range(size[1])):
                for i, j in taps:
                    oy = y * self.stride[0] + i * self.dilation[0] - top
                    ox = x * self.stride[1] + j * self.dilation[1] - left
                    if 0 <= oy < height and 0 <= ox < width:
                        found.append(((oy, ox), (i, j), (y, x)))
            return found
        for oy, ox in product(range(height), range(width)):
            for i, j in taps:
                y = oy * self.stride[0] + i * self.dilation[0] - top
                x = ox * self.stride[1] + j * self.dilation[1] - left
                if 0 <= y < size[0] and 0 <= x < size[1]:
                    found.append(((oy, ox), (i, j), (y, x)))
        return found

    def accumulate(self, x: Ints, weight: Ints) -> Ints:
        """The operator on integers: x (b, c, h, w) or (b, ..., c), int64 sums."""
        if self.kind == "linear":
            return np.asarray(x @ weight.T)
        transposed = self.kind == "conv_transpose2d"
        outputs = weight.shape[1] * self.groups if transposed else weight.shape[0]
        total = np.zeros((len(x), outputs, *self.output_size((x.shape[2], x.shape[3]))), np.int64)
        ins, outs = x.shape[1] // self.groups, outputs // self.groups
        for (oy, ox), (i, j), (y, z) in self.readers((x.shape[2], x.shape[3])):
            for g in range(self.groups):
                pixel = x[:, g * ins : (g + 1) * ins, y, z]
                if transposed:
                    taps = weight[g * ins : (g + 1) * ins, :, i, j]  # (in, out)
                else:
                    taps = weight[g * outs : (g + 1) * outs, :, i, j].T
                total[:, g * outs : (g + 1) * outs, oy, ox] += pixel @ taps
        return total


def fuses() -> bool:
    """Whether this machine's torch rounds a + b * c once (fused multiply-add) or twice."""
    a, b = torch.tensor([1.0]).expand(64), torch.tensor([1.0 + 2.0**-12]).expand(64)
    return bool((torch.addcmul(-a, b.contiguous(), b.contiguous()) != b * b - a).all())


def multiply_add(a: Floats, b: Floats, c: Floats) -> Floats:
    """a + b * c in float32, rounded as torch rounds it on this machine."""
    if fuses():
        exact = a.astype(np.float64) + b.astype(np.float64) * c.astype(np.float64)
        return exact.astype(np.float32)
    return (a + (b * c).astype(np.float32)).astype(np.float32)


def integers(x: Floats | torch.Tensor) -> Ints:
    """Float32 values that must be integers, as int64."""
    values = np.asarray(x)
    whole = values.astype(np.int64)
    assert (whole == values).all()
    return whole


def integer_product(a: Floats, b: Floats, bits: int) -> Floats:
    """Matrices times matrices, every row of `a` and column of `b` quantized symmetrically on its own; int64 sums."""
    limit = np.float32(2 ** (bits - 1) - 1)
    tiny = np.finfo(np.float32).tiny
    rows = np.maximum((np.abs(a).max(-1, keepdims=True) / limit).astype(np.float32), tiny)
    columns = np.maximum((np.abs(b).max(-2, keepdims=True) / limit).astype(np.float32), tiny)
    total = np.rint(a / rows).astype(np.int64) @ np.rint(b / columns).astype(np.int64)
    return np.asarray(total.astype(np.float32) * (rows * columns), np.float32)


class Oracle:
    """Replays one call site of a model on frames, clip by clip state included.

    `places` are those of a linear layer's tokens: the size of a raster, and the pixel of each token in it or -1.

    Attributes:
        levels: level of each pixel in the last residual step, (b, h, w).
        largest: largest accumulator magnitude met so far.
    """

    def __init__(
        self,
        model: ResQModel,
        site: int,
        setting: Setting,
        reference: Reference,
        places: tuple[Pair, Sequence[int]] | None = None,
    ) -> None:
        self.setting, self.reference = setting, reference
        operator, ranges = model.layers[site].operator, model.ranges[site]
        self.key, self.table = ranges.keyframe, ranges.residual[reference]
        self.level_bits = model.config.levels
        self.group = int(model.group_of_site[model.sites.index(model.layers[site])])
        codes, scale = model.integer_weights(operator, residual=False)
        self.key_codes, self.key_scale = integers(codes), scale.numpy()
        codes, scale = model.integer_weights(operator, residual=True)
        self.residual_codes, self.residual_scale = integers(codes), scale.numpy()
        self.bias = None if operator.bias is None else operator.bias.float().numpy()
        if ranges.correction:
            added = np.array(ranges.correction, np.float32)
            self.bias = added if self.bias is None else (self.bias + added).astype(np.float32)
        self.x_ref: Floats = np.zeros(0, np.float32)
        self.y_ref: Floats = np.zeros(0, np.float32)
        self.levels: Ints = np.zeros(0, np.int64)
        self.places = places
        self.largest = 0

    def keyframe(self, x: Floats) -> Floats:
        """y = W_key * Q(x) + b; becomes the reference."""
        quantizers = (self.key,) if isinstance(self.key, AffineQuantizer) else self.key.channels
        bits, zero = quantizers[0].bits, np.array([q.zero_point for q in quantizers])
        step = by_output = np.array([q.step for q in quantizers], np.float32)
        if not isinstance(self.key, AffineQuantizer):  # an output channel has the step of the channels that it reads
            outputs, groups = self.key_scale.size, self.setting.groups
            read = [o // (outputs // groups) * (len(step) // groups) for o in range(outputs)]
            by_output, step, zero = step[read].reshape(1, -1, 1, 1), step[:, None, None], zero[:, None, None]
        codes = np.clip(np.rint(x / step).astype(np.int64) + zero, 0, 2**bits - 1) - zero
        total = self._sum(codes, self.key_codes)
        scale = (self.key_scale * by_output).astype(np.float32)
        if self.bias is None:
            y = (total * scale).astype(np.float32)
        else:
            shape = (-1,) if self.setting.kind == "linear" else (1, -1, 1, 1)
            y = multiply_add(np.broadcast_to(self.bias.reshape(shape), total.shape), total, scale)
        self.x_ref, self.y_ref = codes.astype(np.float32) * step, y
        return y

    def residual(self, x: Floats, decision: LevelField | ThresholdField) -> Floats:
        """y = y_ref + W_res * Q(x - x_ref); the reference follows in the closed loop."""
        r = x - self.x_ref
        size = (1, 1) if self.setting.kind == "linear" else (x.shape[2], x.shape[3])
        if self.places is not None:
            size = self.places[0]
        rows = self._decide(r, decision, size)
        kappa = None if isinstance(decision, LevelField) else tuple(decision.kappa)
        inverses, _, all_units = (table.numpy() for table in self.table.steps(kappa))
        units = self._broadcast(all_units[rows, self.levels], r)
        inverse = self._broadcast(inverses[rows, self.levels], r)
        limit = self._broadcast(
            np.array([0 if b == 0 else 2 ** (b - 1) - 1 for b in self.level_bits])[self.levels].astype(np.float32), r
        )
        codes = np.clip(np.rint(r * inverse), -limit, limit).astype(np.int64) * units.astype(np.int64)
        total = self._sum(codes, self.residual_codes)
        step = np.float32(self.table.step)
        y = multiply_add(
            self.y_ref, total, np.broadcast_to((self.residual_scale * step).astype(np.float32), total.shape)
        )
        if self.reference == "previous":
            self.x_ref = multiply_add(self.x_ref, codes.astype(np.float32), np.full(codes.shape, step))
            self.y_ref = y
        return y

    def _sum(self, codes: Ints, weight: Ints) -> Floats:
        total = self.setting.accumulate(codes, weight)
        self.largest = max(self.largest, int(np.abs(total).max()))
        assert self.largest < 2**31  # an int32 accumulator holds it
        return total.astype(np.float32)

    def _decide(self, r: Floats, decision: LevelField | ThresholdField, size: Pair) -> Ints:
        if isinstance(decision, LevelField):
            self.levels = self._at_tokens(decision.levels[:, self.group].numpy(), size, max, r)
            return np.zeros_like(self.levels)
        tau = self._at_tokens(decision.thresholds[:, self.group].numpy(), size, min, r)
        magnitude = np.abs(r).max(1)
        if self.setting.kind == "linear":  # one level for each vector
            magnitude = np.abs(r).max(-1).reshape(len(r), 1, -1)
        bound = (tau * np.float32(self.table.sigma)).astype(np.float32)
        bounds = np.stack([bound * np.float32(k) for k in decision.kappa])
        self.levels = (magnitude > bounds).sum(0)
        # Rows are the half octaves from 2^-4 to 2^3; tau leaves one for the next at their geometric mean.
        means = 2.0 ** (-3.75 + 0.5 * np.arange(14.0))
        return np.asarray((tau > means[:, None, None, None]).sum(0))

    def _at_tokens(
        self, grid: NDArray[Number], size: Pair, finest: Callable[[list[Number]], Number], r: Floats
    ) -> NDArray[Number]:
        """A grid of decisions by pixel (b, h, w), or by token (b, 1, n)."""
        values = spread(grid, size, finest)
        if self.setting.kind != "linear":
            return values
        whole = spread(grid, (1, 1), finest)[:, 0, 0]
        index = self.places[1] if self.places is not None else [-1] * (r[0].size // r.shape[-1])
        flat = values.reshape(len(values), -1)
        return np.stack([whole if i < 0 else flat[:, i] for i in index], 1)[:, None]

    def _broadcast(self, values: NDArray[np.float32], x: Floats) -> Floats:
        if self.setting.kind == "linear":
            return values.reshape(*x.shape[:-1], 1)
        return values[:, None]


def cells(length: int, count: int) -> list[list[int]]:
    """The grid cells under each of `length` positions: the one at its centre, or all whose centres lie in it."""
    if length >= count:
        return [[int(Fraction(2 * p + 1, 2) * count / length)] for p in range(length)]
    own = [int(Fraction(2 * c + 1, 2) * length / count) for c in range(count)]
    return [[c for c in range(count) if own[c] == p] for p in range(length)]


def spread(values: NDArray[Number], size: Pair, finest: Callable[[list[Number]], Number]) -> NDArray[Number]:
    """A grid of decisions (b, gh, gw) at a layer's resolution (b, h, w), position by position."""
    rows, columns = cells(size[0], values.shape[1]), cells(size[1], values.shape[2])
    out = np.empty((len(values), *size), values.dtype)
    for b, y, x in product(range(len(values)), range(size[0]), range(size[1])):
        out[b, y, x] = finest([values[b, i, j] for i, j in product(rows[y], columns[x])])
    return out


def unit_cost(weight_bits: int, activation_bits: int, convention: str) -> int:
    """BOPs of one multiply-accumulate."""
    if 0 in (weight_bits, activation_bits):
        return 0
    if convention == "max":
        return max(weight_bits, activation_bits) ** 2
    if convention == "clipped":
        return max(weight_bits, 4) * max(activation_bits, 4)
    return weight_bits * activation_bits


def count_bops(
    setting: Setting, channels: Pair, bits: NDArray[np.generic], weight_bits: int, convention: str, grid: Pair
) -> NDArray[np.float64]:
    """BOPs of one operator by region, counted multiply by multiply; `bits` (h, w) are those of the input's pixels.

    `channels` are the operator's inputs and outputs. A pixel's cost belongs to the regions under it, in equal shares.
    """
    spent = [[Fraction(0)] * grid[1] for _ in range(grid[0])]
    height, width = bits.shape
    rows, columns = cells(height, grid[0]), cells(width, grid[1])
    for _, _, (y, x) in setting.readers((height, width)):
        macs = sum(1 for o in range(channels[1]) for _ in range(channels[0] // setting.groups))
        cost = macs * unit_cost(weight_bits, int(bits[y, x]), convention)
        own = list(product(rows[y], columns[x]))
        for i, j in own:
            spent[i][j] += Fraction(cost, len(own))
    return np.array([[float(v) for v in row] for row in spent])
