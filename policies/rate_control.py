"""Thresholds under a budget, by a proportional-integral controller: how rate control is done."""

import math
from dataclasses import dataclass

from resq_rl.envs import Decision, FrameView
from resq_rl.errors import PolicyError
from resq_rl.policies.fixed import GroupThresholds
from resq_rl.quantization import ThresholdField

__all__ = ["RateControl"]

LARGEST = math.log(64.0)  # what thresholds are multiplied or divided by at most


@dataclass(frozen=True)
class RateControl(GroupThresholds):
    """Static thresholds, times a factor that follows what was spent against the mean of the budget.

        log factor = integral * (fill - left) + proportional * (rate - 1)

    with `left` how full the bucket is and `rate` the cost of the last frame over the mean. The bucket is the integral
    of what was spent beside the mean, held within its bounds, so nothing else need be remembered. A bucket that is
    `fill` full in a quiet scene pays for the burst after a cut.

    Attributes:
        taus: thresholds of the factor 1: one for the whole network, one per layer group, or one per layer.
        integral, proportional: gains.
        fill: how full the bucket is to be.
    """

    interval: int = 0
    integral: float = 4.0
    proportional: float = 0.0
    fill: float = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 <= self.fill <= 1 and self.integral >= 0 and self.proportional >= 0):
            raise PolicyError(
                f"A controller needs gains of 0 or more and a fill from 0 to 1, got {self.integral:g}, "
                f"{self.proportional:g} and {self.fill:g}."
            )

    @property
    def settings(self) -> dict[str, object]:
        """Fields that identify the policy."""
        own = {"integral": self.integral, "proportional": self.proportional, "fill": self.fill}
        return super().settings | own

    def decide(self, view: FrameView) -> Decision:
        """The thresholds times the factor of each clip."""
        conditions = view.conditions
        spared = self.integral * (self.fill - conditions.budget_left)
        factor = (spared + self.proportional * (conditions.rate - 1)).clamp(-LARGEST, LARGEST).exp()
        own = GroupThresholds(taus=self.taus * view.groups if len(self.taus) == 1 else self.taus, kappa=self.kappa)
        field = own.decide(view).field
        assert isinstance(field, ThresholdField)  # as of all static thresholds
        scaled = ThresholdField(field.thresholds * factor[:, None, None, None], self.kappa)
        return Decision(self._refresh(view), scaled)
