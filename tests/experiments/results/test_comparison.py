import dataclasses
import io
import json
import math
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from resq_rl.errors import ResultsError
from resq_rl.experiments.results.comparison import BdEntry, Comparison, Point, print_comparison, write_summary
from resq_rl.experiments.results.plots import plot_fronts, save_figure
from resq_rl.experiments.results.statistics import BdResult, Interval

# The names that are promised to readers of comparison.json.
NAMES = [
    "task",
    "video",
    "split",
    "clips",
    "frames",
    "accuracy_metric",
    "float_accuracy",
    "bops_convention",
    "reference_bops_per_frame",
    "env_frames_used_for_training",
    "wall_seconds",
    "fronts",
    "bd_bops",
]
POINT_NAMES = [
    "accuracy",
    "accuracy_ci95",
    "bops",
    "bops_ci95",
    "peak_bops",
    "policy_bops",
    "state_bytes",
    "settings",
    "keyframe_bops",
]


def point(accuracy: float, bops: float, **settings: object) -> Point:
    around = (accuracy - 0.01, accuracy + 0.01)
    return Point(accuracy, around, bops, (bops * 0.9, bops * 1.1), 1.0, 0.001, 1_000_000, settings)


@pytest.fixture
def comparison() -> Comparison:
    taus = (0.1, 0.16, 0.25, 0.4, 0.6, 0.8, 1.1, 1.5)
    return Comparison(
        task="segmentation",
        video="generated",
        split="test",
        clips=48,
        frames=2304,
        accuracy_metric="mIoU",
        float_accuracy=0.72,
        bops_convention="product",
        reference_bops_per_frame=5.4e9,
        env_frames_used_for_training=60_000,
        wall_seconds=612.5,
        fronts={
            "per_frame": (point(0.722, 1.0, weight_bits=8), point(0.45, 0.25, weight_bits=4)),
            "dynamic_resq": tuple(point(0.72 - 0.01 * i, 0.32 / (1 + 0.3 * i), tau=t) for i, t in enumerate(taus)),
            "ppo": tuple(point(0.715 - 0.012 * i, 0.2 / (1 + 0.4 * i), trade_off=0.05 * i) for i in range(4)),
        },
        bd_bops={
            "ppo_vs_dynamic_resq": BdEntry(-31.2, (-40.0, -20.5), (0.66, 0.715), undefined_replicates=3),
            "ppo_vs_oracle": BdEntry(None, None, None, "the envelope of the second front has 1 point; 2 are needed"),
        },
    )


def test_json_has_the_promised_names(comparison: Comparison) -> None:
    values = json.loads(comparison.to_json())
    assert list(values) == NAMES
    assert list(values["fronts"]["ppo"][0]) == POINT_NAMES
    assert {"value", "ci95", "accuracy_range"} <= set(values["bd_bops"]["ppo_vs_dynamic_resq"])
    assert values["bd_bops"]["ppo_vs_oracle"]["reason"].startswith("the envelope")


def test_json_round_trip(comparison: Comparison, tmp_path: Path) -> None:
    path = comparison.write(tmp_path / "comparison.json")
    assert Comparison.read(path) == comparison


def test_json_takes_numpy_paths_and_numbers_that_are_not_finite(tmp_path: Path) -> None:
    values = {"a": np.float32(0.5), "b": np.arange(2), "c": (1, None), "d": math.nan, "e": Path("x/y"), "f": True}
    path = write_summary(tmp_path / "summary.json", values)
    assert json.loads(path.read_text()) == {"a": 0.5, "b": [0, 1], "c": [1, None], "d": None, "e": "x/y", "f": True}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"fronts": {}, "bd_bops": {}}', '{"fronts": {"ppo": [{"x": 1}]}}'])
def test_other_text_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "comparison.json"
    path.write_text(text)
    with pytest.raises(ResultsError, match="Cannot read the comparison"):
        Comparison.read(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="nowhere"):
        Comparison.read(tmp_path / "nowhere.json")


