"""Figures of results, drawn without pyplot's global state."""

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch
from jaxtyping import Float64, UInt8
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor

from resq_rl.envs import Trace
from resq_rl.experiments.results.comparison import Comparison
from resq_rl.experiments.results.entries import Point
from resq_rl.experiments.results.methods import Method, method_of
from resq_rl.experiments.results.statistics import pareto_envelope
from resq_rl.files import write_atomic
from resq_rl.perception import Task
from resq_rl.quantization import Budget

__all__ = ["plot_curves", "plot_decisions", "plot_fronts", "plot_spending", "save_figure"]

DPI: Final = 150
# Frames of a clip in a figure.
SHOWN: Final = 4
# Colours of training runs, layer groups and the like, which repeat where there are more.
COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#6E7781")


def plot_fronts(
    comparison: Comparison, *, within: float = math.inf, links: Mapping[str, Sequence[str]] | None = None
) -> Figure:
    """Accuracy against BOPs: the points of every method with their 95% intervals, and a line along each envelope.

    Args:
        comparison: what is drawn.
        within: points that lose more accuracy than this against the float network are left out.
        links: an address for each point of each method, which an SVG links its marker to.
    """
    figure = _figure(7.2, 4.8)
    axes = figure.add_subplot()
    for method, points in comparison.fronts.items():
        addresses = [""] * len(points) if links is None else links[method]
        known = [
            (point, address)
            for point, address in zip(points, addresses, strict=True)
            if math.isfinite(point.accuracy)
            and point.bops > 0
            and not comparison.float_accuracy - point.accuracy > within
        ]
        if known:
            _draw_front(axes, method_of(method), [point for point, _ in known], [address for _, address in known])
    axes.axhline(comparison.float_accuracy, color="#777777", linestyle="--", linewidth=1, label="float network")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "25" else "")
    axes.set_xlabel(f"BOPs per frame, share of W8A8 ({comparison.bops_convention})")
    axes.set_ylabel(_plain(comparison.accuracy_metric))
    axes.set_title(_plain(f"{comparison.task} on {comparison.video}, {comparison.split} split"), fontsize="medium")
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(fontsize="small", loc="best")
    return figure


