"""How numbers chosen by an agent become a decision, and which view of the observation the agent gets.

An action is composed of a scope, the frame or each region, and a choice, a level, a threshold or nothing but the
keyframe.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Final, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from resq_rl.envs.engine import Decision
from resq_rl.envs.observation import FRAME_FEATURES, Observation, region_features
from resq_rl.errors import PolicyError, SettingsError
from resq_rl.quantization import DEFAULT_KAPPA, Field, LevelField, ThresholdField

__all__ = ["ACTIONS", "DEFAULT_THRESHOLDS", "FACTORS", "Action", "ActionKind", "ActionScheme", "Agents", "knot_weights"]

ActionKind = Literal["frame_bits", "frame_level", "keyframe", "region_bits", "region_thresholds"]
Agents = Literal["frame", "region"]

# From "quantize nearly everything finely" to "skip"; neighbours differ by a factor of about 1.5.
DEFAULT_THRESHOLDS = (0.1, 0.2, 0.3, 0.45, 0.7, 1.0, 1.4, 1.9, 2.8, 4.0, 8.0, 100.0)
# What a base is multiplied by: half octaves, from a 16th to 16.
FACTORS = tuple(2.0 ** (i / 2) for i in range(-8, 9))


@dataclass(frozen=True)
class Action:
    """One kind of action: its scope and its choice.

    Attributes:
        scope: "frame", one choice for the whole frame, or "region", one for each region.
        choice: "level", "threshold" (from which levels follow per pixel), or "keyframe" (whether to run one, and
            nothing else).
        by_group: whether each layer group has a choice of its own; None where the scheme says so.
    """

    scope: Literal["frame", "region"]
    choice: Literal["level", "threshold", "keyframe"]
    by_group: bool | None = None


ACTIONS: Final[Mapping[ActionKind, Action]] = {
    "frame_bits": Action("frame", "level", by_group=True),
    "frame_level": Action("frame", "level", by_group=False),
    "keyframe": Action("frame", "keyframe"),
    "region_bits": Action("region", "level"),
    "region_thresholds": Action("region", "threshold"),
}


@dataclass(frozen=True)
class ActionScheme:
    """The discrete actions of one agent.

    Attributes:
        kind: one of `ACTIONS`: "frame_bits" (a level per layer group), "frame_level" (one level for all of them),
            "keyframe" (keyframe or not, and nothing else), "region_bits" (a level per region) or "region_thresholds" (a
            threshold index per region, from which levels follow per pixel).
        agents: "frame", one agent decides for the whole frame and for the keyframe; or "region", every region is an
            agent that decides for itself, and keyframes come from elsewhere.
        groups, grid, levels: layer groups, regions (rows, columns) and number of levels of the model.
        by_group: whether a region's choice is made for each layer group on its own.
        thresholds, kappa: values behind threshold indices, and the multipliers of the rule.
        base: a threshold of every layer for each of some values of lambda, spread evenly by ratio over its range;
            between two, logarithms are interpolated. `thresholds` then are factors of it, 1 among them. With none,
            `thresholds` stand for themselves.
        layers: with `base`, the layer group of every layer.
        learned_at: with a `base` that was learned by gradients, the lambda of each of its rows, which weighs BOPs
            against `Task.divergence`.
        ignored: features that agents see as 0, by their names of `resq_rl.envs.observation` or patterns such as
            "spent_*": to learn what each is worth.
    """

    kind: ActionKind
    agents: Agents
    groups: int
    grid: tuple[int, int]
    levels: int = 4
    by_group: bool = True
    thresholds: tuple[float, ...] = DEFAULT_THRESHOLDS
    kappa: tuple[float, ...] = DEFAULT_KAPPA
    ignored: tuple[str, ...] = ()
    base: tuple[tuple[float, ...], ...] = ()
    layers: tuple[int, ...] = ()
    learned_at: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in ACTIONS or self.agents not in get_args(Agents):
            raise SettingsError(
                f"Unknown action kind {self.kind!r} or agents {self.agents!r}: kinds are {tuple(ACTIONS)}, "
                f"agents {get_args(Agents)}."
            )
        if self.action.scope == "frame" and self.agents == "region":
            raise SettingsError(f"{self.kind} decides for the whole frame: use agents='frame', or a region action.")
        if list(self.thresholds) != sorted(self.thresholds) or min(self.thresholds, default=-1) <= 0:
            raise SettingsError(f"thresholds must be positive and ascending, got {list(self.thresholds)}.")
        known = (*region_features(self.groups), *FRAME_FEATURES)
        for pattern in self.ignored:
            if not any(fnmatchcase(name, pattern) for name in known):
                raise SettingsError(
                    f"No observed feature is named {pattern!r}, to be ignored. There are {list(known)}."
                )
        if self.base:
            self._check_base()

    def _check_base(self) -> None:
        fit = all(len(row) == len(self.layers) and min(row) > 0 for row in self.base)
        if not (fit and set(self.layers) == set(range(self.groups))):
            raise SettingsError(
                f"A base needs a positive threshold for every layer, and the layers make up the {self.groups} layer "
                f"groups; got rows of {[len(row) for row in self.base]} for layers of groups {list(self.layers)}."
            )
        if self.learned_at and (len(self.learned_at) != len(self.base) or min(self.learned_at) <= 0):
            raise SettingsError(
                f"A base of {len(self.base)} rows was learned at as many positive values of lambda, got "
                f"{list(self.learned_at)}."
            )
        if not self.by_threshold or 1.0 not in self.thresholds:
            raise SettingsError(
                f"Factors of a base are chosen by {self.kind!r} from {list(self.thresholds)}: only actions that choose "
                "thresholds have a base, and 1 must be among them, which leaves it as it is."
            )

    def on(
        self, base: Sequence[Sequence[float]], layers: Sequence[int], learned_at: Sequence[float] = ()
    ) -> "ActionScheme":
        """The scheme whose agents choose among FACTORS of a base, in place of thresholds."""
        rows = tuple(tuple(map(float, row)) for row in base)
        at = tuple(map(float, learned_at))
        return replace(self, thresholds=FACTORS, base=rows, layers=tuple(layers), learned_at=at)

    @property
    def neutral(self) -> int:
        """The choice that leaves the base as it is."""
        return self.thresholds.index(1.0)

    @property
    def action(self) -> Action:
        """Scope and choice of the actions."""
        return ACTIONS[self.kind]

    @property
    def by_threshold(self) -> bool:
        """Whether agents choose thresholds; else they choose levels, or keyframes alone."""
        return self.action.choice == "threshold"

    @property
    def values(self) -> tuple[float, ...] | range:
        """The thresholds or levels behind the indices of a choice."""
        return self.thresholds if self.by_threshold else range(self.levels)

    @property
    def choices(self) -> int:
        """Number of values of each decision: thresholds or levels."""
        return len(self.values)

    @property
    def regions(self) -> int:
        """Regions of the grid."""
        return self.grid[0] * self.grid[1]

    @property
    def agents_per_clip(self) -> int:
        """How many agents act on each clip."""
        return self.regions if self.agents == "region" else 1

    @property
    def _places(self) -> tuple[int, int]:
        """Rows and columns of places in a frame with a choice of their own."""
        return (1, 1) if self.action.scope == "frame" else self.grid

    @property
    def _choices_per_place(self) -> int:
        if self.action.choice == "keyframe":
            return 0
        by_group = self.by_group if self.action.by_group is None else self.action.by_group
        return self.groups if by_group else 1

    @property
    def nvec(self) -> tuple[int, ...]:
        """Sizes of the multi-discrete action; for a frame agent the last of 2 is the keyframe decision."""
        places = self._places[0] * self._places[1] // self.agents_per_clip
        return (self.choices,) * (places * self._choices_per_place) + ((2,) if self.agents == "frame" else ())

    @property
    def observation_size(self) -> int:
        """Length of one agent's observation."""
        return len(self.feature_names)

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Name of each number an agent observes."""
        region = region_features(self.groups)
        if self.agents == "region":
            return region + FRAME_FEATURES
        if self.action.scope == "frame":
            return (*(f"mean_{n}" for n in region), *(f"max_{n}" for n in region), *FRAME_FEATURES)
        cells = [(r, c) for r in range(self.grid[0]) for c in range(self.grid[1])]
        return (*(f"{n}[{r},{c}]" for r, c in cells for n in region), *FRAME_FEATURES)

    def observe(self, observation: Observation) -> Float[Tensor, "agents n"]:
        """Each agent's view, clip by clip and region by region."""
        if self.agents == "region":
            view = observation.per_region().flatten(0, 2)
        else:
            view = observation.per_frame() if self.action.scope == "frame" else observation.whole()
        return view * self._seen if self.ignored else view

    @cached_property
    def _seen(self) -> Float[Tensor, " n"]:
        """0 for features to ignore, 1 for the others."""
        names = (_plain_name(name) for name in self.feature_names)
        ignored = [any(fnmatchcase(name, pattern) for pattern in self.ignored) for name in names]
        return 1 - torch.tensor(ignored, dtype=torch.float32)

    def decide(
        self,
        actions: Int[np.ndarray, "agents k"],
        due: Bool[Tensor, " b"] | None = None,
        field: Field | None = None,
        place: Float[Tensor, " b"] | None = None,
    ) -> Decision:
        """`decision` for actions from outside, which are checked.

        Raises:
            PolicyError: the actions have another shape or are out of range, or "keyframe" is given no field.
        """
        chosen = torch.as_tensor(np.asarray(actions))
        self._check(chosen)
        return self.decision(chosen, due, field, place)

    def decision(
        self,
        chosen: Int[Tensor, "agents k"],
        due: Bool[Tensor, " b"] | None = None,
        field: Field | None = None,
        place: Float[Tensor, " b"] | None = None,
    ) -> Decision:
        """The decision that the agents' actions make together.

        Args:
            chosen: one row of indices per agent, in the order of `observe`.
            due: for region agents, which clips are due a keyframe.
            field: for "keyframe", how the other frames run.
            place: with a base, lambda's place in its range (`Observation.trade_off`).

        Raises:
            PolicyError: "keyframe" is given no field, or a base no place.
        """
        clips = len(chosen) // self.agents_per_clip
        if self.agents == "frame":
            refresh, chosen = chosen[:, -1] == 1, chosen[:, :-1]
        else:
            refresh = torch.zeros(clips, dtype=torch.bool) if due is None else due
        if self.action.choice == "keyframe":
            if field is None:
                raise PolicyError("Actions of kind 'keyframe' choose no bits: give the field of another policy.")
            return Decision(refresh, field)
        table = chosen.reshape(clips, *self._places, self._choices_per_place).permute(0, 3, 1, 2)
        table = table.expand(-1, self.groups, -1, -1).long()
        if self.by_threshold:
            thresholds = torch.tensor(self.thresholds)[table]
            if self.base:
                thresholds = thresholds[:, list(self.layers)] * self._base_at(place)[:, :, None, None]
            return Decision(refresh, ThresholdField(thresholds, self.kappa))
        return Decision(refresh, LevelField(table))

    def _base_at(self, place: Float[Tensor, " b"] | None) -> Float[Tensor, "b s"]:
        """The thresholds of the layers at places of lambda."""
        if place is None:
            raise PolicyError("The thresholds of a base depend on lambda: give its place in its range.")
        return (knot_weights(place, len(self.base)) @ torch.tensor(self.base).log()).exp()

    def _check(self, actions: Tensor) -> None:
        nvec = torch.tensor(self.nvec)
        if actions.dim() != 2 or actions.shape[1] != len(nvec) or len(actions) % self.agents_per_clip:
            raise PolicyError(
                f"Actions must have shape (agents, {len(nvec)}) with {self.agents_per_clip} agents per clip, "
                f"got {tuple(actions.shape)}."
            )
        if actions.is_floating_point() or actions.is_complex():
            raise PolicyError(f"Actions must be integers (indices of choices), got {actions.dtype}.")
        wrong = torch.nonzero((actions < 0) | (actions >= nvec))
        if len(wrong):
            agent, column = wrong[0].tolist()
            raise PolicyError(
                f"Actions must lie in 0..nvec-1 with nvec {list(self.nvec)}; agent {agent} gave "
                f"{int(actions[agent, column])} in column {column}, where 0 to {self.nvec[column] - 1} are known."
            )

    def uniform_action(self, choice: int | Sequence[int]) -> Int[np.ndarray, " k"]:
        """The action of one agent that makes one choice (or one per layer group) everywhere, without a keyframe."""
        per_group = [int(c) for c in choice] if isinstance(choice, Sequence) else [int(choice)] * self.groups
        if len(per_group) != self.groups:
            raise PolicyError(f"One choice, or one for each of {self.groups} layer groups, is needed, got {per_group}.")
        places = self._places[0] * self._places[1] // self.agents_per_clip
        values = per_group[: self._choices_per_place] * places + ([0] if self.agents == "frame" else [])
        return np.array(values, dtype=np.int64)


def knot_weights(place: Float[Tensor, " b"], knots: int) -> Float[Tensor, "b k"]:
    """The weights of evenly spread knots in a linear interpolation at places from 0 (the first) to 1 (the last)."""
    return (1 - (place[:, None] * (knots - 1) - torch.arange(knots)).abs()).clamp_min(0)


def _plain_name(name: str) -> str:
    """The name of an agent's feature without the region or the pooling over regions in it."""
    return name.removeprefix("mean_").removeprefix("max_").split("[")[0]
