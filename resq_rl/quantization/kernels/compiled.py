"""The kernels in C (native.c), for CPUs, compiled once per machine."""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from ctypes import c_float, c_int64, c_void_p
from dataclasses import replace
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import BFloat16, Float
from torch import Tensor
from torch.nn import functional as F

from resq_rl.errors import NetworkError
from resq_rl.quantization.graph.operators import Geometry
from resq_rl.quantization.kernels.plain import PLAIN, Bound, Kernels, Product

__all__ = ["native"]

log = logging.getLogger(__name__)

# As in native.c: pixels or output channels of a tile, and values that it multiplies at once.
SIDE, DEPTH = 16, 32

# The arguments of every function in native.c, from which both its struct in C and the one that is filled here are made.
_INTEGER, _NUMBER = "int64_t", "float"
_ENCODED = dict.fromkeys(("clips", "channels", "rows", "columns", "threads"), _INTEGER) | {
    "x": "const float *",
    "codes": "void *",
    "margins": "const int64_t *",
    "step": _NUMBER,
}
_ARGUMENTS: dict[str, dict[str, str]] = {
    "encode": _ENCODED
    | dict.fromkeys(("channels_last", "kappas", "entries", "moves"), _INTEGER)
    | dict.fromkeys(("tau", "kappa", "steps"), "const float *")
    | {"reference": "float *", "cost": "float *", "index": "const int64_t *", "sigma": _NUMBER},
    "encode_keyframe": _ENCODED | {"values": "float *", "low": _NUMBER, "high": _NUMBER},
    "highest": dict.fromkeys(("clips", "channels", "pixels", "channels_last", "threads"), _INTEGER)
    | {"scores": "const float *", "found": "uint8_t *"},
    "convolve": dict.fromkeys(
        ("clips", "rows", "columns", "outputs", "room_rows", "room_columns", "channels", "threads", "by_pixel"),
        _INTEGER,
    )
    | dict.fromkeys(("kernel_rows", "kernel_columns", "stride_rows", "stride_columns"), _INTEGER)
    | {"room": "const uint16_t *", "tiles": "const uint16_t *", "scale": "const float *", "base": "const float *"}
    | {"y": "float *"},
}
# What a tensor must hold for an argument; codes lie in a room of bfloat16, or are float32.
_HOLDS = {
    "float *": (torch.float32,),
    "const float *": (torch.float32,),
    "const int64_t *": (torch.int64,),
    "const uint16_t *": (torch.bfloat16,),
    "uint8_t *": (torch.uint8,),
    "void *": (torch.float32, torch.bfloat16),
}
_MAY_LACK = ("margins", "tau", "kappa")

