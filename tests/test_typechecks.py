"""The run-time checks of types and shapes find what they are there for."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from beartype.roar import BeartypeCallHintViolation

from resq_rl.video import Clip
from tests import typechecks

SOURCE = """
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from jaxtyping import Float
from torch import Tensor

def add(x: Float[Tensor, "h w"], y: Float[Tensor, "h w"]) -> Float[Tensor, "h w"]:
    return x + y

def flat(x: Float[Tensor, "h w"]) -> Float[Tensor, "h w"]:
    return x.flatten()

def nested(x: Float[Tensor, "h w"], y: Float[Tensor, "w h"]) -> Float[Tensor, "h h"]:
    add(y, y)
    return x @ y

def lengths(names: Sequence[str], factor: float = 1) -> list[int]:
    return [len(name) for name in names]

def scaled(factor: float) -> Any:
    def within(x: Float[Tensor, "n n"]) -> float:
        return (factor * x).sum().item()
    def anything(x: Any) -> Any:
        return x * factor
    return within if factor else anything

@dataclass
class Same:
    x: int
    y: int

@dataclass
class Pair:
    x: Float[Tensor, " n"]
    y: Float[Tensor, " n"]

    @property
    def total(self) -> float:
        return self.x.sum()

    @staticmethod
    def of(x: Float[Tensor, " n"]) -> "Pair":
        return Pair(x, x)

    @classmethod
    def ones(cls, n: int) -> "Pair":
        return n
"""


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A module that was imported under the hook."""
    folder = tmp_path_factory.mktemp("package")
    (folder / "annotated_example.py").write_text(SOURCE, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        with typechecks.hook("annotated_example"):
            return importlib.import_module("annotated_example")


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape)


def test_what_fits_passes(checked: Any) -> None:
    assert checked.add(ones(2, 3), ones(2, 3)).shape == (2, 3)
    assert checked.nested(ones(2, 3), ones(3, 2)).shape == (2, 2), "h and w are other sizes in a call within"
    assert checked.lengths(["a"], 2) == [1]
    assert [checked.scaled(factor)(ones(2, 2)) for factor in (1, 2)] == [4, 8]
    assert checked.scaled(0)("a") == ""
    assert len(checked.Pair.of(ones(4)).x) == 4


@pytest.mark.parametrize(
    "call",
    [
        lambda m: m.add(ones(2, 3), ones(2, 4)),  # one name, two sizes
        lambda m: m.add(ones(2, 3), ones(2, 3).long()),
        lambda m: m.add(ones(2), ones(2)),
        lambda m: m.flat(ones(2, 3)),  # the result
        lambda m: m.lengths([1]),
        lambda m: m.lengths("a", "1"),
        lambda m: [m.scaled(factor)(ones(2, n)) for factor, n in ((1, 2), (2, 3))],  # the second closure of one code
        lambda m: m.Same(ones(3), ones(3)),  # the code of its __init__ is that of Pair
        lambda m: m.Pair(ones(3), ones(4)),
        lambda m: m.Pair.of(ones(3)).total,
        lambda m: m.Pair.of(ones(3, 3)),
        lambda m: m.Pair.ones(3),
    ],
)
def test_what_does_not_fit_is_found(checked: Any, call: Callable[[Any], Any]) -> None:
    with pytest.raises(BeartypeCallHintViolation):
        call(checked)


def test_checks_can_be_switched_off(checked: Any, unchecked_types: None) -> None:
    assert checked.flat(ones(2, 3)).shape == (6,)
    assert checked.lengths("a", "1") == [1]
    assert len(checked.Pair(ones(3), ones(4)).y) == 4


def test_first_calls_of_a_test_are_all_checked_and_later_ones_now_and_then(checked: Any) -> None:
    for _ in range(2):
        typechecks.begin_test()
        found = []
        for call in range(1, 4 * typechecks.APART + 1):
            try:
                checked.lengths("a", "1")
            except BeartypeCallHintViolation:
                found.append(call)
        assert found == [
            *range(1, typechecks.FIRST),
            *range(typechecks.FIRST, 4 * typechecks.APART + 1, typechecks.APART),
        ]


def test_the_package_is_checked() -> None:
    with pytest.raises(BeartypeCallHintViolation):
        Clip(ones(2, 3, 4, 4), None, 25.0, "frames that are no bytes", "test")
