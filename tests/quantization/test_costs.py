"""Cost tables: read from files, counted as by hand, kept with the model that they belong to."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from resq_rl.errors import SettingsError
from resq_rl.quantization import (
    CostTable,
    LayerSize,
    LevelField,
    QuantizationConfig,
    ResQModel,
    cost_name,
    load_model,
    mac_cost,
    save_model,
)
from resq_rl.quantization.specification.costs import SHIPPED
from tests.quantization.networks import byte_clips, everywhere, video

SIZE = (6, 7)
LAYER = LayerSize("conv", 1000, 50, 20)
TABLE = """\
name: mine
source: counted by hand
macs:
  depthwise: {4: {2: 3, 8: 5}, 8: {8: 40}}
  any: {4: {4: 0.3, 8: 7}, 8: {8: 64}}
tile: [2, 3]
operator: 1000
frame: 500
"""


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(TABLE)
    return path


def model_of(cost: Any) -> ResQModel:
    network = nn.Sequential(nn.Conv2d(3, 3, 1, groups=3), nn.Conv2d(3, 2, 1))
    model = ResQModel(network, torch.rand(1, 3, *SIZE), QuantizationConfig(bops_convention=cost))
    return model.calibrate(byte_clips(2, 5, 3, SIZE))


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_table_says_its_source_and_counts_common_widths(name: str) -> None:
    cost = QuantizationConfig(bops_convention=name).cost
    assert isinstance(cost, CostTable)
    assert cost_name(cost) == name
    assert len(cost.source) > 50
    costs = [mac_cost(cost, 4, bits, LAYER) for bits in (0, 2, 4, 8)]
    assert costs[0] == 0
    assert costs == sorted(costs)
    assert costs[-1] <= mac_cost(cost, 8, 8, LAYER)


@pytest.mark.parametrize(
    ("name", "weight_bits", "activation_bits", "expected"),
    [
        ("bitfusion", 3, 5, 4 * 8),
        ("bitfusion", 8, 2, 8 * 2),
        ("bit_serial", 4, 3, 3 * 8),
        ("bit_serial", 8, 3, 3 * 8),
        ("tensor_core_int4", 4, 2, 32),
        ("tensor_core_int4", 4, 8, 64),
        ("tensor_core_int4", 8, 4, 64),
        ("int8_skip", 2, 2, 64),
        ("roofline", 8, 8, max(1, 147 * 50 / 1000, 147 * 20 / 1000)),
        ("roofline", 4, 2, max(1 / 8, 147 * 50 / 4000, 147 * 20 / 2000)),
    ],
)
def test_shipped_tables_against_their_definitions(
    name: Any, weight_bits: int, activation_bits: int, expected: float
) -> None:
    cost = QuantizationConfig(bops_convention=name).cost
    assert mac_cost(cost, weight_bits, activation_bits, LAYER) == pytest.approx(expected, rel=1e-12)


def test_a_frame_is_counted_as_by_hand(table: Path) -> None:
    model = model_of(str(table))
    pixels, frames = SIZE[0] * SIZE[1], video(2, 3, SIZE)[:, None]
    state = model.new_state(1)
    levels = torch.zeros(1, 2, *SIZE, dtype=torch.int64)
    levels[0, :, 0, 0] = 1  # 2 bits, within the first tile of 2x3 pixels
    levels[0, :, 5, 6] = 3  # 8 bits; its tile is cut to 2x1 pixels by the edge
    _, key = model.step(frames[0], state, everywhere(1, True), LevelField(levels))
    _, cost = model.step(frames[1], state, everywhere(1, False), LevelField(levels))
    overhead = 1000 + 500 / 2  # of an operator, and its share of the frame's
    expected = [3 * pixels * 40 + overhead, 6 * pixels * 64 + overhead]
    assert key.per_layer[0].tolist() == pytest.approx(expected, rel=1e-12)
    assert model.reference_bops() == pytest.approx(sum(expected), rel=1e-12)
    # 2 bits cost as 4 where only 4 are listed.
    expected = [3 * (6 * 3 + 2 * 5) + overhead, 6 * (6 * 0.3 + 2 * 7) + overhead]
    assert cost.per_layer[0].tolist() == pytest.approx(expected, rel=1e-6)
    region = cost.bops[0, 0].numpy()
    assert region[0, 0] == pytest.approx(3 * 3 + overhead / pixels)
    assert region[2, 0] == pytest.approx(overhead / pixels), "of another tile"
    assert np.isclose(region, region[0, 0]).sum() == 6


def test_a_layer_that_reads_nothing_but_padding_costs_nothing_to_move() -> None:
    model = ResQModel(
        nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 4, 1, stride=2, padding=1)),
        torch.rand(1, 3, 1, 1),
        QuantizationConfig(bops_convention="roofline"),
    ).calibrate(byte_clips(2, 5, 3, (1, 1)))
    _, cost = model.step(torch.rand(1, 3, 1, 1), model.new_state(1), everywhere(1, True), LevelField.constant(0, 1, 2))
    assert model.sites[1].macs == 0
    assert float(cost.per_layer[0, 1]) == 0


def test_whole_costs_stay_exact_and_equal_the_convention() -> None:
    bits = (2, 4, 8)
    macs: Any = {"any": {w: {a: float(w * a) for a in bits} for w in bits}}
    frames, levels = video(2, 3, SIZE)[:, None], LevelField(torch.randint(0, 4, (1, 2, 3, 2)))
    found = []
    for model in (model_of("product"), model_of(CostTable("product too", "by hand", macs))):
        state = model.new_state(1)
        found.append([model.step(frames[t], state, everywhere(1, t == 0), levels)[1].bops for t in (0, 1)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_saved_model_keeps_its_table(table: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = model_of(str(table))
    save_model(model, tmp_path / "model")
    table.unlink()
    torch.manual_seed(1)
    loaded = load_model(tmp_path / "model", nn.Sequential(nn.Conv2d(3, 3, 1, groups=3), nn.Conv2d(3, 2, 1)))
    assert loaded.config == model.config


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (TABLE.replace("name: mine\n", ""), "'cost.name' is missing"),
        (TABLE.replace("source:", "sauce:"), "sauce"),
        (TABLE.replace("64", "-64"), "'cost.macs' must be"),
        (TABLE.replace("any:", "convolution:"), "Unknown setting 'cost.macs.convolution'"),
        (TABLE.replace("[2, 3]", "[2, 0]"), "'cost.tile' must be"),
        (TABLE.replace("{8: 40}", "{}"), "must list a cost"),
        ("- 1", "must hold a mapping"),
        ("a: [", "Cannot read the cost table"),
    ],
)
def test_a_table_that_cannot_be_used_is_one_error(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=expected):
        QuantizationConfig(bops_convention=str(path))


def test_widths_and_kinds_that_a_table_lacks_are_refused_before_anything_runs(table: Path) -> None:
    config = QuantizationConfig(key_activation_bits=16, bops_convention=str(table))
    wide = ResQModel(nn.Conv2d(3, 2, 1), torch.rand(1, 3, *SIZE), config)
    with pytest.raises(SettingsError, match="no cost of activations with 16 bits, only up to 8"):
        wide.calibrate(byte_clips(2, 5, 3, SIZE))
    with pytest.raises(SettingsError, match="no costs of depthwise layers"):
        model_of(CostTable("mine", "by hand", {"linear": {8: {8: 1.0}}}))
    with pytest.raises(SettingsError, match="Cannot read the cost table nowhere"):
        QuantizationConfig(bops_convention="nowhere.yaml")
