"""The kernels in C (native.c), for CPUs, compiled once per machine."""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from ctypes import c_float, c_int, c_int64, c_void_p
from dataclasses import replace
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import BFloat16, Float
from torch import Tensor
from torch.nn import functional as F

from resq_rl.quantization.graph.operators import Geometry
from resq_rl.quantization.kernels.plain import PLAIN, Kernels, Product

__all__ = ["native"]

log = logging.getLogger(__name__)

# As in native.c: pixels or output channels of a tile, and values that it multiplies at once.
SIDE, DEPTH = 16, 32

# No contraction: the C code says where a multiply-add rounds once. Errno and traps would keep loops from vector units.
_FLAGS = ["-O3", "-std=c11", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared"]
# Wider instructions and threads where the compiler has them.
_EXTRAS = (("-march=native", "-fopenmp"), ("-march=native",), ("-fopenmp",), ())


@lru_cache(maxsize=1)
def native() -> Kernels:
    """The kernels in C; the plain ones, and a line in the log, where nothing on this machine can compile them.

    The compiler is that of the variable CC, or cc, gcc or clang. What it makes is kept in the folder of
    XDG_CACHE_HOME (~/.cache), under a name that depends on source, compiler and processor.
    """
    try:
        library = ctypes.CDLL(str(_compiled()))
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().split("\n")[0][:200]
        log.info("Kernels run uncompiled, which is slower: %s (%s).", reason, type(error).__name__)
        return PLAIN
    return _Native(library)


def _compiled() -> Path:
    """The shared library, compiled unless it is there."""
    source = files("resq_rl.quantization.kernels").joinpath("native.c").read_bytes()
    compiler = shlex.split(os.environ.get("CC", "")) or [_found("cc", "gcc", "clang")]
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    parts = [source, version.encode(), repr((compiler, _FLAGS, _EXTRAS)).encode(), _processor().encode()]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "resq_rl"
    path = folder / f"kernels-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:20]}.so"
    if path.exists():
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        made = Path(tempfile.mkdtemp(dir=folder)) / path.name
    except OSError:  # read-only: compile anew in every process
        path = made = Path(tempfile.mkdtemp()) / path.name
    made.with_suffix(".c").write_bytes(source)
    for extras in _EXTRAS:
        command = [*compiler, *_FLAGS, *extras, str(made.with_suffix(".c")), "-o", str(made), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        if done.returncode == 0:
            break
    done.check_returncode()
    if made != path:
        made.replace(path)
        shutil.rmtree(made.parent, ignore_errors=True)
    return path


def _found(*names: str) -> str:
    for name in names:
        if path := shutil.which(name):
            return path
    raise FileNotFoundError(f"no C compiler ({', '.join(names)})")


def _processor() -> str:
    """What decides which instructions `-march=native` may use."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    return "".join(
        [platform.machine(), platform.processor(), *sorted({x for x in lines if x.startswith(("flags", "model name"))})]
    )


class _Native(Kernels):
    """The functions of the shared library, on tensors.

    Where the processor has tiles, most convolutions run on them: codes then lie in a room, as native.c calls it.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._encode, self._encode_keyframe = library.resq_encode, library.resq_encode_keyframe
        self._convolve, self._highest = library.resq_convolve, library.resq_highest
        for function in (self._encode, self._encode_keyframe, self._convolve, self._highest):
            function.restype = None
        numbers: list[Any] = [c_float, c_void_p, c_int64, c_void_p, c_int64, c_int, c_float]
        self._encode.argtypes = [*[c_int64] * 6, *[c_void_p] * 7, *numbers]
        self._encode_keyframe.argtypes = [*[c_int64] * 5, *[c_void_p] * 4, *[c_float] * 3]
        self._convolve.argtypes = [c_void_p, c_int64, *[c_void_p] * 4, c_int, c_void_p]
        self._highest.argtypes = [*[c_int64] * 5, *[c_void_p] * 2]
        self.tiles = bool(library.resq_tiles())

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
        steps: Tensor,
        index: Tensor,
        step: float | None = None,
        tau: Tensor | None = None,
        sigma: float = 1.0,
        kappa: Sequence[float] = (),
        product: Product | None = None,
    ) -> tuple[Tensor, Tensor]:
        if x.dim() != 4:
            return super().encode(x, reference, steps, index, step, tau, sigma, tuple(kappa))
        layout = _layout(reference)
        if not reference.is_contiguous(memory_format=layout):  # neither layout: only this copy is dense
            dense = reference.contiguous()
            found = self.encode(x, dense, steps, index, step, tau, sigma, kappa, product)
            if step is not None:  # a keyframe that many clips share stays as it is, and cannot be written
                reference.copy_(dense)
            return found
        x, index = x.contiguous(memory_format=layout), index.contiguous()
        codes, margins = self._place(x, product)
        cost, steps = torch.empty(index.shape), steps.contiguous()
        thresholds = None if tau is None else tau.contiguous()
        self._encode(
            *(*x.shape, layout == torch.channels_last, torch.get_num_threads()),
            x.data_ptr(),
            reference.data_ptr(),
            codes.data_ptr(),
            margins,
            cost.data_ptr(),
            index.data_ptr(),
            None if thresholds is None else thresholds.data_ptr(),
            sigma,
            _floats(tuple(kappa)),
            0 if thresholds is None else len(kappa),
            steps.data_ptr(),
            steps.shape[1],
            step is not None,
            step or 0.0,
        )
        return codes, cost

    def encode_keyframe(
        self, x: Tensor, step: float, low: float, high: float, product: Product | None = None
    ) -> tuple[Tensor, Tensor]:
        x = x.contiguous(memory_format=_layout(x)) if x.dim() == 4 else x.contiguous()
        (codes, margins), values = self._place(x, product), torch.empty_like(x)
        shape = x.shape if x.dim() == 4 else (1, 1, len(x), x[0].numel())
        pointers = x.data_ptr(), codes.data_ptr(), margins, values.data_ptr()
        self._encode_keyframe(*shape, torch.get_num_threads(), *pointers, step, low, high)
        return codes, values

    def _place(self, x: Tensor, product: Product | None) -> tuple[Tensor, Any]:
        """Where the codes of `x` go, and the margins of the room, or None for codes that lie like `x`."""
        if not self.tiles or product is None or product.tiles is None or _layout(x) != torch.channels_last:
            return torch.empty_like(x), None
        (clips, channels, height, width), (left, right, top, bottom) = x.shape, product.geometry.padding
        shape = clips, top + height + bottom, left + width + right, channels
        behind = SIDE * product.geometry.stride[1] * channels + DEPTH  # the last tile reads so far
        count = shape[0] * shape[1] * shape[2] * shape[3]
        room = torch.empty(count + behind, dtype=torch.bfloat16)
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
            base = torch.zeros(outputs)
        by_pixel = base.shape == (clips, outputs, *size)
        if by_pixel and over and base.is_contiguous(memory_format=torch.channels_last):
            y = base
        else:
            y = torch.empty((clips, outputs, *size), memory_format=torch.channels_last)
            base = base.contiguous(memory_format=torch.channels_last) if by_pixel else base.flatten()
        scale = (product.scale * step).flatten()
        shape = _whole((clips, *size, outputs, rows, columns, channels, high, wide, *stride))
        pointers = codes.data_ptr(), product.tiles.data_ptr(), scale.data_ptr(), base.data_ptr()
        self._convolve(shape, torch.get_num_threads(), *pointers, by_pixel, y.data_ptr())
        return y

    def highest(self, scores: Tensor) -> Tensor:
        if scores.device.type != "cpu":
            return super().highest(scores)
        layout = _layout(scores)
        scores = scores.contiguous(memory_format=layout)
        (clips, channels, height, width), last = scores.shape, layout == torch.channels_last
        found = torch.empty((clips, height, width), dtype=torch.uint8)
        shape = clips, channels, height * width, last, torch.get_num_threads()
        self._highest(*shape, scores.data_ptr(), found.data_ptr())
        return found


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
def _floats(values: tuple[float, ...]) -> Any:
    return (c_float * len(values))(*values)


@lru_cache(maxsize=4096)
def _whole(values: tuple[int, ...]) -> Any:
    return (c_int64 * len(values))(*values)


def _layout(x: Float[Tensor, "b c h w"]) -> torch.memory_format:
    """How a tensor lies in memory: channels last, or contiguous."""
    if x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format
