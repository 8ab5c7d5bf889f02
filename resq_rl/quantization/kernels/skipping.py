"""Operators on codes that multiply only for outputs that read a code other than 0.

The windows that active outputs read are gathered, one product runs over them, and its sums are added to the reference
at their places. Outputs are taken one by one, those of grouped and dilated convolutions by square tiles. Sums of
integers below 2^24 are exact in float32 in whatever order they are taken, so that the numbers are those of the operator
on the whole input. Whether active outputs or the whole take less time is measured, once for each shape.
"""

import ctypes
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from resq_rl.quantization.graph.operators import Geometry, Pair
from resq_rl.quantization.kernels.library import Function
from resq_rl.quantization.kernels.plain import Product

__all__ = ["Plan", "Skipping", "Tiling", "rounded", "tiling_of"]

# Outputs along the side of a tile, and of a tile where the output has fewer than SMALL rows or columns; of grouped and
# dilated convolutions.
SIDE, SMALL_SIDE, SMALL = 8, 4, 32
FEWEST = 8  # tiles that are worth choosing from
# Times that a duration is measured, of which the shortest counts, and how finely the break-even is sought.
ROUNDS, BISECTIONS = 2, 3
# Largest share of the whole operator's time that tiles may take, so that they pay for being sought.
WORTH = 0.8
# Products that run whole, without seeking tiles, after one that had too many active.
PAUSE = 7


