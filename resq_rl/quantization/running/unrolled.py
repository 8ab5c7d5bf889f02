"""Frames with gradients to their thresholds: levels are hard in the forward pass, their gates smooth in the backward.

With the gate of a level g_j = 1 where m > tau kappa_j, else 0 (j = 1 .. L - 1), the codes of a residual and the cost of
a pixel are sums over the gates,

    codes = Q_0(r) + sum over j of g_j (Q_j(r) - Q_(j-1)(r)),      a = a_0 + sum over j of g_j (a_j - a_(j-1)),

so that a gradient reaches tau through both. Backwards a gate is sigmoid(k (log m - log tau kappa_j)), and a quantizer
the identity where it does not clip (straight-through estimators, Bengio et al., arXiv 1308.3432). Keyframes have no
gradient.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from resq_rl.errors import PolicyError, SettingsError
from resq_rl.quantization.graph.operators import Pair
from resq_rl.quantization.kernels.blocks import joined, split, spread, summed
from resq_rl.quantization.kernels.plain import from_image, quantize
from resq_rl.quantization.quantizers.residual import ResidualTable
from resq_rl.quantization.running.execution import Execution, as_image
from resq_rl.quantization.running.plans import SitePlan
from resq_rl.quantization.specification.fields import LevelField

__all__ = ["UnrolledExecution"]

SMALLEST = 1e-6  # magnitude over sigma, whose logarithm is finite


class UnrolledExecution(Execution):
    """Runs every operator of one pass as `Execution` does, with gradients from outputs and costs to the thresholds.

    Args:
        sharpness: k, the slope of a gate over log m in the backward pass.
        smooth: use the smooth gates and unrounded codes in the forward pass too, of which the gradient is exact.

    Raises:
        PolicyError: the decision is a field of levels, or holds a threshold of 0.
        SettingsError: the sharpness is not positive.
    """

    def __init__(self, *execution: Any, sharpness: float, smooth: bool) -> None:
        super().__init__(*execution)
        if isinstance(self.decision, LevelField) or bool((self.decision.thresholds <= 0).any()):
            raise PolicyError("Gradients reach thresholds through their logarithms: give a field of positive ones.")
        if not sharpness > 0:
            raise SettingsError(f"The sharpness of a gate must be positive, got {sharpness}.")
        self._sharpness, self._smooth = sharpness, smooth

    def _keyframe(self, plan: SitePlan, x: Tensor, rows: Any) -> Tensor:
        return super()._keyframe(plan, x.detach(), rows)

    def _residual(self, plan: SitePlan, x: Tensor, rows: Any) -> Tensor:
        state, position, operator = self.state, self.position, plan.site.operator
        table = plan.ranges.residual[state.reference]
        reference, before = state.inputs[position][rows], state.outputs[position][rows]
        image = as_image(plan.site, x - reference)
        gates = self._gates(plan, table, (image.shape[2], image.shape[3]))
        codes, cost = _Gated.apply(split(image, plan.blocks), gates.tau, gates)  # type: ignore[no-untyped-call]
        codes = from_image(operator.geometry, joined(codes, plan.blocks), x.shape[:-1])
        self._note(plan.site, summed(cost, plan.blocks), rows)
        if state.reference == "previous":
            moved = torch.addcmul(reference, codes, codes.new_tensor(table.step))
            state.inputs[position] = (
                moved if isinstance(rows, slice) else state.inputs[position].index_copy(0, rows, moved)
            )
        total = operator.geometry.apply(codes, plan.residual.codes)
        return torch.addcmul(before, total, plan.residual.scaled(table.step))

    def _gates(self, plan: SitePlan, table: ResidualTable, size: Pair) -> "_Gates":
        tau, row = self._carried_to(plan, size)
        assert tau is not None  # as of all fields of thresholds
        tau, row = spread(tau, plan.blocks), spread(row, plan.blocks)
        kappa = tuple(self.decision.kappa)  # type: ignore[union-attr] # no field of levels comes here
        columns = [part[row].unbind(-1) for part in table.steps(kappa, tau.device)]
        columns.append(tuple(torch.full_like(columns[0][0], cost) for cost in plan.costs))
        levels = [_Level(*numbers) for numbers in zip(*columns, strict=True)]
        return _Gates(tau, levels, table.sigma, table.step, kappa, self._sharpness, self._smooth)


@dataclass(frozen=True)
class _Level:
    """The quantizer of a level by pixel, and its cost; all of shape (b, h, w)."""

    inverse: Tensor  # 1 / step
    limit: Tensor  # largest code
    unit: Tensor  # units in the step
    cost: Tensor  # of a multiply-accumulate

    def codes(self, residual: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Integer codes."""
        return quantize(residual, *(part[:, None] for part in (self.inverse, self.limit, self.unit)))

    def clipped(self, residual: Float[Tensor, "b c h w"], step: float) -> Float[Tensor, "b c h w"]:
        """Codes that were not rounded."""
        bound = (self.limit * self.unit)[:, None]
        return (residual / step).clamp(-bound, bound)


