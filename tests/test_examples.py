"""The scripts in `examples` run as they stand."""

import re
import runpy
from functools import partial
from pathlib import Path

import pytest
import torch

from resq_rl.experiments.config.composition import load_settings
from resq_rl.policies import ppo
from resq_rl.quantization import ResQModel


def points(printed: str, name: str) -> list[tuple[float, float]]:
    """(share of W8A8, accuracy) of every line that a script printed of a method."""
    pattern = rf"^{name} +([\d.]+) of W8A8, .*? ([\d.]+)(?: \(mean IoU\))?$"
    return [(float(bops), float(accuracy)) for bops, accuracy in re.findall(pattern, printed, re.MULTILINE)]


def test_a_policy_is_trained_and_compared(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ppo, "_fit_first_choices", partial(ppo._fit_first_choices, steps=100))
    example = runpy.run_path(str(root / "examples" / "train_and_compare.py"))
    example["main"](frames=90)
    printed = capsys.readouterr().out
    (trained,) = re.findall(r"trained on (\d+) frames", printed)
    assert int(trained) >= 90
    for name in ("Dynamic ResQ", "PPO"):
        found = points(printed, name)
        assert found
        assert all(0 < bops < 1 and 0.2 < accuracy < 1 for bops, accuracy in found)
    assert "BOPs at equal accuracy:" in printed


def test_a_custom_network_is_wrapped_and_measured(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(root / "examples" / "custom_network.py"), run_name="__main__")
    printed = capsys.readouterr().out
    # By hand: a quarter of 64x96 pixels at the stem's, a sixteenth nowhere; the head and `up` give full resolution.
    quarter = 32 * 48
    macs = quarter * (3 * 16 * 9 + 16 * 9 + 16 * 32) + 32 * 32 + quarter * 32 * 16 * 4 + 4 * quarter * 16 * 3
    border = interior_share_lost(32, 48)
    assert f"W8A8: {64 * (macs - border):,} bit-operations a frame" in printed
    ((whole, accuracy),) = points(printed, "PerFrame")
    assert whole == 1.0
    assert accuracy > 0.8
    ((heuristic, _),) = points(printed, "DynamicResQ")
    assert heuristic < 1


def interior_share_lost(rows: int, columns: int) -> int:
    """Multiply-accumulates of taps that lie in the padding: of the stem (stride 2) and the depthwise layer."""
    stem = (3 * rows + 3 * columns - 1) * 3 * 16  # padding is met above and left only
    depthwise = (2 * 3 * rows + 2 * 3 * columns - 4) * 16
    return stem + depthwise


def test_the_custom_network_serves_on_the_command_line(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(root / "examples")
    settings = load_settings("compare", ["model=custom", "model._target_=custom_network.make_network"])
    network = settings.model.build()
    assert isinstance(network, torch.nn.Module)
    assert len(ResQModel(network, torch.zeros(1, 3, 64, 96)).sites) == 6
