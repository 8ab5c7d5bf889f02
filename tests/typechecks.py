"""Checks of annotated types and shapes at run time, put into a package by the import hook of jaxtyping."""

import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import CodeType, FunctionType
from typing import Any, get_args

import jaxtyping
from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray

__all__ = ["begin_test", "hook"]

# Calls of a function in a test that are all checked, and how many calls there are for each one checked after those.
FIRST, APART = 16, 16

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # as for mypy, an int will do where a float is wanted
_closures: dict[tuple[str, CodeType], Any] = {}
_sizes = jaxtyping.jaxtyped  # as a context, it opens a scope in which names of axes mean sizes
_tests = [0]  # how many have begun


def hook(package: str) -> AbstractContextManager[object]:
    """Check every annotated argument and result of a package that is not imported yet.

    The import hook puts `jaxtyping.jaxtyped` before every function. That binds the arguments to the signature and
    checks them twice, for better messages, which takes most of the time of a test. `checked` checks the same once. In
    every test it checks the first calls of each function, and few of the calls after those: a simulation makes the same
    calls at every frame.
    """
    jaxtyping.jaxtyped = checked  # type: ignore[assignment]
    manager: AbstractContextManager[object] = jaxtyping.install_import_hook(package, None)
    return manager


def begin_test() -> None:
    """Check the next calls of every function again."""
    _tests[0] += 1


def checked(*, typechecker: object) -> Callable[[Any], Any]:
    """Stands in for `jaxtyping.jaxtyped`; the checker is always beartype."""
    return _checked


def _checked(given: Any) -> Any:
    if inspect.isclass(given):
        if "__dataclass_fields__" in vars(given) and "__init__" in vars(given):
            given.__init__ = _checked(given.__init__)  # type: ignore[method-assign]
        return given
    if isinstance(given, (classmethod, staticmethod)):
        return type(given)(_checked(given.__func__))
    if isinstance(given, property):
        return property(*(function and _checked(function) for function in (given.fget, given.fset, given.fdel)))
    if not given.__annotations__ or getattr(given, "__no_type_check__", False):
        return given
    if "<locals>" not in given.__qualname__:
        return _switched(given, None)
    strict = _check_closure(given)
    return given if strict is given else _switched(given, strict)


def _check_closure(given: FunctionType) -> FunctionType:
    """Check a function within another, which is made anew in every call; its checks are compiled once."""
    key = given.__code__.co_filename, given.__code__
    if key not in _closures:
        _closures[key] = _check(given)
    strict = _closures[key]
    if "__beartype_func" not in (strict.__kwdefaults__ or {}):  # nothing to check
        return given
    own = FunctionType(strict.__code__, strict.__globals__, strict.__name__, strict.__defaults__, strict.__closure__)
    own.__kwdefaults__ = {**strict.__kwdefaults__, "__beartype_func": given}
    return own


def _switched(plain: Callable[..., Any], strict: Callable[..., Any] | None) -> Callable[..., Any]:
    """The strict function unless checks are switched off or it is not its turn, in a scope of its own if it names axes.

    None stands for checks that are compiled when they are first needed: few tests call every function.
    """
    config = jaxtyping.config
    named = any(map(_names_axes, plain.__annotations__.values()))
    test, calls = 0, 0

    @functools.wraps(plain)
    def call(*args: Any, **settings: Any) -> Any:
        nonlocal strict, test, calls
        if config.jaxtyping_disable:
            return plain(*args, **settings)
        if test != _tests[0]:
            test, calls = _tests[0], 0
        calls += 1
        if calls > FIRST and calls % APART:
            function = plain
        else:
            function = strict = strict or _check(plain)
        if not named:
            return function(*args, **settings)
        with _sizes("context"):  # of an unchecked function too: its generators check their arguments in its scope
            return function(*args, **settings)

    return call


def _names_axes(annotation: Any) -> bool:
    if isinstance(annotation, str):
        return "[" in annotation  # a forward reference, perhaps to an array
    return (inspect.isclass(annotation) and issubclass(annotation, AbstractArray)) or any(
        map(_names_axes, get_args(annotation))
    )
