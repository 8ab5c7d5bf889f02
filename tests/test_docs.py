"""What README and docs show runs: blocks of Python as they stand, commands as far as their settings."""

import re
import shlex
from pathlib import Path

import pytest

from resq_rl.experiments.app import COMMANDS, main
from resq_rl.experiments.catalogue import KINDS
from resq_rl.experiments.composition import load_settings

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Tested with what they need: a trained policy (test_jobs.py), two files and a comparison (test_adding_a_task.py); files
# that a page takes in (test_examples.py).
ELSEWHERE = ("Runner", "class Coverage", "--8<--")
# Fewer clips of a block that measures many.
SMALLER = {"GeneratedObjects(test=32)": "GeneratedObjects(test=1, frames=4)"}


def blocks(language: str) -> list[tuple[str, str]]:
    """The page and text of every block in a language."""
    pattern = re.compile(rf"```{language}\n(.*?)```", re.DOTALL)
    return [
        (str(page.relative_to(ROOT)), block)
        for page in PAGES
        for block in pattern.findall(page.read_text(encoding="utf-8"))
    ]


def commands() -> list[tuple[str, list[str]]]:
    """The page and arguments of every `resq-rl` in blocks of bash."""
    found = []
    for page, block in blocks("bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = [word for word in shlex.split(line, comments=True) if not re.fullmatch(r"[A-Z_]+=\S*", word)]
            if words and words[0].split("/")[-1] == "resq-rl":
                found.append((page, words[1:]))
    return found


PYTHON = [(page, block) for page, block in blocks("python") if not any(mark in block for mark in ELSEWHERE)]
COMMAND_LINES = {" ".join(words): (page, words) for page, words in commands()}


@pytest.mark.parametrize(("page", "block"), PYTHON, ids=[page for page, _ in PYTHON])
def test_python_shown_runs(page: str, block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for shown, smaller in SMALLER.items():
        block = block.replace(shown, smaller)
    exec(compile(block, page, "exec"), {"__name__": "shown"})


@pytest.mark.parametrize(("page", "words"), COMMAND_LINES.values(), ids=COMMAND_LINES)
def test_commands_shown_have_valid_settings(page: str, words: list[str]) -> None:
    command, *rest = words
    if command == "list":
        assert set(rest) <= set(KINDS)
    elif command == "sync":
        assert 1 <= len(rest) <= 2
    elif "--config-dir" in rest:  # whose files are in blocks of the page, and tested with them
        assert page in ("docs/adding_a_task.md", "docs/adding_a_policy.md")
    else:
        sweep = "--multirun" in rest
        overrides = [word for word in rest if not word.startswith("-")]
        if sweep:  # each value is tried alone; here the first
            overrides = [word if "[" in word else word.split(",")[0] for word in overrides]
        assert load_settings(COMMANDS[command].config, overrides)


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
    pages = {str(page.relative_to(ROOT / "docs")) for page in PAGES[1:]}
    assert set(re.findall(r"(\S+\.md)$", settings, re.MULTILINE)) == pages


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_links_stay_among_the_pages(page: Path) -> None:
    """What lies outside `docs` is not part of the website: such a link would break there."""
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).resolve().is_relative_to(ROOT / "docs"), link
        assert (page.parent / link).is_file(), link
