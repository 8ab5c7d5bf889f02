"""The three linear operators that residual quantization knows, and what each costs.

Supported: 1-D and 2-D convolution (any stride, dilation, groups, depthwise; zero padding), 2-D transposed convolution
and linear.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from resq_rl.errors import NetworkError
from resq_rl.quantization.specification.config import LayerKind

__all__ = [
    "Geometry",
    "LineOperator",
    "Pair",
    "ResidualOperator",
    "Switch",
    "exact_products",
    "laid_out",
    "own_types",
    "undisturbed",
]

Pair = tuple[int, int]


@dataclass(frozen=True)
class Geometry:
    """Kind and shape arithmetic of an operator, hashable so that its coverage maps can be cached.

    Attributes:
        line: whether the operator is a 1-D convolution, whose input lies as an image of one row. Where in the frame the
            row lies is not known, so one region decides for all of it.
    """

    operator: Literal["conv2d", "conv_transpose2d", "linear"]
    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)  # left, right, top, bottom, as torch.nn.functional.pad
    dilation: Pair = (1, 1)
    groups: int = 1
    output_padding: Pair = (0, 0)
    line: bool = False

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

    def rows(self, weight: Tensor) -> Float[Tensor, "out n"]:
        """A weight with one row per output channel."""
        if self.operator != "conv_transpose2d":
            return weight.flatten(1)
        grouped = weight.unflatten(0, (self.groups, -1))  # (g, in/g, out/g, kh, kw)
        rows: Tensor = grouped.transpose(1, 2).flatten(0, 1).flatten(1)
        return rows

    def coverage(self, size: Pair) -> Float[Tensor, "h w"]:
        """How many (output position, kernel tap) pairs read each input pixel of an input of `size`."""
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
        index = (rows[:, :, None] * x.shape[3] + columns[:, None, :]).to(x.device)
        taken = x[0].flatten(1).index_select(1, index.flatten()).unflatten(1, index.shape) * inside
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
        return torch.ones(size, dtype=torch.float32, device="cpu")
    kernel = torch.ones(1, 1, *geometry.kernel, dtype=torch.float32, device="cpu")
    plain = replace(geometry, groups=1)
    # The gradient of sum(output) with respect to a pixel is the number of taps that read it.
    with torch.inference_mode(False), torch.enable_grad(), exact_products(geometry, "cpu"):
        x = torch.zeros(1, 1, *size, dtype=torch.float32, device="cpu", requires_grad=True)
        (grad,) = torch.autograd.grad(plain.apply(x, kernel).sum(), x)
    return grad[0, 0].round()


class ResidualOperator(nn.Module):
    """One linear operator of a network; the execution in progress decides what a call does.

    It takes the place of a node in the graph of an exported program. For a layer of a module, `attach` makes it the
    layer's `forward`, so that the layer keeps its attributes, hooks and parameters.

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
        self.register_buffer("weight", weight.detach())
        self.register_buffer("bias", None if bias is None else bias.detach())
        self._switch = [switch]  # in a list, so that nn.Module neither registers nor copies it
        self._padded: dict[Pair, ResidualOperator] = {}

    def attach(self, layer: nn.Module) -> None:
        """Make calls of `layer` calls of this operator."""
        vars(layer)["forward"] = self.forward

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Run the operator as the execution in progress demands; the arguments are those of torch's own layers."""
        return self._switch[0].call(self if output_size is None else self._sized(input, list(output_size)), input)

    def _sized(self, x: Tensor, size: list[int]) -> "ResidualOperator":
        """The operator with the output padding under which a transposed convolution has an output of `size`."""
        geometry, smallest = self.geometry, []
        left, right, top, bottom = geometry.padding
        for axis, sides in enumerate((top + bottom, left + right)):
            reach = geometry.dilation[axis] * (geometry.kernel[axis] - 1) + 1
            smallest.append((x.shape[axis - 2] - 1) * geometry.stride[axis] - sides + reach)
        padding = [wanted - least for wanted, least in zip(size[-2:], smallest, strict=False)]
        most = map(max, geometry.stride, geometry.dilation)
        fits = len(padding) == 2 and all(0 <= p < bound for p, bound in zip(padding, most, strict=True))
        if geometry.operator != "conv_transpose2d" or not fits:
            raise NetworkError(
                f"Layer {self.name!r} is called on a tensor of shape {tuple(x.shape)} with output_size {size}, which "
                "it cannot make."
            )
        own = padding[0], padding[1]
        if own == geometry.output_padding:
            return self
        if own not in self._padded:
            geometry = replace(geometry, output_padding=own)
            self._padded[own] = ResidualOperator(self.name, geometry, self.weight, self.bias, self._switch[0])
        return self._padded[own]

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
        """The weight in float32 with one row per output channel."""
        return self.geometry.rows(self.weight).float()

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

    def by_output(self, values: Float[Tensor, " in"]) -> Float[Tensor, " out"]:
        """Values that all input channels of a group have in common, by output channel."""
        groups = self.geometry.groups
        one_each: Tensor = values.unflatten(0, (groups, -1))[:, 0]
        return one_each.repeat_interleave(self.out_channels // groups)

    @property
    def channel_axis(self) -> int:
        """Axis of the input's channels."""
        return -1 if self.geometry.operator == "linear" else 1


class LineOperator(ResidualOperator):
    """The operator of a 1-D convolution, which takes (b, c, n): a linear layer of n vectors, or an image of one row."""

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Run the operator as the execution in progress demands."""
        if self.geometry.operator == "linear":
            return super().forward(input.transpose(1, 2)).transpose(1, 2)
        return super().forward(input.unsqueeze(2)).squeeze(2)


def laid_out(tensors: tuple[Tensor, ...], layout: torch.memory_format) -> tuple[Tensor, ...]:
    """The tensors, those of images in a memory layout."""
    return tuple(x.contiguous(memory_format=layout) if x.dim() == 4 else x for x in tensors)


@contextmanager
def exact_products(geometry: Geometry, device: str) -> Iterator[None]:
    """Within, the operator multiplies float32 tensors as such: a lower precision of the process has no effect."""
    backends: Any = torch.backends  # its attributes are made at run time
    linear = geometry.operator == "linear"
    if device == "cuda":
        setting = backends.cuda.matmul if linear else backends.cudnn.conv
    else:
        setting = backends.mkldnn.matmul if linear else backends.mkldnn.conv
    before = setting.fp32_precision
    setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        setting.fp32_precision = before


def own_types() -> AbstractContextManager[Any]:
    """Within, tensors keep the types they have: an autocast around the call has no effect."""
    active = [device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]
    if not active:
        return nullcontext()
    stack = ExitStack()
    for device in active:
        stack.enter_context(torch.autocast(device, enabled=False))
    return stack


@contextmanager
def undisturbed() -> Iterator[None]:
    """Within, nothing around the call changes results: no gradients, inference tensors or autocast."""
    with torch.inference_mode(False), torch.no_grad(), own_types():  # references have versions, inference tensors none
        yield


class Switch:
    """Holds the execution in progress; every operator of one wrapped network shares one switch."""

    def __init__(self) -> None:
        self.execute: Callable[[ResidualOperator, Tensor], Tensor] = ResidualOperator.float_output

    def call(self, operator: ResidualOperator, x: Tensor) -> Tensor:
        """Hand an operator's call to the execution in progress."""
        return self.execute(operator, x)
