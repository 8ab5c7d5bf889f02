"""A MkDocs hook that puts the data sheets of the registered environments into `environments.md`.

Ids, spaces, feature names, signatures and docstrings are read from the code. Only what a feature means is written here.
"""

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import gymnasium

import resq_rl.envs

MARK = "<!-- environments -->"
# What each feature of an observation means; `mean_` and `max_` of them and `spent_groupG` follow from these.
MEANINGS: Mapping[str, str] = {
    "residual_mean": "square root of the mean absolute pixel residual against the reference frame",
    "residual_max": "largest absolute pixel residual against the reference frame",
    "drift_mean": "square root of the mean absolute pixel difference from the last keyframe",
    "residual_around": "mean of `residual_mean` over the region and its eight neighbours",
    "uncertainty": "mean uncertainty of the last output, as its task defines it",
    "boundary": "mean boundary density of the last output; for classes, the share of pixels that differ from the next "
    "pixel to the right or below",
    "boundary_around": "mean of `boundary` over the region and its eight neighbours",
    "foreground": "foreground share of the last output; for classes, the share of pixels that are not class 0",
    "texture": "square root of the mean absolute luminance difference of neighbouring pixels",
    "spent": "BOPs last spent in the region and layer group, as a share of their BOPs at W8A8",
    "keyframe_age": "log2(1 + frames since the last keyframe) / 6, at most 1",
    "trade_off": "position of lambda in its range, on a log scale; 0 if the range is a single value",
    "budget_left": "share of the clip's budget of BOPs that is left; 1 without a budget",
    "frame_residual_mean": "square root of the mean absolute pixel residual of the frame",
    "foreground_share": "mean of `foreground` over the frame",
}
POOLED = {"mean_": "mean over the regions: ", "max_": "maximum over the regions: "}
SECTION = re.compile(r"^([A-Z]\w*):\n((?:(?: +.*)?\n)*)", re.MULTILINE)
ENTRY = re.compile(r"(?:^|(?<=[.:]) )([a-z]\w*(?:, [a-z]\w*)*): ", re.MULTILINE)


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
    """What a feature means, by its name.

    Raises:
        KeyError: the feature is not described.
    """
    for prefix, words in POOLED.items():
        if name.startswith(prefix):
            return words + meaning(name.removeprefix(prefix))
    group = re.fullmatch(r"spent_group(\d+)", name)
    return f"{MEANINGS['spent']} (layer group {group[1]})" if group else MEANINGS[name]


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
        parts.append(f"### {title}\n\n{_arguments(text, base) if arguments else text}")
    return "\n\n".join(parts)


def _sections(documented: type) -> dict[str, str]:
    """The sections of a docstring by their titles; under "" what comes before the first."""
    text = inspect.cleandoc(documented.__doc__ or "") + "\n"
    found = {m[1]: inspect.cleandoc(m[2]) for m in SECTION.finditer(text)}
    return {"": SECTION.sub("", text).strip()} | found


def _arguments(text: str, environment: type) -> str:
    """The arguments as a table, with the defaults of the signature."""
    known = inspect.signature(environment).parameters
    lines = ["| argument | default | meaning |", "| --- | --- | --- |"]
    for names, words in _entries(" ".join(text.split())):
        defaults = [known[n].default for n in names.split(", ") if n in known]
        given = ", ".join(f"`{d!r}`" for d in dict.fromkeys(defaults) if d is not inspect.Parameter.empty)
        lines.append(f"| {', '.join(f'`{n}`' for n in names.split(', '))} | {given} | {words} |")
    return "\n".join(lines)


def _entries(text: str) -> Iterator[tuple[str, str]]:
    """Names and description of each entry `NAME, NAME: description.`"""
    starts = [*ENTRY.finditer(text)]
    for entry, following in zip(starts, [*starts[1:], None], strict=True):
        yield entry[1], text[entry.end() : following.start() if following else None].strip()


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
