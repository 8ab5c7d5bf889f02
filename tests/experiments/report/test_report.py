"""The report in numbers, and in a real browser."""

import base64
import io
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from playwright.sync_api import Browser, Dialog, Page, Request, expect

from resq_rl.envs import Policy
from resq_rl.experiments.config.composition import load_settings
from resq_rl.experiments.report import verdict_of, write_report
from resq_rl.experiments.report.page import cost_rows, inline_svg
from resq_rl.experiments.report.pair import COLUMNS, layer_rows, region_maps, sheet
from resq_rl.experiments.report.verdict import choices_of
from resq_rl.experiments.results.comparison import Comparison
from resq_rl.experiments.results.entries import AtBudget, BdEntry, Gain
from resq_rl.experiments.results.fronts import points_of
from resq_rl.experiments.results.methods import method_of
from resq_rl.experiments.runs.record import RunRecord
from resq_rl.experiments.study.decisions import TracedPair, trace_pair
from resq_rl.experiments.study.study import Study, build_study
from resq_rl.policies import DynamicResQ, PerFrame, StaticResQ
from resq_rl.video import Clip

PAINTED = True
TINY = [
    "threads=1", "video.size=[32,48]", "video.frames=6", "video.train=2", "video.test=3", "environment.grid=[2,3]",
    "quantization.calibration_clips=2",
]  # fmt: skip
HOSTILE = "</script><script>alert(1)</script><b title='\"&"
CURVES = {
    "seed 0": [{"frames": 60.0 * i, "reward": i / 9, "error": 1 / (1 + i), "bops": 0.5 / (1 + i)} for i in range(9)]
}


@pytest.fixture(scope="module")
def study() -> Study:
    return build_study(load_settings("compare", TINY), ["train", "test"])


def pair_of(study: Study, heuristic: Policy, learned: Policy) -> TracedPair:
    measured = [(policy, study.measure(policy, "test")) for policy in (heuristic, learned)]
    return trace_pair(study, ("dynamic_resq", "ppo"), measured[0], measured[1])


@pytest.fixture(scope="module")
def pair(study: Study) -> TracedPair:
    return pair_of(study, DynamicResQ("previous", 4, tau=0.3), DynamicResQ("previous", 0, tau=1.0))


@pytest.fixture(scope="module")
def comparison(study: Study, pair: TracedPair) -> Comparison:
    policies: dict[str, list[Policy]] = {
        "per_frame": [PerFrame("previous")],
        "static_resq": [StaticResQ("previous", 4, level=n) for n in (0, 2)],
        "dynamic_resq": [DynamicResQ("previous", 4, tau=tau) for tau in (0.3, 1.0)],
        "ppo": [DynamicResQ("previous", 0, tau=tau) for tau in (0.5, 1.0)],
    }
    fronts = {
        method: points_of([replace(study.measure(p, "test"), settings={**p.settings, "seed": 0}) for p in own], seed=0)
        for method, own in policies.items()
    }
    problem = study.problems["test"]
    fronts["random"] = [replace(fronts["per_frame"][0], accuracy=problem.float_accuracy - 0.25, settings={"seed": 0})]
    deltas = {
        "ppo_vs_dynamic_resq": BdEntry(-31.24, (-40.06, -20.55), (0.66, 0.715)),
        "ppo_vs_static_resq": BdEntry(None, None, None, HOSTILE),
    }
    return Comparison(
        "segmentation", HOSTILE, "test", 3, 18, "mean IoU", problem.float_accuracy, "product",
        float(study.model.reference_bops()), 600, 61.0, fronts, deltas,
    )  # fmt: skip


