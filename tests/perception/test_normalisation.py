"""Networks that expect other frames than RGB in 0..1 get them, wherever the network runs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resq_rl.errors import NetworkError, SettingsError
from resq_rl.experiments.config.composition import load_settings
from resq_rl.experiments.config.targets import make_target
from resq_rl.perception import CompactDDRNet, Normalised, compact_ddrnet, ddrnet23_slim, load_network, load_weights
from resq_rl.perception.weight_files import save_weights
from resq_rl.quantization import LevelField, QuantizationConfig, ResQModel
from resq_rl.quantization.running.storage import load_model, save_model
from resq_rl.video import GeneratedVideo

MEAN, STD = (103.53, 116.28, 123.675), (57.375, 57.12, 58.395)  # of BGR, 0..255
CONFIG = QuantizationConfig(weight_rounding="nearest", range_estimator="min_max")
CLIP = GeneratedVideo(size=(32, 48), frames=6, train=1).clips("train")[0]
FRAMES = CLIP.frames.float() / 255


class Seen(nn.Module):
    """Returns what it is given, through a convolution that changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1, bias=False)
        nn.init.dirac_(self.conv.weight)

    def forward(self, frames: Tensor, *others: Tensor) -> Tensor:
        result: Tensor = self.conv(frames)
        return result if not others else result + others[0]


def by_hand(frames: Tensor, mean: Any, std: Any, channels: str, value_range: float) -> Tensor:
    planes = [frames[:, i] * value_range for i in ((2, 1, 0) if channels == "bgr" else (0, 1, 2))]
    triple = [[v] * 3 if isinstance(v, int | float) else v for v in (mean, std)]
    return torch.stack([(p - m) / s for p, m, s in zip(planes, *triple, strict=True)], 1)


