"""The fronts, their cost split and the training curves, as rows of tables and as charts for the report's script."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from resq_rl.experiments.results.comparison import TITLES, Comparison, Point, short_settings, spread_points
from resq_rl.experiments.results.plots import OTHER, STYLES
from resq_rl.experiments.results.statistics import pareto_envelope

__all__ = ["cost_rows", "curve_charts", "delta_rows", "front_chart", "front_rows"]

# Points of accuracy under the float network within which the chart of fronts begins, unless all points are asked for.
NEAR: Final = 0.1
# Rows of a training curve, at most; more are thinned evenly.
CURVE_ROWS: Final = 400


def front_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """Every point of every method, for the table."""
    return [
        _row(comparison, method, point)
        for method, points in comparison.fronts.items()
        for point in sorted(points, key=lambda p: -p.bops)
    ]


def _row(comparison: Comparison, method: str, point: Point) -> dict[str, Any]:
    return {
        "method": method,
        "title": TITLES.get(method, method),
        "point": point,
        "settings": short_settings(point.settings),
        "lost": 100 * (comparison.float_accuracy - point.accuracy),
        "residual": _residual(point),
    }


def delta_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """Every delta between two methods."""
    rows = []
    for name, entry in comparison.bd_bops.items():
        own, _, other = name.partition("_vs_")
        title = f"{TITLES.get(own, own)} against {TITLES.get(other, other)}" if other else name.replace("_", " ")
        rows.append({"name": name, "title": title, "entry": entry})
    return rows


def cost_rows(comparison: Comparison, anchor: str) -> list[dict[str, Any]]:
    """What keyframes, residual frames and the policy spend, for points spread over the fronts that are compared."""
    rows = [
        _row(comparison, method, point)
        for method in dict.fromkeys((anchor, "ppo"))
        for point in spread_points(comparison.fronts.get(method, ()))
    ]
    top = max((row["point"].bops for row in rows), default=1.0)
    return [row | {"scale": 100 / top} for row in rows]


def _residual(point: Point) -> float | None:
    """BOPs of residual frames: what keyframes and policy leave."""
    if point.keyframe_bops is None:
        return None
    return max(0.0, point.bops - point.keyframe_bops - point.policy_bops)


def front_chart(comparison: Comparison) -> dict[str, Any]:
    """Accuracy against BOPs of every method, with intervals and envelopes."""
    series: list[dict[str, Any]] = []
    for method, points in comparison.fronts.items():
        known = [p for p in points if math.isfinite(p.accuracy) and p.bops > 0]
        if not known:
            continue
        color, marker = STYLES.get(method, OTHER)
        envelope = pareto_envelope([(p.accuracy, p.bops) for p in known])
        series.append(
            {
                "title": TITLES.get(method, method),
                "color": "var(--ink)" if color == "#000000" else color,
                "marker": marker,
                "points": [_chart_point(p, comparison) for p in sorted(known, key=lambda p: p.bops)],
                "line": [[bops, accuracy] for accuracy, bops in envelope.tolist()],
            }
        )
    values = [p["y"] for s in series for p in s["points"]] + [comparison.float_accuracy]
    low = comparison.float_accuracy - NEAR
    return {
        "label": f"{comparison.accuracy_metric} against BOPs per frame, by method",
        "x": {"label": f"BOPs per frame, share of W8A8 ({comparison.bops_convention})", "log": True},
        "y": {"label": comparison.accuracy_metric, "from": low if min(values) < low else None},
        "series": series,
        "rule": {"y": comparison.float_accuracy, "label": "float network"},
    }


def _chart_point(point: Point, comparison: Comparison) -> dict[str, Any]:
    lost = 100 * (comparison.float_accuracy - point.accuracy)
    text = [
        short_settings(point.settings),
        f"{point.bops:.3f} of W8A8{_between(point.bops_ci95)}",
        f"{comparison.accuracy_metric} {point.accuracy:.3f}{_between(point.accuracy_ci95)}, {lost:.1f} points lost",
        f"peak frame {point.peak_bops:.3f}",
    ]
    return {"x": point.bops, "y": point.accuracy, "xi": point.bops_ci95, "yi": point.accuracy_ci95, "text": text}


def _between(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f" ({interval[0]:.3f} to {interval[1]:.3f})"


def curve_charts(curves: Mapping[str, Sequence[Mapping[str, float]]]) -> list[dict[str, Any]]:
    """Reward, error and BOPs of each rollout against environment frames, a line per training run."""
    if not curves:
        return []
    charts = []
    for name, title in (("reward", "reward"), ("error", "error per pixel"), ("bops", "BOPs, share of W8A8")):
        colors = itertools.cycle(color for color, _ in STYLES.values() if color not in ("#000000", "#F0E442"))
        series = []
        for (label, rows), color in zip(curves.items(), colors, strict=False):
            step = max(1, math.ceil(len(rows) / CURVE_ROWS))
            line = [[row["frames"], row[name]] for row in rows[::step] if math.isfinite(row[name])]
            series.append({"title": label, "color": color, "marker": "", "points": [], "line": line})
        charts.append(
            {
                "label": f"{title} of each rollout against environment frames",
                "x": {"label": "environment frames"},
                "y": {"label": title},
                "series": series,
            }
        )
    return charts
