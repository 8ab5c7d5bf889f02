"""Figures of results, without pyplot's global state, in colours and markers that the colour-blind can tell apart."""

import io
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from jaxtyping import UInt8
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor

from resq_rl.envs import Trace
from resq_rl.experiments.results.comparison import TITLES, Comparison, Point
from resq_rl.experiments.results.statistics import pareto_envelope
from resq_rl.files import write_atomic
from resq_rl.perception import Task

__all__ = ["plot_curves", "plot_decisions", "plot_fronts", "save_figure"]

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
# Frames of a clip in a figure.
SHOWN: Final = 4


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


def plot_decisions(
    task: Task,
    frames: UInt8[Tensor, "t 3 h w"],
    traces: Mapping[str, tuple[str, Trace]],
    *,
    choices: Sequence[float],
    meaning: str,
    groups: Sequence[str],
    title: str,
) -> Figure:
    """What policies predict and spend by region on a few frames of a clip, and spend by frame and chose on all of it.

    The frames shown are the middles of equal parts of the clip, where periodic keyframes seldom fall. Regions share one
    scale of colours, which ends at the dearest region of the residual frames shown: keyframes go beyond it.

    Args:
        task: draws predictions over frames.
        frames: the clip's.
        traces: title and trace by method, of the same clip; the choices of the last are counted.
        choices, meaning: thresholds or levels among which the last chose, and what to call them.
        groups: names of the layer groups.
        title: what the clip is.
    """
    times = np.unique((1 + (len(frames) - 1) * (np.arange(SHOWN) + 0.5) / SHOWN).astype(int).clip(max=len(frames) - 1))
    rows, (height, width) = 1 + 2 * len(traces), frames.shape[2:]
    heights = rows * (2.35 * height / width + 0.25), 2.8  # inches, without room for a title
    figure = Figure(figsize=(11.0, sum(heights) + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=heights)[:, 0]
    axes = upper.subplots(rows, len(times), squeeze=False)
    for ax in axes.flat:
        ax.set_xticks([])
        ax.set_yticks([])
    for ax, time in zip(axes[0], times, strict=True):
        ax.imshow(frames[time].permute(1, 2, 0).numpy())
        ax.set_title(f"frame {time}", fontsize="small")
    shown = [trace.share[t] for _, trace in traces.values() for t in times if not trace.keyframe[t]]
    top = max((float(share.max()) for share in shown), default=1.0) or 1.0
    for own, (name, trace) in zip(axes[1:].reshape(-1, 2, len(times)), traces.values(), strict=True):
        # As a title, the heading's width would part the columns; an empty one keeps room for its height.
        own[0, 0].set_title(" ", fontsize="small")
        own[0, 0].text(0.0, 1.05, name, transform=own[0, 0].transAxes, fontsize="small", in_layout=False)
        image = _draw_trace(own, task, frames, times, trace, top)
    label = "BOPs by region, share of W8A8"
    upper.colorbar(image, ax=axes.ravel().tolist(), label=label, extend="max", fraction=0.03, aspect=40)
    left, right = lower.subplots(1, 2)
    _draw_choices(left, traces, choices, meaning, groups)
    _draw_bops(right, traces, times)
    figure.suptitle(title, fontsize="medium")
    return figure


def _draw_trace(
    axes: np.ndarray, task: Task, frames: UInt8[Tensor, "t 3 h w"], times: np.ndarray, trace: Trace, top: float
) -> AxesImage:
    """Two rows of axes: predictions over the frames, and BOPs by region up to `top`."""
    height, width = frames.shape[2:]
    axes[0, 0].set_ylabel("prediction", fontsize="small")
    axes[1, 0].set_ylabel("BOPs", fontsize="small")
    for above, below, t in zip(*axes, times, strict=True):
        above.imshow(task.overlay(frames[t].float() / 255, trace.prediction[t]).permute(1, 2, 0).clamp(0, 1).numpy())
        image: AxesImage = below.imshow(
            trace.share[t].numpy(), cmap="cividis", vmin=0.0, vmax=top, extent=(0, width, height, 0)
        )
        kind = ", keyframe" if trace.keyframe[t] else ""
        below.set_xlabel(f"{float(trace.bops[t]):.3f} of W8A8{kind}", fontsize="small")
    return image


def _draw_choices(
    axes: Axes,
    traces: Mapping[str, tuple[str, Trace]],
    choices: Sequence[float],
    meaning: str,
    groups: Sequence[str],
) -> None:
    method, (_, trace) = list(traces.items())[-1]
    shares = trace.choice_shares(choices).numpy()
    colors = itertools.cycle(color for color, _ in STYLES.values())
    base = np.zeros(len(choices))
    for group, share, color in zip(groups, shares, colors, strict=False):
        axes.bar(range(len(choices)), share, bottom=base, color=color, label=group)
        base += share
    axes.set_xticks(range(len(choices)), [f"{choice:g}" for choice in choices])
    axes.set_xlabel(meaning)
    axes.set_ylabel("share of choices")
    axes.set_title(f"choices of {TITLES.get(method, method)} by layer group", fontsize="medium")
    axes.legend(fontsize="x-small")


def _draw_bops(axes: Axes, traces: Mapping[str, tuple[str, Trace]], times: np.ndarray) -> None:
    for method, (_, trace) in traces.items():
        color, marker = STYLES.get(method, OTHER)
        label = f"{TITLES.get(method, method)}, mean {float(trace.bops.mean()):.3f}"
        axes.plot(trace.bops.numpy(), color=color, marker=marker, markersize=3, linewidth=1.0, label=label)
    for time in times:
        axes.axvline(float(time), color="#555555", linestyle=":", linewidth=0.8)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("frame (dotted: shown above)")
    axes.set_ylabel("BOPs, share of W8A8")
    axes.set_title("BOPs per frame, policy included", fontsize="medium")
    axes.legend(fontsize="x-small")


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
