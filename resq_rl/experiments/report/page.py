"""Filling the report's template; everything that comes from settings, files or names is escaped by it."""

import base64
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from resq_rl.experiments.report.film import film
from resq_rl.experiments.report.places import layer_rows, region_maps
from resq_rl.experiments.report.tables import cost_rows, curve_charts, delta_rows, front_chart, front_rows
from resq_rl.experiments.report.verdict import choices_of, verdict_of
from resq_rl.experiments.results.comparison import TITLES, Comparison, short_settings
from resq_rl.experiments.results.plots import STYLES
from resq_rl.experiments.runs.provenance import versions
from resq_rl.experiments.runs.record import RunRecord
from resq_rl.experiments.study.decisions import Pair
from resq_rl.experiments.study.study import Study
from resq_rl.files import write_atomic

__all__ = ["render", "write_report"]

PACKAGE = "resq_rl.experiments.report"


def write_report(
    run_dir: Path,
    study: Study,
    comparison: Comparison,
    *,
    curves: Mapping[str, Sequence[Mapping[str, float]]],
    pair: Pair | None,
) -> Path:
    """Write `report.html` to a run's folder and return its path.

    Args:
        curves: rows of each training run by name; none where policies were given.
        pair: the policies that the player shows, or None to leave it out.

    Raises:
        ResultsError: the file cannot be written.
    """
    return write_atomic(run_dir / "report.html", render(run_dir, study, comparison, curves=curves, pair=pair))


def render(
    run_dir: Path,
    study: Study,
    comparison: Comparison,
    *,
    curves: Mapping[str, Sequence[Mapping[str, float]]],
    pair: Pair | None,
) -> str:
    """The page's text."""
    verdict = verdict_of(comparison)
    config = run_dir / "config.yaml"
    content = {
        "comparison": comparison,
        "created": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "verdict": verdict,
        "anchor": TITLES.get(verdict.anchor, verdict.anchor),
        "choices": choices_of(comparison, verdict.anchor),
        "deltas": delta_rows(comparison),
        "fronts": front_rows(comparison),
        "costs": cost_rows(comparison, verdict.anchor),
        "pair": None if pair is None else _pair(study, pair),
        "curves": list(curve_charts(curves)),
        "command": RunRecord(run_dir).command_line("compare"),
        "config": config.read_text(encoding="utf-8") if config.is_file() else "",
        "versions": versions(study.settings),
        "settings": study.settings,
        "colors": {name: "var(--ink)" if color == "#000000" else color for name, (color, _) in STYLES.items()},
    }
    data = {
        "fronts": front_chart(comparison),
        "curves": curve_charts(curves),
        "film": None if pair is None else film(study, pair),
    }
    environment = Environment(
        loader=PackageLoader(PACKAGE, ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["thousands"] = lambda value: f"{value:,}"
    page = environment.get_template("report.html")
    return page.render(content, data=data, css=_asset("report.css"), js=_asset("report.js"), icon=_icon())


def _pair(study: Study, pair: Pair) -> dict[str, Any]:
    """Who the two policies are, and where their bits go."""
    policies = [
        {
            "name": name,
            "method": method,
            "settings": short_settings(measured.settings),
            "bops": measured.bops,
            "accuracy": measured.accuracy,
        }
        for name, method, (_, measured) in (
            (TITLES.get(pair.method, pair.method), pair.method, pair.heuristic),
            (TITLES["ppo"], "ppo", pair.learned),
        )
    ]
    groups, layers = layer_rows(study.model, pair)
    return {
        "policies": policies,
        "clips": len(pair.traces),
        "groups": groups,
        "layers": layers,
        "regions": region_maps(pair),
        "product": study.settings.quantization.bops_convention == "product",
    }


def _asset(name: str) -> str:
    """A style sheet or script of this package, which goes into the page as it is."""
    return files(PACKAGE).joinpath(name).read_text(encoding="utf-8")


def _icon() -> str:
    """A small picture for the browser's tab, without which it would ask a server for one."""
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8"><path fill="#0072b2" d="M0 4h2v4H0zM3 2h2v6H3z"/>'
        '<path fill="#d55e00" d="M6 6h2v2H6z"/></svg>'
    )
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode('ascii')}"
