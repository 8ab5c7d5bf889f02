"""Dataclasses that check their own fields, and one clear line for each mistake in a setting.

The annotation of a field says all that its value may be: a type, `pydantic.Field` limits, choices. pydantic checks
and converts; the line of an error is made from the same annotation. Conversion is strict: "1" and True are no
integers, but 2.0 is, and a list will do for a tuple.
"""

import dataclasses
import difflib
import functools
import itertools
import operator
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

from pydantic import AfterValidator, BeforeValidator, Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from resq_rl.errors import SettingsError, unknown_name

__all__ = [
    "Bits",
    "Checked",
    "Count",
    "Increasing",
    "NotNegative",
    "Positive",
    "Share",
    "convert",
    "convert_dataclass",
]

MISSING = "???"  # as OmegaConf writes a value that is still to be set

Made = TypeVar("Made")


def _increasing(values: Sequence[float]) -> Sequence[float]:
    if any(a >= b for a, b in itertools.pairwise(values)):
        raise ValueError("not increasing")
    return values


Count = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
Bits = Annotated[int, Field(ge=2, le=16)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Increasing = AfterValidator(_increasing)
"""Of a tuple of numbers; say so in the description of its `Field`."""


class Checked:
    """Base of frozen dataclasses whose fields are converted and checked by their annotations when one is made.

    Raises:
        SettingsError: a field has another type or is out of bounds.
    """

    _group: ClassVar[str] = ""  # what messages write before a field's name, such as "training."

    def __post_init__(self) -> None:
        for name, annotation in _annotations(type(self)).items():
            object.__setattr__(self, name, convert(getattr(self, name), annotation, f"{self._group}{name}"))
        self._check()

    def _check(self) -> None:
        """Check what no annotation of a single field can say."""

    def part(self, cls: type[Made], **changes: Any) -> Made:
        """The fields that `cls`, a base of this class, has, as an instance of `cls`; `changes` replace some of them."""
        values = {name: getattr(self, name) for name in _annotations(cls)}
        return cls(**(values | changes))


def convert(value: Any, annotation: Any, name: str) -> Any:
    """`value` as `annotation` asks for; a type that is not plain data, or a dataclass, lets any value pass.

    Args:
        name: dotted name of the setting, for messages.

    Raises:
        SettingsError: the value has another type, is out of bounds, or is still to be set ("???").
    """
    _refuse_missing(value, name)
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        return value if isinstance(value, annotation) else convert_dataclass(value, annotation, f"{name}.")
    for key in value if isinstance(value, Mapping) else ():
        choices = _key_choices(annotation)
        if choices and key not in choices:
            raise unknown_name(str(key), choices, prefix=f"{name}.")
    try:
        return _validator(annotation)(value)
    except ValidationError:
        shown = list(value) if isinstance(value, tuple) else value
        expected = f"{_described(annotation)}{_nearest(value, annotation)}"
        quotes = f" Quote it: '{name}=\"{value}\"'." if type(value) is int and "text" in expected else ""
        raise SettingsError(f"Setting '{name}' must be {expected}; received {shown!r}.{quotes}") from None


def convert_dataclass(values: Any, cls: type[Made], prefix: str = "") -> Made:
    """An instance of a dataclass from a mapping of all of its fields; `prefix` is the dotted name before them.

    Raises:
        SettingsError: an unknown or missing field, or a value of another type or out of bounds.
    """
    if not isinstance(values, Mapping):
        raise SettingsError(f"Setting '{prefix.rstrip('.')}' must be a group of settings; received {values!r}.")
    annotations = _annotations(cls)
    for key in values:
        if key not in annotations:
            raise unknown_name(str(key), annotations, prefix=prefix)
    for field in annotations:
        if field not in values:
            raise SettingsError(
                f"Setting '{prefix}{field}' is missing. Add it, for example with +{prefix}{field}=VALUE."
            )
    return cls(**{name: convert(values[name], hint, f"{prefix}{name}") for name, hint in annotations.items()})


def _annotations(cls: type[Any]) -> dict[str, Any]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _refuse_missing(value: Any, name: str) -> None:
    if isinstance(value, str) and value == MISSING:
        raise SettingsError(f"Setting '{name}' has no default. Set it with {name}=VALUE.")
    if isinstance(value, Mapping):
        for key, item in value.items():
            _refuse_missing(item, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _refuse_missing(item, f"{name}[{i}]")


# From annotations to what pydantic checks -----------------------------------------------------------------------------


def _number(value: Any) -> Any:
    if isinstance(value, str | bytes | bool):
        raise ValueError("not a number")
    return value


def _exact(choices: tuple[Any, ...]) -> BeforeValidator:
    """Of the choices, with their type: True equals 1."""

    def check(value: Any) -> Any:
        if not any(value == choice and type(value) is type(choice) for choice in choices):
            raise ValueError("no such choice")
        return value

    return BeforeValidator(check)


STRICT: Mapping[Any, Any] = {
    bool: Annotated[bool, Field(strict=True)],
    str: Annotated[str, Field(strict=True)],
    int: Annotated[int, BeforeValidator(_number)],
    float: Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)],
    Path: Path,
    type(None): type(None),
    tuple: tuple[Any, ...],
}
KEY = Annotated[str, BeforeValidator(str)]  # YAML makes 1 of the name 1


