"""The tensors of a network's output, whatever its type."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten

from resq_rl.errors import NetworkError

__all__ = ["tensors_of"]

_PLAIN = (type(None), bool, int, float, complex, str, bytes, Enum)


def tensors_of(output: Any) -> Iterator[Tensor]:
    """The tensors in an output: of containers, data classes, types that torch knows as trees, and plain objects.

    Raises:
        NetworkError: a part of the output cannot be looked into.
    """
    if isinstance(output, Tensor):
        yield output
        return
    if isinstance(output, _PLAIN):
        return
    for part in _parts(output):
        yield from tensors_of(part)


def _parts(output: Any) -> list[Any]:
    if isinstance(output, Mapping):
        return list(output.values())
    if isinstance(output, list | tuple | set | frozenset):
        return list(output)
    if is_dataclass(output):
        return [getattr(output, field.name) for field in fields(output)]
    leaves, _ = tree_flatten(output)
    if not (len(leaves) == 1 and leaves[0] is output):
        return leaves
    if not hasattr(output, "__dict__") or isinstance(output, type) or callable(output):
        raise NetworkError(
            f"The network's output holds a {type(output).__name__}, whose tensors cannot be found. Return tensors, or "
            "tuples, lists, dictionaries or data classes of them."
        )
    return list(vars(output).values())
