"""Turns plain configuration values into typed ones, with one clear line for each mistake.

Settings classes are frozen dataclasses whose annotations say what a value may be: numbers (with `Bounds`),
strings, `Literal` choices, tuples, mappings, unions of these and other settings classes. Every error names
the setting by its dotted name.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from resq_rl.errors import SettingsError

__all__ = ["Bounds", "check_bounds", "convert", "convert_dataclass", "did_you_mean", "unknown_name"]

MISSING = "???"


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Limits of a number, or of every number in a tuple: `Annotated[int, Bounds(at_least=1)]`."""

    at_least: float = -math.inf
    at_most: float = math.inf
    above: float = -math.inf

    def __contains__(self, value: float) -> bool:
        return self.at_least <= value <= self.at_most and (value > self.above or self.above == -math.inf)

    def __str__(self) -> str:
        parts = []
        if self.at_least > -math.inf:
            parts.append(f"at least {self.at_least:g}")
        if self.above > -math.inf:
            parts.append(f"above {self.above:g}")
        if self.at_most < math.inf:
            parts.append(f"at most {self.at_most:g}")
        return " and ".join(parts)


class _MismatchError(Exception):
    """A value does not have the annotated type; the text says what was expected."""


def did_you_mean(name: str, valid: Iterable[str], *, prefix: str = "") -> str:
    """The end of an error line: the nearest valid name after `prefix`, and all of them where they are few."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f" Did you mean '{prefix}{close[0]}'?" if close else ""
    if not names or (close and len(names) > 12):
        return hint
    return f"{hint} Valid: {', '.join(names)}."


def unknown_name(name: str, valid: Iterable[str], *, prefix: str = "") -> SettingsError:
    """The error for a setting that does not exist; `name` and `valid` are relative to `prefix`."""
    return SettingsError(f"Unknown setting '{prefix}{name}'.{did_you_mean(name, valid, prefix=prefix)}")


def convert(value: Any, annotation: Any, name: str) -> Any:
    """`value` as `annotation` asks for; annotations that are not plain data let any value pass.

    Raises:
        SettingsError: the value has another type, or is still to be set ("???").
    """
    try:
        return _convert(value, annotation, name)
    except _MismatchError as mismatch:
        raise SettingsError(f"Setting '{name}' must be {mismatch}; received {value!r}.") from None


def convert_dataclass(values: Any, cls: type[Any], prefix: str = "") -> Any:
    """An instance of a settings class from a mapping of its fields; `prefix` is the dotted name before them.

    Raises:
        SettingsError: an unknown or missing field, or a value of another type or out of bounds.
    """
    if not isinstance(values, Mapping):
        raise SettingsError(f"Setting '{prefix.rstrip('.')}' must be a group of settings; received {values!r}.")
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = [field.name for field in dataclasses.fields(cls)]
    for key in values:
        if key not in fields:
            raise unknown_name(str(key), fields, prefix=prefix)
    for field in fields:
        if field not in values:
            raise SettingsError(
                f"Setting '{prefix}{field}' is missing. Add it, for example with +{prefix}{field}=VALUE."
            )
    return cls(**{field: convert(values[field], hints[field], f"{prefix}{field}") for field in fields})


def check_bounds(settings: Any, prefix: str) -> None:
    """Check the numbers of a settings dataclass against the `Bounds` in its annotations.

    Raises:
        SettingsError: a number, or one in a tuple or mapping, is out of bounds.
    """
    for field, annotation in typing.get_type_hints(type(settings), include_extras=True).items():
        for bounds in getattr(annotation, "__metadata__", ()):
            for number in _numbers(getattr(settings, field)):
                if number not in bounds:
                    raise SettingsError(f"Setting '{prefix}{field}' must be {bounds}; received {number!r}.")


def _numbers(value: Any) -> Iterable[float]:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _numbers(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _numbers(item)


def _convert(value: Any, annotation: Any, name: str) -> Any:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if isinstance(value, str) and value == MISSING:
        raise SettingsError(f"Setting '{name}' has no default. Set it with {name}=VALUE.")
    if origin is Annotated:
        return _convert(value, arguments[0], name)
    if origin in (Union, types.UnionType):
        return _convert_union(value, arguments, name)
    if origin is Literal:
        return _convert_choice(value, arguments)
    if origin is tuple or annotation is tuple:
        return _convert_tuple(value, arguments, name)
    if origin in (list, Sequence, Iterable, Collection):
        return list(_convert_tuple(value, (*arguments, ...), name))
    if origin in (dict, Mapping):
        return _convert_mapping(value, arguments, name)
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        return _convert_group(value, annotation, name)
    return _convert_scalar(value, annotation)


def _convert_group(value: Any, cls: type[Any], name: str) -> Any:
    if isinstance(value, cls):
        return value
    if not isinstance(value, Mapping):
        raise _MismatchError("a group of settings")
    return convert_dataclass(value, cls, f"{name}.")


def _convert_scalar(value: Any, annotation: Any) -> Any:
    if annotation is None or annotation is type(None):
        if value is not None:
            raise _MismatchError("null")
    elif annotation is bool:
        if not isinstance(value, bool):
            raise _MismatchError("true or false")
    elif annotation is int:
        if isinstance(value, float) and value.is_integer():
            return int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise _MismatchError("an integer")
    elif annotation is float:
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            raise _MismatchError("a finite number")
        return float(value)
    elif annotation in (str, Path):
        if not isinstance(value, str):
            raise _MismatchError("text" if annotation is str else "a path")
        return annotation(value)
    return value


def _convert_choice(value: Any, choices: tuple[Any, ...]) -> Any:
    # Compared by type too: True == 1.
    if any(value == choice and type(value) is type(choice) for choice in choices):
        return value
    listing = ", ".join(str(choice) for choice in choices)
    names = [choice for choice in choices if isinstance(choice, str)]
    close = difflib.get_close_matches(value, names, n=1, cutoff=0.4) if isinstance(value, str) else []
    raise _MismatchError(f"one of {listing}" + (f" (did you mean '{close[0]}'?)" if close else ""))


def _convert_union(value: Any, options: tuple[Any, ...], name: str) -> Any:
    expected = []
    for option in options:
        try:
            return _convert(value, option, name)
        except _MismatchError as mismatch:
            expected.append(str(mismatch))
    raise _MismatchError(" or ".join(expected))


def _convert_tuple(value: Any, items: tuple[Any, ...], name: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise _MismatchError("a list [...]")
    if items and items[-1] is not ... and len(value) != len(items):
        raise _MismatchError(f"a list of {len(items)} values")
    if not items or items[-1] is ...:
        items = (items[0] if items and items[0] is not ... else Any,) * len(value)
    try:
        return tuple(
            _convert(item, kind, f"{name}[{i}]") for i, (item, kind) in enumerate(zip(value, items, strict=True))
        )
    except _MismatchError as mismatch:
        raise _MismatchError(f"a list whose values are each {mismatch}") from None


def _convert_mapping(value: Any, arguments: tuple[Any, ...], name: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise _MismatchError("a mapping such as {name: value}")
    if typing.get_origin(arguments[:1] and arguments[0]) is Literal:
        choices = typing.get_args(arguments[0])
        for key in value:
            if key not in choices:
                raise unknown_name(str(key), choices, prefix=f"{name}.")
    annotation = arguments[1] if arguments else Any
    try:
        return {str(key): _convert(item, annotation, f"{name}.{key}") for key, item in value.items()}
    except _MismatchError as mismatch:
        raise _MismatchError(f"a mapping whose values are each {mismatch}") from None
