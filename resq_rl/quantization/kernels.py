"""The elementwise work around an operator: magnitudes, codes and references, in as few passes over memory as can be.

The functions are plain PyTorch, for any device. `native` gives the same ones in C (native.c) for the CPU, compiled once
per machine. Both give the same numbers bit for bit: every step rounds once, and so do the multiply-adds.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from ctypes import c_float, c_int, c_int64, c_void_p
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

__all__ = ["PLAIN", "Kernels", "affine_codes", "encode", "encode_keyframe", "native", "quantize"]

log = logging.getLogger(__name__)


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


def encode(
    x: Float[Tensor, "b *n"],
    reference: Float[Tensor, "b *n"],
    steps: Float[Tensor, "4 k"],
    index: Int64[Tensor, "b h w"],
    step: float | None = None,
    tau: Float[Tensor, "b h w"] | None = None,
    sigma: float = 1.0,
    kappa: tuple[float, ...] = (),
) -> tuple[Float[Tensor, "b *n"], Float[Tensor, "b h w"]]:
    """Integer codes of the residual x - reference, and the cost of each pixel.

    Args:
        x, reference: inputs of an operator, of shape (b, c, h, w), or with h = w = 1 of any.
        steps: `ResidualTable.lookup`.
        index: entry of `steps` for each pixel; with `tau`, `threshold_row` of it.
        step: with it the reference moves by codes * step, in place (the closed loop).
        tau, sigma, kappa: thresholds, under which `choose` picks the entry for the largest magnitude over the channels.
    """
    shape = (-1, 1, *index.shape[1:]) if x.dim() == 4 else (-1, *[1] * (x.dim() - 1))
    residual = x - reference
    if tau is not None:
        magnitude = residual.abs().amax(1) if x.dim() == 4 else residual.flatten(1).abs().amax(1)[:, None, None]
        index = choose(magnitude, index, tau, sigma, kappa)
    inverse, limit, unit, cost = (part[index] for part in steps.unbind())
    codes = quantize(residual, inverse.reshape(shape), limit.reshape(shape), unit.reshape(shape))
    if step is not None:
        reference.addcmul_(codes, torch.tensor(step, device=x.device))
    return codes, cost


def affine_codes(x: Float[Tensor, "*n"], step: float, low: float, high: float) -> Float[Tensor, "*n"]:
    """Integer codes clamp(round(x / step), low, high)."""
    return (x / step).round_().clamp_(low, high)


def encode_keyframe(
    x: Float[Tensor, "*n"], step: float, low: float, high: float
) -> tuple[Float[Tensor, "*n"], Float[Tensor, "*n"]]:
    """`affine_codes` and their values."""
    codes = affine_codes(x, step, low, high)
    return codes, codes * step


@dataclass(frozen=True)
class Kernels:
    """One way to run `encode` and `encode_keyframe`; a copy in another process is compiled there."""

    encode: Callable[..., tuple[Tensor, Tensor]] = encode
    encode_keyframe: Callable[..., tuple[Tensor, Tensor]] = encode_keyframe

    def __reduce__(self) -> tuple[Callable[..., "Kernels"], tuple[Any, ...]]:
        return (Kernels, ()) if self == PLAIN else (native, ())


PLAIN = Kernels()

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
    return _Native(library).kernels()


def _compiled() -> Path:
    """The shared library, compiled unless it is there."""
    source = files("resq_rl.quantization").joinpath("native.c").read_bytes()
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


class _Native:
    """The functions of the shared library, on tensors."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._encode, self._encode_keyframe = library.resq_encode, library.resq_encode_keyframe
        self._encode.restype = self._encode_keyframe.restype = None
        shape = [c_int64] * 5
        self._encode.argtypes = [*shape, *[c_void_p] * 6, c_float, c_void_p, c_int64, c_void_p, c_int64, c_int, c_float]
        self._encode_keyframe.argtypes = [c_int64, c_int64, *[c_void_p] * 3, *[c_float] * 3]

    def kernels(self) -> Kernels:
        return Kernels(self.encode, self.encode_keyframe)

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
    ) -> tuple[Tensor, Tensor]:
        if x.dim() != 4:
            return encode(x, reference, steps, index, step, tau, sigma, tuple(kappa))
        layout = _layout(reference)
        if not reference.is_contiguous(memory_format=layout):  # neither layout: only this copy is dense
            dense = reference.contiguous()
            found = self.encode(x, dense, steps, index, step, tau, sigma, kappa)
            if step is not None:  # a keyframe that many clips share stays as it is, and cannot be written
                reference.copy_(dense)
            return found
        x, index = x.contiguous(memory_format=layout), index.contiguous()
        codes, cost, steps = torch.empty_like(x), torch.empty(index.shape), steps.contiguous()
        thresholds = None if tau is None else tau.contiguous()
        clips, channels, height, width = x.shape
        self._encode(
            clips,
            channels,
            height * width,
            layout == torch.channels_last,
            torch.get_num_threads(),
            x.data_ptr(),
            reference.data_ptr(),
            codes.data_ptr(),
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

    def encode_keyframe(self, x: Tensor, step: float, low: float, high: float) -> tuple[Tensor, Tensor]:
        x = x.contiguous(memory_format=_layout(x)) if x.dim() == 4 else x.contiguous()
        codes, values = torch.empty_like(x), torch.empty_like(x)
        pointers = x.data_ptr(), codes.data_ptr(), values.data_ptr()
        self._encode_keyframe(x.numel(), torch.get_num_threads(), *pointers, step, low, high)
        return codes, values


@lru_cache(maxsize=64)
def _floats(values: tuple[float, ...]) -> Any:
    return (c_float * len(values))(*values)


def _layout(x: Float[Tensor, "b c h w"]) -> torch.memory_format:
    """How a tensor lies in memory: channels last, or contiguous."""
    if x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format
