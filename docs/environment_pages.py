"""A MkDocs hook that puts the data sheets of the registered environments into `environments.md`.

Ids, spaces, feature names with their meanings, and docstrings are read from the code.
"""

import inspect
import re
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import gymnasium

import resq_rl.envs
from resq_rl.envs.observation import meaning_of

MARK = "<!-- environments -->"
POOLED = {"mean_": "mean over the regions: ", "max_": "maximum over the regions: "}
SECTION = re.compile(r"^([A-Z]\w*):\n((?:(?: +.*)?\n)*)", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the data sheets where a page has the mark."""
    return markdown.replace(MARK, data_sheets()) if MARK in markdown else markdown


@cache
def data_sheets() -> str:
    """One section for what all environments share, and one for each registered id."""
    resq_rl.envs.register()
    ids = [name for name in gymnasium.registry if name.startswith("resq_rl/")]
    shown: dict[Sequence[str], str] = {}  # observations, by the id that has shown them
    parts = [_shared(type(gymnasium.make(ids[0]).unwrapped))]
    for name in ids:
        environment: Any = gymnasium.make(name).unwrapped
        features = tuple(environment.feature_names)
        first = shown.setdefault(features, name)
        sections = _sections(type(environment)) if type(environment) is not _base(type(environment)) else {"": ""}
        parts += [f"## {name}", sections.pop("")]
        parts.append(
            f"| | |\n| --- | --- |\n"
            f"| import | `gymnasium.make({name!r})` |\n"
            f"| class | [{type(environment).__name__}][resq_rl.envs.{type(environment).__name__}] |\n"
            f"| action space | `{_space(environment.action_space)}` |\n"
            f"| observation space | `{environment.observation_space}` |"
        )
        parts += [f"### {title} of {_short(name)}\n\n{text}" for title, text in sections.items()]
        parts.append(f"### Observation of {_short(name)}")
        if first == name:
            parts.append(observation_table(features, environment.observation_space))
        else:
            parts.append(f"The same as in [{first}](#observation-of-{_short(first).lower()}).")
    return "\n\n".join(parts)


def observation_table(features: Sequence[str], space: gymnasium.spaces.Box) -> str:
    """Index, name, minimum, maximum and meaning of every number that is observed.

    Features by region are named `NAME[row,column]` and follow each other region by region: they share a row.
    """
    per_region = sum("[0,0]" in name for name in features)
    lines = ["| index | name | minimum | maximum | meaning |", "| --- | --- | --- | --- | --- |"]
    for index, name in enumerate(features):
        base, _, place = name.partition("[")
        if place not in ("", "0,0]"):
            continue
        where = f"{per_region} r + {index}" if place else str(index)
        low, high = space.low[index], space.high[index]
        lines.append(f"| {where} | `{base}` | {low:g} | {high:g} | {meaning(base)} |")
    if per_region:
        rows, columns = (1 + max(int(place) for place in places) for places in zip(*_places(features), strict=True))
        lines += ["", f"r is the region: {columns} x row + column, from 0 to {rows * columns - 1}."]
    return "\n".join(lines)


def _places(features: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Row and column of every feature by region."""
    for name in features:
        if found := re.search(r"\[(\d+),(\d+)\]$", name):
            yield found.groups()


def meaning(name: str) -> str:
    """The meaning of a feature of one region, of the frame, or pooled over the regions."""
    for prefix, words in POOLED.items():
        if name.startswith(prefix):
            return words + meaning(name.removeprefix(prefix))
    return meaning_of(name)


def _base(environment: type) -> type:
    """The class of the package that all environments derive from."""
    return [c for c in environment.__mro__ if c.__module__.startswith("resq_rl.")][-1]


def _shared(environment: type) -> str:
    """What all environments have in common, from the docstring of their base class."""
    base = _base(environment)
    sections = _sections(base)
    parts = ["## What they share", sections.pop("")]
    for title, text in sections.items():
        arguments = title in ("Arguments", "Args")
        parts.append(f"### {title}\n\n{_arguments(text) if arguments else text}")
    return "\n\n".join(parts)


def _sections(documented: type) -> dict[str, str]:
    """The sections of a docstring by their titles; under "" what comes before the first."""
    text = inspect.cleandoc(documented.__doc__ or "") + "\n"
    found = {m[1]: inspect.cleandoc(m[2]) for m in SECTION.finditer(text)}
    return {"": SECTION.sub("", text).strip()} | found


def _arguments(text: str) -> str:
    """The entries `NAME: meaning` of a section as a table."""
    entries = re.findall(r"^(\w+): (.*(?:\n +.*)*)", text, re.MULTILINE)
    rows = [f"| `{name}` | {' '.join(words.split())} |" for name, words in entries]
    return "\n".join(["| argument | meaning |", "| --- | --- |", *rows])


def _space(space: gymnasium.Space[Any]) -> str:
    """A space in words; repeated sizes are counted."""
    if not isinstance(space, gymnasium.spaces.MultiDiscrete):
        return str(space)
    runs: list[list[int]] = []
    for size in space.nvec.tolist():
        if runs and runs[-1][0] == size:
            runs[-1][1] += 1
        else:
            runs.append([size, 1])
    return f"MultiDiscrete({' + '.join(f'[{size}] * {count}' if count > 1 else f'[{size}]' for size, count in runs)})"


def _short(name: str) -> str:
    return name.removeprefix("resq_rl/").partition("-v")[0]
