"""Frozen networks: those that ship with the package, and exported programs."""

import io
import json
import logging
import warnings
import zipfile
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from resq_rl.errors import NetworkError, SettingsError
from resq_rl.perception.compact_networks import CompactDDRNet, CompactPose, MaskPropagationNet
from resq_rl.perception.compact_segformer import CompactSegFormer
from resq_rl.perception.normalisation import Channels, Values, normalised
from resq_rl.perception.weight_files import is_torchscript, load_weights

__all__ = [
    "compact_ddrnet",
    "compact_pose",
    "compact_segformer",
    "load_network",
    "mask_propagation_net",
    "shipped_weights",
]

_EXPORT = (
    "Write it with torch.export.save(torch.export.export(network, (frames,), dynamic_shapes=({0: "
    "torch.export.Dim('batch')},)), path), from the network's Python code."
)

_EXPORT_ANY_BATCH = (
    "Export it again with a dynamic batch dimension, since any number of clips runs together: "
    "dynamic_shapes=({0: torch.export.Dim('batch')},)."
)
_EXPORT_SIZE = "Set video.size to the height and width that it was exported for, or export it again for other ones."


def load_network(
    source: nn.Module | str | Path,
    mean: Values | None = None,
    std: Values | None = None,
    channels: Channels = "rgb",
    value_range: float = 1.0,
) -> nn.Module:
    """A frozen network ready to be wrapped: in evaluation mode and without gradients.

    It is given RGB frames in 0..1. A network that expects something else is given it by `Normalised`, which the other
    arguments describe.

    Args:
        source: a module, which is changed in place, or the path of an exported program (`torch.export.save`,
            `.pt2`), which keeps the mode it was exported in. Programs of any device are brought to the CPU.
        mean, std, channels, value_range: what frames the network expects, see `Normalised`.

    Raises:
        NetworkError: the file is missing, damaged or no exported program, or `source` is something else.
        SettingsError: `mean`, `std`, `channels` or `value_range` is out of range.
    """
    if isinstance(source, torch.jit.ScriptModule):
        raise NetworkError(f"TorchScript cannot be quantized layer by layer. {_EXPORT}")
    if isinstance(source, nn.Module):
        network = source.eval()
    elif isinstance(source, str | Path):
        network = _load_program(Path(source))
    else:
        raise NetworkError(
            f"A network must be a torch.nn.Module or the path of a .pt2 file, got {type(source).__name__}. "
            "Give an instance of a module, not its class or its weights."
        )
    return normalised(network, mean, std, channels, value_range).requires_grad_(False)


# Exported programs ---------------------------------------------------------------------------------------------------


def _load_program(path: Path) -> nn.Module:
    start = f"Cannot load the network {path}:"
    if path.is_file() and is_torchscript(path):
        raise NetworkError(f"{start} it is TorchScript, which cannot be quantized layer by layer. {_EXPORT}")
    if path.suffix != ".pt2":
        raise NetworkError(f"{start} the file must be an exported program, .pt2. {_EXPORT}")
    if not path.is_file():
        raise NetworkError(f"{start} there is no such file. Check the path.")
    notes = logging.getLogger("torch.export")  # of damage it logs a traceback besides raising
    level = notes.level
    try:
        notes.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # notes on the format's internals, which a caller cannot act on
            program = torch.export.load(_on_cpu(path))
            network = program.module()
    except NetworkError:
        raise
    except Exception as error:  # damaged archives fail in many ways: zip, JSON, pickle, missing operators
        reason = str(error).strip().split("\n")[0][:200]
        raise NetworkError(
            f"{start} it is damaged or was written by another torch than "
            f"{torch.__version__} ({type(error).__name__}: {reason}). {_EXPORT}"
        ) from error
    finally:
        notes.setLevel(level)
    _check_shapes_in(network, program)
    return network


def _on_cpu(path: Path) -> Path | io.BytesIO:
    """The file, or where it was exported on another device a copy of its content that names the CPU in its place.

    Raises:
        ValueError: a part of the file is damaged. NetworkError: the program was exported without weights.
    """
    with zipfile.ZipFile(path) as archive:
        changed = archive.testzip()  # PyTorch reads past wrong checksums
        if changed is not None:
            raise ValueError(f"the checksum of {changed} is wrong")
        described = {name: json.loads(archive.read(name)) for name in archive.namelist() if name.endswith(".json")}
        devices = {kind for content in described.values() for kind in _devices(content)}
        if devices <= {"cpu"}:
            return path
        if "meta" in devices:
            raise NetworkError(f"Cannot load the network {path}: it was exported on the meta device, without weights.")
        moved = io.BytesIO()
        with zipfile.ZipFile(moved, "w") as copy:
            for name in archive.namelist():
                known = name in described
                copy.writestr(name, json.dumps(described[name]) if known else archive.read(name))
    moved.seek(0)
    return moved


def _devices(content: Any) -> list[str]:
    """The devices that a description in a program's file names; they are changed to the CPU in place."""
    if isinstance(content, dict):
        if content.keys() == {"type", "index"}:
            kind = str(content["type"])
            content.update(type="cpu", index=None)
            return [kind]
        return [kind for value in content.values() for kind in _devices(value)]
    return [kind for value in content for kind in _devices(value)] if isinstance(content, list) else []