@pytest.fixture(scope="module")
def report(study: Study, comparison: Comparison, pair: TracedPair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report whose video, clips and settings have names that try to break out of it."""
    folder = tmp_path_factory.mktemp("run")
    RunRecord(folder).begin([], ["video.frames=6", "heuristic.taus=[0.3, 1.0]"], study.settings, resume=False)
    (folder / "config.yaml").write_text(f"video: {HOSTILE}\n")
    problem = study.problems["test"]
    clips = [Clip(c.frames, c.labels, c.fps, f"{HOSTILE}{i}", c.origin) for i, c in enumerate(problem.clips)]
    renamed = replace(study, problems={"test": replace(problem, clips=tuple(clips))})
    comparison.write(folder / "comparison.json")
    return write_report(folder, renamed, comparison, curves=CURVES, pair=pair)


# Numbers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "interval", "reason", "tone", "expected"),
    [
        (
            -39.42,
            (-43.5, -36.2),
            None,
            "fewer",
            "39.4% fewer bit-operations than Dynamic ResQ (95% interval 36.2% to 43.5%)",
        ),
        (12.0, (3.0, 20.0), None, "more", "12.0% more bit-operations than Dynamic ResQ (95% interval 3.0% to 20.0%)"),
        (-3.0, (-8.0, 2.0), None, "unclear", "No clear difference: at equal accuracy PPO needs 3.0% fewer"),
        (
            -3.0,
            None,
            "too few clips",
            "unclear",
            "PPO needs 3.0% fewer bit-operations than Dynamic ResQ at equal accuracy, but",
        ),
        (None, None, "no overlap", "none", "cannot be compared at equal accuracy: no overlap."),
    ],
)
def test_the_verdict_says_what_the_interval_allows(
    comparison: Comparison,
    value: float | None,
    interval: tuple[float, float] | None,
    reason: str | None,
    tone: str,
    expected: str,
) -> None:
    entry = BdEntry(value, interval, None if value is None else (0.6, 0.7), reason)
    verdict = verdict_of(replace(comparison, bd_bops={"ppo_vs_dynamic_resq": entry}))
    assert expected in verdict.sentence
    assert verdict.tone == tone


def test_without_the_first_anchor_the_next_one_with_a_number_speaks(comparison: Comparison) -> None:
    deltas = {
        "oracle_vs_searched_thresholds": BdEntry(-50.0, None, (0.6, 0.7)),
        "ppo_vs_dynamic_resq": BdEntry(None, None, None, "no overlap"),
        "ppo_vs_static_resq": BdEntry(-60.0, (-70.0, -50.0), (0.6, 0.7)),
    }
    assert "60.0% fewer bit-operations than static ResQ" in verdict_of(replace(comparison, bd_bops=deltas)).sentence
    assert verdict_of(replace(comparison, bd_bops={})).anchor == ""


def test_policies_learned_by_gradients_are_named_and_their_beginnings_counted(comparison: Comparison) -> None:
    points = comparison.fronts["ppo"]
    static = replace(points[0], settings={**points[0].settings, "static": True})
    fronts = {**comparison.fronts, "ppo": [], "gradient_policy": [static, *points]}
    entry = BdEntry(-60.0, (-70.0, -50.0), (0.6, 0.7))
    deltas = {"gradient_policy_vs_static_resq": entry, "oracle_vs_searched_thresholds": entry}
    verdict = verdict_of(replace(comparison, fronts=fronts, bd_bops=deltas))
    assert verdict.sentence.startswith("At equal accuracy, the gradient policy needs 60.0% fewer bit-operations")
    assert (verdict.method, verdict.anchor) == ("gradient_policy", "static_resq")
    assert f"At 1 of {1 + len(points)} points the policy is its beginning" in verdict.scope
    assert "its beginning" not in verdict_of(replace(comparison, bd_bops={"ppo_vs_static_resq": entry})).scope


def test_at_equal_budget_the_best_baseline_is_what_the_verdict_names(comparison: Comparison) -> None:
    kept = {
        "dynamic_resq": AtBudget(0.80, (0.78, 0.82), 0.11, 0.91, 0.24),
        "rate_control": AtBudget(0.83, (0.81, 0.85), 0.12, 0.99, 0.25),
        "ppo": AtBudget(0.85, (0.83, 0.87), 0.12, 0.98, 0.25),
    }
    gains = {"ppo_vs_dynamic_resq": Gain(5.0, (4.0, 6.0)), "ppo_vs_rate_control": Gain(2.0, (0.5, 3.5))}
    budget = {"peak": 0.25, "mean": 0.12, "bucket": 8.0}
    under = replace(comparison, budget=budget, at_budget=kept, gains=gains)
    verdict = verdict_of(under)
    assert verdict.sentence.startswith("PPO is 2.0 points more accurate than rate control, the best baseline")
    assert "+0.5 to +3.5" in verdict.sentence
    assert (verdict.tone, verdict.anchor) == ("fewer", "rate_control")
    unclear = replace(under, gains={"ppo_vs_rate_control": Gain(-1.0, (-2.5, 0.5))})
    assert "1.0 points less accurate" in verdict_of(unclear).sentence
    assert verdict_of(unclear).tone == "unclear"
    assert Comparison.from_json(under.to_json()) == replace(under, fronts=Comparison.from_json(under.to_json()).fronts)


def test_the_choice_is_the_cheapest_point_within_the_loss(comparison: Comparison) -> None:
    for row in choices_of(comparison, "dynamic_resq"):
        for method, found in (("dynamic_resq", row.heuristic), ("ppo", row.learned)):
            near = [
                p.bops for p in comparison.fronts[method] if p.accuracy >= comparison.float_accuracy - row.loss / 100
            ]
            assert (None if found is None else found.bops) == min(near, default=None)


def test_the_parts_of_the_cost_add_up(comparison: Comparison) -> None:
    (key, *_) = comparison.fronts["static_resq"]
    assert key.keyframe_bops == pytest.approx(2 / 6), "two of six frames are keyframes, the others are skipped"
    for row in cost_rows(comparison, "dynamic_resq"):
        point = row["point"]
        assert point.keyframe_bops + row["residual"] + point.policy_bops == pytest.approx(point.bops)
        assert row["residual"] > 0


def test_a_level_everywhere_is_its_bits_in_every_layer_and_region(study: Study) -> None:
    """By hand: 4 of 8 weight bits and level 2, 4 of 8 activation bits, are a quarter of W8A8, wherever one looks."""
    policy = StaticResQ("previous", 0, level=2)
    assert (study.model.config.levels[2], study.model.config.residual_weight_bits) == (4, 4)
    nothing = pair_of(study, policy, PerFrame("previous"))
    groups, layers = layer_rows(study.model, nothing)
    assert [row["name"] for row in groups] == list(study.model.groups)
    assert sum(row["layers"] for row in groups) == len(layers) == len(study.model.sites)
    for rows in (groups, layers):
        assert sum(row["part"] for row in rows) == pytest.approx(1)
        for row in rows:
            assert row["bits"] == pytest.approx([4, 0]), "keyframes do not count, so nothing is left of the other"
            assert row["share"] == pytest.approx([0.25, 0])
    maps = region_maps(nothing)
    assert maps["means"] == pytest.approx([0.25, 0])
    assert len({row["name"] for row in layers}) == len(layers)


def test_a_sheet_holds_the_pictures_in_rows() -> None:
    colors = [(25 * i, 250 - 25 * i, 100) for i in range(COLUMNS + 2)]
    pictures = [np.full((12, 20, 3), color, np.uint8) for color in colors]
    head, _, body = sheet(pictures, (10, 6)).partition(",")
    assert head == "data:image/webp;base64"
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(body))).convert("RGB"), dtype=int)
    assert image.shape == (2 * 6, COLUMNS * 10, 3)
    for i, color in enumerate(colors):
        middle = image[i // COLUMNS * 6 + 3, i % COLUMNS * 10 + 5]
        assert np.abs(middle - color).max() < 12


def test_nothing_in_the_page_is_fetched_and_names_stay_text(report: Path) -> None:
    page = report.read_text(encoding="utf-8")
    assert HOSTILE not in page
    assert page.count("<script") == 2
    for address in ("http://", "https://"):
        assert page.replace("http://www.w3.org/2000/svg", "").count(address) == 0
    assert "default-src 'none'" in page


# In a browser --------------------------------------------------------------------------------------------------------


def watched(page: Page) -> list[str]:
    """Collects what a page says, asks and fetches that it should not."""
    trouble: list[str] = []

    def on_request(request: Request) -> None:
        if not request.url.startswith(("file:", "data:")):
            trouble.append(request.url)

    def on_dialog(dialog: Dialog) -> None:
        trouble.append(dialog.message)
        dialog.dismiss()

    page.on("console", lambda message: trouble.append(message.text))
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("dialog", on_dialog)
    page.on("request", on_request)
    return trouble


@pytest.fixture(scope="module")
def opened(browser: Browser, report: Path) -> Iterator[tuple[Page, list[str]]]:
    """The report as opened from disk on a laptop, and everything that went wrong."""
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    trouble = watched(page)
    page.goto(report.as_uri())
    expect(page.locator("#now")).not_to_be_empty()
    yield page, trouble
    page.close()


def test_numbers_shown_are_those_of_the_file(opened: tuple[Page, list[str]], report: Path) -> None:
    page, trouble = opened
    values = json.loads((report.parent / "comparison.json").read_text())
    assert HOSTILE in page.inner_text("h1")
    assert "31.2% fewer" in page.inner_text("#verdict")
    assert "95% interval 20.6% to 40.1%" in page.inner_text("#verdict")
    assert HOSTILE in page.inner_text("#deltas tr[data-name=ppo_vs_static_resq]")
    page.click("#all summary")
    for method, points in values["fronts"].items():
        rows = page.locator(f"#points tr[data-method={method}]")
        assert rows.count() == len(points)
        for row, point in zip(rows.all(), sorted(points, key=lambda p: -p["bops"]), strict=True):
            for name in ("bops", "accuracy", "keyframe_bops", "policy_bops", "peak_bops"):
                assert row.locator(f"[data-name={name}]").inner_text() == f"{point[name]:.4f}"
            assert row.locator("[data-name=state_bytes]").inner_text() == f"{point['state_bytes']:,}"
    assert page.inner_text("#command") == "resq-rl compare video.frames=6 'heuristic.taus=[0.3, 1.0]'"
    page.click("#again summary")
    assert page.inner_text("#config").strip() == f"video: {HOSTILE}"
    assert (page.locator("#curves svg").text_content() or "").count("environment frames") == 3
    assert trouble == []


def test_points_of_the_chart_are_reached_by_keyboard_and_pointer(
    opened: tuple[Page, list[str]], comparison: Comparison
) -> None:
    page, trouble = opened
    chart = page.get_by_role("region", name="Chart of all points")
    page.get_by_text("Chart of all policies, including losses above 10 points of accuracy").click()
    marks = chart.get_by_role("link")
    near = page.get_by_role("region", name="Chart of the fronts").get_by_role("link")
    assert near.count() == marks.count() - 1, "the upper chart leaves out the random policy"
    page.locator("details#all").evaluate("(node) => { node.open = false; }")
    tips = [mark.evaluate("(node) => node.querySelector('title').textContent") for mark in marks.all()]
    points = [(method, p) for method, own in comparison.fronts.items() for p in own]
    assert len(tips) == len(points)
    for method, point in points:
        accuracy = f"{point.accuracy:.3f} ({point.accuracy_ci95[0]:.3f} to {point.accuracy_ci95[1]:.3f})"  # type: ignore[index]
        shown = [t for t in tips if t.startswith(f"{method_of(method).title}: ") and f"{point.bops:.3f} of W8A8" in t]
        assert any(accuracy in tip for tip in shown)
    rows = set()
    chart.focus()
    for tip in tips:
        page.keyboard.press("Tab")
        assert page.evaluate("() => document.activeElement.querySelector('title').textContent") == tip
        page.keyboard.press("Enter")
        row = page.locator("#points tr:target")
        expect(row).to_be_visible()
        expect(row).to_be_in_viewport()
        (told,) = re.findall(r"([\d.]+) of W8A8", tip)
        assert float(told) == pytest.approx(float(row.locator("[data-name=bops]").inner_text()), abs=1e-3)
        rows.add(row.get_attribute("id"))
        page.locator("details#all").evaluate("(node) => { node.open = false; }")
        chart.locator(f"a[href='#{row.get_attribute('id')}']").focus()
    assert len(rows) == len(points)
    for link, title in (("#point-3-1", "PPO"), ("#point-4-0", "random")):
        chart.locator(f"a[href='{link}']").click()
        expect(page.locator("#points tr:target th")).to_have_text(title)
    assert trouble == []


def test_a_figure_in_the_page_is_escaped_and_takes_its_colours() -> None:
    figure = Figure()
    axes = figure.add_subplot(title=HOSTILE)
    axes.scatter([1, 2], [1, 2]).set_urls(["#a", "#b"])
    svg = inline_svg(figure, HOSTILE, {"a": HOSTILE, "b": "two"})
    assert "<script" not in svg
    root = ElementTree.fromstring(svg)
    assert root.get("aria-label") == HOSTILE
    assert [(link.get("href"), link.findtext("title")) for link in root.iter("a")] == [("#a", HOSTILE), ("#b", "two")]
    assert HOSTILE in {text.text for text in root.iter("text")}
    assert "#000000" not in svg
    assert {"id", "href"} & {name for node in root.iter("g") for name in node.attrib} == set()


def screens(page: Page) -> dict[str, bytes]:
    """What the canvases of the player show."""
    return {c.get_attribute("id") or "": c.screenshot() for c in page.locator("#player canvas").all()}


def line_and_cursor(page: Page) -> tuple[list[float], float]:
    """Horizontal places of the first line's frames, and of the cursor, in the chart of the first clip."""
    found: tuple[list[float], float] = page.evaluate(
        r"""() => {
            const chart = document.getElementById("spending-0"), cursor = document.getElementById("cursor-0");
            const places = (path) => [...path.getAttribute("d").matchAll(/[ML] (\S+)/g)].map((m) => Number(m[1]));
            const line = [...chart.querySelectorAll("path[clip-path]")].map(places).find((xs) => xs.length > 2);
            return [line, places(cursor.querySelector("path"))[0] + cursor.transform.baseVal[0].matrix.e];
        }"""
    )
    return found


def test_the_player_plays_to_the_end_and_steps_by_keyboard(opened: tuple[Page, list[str]], pair: TracedPair) -> None:
    page, trouble = opened
    page.select_option("#clip", "0")
    first = screens(page)
    assert page.inner_text("#now") == "frame 0 of 5"
    page.select_option("#speed", "2")
    page.get_by_role("button", name="Play").click()
    expect(page.locator("#play")).to_have_text("Pause")
    expect(page.locator("#now")).to_have_text("frame 5 of 5")
    expect(page.locator("#play")).to_have_text("Play")
    last = screens(page)
    assert all(last[name] != first[name] for name in first), "every picture moves"
    heuristic, learned = pair.traces[0]
    for i, trace in enumerate((heuristic, learned)):
        text = page.inner_text(f"#spent-{i}")
        assert text == f"{float(trace.bops[5]):.3f} now, {float(trace.bops.mean()):.3f} mean"
    page.locator("#frame").focus()
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#now") == "frame 4 of 5"
    assert "keyframe" in page.inner_text("#spent-0")
    assert "keyframe" not in page.inner_text("#spent-1")
    line, cursor = line_and_cursor(page)
    assert len(line) == 6
    assert cursor == pytest.approx(line[4], abs=0.01), "the cursor stands at the frame shown"
    page.keyboard.press("Home")
    assert screens(page) == first
    page.select_option("#clip", "1")
    expect(page.locator("#now")).to_have_text("frame 0 of 5")
    assert screens(page)["screen-clip"] != first["screen-clip"]
    assert trouble == []


def test_the_bit_map_shows_the_dear_regions_lighter(opened: tuple[Page, list[str]], pair: TracedPair) -> None:
    page, _ = opened
    page.select_option("#clip", "0")
    page.locator("#frame").fill("2")
    share = pair.traces[0][0].share[2]
    rows, columns = share.shape
    lightness = page.evaluate(
        """([rows, columns]) => {
            const canvas = document.getElementById("screen-bits-0"), context = canvas.getContext("2d");
            return [...Array(rows * columns).keys()].map((i) => {
                const [x, y] = [(i % columns + 0.5) / columns, (Math.floor(i / columns) + 0.5) / rows];
                const [r, g, b] = context.getImageData(x * canvas.width, y * canvas.height, 1, 1).data;
                return 0.3 * r + 0.59 * g + 0.11 * b;
            });
        }""",
        [rows, columns],
    )
    order = torch.tensor(lightness).argsort()
    sorted_share = share.flatten()[order]
    assert bool((sorted_share.diff() >= -0.002).all()), "as light as dear, but for rounding"
    assert len(set(lightness)) > 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_reads_in_light_and_dark(browser: Browser, report: Path, scheme: Any) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    page.goto(report.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    color = "(name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim()"
    paper, panel = (page.evaluate(color, name) for name in ("--paper", "--panel"))
    for name in ("--ink", "--soft", "--accent"):
        assert min(contrast(page.evaluate(color, name), ground) for ground in (paper, panel)) >= 4.5, name
    assert (luminance(paper) > 0.5) == (scheme == "light")
    page.close()


def luminance(color: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    values = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_everything_that_can_be_used_has_a_name(opened: tuple[Page, list[str]]) -> None:
    page, _ = opened
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, a, summary, [tabindex='0'], canvas, [role=img]")]
            .filter((e) => !(e.getAttribute("aria-label") || e.textContent.trim() || (e.labels && e.labels.length)))
            .map((e) => e.outerHTML.slice(0, 80))"""
    )
    assert unnamed == []
    levels = page.evaluate("() => [...document.querySelectorAll('h1, h2, h3')].map((e) => Number(e.tagName[1]))")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert page.evaluate("() => document.documentElement.lang") == "en"


def test_a_report_without_a_learned_policy_or_curves_is_still_a_page(
    browser: Browser, study: Study, comparison: Comparison, tmp_path: Path
) -> None:
    bare = replace(comparison, fronts={"per_frame": comparison.fronts["per_frame"], "ppo": []}, bd_bops={})
    path = write_report(tmp_path, study, bare, curves={}, pair=None)
    page = browser.new_page()
    trouble = watched(page)
    page.goto(path.as_uri())
    assert "No learned policy" in page.inner_text("#verdict")
    assert page.locator("#player").count() == 0
    assert trouble == []
    page.close()
