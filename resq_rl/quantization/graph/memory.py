"""Tensors as views of blocks of memory, and what torch's operators do to them."""

import re
from typing import Any

from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["MOVES", "EagerMode", "base_name", "block_of", "geometry_of", "written"]

# Operators that put values elsewhere, unchanged, beside views, which share memory.
MOVES = re.compile(
    r"^(_to_copy|_reshape_alias|_unsafe_view|.*_copy|cat|channel_shuffle|clone|constant_pad_nd|contiguous|copy|diag.*"
    r"|flip|gather|im2col|index|index_select|_unsafe_index|lift.*|masked_select|pixel_shuffle|pixel_unshuffle"
    r"|reflection_pad.*|replication_pad.*|repeat|repeat_interleave|roll|rot90|.*_scatter|stack|take|take_along_dim|tril"
    r"|triu|unfold|_pad_.*)$"
)


class EagerMode(TorchDispatchMode):
    """A dispatch mode around eager passes, for which PyTorch need not import its compiler: that takes seconds."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


def block_of(t: Tensor) -> int:
    """Identity of the block of memory that a tensor lies in."""
    return int(t.untyped_storage()._cdata)


def base_name(func: OpOverload) -> str:
    """The operator's name without namespace and overload, and without the sign of one that works in place."""
    name = str(func.name()).split(".")[0].partition("::")[2]
    return name[:-1] if name.endswith("_") else name


def geometry_of(t: Tensor) -> Any:
    """Size, stride and offset of a tensor in its block."""
    return tuple(t.size()), t.stride(), t.storage_offset()


def written(func: OpOverload, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors among the arguments that an operator writes to."""
    names = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    if not names:
        return []
    given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    return [t for n in names for t in tree_leaves(given.get(n)) if isinstance(t, Tensor)]