# No contraction: the C code says where a multiply-add rounds once. Errno and traps would keep loops from vector units.
_FLAGS = ["-O3", "-std=c11", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared"]
# Wider instructions and threads where the compiler has them.
_EXTRAS = (("-march=native", "-fopenmp"), ("-march=native",), ("-fopenmp",), ())


@lru_cache(maxsize=1)
def native() -> Kernels:
    """The kernels in C; the plain ones, and a line in the log, where nothing on this machine can compile them.

    The compiler is that of the variable CC, or cc, gcc or clang. What it makes is kept in the folder of
    XDG_CACHE_HOME (~/.cache), under a name that depends on source, compiler and processor, and is loaded again only if
    nobody else can have written it.
    """
    try:
        return _Native(_library())
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().split("\n")[0][:200]
        log.info("Kernels run uncompiled, which is slower: %s (%s).", reason, type(error).__name__)
        return PLAIN


def _library() -> ctypes.CDLL:
    """The shared library, compiled unless it is kept."""
    source = _declarations() + files("resq_rl.quantization.kernels").joinpath("native.c").read_text()
    compiler = shlex.split(os.environ.get("CC", "")) or [_found("cc", "gcc", "clang")]
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    parts = [source, version, repr((compiler, _FLAGS, _EXTRAS)), _processor()]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "resq_rl"
    kept = folder / f"kernels-{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:20]}.so"
    if _own(folder) and _own(kept):
        try:
            return ctypes.CDLL(str(kept))
        except OSError as error:
            log.info("The compiled kernels in %s are damaged (%s) and are compiled anew.", kept, error)
    with tempfile.TemporaryDirectory(prefix="resq_rl-", dir=_folder(folder)) as work:
        made = _compiled(compiler, source, Path(work))
        if Path(work).parent == folder:
            made = made.replace(kept)
        return ctypes.CDLL(str(made))


def _folder(folder: Path) -> Path | None:
    """The folder to keep the library in, made if it is not there; None where it cannot be kept safely."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        return None
    return folder if _own(folder) and os.access(folder, os.W_OK) else None


def _own(path: Path) -> bool:
    """Whether a file or folder is there, is this user's, and can be changed by nobody else."""
    try:
        about = path.lstat()
    except OSError:
        return False
    mine = not hasattr(os, "getuid") or about.st_uid == os.getuid()
    return mine and not stat.S_ISLNK(about.st_mode) and not about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _compiled(compiler: list[str], source: str, folder: Path) -> Path:
    """The library made from the source in a folder, with the widest instructions that the compiler knows."""
    text, made = folder / "kernels.c", folder / "kernels.so"
    text.write_text(source)
    for extras in _EXTRAS:
        command = [*compiler, *_FLAGS, *extras, str(text), "-o", str(made), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        if done.returncode == 0:
            break
    done.check_returncode()
    made.chmod(0o700)  # whatever the umask
    return made


def _declarations() -> str:
    """The structs of arguments in C."""
    structs = [
        f"struct arguments_{name} {{\n" + "".join(f"    {kind} {field};\n" for field, kind in fields.items()) + "};\n"
        for name, fields in _ARGUMENTS.items()
    ]
    return "#define _GNU_SOURCE\n#include <stdint.h>\n" + "".join(structs)  # the macro must come before any header


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


class _Function:
    """A function of the library, called by the names of its arguments."""

    def __init__(self, library: ctypes.CDLL, name: str) -> None:
        self.name, self.fields = name, _ARGUMENTS[name]
        self.tensors = {field: _HOLDS[kind] for field, kind in self.fields.items() if kind in _HOLDS}
        kinds = {_INTEGER: c_int64, _NUMBER: c_float}
        members = [(field, kinds.get(kind, c_void_p)) for field, kind in self.fields.items()]
        self.struct: Any = type(f"arguments_{name}", (ctypes.Structure,), {"_fields_": members})
        self.run = getattr(library, f"resq_{name}")
        self.run.restype, self.run.argtypes = None, [ctypes.POINTER(self.struct)]

    def __call__(self, **values: Any) -> None:
        """Run the function.

        Raises:
            NetworkError: an argument is missing, unknown, or not of the type, device and layout that is read.
        """
        if values.keys() != self.fields.keys():
            raise NetworkError(f"{self.name} takes {sorted(self.fields)}, got {sorted(values)}.")
        for field, types in self.tensors.items():
            values[field] = self._address(field, types, values[field])
        self.run(ctypes.byref(self.struct(**values)))

    def _address(self, field: str, types: tuple[torch.dtype, ...], value: Any) -> int | None:
        if value is None and field in _MAY_LACK:
            return None
        if not isinstance(value, Tensor) or value.dtype not in types or not _dense(value):
            what = f"{value.dtype} on {value.device}" if isinstance(value, Tensor) else type(value).__name__
            kind = self.fields[field]
            raise NetworkError(f"{self.name} reads {field} as {kind} of a dense tensor on the CPU, got {what}.")
        return value.data_ptr()


class _Native(Kernels):
    """The functions of the shared library, on tensors; what they cannot read runs on the plain kernels.

    Where the processor has tiles, most convolutions run on them: codes then lie in a room, as native.c calls it.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._encode, self._encode_keyframe = _Function(library, "encode"), _Function(library, "encode_keyframe")
        self._convolve, self._highest = _Function(library, "convolve"), _Function(library, "highest")
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
        by_pixel = (len(x), *x.shape[2:])
        shapes = reference.shape == x.shape and index.shape == by_pixel and (tau is None or tau.shape == by_pixel)
        if x.dim() != 4 or not shapes or not all(map(_read, (x, reference))):
            return super().encode(x, reference, steps, index, step, tau, sigma, tuple(kappa))
        layout = _layout(reference)
        if not reference.is_contiguous(memory_format=layout):  # neither layout: only this copy is dense
            dense = reference.contiguous()
            found = self.encode(x, dense, steps, index, step, tau, sigma, kappa, product)
            if step is not None:  # a keyframe that many clips share stays as it is, and cannot be written
                reference.copy_(dense)
            return found
        x = x.contiguous(memory_format=layout)
        codes, margins = self._place(x, product)
        cost = torch.empty(index.shape, dtype=torch.float32, device="cpu")
        clips, channels, rows, columns = x.shape
        self._encode(
            **{"clips": clips, "channels": channels, "rows": rows, "columns": columns},
            channels_last=layout == torch.channels_last,
            threads=torch.get_num_threads(),
            x=x,
            reference=reference,
            codes=codes,
            margins=margins,
            cost=cost,
            index=index.contiguous(),
            tau=None if tau is None else tau.contiguous(),
            sigma=sigma,
            kappa=_numbers(tuple(kappa)),
            kappas=0 if tau is None else len(kappa),
            steps=steps.contiguous(),
            entries=steps.shape[1],
            moves=step is not None,
            step=step or 0.0,
        )
        return codes, cost

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


def _read(x: Tensor) -> bool:
    """Whether the functions can read a tensor: plain float32 in this machine's memory."""
    return x.dtype == torch.float32 and x.is_cpu and x.layout == torch.strided and not x.is_neg()


def _dense(x: Tensor) -> bool:
    """Whether a tensor lies on the CPU without gaps, in one of the two layouts."""
    dense = x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
    return dense and x.is_cpu and not x.is_neg()


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