@pytest.mark.parametrize(
    ("mean", "std", "channels", "value_range"),
    [
        ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "rgb", 1.0),
        (MEAN, STD, "bgr", 255.0),
        (0.5, 0.5, "rgb", 1.0),
        (127.5, 128, "bgr", 255),
        ((103.939, 116.779, 123.68), 1.0, "bgr", 255.0),
    ],
)
def test_frames_are_transformed_as_by_hand(mean: Any, std: Any, channels: Any, value_range: float) -> None:
    network = Normalised(Seen(), mean, std, channels, value_range)
    expected = by_hand(FRAMES, mean, std, channels, value_range)
    torch.testing.assert_close(network(FRAMES), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(network(FRAMES, torch.ones(())), expected + 1, rtol=1e-5, atol=1e-5)


def test_nothing_to_transform_leaves_the_network_itself() -> None:
    network = Seen()
    assert load_network(network) is network
    transformed = load_network(network, channels="bgr", value_range=255.0)
    assert torch.allclose(transformed(FRAMES), 255 * FRAMES.flip(1))
    assert not any(p.requires_grad for p in transformed.parameters())


def test_the_quantized_network_is_that_of_the_transformed_frames() -> None:
    """Against the plain network, quantized on frames that were transformed before: the layers see the same numbers."""
    network = CompactDDRNet(3, 8).eval()
    model = ResQModel(Normalised(network, MEAN, STD, "bgr", 255.0), FRAMES[:1], CONFIG)
    assert model.groups == ResQModel(network, FRAMES[:1], CONFIG).groups
    assert model.macs == ResQModel(network, FRAMES[:1], CONFIG).macs
    model.calibrate([CLIP.frames])
    state = model.new_state(clips=1)
    for t, key in enumerate((True, False, False)):
        finest = LevelField.constant(len(CONFIG.levels) - 1, 1, len(model.groups))
        found, _ = model.step(FRAMES[t : t + 1], state, torch.tensor([key]), finest)
        exact = network(by_hand(FRAMES[t : t + 1], MEAN, STD, "bgr", 255.0))
        torch.testing.assert_close(model.float_forward(FRAMES[t : t + 1]), exact, rtol=1e-3, atol=1e-3)
        assert (found - exact).norm() < 0.2 * exact.norm()
    first = model.layers[0]
    assert first.name == "network.stem.0.conv"
    assert first.input_shape == (3, 32, 48)


def test_a_saved_model_is_that_of_its_transform(tmp_path: Path) -> None:
    network = CompactDDRNet(3, 8).eval()
    model = ResQModel(Normalised(network, MEAN, STD, "bgr", 255.0), FRAMES[:1], CONFIG).calibrate([CLIP.frames])
    save_model(model, tmp_path)
    loaded = load_model(tmp_path, Normalised(network, MEAN, STD, "bgr", 255.0))
    level = LevelField.constant(0, 1, len(model.groups))
    outputs = [m.step(FRAMES[:1], m.new_state(clips=1), torch.tensor([True]), level)[0] for m in (model, loaded)]
    assert torch.equal(*outputs)
    assert json.loads((tmp_path / "model.json").read_text())["groups"] == list(loaded.groups)
    for other in (Normalised(network, MEAN, (1.0, 1.0, 1.0), "bgr", 255.0), network):
        with pytest.raises(NetworkError, match="was calibrated on another network"):
            load_model(tmp_path, other)


def test_programs_are_transformed_too(tmp_path: Path) -> None:
    network, path = Seen(), tmp_path / "seen.pt2"
    dynamic = ({0: torch.export.Dim("batch", min=1, max=64)}, None)
    torch.export.save(
        torch.export.export(network.eval(), (FRAMES[:2], torch.zeros(())), dynamic_shapes=({0: dynamic[0][0]}, ({},))),
        path,
    )
    loaded = load_network(path, MEAN, STD, "bgr", 255.0)
    expected = by_hand(FRAMES, MEAN, STD, "bgr", 255.0)
    torch.testing.assert_close(loaded(FRAMES, torch.zeros(())), expected, rtol=1e-5, atol=1e-5)


def test_ddrnet_takes_other_frames_in_place_of_imagenets() -> None:
    torch.manual_seed(0)
    usual, frames = ddrnet23_slim(None, classes=2), F.interpolate(FRAMES[:1], (64, 64))
    options: list[dict[str, Any]] = [
        {"mean": (123.675, 116.28, 103.53), "std": (58.395, 57.12, 57.375), "value_range": 255.0},  # the same
        {"mean": MEAN, "std": STD, "channels": "bgr", "value_range": 255.0},
    ]
    expected = [usual(frames), usual(_imagenet(by_hand(frames, MEAN, STD, "bgr", 255.0)))]
    for settings, output in zip(options, expected, strict=True):
        other = ddrnet23_slim(None, 2, **settings)
        assert usual.state_dict().keys() == other.state_dict().keys()
        other.load_state_dict(usual.state_dict())
        torch.testing.assert_close(other(frames), output, rtol=1e-3, atol=1e-5)


def _imagenet(transformed: Tensor) -> Tensor:
    """Frames that ImageNet's transform brings to these."""
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return transformed * std + mean


def test_weights_of_a_transformed_network_fit_the_network(tmp_path: Path) -> None:
    network = compact_ddrnet(pretrained=False, classes=3, width=8)
    path = save_weights(Normalised(network, MEAN, STD), tmp_path / "w.safetensors", {})
    load_weights(other := CompactDDRNet(3, 8), path)
    assert torch.equal(other.state_dict()["head.2.weight"], network.state_dict()["head.2.weight"])


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"mean": (0.5, 0.5)}, "mean must be one number or three, got"),
        ({"mean": float("nan")}, "mean must be one number or three, got nan"),
        ({"std": 0.0}, "std must be above 0, got 0.0"),
        ({"std": (1.0, 1.0, -1.0)}, "std must be above 0"),
        ({"channels": "gbr"}, "channels must be rgb or bgr, got 'gbr'"),
        ({"value_range": 0}, "value_range must be a positive number, got 0"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(SettingsError, match=match):
        Normalised(Seen(), **settings)
    with pytest.raises(SettingsError, match=match):
        load_network(Seen(), **settings)


def test_the_settings_of_a_model_say_how_its_frames_are_made() -> None:
    """As text, in the way that a policy's folder keeps them."""
    words = ["model.mean=[104,117,124]", "model.std=58", "model.channels=bgr", "model.value_range=255"]
    options = {
        "normalised": ["model.network._target_=resq_rl.perception.CompactDDRNet", "+model.network.width=8"],
        "ddrnet23_slim": ["model.weights=null"],
    }
    for option, own in options.items():
        target = load_settings("compare", [f"model={option}", *own, *words]).model
        text = json.dumps({"_target_": target.path, **{n: as_settings(v) for n, v in target.arguments.items()}})
        for network in (target.build(), make_target(json.loads(text), "model").build()):
            transform = network.transform
            expected = by_hand(FRAMES, (104, 117, 124), 58, "bgr", 255)
            torch.testing.assert_close(transform(FRAMES), expected, rtol=1e-5, atol=1e-5)


def as_settings(value: Any) -> Any:
    return {"_target_": value.path, **value.arguments} if hasattr(value, "path") else value
