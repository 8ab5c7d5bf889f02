"""Budgets of a stream: the most that one frame may cost, and the most that frames may cost on average.

The mean is kept by a leaky bucket. It holds the credit c that a stream has left, in W8A8 frames; with the mean rate r
and a capacity of n frames,

    c_0 = min(peak, n r),      a frame may spend min(peak, c_t),      c_(t+1) = min(c_t - spent_t + r, n r).

So the first frame, which has everything to compute, may spend the peak. The first k frames of a stream spend at most
c_0 + (k - 1) r, and any k frames at most (k + n - 1) r.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any

import torch
from jaxtyping import Bool, Float, Float64
from pydantic import BeforeValidator, Field
from torch import Tensor

from resq_rl.checked import Checked, Positive
from resq_rl.errors import SettingsError

__all__ = ["ROUNDING", "Budget", "BudgetSetting", "exceeds", "read_budget"]

# What sums in double precision may differ by, as a share of them.
ROUNDING = 1e-12


@dataclass(frozen=True)
class Budget(Checked):
    """What the frames of a stream may cost, in BOPs as shares of W8A8, the policy's own included.

    Attributes:
        peak: most that any frame may cost.
        mean: most that frames may cost on average; None for no limit beside the peak.
        bucket: frames whose credit can be saved up, the frame that runs next among them; 1 saves nothing.

    Raises:
        SettingsError: a value is out of bounds, or the mean exceeds the peak.
    """

    peak: Positive = 1.0
    mean: Positive | None = None
    bucket: Annotated[float, Field(ge=1)] = 8.0

    _group = "budget."

    def _check(self) -> None:
        if self.mean is not None and self.mean > self.peak:
            raise SettingsError(
                f"Setting 'budget.mean' is {self.mean:g}, more than budget.peak, {self.peak:g}: no frame may cost more "
                "than the peak. Lower the mean or raise the peak."
            )

    @property
    def least(self) -> float:
        """What every frame is sure to be allowed."""
        return self.peak if self.mean is None else self.mean

    def begin(self, clips: int) -> Float64[Tensor, " b"]:
        """The credit of so many streams before their first frame."""
        first = self.peak if self.mean is None else min(self.peak, self.bucket * self.mean)
        return torch.full((clips,), first, dtype=torch.float64)

    def limit(self, credit: Float64[Tensor, " b"]) -> Float64[Tensor, " b"]:
        """What the next frame of each stream may cost."""
        return credit.clamp_max(self.peak)

    def after(self, credit: Float64[Tensor, " b"], spent: Float64[Tensor, " b"]) -> Float64[Tensor, " b"]:
        """The credit after a frame that cost `spent`."""
        if self.mean is None:
            return credit
        return (credit - spent + self.mean).clamp_max(self.bucket * self.mean)

    def left(self, credit: Float64[Tensor, " b"]) -> Float[Tensor, " b"]:
        """How full the bucket is, from 0 to 1; 1 without a mean."""
        full = self.least if self.mean is None else self.bucket * self.mean
        return (credit / full).float().clamp(0, 1)

    def filled(self, spent: Float64[Tensor, " t"]) -> Float[Tensor, " t"]:
        """How full the bucket of one stream is before each of its frames, given what they cost."""
        credit, found = self.begin(1), []
        for cost in spent[:, None]:
            found.append(self.left(credit))
            credit = self.after(credit, cost)
        return torch.cat(found)

    def rate(self, spent: Float64[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Costs of frames over the mean; 1 without a mean."""
        return torch.ones(len(spent)) if self.mean is None else (spent / self.mean).float()


def read_budget(value: Any) -> Budget | None:
    """A budget from some of its fields; None, or a budget, as it is.

    Raises:
        SettingsError: it has other fields or none, or is neither.
    """
    if value is None or isinstance(value, Budget):
        return value
    names = [field.name for field in fields(Budget)]
    if not isinstance(value, Mapping) or not value or set(value) - set(names):
        raise SettingsError(
            f"A budget is null, or a mapping with some of {', '.join(names)}, such as {{peak: 0.25, mean: 0.12}}; "
            f"received {value!r}."
        )
    return Budget(**value)


BudgetSetting = Annotated[
    Budget | None, BeforeValidator(read_budget), Field(description="null, or some of peak, mean and bucket")
]


def exceeds(spent: Float64[Tensor, " b"], limit: Float64[Tensor, " b"]) -> Bool[Tensor, " b"]:
    """Which costs exceed their limit by more than rounding."""
    return spent > limit * (1 + 100 * ROUNDING)
