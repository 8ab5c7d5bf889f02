"""A calibrated model comes back from its files bit for bit, and only with its own network."""

import copy
import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from resq_rl.errors import CalibrationError, NetworkError
from resq_rl.perception import load_network
from resq_rl.quantization import (
    ChannelQuantizer,
    Field,
    LevelField,
    QuantizationConfig,
    Reference,
    ResQModel,
    ThresholdField,
    load_model,
    save_model,
    to_float,
)
from resq_rl.quantization.specification.costs import SHIPPED
from resq_rl.sealed import checksum
from tests.envs.problems import moving_frames, tiny_network

CONFIGS = {
    "default": QuantizationConfig(),
    "wide": QuantizationConfig(12, 10, (0, 3, 8), residual_weight_bits=12),
    "kinds": QuantizationConfig(4, 8, residual_weight_bits={"pointwise": 8, "grouped": 4}, bops_convention="max"),
    "layers": QuantizationConfig(residual_weight_bits={"stem.0": 6, "conv": 3}),
    "named": QuantizationConfig(groups={"first": ["stem*"], "rest": ["body*", "head"]}, weight_rounding="nearest"),
}


class Awkward(nn.Module):
    """A shared layer, a BatchNorm that cannot be folded, no bias, a transposed convolution and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.first = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.twice = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.up = nn.ConvTranspose2d(4, 2, 2, 2)
        self.line = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.twice(self.twice(self.first(self.norm(x))).relu())
        return self.up(y + self.line(y.mean((2, 3)))[:, :, None, None])  # type: ignore[no-any-return]


def calibrated(network: nn.Module, config: QuantizationConfig | None = None) -> ResQModel:
    model = ResQModel(network, torch.zeros(1, 3, 32, 48), config)
    return model.calibrate([moving_frames(5, seed=seed) for seed in (1, 2)], interval=3)


@cache
def tiny() -> ResQModel:
    """A calibrated model of the tiny network, which tests share and do not change."""
    return calibrated(tiny_network())


def steps(model: ResQModel, reference: Reference) -> list[Tensor]:
    """Outputs and costs of five frames under fields of both kinds, with a keyframe in the middle."""
    state, found = model.new_state(1, reference), []
    for t, frame in enumerate(moving_frames(5, seed=9)):
        groups, levels = len(model.groups), len(model.config.levels)
        field: Field = LevelField(torch.arange(groups).view(1, -1, 1, 1) % levels)
        if t % 2:
            kappa = tuple(2.0**j for j in range(levels - 1))
            field = ThresholdField(torch.linspace(0.2, 1.5, groups * 2).view(1, groups, 1, 2), kappa)
        output, cost = model.step(to_float(frame[None]), state, torch.tensor([t in (0, 3)]), field)
        found += [output.clone(), cost.bops, cost.elementwise]
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_steps_are_those_of_the_saved_model_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = calibrated(tiny_network(), CONFIGS[name])
    if name == "default":  # so that both are known to come back
        assert any(isinstance(ranges.keyframe, ChannelQuantizer) for ranges in model.ranges)
        assert any(ranges.correction for ranges in model.ranges)
    save_model(model, tmp_path)
    loaded = load_model(tmp_path, tiny_network())
    assert (loaded.config, loaded.groups, loaded.ranges) == (model.config, model.groups, model.ranges)
    assert loaded.reference_bops() == model.reference_bops()
    references: tuple[Reference, ...] = ("previous", "keyframe")
    for reference in references:
        assert all(map(torch.equal, steps(loaded, reference), steps(model, reference)))


def test_networks_of_shared_layers_and_unfolded_norms_come_back(tmp_path: Path) -> None:
    network = Awkward().eval()
    torch.nn.init.constant_(network.norm.running_mean, 0.3)  # type: ignore[arg-type]
    model = calibrated(network)
    save_model(model, tmp_path)
    assert all(map(torch.equal, steps(load_model(tmp_path, network), "previous"), steps(model, "previous")))


@pytest.mark.filterwarnings("ignore")  # of torch.export's own
def test_an_exported_program_comes_back(tmp_path: Path) -> None:
    dynamic = ({0: torch.export.Dim("batch", min=1, max=64)},)
    program = torch.export.export(tiny_network(), (torch.rand(2, 3, 32, 48),), dynamic_shapes=dynamic)
    torch.export.save(program, tmp_path / "network.pt2")
    model = calibrated(load_network(tmp_path / "network.pt2"))
    save_model(model, tmp_path)
    loaded = load_model(tmp_path, load_network(tmp_path / "network.pt2"))
    assert all(map(torch.equal, steps(loaded, "previous"), steps(model, "previous")))


def test_weights_set_again_to_the_saved_bits_stay(tmp_path: Path) -> None:
    model = tiny()
    save_model(model, tmp_path)
    loaded = load_model(tmp_path, tiny_network())
    loaded.set_residual_weight_bits(model.config.weight_bits("conv", ""))
    assert all(map(torch.equal, steps(loaded, "previous"), steps(model, "previous")))


@pytest.mark.parametrize("name", SHIPPED)
def test_models_under_shipped_cost_tables_come_back(name: str, tmp_path: Path) -> None:
    bits = 8 if name == "int8_skip" else 4
    model = calibrated(tiny_network(), QuantizationConfig(bops_convention=name, residual_weight_bits=bits))
    save_model(model, tmp_path)
    loaded = load_model(tmp_path, tiny_network())
    assert loaded.config == model.config
    assert all(map(torch.equal, steps(loaded, "previous"), steps(model, "previous")))


class Coarse(nn.Module):
    """Takes frames of any type, and reads them as float32."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_network()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.float())  # type: ignore[no-any-return]


