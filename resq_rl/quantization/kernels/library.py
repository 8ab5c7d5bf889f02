"""The library in C (native.c): compiled once per machine, and called with checked arguments."""

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
from ctypes import c_double, c_float, c_int64, c_void_p
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resq_rl.errors import NetworkError

__all__ = ["ARGUMENTS", "MAY_LACK", "Arguments", "Function", "load"]

log = logging.getLogger(__name__)

# The fields of every struct of arguments in native.c, from which both the struct in C and the one that is filled here
# are made: those of its functions, and "fit", whose address `encode` takes.
_INTEGER, _NUMBER, _DOUBLE = "int64_t", "float", "double"
_TILES = dict.fromkeys(("down", "across", "rows", "columns"), _INTEGER)
_WINDOWS = _TILES | dict.fromkeys(("high", "wide", "step_rows", "step_columns", "lead_rows", "lead_columns"), _INTEGER)
ARGUMENTS: dict[str, dict[str, str]] = {
    "fit": {"costs": "const double *", "coverage": "const int32_t *", "rows": "const int64_t *", "left": "double *"}
    | {"share": _DOUBLE, "slack": _DOUBLE, "room": "void *"},
    "encode": dict.fromkeys(
        ("clips", "channels", "pixels", "channels_last", "threads", "bytes", "kappas", "entries", "moves"), _INTEGER
    )
    | dict.fromkeys(("x", "tau", "kappa", "steps"), "const float *")
    | {"reference": "float *", "cost": "float *", "index": "const int64_t *", "codes": "void *", "active": "uint8_t *"}
    | dict.fromkeys(("sigma", "step", "zero"), _NUMBER)
    | {"fit": "const struct arguments_fit *"},
    "encode_keyframe": dict.fromkeys(("count", "threads", "bytes"), _INTEGER)
    | {"x": "const float *", "codes": "void *", "values": "float *"}
    | dict.fromkeys(("step", "low", "high", "zero"), _NUMBER),
    "highest": dict.fromkeys(("clips", "channels", "pixels", "channels_last", "threads"), _INTEGER)
    | {"scores": "const float *", "found": "uint8_t *"},
    "find": _WINDOWS | {"clips": _INTEGER, "active": "const uint8_t *", "tiles": "int64_t *"},
    "gather": _WINDOWS
    | dict.fromkeys(("size", "zero", "count", "threads"), _INTEGER)
    | {"tiles": "const int64_t *", "codes": "const void *", "windows": "void *"},
    "scatter": _TILES
    | dict.fromkeys(("channels", "count", "side", "threads"), _INTEGER)
    | {"tiles": "const int64_t *", "totals": "const float *", "scale": "const float *", "y": "float *"},
    "clear": dict.fromkeys(("pixels", "size", "zero"), _INTEGER) | {"active": "const uint8_t *", "codes": "void *"},
}
# What a tensor must hold for an argument; codes are bytes or float32.
_HOLDS = {
    "float *": (torch.float32,),
    "double *": (torch.float64,),
    "const double *": (torch.float64,),
    "const float *": (torch.float32,),
    "const int32_t *": (torch.int32,),
    "const int64_t *": (torch.int64,),
    "int64_t *": (torch.int64,),
    "const uint8_t *": (torch.uint8,),
    "uint8_t *": (torch.uint8,),
    "const void *": (torch.float32, torch.uint8),
    "void *": (torch.float32, torch.uint8),
}
# What may be None.
MAY_LACK = {"encode": ("active", "kappa", "tau")}

# No contraction: the C code says where a multiply-add rounds once. Errno and traps would keep loops from vector units.
_FLAGS = ["-O3", "-std=c11", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared"]
# Wider instructions and threads where the compiler has them.
_EXTRAS = (("-march=native", "-fopenmp"), ("-march=native",), ("-fopenmp",), ())


def load() -> ctypes.CDLL:
    """The shared library, compiled unless it is kept.

    Raises:
        OSError, subprocess.SubprocessError: nothing on this machine can compile it.
    """
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
        for name, fields in ARGUMENTS.items()
    ]
    return "#include <stdint.h>\n" + "".join(structs)


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


class Arguments:
    """A struct of arguments in native.c, filled by their names."""

    def __init__(self, name: str) -> None:
        self.name, self.fields = name, ARGUMENTS[name]
        self.tensors = {field: _HOLDS[kind] for field, kind in self.fields.items() if kind in _HOLDS}
        kinds = {_INTEGER: c_int64, _NUMBER: c_float, _DOUBLE: c_double}
        members = [(field, kinds.get(kind, c_void_p)) for field, kind in self.fields.items()]
        self.struct: Any = type(f"arguments_{name}", (ctypes.Structure,), {"_fields_": members})

    def __call__(self, **values: Any) -> ctypes.Structure:
        """The struct. It holds addresses of tensors, which must outlive it.

        Raises:
            NetworkError: an argument is missing, unknown, or not of the type, device and layout that is read.
        """
        if values.keys() != self.fields.keys():
            raise NetworkError(f"{self.name} takes {sorted(self.fields)}, got {sorted(values)}.")
        for field, types in self.tensors.items():
            values[field] = self._address(field, types, values[field])
        filled: ctypes.Structure = self.struct(**values)
        return filled

    def _address(self, field: str, types: tuple[torch.dtype, ...], value: Any) -> int | None:
        if value is None and field in MAY_LACK.get(self.name, ()):
            return None
        if not isinstance(value, Tensor) or value.dtype not in types or not _dense(value):
            what = f"{value.dtype} on {value.device}" if isinstance(value, Tensor) else type(value).__name__
            kind = self.fields[field]
            raise NetworkError(f"{self.name} reads {field} as {kind} of a dense tensor on the CPU, got {what}.")
        return value.data_ptr()


class Function:
    """A function of the library, called by the names of its arguments."""

    def __init__(self, library: ctypes.CDLL, name: str) -> None:
        self.arguments = Arguments(name)
        self.run = getattr(library, f"resq_{name}")
        self.run.restype, self.run.argtypes = c_int64, [ctypes.POINTER(self.arguments.struct)]

    def __call__(self, **values: Any) -> int:
        """Run the function. Returns its result: what native.c says, or 0.

        Raises:
            NetworkError: as of `Arguments`.
        """
        returned: int = self.run(ctypes.byref(self.arguments(**values)))
        return returned


def _dense(x: Tensor) -> bool:
    """Whether a tensor lies on the CPU without gaps, in one of the two layouts."""
    dense = x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
    return dense and x.is_cpu and not x.is_neg()
