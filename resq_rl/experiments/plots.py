"""Figures of results, without pyplot's global state, in colours and markers that the colour-blind can tell apart."""

import io
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from resq_rl.experiments.results import TITLES, Comparison, Point
from resq_rl.experiments.statistics import pareto_envelope
from resq_rl.files import write_atomic

__all__ = ["plot_curves", "plot_fronts", "save_figure"]

# Okabe and Ito's palette; a method keeps its colour and marker in every figure.
STYLES: Final[Mapping[str, tuple[str, str]]] = {
    "per_frame": ("#000000", "s"),
    "static_resq": ("#E69F00", "^"),
    "skip_gate": ("#F0E442", "v"),
    "random": ("#999999", "x"),
    "dynamic_resq": ("#0072B2", "o"),
    "searched_thresholds": ("#009E73", "D"),
    "ppo": ("#D55E00", "*"),
    "oracle": ("#CC79A7", "P"),
}
OTHER: Final = ("#56B4E9", "h")
DPI: Final = 150


def plot_fronts(comparison: Comparison, *, log_bops: bool = True) -> Figure:
    """Accuracy against BOPs: all points of every method with their 95% intervals, and a line along each envelope."""
    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for method, points in comparison.fronts.items():
        if points:
            _draw_front(axes, method, list(points))
    axes.axhline(comparison.float_accuracy, color="#555555", linestyle="--", linewidth=1, label="float network")
    if log_bops:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "25" else "")
    axes.set_xlabel(f"BOPs per frame, share of W8A8 ({comparison.bops_convention})")
    axes.set_ylabel(comparison.accuracy_metric)
    axes.set_title(f"{comparison.task} on {comparison.video}, {comparison.split} split", fontsize="medium")
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(fontsize="small", loc="lower right")
    return figure


def _draw_front(axes: Axes, method: str, points: list[Point]) -> None:
    color, marker = STYLES.get(method, OTHER)
    bops = np.array([point.bops for point in points])
    accuracy = np.array([point.accuracy for point in points])
    axes.errorbar(
        bops,
        accuracy,
        xerr=_distances(bops, [point.bops_ci95 for point in points]),
        yerr=_distances(accuracy, [point.accuracy_ci95 for point in points]),
        fmt=marker,
        color=color,
        markersize=9 if marker == "*" else 6,
        elinewidth=0.8,
        alpha=0.85,
        label=TITLES.get(method, method),
    )
    measured = [(point.accuracy, point.bops) for point in points if point.bops > 0 and np.isfinite(point.accuracy)]
    envelope = pareto_envelope(measured)
    axes.plot(envelope[:, 1], envelope[:, 0], color=color, linewidth=1.2)


def _distances(centers: np.ndarray, intervals: list[tuple[float, float] | None]) -> np.ndarray:
    """Lengths of the error bars below and above, (2, n); 0 without an interval."""
    bounds = [
        (center, center) if interval is None else interval for center, interval in zip(centers, intervals, strict=True)
    ]
    low, high = np.array(bounds).T
    distances: np.ndarray = np.stack((centers - low, high - centers))
    return distances.clip(min=0.0)


def plot_curves(curves: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """Reward, error and BOPs of each rollout against environment frames, one line per training run."""
    figure = Figure(figsize=(9.6, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name in zip(figure.subplots(1, 3), ("reward", "error", "bops"), strict=True):
        for (label, rows), color in zip(curves.items(), itertools.cycle(c for c, _ in STYLES.values()), strict=False):
            axes.plot([row["frames"] for row in rows], [row[name] for row in rows], color=color, label=label)
        axes.set_xlabel("environment frames")
        axes.set_title(name, fontsize="medium")
        axes.grid(True, alpha=0.3)
    figure.axes[0].legend(fontsize="small")
    return figure


def save_figure(figure: Figure, path: Path) -> list[Path]:
    """Write a figure atomically as `path`.png and `path`.svg; a PNG or SVG ending of `path` is dropped.

    Raises:
        ResultsError: a file cannot be written.
    """
    stem = path.with_suffix("") if path.suffix in (".png", ".svg") else path
    written = []
    for ending in ("png", "svg"):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=ending, dpi=DPI)
        written.append(write_atomic(stem.with_name(f"{stem.name}.{ending}"), buffer.getvalue()))
    return written
