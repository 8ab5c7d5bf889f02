"""Frames with gradients to their thresholds: levels are hard in the forward pass, their gates smooth in the backward.

With the gate of a level g_j = 1 where m > tau kappa_j, else 0 (j = 1 .. L - 1), the codes of a residual and the cost of
a pixel are sums over the gates,

    codes = Q_0(r) + sum over j of g_j (Q_j(r) - Q_(j-1)(r)),      a = a_0 + sum over j of g_j (a_j - a_(j-1)),

so that a gradient reaches tau through both. Backwards a gate is sigmoid(k (log m - log tau kappa_j)), and a quantizer
the identity where it does not clip (straight-through estimators, Bengio et al., arXiv 1308.3432). Keyframes have no
gradient.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from resq_rl.errors import PolicyError, SettingsError
from resq_rl.quantization.kernels.plain import quantize
from resq_rl.quantization.quantizers.residual import ResidualTable
from resq_rl.quantization.running.execution import Execution, SitePlan
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
        shape = x.shape if operator.channel_axis == 1 else (len(x), -1, 1, 1)  # a linear layer has one level
        codes, cost = self._codes(plan, (x - reference).reshape(shape), table)
        codes = codes.reshape(x.shape)
        self._costs.append(cost)
        if state.reference == "previous":
            moved = torch.addcmul(reference, codes, codes.new_tensor(table.step))
            state.inputs[position] = (
                moved if isinstance(rows, slice) else state.inputs[position].index_copy(0, rows, moved)
            )
        total = operator.geometry.apply(codes, plan.residual.codes)
        return torch.addcmul(before, total, plan.residual.scale * table.step)

    def _codes(
        self, plan: SitePlan, residual: Float[Tensor, "b c h w"], table: ResidualTable
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b h w"]]:
        """Codes of the residual, and the cost of a multiply-accumulate by pixel."""
        tau, row = self._carried_to(plan, (residual.shape[2], residual.shape[3]))
        assert tau is not None  # as of all fields of thresholds
        kappa = tuple(self.decision.kappa)  # type: ignore[union-attr] # no field of levels comes here
        steps = [part[row].unbind(-1) for part in table.steps(kappa, residual.device)]
        codes, *finer = [self._quantized(residual, table.step, *level) for level in zip(*steps, strict=True)]
        cost, coarser = torch.full_like(tau, plan.costs[0]), codes
        magnitude = residual.abs().amax(1)
        for j, factor in enumerate(kappa):
            gate = self._gate(magnitude, tau, table.sigma, factor)
            codes = codes + gate[:, None] * (finer[j] - coarser)
            cost = cost + gate * (plan.costs[j + 1] - plan.costs[j])
            coarser = finer[j]
        return codes, cost

    def _gate(
        self, magnitude: Float[Tensor, "b h w"], tau: Float[Tensor, "b h w"], sigma: float, factor: float
    ) -> Float[Tensor, "b h w"]:
        bound = tau * sigma * factor
        soft = torch.sigmoid(self._sharpness * (magnitude.clamp_min(SMALLEST * sigma) / bound).log())
        return soft if self._smooth else (magnitude > bound) + (soft - soft.detach())

    def _quantized(
        self, residual: Float[Tensor, "b c h w"], step: float, inverse: Tensor, limit: Tensor, unit: Tensor
    ) -> Float[Tensor, "b c h w"]:
        """Integer codes of the residual at one level, with the gradient of clipping alone."""
        inverse, limit, unit = (part[:, None] for part in (inverse, limit, unit))
        clipped = (residual / step).clamp(-limit * unit, limit * unit)
        if self._smooth:
            return clipped
        return quantize(residual.detach(), inverse, limit, unit) + (clipped - clipped.detach())
