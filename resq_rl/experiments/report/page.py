"""Filling the template of the report, which escapes everything that comes from settings, files or names."""

import io
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import partial
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib import rc_context
from matplotlib.figure import Figure

from resq_rl.experiments.report.pair import MOST_FRAMES, film, layer_rows, region_maps
from resq_rl.experiments.report.verdict import choices_of, verdict_of
from resq_rl.experiments.results.comparison import (
    Comparison,
    delta_title,
    describe_gain,
    short_settings,
    spread_points,
)
from resq_rl.experiments.results.entries import Point
from resq_rl.experiments.results.methods import learned_method, method_of
from resq_rl.experiments.results.plots import plot_curves, plot_fronts, plot_spending
from resq_rl.experiments.runs.provenance import versions
from resq_rl.experiments.runs.record import RunRecord
from resq_rl.experiments.study.decisions import TracedPair
from resq_rl.experiments.study.study import Study
from resq_rl.files import write_atomic

__all__ = ["write_report"]

PACKAGE: Final = "resq_rl.experiments.report"
# Accuracy below the float network at which the upper chart of fronts ends; a second chart shows all points.
NEAR: Final = 0.1
CHART_INCHES: Final = (10.0, 5.0)


def write_report(
    run_dir: Path,
    study: Study,
    comparison: Comparison,
    *,
    curves: Mapping[str, Sequence[Mapping[str, float]]],
    pair: TracedPair | None,
) -> Path:
    """Write `report.html` to a run's folder and return its path.

    Args:
        run_dir: folder of the run, with its `config.yaml`.
        study: what the comparison was measured on.
        comparison: the comparison.
        curves: rows of each training run by name; empty where policies were given.
        pair: the policies that the player shows, or None to leave the player out.

    Raises:
        ResultsError: the file cannot be written.
    """
    verdict = verdict_of(comparison)
    config = run_dir / "config.yaml"
    words = partial(short_settings, levels=study.settings.quantization.levels)
    rows = front_rows(comparison)
    content = {
        "comparison": comparison,
        "created": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "verdict": verdict,
        "choices": choices_of(comparison, verdict.anchor),
        "gains": {name: (delta_title(name), describe_gain(gain)) for name, gain in comparison.gains.items()},
        "deltas": {name: (delta_title(name), entry) for name, entry in comparison.bd_bops.items()},
        "fronts": rows,
        "charts": _front_charts(
            comparison, {row["id"]: _tip(row, comparison, words(row["point"].settings)) for row in rows}
        ),
        "costs": cost_rows(comparison, verdict.anchor),
        "pair": None if pair is None else _pair(study, pair),
        "film": None if pair is None else film(study, pair),
        "curves": inline_svg(plot_curves(curves), "Figures of training") if curves else "",
        "command": RunRecord(run_dir).command_line("compare"),
        "config": config.read_text(encoding="utf-8") if config.is_file() else "",
        "versions": versions(study.settings),
        "settings": study.settings,
        "words": words,
        "method_of": method_of,
        **{ending: files(PACKAGE).joinpath(f"report.{ending}").read_text(encoding="utf-8") for ending in ("css", "js")},
    }
    return write_atomic(run_dir / "report.html", _rendered(content))


