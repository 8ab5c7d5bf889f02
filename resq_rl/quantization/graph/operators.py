"""The three linear operators that residual quantization knows, and what each costs.

Supported: 2-D convolution (any stride, dilation, groups, depthwise; zero padding), 2-D transposed convolution and
linear.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from resq_rl.quantization.specification.config import LayerKind

__all__ = ["Geometry", "Pair", "ResidualOperator", "Switch", "laid_out", "products_in"]

Pair = tuple[int, int]


@dataclass(frozen=True)
class Geometry:
    """Kind and shape arithmetic of an operator, hashable so that its coverage maps can be cached."""

    operator: Literal["conv2d", "conv_transpose2d", "linear"]
    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)  # left, right, top, bottom, as torch.nn.functional.pad
    dilation: Pair = (1, 1)
    groups: int = 1
    output_padding: Pair = (0, 0)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The operator itself."""
        if self.operator == "linear":
            return F.linear(x, weight, bias)
        left, right, top, bottom = self.padding
        if self.operator == "conv2d":
            if left == right and top == bottom:
                return F.conv2d(x, weight, bias, self.stride, (top, left), self.dilation, self.groups)
            return F.conv2d(F.pad(x, self.padding), weight, bias, self.stride, 0, self.dilation, self.groups)
        return F.conv_transpose2d(
            x, weight, bias, self.stride, (top, left), self.output_padding, self.groups, self.dilation
        )

    def coverage(self, size: Pair) -> Float[Tensor, "h w"]:
        """How many (output position, kernel tap) pairs read each input pixel of an input of `size`.

        A linear operator reads each input position once: its map has one position, multiplied by the count of
        positions in `macs_per_tap` of the caller.
        """
        return _coverage(self, size)

    def patches(
        self, x: Float[Tensor, "1 ..."], output_size: tuple[int, ...], positions: Int64[Tensor, " k"]
    ) -> Float[Tensor, "g k n"]:
        """The inputs that make each of some outputs, in the order of `ResidualOperator.weight_rows`.

        Args:
            x: the input of one clip.
            output_size: height and width of the output; not used by a linear operator.
            positions: flat indices of output positions.

        Returns:
            By channel group, one row per position: its product with a row of weights is the output there, but for the
            bias.
        """
        if self.operator == "linear":
            return x.flatten(0, -2)[None, positions.to(x.device)]
        width = output_size[1]
        rows, row_inside = self._taps(0, positions // width, x.shape[2])
        columns, column_inside = self._taps(1, positions % width, x.shape[3])
        inside = (row_inside[:, :, None] & column_inside[:, None, :]).to(x.device)
        taken = x[0][:, rows[:, :, None], columns[:, None, :]] * inside  # (channels, k, taps down, taps across)
        by_group: Tensor = taken.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(2)
        return by_group

    def _taps(self, axis: int, positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Along one axis, the input index under every tap of each output position, and whether it lies inside."""
        offset = torch.arange(self.kernel[axis]) * self.dilation[axis] - self.padding[2 if axis == 0 else 0]
        if self.operator == "conv2d":
            index = positions[:, None] * self.stride[axis] + offset
            return index.clamp(0, length - 1), (index >= 0) & (index < length)
        scaled = positions[:, None] - offset
        index = scaled // self.stride[axis]
        return index.clamp(0, length - 1), (scaled % self.stride[axis] == 0) & (index >= 0) & (index < length)


@lru_cache(maxsize=1024)
def _coverage(geometry: Geometry, size: Pair) -> Tensor:
    if geometry.operator == "linear":
        return torch.ones(1, 1)
    kernel = torch.ones(1, 1, *geometry.kernel)
    plain = Geometry(
        geometry.operator,
        geometry.kernel,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        1,
        geometry.output_padding,
    )
    # The gradient of sum(output) with respect to a pixel is the number of taps that read it.
    with torch.enable_grad():
        x = torch.zeros(1, 1, *size, requires_grad=True)
        (grad,) = torch.autograd.grad(plain.apply(x, kernel).sum(), x)
    return grad[0, 0].round()


class ResidualOperator(nn.Module):
    """Stands in a network for one linear operator; what it does is up to the execution in progress.

    Attributes:
        weight: the float weight as the network has it (BatchNorm folded), with `bias` or None.
        name: dotted name of the layer in the network.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, name: str, geometry: Geometry, weight: Tensor, bias: Tensor | None, switch: "Switch") -> None:
        super().__init__()
        self.name = name
        self.geometry = geometry
        self.register_buffer("weight", weight.detach().clone())
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self._switch = [switch]  # in a list, so that nn.Module neither registers nor copies it

    def forward(self, x: Tensor) -> Tensor:
        """Run the operator as the execution in progress demands."""
        return self._switch[0].call(self, x)

    def float_output(self, x: Tensor) -> Tensor:
        """The operator in float."""
        return self.geometry.apply(x, self.weight, self.bias)

    @property
    def out_channels(self) -> int:
        """Number of output channels."""
        if self.geometry.operator == "conv_transpose2d":
            return self.weight.shape[1] * self.geometry.groups
        return self.weight.shape[0]

    @property
    def macs_per_tap(self) -> int:
        """Multiply-accumulates of one (output position, tap) pair: (C_in / groups) * C_out."""
        per_group = self.weight.shape[0 if self.geometry.operator == "conv_transpose2d" else 1]
        if self.geometry.operator == "conv_transpose2d":
            return per_group // self.geometry.groups * self.out_channels
        return per_group * self.out_channels

    @property
    def channels_per_tap(self) -> int:
        """Input channels that one output reads under each tap."""
        return self.macs_per_tap // self.out_channels

    @property
    def layer_kind(self) -> LayerKind:
        """Kind of layer, by which residual weight bits can be set."""
        geometry = self.geometry
        if geometry.operator == "linear":
            return "linear"
        if geometry.groups > 1:
            return "depthwise" if self.macs_per_tap == self.out_channels else "grouped"
        if geometry.operator == "conv_transpose2d":
            return "transposed"
        return "pointwise" if geometry.kernel == (1, 1) else "conv"

    def weight_rows(self) -> Float[Tensor, "out n"]:
        """The weight with one row per output channel."""
        if self.geometry.operator != "conv_transpose2d":
            return self.weight.flatten(1)
        groups = self.geometry.groups
        grouped = self.weight.unflatten(0, (groups, -1))  # (g, in/g, out/g, kh, kw)
        rows: Tensor = grouped.transpose(1, 2).flatten(0, 1).flatten(1)
        return rows

    def rows_to_weight(self, rows: Float[Tensor, "out n"]) -> Tensor:
        """Inverse of `weight_rows`."""
        if self.geometry.operator != "conv_transpose2d":
            return rows.reshape(self.weight.shape)
        groups = self.geometry.groups
        _, out_per_group, kh, kw = self.weight.shape
        grouped = rows.reshape(groups, out_per_group, -1, kh, kw)
        return grouped.transpose(1, 2).reshape(self.weight.shape)

    def per_channel(self, values: Float[Tensor, " out"]) -> Tensor:
        """Values per output channel, shaped to broadcast over the operator's output."""
        return values if self.geometry.operator == "linear" else values[None, :, None, None]

    @property
    def channel_axis(self) -> int:
        """Axis of the input's channels."""
        return -1 if self.geometry.operator == "linear" else 1


def laid_out(tensors: tuple[Tensor, ...], layout: torch.memory_format) -> tuple[Tensor, ...]:
    """The tensors, those of images in a memory layout."""
    return tuple(x.contiguous(memory_format=layout) if x.dim() == 4 else x for x in tensors)


@contextmanager
def products_in(precision: Literal["bf16", "ieee"]) -> Iterator[None]:
    """Within, convolutions of float32 tensors on a CPU multiply in `precision` and accumulate in float32.

    Integers of up to 8 significant bits are exact in bfloat16, and so are their products in float32. Processors without
    bfloat16 units multiply in float32 all the same.
    """
    mkldnn: Any = torch.backends.mkldnn  # its attributes are made at run time
    before, mkldnn.conv.fp32_precision = mkldnn.conv.fp32_precision, precision
    try:
        yield
    finally:
        mkldnn.conv.fp32_precision = before


class Switch:
    """Holds the execution in progress; every operator of one wrapped network shares one switch."""

    def __init__(self) -> None:
        self.execute: Callable[[ResidualOperator, Tensor], Tensor] = ResidualOperator.float_output

    def call(self, operator: ResidualOperator, x: Tensor) -> Tensor:
        """Hand an operator's call to the execution in progress."""
        return self.execute(operator, x)
