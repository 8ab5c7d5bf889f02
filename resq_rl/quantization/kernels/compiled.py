"""The kernels in C (native.c), for CPUs, compiled once per machine."""

import ctypes
import logging
import subprocess
from dataclasses import replace
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from resq_rl.errors import NetworkError
from resq_rl.quantization.graph.operators import Geometry
from resq_rl.quantization.kernels.blocks import any_of, joined, split, summed
from resq_rl.quantization.kernels.int8 import byte_weights
from resq_rl.quantization.kernels.library import Arguments, Function, load
from resq_rl.quantization.kernels.plain import PLAIN, Bound, Choice, Kernels, Product, from_image
from resq_rl.quantization.kernels.skipping import Skipping
from resq_rl.quantization.specification.budget import ROUNDING

__all__ = ["native"]

log = logging.getLogger(__name__)


@lru_cache(maxsize=1)
def native() -> Kernels:
    """The kernels in C; the plain ones, and a line in the log, where nothing on this machine can compile them.

    The compiler is that of the variable CC, or cc, gcc or clang. What it makes is kept in the folder of
    XDG_CACHE_HOME (~/.cache), under a name that depends on source, compiler and processor, and is loaded again only if
    nobody else can have written it.
    """
    try:
        return _Native(load())
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().split("\n")[0][:200]
        log.info("Kernels run uncompiled, which is slower: %s (%s).", reason, type(error).__name__)
        return PLAIN


class _Native(Kernels):
    """The functions of the shared library, on tensors; what they cannot read runs on the plain kernels.

    Where products of bytes are exact, codes are bytes.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._encode, self._encode_keyframe = Function(library, "encode"), Function(library, "encode_keyframe")
        self._fit, self._highest = Arguments("fit"), Function(library, "highest")
        self.skipping = Skipping(library)

    def __reduce__(self) -> tuple[object, ...]:
        return native, ()  # a copy in another process is compiled there

    def product(self, geometry: Geometry, codes: Tensor, scale: Tensor, span: tuple[int, int]) -> Product:
        plain = super().product(geometry, codes, scale, span)
        return replace(plain, int8=byte_weights(geometry, codes, span)) if plain.exact else plain

    def encode(
        self,
        x: Tensor,
        reference: Tensor,
        choice: Choice,
        step: float | None = None,
        product: Product | None = None,
    ) -> tuple[Tensor, Tensor]:
        if choice.blocks > 1:
            return self._encode_blocks(x, reference, choice, step, product)
        if not _fits(x, reference, choice):
            return super().encode(x, reference, choice, step)
        layout = _layout(reference)
        if not reference.is_contiguous(memory_format=layout):  # neither layout: only this copy is dense
            dense = reference.contiguous()
            found = self.encode(x, dense, choice, step, product)
            if step is not None:  # a keyframe that many clips share stays as it is, and cannot be written
                reference.copy_(dense)
            return found
        x = x.contiguous(memory_format=layout)
        codes = _codes_for(product, x)
        return codes, self._encoded(x, reference, choice, step, codes, product)

    def _encoded(
        self,
        x: Tensor,
        reference: Tensor,
        choice: Choice,
        step: float | None,
        codes: Tensor,
        product: Product | None,
        active: Tensor | None = None,
    ) -> Tensor:
        """Write codes, and the pixels where one is not 0 if `active` is given. Returns the cost of each pixel."""
        cost = torch.empty(choice.index.shape, dtype=torch.float32, device="cpu")
        clips, channels, rows, columns = x.shape
        bytes_, zero = _bytes(codes, product)
        fit, allowance = None, choice.allowance
        if allowance is not None:
            room = torch.empty(4 * choice.index.numel(), dtype=torch.float32, device="cpu")  # until it has run
            fit = self._fit(
                **{"costs": allowance.costs, "coverage": allowance.coverage, "rows": allowance.rows, "room": room},
                **{"left": allowance.left, "share": allowance.share, "slack": ROUNDING},
            )
        invalid = self._encode(
            **{"clips": clips, "channels": channels, "pixels": rows * columns, "bytes": bytes_, "zero": zero},
            channels_last=_layout(reference) == torch.channels_last,
            threads=torch.get_num_threads(),
            x=x,
            reference=reference,
            codes=codes,
            active=active,
            cost=cost,
            index=choice.index.contiguous(),
            tau=None if choice.tau is None else choice.tau.contiguous(),
            sigma=choice.sigma,
            kappa=_numbers(tuple(choice.kappa)),
            kappas=0 if choice.tau is None else len(choice.kappa),
            steps=choice.steps.contiguous(),
            entries=choice.steps.shape[1],
            moves=step is not None,
            step=step or 0.0,
            fit=None if fit is None else ctypes.addressof(fit),
        )
        _check_valid(invalid)
        return cost

    def residual(
        self,
        product: Product,
        x: Tensor,
        reference: Tensor,
        choice: Choice,
        unit: float,
        base: Tensor,
        *,
        moves: bool,
        over: bool = False,
    ) -> tuple[Tensor, Tensor]:
        last, plan = torch.channels_last, None
        fits = product.exact and _fits(x, reference, choice) and _read(base)
        if fits and reference.is_contiguous(memory_format=last):
            plan = self.skipping.planned(product, x.shape, lambda codes, y: self._whole(product, codes, 1.0, y))
        tiling = None if plan is None else plan.sought()
        if plan is None or tiling is None:
            return super().residual(product, x, reference, choice, unit, base, moves=moves, over=over)
        x, moved, blocks = x.contiguous(memory_format=last), unit if moves else None, choice.blocks
        x, before, choice = split(x, blocks), split(reference, blocks), choice.by_block
        active = torch.empty(choice.index.shape, dtype=torch.uint8, device="cpu")
        with self.skipping.codes(x.shape, active, product) as own:
            cost = summed(self._encoded(x, before, choice, moved, own, product, active), blocks)
            codes = joined(own, blocks)
            tiles = self.skipping.find(tiling, any_of(active, blocks))
            if not plan.few(len(tiles)):
                return self._whole(product, codes, unit, base, over=over), cost
            y = _as_image(product.geometry, base)
            y = y if over and y.is_contiguous(memory_format=last) else y.clone(memory_format=last)
            self.skipping.add(product, tiling, tiles, codes, unit, y)
        return from_image(product.geometry, y, base.shape[:-1]), cost

    def _whole(self, product: Product, codes: Tensor, step: float, base: Tensor, *, over: bool = False) -> Tensor:
        """`accumulate` for codes of an image."""
        return self.accumulate(product, from_image(product.geometry, codes, base.shape[:-1]), step, base, over=over)

    def encode_keyframe(
        self, x: Tensor, step: Bound, low: Bound, high: Bound, product: Product | None = None
    ) -> tuple[Tensor, Tensor]:
        if isinstance(step, Tensor) or not _read(x) or not x.numel():
            return super().encode_keyframe(x, step, low, high)
        x = x.contiguous(memory_format=_layout(x)) if x.dim() == 4 else x.contiguous()
        codes, values = _codes_for(product, x), torch.empty_like(x)
        bytes_, zero = _bytes(codes, product)
        invalid = self._encode_keyframe(
            **{"count": x.numel(), "threads": torch.get_num_threads(), "bytes": bytes_, "zero": zero},
            **{"x": x, "codes": codes, "values": values, "step": step, "low": low, "high": high},
        )
        _check_valid(invalid)
        return codes, values

    def highest(self, scores: Tensor) -> Tensor:
        if not _read(scores) or scores.dim() != 4 or not 1 <= scores.shape[1] <= 255:
            return super().highest(scores)
        layout = _layout(scores)
        (clips, channels, height, width) = scores.shape
        found = torch.empty((clips, height, width), dtype=torch.uint8, device="cpu")
        self._highest(
            **{"clips": clips, "channels": channels, "pixels": height * width},
            channels_last=layout == torch.channels_last,
            threads=torch.get_num_threads(),
            scores=scores.contiguous(memory_format=layout),
            found=found,
        )
        return found


def _as_image(geometry: Geometry, y: Tensor) -> Float[Tensor, "b o h w"]:
    """An operator's output as an image, one pixel for each vector of a linear layer."""
    return y if geometry.operator != "linear" else y.reshape(len(y), 1, -1, y.shape[-1]).permute(0, 3, 1, 2)


