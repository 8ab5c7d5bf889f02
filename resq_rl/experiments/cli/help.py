"""`resq-rl COMMAND --help`: what a command takes, with what each setting means, from where both are defined."""

import importlib
import inspect
import re
import sys
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from resq_rl.experiments.config.composition import compose_config, group_options
from resq_rl.experiments.config.settings import Settings
from resq_rl.experiments.config.targets import TARGET, Target

__all__ = ["print_help"]

# Where there is no terminal.
PLAIN_WIDTH = 120
FLAGS = """\
Flags: --cfg job prints all settings instead of running (--resolve fills in references), --multirun runs once for each
combination of values given as NAME=A,B, --info tells where settings come from, --config-dir FOLDER adds groups of your
own, --hydra-help tells more."""


def print_help(title: str, config_name: str, overrides: Sequence[str], groups: Collection[str]) -> None:
    """Print the groups and settings that a command uses, with the values that `overrides` leave, and the flags.

    Args:
        title: what the page begins with.
        groups: those that the command uses; all where there are none.

    Raises:
        SettingsError: an override does not fit.
    """
    config = compose_config(config_name, overrides)
    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False)
    used = [str(name) for name in config if isinstance(config[name], DictConfig) and (not groups or name in groups)]
    plain = {str(name): value for name, value in config.items() if not isinstance(value, DictConfig)}
    console.print(f"{title}\n", markup=False)
    console.print("[bold]Choose[/bold] with GROUP=OPTION (resq-rl list tells what they are):")
    options = group_options(config_name, overrides)
    rows = [("+experiment", options["experiment"]), *((group, options[group]) for group in used)]
    _print(console, [(name, ", ".join(several)) for name, several in rows if len(several) > 1])
    console.print("[bold]Set[/bold] with NAME=VALUE; these are the defaults, as far as nothing else was given:")
    meanings, classes = _meanings(Settings), typing.get_type_hints(Settings)
    _print(console, [(name, _shown(value), meanings.get(name, "")) for name, value in plain.items()])
    for group in used:
        _print(console, list(_rows(group, config[group], classes[group])))
    others = [str(name) for name in config if isinstance(config[name], DictConfig) and str(name) not in used]
    if others:
        console.print(f"Settings of other commands: {', '.join(others)}.\n")
    console.print(FLAGS, markup=False)


def _rows(group: str, config: DictConfig, owner: type) -> Iterator[tuple[str, str, str]]:
    meanings = _meanings(_made(config) if owner is Target else owner)
    for name, value in OmegaConf.to_container(config, resolve=False).items():  # type: ignore[union-attr]
        meaning = "what makes it" if name == TARGET else meanings.get(str(name), "")
        yield f"{group}.{name!s}", _shown(value), meaning


def _made(config: DictConfig) -> object:
    """The class or function that the target of a group names; None where it cannot be told."""
    module, _, name = str(config.get(TARGET)).rpartition(".")
    try:
        return getattr(importlib.import_module(module), name, None)
    except (ImportError, ValueError):
        return None


def _meanings(owner: object) -> dict[str, str]:
    """What the docstrings of a class and its bases, or of a function, say of each attribute or argument."""
    if isinstance(owner, type) and len(owner.__bases__) == 1 and is_dataclass(owner.__base__):
        return _meanings(owner.__base__) | _listed(owner)
    return _listed(owner)


def _listed(owner: object) -> dict[str, str]:
    _, *rest = re.split(r"^(?:Attributes|Args|Arguments):\n", inspect.getdoc(owner) or "", flags=re.MULTILINE)
    listed, found = "\n".join(part.partition("\n\n")[0] for part in rest), {}  # type: tuple[str, dict[str, str]]
    for names, text in re.findall(r"^    (\w[\w, ]*): (.*(?:\n {5,}.*)*)", listed, re.MULTILINE):
        text = re.sub(r"\bNone\b", "null", " ".join(text.split()))
        found |= {name.strip(): text for name in names.split(",")}
    return found


def _shown(value: Any) -> str:
    if isinstance(value, Mapping | DictConfig):
        return "{" + ", ".join(f"{name}: {_shown(item)}" for name, item in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ",".join(map(_shown, value)) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _print(console: Console, rows: Sequence[tuple[str, ...]]) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(max_width=46 if rows and len(rows[0]) > 2 else None, overflow="fold")
    table.add_column()
    for row in rows:
        table.add_row(*(text.replace("[", "\\[") for text in row))
    console.print(Padding.indent(table, 2))
    console.print()
