"""What counts as a multiply-accumulate, decided by following the frame through one forward pass.

The ledger counts the operators, convolutions and linear layers, and products of activations (`products`). What runs
between them costs about one operation per element and is not counted. The rule that separates the two, and the only
place where it is written:

    elementwise     a product of two tensors whose values are used one by one: gates, scales, masks, division of a
                    tensor by its own statistics, activations written out such as x * sigmoid(x), weighted sums of
                    different feature maps, and sums of two multiples of parts of one tensor (corners of boxes, blends)
    pooling         a sum, mean or window average of values that are no products, or of products where at most one
                    factor varies along what is summed: a gate per channel moves before the mean over pixels
    resizing        interpolation by torch's own functions, grid sampling included

    multiply-accumulate, counted: torch's operators for products of matrices, where a factor depends on the frame

    multiply-accumulate, refused: torch's operators for convolution outside the layers, recurrent layers, distances,
                    transforms and products of two vectors, where a factor depends on the frame; a sum along which
                    two or more factors of a product vary (a convolution as `unfold`, weights and `sum`; a dot product
                    of two feature maps; attention pooling); and a sum of three or more parts of one tensor with
                    different factors (a convolution as a loop over shifted slices)
"""

import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from resq_rl.errors import UnsupportedOperatorError
from resq_rl.quantization.graph.memory import MOVES, EagerMode, base_name, block_of, geometry_of, written
from resq_rl.quantization.graph.products import FACTORS, factors_of

__all__ = ["SUPPORTED", "Exposure", "Follow", "multiplies"]

# Names of torch's operators that multiply and accumulate.
_MULTIPLIES = re.compile(
    r"conv|mm(_|$)|mv$|dot|matmul|(?<!bi)(?<!upsample_)(?<!upsample_tri)linear|attention|transformer|rnn|lstm|gru"
    r"|cdist|_fft|embedding_bag"
)
# Operators of other libraries may do anything, so they are refused; these are torch's own.
_NAMESPACES = ("aten", "prim", "prims", "profiler")
# Operators that sum along given axes, over windows of the last axes, and into places that others are summed into too.
_SUMS = re.compile(r"^(sum|mean|nansum|nanmean|cumsum)$")
_WINDOWS = re.compile(r"^_?(adaptive_)?avg_pool(\d)d$")
_SCATTERS = re.compile(r"^(col2im|index_add|index_put|_index_put_impl|scatter_add|scatter_reduce|index_reduce|put)$")
# Methods of a tensor that give its memory to others.
_EXPOSING = ("numpy", "__array__", "__dlpack__", "data_ptr", "storage", "untyped_storage", "share_memory_")
# Parts of one tensor with different factors that may be added: corners of boxes and blends take two.
_PARTS = 2
SUPPORTED = (
    "1-D and 2-D convolution and 2-D transposed convolution with zero padding, linear layers, and products of matrices "
    "(attention)"
)


@cache
def multiplies(operator: OpOverload) -> bool:
    """Whether one of torch's operators multiplies and accumulates, or is another library's, which might."""
    namespace, _, name = operator.name().split(".")[0].partition("::")
    return namespace not in _NAMESPACES or _MULTIPLIES.search(name) is not None


@dataclass(frozen=True)
class _Part:
    """A summand `factor * t`, where t holds the elements `place` of the tensor `root`."""

    root: int
    place: Any
    factor: Any


@dataclass(frozen=True)
class _Value:
    """What is known of a tensor that depends on the frame.

    Attributes:
        root: the tensor whose values these are, moved or through functions of one value each.
        place: which of the root's values.
        geometry: size, stride and offset of the tensor.
        parts: the sum that the values are.
        products: the products that the values are a sum of, each as its factors, flat and laid out as the tensor's
            block of memory is; empty where the values are no sum of products alone.
        statistics: roots of the tensors that the values sum up.
        inverse: whether the values are one over something.
    """

    root: int
    place: Any = ()
    geometry: Any = None
    parts: tuple[_Part, ...] = ()
    products: tuple[tuple[Tensor, ...], ...] = ()
    statistics: frozenset[int] = frozenset()
    inverse: bool = False


