"""A learned policy distilled to a table: for a few lambdas, one threshold per layer group.

Such a table is Dynamic ResQ with a threshold of its own for every layer group. Any runtime that has the magnitudes of a
layer's residual can apply it, without observations and without a network.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from resq_rl.errors import PolicyError, SettingsError
from resq_rl.files import write_atomic
from resq_rl.policies.fixed import GroupThresholds, rule_from_json, rule_to_json
from resq_rl.policies.rate_control import RateControl
from resq_rl.quantization import Budget, Reference
from resq_rl.quantization.specification.budget import read_budget

__all__ = ["Controller", "TableRow", "ThresholdTable", "typical_thresholds"]

FORMAT = "resq_rl thresholds 2"
WITHOUT_RULE = "resq_rl thresholds 1"  # for changes of scene
RULE = (
    "In a layer of group g, the pixel p of a residual frame takes levels[#{j : m(p) > thresholds[g] * kappa[j]}] bits, "
    "where m(p) is the largest magnitude of the residual over the channels at p, divided by sigma of the layer (in "
    "model.json, under the reference). Where model.json names another granularity than pixel, every block of channels "
    "takes a level of its own, from the largest magnitude over its channels. Every `interval` frames one runs as a "
    "keyframe; 0: only the first. So does a frame whose mean residual exceeds `scene_change`, unless that is null: the "
    "square root of the mean over its pixels of the largest absolute difference over the channels, in 0..1, to the "
    "frame before it, or to the keyframe where `reference` is keyframe."
)
CONTROL = (
    " Under the budget, the thresholds are first multiplied by exp(integral * (fill - left)), at least 1/64 and at "
    "most 64, where left is the credit of the bucket over its capacity, bucket * mean; without a controller they stay. "
    "No frame may cost more than peak or the credit: in a layer that would exceed its allowance, thresholds are raised "
    "to the smallest floor that fits."
)


@dataclass(frozen=True)
class Controller:
    """The gains of `RateControl`: how far the bucket of a budget moves thresholds, and how full it is to be."""

    integral: float
    fill: float


@dataclass(frozen=True)
class TableRow:
    """Thresholds for one lambda, and what they gave beside the policy that they stand for, on the same clips.

    Attributes:
        trade_off: lambda.
        interval: frames between keyframes; 0 for the first only.
        thresholds: tau of each layer group.
        accuracy, bops: of the table; BOPs per frame as a share of W8A8.
        policy_accuracy, policy_bops: of the policy, with its own cost.
        controller: of the thresholds under a budget; None for none.
        scene_change: mean residual above which a frame runs as a keyframe too; infinite for no such rule.
    """

    trade_off: float
    interval: int
    thresholds: tuple[float, ...]
    accuracy: float = math.nan
    bops: float = math.nan
    policy_accuracy: float = math.nan
    policy_bops: float = math.nan
    controller: Controller | None = None
    scene_change: float = math.inf

    @property
    def accuracy_lost(self) -> float:
        """Accuracy of the policy less that of the table, 0..1."""
        return self.policy_accuracy - self.accuracy

    def policy(self, reference: Reference, kappa: tuple[float, ...]) -> GroupThresholds:
        """The rule of this row."""
        own: dict[str, Any] = {"taus": self.thresholds, "kappa": kappa, "scene_change": self.scene_change}
        if self.controller is None:
            return GroupThresholds(reference, self.interval, **own)
        return RateControl(reference, self.interval, **own, **asdict(self.controller))

    @property
    def bops_added(self) -> float:
        """By what share the table's BOPs exceed the policy's."""
        return self.bops / self.policy_bops - 1


@dataclass(frozen=True)
class ThresholdTable:
    """Rows by ascending lambda.

    Attributes:
        groups: names of the layer groups; or of the layers, each a group of its own, in the order in which they run.
        levels: bits of each level.
        kappa, reference: of the rule.
        rows: the table.
        budget: what frames may cost, which the runtime of the network keeps; None for no limit.
    """

    groups: tuple[str, ...]
    levels: tuple[int, ...]
    kappa: tuple[float, ...]
    reference: Reference
    rows: tuple[TableRow, ...]
    budget: Budget | None = None

    def __post_init__(self) -> None:
        wrong = [row for row in self.rows if len(row.thresholds) != len(self.groups) or not min(row.thresholds) > 0]
        if not self.rows or wrong or len(self.kappa) != len(self.levels) - 1:
            raise PolicyError(
                f"A table needs rows, with a positive threshold for each of the layer groups {list(self.groups)}, and "
                f"a kappa for each level above the first, got {[row.thresholds for row in wrong or self.rows]}, kappa "
                f"{list(self.kappa)} and levels {list(self.levels)}."
            )

    def at(self, trade_off: float) -> GroupThresholds:
        """The row of the nearest lambda by ratio, as a policy."""
        row = min(self.rows, key=lambda row: abs(math.log(row.trade_off / trade_off)))
        return self.policy(row)

    def policy(self, row: TableRow) -> GroupThresholds:
        """A row as a policy."""
        return row.policy(self.reference, self.kappa)

    def save(self, path: Path) -> None:
        """Write the table as JSON, with the rule in words.

        Raises:
            ResultsError: the file cannot be written.
        """
        about = asdict(self)
        for row, own in zip(about["rows"], self.rows, strict=True):
            row |= {"accuracy_lost": own.accuracy_lost, "bops_added": own.bops_added}
            row["scene_change"] = rule_to_json(own.scene_change)
        rule = RULE if self.budget is None else RULE + CONTROL
        write_atomic(path, json.dumps({"format": FORMAT, "rule": rule, **about}, indent=2) + "\n")

    @staticmethod
    def load(path: Path) -> "ThresholdTable":
        """The table in a file.

        Raises:
            PolicyError: it is missing, damaged or of another version.
        """
        try:
            about = json.loads(path.read_text())
        except OSError as error:
            raise PolicyError(f"No table at {path}: {error.strerror or error}.") from error
        except ValueError as error:
            raise PolicyError(f"The table {path} is damaged: {error}. Export it anew or copy it again.") from error
        if not isinstance(about, dict) or about.get("format") not in (FORMAT, WITHOUT_RULE):
            raise PolicyError(f"{path} is not of format {FORMAT!r}.")
        try:
            return ThresholdTable(
                tuple(about["groups"]),
                tuple(about["levels"]),
                tuple(about["kappa"]),
                about["reference"],
                tuple(map(_row, about["rows"])),
                read_budget(about.get("budget")),  # files of policies without one may lack it
            )
        except (KeyError, TypeError, ValueError, SettingsError) as error:
            raise PolicyError(f"The table {path} cannot be used ({error}). Export it anew or copy it again.") from error


def _row(about: dict[str, Any]) -> TableRow:
    controller = about.get("controller")
    own = {name: about[name] for name in TableRow.__dataclass_fields__ if name not in ("controller", "scene_change")}
    own["thresholds"] = tuple(own["thresholds"])
    controller = None if controller is None else Controller(**controller)
    return TableRow(**own, controller=controller, scene_change=rule_from_json(about.get("scene_change")))


def typical_thresholds(chosen: Float[Tensor, "n g rows columns"], shares: Sequence[float]) -> list[tuple[float, ...]]:
    """Quantiles of the policy's choices: for each share, the thresholds by group below which that share of them lies.

    Args:
        chosen: what a policy chose on n residual frames (`Trace.chosen`).
        shares: in 0..1; 0.5 for the medians.

    Raises:
        PolicyError: there are no residual frames.
    """
    if not chosen.numel():
        raise PolicyError("No thresholds can be distilled: every frame ran as a keyframe.")
    by_group = chosen.transpose(0, 1).flatten(1)
    found = torch.quantile(by_group.double(), torch.tensor(shares, dtype=torch.float64), dim=1, interpolation="nearest")
    return list(dict.fromkeys(tuple(float(f"{tau:.6g}") for tau in row) for row in found.tolist()))
