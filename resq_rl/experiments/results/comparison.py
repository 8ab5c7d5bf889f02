"""The results of a run: `comparison.json`, `summary.json` and the table on the terminal.

The names in `comparison.json` do not change. BOPs are fractions of running every frame at W8A8, accuracies lie in 0..1,
Bjontegaard deltas are in percent. Numbers that are not finite are written as null.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from resq_rl.errors import ResultsError
from resq_rl.experiments.results.entries import AtBudget, BdEntry, Effort, Gain, Point, Range
from resq_rl.experiments.results.methods import method_of
from resq_rl.experiments.results.statistics import pareto_envelope
from resq_rl.files import write_atomic

__all__ = [
    "Comparison",
    "comparison_table",
    "delta_title",
    "describe_gain",
    "print_comparison",
    "print_policies",
    "short_settings",
    "spread_points",
    "write_summary",
]

# How tables show a setting, in this order; the settings that are not here are in the file only.
SHORT = {
    "weight_bits": "W{}",
    "activation_bits": "A{}",
    "level": "level {}",
    "tau": "tau {}",
    "taus": "tau {}",
    "trade_off": "lambda {}",
    "interval": "keyframe every {}",
    "keyframes": "{} keyframes",
    "scene_change": "scene change {}",
    "integral": "integral gain {}",
    "fill": "fill {}",
    "static": "the policy is its beginning, without a network",
    "reference": "{} reference",
    "seed": "seed {}",
}
INTERVALS = {0: "first keyframe only", 1: "every frame a keyframe"}
ROWS_PER_METHOD = 6
MOST_LISTED = 8  # values of one setting in tables; of more, their range


@dataclass(frozen=True)
class Comparison:
    """Everything that `comparison.json` holds.

    Attributes:
        task, video, split: names of the task, the video source and the split that was measured.
        clips, frames: number of clips and of frames of the split.
        accuracy_metric: name of the accuracy.
        float_accuracy: accuracy of the network without quantization.
        bops_convention: name of the rule for the cost of one multiplication, and what takes a level if not a pixel.
        reference_bops_per_frame: BOPs of a W8A8 frame, the unit of all BOPs here.
        env_frames_used_for_training: environment frames of one training run, its warm start included.
        wall_seconds: duration of the whole run.
        fronts: points by the key of their method, such as "dynamic_resq" or "ppo".
        bd_bops: deltas by name, such as "ppo_vs_dynamic_resq".
        efforts: by the key of a method that is trained or searched; none in files of older versions.
        budget: peak, mean and bucket of the budget that every frame keeps to, where there is one.
        at_budget: under it, by the key of a method that is tuned.
        gains: accuracy at equal budget by name, such as "ppo_vs_rate_control".
    """

    task: str
    video: str
    split: str
    clips: int
    frames: int
    accuracy_metric: str
    float_accuracy: float
    bops_convention: str
    reference_bops_per_frame: float
    env_frames_used_for_training: int
    wall_seconds: float
    fronts: Mapping[str, Sequence[Point]]
    bd_bops: Mapping[str, BdEntry]
    efforts: Mapping[str, Effort] = field(default_factory=dict)
    budget: Mapping[str, Any] | None = None
    at_budget: Mapping[str, AtBudget] = field(default_factory=dict)
    gains: Mapping[str, Gain] = field(default_factory=dict)

    def to_json(self) -> str:
        """The text of the file."""
        return _to_json(dataclasses.asdict(self))

    def write(self, path: Path) -> Path:
        """Write the file atomically.

        Raises:
            ResultsError: the file cannot be written.
        """
        return write_atomic(path, self.to_json())

    @classmethod
    def from_json(cls, text: str) -> "Comparison":
        """Read the text that `to_json` returned.

        Raises:
            ResultsError: the text is not JSON, or a name is missing or unknown.
        """
        try:
            values = json.loads(text)
            fronts = {
                method: tuple(Point(**_tuples(point)) for point in points)
                for method, points in values.pop("fronts").items()
            }
            deltas = {name: BdEntry(**_tuples(entry)) for name, entry in values.pop("bd_bops").items()}
            efforts = {name: Effort(**effort) for name, effort in values.pop("efforts", {}).items()}
            kept = {name: AtBudget(**_tuples(entry)) for name, entry in values.pop("at_budget", {}).items()}
            gains = {name: Gain(**_tuples(entry)) for name, entry in values.pop("gains", {}).items()}
            return cls(**values, fronts=fronts, bd_bops=deltas, efforts=efforts, at_budget=kept, gains=gains)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ResultsError(f"Cannot read the comparison: {error!r}. Run resq-rl compare again.") from error

    @classmethod
    def read(cls, path: Path) -> "Comparison":
        """Read a `comparison.json`.

        Raises:
            ResultsError: the file cannot be read or holds something else.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ResultsError(f"Cannot read {path}: {error}. Check the path.") from error
        return cls.from_json(text)