def _strict(annotation: Any) -> Any:
    """The annotation for pydantic: strict about scalars, not about lists and tuples, and blind to what is no data."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return Annotated[(_strict(arguments[0]), *arguments[1:])]
    if origin in (Union, types.UnionType):
        return functools.reduce(operator.or_, map(_strict, arguments))
    if origin is Literal:
        return Annotated[annotation, _exact(arguments)]
    if origin is tuple:
        return tuple[tuple(item if item is ... else _strict(item) for item in arguments)]  # type: ignore[misc]
    if origin is list:
        return list[_strict(arguments[0])]  # type: ignore[misc]
    if origin in (Sequence, Iterable, Collection):
        return tuple[_strict(arguments[0]), ...]  # type: ignore[misc]
    if origin in (dict, Mapping):
        key = KEY if arguments[0] is str else _strict(arguments[0])
        return dict[key, _strict(arguments[1])]  # type: ignore[misc,valid-type]
    return STRICT.get(annotation, Any) if isinstance(annotation, type | None) else Any


@functools.cache
def _validator(annotation: Any) -> Callable[[Any], Any]:
    return TypeAdapter(_strict(annotation)).validate_python


# From annotations to words --------------------------------------------------------------------------------------------

WORDS: Mapping[Any, str] = {
    bool: "true or false",
    str: "text",
    int: "an integer",
    float: "a finite number",
    Path: "a path",
    None: "null",
    type(None): "null",
    tuple: "a list [...]",
}
LIMITS = {"ge": "of at least", "gt": "above", "le": "of at most"}
NUMBERS = {1: "one value", 2: "two values"}


def _described(annotation: Any) -> str:
    """What a value must be, as a sentence goes on after "must be"."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _limited(arguments[0], [field for field in arguments[1:] if isinstance(field, FieldInfo)])
    if origin in (Union, types.UnionType):
        return " or ".join(map(_described, arguments))
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}" if len(arguments) > 1 else str(arguments[0])
    if origin is tuple and arguments[-1] is not ...:
        kinds = list(dict.fromkeys(map(_described, arguments)))
        return f"a list of {len(arguments)} values, {'each ' if len(kinds) == 1 else ''}{' and '.join(kinds)}"
    if origin in (tuple, list, Sequence, Iterable, Collection):
        return f"a list of values, each {_described(arguments[0])}"
    if origin in (dict, Mapping):
        return f"a mapping whose values are each {_described(arguments[1])}, such as {{name: value}}"
    return WORDS.get(annotation, "something else")


def _limited(annotation: Any, fields: Sequence[FieldInfo]) -> str:
    described = _described(annotation)
    words = []
    for field in fields:
        if field.description is not None:
            return field.description
        for limit in field.metadata:
            least = getattr(limit, "min_length", None)
            if least is not None:
                described = described.replace("a list of values", f"a list of at least {NUMBERS[least]}")
            words += [f"{text} {getattr(limit, name):g}" for name, text in LIMITS.items() if hasattr(limit, name)]
    return f"{described} {' and '.join(words).replace('and of', 'and')}" if words else described


def _choices(annotation: Any) -> Iterator[str]:
    """All texts that `Literal`s within an annotation name."""
    if get_origin(annotation) is Literal:
        yield from (choice for choice in get_args(annotation) if isinstance(choice, str))
    else:
        for argument in get_args(annotation):
            yield from _choices(argument)


def _key_choices(annotation: Any) -> tuple[str, ...]:
    """The keys that a mapping may have, where an annotation names them."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (dict, Mapping):
        return tuple(_choices(arguments[0]))
    inner = arguments if origin in (Union, types.UnionType) else arguments[:1] if origin is Annotated else ()
    return next(filter(None, map(_key_choices, inner)), ())


def _nearest(value: Any, annotation: Any) -> str:
    """The choice that a misspelt text may have meant."""
    choices = list(_choices(annotation))
    for text in value if isinstance(value, list | tuple) else [value]:
        close = difflib.get_close_matches(text, choices, n=1, cutoff=0.4) if isinstance(text, str) else []
        if close and text not in choices:
            return f" (did you mean '{close[0]}'?)"
    return ""