def _figure(width: float, height: float) -> Figure:
    """An empty figure of a size in inches, which can be drawn without a display."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _plain(text: str) -> str:
    """Text in which Matplotlib finds no formula: names of videos, clips and metrics may hold dollar signs."""
    return text.replace("$", r"\$")


def _draw_front(axes: Axes, method: Method, points: Sequence[Point], addresses: Sequence[str]) -> None:
    bops = np.array([point.bops for point in points])
    accuracy = np.array([point.accuracy for point in points])
    axes.errorbar(
        bops,
        accuracy,
        xerr=_distances(bops, [point.bops_ci95 for point in points]),
        yerr=_distances(accuracy, [point.accuracy_ci95 for point in points]),
        fmt="none",
        ecolor=method.colour,
        elinewidth=0.8,
        alpha=0.5,
    )
    marks = axes.scatter(
        bops,
        accuracy,
        s=90 if method.marker == "*" else 40,
        marker=method.marker,
        color=method.colour,
        edgecolors="#777777",
        linewidths=0.4,
        zorder=3,
        label=_plain(method.title),
    )
    if any(addresses):
        marks.set_urls(list(addresses))
    envelope = pareto_envelope(np.stack((accuracy, bops), 1))
    axes.plot(envelope[:, 1], envelope[:, 0], color=method.colour, linewidth=1.2)


def _distances(centers: np.ndarray, intervals: list[tuple[float, float] | None]) -> np.ndarray:
    """Lengths of the error bars below and above, (2, n); 0 without an interval."""
    bounds = [
        (center, center) if interval is None else interval for center, interval in zip(centers, intervals, strict=True)
    ]
    low, high = np.array(bounds).T
    distances: np.ndarray = np.stack((centers - low, high - centers))
    return distances.clip(min=0.0)


def plot_curves(curves: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """What training minimises or maximises, and BOPs, against environment frames, one line per training run.

    Rollouts of PPO have a reward and an error, passes of gradients a divergence from the float network.
    """
    figure = _figure(9.6, 3.2)
    known: set[str] = set().union(*(row for rows in curves.values() for row in rows[:1]))
    titles = {"reward": "reward", "error": "error", "divergence": "divergence", "bops": "BOPs, share of W8A8"}
    names = {name: title for name, title in titles.items() if name in known}
    for axes, (name, title) in zip(figure.subplots(1, len(names)), names.items(), strict=True):
        for (label, rows), colour in zip(curves.items(), itertools.cycle(COLOURS), strict=False):
            axes.plot([row["frames"] for row in rows], [row[name] for row in rows], color=colour, label=_plain(label))
        axes.set_xlabel("environment frames")
        axes.set_title(title, fontsize="medium")
        axes.grid(True, alpha=0.3)
    figure.axes[0].legend(fontsize="small")
    return figure


def plot_spending(bops: Mapping[str, Float64[Tensor, " t"]], budget: Budget | None = None) -> Figure:
    """BOPs of each frame of a clip (dashed) and their running mean, by method; the last line is a cursor at frame 0.

    Under a budget, its limits are shown; with a mean, a strip below shows how full the bucket is before each frame.
    """
    if budget is None or budget.mean is None:
        figure = _figure(9.6, 2.8)
        axes = figure.add_subplot()
    else:
        figure = _figure(9.6, 3.9)
        axes, strip = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        for key, own in bops.items():
            strip.plot(budget.filled(own).numpy(), color=method_of(key).colour, linewidth=1.4)
        strip.set_ylim(0, 1.05)
        strip.set_ylabel("bucket")
    for key, own in bops.items():
        method, mean = method_of(key), own.cumsum(0) / torch.arange(1, len(own) + 1)
        axes.plot(own.numpy(), color=method.colour, linewidth=0.9, linestyle="--", label=f"{method.title}: each frame")
        axes.plot(mean.numpy(), color=method.colour, linewidth=1.8, label=f"{method.title}: mean so far")
    limits = {} if budget is None else {"peak": budget.peak, "mean": budget.mean}
    for name, limit in limits.items():
        if limit is not None:
            axes.axhline(limit, color="#555555", linewidth=0.8, linestyle=":", label=f"{name} of the budget")
    axes.axvline(0, color="#000000", linewidth=1.2)
    _scale_bops(axes)
    figure.axes[-1].set_xlabel("frame")
    axes.legend(fontsize="x-small", ncols=2)
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
    labels: Sequence[float] | None = None,
) -> Figure:
    """A few frames of a clip under several policies: predictions and BOPs by region; choices and BOPs over the clip.

    The frames shown are the middles of equal parts of the clip, where periodic keyframes seldom fall. Regions share one
    scale of colours, which ends at the most expensive region of the residual frames shown.

    Args:
        task: draws the predictions.
        frames: the frames of the clip.
        traces: heading and trace of each method on this clip; the choices of the last are counted.
        choices: thresholds or levels among which the last policy chose.
        meaning: name of the axis of choices.
        groups: names of the layer groups.
        title: title of the figure.
        labels: names of the choices on their axis; the choices themselves where it is None.
    """
    times = np.unique((1 + (len(frames) - 1) * (np.arange(SHOWN) + 0.5) / SHOWN).astype(int).clip(max=len(frames) - 1))
    rows, (height, width) = 1 + 2 * len(traces), frames.shape[2:]
    heights = rows * (2.35 * height / width + 0.25), 2.8  # inches, without room for a title
    figure = _figure(11.0, sum(heights) + 0.3)
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=heights)[:, 0]
    axes = upper.subplots(rows, len(times), squeeze=False, subplot_kw={"xticks": [], "yticks": []})
    _draw_frames(axes[0], frames, times)
    top = _highest_share([trace for _, trace in traces.values()], times)
    for own, (name, trace) in zip(axes[1:].reshape(-1, 2, len(times)), traces.values(), strict=True):
        # A title as wide as this heading would push the columns apart; the empty title reserves its height.
        own[0, 0].set_title(" ", fontsize="small")
        own[0, 0].text(0.0, 1.05, _plain(name), transform=own[0, 0].transAxes, fontsize="small", in_layout=False)
        image = _draw_trace(own, task, frames, times, trace, top)
    label = "BOPs by region, share of W8A8"
    upper.colorbar(image, ax=axes.ravel().tolist(), label=label, extend="max", fraction=0.03, aspect=40)
    left, right = lower.subplots(1, 2)
    method, (_, trace) = list(traces.items())[-1]
    _draw_choices(left, trace.choice_shares(choices).numpy(), choices if labels is None else labels, groups)
    left.set_xlabel(meaning)
    left.set_title(_plain(f"choices of {method_of(method).title} by layer group"), fontsize="medium")
    _draw_bops(right, traces, times)
    figure.suptitle(_plain(title), fontsize="medium")
    return figure


def _draw_frames(axes: np.ndarray, frames: UInt8[Tensor, "t 3 h w"], times: np.ndarray) -> None:
    for ax, time in zip(axes, times, strict=True):
        ax.imshow(frames[time].permute(1, 2, 0).numpy())
        ax.set_title(f"frame {time}", fontsize="small")


def _highest_share(traces: Sequence[Trace], times: np.ndarray) -> float:
    """The most BOPs that a region takes in the residual frames shown, as a share of W8A8."""
    shown = [trace.share[t] for trace in traces for t in times if not trace.keyframe[t]]
    return max((float(share.max()) for share in shown), default=1.0) or 1.0


def _draw_trace(
    axes: np.ndarray, task: Task, frames: UInt8[Tensor, "t 3 h w"], times: np.ndarray, trace: Trace, top: float
) -> AxesImage:
    """Draw a row of predictions over the frames, and a row of BOPs by region on a scale that ends at `top`."""
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
    axes: Axes, shares: Float64[np.ndarray, "groups choices"], labels: Sequence[float], groups: Sequence[str]
) -> None:
    """Stack the share of every layer group in each choice."""
    base = np.zeros(len(labels))
    for group, share, colour in zip(groups, shares, itertools.cycle(COLOURS), strict=False):
        axes.bar(range(len(labels)), share, bottom=base, color=colour, label=_plain(group))
        base += share
    axes.set_xticks(range(len(labels)), [f"{label:g}" for label in labels])
    axes.set_ylabel("share of choices")
    axes.legend(fontsize="x-small")


def _draw_bops(axes: Axes, traces: Mapping[str, tuple[str, Trace]], times: np.ndarray) -> None:
    for key, (_, trace) in traces.items():
        method = method_of(key)
        label = _plain(f"{method.title}, mean {float(trace.bops.mean()):.3f}")
        axes.plot(
            trace.bops.numpy(), color=method.colour, marker=method.marker, markersize=3, linewidth=1.0, label=label
        )
    for time in times:
        axes.axvline(float(time), color="#555555", linestyle=":", linewidth=0.8)
    _scale_bops(axes)
    axes.set_xlabel("frame (dotted: shown above)")
    axes.set_title("BOPs per frame, policy included", fontsize="medium")
    axes.legend(fontsize="x-small")


def _scale_bops(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_ylabel("BOPs, share of W8A8")


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
