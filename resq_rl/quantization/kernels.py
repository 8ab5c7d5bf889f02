"""The elementwise work around an operator: magnitudes, codes and references, in as few passes over memory as can be.

The functions are plain PyTorch. `compiled` gives the same ones fused by `torch.compile` into a loop each. Both give the
same numbers bit for bit: every step rounds once, and the multiply-adds, which round once as well, stay contracted.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

__all__ = ["PLAIN", "Kernels", "affine_codes", "choose", "compiled", "encode"]

log = logging.getLogger(__name__)

Chosen = tuple[Tensor, Tensor, Tensor, Tensor]
"""1 / step, largest code, units and cost of each pixel."""


def encode(
    x: Float[Tensor, "*n"],
    reference: Float[Tensor, "*#n"],
    inverse: Float[Tensor, "*#n"],
    limit: Float[Tensor, "*#n"],
    unit: Float[Tensor, "*#n"],
    step: Float[Tensor, ""] | None = None,
) -> Float[Tensor, "*n"]:
    """Integer codes of the residual: clamp(round((x - reference) * inverse), -limit, limit) * unit.

    With `step` the reference moves by codes * step, in place (the closed loop).
    """
    codes = (x - reference).mul_(inverse).round_()
    codes = codes.clamp_(-limit, limit).mul_(unit)
    if step is not None:
        reference.addcmul_(codes, step)
    return codes


def choose(
    magnitude: Float[Tensor, "b h w"],
    tau: Float[Tensor, "b h w"],
    row: Int64[Tensor, "b h w"],
    sigma: Float[Tensor, ""],
    kappa: Float[Tensor, " k"],
    steps: Float[Tensor, "4 n"],
) -> Chosen:
    """`ResidualTable.lookup` of each pixel under thresholds tau, whose level is #{j : m > tau * sigma * kappa_j}.

    Returns:
        1 / step, largest code, units and cost, each (b, h, w).
    """
    bound = tau * sigma
    index = row * (len(kappa) + 1)
    for factor in kappa.unbind():
        index = index + (magnitude > bound * factor)
    inverse, limit, unit, cost = steps.unbind()
    return inverse[index], limit[index], unit[index], cost[index]


def encode_by_thresholds(
    x: Float[Tensor, "b c h w"],
    reference: Float[Tensor, "b c h w"],
    tau: Float[Tensor, "b h w"],
    row: Int64[Tensor, "b h w"],
    sigma: Float[Tensor, ""],
    kappa: Float[Tensor, " k"],
    steps: Float[Tensor, "4 n"],
    step: Float[Tensor, ""] | None = None,
) -> tuple[Float[Tensor, "b c h w"], Chosen]:
    """`encode` with what `choose` takes for the largest magnitude of each pixel's residual over the channels.

    What was chosen is returned, so that the compiler keeps it instead of working it out again for every channel.
    """
    chosen = choose((x - reference).abs_().amax(1), tau, row, sigma, kappa, steps)
    inverse, limit, unit, _ = (part[:, None] for part in chosen)
    return encode(x, reference, inverse, limit, unit, step), chosen


def affine_codes(
    x: Float[Tensor, "*n"], step: Float[Tensor, ""], low: Float[Tensor, ""], high: Float[Tensor, ""]
) -> Float[Tensor, "*n"]:
    """Integer codes clamp(round(x / step), low, high)."""
    return (x / step).round_().clamp_(low, high)


def encode_keyframe(
    x: Float[Tensor, "*n"], step: Float[Tensor, ""], low: Float[Tensor, ""], high: Float[Tensor, ""]
) -> tuple[Float[Tensor, "*n"], Float[Tensor, "*n"]]:
    """`affine_codes` and their values."""
    codes = affine_codes(x, step, low, high)
    return codes, codes * step


@dataclass(frozen=True)
class Kernels:
    """One way to run the functions of this module.

    Attributes:
        device: for which they were compiled; None for the plain ones. A copy in another process is compiled there.
    """

    encode: Callable[..., Tensor] = encode
    encode_by_thresholds: Callable[..., tuple[Tensor, Chosen]] = encode_by_thresholds
    encode_keyframe: Callable[..., tuple[Tensor, Tensor]] = encode_keyframe
    device: torch.device | None = None

    def __reduce__(self) -> tuple[Callable[..., "Kernels"], tuple[Any, ...]]:
        return (Kernels, ()) if self.device is None else (compiled, (self.device,))


PLAIN = Kernels()

RECOMPILE_LIMIT = 64

# Without contraction, a * b + c would round twice; with a pool of compilers, short runs would wait for it to start.
_OPTIONS: dict[str, Any] = {"cpp.enable_floating_point_contract_flag": "fast", "compile_threads": 1}


def compiled(device: torch.device | str = "cpu") -> Kernels:
    """Fused kernels; the plain ones, and a line in the log, where nothing on this machine can compile for `device`.

    The first use on a machine compiles for some seconds; later ones find the result on disk. PyTorch's own switch,
    TORCH_COMPILE_DISABLE=1 in the environment, is heeded.
    """
    if os.environ.get("TORCH_COMPILE_DISABLE") == "1":
        return PLAIN
    # Sizes of 1 are compiled apart, for each argument that may have them.
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, RECOMPILE_LIMIT)
    functions: tuple[Callable[..., Any], ...] = (encode, encode_by_thresholds, encode_keyframe)
    fused = [torch.compile(function, dynamic=True, options=_OPTIONS) for function in functions]
    kernels = Kernels(fused[0], fused[1], fused[2], torch.device(device))
    example = torch.zeros(2, 2, 2, 2, device=device)
    one = torch.ones((), device=device)
    try:
        with torch.no_grad():
            kernels.encode_keyframe(example, one, -one, one)
    except Exception as error:  # a compiler can fail in many ways
        reason = str(error).strip().split("\n")[0][:200]
        log.info("Kernels run uncompiled, which is slower: %s (%s).", reason, type(error).__name__)
        return PLAIN
    return kernels