class Follow(EagerMode):
    """Follows what depends on the frame, refuses multiply-accumulates that nothing counts, and notes writes.

    Args:
        inputs: the frames and the network's further inputs.
        product: called with every product of matrices: the operator, its arguments, and those of the two factors that
            depend on the frame.

    Attributes:
        stack: names of the modules that are running.
        inside: whether an operator of the package is running.
        written: blocks of memory that something wrote to.
    """

    def __init__(self, inputs: tuple[Tensor, ...], product: Callable[[OpOverload, Any, list[Tensor]], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._product_called = product
        self.inside = False
        self.stack: list[str] = []
        self.written: set[int] = set()
        self._blocks: dict[int, _Value] = {}
        self._views: dict[tuple[int, Any], _Value] = {}  # parts of blocks that were written on their own
        self._kept: list[Any] = []  # so that no block's identity is given to another one
        self._roots = count()
        for x in inputs:
            self.begin(x)

    def begin(self, t: Tensor) -> None:
        """Follow a tensor as one that depends on the frame and is a sum of no other."""
        with torch._C.DisableTorchFunction():
            self._put(t, self._fresh())

    def note_written(self, t: Tensor) -> None:
        """Note that something writes to the memory of `t`, or may."""
        self._kept.append(t.untyped_storage())
        self.written.add(block_of(t))

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.inside:
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunction():  # `Exposure` would take what follows for the network's own calls
            return self._run(func, args, kwargs)

    def _run(self, func: OpOverload, args: Any, kwargs: Any) -> Any:
        followed = [t for t in tree_leaves([args, kwargs]) if self._depends(t)]
        if func in FACTORS:
            self._product_called(func, args, [t for t in factors_of(func, args) if self._depends(t)])
        elif followed and multiplies(func):
            self._refuse(func.name())
        out = func(*args, **kwargs)
        targets = written(func, args, kwargs)
        for t in targets:
            self.note_written(t)
        if followed:
            sources = {block_of(t) for t in followed}
            made = [t for t in tree_leaves(out) if isinstance(t, Tensor) and block_of(t) not in sources]
            for t in {id(t): t for t in [*made, *targets]}.values():
                self._put(t, self._value(func, args, kwargs, followed, t))
        return out

    def _value(self, func: OpOverload, args: Any, kwargs: Any, followed: list[Tensor], out: Tensor) -> _Value:
        name, first = base_name(func), followed[0]
        fresh = self._fresh(frozenset().union(*(self._of(t).statistics for t in followed)))
        if func in FACTORS:
            return fresh
        if name in ("mul", "multiply", "div", "divide", "true_divide"):
            return self._product(args[0], args[1], out, fresh, divided="div" in name)
        if name in ("add", "sub", "subtract", "rsub"):
            alpha = kwargs.get("alpha", args[2] if len(args) > 2 else 1)
            return self._sum([(args[0], 1), (args[1], alpha)], out, fresh)
        if name in ("addcmul", "addcdiv"):
            product = (args[1] * args[2]) if name == "addcmul" else (args[1] / args[2])
            if self._depends(args[1]) or self._depends(args[2]):
                self._put(product, self._product(args[1], args[2], product, self._fresh(), name == "addcdiv"))
            return self._sum([(args[0], 1), (product, kwargs.get("value", 1))], out, fresh)
        if name == "lerp":
            return self._sum([(args[0], 1 - args[2]), (args[1], args[2])], out, fresh)
        if name == "copy":  # of the second argument into the first
            if not self._depends(args[1]):
                return fresh
            products = tuple(_laid(factors, out) for factors in self._products(args[1]))
            return replace(self._of(args[1]), products=products)
        if MOVES.match(name):
            return self._moved(func, args, kwargs, followed, fresh)
        self._check_pooling(name, args, kwargs, followed)
        if out.numel() < first.numel():
            return replace(fresh, statistics=fresh.statistics | self._origins(first))
        if torch.Tag.pointwise in func.tags and len({id(t) for t in followed}) == 1 and first.shape == out.shape:
            inverse = name in ("rsqrt", "reciprocal", "pow")
            return replace(fresh, root=self._of(first).root, place=self._of(first).place, inverse=inverse)
        return fresh

    # Products and sums ---------------------------------------------------------------------------------------------

    def _product(self, a: Any, b: Any, out: Tensor, fresh: _Value, divided: bool) -> _Value:
        own = [t for t in (a, b) if self._depends(t)]
        if not own:
            return fresh
        if len(own) == 2 and (self._same(a, b) or self._normalised(a, b, divided) or self._normalised(b, a, False)):
            return replace(fresh, root=self._of(a).root, place=self._of(a).place) if a.shape == out.shape else fresh
        main, other = (a, b) if own[0] is a else (b, a)
        factor: Any = other
        if divided:
            factor = 1 / other if main is a else other
        if isinstance(factor, Tensor) and factor.numel() == 1 and len(own) == 1:
            factor = float(factor)
        of = self._of(main)
        value = replace(fresh, inverse=divided and main is b)
        if len(own) == 1 and main.shape == out.shape:
            value = replace(value, root=of.root, place=of.place)
        parts: tuple[_Part, ...] = (_Part(of.root, of.place, factor),)
        if not any(isinstance(f, Tensor) for f in (factor, *(part.factor for part in self._parts(main)))):
            parts = tuple(replace(part, factor=part.factor * factor) for part in self._parts(main))
        more = self._factors(other) if len(own) == 2 and not divided else [torch.as_tensor(factor, device=out.device)]
        known = self._products(main) or [[main]]
        return replace(value, parts=parts, products=tuple(_laid([*factors, *more], out) for factors in known))

    def _normalised(self, a: Tensor, b: Tensor, divided: bool) -> bool:
        """Whether `a` times or over `b` divides a tensor by a statistic of its own."""
        of = self._of(b)
        return (divided or of.inverse) and bool(self._origins(a) & of.statistics)

    def _sum(self, terms: list[tuple[Any, Any]], out: Tensor, fresh: _Value) -> _Value:
        own = [(t, scale) for t, scale in terms if self._depends(t)]
        if not own:
            return fresh
        parts = tuple(replace(p, factor=p.factor * scale) for t, scale in own for p in self._parts(t))
        self._check_parts(parts)
        roots = {self._of(t).root for t, _ in own}
        value = replace(fresh, parts=parts)
        if len(roots) == 1:  # parts of one tensor stay parts of it
            alone = len(own) == 1 and own[0][0].shape == out.shape
            value = replace(value, root=roots.pop(), place=self._of(own[0][0]).place if alone else fresh.root)
        if all(self._products(t) for t, _ in own):
            products = (factors for t, _ in own for factors in self._products(t))
            value = replace(value, products=tuple(_laid(factors, out) for factors in products))
        return value

    def _moved(self, func: OpOverload, args: Any, kwargs: Any, followed: list[Tensor], fresh: _Value) -> _Value:
        leaves, tree = tree_flatten([args, kwargs])
        of, value = self._of(followed[0]), fresh
        if len({self._of(t).root for t in followed}) == 1:
            about = func.name(), tuple(repr(leaf) for leaf in leaves if not isinstance(leaf, Tensor))
            copied = base_name(func) in ("clone", "_to_copy", "lift_fresh")
            value = replace(fresh, root=of.root, place=of.place if copied else (of.place, about), inverse=of.inverse)
        terms = [self._products(t) for t in followed]
        if not all(len(own) == 1 for own in terms):
            return value
        moved = []
        for k in range(max(len(own[0]) for own in terms)):
            swap = {id(t): (own[0] + [torch.ones_like(t)] * k)[k] for t, own in zip(followed, terms, strict=True)}
            own_args, own_kwargs = tree_unflatten([swap.get(id(leaf), leaf) for leaf in leaves], tree)
            moved.append(func(*own_args, **own_kwargs))
        return replace(value, products=(_laid(moved, moved[0]),))

    def _check_parts(self, parts: tuple[_Part, ...]) -> None:
        """Refuse a sum of more than two parts of one tensor with different factors."""
        places: dict[int, dict[Any, Any]] = defaultdict(dict)
        for part in parts:
            places[part.root].setdefault(part.place, part.factor)
        for own in (list(found.values()) for found in places.values()):
            if len(own) > _PARTS and not all(_alike(own[0], other) for other in own[1:]):
                self._refuse(f"A sum of {len(own)} parts of one tensor with different factors")

    def _check_pooling(self, name: str, args: Any, kwargs: Any, followed: list[Tensor]) -> None:
        """Refuse a sum along which two factors of a product vary."""
        window = _WINDOWS.match(name)
        if not (window or _SUMS.match(name) or _SCATTERS.match(name)):
            return
        for t in followed:
            axes = list(range(t.dim()))
            if window:
                axes = axes[-int(window[2]) :]
            elif _SUMS.match(name):
                given = kwargs.get("dim", args[1] if len(args) > 1 and not isinstance(args[1], Tensor) else None)
                axes = [given] if isinstance(given, int) and t.dim() else given or axes
            for factors in self._products(t):
                if sum(bool((f.amax(axes) != f.amin(axes)).any()) for f in factors) > 1:
                    self._refuse(f"A product of tensors that is summed ({name})")

    def _refuse(self, what: str) -> None:
        where = f"layer {self.stack[-1]!r}" if self.stack and self.stack[-1] else "the network's forward"
        raise UnsupportedOperatorError(
            f"{what} in {where} cannot be quantized as a residual, and its multiply-accumulates would go uncounted. "
            f"Supported: {SUPPORTED}, as modules or in an exported program."
        )

    # What is known of a tensor ---------------------------------------------------------------------------------------

    def _fresh(self, statistics: frozenset[int] = frozenset()) -> _Value:
        return _Value(next(self._roots), statistics=statistics)

    def _depends(self, t: Any) -> bool:
        return isinstance(t, Tensor) and block_of(t) in self._blocks

    def _of(self, t: Tensor) -> _Value:
        """What is known of a tensor, which may be a view of the one that was made."""
        geometry = geometry_of(t)
        value = self._views.get((block_of(t), geometry)) or self._blocks[block_of(t)]
        return value if geometry == value.geometry else replace(value, place=(value.place, geometry), parts=())

    def _origins(self, t: Tensor) -> frozenset[int]:
        return frozenset({self._of(t).root, *(part.root for part in self._of(t).parts)})

    def _parts(self, t: Tensor) -> tuple[_Part, ...]:
        of = self._of(t)
        return of.parts or (_Part(of.root, of.place, 1.0),)

    def _products(self, t: Tensor) -> list[list[Tensor]]:
        """The products that a tensor is a sum of, each factor viewed as the tensor views its block."""
        return [[f.as_strided(*geometry_of(t)) for f in factors] for factors in self._of(t).products]

    def _factors(self, t: Tensor) -> list[Tensor]:
        products = self._products(t)
        return products[0] if len(products) == 1 else [t]

    def _same(self, a: Tensor, b: Tensor) -> bool:
        """Whether two tensors are functions of the same values, one by one, or equal."""
        alike = (self._of(a).root, self._of(a).place) == (self._of(b).root, self._of(b).place)
        return a.shape == b.shape and (alike or torch.equal(a, b))

    def _put(self, t: Tensor, value: _Value) -> None:
        block, value = block_of(t), replace(value, geometry=geometry_of(t))
        self._kept.append(t.untyped_storage())
        if _length(t) == t.numel():
            self._blocks[block] = value
            return
        self._views[block, value.geometry] = value
        whole = self._blocks.get(block) or self._fresh()
        self._blocks[block] = replace(whole, parts=(), products=_merged(whole.products, value.products, t))


class Exposure(TorchFunctionMode):
    """Notes which memory the network hands out, to NumPy or as an address: what is written there is seen by nobody."""

    def __init__(self, follow: Follow) -> None:
        super().__init__()
        self.follow = follow

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _EXPOSING and isinstance(args[0], Tensor):
            self.follow.note_written(args[0])
        return func(*args, **(kwargs or {}))


def _length(t: Tensor) -> int:
    return t.untyped_storage().nbytes() // t.element_size()


def _laid(factors: list[Tensor], out: Tensor) -> tuple[Tensor, ...]:
    """Factors broadcast over `out`, each in a block laid out as that of `out`."""
    blocks = [torch.ones(_length(out), dtype=factor.dtype, device=factor.device) for factor in factors]
    for block, factor in zip(blocks, factors, strict=True):
        block.as_strided(*geometry_of(out)).copy_(factor.expand(out.shape))
    return tuple(blocks)


def _merged(whole: Any, written: Any, t: Tensor) -> Any:
    """Products of a block, of which those of `t`, a part of it, were just written."""
    if not written:
        return whole
    first, last = written[-1][0], written[-1][-1]
    blocks = whole[-1] if whole else (torch.ones_like(first), torch.ones_like(first))
    for block, factor in zip((blocks[0], blocks[-1]), (first, last), strict=True):
        block.as_strided(*geometry_of(t)).copy_(factor.as_strided(*geometry_of(t)))
    return (blocks,)


def _alike(a: Any, b: Any) -> bool:
    """Whether two factors have the same magnitude."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a.abs(), b.abs())
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and abs(a) == abs(b)
