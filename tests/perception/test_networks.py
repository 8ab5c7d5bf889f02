import os
import shutil
import warnings
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from resq_rl.errors import NetworkError, ResultsError, SettingsError, WeightsError
from resq_rl.perception import (
    CompactDDRNet,
    Segmentation,
    compact_ddrnet,
    compact_pose,
    compact_segformer,
    ddrnet23_slim,
    load_network,
    load_weights,
    mask_propagation_net,
    save_weights,
)
from resq_rl.quantization import ResQModel


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A small network and its exported program with a dynamic batch."""
    path = tmp_path_factory.mktemp("program") / "small.pt2"
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    dynamic = ({0: torch.export.Dim("batch", min=1, max=64)},)
    exported = torch.export.export(network, (torch.rand(2, 3, 16, 16),), dynamic_shapes=dynamic)
    torch.export.save(exported, path)
    return network, path


def test_a_module_is_frozen_in_place() -> None:
    network = CompactDDRNet(width=8).train()
    assert load_network(network) is network
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize("kind", [str, Path])
def test_an_exported_program_gives_the_same_output(kind: type, program: tuple[nn.Module, Path]) -> None:
    network, path = program
    loaded, frames = load_network(kind(path)), torch.rand(3, 3, 16, 16)
    assert torch.allclose(loaded(frames), network(frames), atol=1e-6)
    assert not any(p.requires_grad for p in loaded.parameters())


def test_loading_a_program_warns_of_nothing(program: tuple[nn.Module, Path]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_network(program[1])


def test_compact_ddrnet_can_be_exported(tmp_path: Path) -> None:
    network, frames = CompactDDRNet(width=8).eval(), torch.rand(2, 3, 32, 48)
    torch.export.save(torch.export.export(network, (frames,)), tmp_path / "network.pt2")
    assert torch.allclose(load_network(tmp_path / "network.pt2")(frames), network(frames), atol=1e-5)


@pytest.mark.parametrize("content", [b"", b"not a program", b"PK\x03\x04 cut off"])
def test_a_damaged_program_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "damaged.pt2"
    path.write_bytes(content)
    with pytest.raises(NetworkError, match=r"damaged\.pt2: it is damaged or was written by another torch"):
        load_network(path)


def test_a_cut_off_program_is_refused(program: tuple[nn.Module, Path], tmp_path: Path) -> None:
    content = program[1].read_bytes()
    (tmp_path / "cut.pt2").write_bytes(content[: len(content) // 2])
    with pytest.raises(NetworkError, match="damaged"):
        load_network(tmp_path / "cut.pt2")


def test_a_zip_that_is_no_program_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "other.pt2", "w") as file:
        file.writestr("readme.txt", "nothing here")
    with pytest.raises(NetworkError, match="damaged"):
        load_network(tmp_path / "other.pt2")


def test_a_program_writes_nothing_beside_it(
    program: tuple[nn.Module, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the names of its parts."""
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    path = Path(shutil.copy(program[1], inner / "network.pt2"))
    with zipfile.ZipFile(path, "a") as file:
        root = file.namelist()[0].partition("/")[0]
        for name in (
            "../up",
            f"{root}/../../up",
            f"{root}/data/aotinductor/../../../../up",
            str(tmp_path / "absolute"),
        ):
            file.writestr(name, "escaped")
    monkeypatch.chdir(inner)
    with suppress(NetworkError):
        load_network(path)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]


