"""`resq-rl list`: what can be chosen, read from where it is defined, with one line each."""

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.resources import files

from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from resq_rl.errors import SettingsError, did_you_mean

__all__ = ["KINDS", "print_catalogue"]

Entries = Iterable[tuple[str, str]]

# Where there is no terminal: wide enough for every entry to stay on one line.
PLAIN_WIDTH = 200


def _group(group: str) -> Iterator[tuple[str, str]]:
    """Options of a config group, each with the comment that its file begins with."""
    folder = files("resq_rl.configs") / group
    for file in sorted(folder.iterdir(), key=lambda f: f.name):
        if file.name.endswith(".yaml"):
            yield file.name.removesuffix(".yaml"), _first_comment(file.read_text(encoding="utf-8"))


def _first_comment(text: str) -> str:
    for line in text.splitlines():
        if not line.startswith("#"):
            return ""
        if not line.startswith("# @"):  # Hydra's directives
            return line.removeprefix("#").strip()
    return ""


def _environments() -> Iterator[tuple[str, str]]:
    """Registered environments, and which option of the group `environment` takes each."""
    import gymnasium
    from omegaconf import OmegaConf

    import resq_rl.envs

    folder = files("resq_rl.configs") / "environment"
    options = {
        OmegaConf.create(file.read_text(encoding="utf-8")).id: file.name.removesuffix(".yaml")
        for file in folder.iterdir()
        if file.name.endswith(".yaml")
    }
    for name, spec in sorted(gymnasium.registry.items()):
        if name.startswith(f"{resq_rl.__name__}/"):
            option = f" [environment={options[name]}]" if name in options else ""
            yield name, _summary(spec.entry_point) + option


def _policies() -> Iterator[tuple[str, str]]:
    """Classes of `resq_rl.policies` that decide how frames run."""
    import resq_rl.policies

    for name in resq_rl.policies.__all__:
        found = getattr(resq_rl.policies, name)
        if inspect.isclass(found) and hasattr(found, "decide"):
            yield name, _summary(found)


def _summary(found: object) -> str:
    """The first sentence of a docstring, as far as it is one line."""
    return (inspect.getdoc(found) or "").partition("\n")[0]


# What is listed, how it is chosen, and where it is read from.
KINDS: Mapping[str, tuple[str, Callable[[], Entries]]] = {
    "environments": ("gymnasium.make(ID), environment=OPTION", _environments),
    "policies": ("resq_rl.policies.NAME", _policies),
    "models": ("model=OPTION", lambda: _group("model")),
    "tasks": ("task=OPTION", lambda: _group("task")),
    "datasets": ("video=OPTION", lambda: _group("video")),
    "experiments": ("+experiment=OPTION", lambda: _group("experiment")),
}


def print_catalogue(kinds: Iterable[str] = (), console: Console | None = None) -> None:
    """Print what can be chosen, of the given kinds or of all.

    Raises:
        SettingsError: there is no such kind.
    """
    chosen = list(kinds) or list(KINDS)
    for kind in chosen:
        if kind not in KINDS:
            raise SettingsError(f"Cannot list '{kind}'.{did_you_mean(kind, KINDS)}")
    console = console or Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    for kind in chosen:
        how, entries = KINDS[kind]
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        for name, text in entries():
            table.add_row(name, text.replace("[", "\\["))
        console.print(f"[bold]{kind}[/bold] ({how})", highlight=False)
        console.print(Padding.indent(table, 2), highlight=False)
        console.print()
