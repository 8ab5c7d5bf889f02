"""Multiply-accumulates as torch counts them, independently of the package."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def without_padding(
    x: Any, w: Any, _b: Any, stride: Any, padding: Any, dilation: Any, transposed: bool, *rest: Any, **_: Any
) -> int:
    """Twice the multiply-accumulates of a convolution, of which taps on padding are none."""
    size, spatial = tuple(x[2:]), len(x) - 2
    ones = torch.ones(1, 1, *size), torch.ones(1, 1, *w[2:])
    apply = {1: (F.conv1d, F.conv_transpose1d), 2: (F.conv2d, F.conv_transpose2d)}[spatial][transposed]
    taps = apply(*ones, None, stride, padding, *((rest[0], 1, dilation) if transposed else (dilation,)))
    return 2 * int(taps.double().sum()) * int(x[0] * w[0] * w[1])


def counted(network: nn.Module, *inputs: Tensor) -> float:
    """Multiply-accumulates of a forward pass: half of what `torch.utils.flop_counter` counts."""
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution: without_padding})
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # a fused operator, which torch does not count
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            network(*inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops() / 2
