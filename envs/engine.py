"""What every engine under an environment is given and returns, and the protocol that engines follow."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Float64, Int64, Num, UInt8
from torch import Tensor

from resq_rl.envs.observation import Observation
from resq_rl.envs.problem import Problem
from resq_rl.perception import Beginning
from resq_rl.quantization import Budget, Field, FrameCost, LevelField, Reference

__all__ = ["Conditions", "Decision", "Engine", "FrameInputs", "FrameResult", "State"]


@dataclass(frozen=True)
class Decision:
    """How one frame of each clip runs: as a keyframe where `refresh` is true, else as a residual under `field`."""

    refresh: Bool[Tensor, " b"]
    field: Field

    @staticmethod
    def keyframes(clips: int, groups: int) -> "Decision":
        """Every clip runs a keyframe."""
        return Decision(torch.ones(clips, dtype=torch.bool), LevelField.constant(0, clips, groups))


@dataclass(frozen=True)
class FrameResult:
    """Prediction, error and cost of one frame of each clip.

    Attributes:
        prediction: what the task predicts.
        error: cost of the errors by region (`Problem.error`), whose mean is the frame's error; 0 is perfect, and NaN
            where there was no target to compare with.
        cost: exact BOPs by layer and region.
        share: BOPs by region / (W8A8 BOPs of the frame / regions), so that its mean is the frame's share of W8A8.
        bops: BOPs of the frame as a share of W8A8.
    """

    prediction: Num[Tensor, "b *p"]
    error: Float[Tensor, "b gh gw"]
    cost: FrameCost
    share: Float[Tensor, "b gh gw"]
    bops: Num[Tensor, " b"]

    def reward(self, trade_off: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Frame reward: accuracy (1 - mean error) minus lambda times the share of W8A8 BOPs."""
        return 1 - self.error.mean((1, 2)) - trade_off * self.share.mean((1, 2))

    def region_reward(self, trade_off: Float[Tensor, " b"]) -> Float[Tensor, "b gh gw"]:
        """Local reward of each region; its mean over the regions is the frame's reward."""
        return 1 - self.error - trade_off[:, None, None] * self.share


@dataclass(frozen=True)
class Conditions:
    """The conditions under which each clip runs, as observations show them.

    Attributes:
        trade_off: lambda of each clip.
        trade_off_range: range of lambda, by which it is scaled.
        budget_left: how full the bucket of each clip's budget is, from 0 to 1; 1 without a mean to keep.
        rate: BOPs of the last frame over the mean of the budget; 1 without a mean. Policies may use it, observations
            do not show it.
    """

    trade_off: Float[Tensor, " b"]
    trade_off_range: tuple[float, float]
    budget_left: Float[Tensor, " b"]
    rate: Float[Tensor, " b"]

    @staticmethod
    def alone(trade_off: float, trade_off_range: tuple[float, float]) -> "Conditions":
        """The conditions of one clip without a budget."""
        return Conditions(torch.tensor([trade_off], dtype=torch.float32), trade_off_range, torch.ones(1), torch.ones(1))

    def rows(self, rows: slice) -> "Conditions":
        """The conditions of some of the clips."""
        return Conditions(self.trade_off[rows], self.trade_off_range, self.budget_left[rows], self.rate[rows])


@runtime_checkable
class State(Protocol):
    """State that an engine keeps of each clip from one frame to the next."""

    reference: Reference

    @property
    def age(self) -> Int64[Tensor, " b"]:
        """Frames since each clip's keyframe; -1 before the first."""

    def put(self, rows: Int64[Tensor, " n"], other: Any) -> None:
        """Replace the clips in `rows` by those of `other`, in order; `other` must not run on."""

    def clone(self) -> "State":
        """A copy that runs on by itself."""

    def snapshot(self) -> dict[str, Any]:
        """The tensors that `restore` needs; they are not copies."""

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Go on from a snapshot, which then belongs to this state."""


@runtime_checkable
class Engine(Protocol):
    """Runs one frame of B clips: from inputs, state and decision to prediction, error and cost.

    `NetworkEngine` runs the network, `resq_rl.envs.TableEngine` looks its responses up.
    """

    problem: Problem

    def new_state(self, clips: int, reference: Reference) -> Any:
        """A state before the first frame of so many clips."""

    def inputs(self, clips: Int64[Tensor, " b"], times: Int64[Tensor, " b"]) -> Any:
        """The inputs of frame `times[i]` of the problem's clip `clips[i]` for every i."""

    def step(
        self, inputs: Any, state: Any, decision: Decision, limit: Float64[Tensor, " b"] | None = None
    ) -> FrameResult:
        """Run a frame of each clip; `state` is updated in place.

        Args:
            limit: BOPs that the frame of each clip may cost at most, as shares of W8A8; None for no limit.

        Raises:
            PolicyError: the decision does not fit, or a limit cannot be kept. NetworkError: an output is not finite.
        """

    def check_budget(self, budget: Budget, charge: float = 0.0) -> None:
        """Raise SettingsError unless frames can always keep a budget, which pays `charge` before each of them."""

    def observe(self, inputs: Any, state: Any, conditions: Conditions) -> Observation:
        """The observation before the frame of `inputs` runs."""

    def float_error(self, clips: Int64[Tensor, " b"], times: Int64[Tensor, " b"]) -> Float[Tensor, "b gh gw"]:
        """Error of the float network on frames of the problem's clips."""

    def clips_that_fit(self) -> int | None:
        """How many clips can step together in the free memory; None where there is no limit, or none is known."""


@dataclass(frozen=True)
class FrameInputs:
    """One frame of each clip, as a device receives it.

    Attributes:
        pixels: the frames.
        targets: the targets with which predictions are compared; None where there are none.
        starts: for a recurrent task, the prediction and template of each clip's first frame.
        first: which frames are the first of their clips.
        names: name of each frame, for messages.
    """

    pixels: UInt8[Tensor, "b 3 h w"]
    targets: Num[Tensor, "b *t"] | None
    starts: Sequence[Beginning]
    first: Bool[Tensor, " b"]
    names: Callable[[int], str]
