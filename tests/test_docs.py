"""What README and docs show runs: blocks of Python as they stand, commands as far as their settings."""

import re
import subprocess
from pathlib import Path

import pytest

from resq_rl.experiments.cli.app import main
from tests.shown import ROOT, SITE, blocks, commands

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
    small += ["quantization.weight_rounding=nearest", "quantization.compile=false", "environment.clips_per_batch=1"]
    assert main(["train", "--config-dir", str(tmp_path), "video=panning", *small]) == 0
    assert list(tmp_path.glob("train/*/seed0/policy.safetensors"))


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
