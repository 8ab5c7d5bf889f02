"""Products of activations: matrix products of which a factor depends on the frame and none is a layer's weight.

Attention is made of them. Whatever form a network writes them in (`@`, `einsum`, `scaled_dot_product_attention`,
`nn.MultiheadAttention`), torch breaks it down to the operators in `FACTORS` under `decomposed`, and each call of one of
those is a site of its own.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.nn.attention import SDPBackend, sdpa_kernel

from resq_rl.quantization.graph.memory import EagerMode
from resq_rl.quantization.specification.costs import LayerSize

__all__ = ["FACTORS", "ProductCalls", "ProductSite", "decomposed", "factors_of", "product_macs"]

_ATEN = torch.ops.aten
# The operators that multiply two matrices (or a matrix and a vector), and where the first factor stands among the
# arguments: behind what is added to the product, if anything is.
FACTORS: dict[OpOverload, int] = {
    _ATEN.mm.default: 0,
    _ATEN.bmm.default: 0,
    _ATEN.mv.default: 0,
    _ATEN.addmm.default: 1,
    _ATEN.addmv.default: 1,
    _ATEN.addbmm.default: 1,
    _ATEN.baddbmm.default: 1,
}


@dataclass(frozen=True)
class ProductSite:
    """One call of a product of activations in a forward pass.

    It has neither weights nor references: both factors are quantized anew in every frame, at key precision.

    Attributes:
        name: dotted name of the module that makes the call, and the number of the product in it.
        macs: multiply-accumulates of one frame.
        input_elements, output_elements: elements of both factors and of the product for one clip.
        contracted: products that are summed into one value.
    """

    name: str
    macs: int
    input_elements: int
    output_elements: int
    contracted: int

    layer_kind: ClassVar[Literal["product"]] = "product"

    @property
    def size(self) -> LayerSize:
        """What the cost of a multiply-accumulate may depend on."""
        return LayerSize("product", self.macs, self.input_elements, 0)

    @property
    def output_size(self) -> tuple[int, int]:
        """A product has no place in the frame: (1, 1)."""
        return 1, 1


def factors_of(func: OpOverload, args: Any) -> tuple[Tensor, Tensor]:
    """The two factors of a call of an operator of `FACTORS`."""
    first = FACTORS[func]
    return args[first], args[first + 1]


def product_macs(func: OpOverload, args: Any) -> int:
    """Multiply-accumulates of a call, over all clips: (..., n, k) times (..., k, m) takes n k m for each matrix."""
    a, b = factors_of(func, args)
    return a.numel() * (b.shape[-1] if b.dim() > 1 else 1)


@contextmanager
def decomposed() -> Iterator[None]:
    """Within, attention runs as the matrix products that it is made of, on any device, and as no fused operator."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class ProductCalls(EagerMode):
    """Hands the calls of operators of `FACTORS` to `execute`, which returns the product."""

    def __init__(self, execute: Callable[[OpOverload, Any, Any], Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.execute = execute

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return self.execute(func, args, kwargs) if func in FACTORS else func(*args, **kwargs)