@dataclass(frozen=True)
class _Gates:
    """The levels of one operator call, and what opens their gates.

    Attributes:
        tau: thresholds.
        sigma, step: as of `ResidualTable`.
        sharpness, smooth: as of `UnrolledExecution`.
    """

    tau: Float[Tensor, "b h w"]
    levels: Sequence[_Level]
    sigma: float
    step: float
    kappa: tuple[float, ...]
    sharpness: float
    smooth: bool

    def soft(self, magnitude: Float[Tensor, "b h w"]) -> list[Float[Tensor, "b h w"]]:
        """The smooth gate of each level above the lowest."""
        ratio = magnitude.clamp_min(SMALLEST * self.sigma) / (self.tau * self.sigma)
        return [torch.sigmoid(self.sharpness * (ratio / factor).log()) for factor in self.kappa]

    def taken(self, magnitude: Float[Tensor, "b h w"]) -> list[tuple[Float[Tensor, "b 1 h w"], _Level]]:
        """The levels that a pixel takes, each with its share g_j - g_(j+1); without `smooth` it takes one."""
        bound = self.tau * self.sigma
        gates = self.soft(magnitude) if self.smooth else [(magnitude > bound * k).to(bound) for k in self.kappa]
        ends = [torch.ones_like(bound), *gates, torch.zeros_like(bound)]
        shares = [one - finer for one, finer in pairwise(ends)]
        if self.smooth:
            return [(share[:, None], level) for share, level in zip(shares, self.levels, strict=True)]
        numbers = zip(*((level.inverse, level.limit, level.unit, level.cost) for level in self.levels), strict=True)
        chosen = (torch.stack([s * v for s, v in zip(shares, values, strict=True)]).sum(0) for values in numbers)
        return [(ends[0][:, None], _Level(*chosen))]

    def codes(self, residual: Float[Tensor, "b c h w"], level: _Level) -> Float[Tensor, "b c h w"]:
        """Codes of the residual at a level."""
        return level.clipped(residual, self.step) if self.smooth else level.codes(residual)


class _Gated(torch.autograd.Function):
    """Codes of a residual and the cost of each pixel. The backward pass computes anew what it needs of the levels."""

    @staticmethod
    def forward(
        ctx: Any, residual: Float[Tensor, "b c h w"], tau: Float[Tensor, "b h w"], gates: _Gates
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b h w"]]:
        ctx.save_for_backward(residual)
        ctx.gates = gates = replace(gates, tau=tau)  # without its history
        codes, cost = torch.zeros_like(residual), torch.zeros_like(tau)
        for share, level in gates.taken(residual.abs().amax(1)):
            codes += share * gates.codes(residual, level)
            cost += share[:, 0] * level.cost
        return codes, cost

    @staticmethod
    def backward(ctx: Any, *by: Tensor) -> tuple[Tensor, Tensor, None]:
        (residual,), gates, (by_codes, by_cost) = ctx.saved_tensors, ctx.gates, by
        size = residual.abs()
        magnitude = size.amax(1)
        inside = torch.zeros_like(residual)
        for share, level in gates.taken(magnitude):
            inside += share * (size <= (gates.step * level.limit * level.unit)[:, None])
        by_level = [(by_codes * gates.codes(residual, v)).sum(1) + by_cost * v.cost for v in gates.levels]
        by_log = torch.zeros_like(magnitude)  # of the magnitude over tau
        for soft, (coarser, finer) in zip(gates.soft(magnitude), pairwise(by_level), strict=True):
            by_log += gates.sharpness * soft * (1 - soft) * (finer - coarser)
        by_magnitude = torch.where(magnitude > SMALLEST * gates.sigma, by_log / magnitude, 0.0)
        largest = residual.sign() * (size == magnitude[:, None])
        by_residual = by_codes * inside / gates.step + largest * by_magnitude[:, None]
        return by_residual, -by_log / gates.tau, None