@dataclass(frozen=True)
class Tiling:
    """The output of an operator cut into square tiles, of one output or more, numbered clip by clip and row by row.

    Attributes:
        geometry: of the operator; a linear layer is a convolution of 1x1.
        clips: in the batch.
        input: height and width of the input.
        output: height and width of the output.
        side: outputs along the side of a tile; those at the right and at the bottom may reach beyond the output. With
            1, a window holds exactly what its output reads.
    """

    geometry: Geometry
    clips: int
    input: Pair
    output: Pair
    side: int

    @cached_property
    def grid(self) -> Pair:
        """Rows and columns of tiles in each clip."""
        return -(-self.output[0] // self.side), -(-self.output[1] // self.side)

    @cached_property
    def count(self) -> int:
        """All tiles of all clips."""
        return self.clips * self.grid[0] * self.grid[1]

    @cached_property
    def window(self) -> Pair:
        """Height and width of the input that a tile reads."""
        geometry = self.geometry
        high, wide = (
            (self.side - 1) * stride + dilation * (kernel - 1) + 1
            for stride, dilation, kernel in zip(geometry.stride, geometry.dilation, geometry.kernel, strict=True)
        )
        return high, wide

    @cached_property
    def inside(self) -> Geometry:
        """The convolution of a window, which holds its own padding."""
        return replace(self.geometry, padding=(0, 0, 0, 0))

    @cached_property
    def places(self) -> dict[str, int]:
        """The arguments of the compiled functions that say where tiles lie in the output."""
        return dict(zip(("down", "across", "rows", "columns"), (*self.grid, *self.output), strict=True))

    @cached_property
    def windows(self) -> dict[str, int]:
        """The arguments of the compiled functions that say where windows lie in the input."""
        (down, right), (left, _, top, _) = self.geometry.stride, self.geometry.padding
        names = "down", "across", "rows", "columns", "high", "wide", "step_rows", "step_columns"
        steps = self.side * down, self.side * right
        values = *self.grid, *self.input, *self.window, *steps
        return dict(zip(names, values, strict=True)) | {"lead_rows": top, "lead_columns": left}


def tiling_of(geometry: Geometry, clips: int, size: Pair) -> Tiling | None:
    """The tiles of an operator's output for inputs of a size; None for transposed convolutions and few tiles."""
    if geometry.operator == "conv_transpose2d":
        return None
    left, right, top, bottom = geometry.padding
    height, width = (
        (length + sides - dilation * (kernel - 1) - 1) // stride + 1
        for length, sides, dilation, kernel, stride in zip(
            size, (top + bottom, left + right), geometry.dilation, geometry.kernel, geometry.stride, strict=True
        )
    )
    alone = geometry.groups == 1 and geometry.dilation == (1, 1)
    side = 1 if alone else SIDE if min(height, width) >= SMALL else SMALL_SIDE
    tiling = Tiling(geometry, clips, size, (height, width), side)
    return tiling if tiling.count >= FEWEST * clips else None


@dataclass
class Plan:
    """When products of a shape run by tiles.

    Seeking tiles costs a little, so that products pause after one in which too many were active.

    Attributes:
        tiling: the tiles, or None where there are too few.
        most: number of active tiles up to which they are faster than the whole operator.
        pause: products to come for which no tiles are sought.
    """

    tiling: Tiling | None
    most: int
    pause: int = 0

    def sought(self) -> Tiling | None:
        """The tiling where tiles are worth seeking in the next product."""
        if not self.most or self.pause:
            self.pause = max(0, self.pause - 1)
            return None
        return self.tiling

    def few(self, active: int) -> bool:
        """Whether so many active tiles are faster than the whole operator."""
        self.pause = 0 if active <= self.most else PAUSE
        return active <= self.most


def rounded(count: int) -> int:
    """A number of tiles rounded up to one of four in each octave: oneDNN compiles anew for every number it meets."""
    step = max(1, 2 ** ((count - 1).bit_length() - 3)) if count > 1 else 1
    return -(-count // step) * step


class Skipping:
    """Operators by active tiles, with the functions of the compiled library.

    Codes lie in memory that this object keeps and that holds codes of 0 between uses, so that these need not be
    written.

    Attributes:
        enabled: whether tiles are sought at all; else every operator runs whole.
    """

    enabled = True

    def __init__(self, library: ctypes.CDLL) -> None:
        self._find, self._gather = Function(library, "find"), Function(library, "gather")
        self._scatter, self._clear = Function(library, "scatter"), Function(library, "clear")
        self._kept: dict[int, list[Tensor]] = {}  # bytes of a value, one tensor for each thread that steps a model
        self._shares: dict[tuple[Any, ...], float] = {}
        self._plans: dict[tuple[Any, ...], Plan] = {}

    @contextmanager
    def codes(self, shape: torch.Size, active: UInt8[Tensor, "..."], product: Product) -> Iterator[Tensor]:
        """Codes of 0 of a shape, channels last, into which others may be written where `active` then marks pixels."""
        clips, channels, rows, columns = shape
        dtype, zero = _held(product)
        size, free = channels * dtype.itemsize, self._kept.setdefault(zero, [])
        kept = free.pop() if free else torch.empty(0, dtype=torch.uint8, device="cpu")
        if kept.numel() < active.numel() * size:
            kept = torch.full((active.numel() * size,), zero, dtype=torch.uint8, device="cpu")
        own = kept[: active.numel() * size].view(dtype)
        yield own.view(clips, rows, columns, channels).permute(0, 3, 1, 2)
        self._clear(pixels=active.numel(), size=size, zero=zero, active=active, codes=own)
        free.append(kept)  # unless an error left codes in it

    def find(self, tiling: Tiling, active: UInt8[Tensor, "b h w"]) -> Int64[Tensor, " n"]:
        """The tiles whose window has an active pixel, ascending."""
        tiles = torch.empty(tiling.count, dtype=torch.int64, device="cpu")
        return tiles[: self._find(**tiling.windows, clips=tiling.clips, active=active, tiles=tiles)]

    def add(
        self,
        product: Product,
        tiling: Tiling,
        tiles: Int64[Tensor, " n"],
        codes: Tensor,
        unit: float,
        y: Float[Tensor, "b o _ _"],
    ) -> None:
        """Add the product of codes in units of `unit` to `y` at some tiles, in place: y = fma(total, scale, y).

        Args:
            codes, y: channels last.
        """
        if not len(tiles):
            return
        some, channels = min(rounded(len(tiles)), tiling.count), codes.shape[1]
        dtype, zero = _held(product)
        windows = torch.empty(some, *tiling.window, channels, dtype=dtype, device="cpu")
        windows[len(tiles) :] = zero
        threads = {"count": len(tiles), "threads": torch.get_num_threads(), "tiles": tiles}
        size = {"size": channels * dtype.itemsize, "zero": zero}
        self._gather(**tiling.windows, **threads, **size, codes=codes, windows=windows)
        if tiling.side == 1:
            totals = product.flat.totals(windows.flatten(1))
        else:
            totals = product.totals(windows.permute(0, 3, 1, 2), tiling.inside)
            totals = totals.contiguous(memory_format=torch.channels_last)
        self._scatter(
            **tiling.places,
            **threads,
            channels=y.shape[1],
            side=tiling.side,
            totals=totals,
            scale=product.scaled(unit).flatten(),
            y=y,
        )

    def planned(self, product: Product, shape: torch.Size, dense: Callable[[Tensor, Tensor], object]) -> Plan:
        """When products of codes of a shape run by tiles.

        Args:
            dense: adds the product of codes as an image, the first argument, to the second, an operator's output.
        """
        if not self.enabled:
            return Plan(None, 0)
        key = product.geometry, product.codes.shape, _held(product), shape, torch.get_num_threads()
        if key not in self._plans:
            tiling = tiling_of(product.geometry, shape[0], (shape[2], shape[3]))
            share = 0.0 if tiling is None else self._break_even(product, tiling, shape[1], dense)
            self._plans[key] = Plan(tiling, 0 if tiling is None else int(share * tiling.count))
        return self._plans[key]

    def _break_even(
        self, product: Product, tiling: Tiling, channels: int, dense: Callable[[Tensor, Tensor], object]
    ) -> float:
        """The share of active tiles up to which tiles are faster than the whole operator, measured.

        Batches share what is measured for the next power of two.
        """
        tiling = replace(tiling, clips=2 ** (tiling.clips - 1).bit_length())
        key = tiling, product.codes.shape, _held(product), torch.get_num_threads()
        if key not in self._shares:
            (dtype, zero), outputs = _held(product), len(product.codes)
            codes = torch.full((tiling.clips, *tiling.input, channels), zero, dtype=dtype, device="cpu")
            y = torch.zeros(tiling.clips, *tiling.output, outputs, dtype=torch.float32, device="cpu")
            linear = product.geometry.operator == "linear"
            codes, out, y = codes.permute(0, 3, 1, 2), y if linear else y.permute(0, 3, 1, 2), y.permute(0, 3, 1, 2)
            whole = _seconds(lambda: dense(codes, out))
            low, high = 0.0, 1.0
            for _ in range(BISECTIONS):
                share = (low + high) / 2
                count = max(1, int(share * tiling.count))
                tiles = torch.arange(count, device="cpu") * tiling.count // count  # spread, as motion is
                spent = _seconds(lambda some=tiles: self.add(product, tiling, some, codes, 1.0, y))  # type: ignore[misc]
                low, high = (share, high) if spent < WORTH * whole else (low, share)
            self._shares[key] = low
        return self._shares[key]


def _held(product: Product) -> tuple[torch.dtype, int]:
    """How codes of a product are held, and as what a code of 0 is."""
    return (torch.float32, 0) if product.int8 is None else (torch.uint8, product.int8.zero)


def _seconds(run: Callable[[], object]) -> float:
    """The shortest time that it takes, once it ran."""
    run()
    spent = []
    for _ in range(ROUNDS):
        started = time.thread_time()
        run()
        spent.append(time.thread_time() - started)
    return min(spent)
