"""Frozen networks: loading them, their weights, and the network that ships with the package."""

import logging
import warnings
import zipfile
from collections.abc import Sequence
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path

import torch
from safetensors.torch import save as pack_tensors
from torch import Tensor, nn

from resq_rl.errors import NetworkError, WeightsError
from resq_rl.files import write_atomic
from resq_rl.perception.checkpoints import read_weights
from resq_rl.perception.ddrnet import CompactDDRNet, CompactPose, MaskPropagationNet
from resq_rl.sealed import checksum

__all__ = [
    "compact_ddrnet",
    "compact_pose",
    "load_network",
    "load_weights",
    "mask_propagation_net",
    "save_weights",
    "shipped_weights",
]

CHECKSUM = "sha256"  # in the metadata of weights
_SHOWN = 4  # names listed in a message


def load_network(source: nn.Module | str | Path) -> nn.Module:
    """A frozen network ready to be wrapped: in evaluation mode and without gradients.

    Arguments:
        source: a module, which is changed in place, or the path of an exported program (`torch.export.save`,
            `.pt2`), which keeps the mode it was exported in.

    Raises:
        NetworkError: the file is missing, damaged or no exported program, or `source` is something else.
    """
    if isinstance(source, nn.Module):
        network = source.eval()
    elif isinstance(source, str | Path):
        network = _load_program(Path(source))
    else:
        raise NetworkError(
            f"A network must be a torch.nn.Module or the path of a .pt2 file, got {type(source).__name__}. "
            "Give an instance of a module, not its class or its weights."
        )
    return network.requires_grad_(False)


def _load_program(path: Path) -> nn.Module:
    mend = "Write it with torch.export.save(torch.export.export(network, (example,)), path)."
    if path.suffix != ".pt2":
        raise NetworkError(f"Cannot load the network {path}: the file must be an exported program, .pt2. {mend}")
    if not path.is_file():
        raise NetworkError(f"Cannot load the network {path}: there is no such file. Check the path.")
    notes = logging.getLogger("torch.export")  # of damage it logs a traceback besides raising
    level = notes.level
    try:
        notes.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # notes on the format's internals, which a caller cannot act on
            with zipfile.ZipFile(path) as archive:  # PyTorch reads past wrong checksums
                changed = archive.testzip()
            if changed is not None:
                raise ValueError(f"the checksum of {changed} is wrong")
            return torch.export.load(path).module()
    except Exception as error:  # damaged archives fail in many ways: zip, JSON, pickle, missing operators
        reason = str(error).strip().split("\n")[0][:200]
        raise NetworkError(
            f"Cannot load the network {path}: it is damaged or was written by another torch than "
            f"{torch.__version__} ({type(error).__name__}: {reason}). {mend}"
        ) from error
    finally:
        notes.setLevel(level)


def save_weights(network: nn.Module, path: str | Path, metadata: dict[str, str]) -> Path:
    """Write a network's parameters and buffers, with `metadata` and a checksum, as a safetensors file, atomically.

    Raises:
        ResultsError: the file cannot be written; a file that was there before stays.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    return write_atomic(Path(path), pack_tensors(tensors, metadata | {CHECKSUM: checksum(metadata, tensors)}))


def load_weights(
    network: nn.Module, path: str | Path, *, ignored: Sequence[str] = (), partial: bool = False
) -> dict[str, str]:
    """Load a safetensors file or a checkpoint of PyTorch into a network, in place, and return the file's metadata.

    Arguments:
        network: the network.
        path: the file.
        ignored: patterns of names in the file that the network does not need.
        partial: load what the file and the network have in common; the rest of the network keeps its weights.

    Raises:
        WeightsError: the file is missing, damaged, or holds the weights of another network; of files with a checksum,
            which `save_weights` writes, any change is damage. The network keeps its weights.
    """
    path = Path(path)
    tensors, metadata = read_weights(path)
    expected = metadata.pop(CHECKSUM, None)
    if expected is not None and expected != checksum(metadata, tensors):
        raise WeightsError(f"The weights {path} are damaged or were changed: their checksum is wrong. Copy them again.")
    own = network.state_dict()
    fitting = {
        name: value for name, value in tensors.items() if not any(fnmatchcase(name, pattern) for pattern in ignored)
    }
    if partial:
        fitting = {name: value for name, value in fitting.items() if name in own and own[name].shape == value.shape}
        if not fitting:
            raise WeightsError(
                f"The weights {path} have no layer in common with {type(network).__name__}: "
                f"{_listing('in the file', sorted(tensors))}; {_listing('in the network', sorted(own))}. Choose "
                "another file."
            )
        fitting = own | fitting
    _check_fit(network, fitting, path)
    network.load_state_dict(fitting)
    return metadata


def _check_fit(network: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
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


def shipped_weights(name: str = "compact_ddrnet_generated") -> Path:
    """Path of weights that ship with the package.

    Arguments:
        name: `compact_ddrnet_generated`, of `CompactDDRNet(6, 32)` trained on `GeneratedVideo`;
            `compact_pose_generated`, of `CompactPose(13, 24)` trained on `FigureVideo`; or
            `mask_propagation_generated`, of `MaskPropagationNet(20)` trained on `GeneratedObjects`.
    """
    return Path(str(resources.files("resq_rl.perception") / "weights" / f"{name}.safetensors"))


def compact_ddrnet(
    pretrained: bool = True, classes: int = 6, width: int = 32, weights: str | Path | None = None
) -> CompactDDRNet:
    """A frozen `CompactDDRNet`.

    Arguments:
        pretrained: load weights; otherwise they are random, from torch's global generator.
        classes: number of output classes; the shipped weights have 6.
        width: channels of the fine branch; the shipped weights have 32.
        weights: path of the weights to load; None for those that ship with the package.

    Raises:
        NetworkError: `classes` or `width` is out of range.
        WeightsError: the weights are missing or do not fit.
    """
    network = CompactDDRNet(classes, width)
    if pretrained:
        load_weights(network, shipped_weights() if weights is None else weights)
    load_network(network)
    return network


def compact_pose(
    pretrained: bool = True, points: int = 13, width: int = 24, weights: str | Path | None = None
) -> CompactPose:
    """A frozen `CompactPose`.

    Arguments:
        pretrained: load weights; otherwise they are random, from torch's global generator.
        points: number of points; the shipped weights have the 13 of `resq_rl.video.JOINTS`.
        width: channels of the fine branch; the shipped weights have 24.
        weights: path of the weights to load; None for those that ship with the package.

    Raises:
        NetworkError: `points` or `width` is out of range.
        WeightsError: the weights are missing or do not fit.
    """
    network = CompactPose(points, width)
    if pretrained:
        load_weights(network, shipped_weights("compact_pose_generated") if weights is None else weights)
    load_network(network)
    return network


def mask_propagation_net(
    pretrained: bool = True, width: int = 20, weights: str | Path | None = None
) -> MaskPropagationNet:
    """A frozen `MaskPropagationNet`.

    Arguments:
        pretrained: load weights; otherwise they are random, from torch's global generator.
        width: channels of the fine branch; the shipped weights have 20.
        weights: path of the weights to load; None for those that ship with the package.

    Raises:
        NetworkError: `width` is out of range.
        WeightsError: the weights are missing or do not fit.
    """
    network = MaskPropagationNet(width)
    if pretrained:
        load_weights(network, shipped_weights("mask_propagation_generated") if weights is None else weights)
    load_network(network)
    return network
