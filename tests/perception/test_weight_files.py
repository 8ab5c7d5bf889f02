"""Weights of every arrangement that training code leaves end up in the network they are of, or are refused."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from resq_rl.errors import WeightsError
from resq_rl.perception import load_weights, save_weights

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.*is deprecated:DeprecationWarning")  # torch.compile's own


class Net(nn.Module):
    """A network with a child that has the name of a wrapper."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    def forward(self, frames: Tensor) -> Tensor:
        result: Tensor = self.model(self.stem(frames))
        return result


class Module(nn.Module):
    """In the manner of Lightning: the network, its loss and what else training needs."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.net, self.criterion = network, nn.CrossEntropyLoss(weight=torch.ones(4))


def trained() -> Net:
    """Random weights, and statistics that are not the first ones."""
    network = Net()
    network.train()(torch.rand(4, 3, 8, 8))
    return network.eval()


def prefixed(prefix: str) -> Callable[[Net], Any]:
    return lambda network: {f"{prefix}{name}": value for name, value in network.state_dict().items()}


def with_optimizer(network: Net) -> Any:
    optimizer = torch.optim.Adam(network.parameters())
    network(torch.rand(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    return {"model_state_dict": network.state_dict(), "optimizer_state_dict": optimizer.state_dict(), "epoch": 3}


def compiled(network: nn.Module) -> nn.Module:
    result: nn.Module = torch.compile(network)  # type: ignore[assignment]
    return result


def compiled_part(network: Net) -> Any:
    whole = copy.deepcopy(network)
    whole.stem = compiled(whole.stem)  # type: ignore[assignment]
    return whole.state_dict()


ARRANGEMENTS: dict[str, Callable[[Net], Any]] = {
    "plain": lambda network: network.state_dict(),
    "state_dict": lambda network: {"state_dict": network.state_dict(), "epoch": 3},
    "with_optimizer": with_optimizer,
    "ema": lambda network: {"ema": network.state_dict(), "args": {"lr": 0.1}},
    "nested": lambda network: {"ema": {"state_dict": {"module": network.state_dict()}}},
    "same_twice": lambda network: {"model": network.state_dict(), "ema": network.state_dict()},
    "parallel": lambda network: nn.DataParallel(network).state_dict(),
    "compiled": lambda network: compiled(network).state_dict(),
    "compiled_part": compiled_part,
    "lightning": lambda network: {"state_dict": Module(network).state_dict(), "hyper_parameters": {}},
    "averaged": lambda network: AveragedModel(network).state_dict(),
    "model.": prefixed("model."),
    "module.model._orig_mod.": prefixed("module.model._orig_mod."),
    "segmentor.": prefixed("segmentor."),
    "without_counters": lambda network: {
        name: value for name, value in network.state_dict().items() if "num_batches_tracked" not in name
    },
}


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_weights_are_found(arrangement: str, tmp_path: Path) -> None:
    network, loaded = trained(), Net().eval()
    torch.save(ARRANGEMENTS[arrangement](network), tmp_path / "w.pth")
    assert load_weights(loaded, tmp_path / "w.pth") == {}
    for name, value in network.state_dict().items():
        if "num_batches_tracked" not in name:
            assert torch.equal(loaded.state_dict()[name], value), name


def test_a_compiled_network_takes_plain_weights_and_gives_them_back(tmp_path: Path) -> None:
    network, other = trained(), trained()
    save_weights(network, tmp_path / "plain.safetensors", {})
    wrapped = compiled(other)
    load_weights(wrapped, tmp_path / "plain.safetensors")
    assert torch.equal(other.state_dict()["stem.0.weight"], network.state_dict()["stem.0.weight"])
    again = Net()
    load_weights(again, save_weights(wrapped, tmp_path / "wrapped.safetensors", {}))
    assert torch.equal(again.state_dict()["model.0.weight"], network.state_dict()["model.0.weight"])


@pytest.mark.parametrize(
    ("content", "places"),
    [
        (lambda a, b: {"model": a.state_dict(), "ema": b.state_dict()}, r"\['model'\], \['ema'\]"),
        (lambda a, b: {"state_dict": {**prefixed("net.")(a), **prefixed("teacher.")(b)}}, r"net\.\*, .* teacher\.\*"),
    ],
)
def test_two_sets_of_weights_that_fit_are_refused(
    content: Callable[[Net, Net], Any], places: str, tmp_path: Path
) -> None:
    torch.save(content(trained(), trained()), tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=rf"several sets that fit: .*{places}\. Save the one that is meant"):
        load_weights(Net(), tmp_path / "w.pt")


def test_a_network_that_lacks_a_layer_of_the_file_is_refused(tmp_path: Path) -> None:
    """Names outside the prefix are another module's; names under it are the network's own."""
    tensors = prefixed("module.")(trained()) | {"module.extra.weight": torch.zeros(1)}
    torch.save(tensors, tmp_path / "w.pth")
    before = trained()
    expected = copy.deepcopy(before.state_dict())
    with pytest.raises(WeightsError, match=r"do not fit Net: 1 unexpected \(extra.weight\)"):
        load_weights(before, tmp_path / "w.pth")
    assert all(torch.equal(value, expected[name]) for name, value in before.state_dict().items())


class Harmful:
    """Would create a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (open, (str(self.path), "w"))  # type: ignore[return-value]


def test_checkpoints_run_no_code(tmp_path: Path) -> None:
    torch.save({"state_dict": Harmful(tmp_path / "made")}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="holds more than plain tensors"):
        load_weights(Net(), tmp_path / "w.pth")
    assert not (tmp_path / "made").exists()
    for content in (b"", b"not a checkpoint"):
        (tmp_path / "w.pth").write_bytes(content)
        with pytest.raises(WeightsError, match="damaged, no checkpoint of PyTorch"):
            load_weights(Net(), tmp_path / "w.pth")
    torch.save([torch.zeros(1)], tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="holds a list and no tensors by name"):
        load_weights(Net(), tmp_path / "w.pth")


def test_torchscript_is_no_checkpoint(tmp_path: Path) -> None:
    torch.jit.trace(trained(), torch.rand(1, 3, 8, 8)).save(tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=r"it is a TorchScript program\. Save its weights alone"):
        load_weights(Net(), tmp_path / "w.pt")
