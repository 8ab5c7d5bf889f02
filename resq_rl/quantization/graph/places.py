"""Where in the frame a token lies, traced through one pass of the network.

Beside every tensor that depends on the frame runs a shadow of the same shape, which holds for each value the clip and
the place that it stands for. What moves values (views, permutations, windows, rolls, concatenations) moves the shadow
likewise; what works value by value keeps it; convolutions, pooling and resizing of images begin the raster of their
output anew. A product of matrices takes the places of its first factor's rows, so attention leaves a token where its
query is. A vector that one layer multiplies lies where its values lie, if they lie close together.

Shadows are float64 numbers, which hold such integers exactly:

    0                                    depends on no frame (class tokens, register tokens)
    -1                                   of several clips, or of none that is known
    1 + 2^44 clip + 2^36 raster + pixel  the flat index of a pixel in a raster of the frame; raster 0 is no place
"""

import math
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Float64, Int64, Num
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves, tree_map

from resq_rl.quantization.graph.memory import MOVES, EagerMode, base_name, block_of, geometry_of, written
from resq_rl.quantization.graph.products import FACTORS

__all__ = ["Arrangement", "Places", "Tokens"]

Pair = tuple[int, int]

_CLIP, _RASTER = 2**44, 2**36
# Functions of a tensor that leave every value where it is, beside those that torch marks as pointwise.
_KEEPS = re.compile(r"softmax|_norm|elu|dropout|lift|alias|detach|^fill|^zero|^copy$")
# Functions of images.
_IMAGES = re.compile(r"pool\dd|upsample|grid_sampler|^convolution")
# The places of one vector may span this share of the frame's height and of its width; beyond it lies at no place.
_CLOSE = 0.5


@dataclass(frozen=True, eq=False)
class Tokens:
    """Where the tokens of a linear layer lie.

    Attributes:
        size: height and width of a raster of the frame.
        index: the pixel of each token in it, or h w for a token of no place, such as a class token.
        known: whether the place of every token that depends on the frame could be traced.
    """

    size: Pair
    index: Int64[Tensor, " n"]
    known: bool = True

    @staticmethod
    def nowhere(count: int, *, known: bool = True) -> "Tokens":
        """Tokens of which each stands for the whole frame."""
        return Tokens((1, 1), torch.zeros(count, dtype=torch.int64), known)

    @cached_property
    def in_order(self) -> bool:
        """Whether there is one token for each pixel, row by row."""
        return torch.equal(self.index.cpu(), torch.arange(self.size[0] * self.size[1]))

    @cached_property
    def crowd(self) -> float:
        """Most tokens on one pixel; infinite where tokens of no place lie on all of them."""
        pixels = self.size[0] * self.size[1]
        return math.inf if bool((self.index == pixels).any()) else float(self.index.bincount().max())

    def by_pixel(self, costs: Float[Tensor, "b 1 n"]) -> Float64[Tensor, "b h w"]:
        """The costs of tokens, summed by pixel; those of tokens without a place are shared by all pixels."""
        if self.in_order:
            return costs[:, 0].double().view(-1, *self.size)
        pixels = self.size[0] * self.size[1]
        index = self.index.to(costs.device)
        total = costs.new_zeros(len(costs), pixels + 1, dtype=torch.float64).index_add(1, index, costs[:, 0].double())
        return (total[:, :-1] + total[:, -1:] / pixels).view(-1, *self.size)

    def of_pixels(self, values: Num[Tensor, "b h w"], whole: Num[Tensor, "b 1 1"]) -> Num[Tensor, "b 1 n"]:
        """The value of each token: that of its pixel, or `whole` for a token without a place."""
        if self.in_order:
            return values.flatten(1)[:, None]
        known = torch.cat([values.flatten(1), whole.flatten(1)], 1)
        return known[:, self.index.to(values.device)][:, None]


