"""What README, CONTRIBUTING and docs show: their blocks, and the commands in blocks and in running text."""

import re
import shlex
from collections.abc import Iterator, Sequence
from itertools import dropwhile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SITE = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *SITE]
ANY_BLOCK = re.compile(r"```.*?```", re.DOTALL)


def blocks(language: str) -> list[tuple[str, str]]:
    """The page and text of every block in a language."""
    pattern = re.compile(rf"```{language}\n(.*?)```", re.DOTALL)
    return [
        (str(page.relative_to(ROOT)), block) for page in PAGES for block in pattern.findall(page.read_text("utf-8"))
    ]


def commands(program: str, pages: Sequence[Path] = PAGES) -> dict[str, list[str]]:
    """The arguments of every command of a program by its line, in the order of the pages, each line once."""
    found = {}
    for line in _lines(pages):
        words = list(dropwhile(re.compile("[A-Z_]+=").match, shlex.split(line, comments=True)))
        if words and words[0].removeprefix(".venv/bin/") == program:
            found[shlex.join([program, *words[1:]])] = words[1:]
    return found


def _lines(pages: Sequence[Path]) -> Iterator[str]:
    """Lines of blocks of bash, and what stands in running text as code."""
    for page in pages:
        text = page.read_text("utf-8")
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
            yield from block.replace("\\\n", " ").splitlines()
        for span in re.findall(r"`([^`\n]+)`", ANY_BLOCK.sub("", text)):
            try:
                shlex.split(span)
            except ValueError:  # an apostrophe: no command
                continue
            yield span
