"""A bound on the saving of choices by region: perfect knowledge of the errors ahead."""

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
    """Choice among static thresholds in every region and frame, by what the next frames would give.

    Before every frame each candidate runs in all regions, and the first candidate for the rest of the horizon. Every
    region takes the candidate with the highest sum of its own rewards; what these choices give together is looked at in
    the same way, and each clip runs them or one candidate everywhere, whichever gives it most. With a horizon to the
    end of the clip this never does worse than the first candidate alone (policy improvement by rollout). It looks at
    labels and at the future, so no device can run it: it shows what choosing by region can save at least, with perfect
    knowledge.

    Attributes:
        candidates: what regions choose from; the first also gives the keyframe interval and the reference.
        trade_off: lambda of the reward.
        horizon: frames looked at; 0 for all to the end of the clip.

    Raises:
        PolicyError: no candidates, a negative horizon, a lambda that is not positive, or candidates of several kappas.
    """

    candidates: tuple[GroupThresholds, ...]
    trade_off: float
    horizon: int = 0

    def __post_init__(self) -> None:
        if not self.candidates or self.horizon < 0 or not self.trade_off > 0:
            raise PolicyError(
                "A clairvoyant needs candidates, a horizon of 0 frames or more and a positive lambda, got "
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
        """Without MACs it has no effect."""
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
        """The best choice of every region, or of the clip; the first candidate where they are equal."""
        base = self.candidates[0]
        # All candidates keep to the first one's keyframes.
        decisions = [replace(c, interval=base.interval).decide(view) for c in self.candidates]
        values = torch.stack([self._value(view, decision) for decision in decisions], 1)
        thresholds = torch.stack([_thresholds(decision, view) for decision in decisions], 1)
        by_region = values.argmax(1)[:, None, None].expand(-1, 1, *thresholds.shape[2:])
        mixed = Decision(decisions[0].refresh, ThresholdField(thresholds.gather(1, by_region)[:, 0], base.kappa))
        values = torch.cat([values, self._value(view, mixed)[:, None]], 1)
        thresholds = torch.cat([thresholds, _thresholds(mixed, view)[:, None]], 1)
        by_clip = values.mean((2, 3)).argmax(1)
        return Decision(mixed.refresh, ThresholdField(thresholds[torch.arange(view.clips), by_clip], base.kappa))

    def _value(self, view: FrameView, decision: Decision) -> Float[Tensor, "b gh gw"]:
        """Sum of each region's rewards over the horizon."""
        trade_off = torch.full((view.clips,), self.trade_off)
        results = view.preview(decision, self.candidates[0], self.horizon)
        return torch.stack([result.region_reward(trade_off) for result in results]).sum(0)


def _thresholds(decision: Decision, view: FrameView) -> Float[Tensor, "b g gh gw"]:
    field = decision.field
    assert isinstance(field, ThresholdField)  # of static thresholds
    return field.thresholds.expand(-1, -1, *view.grid)
