"""What README and docs show runs, and the figures in them are those of the files in docs/results.

Blocks of Python run as they stand; commands, as far as their settings (test_shown_commands.py runs them).
"""

import importlib.util
import json
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from resq_rl.experiments.cli.app import main
from tests.envs.problems import TINY_NETWORK
from tests.shown import PAGES, ROOT, SITE, blocks, commands

# Tested with what they need: a trained policy (test_jobs.py), two files and a comparison (test_adding_a_task.py); files
# that a page takes in (test_examples.py).
ELSEWHERE = ("Runner", "class Coverage", "--8<--")
# Fewer clips of a block that measures many.
SMALLER = {"GeneratedObjects(test=32)": "GeneratedObjects(test=1, frames=4)"}


PYTHON = [(page, block) for page, block in blocks("python") if not any(mark in block for mark in ELSEWHERE)]


@pytest.mark.parametrize(("page", "block"), PYTHON, ids=[page for page, _ in PYTHON])
def test_python_shown_runs(page: str, block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for shown, smaller in SMALLER.items():
        block = block.replace(shown, smaller)
    exec(compile(block, page, "exec"), {"__name__": "shown"})


@pytest.mark.parametrize("words", commands("make").values(), ids=commands("make"))
def test_targets_of_make_shown_are_there(words: list[str]) -> None:
    done = subprocess.run(
        ["make", "--dry-run", *words], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_dataset_shown_can_be_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = "docs/adding_a_policy.md"
    (code,) = [block for where, block in blocks("python") if where == page and "class Panning" in block]
    ((_, config),) = [pair for pair in blocks("yaml") if pair[0] == page]
    (tmp_path / "panning.py").write_text(code)
    (tmp_path / "video").mkdir()
    (tmp_path / "video" / "panning.yaml").write_text(config)
    monkeypatch.syspath_prepend(tmp_path)
    small = ["environment.grid=[2,3]", "environment.trade_off=0.3", "training.frames=20", "training.warm_start=none"]
    small += ["training.seeds=[0]", "threads=1", "tracking=disabled", f"results={tmp_path}"]
    small += ["quantization.weight_rounding=nearest", "environment.clips_per_batch=1"]
    small += [*TINY_NETWORK, "video.size=[32,48]", "training.search_frames=30", "training.n_steps=5"]
    assert main(["train", "--config-dir", str(tmp_path), "video=panning", *small]) == 0
    assert list(tmp_path.glob("train/*/seed0/policy.safetensors"))


def test_tests_named_in_pages_are_there() -> None:
    text = "".join(page.read_text("utf-8") for page in PAGES)
    named = set(re.findall(r"\btests/[\w/]+(?:\.py)?", text))
    assert len(named) > 10
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_every_page_is_in_the_navigation() -> None:
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = {str(page.relative_to(ROOT / "docs")) for page in SITE}
    assert set(re.findall(r"(\S+\.md)$", settings, re.MULTILINE)) == pages


@pytest.mark.parametrize("page", SITE, ids=lambda page: page.name)
def test_links_stay_among_the_pages(page: Path) -> None:
    """What lies outside `docs` is not part of the website: such a link would break there."""
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).resolve().is_relative_to(ROOT / "docs"), link
        assert (page.parent / link).is_file(), link


# "+1.9% [-0.5, +11.4]": a value and, unless there is none, its interval.
DELTA = re.compile(r"([-+][\d.]+)%(?:\*\*)?(?: \[([-+][\d.]+), ([-+][\d.]+)\])?")
RIVALS = {
    "Dynamic ResQ": "dynamic_resq",
    "searched thresholds": "searched_thresholds",
    "gradient thresholds": "gradient_thresholds",
    "random search": "random_search",
    "searched by layer": "searched_by_layer",
    "CMA-ES": "cma_es",
    "frame magnitude": "frame_magnitude",
    "static ResQ": "static_resq",
    "rate control": "rate_control",
}
RESULT_PAGES = [page for page in SITE if page.name == "results.md" or page.parent.name == "results"]


def tables(page: Path) -> Iterator[tuple[Path | None, list[str], list[str]]]:
    """Every row of a page's tables: the file that the row or the text before it names, the titles, the cells."""
    file, titles = None, None
    for line in page.read_text("utf-8").splitlines():
        named = [page.parent / name for name in re.findall(r"\]\(([\w/]+\.json)\)", line)]
        if not line.startswith("|"):
            file, titles = (named[-1] if named else file), None
            continue
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if titles is None:
            titles = cells
        elif set(cells) != {"---"}:
            yield (named[-1] if named else file), titles, cells


@cache
def comparison(file: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return loaded


def assert_delta(cell: str, file: Path, rival: str) -> None:
    deltas = comparison(file)["bd_bops"]
    entry = deltas.get(f"ppo_vs_{rival}", deltas.get(f"gradient_policy_vs_{rival}"))
    found = DELTA.search(cell)
    if entry is None or entry["value"] is None:
        assert cell
        assert found is None, (file.name, rival, cell)
        return
    assert found, (file.name, rival, cell)
    shown = [None if number is None else float(number) for number in found.groups()]
    interval = entry["ci95"] or [None, None]
    expected = [None if number is None else round(number, 1) for number in (entry["value"], *interval)]
    assert shown == expected, (file.name, rival, cell)


@pytest.mark.parametrize("page", RESULT_PAGES, ids=lambda page: page.stem)
def test_a_change_of_bops_shown_is_that_of_its_file(page: Path) -> None:
    checked = 0
    for file, titles, cells in tables(page):
        if titles[0] in ("PPO against", "gradient policy against"):
            assert file
            assert_delta(cells[1], file, RIVALS[cells[0]])
            checked += 1
        elif titles[0] == "PPO at equal budget against":
            assert file
            gain = comparison(file)["gains"][f"ppo_vs_{RIVALS[cells[0]]}"]
            assert cells[1] == "{:+.1f} [{:+.1f}, {:+.1f}]".format(gain["points"], *gain["ci95"])
            checked += 1
        elif "](" in cells[0] + cells[-1] and file:
            for title, cell in zip(titles, cells, strict=True):
                rival = next(
                    (
                        key
                        for name, key in RIVALS.items()
                        if title.startswith(("PPO against", "policy against")) and name in title
                    ),
                    "",
                )
                if rival:
                    assert_delta(cell, file, rival)
                    checked += 1
    assert checked >= 2


@pytest.mark.parametrize("page", [page for page in RESULT_PAGES if "| method |" in page.read_text("utf-8")], ids=str)
def test_points_shown_are_those_of_their_file(page: Path) -> None:
    for file, titles, cells in tables(page):
        if titles[0] != "method":
            continue
        assert file
        front = [p for points in comparison(file)["fronts"].values() for p in points]
        shown = [float(cells[i].split()[0]) for i in (2, 4)]
        points = [(p["bops"], p["accuracy"]) for p in front]
        assert any(np.allclose(shown, point, rtol=0, atol=5.1e-4) for point in points), (file.name, cells)


def test_changes_of_bops_in_the_readme_stand_among_the_results() -> None:
    results = "".join(page.read_text("utf-8") for page in RESULT_PAGES)
    shown = re.findall(r"(\d+\.\d)% ", (ROOT / "README.md").read_text("utf-8"))
    assert len(shown) > 4
    assert [number for number in shown if f"-{number}" not in results] == []


def environment_pages() -> Any:
    spec = importlib.util.spec_from_file_location("environment_pages", ROOT / "docs" / "environment_pages.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_observation_tables_give_every_number_of_every_environment_once() -> None:
    sheets = environment_pages().data_sheets()
    for name in (name for name in gymnasium.registry if name.startswith("resq_rl/")):
        environment: Any = gymnasium.make(name).unwrapped
        (sheet,) = [part for part in re.split(r"^## ", sheets, flags=re.MULTILINE) if part.startswith(name)]
        assert str(environment.observation_space) in sheet
        if same := re.search(r"The same as in \[(\S+)\]", sheet):
            assert gymnasium.make(same[1]).get_wrapper_attr("feature_names") == environment.feature_names
            continue
        seen: dict[int, str] = {}
        for place, feature, low, high, meaning in re.findall(
            r"^\| ([^|]+) \| `(\w+)` \| (\S+) \| (\S+) \| (.+) \|$", sheet, re.MULTILINE
        ):
            assert (low, high) == ("0", "1")
            assert len(meaning) > 10
            step, first = (int(n) for n in re.fullmatch(r"(?:(\d+) r \+ )?(\d+)", place).groups(default="0"))  # type: ignore[union-attr]
            count = int(re.search(r"from 0 to (\d+)\.", sheet)[1]) + 1 if step else 1  # type: ignore[index]
            for index in range(first, first + count * max(step, 1), max(step, 1)):
                assert seen.setdefault(index, feature) == feature
        assert [seen[i] for i in range(len(seen))] == [f.partition("[")[0] for f in environment.feature_names]
        assert environment.observation_space.shape == (len(seen),)


def test_the_page_of_environments_takes_in_the_tables() -> None:
    page = (ROOT / "docs" / "environments.md").read_text("utf-8")
    built = environment_pages().on_page_markdown(page)
    assert "| `keyframe_age` | 0 | 1 |" in built
    for argument in ("problem", "trade_off", "thresholds", "render_mode"):
        assert f"| `{argument}` | " in built
    assert f"hooks: [docs/{environment_pages().__name__}.py]" in (ROOT / "mkdocs.yml").read_text("utf-8")
