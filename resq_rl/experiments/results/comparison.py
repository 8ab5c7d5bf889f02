"""What a run leaves behind: `comparison.json`, `summary.json` and the table on the terminal.

The names in `comparison.json` are promises to those who read it. BOPs are fractions of running every frame at W8A8,
accuracies lie in 0..1, Bjontegaard deltas are in percent. Numbers that are not finite are written as null.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, Group
from rich.table import Table

from resq_rl.errors import ResultsError
from resq_rl.experiments.results.statistics import BdResult, Interval, pareto_envelope
from resq_rl.files import write_atomic

__all__ = [
    "BdEntry",
    "Comparison",
    "Point",
    "comparison_table",
    "print_comparison",
    "print_policies",
    "short_settings",
    "spread_points",
    "write_summary",
]

Range = tuple[float, float]

# How the terminal shows a setting; those that are not here are in the file only.
SHORT = {
    "weight_bits": "W{}",
    "activation_bits": "A{}",
    "tau": "tau {}",
    "scene_change": "scene change {}",
    "taus": "{}",
    "level": "level {}",
    "trade_off": "lambda {}",
    "interval": "every {}",
    "keyframes": "keyframes {}",
    "reference": "{}",
    "seed": "seed {}",
}

ROWS_PER_METHOD = 6
TITLES = {
    "per_frame": "per-frame",
    "static_resq": "static ResQ",
    "skip_gate": "skip gate",
    "random": "random",
    "dynamic_resq": "Dynamic ResQ",
    "frame_magnitude": "frame magnitude",
    "searched_thresholds": "searched thresholds",
    "random_search": "random search",
    "ppo": "PPO",
    "oracle": "oracle",
}


@dataclass(frozen=True)
class Point:
    """One policy as measured.

    Attributes:
        accuracy: 0..1.
        accuracy_ci95: 95% interval of `accuracy`, or None.
        bops: mean BOPs per frame, keyframes and policy included, as a fraction of W8A8.
        bops_ci95: 95% interval of `bops`, or None.
        peak_bops: BOPs of the most expensive frame, as a fraction of W8A8.
        policy_bops: what of `bops` the policy itself spends.
        state_bytes: bytes of reference state that a device keeps.
        settings: what tells this point from the others of its method.
        keyframe_bops: what of `bops` keyframes spend; the rest is of residual frames. None in files of older versions.
    """

    accuracy: float
    accuracy_ci95: Range | None
    bops: float
    bops_ci95: Range | None
    peak_bops: float
    policy_bops: float
    state_bytes: int
    settings: Mapping[str, Any]
    keyframe_bops: float | None = None


@dataclass(frozen=True)
class BdEntry:
    """A Bjontegaard delta of BOPs between two methods, or the share of a gap that a method closes.

    Attributes:
        value: percent, negative for fewer BOPs; None where it is not reported.
        ci95: 95% interval of `value`, or None.
        accuracy_range: accuracies a delta is averaged over; None for a share.
        reason: why `value` or `ci95` is None.
        undefined_replicates: bootstrap replicates that had no value.
    """

    value: float | None
    ci95: Range | None
    accuracy_range: Range | None
    reason: str | None = None
    undefined_replicates: int = 0

    @classmethod
    def of(cls, result: BdResult, interval: Interval | None) -> "BdEntry":
        """Join a delta and its bootstrap interval."""
        if result.value is None or interval is None:
            return cls(result.value, None, result.accuracy_range, result.reason)
        return cls(
            result.value,
            interval.bounds,
            result.accuracy_range,
            interval.reason,
            undefined_replicates=interval.undefined,
        )


@dataclass(frozen=True)
class Comparison:
    """Everything that `comparison.json` holds.

    Attributes:
        task, video, split: what was measured, in words and names.
        clips, frames: how much of it.
        accuracy_metric: name of the accuracy.
        float_accuracy: of the network without quantization.
        bops_convention: cost of one multiplication.
        reference_bops_per_frame: BOPs of a W8A8 frame, the unit of all BOPs here.
        env_frames_used_for_training: environment frames of one training run, with those of what it began from.
        wall_seconds: duration of the whole run.
        fronts: points by method, such as "dynamic_resq" or "ppo".
        bd_bops: deltas by name, such as "ppo_vs_dynamic_resq".
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

    def to_json(self) -> str:
        """The file's text."""
        return _to_json(dataclasses.asdict(self))

    def write(self, path: Path) -> Path:
        """Write the file atomically.

        Raises:
            ResultsError: the file cannot be written.
        """
        return write_atomic(path, self.to_json())

    @classmethod
    def from_json(cls, text: str) -> "Comparison":
        """Read what `to_json` gave.

        Raises:
            ResultsError: the text is no JSON, or a name is missing or unknown.
        """
        try:
            values = json.loads(text)
            fronts = {
                method: tuple(Point(**_tuples(point)) for point in points)
                for method, points in values.pop("fronts").items()
            }
            deltas = {name: BdEntry(**_tuples(entry)) for name, entry in values.pop("bd_bops").items()}
            return cls(**values, fronts=fronts, bd_bops=deltas)
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


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Print the table of a comparison to the terminal."""
    (console or Console()).print(comparison_table(comparison))


def comparison_table(comparison: Comparison) -> Group:
    """The comparison as a table of at most six points per method, and a line per Bjontegaard delta."""
    table = Table(
        title=f"{comparison.task} on {comparison.video} ({comparison.split}: {comparison.clips} clips)",
        caption=(
            f"float {comparison.accuracy_metric} {comparison.float_accuracy:.3f}; BOPs as a share of W8A8 "
            f"({comparison.bops_convention}); ± is half the 95% interval"
        ),
    )
    table.add_column("method")
    table.add_column("settings", overflow="fold")
    for heading in ("BOPs", "fewer than W8A8", comparison.accuracy_metric, "points lost"):
        table.add_column(heading, justify="right", no_wrap=True)
    for method, points in comparison.fronts.items():
        shown = spread_points(points)
        for index, point in enumerate(shown):
            name = TITLES.get(method, method) if index == 0 else ""
            table.add_row(name, *_cells(point, comparison), end_section=index == len(shown) - 1)
    hidden = sum(len(points) - len(spread_points(points)) for points in comparison.fronts.values())
    lines = [f"{name.replace('_', ' ')}: {_describe(entry)}" for name, entry in comparison.bd_bops.items()]
    if hidden:
        lines.insert(0, f"{hidden} more points in comparison.json")
    return Group(table, *lines)


def print_policies(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print policies as measured: rows with their settings, `accuracy`, `bops` and, if known, `peak_bops`."""
    table = Table("lambda", "keyframe every", title=title)
    columns = {"seed": "{}", "bops": "{:.4f}", "accuracy": "{:.4f}", "peak_bops": "{:.4f}"}
    shown = {name: form for name, form in columns.items() if any(name in row for row in rows)}
    for name in shown:
        table.add_column({"bops": "BOPs, share of W8A8", "peak_bops": "peak frame"}.get(name, name), justify="right")
    for row in sorted(rows, key=lambda r: (r.get("seed", 0), -r["bops"])):
        lead = (f"{row['trade_off']:.3g}", str(row.get("interval", "learned")))
        table.add_row(*lead, *(form.format(row[name]) if name in row else "" for name, form in shown.items()))
    Console().print(table)


