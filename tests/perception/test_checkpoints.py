from pathlib import Path

import pytest
import torch

from resq_rl.errors import WeightsError
from resq_rl.perception.checkpoints import read_weights


@pytest.mark.parametrize("arrangement", ["plain", "state_dict", "model", "parallel"])
def test_names_come_out_bare(arrangement: str, tmp_path: Path) -> None:
    tensors = {"a.weight": torch.rand(2, 3), "layer.model.bias": torch.rand(2)}
    content: dict[str, object] = dict(tensors)
    if arrangement == "parallel":
        content = {f"module.model.{name}": value for name, value in tensors.items()}
    elif arrangement != "plain":
        content = {arrangement: tensors, "epoch": 3}
    torch.save(content, tmp_path / "w.pth")
    found, metadata = read_weights(tmp_path / "w.pth")
    assert metadata == {}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], value) for name, value in tensors.items())


class Harmful:
    """Would create a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (open, (str(self.path), "w"))  # type: ignore[return-value]


def test_checkpoints_run_no_code(tmp_path: Path) -> None:
    torch.save({"state_dict": Harmful(tmp_path / "made")}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="holds more than plain tensors"):
        read_weights(tmp_path / "w.pth")
    assert not (tmp_path / "made").exists()
    for content in (b"", b"not a checkpoint"):
        (tmp_path / "w.pth").write_bytes(content)
        with pytest.raises(WeightsError, match="damaged, no checkpoint of PyTorch"):
            read_weights(tmp_path / "w.pth")
    torch.save([torch.zeros(1)], tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="holds a list and no tensors by name"):
        read_weights(tmp_path / "w.pth")