def _rendered(content: Mapping[str, Any]) -> str:
    environment = Environment(
        loader=PackageLoader(PACKAGE, ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["thousands"] = lambda value: f"{value:,}"
    return environment.get_template("report.html").render(content)


def front_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """Every point of every method, from many BOPs to few."""
    return [
        {"id": f"point-{number}-{index}", **_row(comparison, method, point)}
        for number, (method, points) in enumerate(comparison.fronts.items())
        for index, point in sorted(enumerate(points), key=lambda pair: -pair[1].bops)
    ]


def cost_rows(comparison: Comparison, anchor: str) -> list[dict[str, Any]]:
    """The BOPs of keyframes, residual frames and the policy, for points spread over the two fronts of the verdict."""
    rows = [
        _row(comparison, method, point)
        for method in dict.fromkeys((anchor, learned_method(comparison.fronts)))
        for point in spread_points(comparison.fronts.get(method, ()))
    ]
    top = max((row["point"].bops for row in rows), default=1.0)
    return [row | {"scale": 100 / top} for row in rows]


def _row(comparison: Comparison, method: str, point: Point) -> dict[str, Any]:
    residual = None if point.keyframe_bops is None else max(0.0, point.bops - point.keyframe_bops - point.policy_bops)
    lost = 100 * (comparison.float_accuracy - point.accuracy)
    return {"method": method, "point": point, "lost": lost, "residual": residual}


def _tip(row: Mapping[str, Any], comparison: Comparison, settings: str) -> str:
    """The hover text of a point."""
    point = row["point"]
    bops, accuracy = (
        "" if interval is None else f" ({interval[0]:.3f} to {interval[1]:.3f})"
        for interval in (point.bops_ci95, point.accuracy_ci95)
    )
    return (
        f"{method_of(row['method']).title}: {settings}\n{point.bops:.3f} of W8A8{bops}\n"
        f"{comparison.accuracy_metric} {point.accuracy:.3f}{accuracy}, {row['lost']:.1f} points lost\n"
        f"peak frame {point.peak_bops:.3f}"
    )


def _front_charts(comparison: Comparison, tips: Mapping[str, str]) -> list[str]:
    """The chart of the points near the float network, and one of all points if there are others."""
    links = {
        method: [f"#point-{number}-{index}" for index in range(len(points))]
        for number, (method, points) in enumerate(comparison.fronts.items())
    }
    every = [point for points in comparison.fronts.values() for point in points]
    far = sum(comparison.float_accuracy - point.accuracy > NEAR for point in every)
    charts = []
    for within, label in ((NEAR, "near the float network"), (float("inf"), "all points")):
        figure = plot_fronts(comparison, within=within, links=links)
        figure.set_size_inches(CHART_INCHES)
        charts.append(inline_svg(figure, f"{comparison.accuracy_metric} against BOPs per frame, {label}", tips))
    return charts if 0 < far < len(every) else charts[1:]


def inline_svg(figure: Figure, label: str, tips: Mapping[str, str] | None = None) -> str:
    """A figure as an SVG element of the page, in the page's colours.

    Args:
        figure: the figure.
        label: description for screen readers; no two figures of a page have the same.
        tips: hover text of each element of the page that a marker links to, by its id.
    """
    buffer = io.BytesIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue().decode()
    text = re.sub(r' (xmlns(:\w+)?|width|height)="[^"]*"', "", text[text.index("<svg") :], count=4)
    text = re.sub(r' id="[\w.]+_\d+"', "", text)  # names of parts, the same in every figure
    text = text.replace(' xlink:href="#', ' href="#')
    for colour, own in (("#000000", "var(--ink)"), ("#ffffff", "var(--paper)")):
        text = re.sub(rf"\b(fill|stroke): {colour}", rf"\1: {own}", text)
    for name, tip in (tips or {}).items():
        link = f'<a href="#{name}"><title>{escape(tip)}</title>'
        text = text.replace(f'<a href="#{name}" target="_blank">', link)
    return text.replace("<svg", f'<svg role="{"group" if tips else "img"}" aria-label="{escape(label)}"', 1)


def _pair(study: Study, pair: TracedPair) -> dict[str, Any]:
    """The two policies, their charts of BOPs by frame, and their BOPs by layer and region."""
    groups, layers = layer_rows(study.model, pair)
    return {
        "policies": list(zip(map(method_of, pair.methods), (pair.heuristic[1], pair.learned[1]), strict=True)),
        "charts": [_spending_chart(study, pair, number) for number in range(len(pair.traces))],
        "groups": groups,
        "layers": layers,
        "regions": region_maps(pair),
        "product": study.settings.quantization.bops_convention == "product",
    }


def _spending_chart(study: Study, pair: TracedPair, number: int) -> dict[str, Any]:
    """The chart of BOPs by frame of a clip, and how far its cursor moves for a frame, in the chart's own unit."""
    bops = [trace.bops[:MOST_FRAMES] for trace in pair.traces[number]]
    figure = plot_spending(dict(zip(pair.methods, bops, strict=True)), study.settings.environment.budget)
    axes = figure.axes[0]
    axes.lines[-1].set_gid(f"cursor-{number}")
    svg = inline_svg(figure, f"BOPs of each frame of clip {number}, and their running mean")
    left, right = axes.transData.transform([(0, 1), (1, 1)])[:, 0]
    return {"svg": svg, "step": (right - left) * 72 / figure.dpi}  # an SVG has 72 units to the inch
