"""Settings groups that make an object: `_target_`, the dotted path of a class or function, and arguments."""

import difflib
import functools
import importlib
import inspect
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Final

from resq_rl.checked import convert
from resq_rl.errors import ResqError, SettingsError, did_you_mean, unknown_name

__all__ = ["Target", "make_target", "parameter_names", "refuse_foreign"]

TARGET = "_target_"
GROUPS: Final = ("model", "task", "video")
# What the shipped options make. `load_network` is left out: it runs the code of an exported program.
HARMLESS: Final = re.compile(rf"^ *{TARGET}: (resq_rl\.(?:perception|video)\.(?!load_network\b)\w+)$", re.MULTILINE)


@dataclass(frozen=True)
class Target:
    """An object to make from a `_target_` and arguments.

    Attributes:
        group: dotted name of the settings group, for messages.
        path: dotted path of the class or function.
        arguments: keyword arguments; nested `Target`s are made first.
    """

    group: str
    path: str
    arguments: Mapping[str, Any]

    def build(self, **extra: Any) -> Any:
        """Make the object; `extra` arguments join or replace the configured ones.

        Raises:
            SettingsError: an argument is unknown, missing or refused by the target with a plain `TypeError`
                or `ValueError`.
            ResqError: as the target raises it.
        """
        target = _locate(self.path, self.group)
        arguments = {**{name: _build_nested(value) for name, value in self.arguments.items()}, **extra}
        missing = [name for name in _required(target) if name not in arguments]
        if missing:
            raise SettingsError(f"Setting '{self.group}.{missing[0]}' is missing: {self.path} needs it.")
        try:
            return target(**arguments)
        except ResqError:
            raise
        except (TypeError, ValueError) as error:
            raise SettingsError(f"Cannot make '{self.group}' ({self.path}): {error}") from error


def make_target(node: Any, group: str) -> Target:
    """A checked `Target` from a config node; argument names and plain types must fit the target's signature.

    Raises:
        SettingsError: no `_target_`, one that cannot be imported, or an argument that does not fit.
    """
    if not isinstance(node, Mapping) or not isinstance(node.get(TARGET), str):
        raise SettingsError(f"Setting '{group}' needs a {TARGET}: choose an option, {group}=OPTION. Received {node!r}.")
    path = convert(node[TARGET], str, f"{group}.{TARGET}")
    target = _locate(path, group)
    parameters, hints = _parameters(target)
    arguments: dict[str, Any] = {}
    for name, value in node.items():
        if name == TARGET:
            continue
        if parameters is not None and name not in parameters:
            raise unknown_name(str(name), parameters, prefix=f"{group}.")
        arguments[str(name)] = _convert_argument(value, hints.get(name, Any), f"{group}.{name}")
    return Target(group, path, arguments)


def refuse_foreign(node: Any, group: str, source: str) -> None:
    """Refuse settings from a file that name anything but what the shipped options make: using them would run its code.

    Call it before `make_target`, which imports what is named.

    Args:
        source: where the settings are from, as the subject of the message.

    Raises:
        SettingsError: the settings would run other code.
    """
    if isinstance(node, Mapping):
        if TARGET in node and str(node[TARGET]) not in _shipped():
            raise SettingsError(
                f"{source} would run code that none of resq_rl's own options runs ({group}.{TARGET}={node[TARGET]}). "
                f"If you trust it, add trusted=true; or say how it is made: {group.partition('.')[0]}=OPTION."
            )
        for name, value in node.items():
            refuse_foreign(value, f"{group}.{name}", source)
    elif isinstance(node, list | tuple):
        for i, value in enumerate(node):
            refuse_foreign(value, f"{group}.{i}", source)


@functools.cache
def _shipped() -> frozenset[str]:
    """Targets of the package's own options, except those that run code from a file."""
    folders = (files("resq_rl.configs") / group for group in GROUPS)
    options = (file for folder in folders for file in folder.iterdir() if file.name.endswith(".yaml"))
    return frozenset(name for file in options for name in HARMLESS.findall(file.read_text(encoding="utf-8")))


def parameter_names(node: Any) -> list[str]:
    """Argument names that the `_target_` of a config node takes; none where it has no usable target."""
    if not isinstance(node, Mapping) or not isinstance(node.get(TARGET), str):
        return []
    try:
        names, _ = _parameters(_locate(node[TARGET], ""))
    except SettingsError:
        return []
    return sorted(names or ())


def _convert_argument(value: Any, annotation: Any, name: str) -> Any:
    if isinstance(value, Mapping) and TARGET in value:
        return make_target(value, name)
    if _has_target(value):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        made = {key: _convert_argument(item, Any, f"{name}.{key}") for key, item in items}
        return made if isinstance(value, Mapping) else list(made.values())
    return convert(value, annotation, name)


def _has_target(value: Any) -> bool:
    if isinstance(value, Mapping):
        return TARGET in value or any(_has_target(item) for item in value.values())
    return isinstance(value, list) and any(_has_target(item) for item in value)


def _build_nested(value: Any) -> Any:
    if isinstance(value, Target):
        return value.build()
    if isinstance(value, dict):
        return {key: _build_nested(item) for key, item in value.items()}
    return [_build_nested(item) for item in value] if isinstance(value, list) else value


def _parameters(target: Callable[..., Any]) -> tuple[set[str] | None, dict[str, Any]]:
    """Names that may be passed (None: any) and their type hints, as far as they can be known."""
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        return None, {}
    try:
        function = typing.cast(Any, target).__init__ if isinstance(target, type) else target
        hints = typing.get_type_hints(function, include_extras=True)
    except (NameError, TypeError, AttributeError):
        hints = {}
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None, hints
    return {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}, hints


def _required(target: Callable[..., Any]) -> list[str]:
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        return []
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [p.name for p in parameters if p.kind in kinds and p.default is p.empty]


def _locate(path: str, group: str) -> Callable[..., Any]:
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    try:
        # A partial without arguments is the target itself, found and permitted by Hydra's own rules.
        located = instantiate({TARGET: path, "_partial_": True})
    except InstantiationException as error:
        raise SettingsError(_why_not_located(path, group, error)) from error
    return located.func if isinstance(located, functools.partial) else typing.cast(Callable[..., Any], located)


def _why_not_located(path: str, group: str, error: Exception) -> str:
    start = f"Cannot use '{path}' ({group}.{TARGET})"
    parts = path.split(".")
    for length in range(len(parts) - 1, 0, -1):
        module_name = ".".join(parts[:length])
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as missing:
            if missing.name is not None and not f"{module_name}.".startswith(f"{missing.name}."):
                return f"{start}: {module_name} needs the module '{missing.name}', which is not installed."
            continue
        except Exception as failure:
            return f"{start}: importing {module_name} failed with {type(failure).__name__}: {failure}."
        if not hasattr(module, parts[length]):
            public = getattr(module, "__all__", None) or [name for name in dir(module) if not name.startswith("_")]
            close = difflib.get_close_matches(parts[length], public, n=1, cutoff=0.4)
            hint = f" Did you mean '{module_name}.{close[0]}'?" if close else did_you_mean(parts[length], public)
            return f"{start}: the module {module_name} has no '{parts[length]}'.{hint}"
        break
    else:
        return f"{start}: there is no module '{parts[0]}'. Install it or add its folder to PYTHONPATH."
    return f"{start}: {' '.join(str(error).split())}"
