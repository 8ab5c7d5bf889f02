"""One trial pass through a wrapped network: which operators are called in which order, and is every call sound?"""

import re
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from resq_rl.errors import NetworkError, UnsupportedOperatorError
from resq_rl.quantization.graph.operators import ResidualOperator, Switch
from resq_rl.quantization.specification.ledger import coverage_total

__all__ = ["Site", "check_agreement", "float_outputs", "multiplies", "trace"]

# Names of torch's operators that multiply and accumulate: products of matrices and vectors, convolutions, attention
# (the fused ones of nn.MultiheadAttention and nn.TransformerEncoderLayer too), recurrent layers, distances, transforms.
_MULTIPLIES = re.compile(
    r"conv|mm(_|$)|mv$|dot|matmul|(?<!bi)(?<!upsample_)(?<!upsample_tri)linear|attention|transformer|rnn|lstm|gru"
    r"|cdist|_fft|embedding_bag"
)
# Operators of other libraries may do anything, so they are refused; these are torch's own.
_NAMESPACES = ("aten", "prim", "prims", "profiler")
# Two orders of summation differ by about 1e-6 of the values, a mask in a pixel or two; a lost hook changes far more.
_AGREEMENT = 1e-3


@dataclass
class Site:
    """One call of an operator in a forward pass; an operator used twice makes two sites with a state of their own.

    Attributes:
        operator: the operator called.
        input_shape, output_shape: shapes of one clip's input and output, without the clip dimension.
        overwritten: whether later code overwrites the output in place, or the caller gets it and might, so that the
            stored reference needs a copy.
    """

    operator: ResidualOperator
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    overwritten: bool = False

    @property
    def name(self) -> str:
        """Name of the operator's layer."""
        return self.operator.name

    @property
    def input_elements(self) -> int:
        """Elements of one clip's input."""
        return int(torch.Size(self.input_shape).numel())

    @property
    def output_elements(self) -> int:
        """Elements of one clip's output."""
        return int(torch.Size(self.output_shape).numel())

    @property
    def output_size(self) -> tuple[int, ...]:
        """Height and width of the output; (1, 1) for a linear layer."""
        return self.output_shape[1:] if self.operator.channel_axis == 1 else (1, 1)

    def map_size(self, x: Tensor) -> tuple[int, int]:
        """Size of the level map for an input: one level per pixel, one in all for a linear layer."""
        return (x.shape[2], x.shape[3]) if self.operator.channel_axis == 1 else (1, 1)

    def coverage(self, size: tuple[int, int]) -> Float[Tensor, "h w"]:
        """How many (output position, tap) pairs read each pixel of an input of `size`."""
        return self.operator.geometry.coverage(size)

    @property
    def macs_per_pixel(self) -> int:
        """Multiply-accumulates per unit of coverage."""
        positions = 1
        if self.operator.channel_axis == -1:
            positions = int(torch.Size(self.input_shape[:-1]).numel())
        return self.operator.macs_per_tap * positions

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one frame; padding is not counted."""
        size = self.input_shape[1:] if self.operator.channel_axis == 1 else (1, 1)
        return coverage_total(self.coverage((size[0], size[1]))) * self.macs_per_pixel


def multiplies(operator: OpOverload) -> bool:
    """Whether one of torch's operators multiplies and accumulates, or is another library's, which might."""
    namespace, _, name = operator.name().split(".")[0].partition("::")
    return namespace not in _NAMESPACES or _MULTIPLIES.search(name) is not None


class _Watch(TorchDispatchMode):
    """Refuses multiply-accumulates that happen outside the operators."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.inside = False
        self.stack: list[str] = []

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.inside and multiplies(func):
            where = f"layer {self.stack[-1]!r}" if self.stack and self.stack[-1] else "the network's forward"
            raise UnsupportedOperatorError(
                f"{func.name()} in {where} cannot be quantized as a residual. Supported: 2-D convolution and "
                "transposed convolution with zero padding, and linear layers, as modules or in an exported program."
            )
        return func(*args, **(kwargs or {}))


