"""Weights files: safetensors, and the checkpoints that PyTorch users publish."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load as read_tensors
from torch import Tensor

from resq_rl.errors import WeightsError

__all__ = ["read_weights"]

_CHECKPOINT_SUFFIXES: Final = (".pth", ".pt", ".ckpt", ".bin")
_NESTED: Final = ("state_dict", "model_state_dict", "model", "network")  # under which checkpoints keep the weights
_WRAPPERS: Final = ("module.", "model.")  # what DataParallel and training loops put before every name


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a weights file by name, and its metadata.

    A checkpoint (.pth, .pt, .ckpt, .bin) is read without running any code in it; where the weights lie beside other
    things, as under `state_dict`, they are taken out, and the prefixes `module.` and `model.` are dropped.

    Raises:
        WeightsError: the file is missing, damaged or holds no weights.
    """
    if not path.is_file():
        raise WeightsError(f"Cannot load the weights {path}: there is no such file. Check the path.")
    if path.suffix.lower() in _CHECKPOINT_SUFFIXES:
        return _read_checkpoint(path), {}
    try:
        content = path.read_bytes()
        return read_tensors(content), _metadata(content)
    except (OSError, SafetensorError, ValueError) as error:
        raise WeightsError(
            f"Cannot load the weights {path}: the file is damaged or no safetensors file ({error}). Copy it again."
        ) from error


def _metadata(content: bytes) -> dict[str, str]:
    """The `__metadata__` entry of a safetensors header that has been parsed before."""
    (length,) = struct.unpack("<Q", content[:8])
    return dict(json.loads(content[8 : 8 + length]).get("__metadata__", {}))


def _read_checkpoint(path: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged archives fail in many ways: zip, pickle, what weights_only refuses
        reason = str(error).strip().split("\n")[0][:200]
        raise WeightsError(
            f"Cannot load the weights {path}: the file is damaged, no checkpoint of PyTorch, or holds more than plain "
            f"tensors ({type(error).__name__}: {reason}). Copy it again, or save the state_dict alone."
        ) from error
    for key in _NESTED:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    tensors = {str(n): v for n, v in found.items() if isinstance(v, Tensor)} if isinstance(found, Mapping) else {}
    if not tensors:
        raise WeightsError(
            f"Cannot load the weights {path}: it holds a {type(found).__name__} and no tensors by name. Save a "
            "network's state_dict."
        )
    return {_unwrapped(name): value for name, value in tensors.items()}


def _unwrapped(name: str) -> str:
    while name.startswith(_WRAPPERS):
        name = name.split(".", 1)[1]
    return name
