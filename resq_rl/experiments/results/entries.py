"""What a comparison holds: measured points, differences between methods, and the effort that they took."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["AtBudget", "BdEntry", "Effort", "Gain", "Point", "Range"]

Range = tuple[float, float]


@dataclass(frozen=True)
class Point:
    """One policy as measured.

    Attributes:
        accuracy: accuracy, 0..1.
        accuracy_ci95: 95% interval of `accuracy`, or None.
        bops: mean BOPs per frame, keyframes and policy included, as a fraction of W8A8.
        bops_ci95: 95% interval of `bops`, or None.
        peak_bops: BOPs of the most expensive frame, as a fraction of W8A8.
        policy_bops: the part of `bops` that the policy itself spends.
        state_bytes: bytes of reference state that a device keeps.
        settings: the settings that tell this point from the others of its method.
        keyframe_bops: the part of `bops` that keyframes spend; residual frames spend the rest. It is None in files of
            older versions.
    """

    accuracy: float
    accuracy_ci95: Range | None
    bops: float
    bops_ci95: Range | None
    peak_bops: float
    policy_bops: float
    state_bytes: int
    settings: Mapping[str, Any]
    keyframe_bops: float | None = None


@dataclass(frozen=True)
class BdEntry:
    """A Bjontegaard delta of BOPs between two methods, or the share of a gap that a method closes.

    Attributes:
        value: percent, negative for fewer BOPs; None where it is not reported.
        ci95: 95% interval of `value`, or None.
        accuracy_range: accuracies that a delta is averaged over; None for a share.
        reason: why `value` or `ci95` is None.
        undefined_replicates: number of bootstrap replicates without a value.
    """

    value: float | None
    ci95: Range | None
    accuracy_range: Range | None
    reason: str | None = None
    undefined_replicates: int = 0


@dataclass(frozen=True)
class Effort:
    """What it took to find the policies of a method, of one training seed at most.

    Attributes:
        frames: environment frames; one that is backpropagated counts three times.
        seconds: wall time.
    """

    frames: int
    seconds: float


@dataclass(frozen=True)
class AtBudget:
    """A method at the settings that are the most accurate on the validation clips, all of which keep to the budget.

    Where several policies were trained, values are means over them, and the peak is the highest.

    Attributes:
        accuracy: accuracy, 0..1.
        accuracy_ci95: 95% interval of `accuracy` over clips and seeds, or None.
        bops: mean BOPs per frame, as a fraction of W8A8.
        used: share of the budget's mean that is spent, median over clips; None without a mean. It exceeds 1 by
            at most what the first frame may spend beyond the mean.
        peak_bops: BOPs of the most expensive frame, as a fraction of W8A8.
        worst_tenth: accuracy over the tenth of the clips, one at least, where it is least; None in comparisons that
            were written before it was counted.
    """

    accuracy: float
    accuracy_ci95: Range | None
    bops: float
    used: float | None
    peak_bops: float
    worst_tenth: float | None = None


@dataclass(frozen=True)
class Gain:
    """How much more accurate one method is than another under the same budget.

    Attributes:
        points: difference of accuracy in points (hundredths).
        ci95: its 95% interval over clips and seeds, or None.
        reason: why `ci95` is None.
    """

    points: float
    ci95: Range | None
    reason: str | None = None
