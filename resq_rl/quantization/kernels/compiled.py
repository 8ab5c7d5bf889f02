"""The kernels in C (native.c), for CPUs, compiled once per machine."""

import ctypes
import logging
import subprocess
from dataclasses import replace
from functools import lru_cache
from typing import Literal

import torch
from jaxtyping import BFloat16, Float
from torch import Tensor
from torch.nn import functional as F

from resq_rl.errors import NetworkError
from resq_rl.quantization.graph.operators import Geometry
from resq_rl.quantization.kernels.library import Function, load
from resq_rl.quantization.kernels.plain import PLAIN, Bound, Choice, Kernels, Product
from resq_rl.quantization.kernels.skipping import Skipping

__all__ = ["native"]

log = logging.getLogger(__name__)

# As in native.c: pixels or output channels of a tile, and values that it multiplies at once.
SIDE, DEPTH = 16, 32


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

    Where the processor has tiles, most convolutions run on them: codes then lie in a room, as native.c calls it.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._encode, self._encode_keyframe = Function(library, "encode"), Function(library, "encode_keyframe")
        self._fit = Function(library, "fit")
        self._convolve, self._highest = Function(library, "convolve"), Function(library, "highest")
        self.tiles = bool(library.resq_tiles())
        self.skipping = Skipping(library)

    def __reduce__(self) -> tuple[object, ...]:
        return native, ()  # a copy in another process is compiled there

    def product(
        self, geometry: Geometry, codes: Tensor, scale: Tensor, *, exact: bool, precision: Literal["bf16", "ieee"]
    ) -> Product:
        plain = super().product(geometry, codes, scale, exact=exact, precision=precision)
        fits = geometry.operator == "conv2d" and geometry.groups == 1 and geometry.dilation == (1, 1)
        return replace(plain, tiles=_tiles(codes)) if self.tiles and exact and fits else plain

    def encode(
        self,
        x: Tensor,
        reference: Tensor,
        choice: Choice,
        step: float | None = None,
        product: Product | None = None,
    ) -> tuple[Tensor, Tensor]:
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
        codes, margins = self._place(x, product)
        return codes, self._encoded(x, reference, choice, step, codes, margins)

    def _encoded(
        self,
        x: Tensor,
        reference: Tensor,
        choice: Choice,
        step: float | None,
        codes: Tensor,
        margins: Tensor | None = None,
        active: Tensor | None = None,
    ) -> Tensor:
        """Write codes, and the pixels where one is not 0 if `active` is given. Returns the cost of each pixel."""
        cost = torch.empty(choice.index.shape, dtype=torch.float32, device="cpu")
        clips, channels, rows, columns = x.shape
        self._encode(
            **{"clips": clips, "channels": channels, "rows": rows, "columns": columns},
            channels_last=_layout(reference) == torch.channels_last,
            threads=torch.get_num_threads(),
            x=x,
            reference=reference,
            codes=codes,
            margins=margins,
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
        )
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
        fits = product.any_order and product.tiles is None and _fits(x, reference, choice) and _read(base)
        if fits and reference.is_contiguous(memory_format=last):
            plan = self.skipping.planned(product, x.shape, lambda codes, y: self.accumulate(product, codes, 1.0, y))
        tiling = None if plan is None else plan.sought()
        if plan is None or tiling is None:
            return super().residual(product, x, reference, choice, unit, base, moves=moves, over=over)
        active = torch.empty(choice.index.shape, dtype=torch.uint8, device="cpu")
        with self.skipping.codes(x.shape, active) as codes:
            x = x.contiguous(memory_format=last)
            cost = self._encoded(x, reference, choice, unit if moves else None, codes, active=active)
            tiles = self.skipping.find(tiling, active)
            if not plan.few(len(tiles)):
                return self.accumulate(product, codes, unit, base, over=over), cost
            y = base if over and base.is_contiguous(memory_format=last) else base.clone(memory_format=last)
            self.skipping.add(product, tiling, tiles, codes, unit, y)
        return y, cost

    def fit(
        self,
        x: Tensor,
        reference: Tensor,
        choice: Choice,
        coverage: Tensor,
        costs: Tensor,
        allowance: Tensor,
    ) -> tuple[Tensor, Tensor]:
        if choice.tau is None or not _fits(x, reference, choice):
            return super().fit(x, reference, choice, coverage, costs, allowance)
        layout = _layout(reference)
        clips, channels, rows, columns = x.shape
        floor = torch.empty(clips, dtype=torch.float32, device="cpu")
        spent = torch.empty(clips, dtype=torch.float64, device="cpu")
        self._fit(
            **{"clips": clips, "channels": channels, "pixels": rows * columns},
            channels_last=layout == torch.channels_last,
            threads=torch.get_num_threads(),
            x=x.contiguous(memory_format=layout),
            reference=reference.contiguous(memory_format=layout),
            tau=choice.tau.contiguous(),
            sigma=choice.sigma,
            kappa=_numbers(tuple(choice.kappa)),
            kappas=len(choice.kappa),
            coverage=coverage.contiguous(),
            costs=costs,
            allowance=allowance,
            magnitude=torch.empty(choice.tau.shape, dtype=torch.float32, device="cpu"),
            floor=floor,
            spent=spent,
        )
        return floor, spent

    def encode_keyframe(
        self, x: Tensor, step: Bound, low: Bound, high: Bound, product: Product | None = None
    ) -> tuple[Tensor, Tensor]:
        if isinstance(step, Tensor) or not _read(x) or not x.numel():
            return super().encode_keyframe(x, step, low, high)
        x = x.contiguous(memory_format=_layout(x)) if x.dim() == 4 else x.contiguous()
        (codes, margins), values = self._place(x, product), torch.empty_like(x)
        clips, channels, rows, columns = x.shape if x.dim() == 4 else (1, 1, len(x), x[0].numel())
        self._encode_keyframe(
            **{"clips": clips, "channels": channels, "rows": rows, "columns": columns},
            threads=torch.get_num_threads(),
            x=x,
            codes=codes,
            margins=margins,
            values=values,
            step=step,
            low=low,
            high=high,
        )
        return codes, values

    def _place(self, x: Tensor, product: Product | None) -> tuple[Tensor, Tensor | None]:
        """Where the codes of `x` go, and the margins of the room, or None for codes that lie like `x`."""
        if not self.tiles or product is None or product.tiles is None or _layout(x) != torch.channels_last:
            return torch.empty_like(x), None
        (clips, channels, height, width), (left, right, top, bottom) = x.shape, product.geometry.padding
        shape = clips, top + height + bottom, left + width + right, channels
        behind = SIDE * product.geometry.stride[1] * channels + DEPTH  # the last tile reads so far
        count = shape[0] * shape[1] * shape[2] * shape[3]
        room = torch.empty(count + behind, dtype=torch.bfloat16, device="cpu")
        return room[:count].view(shape), _whole((left, right, top, bottom, behind))

    def accumulate(
        self, product: Product, codes: Tensor, step: float, base: Tensor | None, *, over: bool = False
    ) -> Tensor:
        if codes.dtype != torch.bfloat16 or product.tiles is None:
            return super().accumulate(product, codes, step, base)
        (clips, rows, columns, channels), outputs = codes.shape, len(product.codes)
        (high, wide), stride = product.geometry.kernel, product.geometry.stride
        size = (rows - high) // stride[0] + 1, (columns - wide) // stride[1] + 1
        if base is None:
            base = torch.zeros(outputs, dtype=torch.float32, device="cpu")
        by_pixel = base.shape == (clips, outputs, *size)
        if by_pixel and over and base.is_contiguous(memory_format=torch.channels_last):
            y = base
        else:
            y = torch.empty(
                (clips, outputs, *size), dtype=torch.float32, device="cpu", memory_format=torch.channels_last
            )
            base = base.contiguous(memory_format=torch.channels_last) if by_pixel else base.flatten()
        if not by_pixel and base.numel() != outputs:
            raise NetworkError(f"A base of {base.numel()} numbers cannot be added to {outputs} channels.")
        self._convolve(
            **{"clips": clips, "rows": size[0], "columns": size[1], "outputs": outputs},
            **{"room_rows": rows, "room_columns": columns, "channels": channels},
            **{"kernel_rows": high, "kernel_columns": wide, "stride_rows": stride[0], "stride_columns": stride[1]},
            threads=torch.get_num_threads(),
            by_pixel=by_pixel,
            room=codes,
            tiles=product.tiles,
            scale=(product.scale * step).flatten(),
            base=base,
            y=y,
        )
        return y

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