def test_frames_come_in_the_type_that_the_model_was_wrapped_for(tmp_path: Path) -> None:
    network = Coarse().eval()
    model = ResQModel(network, torch.zeros(1, 3, 32, 48, dtype=torch.float16)).calibrate([moving_frames(5, seed=1)])
    save_model(model, tmp_path)
    frames, whole = torch.full((1, 3, 32, 48), 0.3), torch.full((1, 3, 32, 48), 0.3).half().float()
    loaded = load_model(tmp_path, network)
    assert torch.equal(loaded.float_forward(frames), network.inner(whole))
    assert not torch.equal(network.inner(frames), network.inner(whole))
    assert all(map(torch.equal, steps(loaded, "previous"), steps(model, "previous")))


def test_weights_from_a_file_are_not_rounded_to_other_bits_without_the_clips(tmp_path: Path) -> None:
    model = copy.deepcopy(tiny())
    save_model(model, tmp_path)
    loaded = load_model(tmp_path, tiny_network())
    with pytest.raises(CalibrationError, match=r"without weights of 3 bits.* calibrate the network anew"):
        loaded.set_residual_weight_bits(3)
    assert loaded.config == model.config
    assert all(map(torch.equal, steps(loaded, "previous"), steps(model, "previous")))
    for own in (model, loaded):
        own.set_residual_weight_bits(8)  # to nearest, as always
    assert all(map(torch.equal, steps(loaded, "previous"), steps(model, "previous")))
    for own in (model, loaded):
        own.calibrate([moving_frames(5, seed=seed) for seed in (1, 2)], interval=3).set_residual_weight_bits(3)
    assert all(map(torch.equal, steps(loaded, "previous"), steps(model, "previous")))


def test_an_uncalibrated_model_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="call calibrate"):
        save_model(ResQModel(tiny_network(), torch.zeros(1, 3, 32, 48)), tmp_path)


@pytest.mark.parametrize("other", ["weights", "bias", "layers"])
def test_another_network_is_refused_by_name(other: str, tmp_path: Path) -> None:
    save_model(tiny(), tmp_path)
    network: nn.Module = Awkward().eval() if other == "layers" else tiny_network(1 if other == "weights" else 0)
    if other == "bias":
        with torch.no_grad():
            network.head.bias[1] += 0.01  # type: ignore[index, union-attr, operator]
    with pytest.raises(NetworkError, match="another network") as refused:
        load_model(tmp_path, network)
    assert {"bias": "head.bias", "weights": "weight", "layers": "first"}[other] in str(refused.value)


def _damage(folder: Path, kind: str) -> None:
    path, tensors = folder / "model.json", folder / "model.safetensors"
    about = json.loads(path.read_text())
    match kind:
        case "missing":
            tensors.unlink()
        case "cut":
            tensors.write_bytes(tensors.read_bytes()[:200])
        case "version":
            path.write_text(json.dumps(about | {"format": "resq_rl model 0"}))
        case "text":
            path.write_text(path.read_text()[:100])
        case "lacking":
            del about["sites"][0]["keyframe"], about["sha256"]
            about["sha256"] = checksum(about, load(tensors.read_bytes()))
            path.write_text(json.dumps(about))
        case "step":
            about["sites"][0]["keyframe"]["step"] *= 1.001
            path.write_text(json.dumps(about))
        case "code":
            content = load(tensors.read_bytes())
            content["0.keyframe.codes"][0, 0, 0, 0] += 1
            tensors.write_bytes(save(content))
        case "sum":
            del about["sha256"]
            path.write_text(json.dumps(about))


@pytest.mark.parametrize("kind", ["missing", "cut", "version", "text", "lacking", "step", "code", "sum"])
def test_damaged_files_are_one_error(kind: str, tmp_path: Path) -> None:
    save_model(tiny(), tmp_path)
    _damage(tmp_path, kind)
    with pytest.raises(CalibrationError, match=str(tmp_path)):
        load_model(tmp_path, tiny_network())