def _fits(x: Tensor, reference: Tensor, choice: Choice) -> bool:
    """Whether the functions can encode a residual."""
    by_pixel = (len(x), *x.shape[2:])
    shapes = reference.shape == x.shape and choice.index.shape == by_pixel
    shapes = shapes and (choice.tau is None or choice.tau.shape == by_pixel)
    return x.dim() == 4 and shapes and _read(x) and _read(reference)


def _read(x: Tensor) -> bool:
    """Whether the functions can read a tensor: plain float32 in this machine's memory."""
    return x.dtype == torch.float32 and x.is_cpu and x.layout == torch.strided and not x.is_neg()


def _codes_for(product: Product | None, x: Tensor) -> Tensor:
    """Where the codes of `x` go, which lie in memory like it."""
    bytes_ = product is not None and product.int8 is not None and (x.dim() != 4 or _layout(x) == torch.channels_last)
    return torch.empty_like(x, dtype=torch.uint8 if bytes_ else torch.float32)


def _bytes(codes: Tensor, product: Product | None) -> tuple[bool, int]:
    """Whether codes are bytes, and with what zero point."""
    if codes.dtype != torch.uint8 or product is None or product.int8 is None:
        return False, 0
    return True, product.int8.zero


def _check_valid(invalid: int) -> None:
    if invalid:
        raise NetworkError(
            "A layer's input holds NaN in this frame: look at divisions, logarithms and square roots of the network "
            "before its layers."
        )


@lru_cache(maxsize=64)
def _numbers(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device="cpu")


def _layout(x: Float[Tensor, "b c h w"]) -> torch.memory_format:
    """How a tensor lies in memory: channels last, or contiguous."""
    if x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format
