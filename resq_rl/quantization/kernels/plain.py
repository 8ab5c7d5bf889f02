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
from resq_rl.quantization.specification.budget import ROUNDING

__all__ = [
    "EXACT_SUMS",
    "FLOORS",
    "PLAIN",
    "Allowance",
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
# Among which floors of thresholds are sought: 0, numbers with 8 bits behind the leading one, and infinity.
FLOORS = torch.arange(0, 0x7F800000 + 1, 2**15, dtype=torch.int32).view(torch.float32)


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
    spent: Callable[[Float[Tensor, " b"]], Float64[Tensor, " b"]], allowance: "Allowance", least: float
) -> tuple[Float[Tensor, " b"], Int64[Tensor, " b"]]:
    """The smallest floor of thresholds of each clip under which a layer costs no more than its allowance, and its row.

    What the layer then costs beyond its least is taken from what is left. The floor is found by halving the range of
    `FLOORS`, which are ordered.

    Args:
        spent: the cost of each clip under floors, in this machine's memory.
        least: the cost at the lowest level everywhere.
    """
    left = allowance.left
    most = (least + left.clamp_min(0) * allowance.share) * (1 + ROUNDING)
    low, high = torch.zeros(len(left), dtype=torch.long), torch.zeros(len(left), dtype=torch.long)
    cost = spent(FLOORS[high])
    over = cost > most
    if bool(over.any()):
        high[over] = len(FLOORS) - 1
        for _ in range(len(FLOORS).bit_length()):
            middle = (low + high) // 2
            more = spent(FLOORS[middle]) > most
            low, high = torch.where(more, middle, low), torch.where(more, high, middle)
        cost = spent(FLOORS[high])
    left -= cost - least
    return FLOORS[high], allowance.rows[high]


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
class Allowance:
    """What a layer may cost. No threshold of a clip is below its floor, the smallest of `FLOORS` that keeps to it.

    Attributes:
        left: what the layers still to come may cost beyond their least, by clip, in this machine's memory. What this
            one does is taken from it, in place.
        share: of what is left, what this one may cost.
        costs: of the lowest level everywhere, and of one reading at each level beyond that of the level below.
        coverage: how often each pixel is read.
        rows: `threshold_row` of each of `FLOORS`.
    """

    left: Float64[Tensor, " b"]
    share: float
    costs: Float64[Tensor, " l"]
    coverage: Int32[Tensor, "h w"]
    rows: Int64[Tensor, " n"]

    def by_block(self, blocks: int) -> "Allowance":
        """The same for an image whose blocks are pixels."""
        costs = torch.cat([self.costs[:1], self.costs[1:] / blocks])
        return replace(self, costs=costs, coverage=spread(self.coverage, blocks))


@dataclass(frozen=True)
class Choice:
    """The quantizer of each pixel of a residual.

    Attributes:
        steps: `ResidualTable.lookup`.
        index: entry of `steps` for each pixel; with `tau`, `threshold_row` of it.
        tau, sigma, kappa: thresholds, under which `choose` picks the entry for the largest magnitude over the channels.
        blocks: into how many blocks of equal size the channels are divided, each of which is chosen for by its own
            largest magnitude; costs are sums over them.
        allowance: what the layer may cost, with thresholds; None for whatever they cost.
    """

    steps: Float[Tensor, "4 k"]
    index: Int64[Tensor, "b h w"]
    tau: Float[Tensor, "b h w"] | None = None
    sigma: float = 1.0
    kappa: tuple[float, ...] = ()
    blocks: int = 1
    allowance: Allowance | None = None

    @property
    def by_block(self) -> "Choice":
        """The choice for an image whose blocks are pixels."""
        if self.blocks == 1:
            return self
        tau = None if self.tau is None else spread(self.tau, self.blocks)
        allowance = self.allowance and self.allowance.by_block(self.blocks)
        return replace(self, index=spread(self.index, self.blocks), tau=tau, blocks=1, allowance=allowance)

    def raised(self, floor: Float[Tensor, " b"], row: Int64[Tensor, " b"]) -> "Choice":
        """The choice with no threshold of a clip below a floor, which has this row, and without an allowance."""
        assert self.tau is not None  # as of all choices with floors
        floor, row = (v.to(self.index.device)[:, None, None] for v in (floor, row))
        tau, index = torch.maximum(self.tau, floor), torch.maximum(self.index, row)
        return replace(self, tau=tau, index=index, allowance=None)


def _floor(
    choice: Choice, allowance: Allowance, x: Float[Tensor, "b c h w"], reference: Float[Tensor, "b c h w"]
) -> tuple[Float[Tensor, " b"], Int64[Tensor, " b"]]:
    """`smallest_floor` under an allowance, for the pixels of a residual."""
    assert choice.tau is not None  # as of all choices with an allowance
    magnitude, tau, costs = (x - reference).abs().amax(1), choice.tau, allowance.costs

    def spent(floor: Float[Tensor, " b"]) -> Float64[Tensor, " b"]:
        bound = torch.maximum(tau, floor.to(tau.device)[:, None, None]) * choice.sigma
        total = costs[0].expand(len(x))
        for factor, cost in zip(choice.kappa, costs[1:], strict=True):
            total = total + cost * ((magnitude > bound * factor) * allowance.coverage).sum((1, 2))
        return total.cpu()

    return smallest_floor(spent, allowance, float(costs[0]))


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
        if choice.allowance is not None:
            choice = choice.raised(*_floor(choice, choice.allowance, x, reference))
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
