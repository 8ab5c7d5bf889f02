"""Files of numbers and tensors that are whole or refused: checkpoints of a run, and values kept by their origin.

A sealed file is the SHA-256 of its content and then the content, in the format safetensors: nothing in it is ever run.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as read_tensors
from safetensors.torch import save as pack_tensors
from torch import Tensor

from resq_rl.errors import ResultsError
from resq_rl.files import write_atomic

__all__ = ["Checkpoints", "ContentStore", "DamagedError", "checksum", "pack", "unpack"]

log = logging.getLogger(__name__)

DIGEST_BYTES = 32
TENSOR = "tensor@"  # the key of what stands for a tensor in the JSON part
SUFFIX = ".checkpoint"


class DamagedError(ValueError):
    """Content that is not what was sealed; what it is a part of decides what follows."""


def pack(state: Mapping[str, Any]) -> bytes:
    """Seal nested mappings and lists of tensors and of what JSON can hold.

    Tensors come back with the strides they had: the order in which a kernel adds may depend on them.
    """
    tensors: dict[str, Tensor] = {}
    about = {"about": json.dumps(_plain(state, tensors))}  # one key, since several have no order
    content = pack_tensors(tensors, about)
    return hashlib.sha256(content).digest() + content


def unpack(sealed: bytes) -> dict[str, Any]:
    """What `pack` was given, with mappings as dicts of string keys and sequences as lists.

    Raises:
        DamagedError: the content was changed, cut or never sealed.
    """
    digest, content = sealed[:DIGEST_BYTES], sealed[DIGEST_BYTES:]
    if hashlib.sha256(content).digest() != digest:
        raise DamagedError("its checksum is wrong")
    try:
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        tensors = read_tensors(content)
        state = _whole(json.loads(header["__metadata__"]["about"]), tensors)
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise DamagedError(f"it is of another version ({type(error).__name__}: {error})") from error
    if not isinstance(state, dict):
        raise DamagedError("it is of another version")
    return state


def checksum(about: Any, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of what JSON can hold and of named tensors, in whatever order they come."""
    read = json.loads(json.dumps(about))  # as it comes back, with text for keys, which is sorted otherwise than numbers
    digest = hashlib.sha256(json.dumps(read, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _plain(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The value with names in place of its tensors, which are put into `tensors`."""
    if isinstance(value, Tensor):
        name, plain = str(len(tensors)), value.detach().cpu().contiguous()
        shared = any(plain.data_ptr() == other.data_ptr() for other in tensors.values())  # which the format refuses
        tensors[name] = plain.clone() if shared else plain
        return {TENSOR: name, "stride": list(value.stride())}
    if isinstance(value, Mapping):
        return {str(key): _plain(item, tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, tensors) for item in value]
    return value


def _whole(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict) and TENSOR in value:
        tensor, stride = tensors[value[TENSOR]], tuple(value["stride"])
        if tensor.stride() == stride:
            return tensor
        return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype).copy_(tensor)
    if isinstance(value, dict):
        return {key: _whole(item, tensors) for key, item in value.items()}
    return [_whole(item, tensors) for item in value] if isinstance(value, list) else value


class ContentStore:
    """Sealed values in a folder, one file each, named by the SHA-256 of all that the value was computed from.

    A value that is damaged or cannot be kept costs time, not the run: it is computed anew. Nothing is ever deleted.

    Args:
        folder: made when the first value is kept; None to keep nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def get(self, key: str) -> dict[str, Any] | None:
        """The value under a key; None where there is none, or only a damaged one."""
        if self.folder is None:
            return None
        path = self._path(self.folder, key)
        try:
            return unpack(path.read_bytes())
        except FileNotFoundError:
            return None
        except (DamagedError, OSError) as error:
            log.warning("%s cannot be used (%s). Its content is computed anew.", path, error)
            return None

    def put(self, key: str, value: Mapping[str, Any]) -> None:
        """Keep a value."""
        if self.folder is not None:
            try:
                write_atomic(self._path(self.folder, key), pack(value))
            except ResultsError as error:
                log.warning("A computed value is not kept. %s", error)

    @staticmethod
    def _path(folder: Path, key: str) -> Path:
        return folder / f"{key}.sealed"


class Checkpoints:
    """The newest states of a run in a folder, each a sealed file: if one is damaged, there is the one before it.

    Args:
        folder: made when the first is saved.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, number: int, state: Mapping[str, Any], *, keep: int = 2) -> Path:
        """Write a state, and remove all but the `keep` of the highest numbers.

        Raises:
            ResultsError: it cannot be written. Those before it stay.
        """
        try:
            path = write_atomic(self.folder / f"{number:08d}{SUFFIX}", pack(state))
        except ResultsError as error:
            raise ResultsError(f"{error} Then resume: the checkpoint before it, if any, is whole.") from error
        for old in self.paths()[:-keep]:
            old.unlink(missing_ok=True)
        return path

    def load(self) -> dict[str, Any] | None:
        """The newest state that is whole; None where none was ever saved.

        Raises:
            ResultsError: all are damaged.
        """
        paths, reason = self.paths(), ""
        for path in reversed(paths):
            try:
                return unpack(path.read_bytes())
            except (DamagedError, OSError) as error:
                reason = str(error)
                log.warning("The checkpoint %s cannot be used: %s. Trying the one before it.", path, reason)
        if paths:
            raise ResultsError(
                f"No checkpoint in {self.folder} can be read ({paths[0].name}: {reason}). Remove the folder to start "
                "anew."
            )
        return None

    def clear(self) -> None:
        """Remove all, as of an earlier run in the same folder."""
        for path in self.paths():
            path.unlink(missing_ok=True)

    def paths(self) -> list[Path]:
        """The files, oldest first."""
        return sorted(self.folder.glob(f"*{SUFFIX}"))
