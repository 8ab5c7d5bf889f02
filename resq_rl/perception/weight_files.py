"""Weights of networks in files: safetensors, and the checkpoints that training code of others leaves.

A checkpoint may keep the weights below other entries (`state_dict`, `model`, `ema` and so on), and training wrappers
put prefixes before their names (`module.`, `model.`, `_orig_mod.`). Neither is looked up in a list: the weights are the
one set of tensors in the file that fits the network once a common prefix is taken off.
"""

import json
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load as unpack_tensors
from safetensors.torch import save as pack_tensors
from torch import Tensor, nn

from resq_rl.errors import WeightsError
from resq_rl.files import write_atomic
from resq_rl.sealed import checksum

__all__ = ["is_torchscript", "load_weights", "read_weights", "save_weights"]

Tensors = Mapping[str, Tensor]

_CHECKPOINT_SUFFIXES: Final = (".pth", ".pt", ".ckpt", ".bin", ".tar")
# Parts of names that PyTorch's wrappers add anywhere: torch.compile, data parallel, activation checkpoints.
_WRAPPERS: Final = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Counters that no forward pass reads: BatchNorm's, which old checkpoints lack, and that of averaged weights.
_COUNTERS: Final = {"num_batches_tracked", "n_averaged"}
_CHECKSUM: Final = "sha256"  # in the metadata of weights
_DEEPEST: Final = 5  # nested entries of a checkpoint that are looked through
_SHOWN: Final = 4  # names listed in a message


# Reading and writing -------------------------------------------------------------------------------------------------


def save_weights(network: nn.Module, path: str | Path, metadata: Mapping[str, str]) -> Path:
    """Write a network's parameters and buffers, with `metadata` and a checksum, as a safetensors file, atomically.

    Raises:
        ResultsError: the file cannot be written; a file that was there before stays.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    metadata = dict(metadata)
    return write_atomic(Path(path), pack_tensors(tensors, metadata | {_CHECKSUM: checksum(metadata, tensors)}))


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file by name, and its metadata.

    Raises:
        WeightsError: the file is missing, damaged, or was changed since `save_weights` wrote it.
    """
    _check_exists(path)
    try:
        content = path.read_bytes()
        tensors = unpack_tensors(content)
        (length,) = struct.unpack("<Q", content[:8])
        metadata = dict(json.loads(content[8 : 8 + length]).get("__metadata__", {}))
    except (OSError, SafetensorError, ValueError) as error:
        raise WeightsError(
            f"Cannot load the weights {path}: the file is damaged or no safetensors file ({error}). Copy it again."
        ) from error
    expected = metadata.pop(_CHECKSUM, None)
    if expected is not None and expected != checksum(metadata, tensors):
        raise WeightsError(f"The weights {path} are damaged or were changed: their checksum is wrong. Copy them again.")
    return tensors, metadata


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive (`torch.jit.save`)."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _check_exists(path: Path) -> None:
    if not path.is_file():
        raise WeightsError(f"Cannot load the weights {path}: there is no such file. Check the path.")