def _fits(x: Tensor, reference: Tensor, choice: Choice) -> bool:
    """Whether the functions can encode a residual."""
    by_pixel = (len(x), *x.shape[2:])
    shapes = reference.shape == x.shape and choice.index.shape == by_pixel
    shapes = shapes and (choice.tau is None or choice.tau.shape == by_pixel)
    return x.dim() == 4 and shapes and _read(x) and _read(reference)


def _read(x: Tensor) -> bool:
    """Whether the functions can read a tensor: plain float32 in this machine's memory."""
    return x.dtype == torch.float32 and x.is_cpu and x.layout == torch.strided and not x.is_neg()


def _tiles(codes: Float[Tensor, "o c h w"]) -> BFloat16[Tensor, "blocks h steps 16 16 2"]:
    """Weights as tiles: by 16 output channels, row of the kernel and 32 of its inputs, padded with zeros.

    A tile holds two inputs of every output channel side by side, then the next two.
    """
    outputs, channels, high, wide = codes.shape
    rows = codes.permute(0, 2, 3, 1).reshape(outputs, high, wide * channels)
    rows = F.pad(rows, (0, -wide * channels % DEPTH, 0, 0, 0, -outputs % SIDE))
    split = rows.view(-1, SIDE, high, rows.shape[2] // DEPTH, DEPTH // 2, 2)
    return split.permute(0, 2, 3, 4, 1, 5).contiguous().to(torch.bfloat16)


@lru_cache(maxsize=64)
def _numbers(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device="cpu")


@lru_cache(maxsize=1024)
def _whole(values: tuple[int, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device="cpu")


def _layout(x: Float[Tensor, "b c h w"]) -> torch.memory_format:
    """How a tensor lies in memory: channels last, or contiguous."""
    if x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format