def _check_shapes_in(network: nn.Module, program: torch.export.ExportedProgram) -> None:
    """Let a program say which fixed sizes it was exported with, in place of torch's "Guard failed"."""
    if not isinstance(network, fx.GraphModule):
        return
    placeholders = [node for node in network.graph.nodes if node.op == "placeholder"]
    examples = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    sizes = [examples.get(name) for name in program.graph_signature.user_inputs if isinstance(name, str)]
    fixed: list[list[int | None] | None] = [
        [n if isinstance(n, int) else None for n in v.shape] if isinstance(v, Tensor) else None for v in sizes
    ]
    if not placeholders or len(fixed) != len(placeholders):
        return
    network.add_submodule("resq_fixed_sizes", _FixedSizes(fixed))
    with network.graph.inserting_after(placeholders[-1]):
        network.graph.call_module("resq_fixed_sizes", tuple(placeholders))
    network.recompile()


class _FixedSizes(nn.Module):
    """Checks the sizes of a program's inputs against those that it was exported with.

    Args:
        sizes: of every input; None for a size, or an input, that may be anything.
    """

    _is_impure = True  # so that the call is not removed as dead code

    def __init__(self, sizes: list[list[int | None] | None]) -> None:
        super().__init__()
        self.sizes = sizes

    def forward(self, *inputs: Any) -> None:
        """Raise NetworkError where a size differs."""
        for number, (given, fixed) in enumerate(zip(inputs, self.sizes, strict=True)):
            if not isinstance(given, Tensor) or fixed is None or given.dim() != len(fixed):
                continue
            differ = [i for i, n in enumerate(fixed) if n is not None and n != given.shape[i]]
            if differ:
                shape = tuple("any" if n is None else n for n in fixed)
                raise NetworkError(
                    f"Input {number} of the exported program has the fixed shape {shape}, got {tuple(given.shape)}. "
                    f"{_EXPORT_ANY_BATCH if differ == [0] else _EXPORT_SIZE}"
                )


# Networks of the package ---------------------------------------------------------------------------------------------


def shipped_weights(name: str = "compact_ddrnet_generated") -> Path:
    """Path of weights that ship with the package.

    Args:
        name: `compact_ddrnet_generated`, of `CompactDDRNet(6, 32)` trained on `GeneratedVideo`;
            `compact_pose_generated`, of `CompactPose(13, 24)` trained on `FigureVideo`;
            `compact_segformer_generated`, of `CompactSegFormer(6, 32)` trained on `GeneratedVideo`; or
            `mask_propagation_generated`, of `MaskPropagationNet(20)` trained on `GeneratedObjects`.
    """
    return Path(str(resources.files("resq_rl.perception") / "weights" / f"{name}.safetensors"))


def compact_ddrnet(
    pretrained: bool = True, classes: int = 6, width: int = 32, weights: str | Path | None = None
) -> CompactDDRNet:
    """A frozen `CompactDDRNet`.

    Args:
        pretrained: load weights; otherwise they are random, from torch's global generator.
        classes: number of output classes; the shipped weights have 6.
        width: channels of the fine branch; the shipped weights have 32.
        weights: path of the weights to load; None for those that ship with the package.

    Raises:
        NetworkError: `classes` or `width` is out of range.
        SettingsError: `weights` are given, but `pretrained` is false.
        WeightsError: the weights are missing or do not fit.
    """
    network = CompactDDRNet(classes, width)
    _prepare(network, pretrained, weights, "compact_ddrnet_generated")
    return network


def compact_pose(
    pretrained: bool = True, points: int = 13, width: int = 24, weights: str | Path | None = None
) -> CompactPose:
    """A frozen `CompactPose`.

    Args:
        pretrained, weights: as for `compact_ddrnet`.
        points: number of points; the shipped weights have the 13 of `resq_rl.video.JOINTS`.
        width: channels of the fine branch; the shipped weights have 24.

    Raises:
        NetworkError, SettingsError, WeightsError: as for `compact_ddrnet`.
    """
    network = CompactPose(points, width)
    _prepare(network, pretrained, weights, "compact_pose_generated")
    return network


def compact_segformer(
    pretrained: bool = True, classes: int = 6, width: int = 32, weights: str | Path | None = None
) -> CompactSegFormer:
    """A frozen `CompactSegFormer`.

    Args:
        pretrained, classes, weights: as for `compact_ddrnet`.
        width: channels of the first stage; the shipped weights have 32.

    Raises:
        NetworkError, SettingsError, WeightsError: as for `compact_ddrnet`.
    """
    network = CompactSegFormer(classes, width)
    _prepare(network, pretrained, weights, "compact_segformer_generated")
    return network


def mask_propagation_net(
    pretrained: bool = True, width: int = 20, weights: str | Path | None = None
) -> MaskPropagationNet:
    """A frozen `MaskPropagationNet`.

    Args:
        pretrained, weights: as for `compact_ddrnet`.
        width: channels of the fine branch; the shipped weights have 20.

    Raises:
        NetworkError, SettingsError, WeightsError: as for `compact_ddrnet`.
    """
    network = MaskPropagationNet(width)
    _prepare(network, pretrained, weights, "mask_propagation_generated")
    return network


def _prepare(network: nn.Module, pretrained: bool, weights: str | Path | None, shipped: str) -> None:
    """Load the weights that are asked for, and freeze the network."""
    if weights is not None and not pretrained:
        raise SettingsError(
            f"The weights {weights} would not be loaded, because pretrained is false. Set pretrained to true to load "
            "them, or weights to null to begin with random ones."
        )
    if pretrained:
        load_weights(network, shipped_weights(shipped) if weights is None else weights)
    load_network(network)