def _read_checkpoint(path: Path) -> dict[str, Tensors]:
    """Every set of named tensors in a checkpoint of PyTorch, by where it lies; no code in the file is run."""
    _check_exists(path)
    if is_torchscript(path):
        raise WeightsError(
            f"Cannot load the weights {path}: it is a TorchScript program. Save its weights alone: "
            f"torch.save(torch.jit.load({path.name!r}).state_dict(), 'weights.pth')."
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged archives fail in many ways: zip, pickle, what weights_only refuses
        reason = str(error).strip().split("\n")[0][:200]
        raise WeightsError(
            f"Cannot load the weights {path}: the file is damaged, no checkpoint of PyTorch, or holds more than plain "
            f"tensors ({type(error).__name__}: {reason}). Copy it again, or save the state_dict alone."
        ) from error
    found = dict(_tensor_sets(content, ""))
    if not found:
        raise WeightsError(
            f"Cannot load the weights {path}: it holds a {type(content).__name__} and no tensors by name. Save a "
            "network's state_dict."
        )
    return found


def _tensor_sets(content: object, place: str, depth: int = 0) -> Iterator[tuple[str, Tensors]]:
    if not isinstance(content, Mapping) or depth > _DEEPEST:
        return
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if tensors:
        yield place, tensors
    for name, value in content.items():
        yield from _tensor_sets(value, f"{place}[{name!r}]", depth + 1)


# Fitting to a network ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Candidate:
    """Tensors of a file that may be a network's weights.

    Attributes:
        place: where in the file they lie, for messages.
        tensors: by the network's own names, and under names that the network does not know.
        fitting: how many of the network's tensors are among them, of the right shape.
    """

    place: str
    tensors: Tensors
    fitting: int

    def same(self, other: "_Candidate") -> bool:
        """Whether both hold the same values."""
        return self.tensors.keys() == other.tensors.keys() and all(
            value.dtype == other.tensors[name].dtype and torch.equal(value, other.tensors[name])
            for name, value in self.tensors.items()
        )


def load_weights(
    network: nn.Module, path: str | Path, *, ignored: Sequence[str] = (), partial: bool = False
) -> dict[str, str]:
    """Load a safetensors file or a checkpoint of PyTorch into a network, in place, and return the file's metadata.

    Args:
        network: the network.
        path: the file.
        ignored: patterns of names in the file that the network does not need.
        partial: load what the file and the network have in common; the rest of the network keeps its weights.

    Raises:
        WeightsError: the file is missing, damaged, or holds the weights of another network, or several sets of weights
            that fit. The network keeps its weights.
    """
    path = Path(path)
    if path.suffix.lower() in _CHECKPOINT_SUFFIXES:
        sets, metadata = _read_checkpoint(path), dict[str, str]()
    else:
        tensors, metadata = read_weights(path)
        sets = {"": tensors}
    own = network.state_dict()
    chosen = _chosen(sets, own, path)
    tensors = {
        name: value
        for name, value in chosen.tensors.items()
        if name in own or not (_is_counter(name) or any(fnmatchcase(name, pattern) for pattern in ignored))
    }
    if partial:
        if not chosen.fitting:
            raise WeightsError(
                f"The weights {path} have no layer in common with {type(network).__name__}: "
                f"{_listing('in the file', sorted(tensors))}; {_listing('in the network', sorted(own))}. Choose "
                "another file."
            )
        tensors = {n: v for n, v in tensors.items() if n in own and own[n].shape == v.shape}
    kept = {name: value for name, value in own.items() if name not in tensors}
    kept = kept if partial or all(map(_is_counter, kept)) else {}
    _check_fit(network, tensors | kept, path)
    network.load_state_dict(tensors | kept)
    return metadata


def _chosen(sets: Mapping[str, Tensors], own: Tensors, path: Path) -> _Candidate:
    """The set of tensors, and the prefix to take off their names, of which most fits the network.

    Raises:
        WeightsError: two fit equally well and have other values.
    """
    candidates = [c for place, tensors in sets.items() for c in _candidates(place, tensors, own)]
    candidates.sort(key=lambda candidate: -len(candidate.tensors))
    most = max(candidate.fitting for candidate in candidates)
    best = [candidate for candidate in candidates if candidate.fitting == most]
    others = [candidate.place for candidate in best[1:] if most and not candidate.same(best[0])]
    if others:
        raise WeightsError(
            f"The weights {path} hold several sets that fit: {', '.join([best[0].place, *others])}. Save the one that "
            "is meant as a file of its own, such as torch.save(torch.load(PATH)['ema'], 'weights.pth')."
        )
    return best[0]


def _candidates(place: str, tensors: Tensors, own: Tensors) -> Iterator[_Candidate]:
    """The tensors under each prefix that some of their names have in front of one of the network's."""
    bare = {_bare(name): name for name in own}
    found = {_bare(name): value for name, value in tensors.items()}
    if len(bare) < len(own) or len(found) < len(tensors):  # names that only a wrapper's part tells apart
        bare, found = {name: name for name in own}, dict(tensors)
    for prefix in _prefixes(found, bare):
        inside = {name[len(prefix) :]: value for name, value in found.items() if name.startswith(prefix)}
        renamed = {bare.get(name, name): value for name, value in inside.items()}
        fitting = sum(name in own and own[name].shape == value.shape for name, value in renamed.items())
        yield _Candidate(f"{place}{prefix and f' {prefix}*'}".strip() or "its names", renamed, fitting)


def _prefixes(found: Tensors, bare: Mapping[str, str]) -> list[str]:
    """No prefix, and those that stand in front of one of the network's names."""
    prefixes = {""}
    for name in found:
        parts = name.split(".")
        prefixes |= {".".join(parts[:i]) + "." for i in range(1, len(parts)) if ".".join(parts[i:]) in bare}
    return sorted(prefixes, key=lambda prefix: (len(prefix), prefix))


def _is_counter(name: str) -> bool:
    return name.rpartition(".")[2] in _COUNTERS


def _bare(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _check_fit(network: nn.Module, tensors: Tensors, path: Path) -> None:
    expected = network.state_dict()
    problems = [
        _listing("missing", sorted(expected.keys() - tensors.keys())),
        _listing("unexpected", sorted(tensors.keys() - expected.keys())),
        _listing(
            "of another shape",
            [
                f"{name} {tuple(tensors[name].shape)} instead of {tuple(value.shape)}"
                for name, value in expected.items()
                if name in tensors and tensors[name].shape != value.shape
            ],
        ),
    ]
    found = "; ".join(p for p in problems if p)
    if found:
        raise WeightsError(
            f"The weights {path} do not fit {type(network).__name__}: {found}. They are another network's, "
            "or of this network with other settings (classes, width): build the network as the file's "
            "metadata says."
        )


def _listing(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} {what} ({', '.join(names[:_SHOWN])}{more})"
