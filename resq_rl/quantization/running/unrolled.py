"""Residual frames with gradients: levels are hard in the forward pass, and their gates are smooth in the backward pass.

With a level's gate g_j = 1 where m > tau kappa_j, else 0 (j = 1 .. L - 1), a residual and its cost are sums over the
gates,

    r^ = Q_0(r) + sum over j of g_j (Q_j(r) - Q_(j-1)(r)),      a = a_0 + sum over j of g_j (a_j - a_(j-1)),

so that a gradient reaches tau through both. Backwards a gate is sigmoid(k (log m - log tau kappa_j)) and a quantizer
the identity where it does not clip (straight-through estimators, Bengio et al., arXiv 1308.3432). The surrogate is for
gradients alone: what is reported is measured by `ResQModel.step`.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from resq_rl.quantization.graph.operators import ResidualOperator
from resq_rl.quantization.quantizers.residual import ResidualTable, threshold_row
from resq_rl.quantization.running.execution import SitePlan, check_order
from resq_rl.quantization.running.state import StreamState

__all__ = ["UnrolledExecution"]

SMALLEST = 1e-6  # magnitude, whose logarithm is finite


class UnrolledExecution:
    """Runs every operator of one residual pass differentiably in its thresholds.

    Args:
        plans: the operator calls (sites), in order.
        state: of the clips; its references are replaced, and keep their gradients.
        log_tau: logarithm of the threshold of each clip and site.
        kappa: multipliers of the thresholds by level.
        sharpness: k, the slope of a gate over log m in the backward pass.
        smooth: use the smooth gates in the forward pass too, as a reference for tests of the gradient.
    """

    def __init__(
        self,
        plans: Sequence[SitePlan],
        state: StreamState,
        log_tau: Float[Tensor, "b s"],
        kappa: tuple[float, ...],
        sharpness: float,
        *,
        smooth: bool = False,
    ) -> None:
        self.plans, self.state, self.log_tau, self.kappa = plans, state, log_tau, kappa
        self.sharpness, self.smooth = sharpness, smooth
        self.sites = [plan.site for plan in plans]
        self.position = 0
        self.bops: list[Float[Tensor, " b"]] = []

    def __call__(self, operator: ResidualOperator, x: Tensor) -> Tensor:
        """The operator's quantized output; its cost is kept in `bops`."""
        check_order(self.sites, self.position, operator)
        plan, position, state = self.plans[self.position], self.position, self.state
        table = plan.ranges.residual[state.reference]
        reference, before = state.inputs[position], state.outputs[position]
        shape = x.shape if operator.channel_axis == 1 else (len(x), -1, 1, 1)  # a linear layer has one level
        residual = (x - reference).reshape(shape)
        gates = self._gates(residual, table)
        passed = self._passed(residual, table, gates).reshape(x.shape)
        total = operator.geometry.apply(passed, plan.residual.codes)
        y = before + total * plan.residual.scale
        if state.reference == "previous":
            state.inputs[position], state.outputs[position] = reference + passed, y
            state.versions[position] = y._version
        self._charge(plan, gates, (shape[-2], shape[-1]) if operator.channel_axis == 1 else (1, 1))
        self.position += 1
        return y.clone()  # the network may write into what it is given

    def _gates(self, residual: Tensor, table: ResidualTable) -> list[Float[Tensor, "b h w"]]:
        """The gate of each level above the lowest."""
        magnitude = residual.abs().amax(1) / table.sigma
        log_tau = self.log_tau[:, self.position, None, None]
        gates = []
        for factor in self.kappa:
            bound = log_tau + torch.log(torch.tensor(factor))
            soft = torch.sigmoid(self.sharpness * (magnitude.clamp_min(SMALLEST).log() - bound))
            hard = (magnitude > bound.exp()).to(soft.dtype)
            gates.append(soft if self.smooth else hard + (soft - soft.detach()))
        return gates

    def _passed(self, residual: Tensor, table: ResidualTable, gates: Sequence[Tensor]) -> Tensor:
        """The quantized residual."""
        row = threshold_row(self.log_tau[:, self.position].detach().exp())
        inverse, limit, unit = (part[row].T[..., None, None, None] for part in table.steps(self.kappa, residual.device))
        levels = [
            _straight_through(residual, inverse[level], limit[level], unit[level] * table.step)
            for level in range(len(gates) + 1)
        ]
        passed = levels[0]
        for gate, finer, coarser in zip(gates, levels[1:], levels, strict=False):
            passed = passed + gate[:, None] * (finer - coarser)
        if self.smooth:
            return passed
        # The sum of differences rounds; the level itself does not.
        chosen = torch.stack(levels).gather(0, _level(gates)[None, :, None].expand(1, *residual.shape))[0]
        return passed + (chosen - passed).detach()

    def _charge(self, plan: SitePlan, gates: Sequence[Tensor], size: tuple[int, int]) -> None:
        coverage = plan.site.operator.geometry.coverage(size).to(gates[0].device)
        cost = torch.full_like(gates[0], plan.costs[0])
        for gate, finer, coarser in zip(gates, plan.costs[1:], plan.costs, strict=False):
            cost = cost + gate * (finer - coarser)
        self.bops.append((cost * coverage).sum((1, 2)) * plan.site.macs_per_pixel)


def _level(gates: Sequence[Float[Tensor, "b h w"]]) -> Int64[Tensor, "b h w"]:
    return torch.stack(list(gates)).detach().round().long().sum(0)


def _straight_through(residual: Tensor, inverse: Tensor, limit: Tensor, step: Tensor) -> Tensor:
    """The residual quantized at one level, with the gradient of clipping alone."""
    bound = limit * step
    clipped = torch.minimum(torch.maximum(residual, -bound), bound)
    quantized = torch.round(residual.detach() * inverse).clamp(-limit, limit) * step
    return clipped + (quantized - clipped).detach()