@dataclass(frozen=True)
class Arrangement:
    """How the clips lie in the input of a linear layer: along an axis, or folded into the first axis with tokens.

    Attributes:
        axis: that of the clips; with tokens folded in, 0 where all tokens of a clip come together, and 1 where the
            first tokens of all clips do.
        folded: how many tokens of each clip are folded into the first axis; 0 where it is not folded.
    """

    axis: int = 0
    folded: int = 0

    def gathered(self, x: Tensor) -> Tensor:
        """An input with the clips along its first axis."""
        if self.folded:
            x = x.unflatten(0, (self.folded, -1) if self.axis else (-1, self.folded))
        return x.movedim(self.axis, 0) if self.axis else x

    def returned(self, y: Tensor) -> Tensor:
        """The inverse, for an output."""
        y = y.movedim(0, self.axis) if self.axis else y
        return y.flatten(0, 1) if self.folded else y

    def fits(self, x: Tensor, shape: tuple[int, ...], clips: int) -> bool:
        """Whether an input has the shape of so many clips of `shape`."""
        if self.folded:
            return x.shape == (clips * self.folded, *shape[1:])
        return x.dim() > self.axis and self.gathered(x).shape == (clips, *shape)


class Places(EagerMode):
    """Keeps the shadows of all tensors of a pass that depend on the frame."""

    def __init__(self, inputs: tuple[Tensor, ...]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.inside = False
        self.sizes: list[Pair] = [(1, 1)]  # of the rasters; the first stands for no place
        self._shadows: dict[int, Tensor] = {}
        self._kept: list[Any] = []  # so that no block's identity is given to another one
        for x in inputs:
            self.begin(x)

    def begin(self, t: Tensor, *, placed: bool = True) -> None:
        """Take a tensor whose first axis is that of the clips as an image (b, c, h, w), or else as of no place.

        An image of one pixel stands for the whole frame, which is no place.
        """
        clips = torch.arange(len(t), dtype=torch.float64).view(-1, *[1] * (t.dim() - 1)) * _CLIP + 1
        if t.dim() == 4 and placed and t.shape[2] * t.shape[3] > 1:
            h, w = t.shape[2:]
            raster = self._raster((h, w)) * _RASTER + torch.arange(h * w, dtype=torch.float64).view(1, 1, h, w)
            clips = clips + raster
        self._put(t, clips.expand(t.shape))

    def arrangement(self, x: Tensor, clips: int) -> Arrangement | None:
        """How the clips lie in the input of a linear layer; None where they do not lie apart, or it is not known."""
        vectors = self._vectors(x)
        if bool((vectors < 0).any()):
            return None
        for axis in range(vectors.dim()):
            if vectors.shape[axis] == clips and self._lead(vectors.movedim(axis, 0), clips):
                return Arrangement(axis)
        if len(x) % clips == 0 and len(x) > clips:
            for axis in (0, 1):
                folded = Arrangement(axis, len(x) // clips)
                if self._lead(folded.gathered(vectors), clips):
                    return folded
        return None

    def tokens(self, x: Tensor, arrangement: Arrangement, clips: int) -> Tokens:
        """The places of the tokens of one clip in the input of a linear layer."""
        vectors = arrangement.gathered(self._vectors(x)).reshape(clips, -1)
        _, raster, pixel = self.decoded(vectors)
        placed = (vectors > 0) & (raster > 0)
        alike = (placed == placed[:1]).all() & (~placed | ((pixel == pixel[:1]) & (raster == raster[:1]))).all()
        rasters = raster[placed].unique()
        if len(rasters) != 1 or not bool(alike):
            return Tokens.nowhere(vectors.shape[1], known=vectors.shape[1] == 1 or bool((vectors == 0).all()))
        h, w = self.sizes[int(rasters)]
        here = placed[0]
        rows, columns = pixel[0] // w, pixel[0] % w
        down, across = (math.gcd(n, *i[here].tolist()) for n, i in ((h, rows), (w, columns)))
        size = h // down, w // across  # a raster as coarse as the tokens, which merging leaves at their first pixel
        index = torch.where(here, rows // down * size[1] + columns // across, size[0] * size[1])
        return Tokens(size, index, bool((here | (vectors[0] == 0)).all()))

    def _vectors(self, t: Tensor) -> Float64[Tensor, "..."]:
        """The shadow of each vector along the last axis."""
        return self._along(self._of(t), [-1])[..., 0]

    def _lead(self, vectors: Tensor, clips: int) -> bool:
        """Whether each part along the first axis is of its own clip, or depends on no frame."""
        own = self.decoded(vectors)[0] == torch.arange(clips).view(-1, *[1] * (vectors.dim() - 1))
        return bool((own | (vectors == 0)).all())

    def linear(self, x: Tensor, y: Tensor) -> None:
        """Note that a linear layer made `y` of `x`."""
        self._put(y, self._along(self._of(x), [-1]).expand(y.shape))

    def decoded(self, shadow: Tensor) -> tuple[Int64[Tensor, "..."], Int64[Tensor, "..."], Int64[Tensor, "..."]]:
        """Clip, raster and pixel of shadows above 0."""
        code = shadow.long() - 1
        return code // _CLIP, code % _CLIP // _RASTER, code % _RASTER

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        followed = [t for t in tree_leaves([args, kwargs]) if isinstance(t, Tensor) and block_of(t) in self._shadows]
        if self.inside or not followed:
            return out
        targets = written(func, args, kwargs)
        sources = {block_of(t) for t in followed}
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor) and block_of(t) not in sources]
        for t in {id(t): t for t in [*made, *targets]}.values():
            self._put(t, self._shadow(func, args, kwargs, followed, t))
        return out

    def _shadow(self, func: OpOverload, args: Any, kwargs: Any, followed: list[Tensor], out: Tensor) -> Tensor:
        name, first = base_name(func), followed[0]
        if func in FACTORS:
            return self._product(func, args, out)
        if name in ("fill", "zero"):
            return torch.zeros(out.shape, dtype=torch.float64)
        if name == "copy":
            return self._of(args[1]).expand(out.shape)
        if MOVES.match(name):
            shadows = tree_map(self._swapped, (args, kwargs))
            moved = func(*shadows[0], **shadows[1])
            return moved if isinstance(moved, Tensor) and moved.shape == out.shape else self._apart(followed, out)
        if torch.Tag.pointwise in func.tags or _KEEPS.search(name):
            parts = [self._of(t) for t in followed if _broadcasts(t, out)]
            return self._merged(parts, out) if parts else self._apart(followed, out)
        if _IMAGES.search(name) and out.dim() == first.dim() == 4 and self._is_image(first):
            return self._image(out)
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        axes = given.get("dim")
        axes = [axes] if isinstance(axes, int) else axes
        if axes and _reduced(first, axes) == out.numel():
            return self._along(self._of(first), list(axes)).reshape(out.shape)
        return self._apart(followed, out)

    def _image(self, out: Tensor) -> Tensor:
        self.begin(out)
        return self._of(out).clone()

    def _swapped(self, leaf: Any) -> Any:
        """A floating-point tensor's shadow; indices and everything else as they are."""
        return self._of(leaf) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    def _product(self, func: OpOverload, args: Any, out: Tensor) -> Tensor:
        a, b = args[FACTORS[func]], args[FACTORS[func] + 1]
        rows = self._along(self._of(a), [-1])
        if b.dim() == 1:
            rows = rows[..., 0]
        elif bool((rows == 0).all()):  # of the second factor's columns, where the first does not depend on the frame
            rows = self._along(self._of(b), [-2])
        return rows.expand(out.shape) if _broadcasts(rows, out) else self._apart([a, b], out)

    def _apart(self, followed: list[Tensor], out: Tensor) -> Tensor:
        """The shadow of what lies at no place: of the clips that lead the tensors, if they do."""
        t = followed[0]
        if t.dim() and out.dim() and len(t) == len(out):
            lead = self._along(self._of(t), list(range(1, t.dim()))).flatten()
            clip = torch.where(lead > 0, (self.decoded(lead)[0] * _CLIP + 1).double(), lead)
            return clip.view(-1, *[1] * (out.dim() - 1)).expand(out.shape)
        return torch.full(out.shape, -1.0, dtype=torch.float64)

    def _is_image(self, t: Tensor) -> bool:
        """Whether a tensor (b, c, h, w) is the raster of the frame of each of its clips."""
        places = self._along(self._of(t), [1])
        clip, raster, pixel = self.decoded(places)
        h, w = t.shape[2:]
        wanted = torch.arange(h * w).view(1, 1, h, w), torch.arange(len(t)).view(-1, 1, 1, 1)
        whole = all(self.sizes[r] == (h, w) for r in raster.unique().tolist() if 0 <= r < len(self.sizes))
        return whole and bool((places > 0).all()) and bool(((pixel == wanted[0]) & (clip == wanted[1])).all())

    def _merged(self, parts: list[Tensor], out: Tensor) -> Tensor:
        """The place of each value that is made of one value of every part."""
        if len(parts) == 1:
            return parts[0].expand(out.shape)
        return self._along(torch.stack([part.expand(out.shape) for part in parts]), [0])[0]

    def _along(self, shadow: Tensor, axes: list[int]) -> Tensor:
        """The place of what lies along some axes, which stay with length 1: the first of several close ones.

        Values without a place have no say beside those that have one.
        """
        if all(shadow.shape[axis] == 1 for axis in axes):
            return shadow
        clip, raster, _ = self.decoded(shadow)
        own, placed = shadow > 0, (shadow > 0) & (raster > 0)
        first, last = _extremes(shadow, placed, axes)
        low, high = _extremes(clip.double(), own, axes)
        nowhere = torch.where(_any(own, axes), low.clamp_max(_CLIP) * _CLIP + 1.0, 0.0)
        alone = (first == last) | self._close(shadow, placed, axes)
        found = torch.where(_any(placed, axes), torch.where(alone, first, nowhere), nowhere)
        return torch.where(_any(shadow < 0, axes) | (low < high), -1.0, found)

    def _close(self, shadow: Tensor, placed: Tensor, axes: list[int]) -> Tensor:
        """Whether the places along some axes are of one raster and span less than `_CLOSE` of its height and width."""
        _, raster, pixel = self.decoded(shadow)
        sizes = torch.tensor(self.sizes, dtype=torch.int64)[raster.clamp(0, len(self.sizes) - 1)]
        low, high = _extremes(raster.double(), placed, axes)
        close = low == high
        for axis, index in enumerate((pixel // sizes[..., 1], pixel % sizes[..., 1])):
            low, high = _extremes(index / sizes[..., axis], placed, axes)
            close = close & (high - low < _CLOSE)
        return close

    def _raster(self, size: Pair) -> int:
        if size not in self.sizes[1:]:
            self.sizes.append(size)
        return self.sizes.index(size, 1)

    def _of(self, t: Tensor) -> Tensor:
        """The shadow of a tensor, as a view of that of its memory; 0 where it depends on no frame."""
        if block_of(t) not in self._shadows:
            return torch.zeros(t.shape, dtype=torch.float64)
        return self._shadows[block_of(t)].as_strided(*geometry_of(t))

    def _put(self, t: Tensor, shadow: Tensor) -> None:
        block = block_of(t)
        if block not in self._shadows:
            self._kept.append(t.untyped_storage())
            length = t.untyped_storage().nbytes() // t.element_size()
            self._shadows[block] = torch.zeros(length, dtype=torch.float64)
        self._shadows[block].as_strided(*geometry_of(t)).copy_(shadow)


def _any(mask: Tensor, axes: list[int]) -> Tensor:
    """Whether a mask holds anywhere along some axes, which stay with length 1."""
    return mask.double().amax(axes, keepdim=True) > 0


def _extremes(values: Tensor, mask: Tensor, axes: list[int]) -> tuple[Tensor, Tensor]:
    """Minimum and maximum along some axes of the values in a mask."""
    low = torch.where(mask, values, torch.inf).amin(axes, keepdim=True)
    return low, torch.where(mask, values, -torch.inf).amax(axes, keepdim=True)


def _broadcasts(t: Tensor, out: Tensor) -> bool:
    """Whether a tensor's shape can be expanded to that of another."""
    return t.dim() <= out.dim() and all(a in (1, b) for a, b in zip(t.shape[::-1], out.shape[::-1], strict=False))


def _reduced(t: Tensor, axes: Any) -> int:
    """Elements that are left of a tensor without some axes."""
    lost = {axis % t.dim() for axis in axes} if t.dim() else set()
    return int(torch.Size([n for axis, n in enumerate(t.shape) if axis not in lost]).numel())