def spread_points(points: Sequence[Point]) -> list[Point]:
    """The envelope of a front, thinned evenly, from many BOPs to few; all points of a small front."""
    ordered = sorted(points, key=lambda point: -point.bops)
    if len(ordered) <= ROWS_PER_METHOD:
        return ordered
    envelope = {tuple(row) for row in pareto_envelope([(point.accuracy, point.bops) for point in ordered])}
    best = [point for point in ordered if (point.accuracy, point.bops) in envelope]
    if len(best) <= ROWS_PER_METHOD:
        return best
    return [best[round(index)] for index in np.linspace(0, len(best) - 1, ROWS_PER_METHOD)]


def _cells(point: Point, comparison: Comparison) -> list[str]:
    lost = 100 * (comparison.float_accuracy - point.accuracy)
    return [
        short_settings(point.settings),
        f"{point.bops:.3f}{_half(point.bops_ci95)}",
        f"{1 / point.bops:.1f}x" if point.bops > 0 else "-",
        f"{point.accuracy:.3f}{_half(point.accuracy_ci95)}",
        f"{lost:.1f}",
    ]


def short_settings(settings: Mapping[str, Any]) -> str:
    """What tells the points of one method apart; all of it is in `comparison.json`."""
    parts = [SHORT[name].format(_short(value)) for name, value in settings.items() if name in SHORT]
    return " ".join(parts)


def _half(interval: Range | None) -> str:
    return "" if interval is None else f" ±{(interval[1] - interval[0]) / 2:.3f}"


def _short(value: Any) -> str:
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