def write_summary(path: Path, summary: Mapping[str, Any]) -> Path:
    """Write a command's `summary.json` atomically; numpy values, tuples and paths are converted.

    Raises:
        ResultsError: the file cannot be written.
    """
    return write_atomic(path, _to_json(summary))


def print_comparison(
    comparison: Comparison, console: Console | None = None, *, levels: Sequence[int] | None = None
) -> None:
    """Print the table of a comparison to the terminal; `levels` are the bits of the levels, if they are known."""
    (console or Console()).print(comparison_table(comparison, levels))


def comparison_table(comparison: Comparison, levels: Sequence[int] | None = None) -> Group:
    """The comparison as a table of at most six points per method, and a line per Bjontegaard delta."""
    every = [point.settings for points in comparison.fronts.values() for point in points]
    references = {settings["reference"] for settings in every if "reference" in settings}
    shared = f"; every point has the {references.pop()} reference" if len(references) == 1 else ""
    table = Table(
        title=Text(f"{comparison.task} on {comparison.video} ({comparison.split}: {comparison.clips} clips)"),
        caption=Text(
            f"accuracy: {comparison.accuracy_metric}, {comparison.float_accuracy:.3f} for the float network; BOPs: "
            f"share of W8A8 ({comparison.bops_convention}); ± is half the 95% interval{shared}"
        ),
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("method and settings", overflow="fold")
    for heading in ("BOPs", "times\nfewer", "accuracy", "points\nlost"):
        table.add_column(heading, justify="right", no_wrap=True)
    hidden = 0
    for method, points in comparison.fronts.items():
        shown = spread_points(points)
        hidden += len(points) - len(shown)
        if shown:
            table.add_row(Text(method_of(method).title, style="bold"))
        for point in shown:
            settings = {n: value for n, value in point.settings.items() if not (shared and n == "reference")}
            words = Padding(Text(short_settings(settings, levels)), (0, 0, 0, 2))
            table.add_row(words, *_numbers(point, comparison))
    lines = [f"{delta_title(name)}: {_describe(entry)}" for name, entry in comparison.bd_bops.items()]
    lines += [f"{delta_title(name)}: {describe_gain(gain)}" for name, gain in comparison.gains.items()]
    lines += [
        f"{method_of(name).title}: {effort.frames:,} environment frames, {effort.seconds:.0f} s"
        for name, effort in comparison.efforts.items()
    ]
    if hidden:
        lines.insert(0, f"{hidden} more points in comparison.json")
    return Group(table, *map(Text, lines))


def delta_title(name: str) -> str:
    """The name of a delta, such as "ppo_vs_static_resq", in words."""
    own, versus, other = name.partition("_vs_")
    return f"{method_of(own).title} against {method_of(other).title}" if versus else name.replace("_", " ")


def print_policies(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print measured policies: rows of their settings, `accuracy`, `bops` and, where known, `peak_bops`."""
    table = Table("lambda", "keyframes", title=Text(title))
    columns = {
        "seed": ("seed", "{}"),
        "bops": ("BOPs, share of W8A8", "{:.4f}"),
        "accuracy": ("accuracy", "{:.4f}"),
        "peak_bops": ("peak frame", "{:.4f}"),
    }
    columns = {name: column for name, column in columns.items() if any(name in row for row in rows)}
    for heading, _ in columns.values():
        table.add_column(heading, justify="right")
    for row in sorted(rows, key=lambda r: (r.get("seed", 0), -r["bops"])):
        numbers = (form.format(row[name]) if name in row else "" for name, (_, form) in columns.items())
        keyframes = short_settings({n: row.get(n) for n in ("interval", "static")}) or "learned keyframes"
        table.add_row(f"{row['trade_off']:.3g}", keyframes, *numbers)
    Console().print(table)


def spread_points(points: Sequence[Point]) -> list[Point]:
    """The envelope of a front, thinned evenly, from many BOPs to few, or all points of a small front."""
    ordered = sorted(points, key=lambda point: -point.bops)
    if len(ordered) <= ROWS_PER_METHOD:
        return ordered
    envelope = {tuple(row) for row in pareto_envelope([(point.accuracy, point.bops) for point in ordered])}
    best = [point for point in ordered if (point.accuracy, point.bops) in envelope]
    if len(best) <= ROWS_PER_METHOD:
        return best
    return [best[round(index)] for index in np.linspace(0, len(best) - 1, ROWS_PER_METHOD)]


def _numbers(point: Point, comparison: Comparison) -> list[str]:
    lost = 100 * (comparison.float_accuracy - point.accuracy)
    return [
        f"{point.bops:.3f}{_half(point.bops_ci95)}",
        f"{1 / point.bops:.1f}x" if point.bops > 0 else "-",
        f"{point.accuracy:.3f}{_half(point.accuracy_ci95)}",
        f"{lost:.1f}",
    ]


def short_settings(settings: Mapping[str, Any], levels: Sequence[int] | None = None) -> str:
    """The settings that tell the points of one method apart, in words; `comparison.json` holds all settings.

    Args:
        settings: the point's settings.
        levels: the bits of each level; without them a level is shown by its index.
    """
    words = {n: form.format(_short(settings[n])) for n, form in SHORT.items() if settings.get(n) is not None}
    if "weight_bits" in words:
        words["weight_bits"] += words.pop("activation_bits", "")
    if "level" in words and levels is not None:
        words["level"] = f"{levels[settings['level']]} bits"
    if settings.get("interval") in INTERVALS:
        words["interval"] = INTERVALS[settings["interval"]]
    return ", ".join(words.values())


def _half(interval: Range | None) -> str:
    return "" if interval is None else f" ±{(interval[1] - interval[0]) / 2:.3f}"


def _short(value: Any) -> str:
    if isinstance(value, list | tuple):
        if len(value) > MOST_LISTED:
            return f"{_short(min(value))} to {_short(max(value))} ({len(value)} values)"
        return " ".join(map(_short, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _describe(entry: BdEntry) -> str:
    if entry.value is None:
        return f"not reported: {entry.reason}"
    if entry.accuracy_range is None:
        bounds = f"95% from {entry.ci95[0]:.0f}% to {entry.ci95[1]:.0f}%" if entry.ci95 else str(entry.reason)
        return f"{entry.value:.0f}% ({bounds})"
    interval = f"95% from {entry.ci95[0]:+.1f}% to {entry.ci95[1]:+.1f}%" if entry.ci95 else str(entry.reason)
    low, high = entry.accuracy_range
    return f"{entry.value:+.1f}% BOPs at equal accuracy ({interval}; accuracy {low:.3f} to {high:.3f})"


def describe_gain(gain: Gain) -> str:
    """A difference of accuracy at equal budget, in words."""
    interval = f"95% from {gain.ci95[0]:+.1f} to {gain.ci95[1]:+.1f}" if gain.ci95 else str(gain.reason)
    return f"{gain.points:+.1f} points of accuracy at equal budget ({interval})"


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _to_json(values: Any) -> str:
    return json.dumps(_jsonable(values), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _jsonable(item) for name, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _jsonable(value.tolist())
    if isinstance(value, list | tuple | set | frozenset):
        return [_jsonable(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)
