"""One trial pass through a wrapped network: which operators are called in which order, and is every call sound?"""

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from resq_rl.errors import NetworkError, UnsupportedOperatorError
from resq_rl.quantization.ledger import coverage_total
from resq_rl.quantization.operators import ResidualOperator, Switch

__all__ = ["Site", "trace"]

_RECURRENT = ("mkldnn_rnn_layer", "lstm", "gru", "rnn_tanh", "rnn_relu", "_embedding_bag")


@dataclass
class Site:
    """One call of an operator in a forward pass; an operator used twice makes two sites with a state of their own.

    Attributes:
        operator: the operator called.
        input_shape, output_shape: shapes of one clip's input and output, without the clip dimension.
        overwritten: whether later code overwrites the output in place, so that the stored reference needs a copy.
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


class _Watch(TorchDispatchMode):
    """Refuses multiply-accumulates that happen outside the operators."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = False
        self.stack: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.inside and (func._overloadpacket in flop_registry or func._overloadpacket.__name__ in _RECURRENT):
            where = f"layer {self.stack[-1]!r}" if self.stack and self.stack[-1] else "the network's forward"
            raise UnsupportedOperatorError(
                f"{func.name()} in {where} cannot be quantized as a residual. Supported: 2-D convolution and transposed "
                "convolution with zero padding, and linear layers, as modules or in an exported program."
            )
        return func(*args, **(kwargs or {}))


def trace(network: nn.Module, switch: Switch, example: Float[Tensor, "b c h w"]) -> list[Site]:
    """Run `example` once in float and list the operator calls in order.

    Raises:
        UnsupportedOperatorError: multiply-accumulates outside the operators, named by layer.
        NetworkError: the network does not accept the example, or an operator is called without the clip dimension leading.
    """
    sites: list[Site] = []
    outputs: list[tuple[Tensor, int]] = []
    watch = _Watch()
    clips = 2
    frames = example[:1].expand(clips, -1, -1, -1).contiguous()

    def record(operator: ResidualOperator, x: Tensor) -> Tensor:
        if len(x) != clips or x.dim() < 2 or (operator.channel_axis == 1 and x.dim() != 4):
            raise NetworkError(
                f"Layer {operator.name!r} is called on a tensor of shape {tuple(x.shape)} for a batch of {clips} clips; "
                "the clip dimension must lead in every layer."
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
            network(frames)
    except (UnsupportedOperatorError, NetworkError):
        raise
    except Exception as error:
        raise NetworkError(
            f"{type(network).__name__} cannot run on frames of shape {tuple(frames.shape)}: {error}"
        ) from error
    finally:
        switch.execute = ResidualOperator.float_output
    if not sites:
        raise NetworkError(f"{type(network).__name__} calls none of its layers in its forward.")
    for site, (y, version) in zip(sites, outputs, strict=True):
        site.overwritten = y._version != version
    return sites


def _follow(stack: ExitStack, watch: _Watch, name: str, module: nn.Module) -> None:
    def enter(*_: Any) -> None:
        watch.stack.append(name)

    def leave(*_: Any) -> None:
        watch.stack.pop()

    stack.callback(module.register_forward_pre_hook(enter).remove)
    stack.callback(module.register_forward_hook(leave).remove)
