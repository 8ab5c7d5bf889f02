"""The arithmetic around and in an operator: magnitudes, codes, references and products of codes.

`Kernels` is plain PyTorch, for any device, with integers held in float32; on a CPU, compiled.py does the elementwise
work in C and int8.py the products in bytes. All give the same numbers bit for bit: every step rounds once, and so do
the multiply-adds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from jaxtyping import Float, Float64, Int32, Int64, Shaped, UInt8
from torch import Tensor

from resq_rl.quantization.graph.operators import Geometry, exact_products
from resq_rl.quantization.kernels.blocks import joined, split, spread, summed
from resq_rl.quantization.kernels.int8 import ByteWeights

__all__ = [
    "EXACT_SUMS",
    "PLAIN",
    "Bound",
    "Choice",
    "Kernels",
    "Product",
    "affine_codes",
    "from_image",
    "quantize",
    "smallest_floor",
    "sums_are_exact",
]


# Integers of smaller magnitude, and so their sums, are exact in float32.
EXACT_SUMS = 2**24
# Floors of thresholds are sought among floats whose bits are multiples of _UNIT, up to the infinite one.
_UNIT = 2**15
_INFINITE = 0x7F800000 // _UNIT


def quantize(
    residual: Float[Tensor, "*n"],
    inverse: Float[Tensor, "*#n"],
    limit: Float[Tensor, "*#n"],
    unit: Float[Tensor, "*#n"],
) -> Float[Tensor, "*n"]:
    """Integer codes of a residual: clamp(round(residual * inverse), -limit, limit) * unit."""
    return (residual * inverse).round_().clamp_(-limit, limit).mul_(unit)


def choose(
    magnitude: Float[Tensor, "b h w"],
    row: Int64[Tensor, "b h w"],
    tau: Float[Tensor, "b h w"],
    sigma: float,
    kappa: tuple[float, ...],
) -> Int64[Tensor, "b h w"]:
    """Entry of each pixel in `ResidualTable.lookup`: row * (k + 1) + level, level #{j : m > tau * sigma * kappa_j}."""
    bound = tau * sigma
    index = row * (len(kappa) + 1)
    for factor in kappa:
        index = index + (magnitude > bound * factor)
    return index


def from_image(geometry: Geometry, image: Shaped[Tensor, "b c h w"], leading: Sequence[int]) -> Tensor:
    """An image as an operator takes it: a linear layer takes the vectors of its pixels, with `leading` dimensions."""
    return image if geometry.operator != "linear" else image.permute(0, 2, 3, 1).reshape(*leading, image.shape[1])


Bound = float | Tensor
"""A number for all values, or one per channel, (c, 1, 1)."""


def affine_codes(x: Float[Tensor, "*n"], step: Bound, low: Bound, high: Bound) -> Float[Tensor, "*n"]:
    """Integer codes clamp(round(x / step), low, high)."""
    return (x / step).round_().clamp_(low, high)  # type: ignore[arg-type] # both bounds are of one type


def smallest_floor(
    spent: Callable[[Float[Tensor, " b"]], Float64[Tensor, " b"]], allowance: Float64[Tensor, " b"]
) -> tuple[Float[Tensor, " b"], Float64[Tensor, " b"]]:
    """The smallest floor of thresholds whose cost `spent` fits the allowance of each clip, and its cost.

    It is found by halving the range of all floats, whose bits are ordered as they are, in units of 2^-8 of a leading
    bit.
    """
    zero = torch.zeros(len(allowance), dtype=torch.float32, device=allowance.device)
    low, high = torch.zeros_like(zero, dtype=torch.int32), torch.full_like(zero, _INFINITE, dtype=torch.int32)
    least = spent(zero)
    fits = least <= allowance
    if bool(fits.all()):
        return zero, least
    for _ in range(_INFINITE.bit_length()):
        middle = (low + high) // 2
        over = spent((middle * _UNIT).view(torch.float32)) > allowance
        low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    floor = torch.where(fits, zero, (high * _UNIT).view(torch.float32))
    return floor, spent(floor)


def sums_are_exact(geometry: Geometry, weight: Tensor, largest: int) -> bool:
    """Whether no sum of an operator's products can reach 2^24, for inputs of up to `largest` and integer weights."""
    return float(geometry.rows(weight).double().abs().sum(1).max()) * largest < EXACT_SUMS


