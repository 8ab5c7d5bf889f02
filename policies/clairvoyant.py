"""A bound for region agents: a choice by region that knows the errors ahead."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from resq_rl.envs import Decision, FrameView
from resq_rl.errors import PolicyError
from resq_rl.policies.fixed import GroupThresholds
from resq_rl.quantization import Reference, ThresholdField

__all__ = ["Clairvoyant"]


@dataclass(frozen=True)
class Clairvoyant:
    """Greedy choice among static thresholds in every region, by what the next frames would give under each.

    Before every frame each candidate runs in all regions, and the first candidate for the `horizon - 1` frames after
    it; then every region takes the candidate with the highest sum of its own rewards. It looks at labels and at the
    future, so no device can run it: it shows about how much choosing by region can save. It is no strict bound, because
    it looks a few frames ahead, and regions choose as if their neighbours chose the same.

    Attributes:
        candidates: what regions choose from; the first also gives the keyframe interval and the reference.
        trade_off: lambda of the reward.
        horizon: frames looked at.

    Raises:
        PolicyError: no candidates or horizon, a lambda that is not positive, or candidates of several kappas.
    """

    candidates: tuple[GroupThresholds, ...]
    trade_off: float
    horizon: int = 8

    def __post_init__(self) -> None:
        if not self.candidates or self.horizon < 1 or not self.trade_off > 0:
            raise PolicyError(
                "A clairvoyant needs candidates, a horizon of 1 frame or more and a positive lambda, got "
                f"{len(self.candidates)}, {self.horizon} and {self.trade_off}."
            )
        if len({c.kappa for c in self.candidates}) > 1:
            raise PolicyError("All candidates of a clairvoyant need one kappa: a field of thresholds has one.")

    @property
    def reference(self) -> Reference:
        """The first candidate's."""
        return self.candidates[0].reference

    @property
    def trade_off_range(self) -> tuple[float, float]:
        """Its lambda alone."""
        return self.trade_off, self.trade_off

    @property
    def macs(self) -> int:
        """Not charged: no device can run it."""
        return 0

    @property
    def bits(self) -> int:
        """Of no meaning without MACs."""
        return 8

    @property
    def settings(self) -> dict[str, object]:
        """Fields that identify the policy."""
        return {
            "trade_off": self.trade_off,
            "interval": self.candidates[0].interval,
            "reference": self.reference,
            "horizon": self.horizon,
        }

    def decide(self, view: FrameView) -> Decision:
        """The best candidate of every region; the first where they are equal."""
        base = self.candidates[0]
        # All candidates keep to the first one's keyframes.
        fields = [replace(c, interval=base.interval).decide(view) for c in self.candidates]
        values = torch.stack([self._value(view, decision) for decision in fields], 1)
        best = values.argmax(1)
        thresholds = torch.stack([_thresholds(decision, view) for decision in fields], 1)
        index = best[:, None, None].expand(-1, 1, *thresholds.shape[2:])
        return Decision(fields[0].refresh, ThresholdField(thresholds.gather(1, index)[:, 0], base.kappa))

    def _value(self, view: FrameView, decision: Decision) -> Float[Tensor, "b gh gw"]:
        """Sum of each region's rewards over the horizon."""
        trade_off = torch.full((view.clips,), self.trade_off)
        results = view.preview(decision, self.candidates[0], self.horizon)
        return torch.stack([result.region_reward(trade_off) for result in results]).sum(0)


def _thresholds(decision: Decision, view: FrameView) -> Float[Tensor, "b g gh gw"]:
    field = decision.field
    assert isinstance(field, ThresholdField)  # of static thresholds
    return field.thresholds.expand(-1, -1, *view.grid)
