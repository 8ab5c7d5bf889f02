"""The distilled table: what is typical of a policy's choices, and a file that any runtime can read."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from resq_rl.errors import PolicyError
from resq_rl.policies import GroupThresholds, RateControl
from resq_rl.policies.threshold_table import Controller, TableRow, ThresholdTable, typical_thresholds
from resq_rl.quantization import Budget

ROWS = (
    TableRow(0.1, 8, (0.2, 0.45, 1.0), 0.9, 0.3, 0.91, 0.25),
    TableRow(1.0, 0, (1.4, 4.0, 100.0), 0.8, 0.1, 0.85, 0.1),
)
TABLE = ThresholdTable(("stem", "body", "head"), (0, 2, 4, 8), (1.0, 2.0, 8.0), "previous", ROWS)


def test_typical_thresholds_are_those_that_a_share_of_the_choices_does_not_exceed() -> None:
    first = torch.tensor([1.0, 1, 1, 1, 1, 2, 2, 2, 3, 100]).view(5, 1, 1, 2)
    chosen = torch.cat([first, torch.full((5, 1, 1, 2), 0.7)], 1)
    assert typical_thresholds(chosen, (0.0, 0.5, 0.75, 1.0)) == [(1.0, 0.7), (2.0, 0.7), (100.0, 0.7)]


def test_a_policy_that_always_chooses_the_same_has_one_row() -> None:
    assert typical_thresholds(torch.full((4, 2, 3, 3), 1.4), (0.25, 0.5, 0.75)) == [(1.4, 1.4)]


def test_without_residual_frames_there_is_nothing_to_distil() -> None:
    with pytest.raises(PolicyError, match="keyframe"):
        typical_thresholds(torch.zeros(0, 2, 1, 1), (0.5,))


def test_it_comes_back_from_its_file(tmp_path: Path) -> None:
    TABLE.save(tmp_path / "thresholds.json")
    assert ThresholdTable.load(tmp_path / "thresholds.json") == TABLE
    about = json.loads((tmp_path / "thresholds.json").read_text())
    assert "kappa" in about["rule"]
    assert about["rows"][0]["accuracy_lost"] == pytest.approx(0.01)
    assert about["rows"][0]["bops_added"] == pytest.approx(0.2)


def test_under_a_budget_it_comes_back_with_its_controllers(tmp_path: Path) -> None:
    rows = (replace(ROWS[0], controller=Controller(4.0, 0.7)), ROWS[1])
    table = replace(TABLE, rows=rows, budget=Budget(peak=0.3, mean=0.1))
    table.save(tmp_path / "thresholds.json")
    assert ThresholdTable.load(tmp_path / "thresholds.json") == table
    assert "exp(integral * (fill - left))" in json.loads((tmp_path / "thresholds.json").read_text())["rule"]
    controlled = RateControl("previous", 8, taus=rows[0].thresholds, kappa=TABLE.kappa, integral=4.0, fill=0.7)
    assert table.at(0.1) == controlled
    assert type(table.at(1.0)) is GroupThresholds


def test_the_rule_for_changes_of_scene_comes_back_too(tmp_path: Path) -> None:
    gains = Controller(4.0, 0.7)
    rows = (replace(ROWS[0], scene_change=0.4), replace(ROWS[1], scene_change=0.3, controller=gains))
    table = replace(TABLE, rows=rows, budget=Budget(peak=0.3, mean=0.1))
    table.save(tmp_path / "thresholds.json")
    loaded = ThresholdTable.load(tmp_path / "thresholds.json")
    assert loaded == table
    assert [loaded.policy(row).scene_change for row in loaded.rows] == [0.4, 0.3]


def test_a_table_from_before_the_rule_has_none(tmp_path: Path) -> None:
    TABLE.save(tmp_path / "thresholds.json")
    about = json.loads((tmp_path / "thresholds.json").read_text())
    for row in about["rows"]:
        del row["scene_change"]
    (tmp_path / "thresholds.json").write_text(json.dumps(about | {"format": "resq_rl thresholds 1"}))
    assert ThresholdTable.load(tmp_path / "thresholds.json") == TABLE


@pytest.mark.parametrize(("trade_off", "row"), [(0.01, 0), (0.3, 0), (0.33, 1), (5.0, 1)])
def test_the_nearest_lambda_by_ratio_serves(trade_off: float, row: int) -> None:
    own = ROWS[row]
    assert TABLE.at(trade_off) == GroupThresholds("previous", own.interval, taus=own.thresholds, kappa=TABLE.kappa)


@pytest.mark.parametrize(
    "rows", [(), (replace(ROWS[0], thresholds=(0.1, 0.2)),), (replace(ROWS[0], thresholds=(0.0,) * 3),)]
)
def test_rows_that_do_not_fit_the_groups_are_refused(rows: tuple[TableRow, ...]) -> None:
    with pytest.raises(PolicyError, match="A table needs rows"):
        replace(TABLE, rows=rows)


@pytest.mark.parametrize("kind", ["missing", "cut", "version", "budget", "lacking"])
def test_damaged_files_are_one_error(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "thresholds.json"
    TABLE.save(path)
    about = json.loads(path.read_text())
    match kind:
        case "missing":
            path.unlink()
        case "cut":
            path.write_text(path.read_text()[:50])
        case "version":
            path.write_text(json.dumps(about | {"format": "x"}))
        case "budget":
            path.write_text(json.dumps(about | {"budget": {"peak": 0.1, "mean": 0.2}}))
        case "lacking":
            del about["rows"][0]["thresholds"]
            path.write_text(json.dumps(about))
    with pytest.raises(PolicyError, match=r"thresholds\.json"):
        ThresholdTable.load(path)