def described_on(device: str, source: Path, target: Path) -> Path:
    """A copy of a program that says that it was exported on another device, as torch writes it there."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith(".json"):
                content = content.replace(b'"type": "cpu", "index": null', f'"type": "{device}", "index": 0'.encode())
            new.writestr(name, content)
    return target


@pytest.mark.parametrize("device", ["cuda", "mps", "xpu"])
def test_a_program_of_another_device_is_brought_to_the_cpu(
    device: str, program: tuple[nn.Module, Path], tmp_path: Path
) -> None:
    network, path = program
    elsewhere = described_on(device, path, tmp_path / "elsewhere.pt2")
    loaded, frames = load_network(elsewhere), torch.rand(3, 3, 16, 16)
    assert torch.equal(loaded(frames), load_network(path)(frames))
    assert torch.allclose(loaded(frames), network(frames), atol=1e-6)


def test_a_program_without_weights_is_refused(tmp_path: Path) -> None:
    network = nn.Conv2d(3, 2, 3).eval().to("meta")
    exported = torch.export.export(network, (torch.rand(2, 3, 16, 16, device="meta"),))
    torch.export.save(exported, tmp_path / "meta.pt2")
    with pytest.raises(NetworkError, match="exported on the meta device, without weights"):
        load_network(tmp_path / "meta.pt2")


@pytest.mark.filterwarnings("ignore:`torch.jit.*is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", ["network.pt", "network.pt2", "network.torchscript"])
def test_torchscript_is_refused(name: str, tmp_path: Path) -> None:
    scripted = torch.jit.trace(nn.Conv2d(3, 2, 3), torch.rand(1, 3, 8, 8))
    scripted.save(tmp_path / name)
    for source in (tmp_path / name, scripted):
        with pytest.raises(NetworkError, match=r"TorchScript.*torch\.export\.save\(torch\.export\.export\("):
            load_network(source)


@pytest.mark.parametrize(
    ("exported", "frames", "match"),
    [
        ((1, 16, 24), (16, 24), r"fixed shape \(1, 3, 16, 24\), got \(2, 3, 16, 24\).* with a dynamic batch dimension"),
        ((2, 16, 24), (16, 24), r"fixed shape \(2, 3, 16, 24\), got \(1, 3, 16, 24\).* with a dynamic batch dimension"),
        ((None, 16, 24), (32, 24), r"\('any', 3, 16, 24\), got \(1, 3, 32, 24\)\. Set video\.size"),
        ((1, 16, 24), (16, 32), r"\(1, 3, 16, 24\), got \(1, 3, 16, 32\)\. Set video\.size"),
    ],
)
def test_a_program_of_fixed_sizes_says_so(
    exported: tuple[int | None, int, int], frames: tuple[int, int], match: str, tmp_path: Path
) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    batch = exported[0]
    dynamic = None if batch else ({0: torch.export.Dim("batch", min=1, max=64)},)
    program = torch.export.export(network, (torch.rand(batch or 2, 3, *exported[1:]),), dynamic_shapes=dynamic)
    torch.export.save(program, tmp_path / "fixed.pt2")
    with pytest.raises(NetworkError, match=match):
        ResQModel(load_network(tmp_path / "fixed.pt2"), torch.rand(1, 3, *frames))


def test_a_program_of_the_right_sizes_is_wrapped(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    dynamic = (dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO),)
    torch.export.save(
        torch.export.export(network, (torch.rand(2, 3, 16, 24),), dynamic_shapes=dynamic), tmp_path / "any.pt2"
    )
    frames = torch.rand(3, 3, 40, 24)
    model = ResQModel(load_network(tmp_path / "any.pt2"), frames)
    assert torch.allclose(model.float_forward(frames), network(frames), atol=1e-5)


def test_a_missing_program_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NetworkError, match=r"missing\.pt2: there is no such file"):
        load_network(tmp_path / "missing.pt2")
    (tmp_path / "folder.pt2").mkdir()
    with pytest.raises(NetworkError, match="there is no such file"):
        load_network(tmp_path / "folder.pt2")


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NetworkError, match="must be an exported program"):
        load_network(tmp_path / "network.onnx")


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(("source", "got"), [(CompactDDRNet, "type"), ({}, "dict"), (None, "NoneType")])
def test_something_else_is_refused(source: object, got: str) -> None:
    with pytest.raises(NetworkError, match=f"got {got}"):
        load_network(source)  # type: ignore[arg-type]


def test_weights_survive_a_round_trip(tmp_path: Path) -> None:
    network, other = CompactDDRNet(width=8), CompactDDRNet(width=8)
    network.train()(torch.rand(4, 3, 32, 32))  # moves the running statistics
    path = save_weights(network, tmp_path / "new" / "weights.safetensors", {"a": "1"})
    assert load_weights(other, path) == {"a": "1"}
    for name, value in network.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(network.state_dict())
    assert os.listdir(path.parent) == ["weights.safetensors"]


def test_weights_without_metadata_load(tmp_path: Path) -> None:
    network = nn.Conv2d(1, 1, 1)
    save_weights(network, tmp_path / "w.safetensors", {})
    assert load_weights(network, tmp_path / "w.safetensors") == {}


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    network = CompactDDRNet(width=8)
    before = {n: v.clone() for n, v in network.state_dict().items()}
    save_weights(nn.Sequential(nn.Conv2d(3, 4, 3)), tmp_path / "other.safetensors", {})
    with pytest.raises(WeightsError, match="do not fit CompactDDRNet") as caught:
        load_weights(network, tmp_path / "other.safetensors")
    message = str(caught.value)
    assert f"{len(before)} missing (context.coarse.1.conv.weight" in message
    assert f"and {len(before) - 4} more" in message
    assert "2 unexpected (0.bias, 0.weight)" in message
    assert all(torch.equal(v, before[n]) for n, v in network.state_dict().items())


def test_weights_of_other_settings_are_refused(tmp_path: Path) -> None:
    save_weights(CompactDDRNet(classes=6, width=8), tmp_path / "six.safetensors", {})
    with pytest.raises(WeightsError, match=r"2 of another shape \(head.2.weight \(6, 8, 1, 1\) instead of \(3,"):
        load_weights(CompactDDRNet(classes=3, width=8), tmp_path / "six.safetensors")


@pytest.mark.parametrize("content", [b"", b"{}", b"\x10\0\0\0\0\0\0\0not json at all", b"\xff" * 64])
def test_damaged_weights_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "damaged.safetensors").write_bytes(content)
    with pytest.raises(WeightsError, match=r"damaged\.safetensors: the file is damaged"):
        load_weights(CompactDDRNet(width=8), tmp_path / "damaged.safetensors")


def test_cut_off_weights_are_refused(tmp_path: Path) -> None:
    network = CompactDDRNet(width=8)
    content = save_weights(network, tmp_path / "whole.safetensors", {}).read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[:-100])
    with pytest.raises(WeightsError, match="the file is damaged"):
        load_weights(network, tmp_path / "cut.safetensors")


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"none\.safetensors: there is no such file"):
        load_weights(CompactDDRNet(width=8), tmp_path / "none.safetensors")


def test_weights_that_cannot_be_written_leave_the_old_ones(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ResultsError, match="Cannot write"):
        save_weights(nn.Conv2d(1, 1, 1), tmp_path / "file" / "w.safetensors", {})
    assert (tmp_path / "file").read_text() == "in the way"


def test_compact_ddrnet_with_own_weights(tmp_path: Path) -> None:
    network = CompactDDRNet(classes=3, width=8).eval()
    save_weights(network, tmp_path / "own.safetensors", {})
    loaded = compact_ddrnet(classes=3, width=8, weights=tmp_path / "own.safetensors")
    frames = torch.rand(1, 3, 32, 32)
    assert torch.equal(loaded(frames), network(frames))


def test_compact_ddrnet_without_pretraining_is_frozen_too() -> None:
    network = compact_ddrnet(pretrained=False, classes=3, width=8)
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize("make", [compact_ddrnet, compact_pose, compact_segformer, mask_propagation_net])
def test_weights_that_would_not_be_loaded_are_refused(make: Callable[..., nn.Module]) -> None:
    with pytest.raises(SettingsError, match=r"weights w\.pth would not be loaded, because pretrained is false"):
        make(pretrained=False, weights="w.pth")


def test_a_backbone_of_no_weights_is_refused() -> None:
    with pytest.raises(SettingsError, match="backbone takes a part of the weights, and there are none"):
        ddrnet23_slim(None, backbone=True)


def test_shipped_weights_of_another_number_of_classes_are_refused() -> None:
    with pytest.raises(WeightsError, match="of another shape"):
        compact_ddrnet(classes=3)


@pytest.mark.real_data
def test_real_person_segmentation_runs(shared: Path) -> None:
    network, task = (load_network(shared / "models" / "selfie_segmentation.pt2"), Segmentation(2, "probability"))
    frames = torch.rand(2, 3, 256, 256)
    output = task.output(network(frames), (96, 160))
    assert output.shape == (2, 1, 96, 160)
    assert 0 <= float(output.min()) <= float(output.max()) <= 1
    assert task.predict(output).shape == (2, 96, 160)
    assert task.uncertainty(output).shape == (2, 24, 40)


@pytest.mark.real_data
def test_one_of_several_real_outputs_is_chosen(shared: Path) -> None:
    network = load_network(shared / "models" / "pose_landmark_lite.pt2")
    raw = network(torch.rand(1, 3, 256, 256))
    assert Segmentation(2, "logit", output_key=2).output(raw).shape == (1, 1, 256, 256)
    with pytest.raises(NetworkError, match="5 outputs"):
        Segmentation(2, "logit").output(raw)