def trace(network: nn.Module, switch: Switch, example: tuple[Tensor, ...]) -> list[Site]:
    """Run the inputs in `example` once in float and list the operator calls in order.

    Raises:
        UnsupportedOperatorError: multiply-accumulates outside the operators, named by layer.
        NetworkError: the network does not accept the example, or the clip dimension does not lead somewhere.
    """
    sites: list[Site] = []
    outputs: list[tuple[Tensor, int]] = []
    watch = _Watch()
    clips = 2
    inputs = tuple(part[:1].expand(clips, *part.shape[1:]).contiguous() for part in example)

    def record(operator: ResidualOperator, x: Tensor) -> Tensor:
        if len(x) != clips or x.dim() < 2 or (operator.channel_axis == 1 and x.dim() != 4):
            raise NetworkError(
                f"Layer {operator.name!r} is called on a tensor of shape {tuple(x.shape)} for a batch of {clips} "
                "clips; the clip dimension must lead in every layer."
            )
        watch.inside = True
        y = operator.float_output(x)
        watch.inside = False
        sites.append(Site(operator, tuple(x.shape[1:]), tuple(y.shape[1:])))
        outputs.append((y, y._version))
        return y

    switch.execute = record
    try:
        with torch.no_grad(), ExitStack() as stack:
            for name, module in network.named_modules():
                _follow(stack, watch, name, module)
            stack.enter_context(watch)
            returned = network(*inputs)
    except NetworkError:
        raise
    except Exception as error:
        raise NetworkError(
            f"{type(network).__name__} cannot run on frames of shape {_shapes(inputs)}: {error} "
            "It must take any number of clips (export programs with a dynamic batch dimension)."
        ) from error
    finally:
        switch.execute = ResidualOperator.float_output
    if not sites:
        raise NetworkError(f"{type(network).__name__} calls none of its layers in its forward.")
    handed_out = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(returned) if isinstance(leaf, Tensor)}
    for site, (y, version) in zip(sites, outputs, strict=True):
        site.overwritten = y._version != version or y.untyped_storage().data_ptr() in handed_out
    return sites


@torch.no_grad()
def float_outputs(network: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The floating-point tensors among a network's outputs, one row per clip or more.

    Raises:
        NetworkError: the network does not accept the frames.
    """
    try:
        leaves = tree_leaves(network(*inputs))
    except Exception as error:
        raise NetworkError(
            f"{type(network).__name__} cannot run on frames of shape {_shapes(inputs)}: {error}"
        ) from error
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() > 0]


def _shapes(inputs: tuple[Tensor, ...]) -> str:
    return " and ".join(str(tuple(part.shape)) for part in inputs)


def check_agreement(name: str, alone: list[Tensor], batch: list[Tensor]) -> None:
    """Check that a wrapped network gives for the first clips of a batch what the original gives for them alone.

    Args:
        name: of the network, for the message.
        alone: `float_outputs` of the original.
        batch: `float_outputs` of the wrapped network on the same clips followed by others.

    Raises:
        NetworkError: wrapping lost something (a hook on a layer), or clips influence each other, or outputs are random.
    """
    for expected, found in zip(alone, batch, strict=True):
        difference = (
            (found[: len(expected)] - expected).abs().nan_to_num(0.0).mean().item() if expected.numel() else 0.0
        )
        size = expected.abs().nan_to_num(0.0).mean().item() if expected.numel() else 0.0
        if difference > _AGREEMENT * size + 1e-6:
            raise NetworkError(
                f"{name} gives another output once wrapped (mean difference {difference:.3g}, magnitude {size:.3g}). "
                "Something in it does not survive: hooks on layers, statistics over the clips of a batch, memory "
                "between frames, or random numbers. Remove it, or export the network."
            )


def _follow(stack: ExitStack, watch: _Watch, name: str, module: nn.Module) -> None:
    def enter(*_: Any) -> None:
        watch.stack.append(name)

    def leave(*_: Any) -> None:
        watch.stack.pop()

    stack.callback(module.register_forward_pre_hook(enter).remove)
    stack.callback(module.register_forward_hook(leave).remove)
