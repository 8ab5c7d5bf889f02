import dataclasses
import io
import json
import math
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from resq_rl.errors import ResultsError
from resq_rl.experiments.results.comparison import (
    Comparison,
    print_comparison,
    print_policies,
    short_settings,
    write_summary,
)
from resq_rl.experiments.results.entries import BdEntry, Effort, Point
from resq_rl.experiments.results.methods import METHODS, method_of
from resq_rl.experiments.results.plots import plot_fronts, save_figure

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
    "efforts",
    "budget",
    "at_budget",
    "gains",
]
PAINTED = True
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


def test_efforts_are_kept_and_may_be_missing_in_older_files(comparison: Comparison) -> None:
    spent = dataclasses.replace(comparison, efforts={"ppo": Effort(1200, 3.5)})
    assert Comparison.from_json(spent.to_json()) == spent
    older = json.loads(comparison.to_json())
    del older["efforts"]
    assert Comparison.from_json(json.dumps(older)) == comparison


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


def printed(comparison: Comparison, width: int = 140, levels: tuple[int, ...] | None = None) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_comparison(comparison, console, levels=levels)
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
        "PPO against Dynamic ResQ: -31.2% BOPs at equal accuracy (95% from -40.0% to -20.5%; accuracy 0.660 to 0.715)",
        "PPO against oracle: not reported: the envelope of the second front has 1 point",
        "2 more points in comparison.json",
    ):
        assert expected in text
    assert text.count("tau ") == 6


@pytest.mark.parametrize("width", [60, 80, 100, 110])
@pytest.mark.parametrize("metric", ["mIoU", "agreement with float (mean IoU of present classes)", "J & F " * 12])
def test_table_stays_readable_in_a_narrow_terminal(comparison: Comparison, width: int, metric: str) -> None:
    own = point(0.7, 0.4, interval=0, scene_change=0.4, reference="previous", seed=3, taus=[0.45, 0.7, 2.8, 1.4])
    fronts = {**comparison.fronts, "searched_thresholds": (own,), "a_method_of_my_own": (point(0.6, 0.1, tau=0.25),)}
    text = printed(dataclasses.replace(comparison, accuracy_metric=metric, fronts=fronts), width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    words = {word.strip(",;:") for word in text.split()}
    assert {"keyframe", "reference", "thresholds", "method", *metric.split()} <= words, "no word is broken"
    (numbers,) = (line for line in lines if "0.700 ±0.010" in line and "0.400 ±0.040" in line)
    assert numbers.split()[-6:] == ["0.400", "±0.040", "2.5x", "0.700", "±0.010", "2.0"], "all numbers in one line"
    assert "…" not in text
    heading = next(line for line in lines if "BOPs" in line)
    assert heading.index("BOPs") < heading.index("accuracy")


def test_table_takes_names_as_they_are(comparison: Comparison) -> None:
    """Rich's markup takes [words] in brackets out of a string."""
    odd = dataclasses.replace(
        comparison, video="clips[abc][/b]", fronts={"my[red]": (point(0.7, 0.1, reference="[bold]"),)}, bd_bops={}
    )
    text = printed(dataclasses.replace(odd, accuracy_metric="[i]metric"))
    for expected in ("clips[abc][/b]", "my[red]", "[bold] reference", "[i]metric"):
        assert expected in text


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"weight_bits": 8, "activation_bits": 4}, "W8A4"),
        ({"reference": "previous", "interval": 0, "level": 2}, "4 bits, first keyframe only, previous reference"),
        ({"interval": 1}, "every frame a keyframe"),
        ({"reference": "keyframe", "interval": 16, "level": 0}, "0 bits, keyframe every 16, keyframe reference"),
        (
            {"trade_off": 0.01234, "keyframes": "learned", "bits": 8, "seed": 0},
            "lambda 0.0123, learned keyframes, seed 0",
        ),
        ({"taus": [0.45, 0.7], "kappa": [1, 2, 8], "scene_change": None}, "tau 0.45 0.7"),
        ({"taus": [float(tau) for tau in range(3, 12)], "interval": 4}, "tau 3 to 11 (9 values), keyframe every 4"),
        ({}, ""),
    ],
)
def test_settings_in_words(settings: dict[str, object], words: str) -> None:
    assert short_settings(settings, (0, 2, 4, 8)) == words


def test_levels_without_known_bits_are_shown_as_indices(comparison: Comparison) -> None:
    fronts = {"static_resq": (point(0.7, 0.1, level=3),)}
    assert "level 3" in printed(dataclasses.replace(comparison, fronts=fronts))
    assert "16 bits" in printed(dataclasses.replace(comparison, fronts=fronts), levels=(0, 2, 4, 16))


def test_policies_are_printed_with_their_keyframes_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"trade_off": 0.1, "interval": interval, "bops": 0.25, "accuracy": 0.5 + place / 10}
        for place, interval in enumerate((0, 16, None))
    ]
    print_policies("validation clips", rows)
    text = capsys.readouterr().out
    for expected in ("first keyframe only", "keyframe every 16", "learned keyframes", "0.2500", "0.7000"):
        assert expected in text
    assert "peak" not in text, "no row has one"


def test_every_method_has_a_look_of_its_own() -> None:
    looks = [*METHODS, method_of("my_method")]
    for names in zip(*((m.key, m.title, m.colour, m.marker) for m in looks), strict=True):
        assert len(set(names)) == len(looks)
    assert looks[-1].title == "my method"
    assert all(method_of(method.key) is method for method in METHODS)


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


def test_figure_tells_methods_apart_and_shows_the_float_accuracy(comparison: Comparison) -> None:
    (axes,) = plot_fronts(comparison).axes
    legend = axes.get_legend()
    assert legend is not None
    assert [t.get_text() for t in legend.get_texts()] == ["per-frame", "Dynamic ResQ", "PPO", "float network"]
    marks = [c for c in axes.collections if isinstance(c, PathCollection)]
    assert len({np.asarray(c.get_facecolor()).tobytes() for c in marks}) == 3
    assert len({np.asarray(c.get_paths()[0].vertices).tobytes() for c in marks}) == 3
    assert sum(len(np.asarray(c.get_offsets())) for c in marks) == sum(map(len, comparison.fronts.values()))
    assert axes.get_xscale() == "log"


def test_figure_of_the_upper_part_leaves_out_the_rest(comparison: Comparison) -> None:
    (axes,) = plot_fronts(comparison, within=0.045).axes
    shown = [o[1] for c in axes.collections if isinstance(c, PathCollection) for o in np.asarray(c.get_offsets())]
    every = [p.accuracy for points in comparison.fronts.values() for p in points]
    assert sorted(shown) == sorted(a for a in every if a >= comparison.float_accuracy - 0.045)
    assert 0 < len(shown) < len(every)


def test_without_a_float_accuracy_all_points_are_drawn(comparison: Comparison) -> None:
    (axes,) = plot_fronts(dataclasses.replace(comparison, float_accuracy=math.nan), within=0.1).axes
    assert sum(len(np.asarray(c.get_offsets())) for c in axes.collections if isinstance(c, PathCollection)) == 14


def test_names_with_dollars_are_no_formulas(comparison: Comparison, tmp_path: Path) -> None:
    """Matplotlib reads text between two dollar signs as a formula, and fails where it is none."""
    odd = dataclasses.replace(
        comparison, video=r"$\nothing$", accuracy_metric="$_^$", fronts={"$^_$": (point(0.7, 0.1),)}
    )
    svg = save_figure(plot_fronts(odd), tmp_path / "odd")[1].read_text()
    assert r"<!-- segmentation on $\nothing$, test split -->" in svg


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
