"""A policy and its frozen network on a stream of frames, as an application runs them."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float64, UInt8
from torch import Tensor, nn

from resq_rl.envs import Conditions, Decision, FrameInputs, FrameView, NetworkEngine, Policy, Problem
from resq_rl.envs.measure import policy_share
from resq_rl.errors import PolicyError, SettingsError, VideoError
from resq_rl.perception import Beginning, Task, beginning_with
from resq_rl.policies.learned import LearnedPolicy
from resq_rl.quantization import Budget, load_model
from resq_rl.video import Framing
from resq_rl.video.images import Box

__all__ = ["SETTINGS", "RunCost", "Runner", "saved_framing"]

REFERENCE_BITS = 8
SETTINGS = "network.json"  # in the folder of a trained policy: how network, task, video and frames are made


@dataclass(frozen=True)
class RunCost:
    """The cost of one frame, as shares of the network's W8A8 frame.

    Attributes:
        keyframe: whether it ran as a keyframe.
        network: BOPs of the network.
        policy: BOPs of the policy's own network; 0 on the first frame, on which it decides nothing.
        regions: BOPs of the network by region of the policy's grid, as shares of the region's W8A8.
    """

    keyframe: bool
    network: float
    policy: float
    regions: Float[Tensor, "gh gw"]

    @property
    def bops(self) -> float:
        """All BOPs of the frame."""
        return self.network + self.policy

    @property
    def bits(self) -> float:
        """Bits b at which running the whole frame at WbAb would cost as much: 8 * sqrt(share of W8A8)."""
        return float(REFERENCE_BITS * self.bops**0.5)


class Runner:
    """A policy and its frozen network, run on frames as they come, in constant memory.

        runner = Runner.load(folder, network, task)
        for frame in frames:
            prediction, cost = runner(frame)

    Its predictions and costs for the frames of a clip equal those of `resq_rl.envs.trace`, bit for bit.

    Args:
        policy: decides how frames run.
        problem: the calibrated network, its task and the policy's grid; clips are not needed.
        framing: how frames are brought to the network; by default they are stretched to its size. Its stride is up to
            the caller, who leaves frames out.
        budget: what the frames of the stream may cost, the policy's own BOPs included; None for no limit.

    Raises:
        PolicyError: the policy does not fit the network or the grid.
        SettingsError: the budget cannot be kept.
    """

    def __init__(
        self, policy: Policy, problem: Problem, framing: Framing | None = None, budget: Budget | None = None
    ) -> None:
        self.policy, self.problem, self.budget = policy, problem, budget
        self.framing = Framing(problem.model.frame_size) if framing is None else framing
        self._engine = NetworkEngine(problem)
        self._own_share = policy_share(problem, policy)
        if budget is not None:
            self._engine.check_budget(budget, self._own_share)
        self.reset()
        if isinstance(policy, LearnedPolicy):
            policy.check_view(self._view(self._state.frame))

    @classmethod
    def load(
        cls,
        folder: str | Path,
        network: nn.Module,
        task: Task,
        *,
        trade_off: float | None = None,
        interval: int | None = None,
        scene_change: float | None = None,
        static: bool = False,
        framing: Framing | None = None,
        budget: Budget | None = None,
    ) -> "Runner":
        """The policy and the calibrated model that a training run wrote into `folder`.

        Args:
            network: the float network that was calibrated.
            trade_off: lambda to decide for; the middle of its range by default.
            interval: frames between keyframes (0: first frame only); the policy's own timing by default.
            scene_change: mean residual above which a frame runs as a keyframe too (1: never); the policy's own by
                default.
            static: whether to run the policy's beginning, without its network.
            framing: how frames are brought to the network; by default as in training.
            budget: what the frames of the stream may cost; None for no limit.

        Raises:
            PolicyError, CalibrationError: the files are missing or damaged, or the policy does not know that lambda or
                has no beginning.
            NetworkError: the files are of another network.
        """
        policy = LearnedPolicy.load(Path(folder))
        low, high = policy.trade_off_range
        if trade_off is not None and not 0.999 * low <= trade_off <= 1.001 * high:  # the ends may come rounded
            raise PolicyError(f"The policy was trained for lambda from {low:g} to {high:g}, got {trade_off:g}.")
        if trade_off is not None or interval is not None:
            policy = policy.at(policy.trade_off if trade_off is None else trade_off, interval)
        policy = policy if scene_change is None else replace(policy, scene_change=scene_change)
        policy = policy.beginning() if static else policy
        model = load_model(Path(folder), network)
        framing = saved_framing(Path(folder)) if framing is None else framing
        return cls(policy, Problem(model, task, policy.scheme.grid), framing, budget)

    def reset(self, given: UInt8[np.ndarray, "h w"] | UInt8[Tensor, "h w"] | None = None) -> None:
        """Begin a new video: the next frame runs as a keyframe, or as what a budget allows; nothing before it is left.

        Args:
            given: for a task that begins with it (`Recurrent`), the label of the next frame, such as the mask of the
                object to follow; framed as the frame is.
        """
        self._given = None if given is None else self._framed_label(given)
        self._starts: list[Beginning] = []
        self._state = self._engine.new_state(1, self.policy.reference)
        self._credit = None if self.budget is None else self.budget.begin(1)
        self._last = torch.zeros(1, dtype=torch.float64)

    @property
    def frame(self) -> UInt8[Tensor, "3 h w"]:
        """The last frame as the model saw it."""
        return self._state.frame[0]

    @property
    def _begun(self) -> bool:
        return int(self._state.age[0]) >= 0

    def _start(self, frame: UInt8[Tensor, "3 h w"]) -> list[Beginning]:
        """The prediction and template of the first frame, for a recurrent task.

        Raises:
            VideoError: no label was given.
        """
        task = self.problem.recurrent
        if task is None:
            return []
        if self._given is None:
            raise VideoError(
                f"{type(task).__name__} begins with the label of the first frame, and none was given: call "
                "reset(label) before it."
            )
        return [beginning_with(task, frame, self._given)]

    def _inputs(self, frame: UInt8[Tensor, "1 3 h w"]) -> FrameInputs:
        return FrameInputs(frame, None, self._starts, torch.tensor([not self._begun]), lambda _: "the stream")

    def _view(self, frame: UInt8[Tensor, "1 3 h w"]) -> FrameView:
        conditions = Conditions.alone(self.policy.trade_off, self.policy.trade_off_range)
        if self.budget is not None and self._credit is not None:
            left, rate = self.budget.left(self._credit), self.budget.rate(self._last)
            conditions = replace(conditions, budget_left=left, rate=rate)
        return FrameView(self._engine, lambda: self._inputs(frame), self._state, conditions)

    def _limit(self, policy_bops: float) -> Float64[Tensor, " 1"] | None:
        """What the network may spend on the next frame."""
        if self.budget is None or self._credit is None:
            return None
        return self.budget.limit(self._credit) - policy_bops

    def _pay(self, bops: Float64[Tensor, " 1"]) -> None:
        self._last = bops
        if self.budget is not None and self._credit is not None:
            self._credit = self.budget.after(self._credit, bops)

    @torch.no_grad()
    def __call__(
        self, frame: UInt8[np.ndarray, "h w 3"] | UInt8[Tensor, "3 h w"], window: Box | None = None
    ) -> tuple[Tensor, RunCost]:
        """Run the next frame.

        Args:
            frame: RGB of any size; it is framed as in training.
            window: the part of it to use (left, top, right, bottom), for a policy trained on windows that follow an
                object.

        Returns:
            The task's prediction for it at the model's frame size, such as the class of every pixel, and its cost.

        Raises:
            VideoError: the frame is no RGB picture of bytes, or a label or a window is wanted.
            NetworkError: the output holds NaN or infinity.
        """
        own = self._framed(frame, window)[None]
        if self._begun:
            decision, policy_bops = self.policy.decide(self._view(own)), self._own_share
        else:
            self._starts = self._start(own[0])
            decision, policy_bops = Decision.keyframes(1, self.problem.groups), 0.0
        result = self._engine.step(self._inputs(own), self._state, decision, self._limit(policy_bops))
        self._pay(result.bops + policy_bops)
        cost = RunCost(bool(result.cost.keyframe), float(result.bops), policy_bops, result.share[0])
        return result.prediction[0], cost

    def _framed(self, frame: np.ndarray | Tensor, window: Box | None) -> UInt8[Tensor, "3 h w"]:
        if not isinstance(frame, (np.ndarray, Tensor)):
            raise VideoError(f"A frame must be RGB bytes, an array (h, w, 3) or a tensor (3, h, w), got {type(frame)}.")
        if isinstance(frame, Tensor) and (frame.layout != torch.strided or frame.is_meta):
            raise VideoError(f"A frame must be a dense tensor, got one of {frame.layout} on {frame.device}.")
        shape, kind = tuple(frame.shape), frame.dtype
        channels = shape[-1 if isinstance(frame, np.ndarray) else 0] if len(shape) == 3 else 0
        if channels != 3 or 0 in shape or kind not in (np.uint8, torch.uint8):
            raise VideoError(
                f"A frame must be RGB bytes, an array (h, w, 3) or a tensor (3, h, w), got {kind} of shape {shape}."
            )
        picture = frame.permute(1, 2, 0).cpu().numpy() if isinstance(frame, Tensor) else frame
        framed = self.framing.frame(picture, window)
        return torch.from_numpy(framed.copy()).permute(2, 0, 1)  # the caller may write into its own frame

    def _framed_label(self, label: np.ndarray | Tensor) -> UInt8[Tensor, "h w"]:
        values = label.cpu().numpy() if isinstance(label, Tensor) else label
        if not isinstance(values, np.ndarray):
            raise VideoError(f"A label must be bytes, an array or a tensor (h, w), got {type(label)}.")
        if values.ndim != 2 or 0 in values.shape or values.dtype != np.uint8:
            raise VideoError(f"A label must be bytes (h, w), got {values.dtype} of shape {values.shape}.")
        return torch.from_numpy(self.framing.labels(np.ascontiguousarray(values)).copy())


def saved_framing(folder: Path) -> Framing | None:
    """How frames were brought to the network in training, from a policy's folder; None where it holds no settings.

    Raises:
        PolicyError: the file is damaged, or does not say.
    """
    path = folder / SETTINGS
    if not path.exists():
        return None
    try:
        return Framing.from_json(json.loads(path.read_text())["framing"])
    except (OSError, KeyError, TypeError, ValueError, SettingsError) as error:
        raise PolicyError(
            f"{path} does not say how frames are brought to the network ({error!r}). Train the policy anew, or give "
            "`framing`."
        ) from error