def test_delta_entries_keep_the_reason_and_the_undefined_replicates() -> None:
    result = BdResult(-10.0, (0.6, 0.7), None)
    assert BdEntry.of(result, Interval((-12.0, -8.0), 4, 1000, None)) == BdEntry(
        -10.0, (-12.0, -8.0), (0.6, 0.7), None, 4
    )
    many = BdEntry.of(result, Interval(None, 90, 1000, "9% of the bootstrap replicates have no value"))
    assert (many.value, many.ci95, many.undefined_replicates) == (-10.0, None, 90)
    assert many.reason == "9% of the bootstrap replicates have no value"
    assert BdEntry.of(BdResult(None, None, "too few"), None).reason == "too few"


def printed(comparison: Comparison) -> str:
    console = Console(file=io.StringIO(), width=140)
    print_comparison(comparison, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_table_shows_methods_intervals_and_deltas(comparison: Comparison) -> None:
    text = printed(comparison)
    for expected in (
        "Dynamic ResQ",
        "PPO",
        "tau 0.1",
        "0.722 ±0.010",
        "0.200 ±0.020",
        "5.0x",
        "0.5",  # points lost by the first PPO setting
        "ppo vs dynamic resq: -31.2% BOPs at equal accuracy (95% from -40.0% to -20.5%; accuracy 0.660 to 0.715)",
        "ppo vs oracle: not reported: the envelope of the second front has 1 point",
        "2 more points in comparison.json",
    ):
        assert expected in text
    assert text.count("tau ") == 6


def test_table_of_points_without_intervals_and_deltas_without_bounds(comparison: Comparison) -> None:
    bare = dataclasses.replace(point(0.7, 0.5), accuracy_ci95=None, bops_ci95=None)
    entry = BdEntry(-5.0, None, (0.6, 0.7), "one clip gives no interval")
    text = printed(dataclasses.replace(comparison, fronts={"mine": (bare,)}, bd_bops={"mine_vs_ppo": entry}))
    assert "mine" in text
    assert "-5.0% BOPs at equal accuracy (one clip gives no interval;" in text


def test_figure_is_written_as_png_and_svg(comparison: Comparison, tmp_path: Path) -> None:
    png, svg = save_figure(plot_fronts(comparison), tmp_path / "fronts.png")
    assert [path.name for path in (png, svg)] == ["fronts.png", "fronts.svg"]
    with Image.open(png) as image:
        assert image.size == (1080, 720)
    assert ElementTree.parse(svg).getroot().tag.endswith("svg")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fronts.png", "fronts.svg"]


@pytest.mark.parametrize("log_bops", [True, False])
def test_figure_tells_methods_apart_and_shows_the_float_accuracy(comparison: Comparison, log_bops: bool) -> None:
    (axes,) = plot_fronts(comparison, log_bops=log_bops).axes
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == [
        "float network",
        "per-frame",
        "Dynamic ResQ",
        "PPO",
    ]
    styles = {(line.get_color(), line.get_marker()) for line in axes.lines if line.get_marker() != "None"}
    assert len({marker for _, marker in styles} - {"|", "_"}) == 3
    assert axes.get_xscale() == ("log" if log_bops else "linear")


def test_figure_of_empty_and_unknown_methods(comparison: Comparison, tmp_path: Path) -> None:
    odd = dataclasses.replace(comparison, fronts={"ppo": (), "mine": (point(0.7, 0.1),)})
    assert save_figure(plot_fronts(odd), tmp_path / "odd")[0].is_file()


def test_figures_need_no_display_and_leave_no_global_state(comparison: Comparison) -> None:
    import matplotlib.pyplot as plt

    assert isinstance(plot_fronts(comparison), Figure)
    assert plt.get_fignums() == []


@pytest.mark.parametrize("folder", ["/proc/nothing", "file/below"])
def test_an_unwritable_folder_is_one_clear_error(comparison: Comparison, tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").write_text("a file, not a folder")
    where = tmp_path / folder
    with pytest.raises(ResultsError, match=r"Cannot write .*comparison\.json"):
        comparison.write(where / "comparison.json")
    with pytest.raises(ResultsError, match=r"Cannot write .*fronts\.png"):
        save_figure(plot_fronts(comparison), where / "fronts")
