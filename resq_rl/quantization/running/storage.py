"""A calibrated model in two files: integers and steps as safetensors, the rest as JSON. Loading them runs no code."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as read_tensors
from safetensors.torch import save as pack_tensors
from torch import Tensor, nn

from resq_rl.errors import CalibrationError, NetworkError, SettingsError
from resq_rl.files import write_atomic
from resq_rl.quantization.graph.operators import ResidualOperator
from resq_rl.quantization.quantizers.quantizer import AffineQuantizer, ChannelQuantizer
from resq_rl.quantization.quantizers.residual import ResidualTable
from resq_rl.quantization.quantizers.rounding import IntegerWeight
from resq_rl.quantization.running.calibration import SiteRanges
from resq_rl.quantization.running.model import ResQModel
from resq_rl.quantization.specification.config import Part, QuantizationConfig
from resq_rl.sealed import checksum

__all__ = ["load_model", "save_model"]

FORMAT = "resq_rl model 4"
# Largest difference of the sums over a network's parameters from the saved ones, as a share of their magnitude:
# another version of torch may fold BatchNorm with another rounding, another network differs far more.
SAME = 1e-4


def save_model(model: ResQModel, folder: Path) -> None:
    """Write `model.safetensors` and `model.json` into `folder`, for `load_model`.

    Raises:
        CalibrationError: the model is not calibrated.
        ResultsError: a file cannot be written.
    """
    if not model.ranges:
        raise CalibrationError("Only a calibrated model can be saved: call calibrate(clips) first.")
    about = {
        "format": FORMAT,
        "input_shapes": [list(shape) for shape in model.input_shapes],
        "input_types": [str(dtype).removeprefix("torch.") for dtype in model.input_types],
        "config": asdict(model.config),
        "groups": list(model.groups),
        "group_of_site": model.group_of_site.tolist(),
        "sites": [
            {
                "layer": site.name,
                "keyframe": asdict(r.keyframe),
                "residual": {k: asdict(t) for k, t in r.residual.items()},
                "correction": r.correction,
            }
            for site, r in zip(model.layers, model.ranges, strict=True)
        ],
        "sums": _sums(model),
    }
    tensors = dict(_packed(model))
    about["sha256"] = checksum(about, tensors)
    write_atomic(folder / "model.safetensors", pack_tensors(tensors))
    write_atomic(folder / "model.json", json.dumps(about, indent=1) + "\n")


def load_model(folder: Path, network: nn.Module) -> ResQModel:
    """The calibrated model of a folder that `save_model` wrote: its steps equal those of the saved one bit for bit.

    Args:
        network: the float network that was calibrated; the code between its operators is in no file.

    Raises:
        CalibrationError: the files are missing, damaged, changed or of another version.
        NetworkError: they are of another network, or it cannot be wrapped.
    """
    about, tensors = _read(folder)
    try:
        config = dict(about["config"])
        config["levels"] = tuple(config["levels"])
        model = ResQModel(network, _example(about), QuantizationConfig(**config))
        _check_same(folder, model, about)
        model.groups, model.group_of_site = tuple(about["groups"]), torch.tensor(about["group_of_site"])
        model.ranges = [_ranges(site) for site in about["sites"]]
        _unpack(model, tensors)
    except (AttributeError, KeyError, TypeError, ValueError, SettingsError) as error:
        raise CalibrationError(
            f"The model in {folder} cannot be used ({type(error).__name__}: {error}). Save it anew or copy it again."
        ) from error
    return model


def _example(about: dict[str, Any]) -> tuple[Tensor, ...]:
    """Inputs of the shapes and types that a model was wrapped for; of float32, where its file does not say."""
    shapes = about["input_shapes"]
    types = about.get("input_types", ["float32"] * len(shapes))
    return tuple(
        torch.zeros(1, *shape, dtype=getattr(torch, dtype)) for shape, dtype in zip(shapes, types, strict=True)
    )


def _packed(model: ResQModel) -> Iterator[tuple[str, Tensor]]:
    for i, operator in enumerate(model.operators):
        for part in _parts(model, operator):
            codes, scale = model.integer_weights(operator, residual=part == "residual")
            small = not codes.numel() or float(codes.abs().max()) < 2**7
            yield f"{i}.{part}.codes", codes.cpu().to(torch.int8 if small else torch.int16).contiguous()
            yield f"{i}.{part}.scale", scale.cpu().contiguous()
        if operator.bias is not None:
            yield f"{i}.bias", operator.bias.cpu().contiguous()


def _parts(model: ResQModel, operator: ResidualOperator) -> dict[Part, int]:
    """The weights that an operator has, with their bits; residuals may share those of keyframes."""
    key, residual = model.config.key_weight_bits, model.config.weight_bits(operator.layer_kind, operator.name)
    return {"keyframe": key} if key == residual else {"keyframe": key, "residual": residual}


def _unpack(model: ResQModel, tensors: dict[str, Tensor]) -> None:
    """Put integer weights and biases in the place of those that were made from the network."""
    for i, operator in enumerate(model.operators):
        for part, bits in _parts(model, operator).items():
            codes, scale = tensors[f"{i}.{part}.codes"], tensors[f"{i}.{part}.scale"]
            if codes.shape != operator.weight.shape or scale.numel() != operator.out_channels:
                raise ValueError(f"layer {operator.name!r} has weights of shape {tuple(codes.shape)}")
            weight = IntegerWeight(codes.to(model.device, torch.float32), scale.to(model.device))
            model.weights.put(operator, part, bits, weight)
        if operator.bias is not None:
            operator.bias.copy_(tensors[f"{i}.bias"])
    model.round_weights()


def _ranges(site: dict[str, Any]) -> SiteRanges:
    tables = {
        reference: ResidualTable(table["sigma"], table["step"], tuple(table["limits"]), tuple(table["units"]))
        for reference, table in site["residual"].items()
    }
    return SiteRanges(_keyframe(site["keyframe"]), tables, tuple(site["correction"]))


def _keyframe(about: dict[str, Any]) -> AffineQuantizer | ChannelQuantizer:
    if "channels" in about:
        return ChannelQuantizer(tuple(AffineQuantizer(**own) for own in about["channels"]))
    return AffineQuantizer(**about)


def _sums(model: ResQModel) -> dict[str, list[float]]:
    """By name of every tensor of the network, the sums of its values and of their magnitudes."""
    return {
        name: [float(values.double().sum()), float(values.double().abs().sum())]
        for name, values in model.network.state_dict().items()
    }


def _check_same(folder: Path, model: ResQModel, about: dict[str, Any]) -> None:
    """Raise NetworkError unless the wrapped network is the one that was saved."""
    names = [site["layer"] for site in about["sites"]]
    own = [site.name for site in model.layers]
    sums, expected = _sums(model), about["sums"]
    differ = sorted(sums.keys() ^ expected.keys())
    differ += [
        name
        for name, (total, size) in expected.items()
        if name in sums and max(abs(sums[name][0] - total), abs(sums[name][1] - size)) > SAME * max(size, sums[name][1])
    ]
    if names != own or differ:
        where = f"tensors {differ[:4]}" if differ else f"layers {own[:4]} instead of {names[:4]}"
        raise NetworkError(
            f"The model in {folder} was calibrated on another network than this {type(model.network).__name__}: it "
            f"differs in {where}. Give the network, with the weights, that it was calibrated on."
        )


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        about = json.loads((folder / "model.json").read_text())
        tensors = read_tensors((folder / "model.safetensors").read_bytes())
    except OSError as error:
        raise CalibrationError(
            f"No calibrated model in {folder}: {error.strerror or error}. Give a folder that `resq-rl train` or "
            "save_model wrote (model.json and model.safetensors)."
        ) from error
    except (SafetensorError, ValueError) as error:  # of which JSON and text decoding errors are kinds
        raise CalibrationError(f"The model in {folder} is damaged: {error}. Save it anew or copy it again.") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise CalibrationError(f"{folder / 'model.json'} is not of format {FORMAT!r}.")
    if about.pop("sha256", None) != checksum(about, tensors):
        raise CalibrationError(
            f"The model in {folder} is damaged or was changed: its checksum is wrong. Save it anew or copy both its "
            "files again."
        )
    return about, tensors