@dataclass(frozen=True)
class Product:
    """An operator with the integer weights that codes are multiplied by.

    Attributes:
        codes, scale: the weights as integers in float32, and the step of each output channel, which broadcasts over the
            output.
        exact: whether sums of products are exact in float32 in whatever order they are taken: none can reach 2^24.
        int8: the weights for codes in bytes, or None where codes are float32.
    """

    geometry: Geometry
    codes: Tensor
    scale: Tensor
    exact: bool = False
    int8: ByteWeights | None = None
    _scaled: dict[float, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def totals(self, codes: Tensor, geometry: Geometry | None = None) -> Float[Tensor, "*n"]:
        """The sums of products with codes in float32 or in bytes, as integers.

        Args:
            geometry: the operator with other padding, if the codes have theirs already.
        """
        geometry = geometry or self.geometry
        if self.int8 is not None and codes.dtype == torch.uint8:
            return self.int8.totals(codes, geometry)
        with exact_products(geometry, codes.device.type):
            return geometry.apply(codes, self.codes)

    def scaled(self, step: float) -> Tensor:
        """`scale` times the step of the codes; it is kept, since a layer has few of them."""
        if step not in self._scaled:
            self._scaled[step] = self.scale * step
        return self._scaled[step]

    @cached_property
    def flat(self) -> "Product":
        """The same for windows of the input as vectors: by row, column and channel."""
        linear, codes = Geometry("linear"), self.codes
        codes = codes if codes.dim() == 2 else codes.permute(0, 2, 3, 1).flatten(1).contiguous()
        int8 = None if self.int8 is None else ByteWeights(linear, codes.to(torch.int8), self.int8.zero)
        return Product(linear, codes, self.scale.flatten(), self.exact, int8)


@dataclass(frozen=True)
class Choice:
    """The quantizer of each pixel of a residual.

    Attributes:
        steps: `ResidualTable.lookup`.
        index: entry of `steps` for each pixel; with `tau`, `threshold_row` of it.
        tau, sigma, kappa: thresholds, under which `choose` picks the entry for the largest magnitude over the channels.
        blocks: into how many blocks of equal size the channels are divided, each of which is chosen for by its own
            largest magnitude; costs are sums over them.
    """

    steps: Float[Tensor, "4 k"]
    index: Int64[Tensor, "b h w"]
    tau: Float[Tensor, "b h w"] | None = None
    sigma: float = 1.0
    kappa: tuple[float, ...] = ()
    blocks: int = 1

    @property
    def by_block(self) -> "Choice":
        """The choice for an image whose blocks are pixels."""
        if self.blocks == 1:
            return self
        tau = None if self.tau is None else spread(self.tau, self.blocks)
        return replace(self, index=spread(self.index, self.blocks), tau=tau, blocks=1)


class Kernels:
    """The elementwise work and the products of codes, in PyTorch."""

    def __reduce__(self) -> str | tuple[object, ...]:
        return "PLAIN"  # there is one

    def product(self, geometry: Geometry, codes: Tensor, scale: Tensor, span: tuple[int, int]) -> Product:
        """A product made ready.

        Args:
            codes, scale: as of `Product`.
            span: the lowest and the highest code of inputs.
        """
        exact = sums_are_exact(geometry, codes, max(abs(code) for code in span))
        return Product(geometry, codes, scale, exact=exact)

    def encode(
        self,
        x: Float[Tensor, "b *n"],
        reference: Float[Tensor, "b *n"],
        choice: Choice,
        step: float | None = None,
        product: Product | None = None,
    ) -> tuple[Tensor, Float[Tensor, "b h w"]]:
        """Integer codes of the residual x - reference, and the cost of each pixel.

        Args:
            x, reference: inputs of an operator, of shape (b, c, h, w), or with h = w = 1 of any.
            choice: the quantizer of each pixel.
            step: with it the reference moves by codes * step, in place (the closed loop).
            product: the product that the codes are for, which decides whether they are bytes.
        """
        if choice.blocks > 1:
            return self._encode_blocks(x, reference, choice, step, product)
        index = choice.index
        shape = (-1, 1, *index.shape[1:]) if x.dim() == 4 else (-1, *[1] * (x.dim() - 1))
        residual = x - reference
        if choice.tau is not None:
            magnitude = residual.abs().amax(1) if x.dim() == 4 else residual.flatten(1).abs().amax(1)[:, None, None]
            index = choose(magnitude, index, choice.tau, choice.sigma, choice.kappa)
        inverse, limit, unit, cost = (part[index] for part in choice.steps.unbind())
        codes = quantize(residual, inverse.reshape(shape), limit.reshape(shape), unit.reshape(shape))
        if step is not None:
            reference.addcmul_(codes, torch.tensor(step, dtype=torch.float32, device=x.device))
        return codes, cost

    def _encode_blocks(
        self, x: Tensor, reference: Tensor, choice: Choice, step: float | None, product: Product | None
    ) -> tuple[Tensor, Tensor]:
        last, blocks = torch.channels_last, choice.blocks
        whole = reference.contiguous(memory_format=last)
        x, own = (split(v, blocks) for v in (x.contiguous(memory_format=last), whole))
        codes, cost = self.encode(x, own, choice.by_block, step, product)
        if step is not None and whole is not reference:
            reference.copy_(whole)
        return joined(codes, blocks), summed(cost, blocks)

    def fit(
        self,
        x: Float[Tensor, "b c h w"],
        reference: Float[Tensor, "b c h w"],
        choice: Choice,
        coverage: Int32[Tensor, "h w"],
        costs: Float64[Tensor, " l"],
        allowance: Float64[Tensor, " b"],
    ) -> tuple[Float[Tensor, " b"], Float64[Tensor, " b"]]:
        """The smallest floor of thresholds under which an operator costs no more than its allowance, and its cost then.

        Args:
            x, reference, choice: as of `encode`, with thresholds.
            coverage: how often each pixel is read.
            costs: of the lowest level everywhere, and of one reading at each level beyond that of the level below.
            allowance: of each clip.

        Returns:
            The floor, a number with 8 bits behind its leading one, by clip: 0 where the thresholds fit as they are, and
            infinite where only the lowest level does. The cost under it.
        """
        assert choice.tau is not None  # as of all choices by thresholds
        if choice.blocks > 1:
            blocks, last = choice.blocks, torch.channels_last
            x, reference = (split(v.contiguous(memory_format=last), blocks) for v in (x, reference))
            each = torch.cat([costs[:1], costs[1:] / blocks])
            return self.fit(x, reference, choice.by_block, spread(coverage, blocks), each, allowance)
        magnitude, tau = (x - reference).abs().amax(1), choice.tau

        def spent(floor: Float[Tensor, " b"]) -> Float64[Tensor, " b"]:
            bound = torch.maximum(tau, floor[:, None, None]) * choice.sigma
            counts = [((magnitude > bound * factor) * coverage).sum((1, 2)) for factor in choice.kappa]
            total = costs[0].expand(len(x))
            for count, cost in zip(counts, costs[1:], strict=True):
                total = total + cost * count
            return total

        return smallest_floor(spent, allowance)

    def encode_keyframe(
        self, x: Float[Tensor, "*n"], step: Bound, low: Bound, high: Bound, product: Product | None = None
    ) -> tuple[Tensor, Float[Tensor, "*n"]]:
        """`affine_codes`, for `product` if given, and their values."""
        codes = affine_codes(x, step, low, high)
        return codes, codes * step

    def accumulate(
        self, product: Product, codes: Tensor, step: float, base: Tensor | None, *, over: bool = False
    ) -> Tensor:
        """The product of codes in units of `step`, added to `base`: fma(total, scale * step, base).

        Args:
            base: the reference output, or what broadcasts over the output; None for 0.
            over: whether `base` is no longer needed, so that the result may take its place in memory.
        """
        total, scale = product.totals(codes), product.scaled(step)
        return total.mul_(scale) if base is None else torch.addcmul(base, total, scale, out=total)

    def residual(
        self,
        product: Product,
        x: Float[Tensor, "b *n"],
        reference: Float[Tensor, "b *n"],
        choice: Choice,
        unit: float,
        base: Tensor,
        *,
        moves: bool,
        over: bool = False,
    ) -> tuple[Tensor, Float[Tensor, "b h w"]]:
        """A residual step of an operator, base + product of the codes of x - reference, and the cost of each pixel.

        Args:
            x, reference, choice: as of `encode`.
            unit: `ResidualTable.step`.
            base: the reference output.
            moves: whether the reference moves by the codes, in place (the closed loop).
            over: whether `base` is no longer needed, so that the result may take its place in memory.
        """
        codes, cost = self.encode(x, reference, choice, unit if moves else None, product)
        codes = from_image(product.geometry, codes, base.shape[:-1])
        return self.accumulate(product, codes, unit, base, over=over), cost

    def highest(self, scores: Float[Tensor, "b k h w"]) -> UInt8[Tensor, "b h w"]:
        """The first channel with the highest score of every pixel; k is 255 at most."""
        # argmax over a strided axis is ten times slower than comparing class by class, and filling by a mask four.
        scores = scores.contiguous()
        best = scores[:, 0]
        found = torch.zeros(best.shape, dtype=torch.uint8, device=scores.device)
        for k in range(1, scores.shape[1]):
            found = torch.maximum(found, (scores[:, k] > best).view(torch.uint8).mul_(k))
            best = torch.maximum(best, scores[:, k])
        return found


PLAIN = Kernels()
