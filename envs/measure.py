"""Running a policy over whole clips and counting what it got and what it spent."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from resq_rl.envs.clips import ClipStore, gather
from resq_rl.envs.observation import Observation
from resq_rl.envs.simulator import Decision, FrameResult, Simulator
from resq_rl.errors import SettingsError
from resq_rl.perception import Segmentation, mean_iou
from resq_rl.quantization import Reference, ResQModel

__all__ = ["FrameView", "Measurement", "Policy", "batches", "frames_of", "measure"]


class FrameView:
    """What a policy may look at before one frame; the observation is computed once, and only if asked for."""

    def __init__(self, simulator: Simulator) -> None:
        self._simulator = simulator
        self.clips = simulator.slots
        self.groups = simulator.groups
        self.grid = simulator.grid
        self.network: tuple[str, ...] = simulator.model.groups
        self.trade_off_range = simulator.trade_off_range
        self.age: Int64[Tensor, " b"] = simulator.age

    @cached_property
    def observation(self) -> Observation:
        """The observation of every clip."""
        return self._simulator.observe()


@runtime_checkable
class Policy(Protocol):
    """Chooses how the next frame of every clip runs."""

    @property
    def reference(self) -> Reference:
        """The reference mode it decides for."""

    @property
    def trade_off(self) -> float:
        """Lambda shown in the observation; policies that ignore it may leave it 1."""

    @property
    def trade_off_range(self) -> tuple[float, float]:
        """Range of lambda it was trained for, by which lambda is scaled in the observation."""

    @property
    def macs(self) -> int:
        """Multiply-accumulates it spends per frame."""

    @property
    def bits(self) -> int:
        """Bits of its weights and activations."""

    @property
    def settings(self) -> dict[str, object]:
        """What identifies it in tables and files."""

    def decide(self, view: FrameView) -> Decision:
        """How the next frame of every clip runs."""


@dataclass(frozen=True)
class Measurement:
    """Sums over each clip, from which every reported figure follows.

    BOPs are shares of the network's W8A8 frame.

    Attributes:
        confusion: pixels by clip, target class and predicted class.
        frames: frames by clip.
        keyframe, residual: BOPs by clip, summed over its frames; `policy` is the policy's own per decided frame.
        peak: the most expensive frame of each clip, policy included.
        keyframes: number of keyframes by clip.
        elementwise: elementwise operations by clip.
        state_bytes: reference state of one clip.
        settings: the policy's.
    """

    confusion: Int64[Tensor, "n k k"]
    frames: Int64[Tensor, " n"]
    keyframe: Float64[Tensor, " n"]
    residual: Float64[Tensor, " n"]
    policy: Float64[Tensor, " n"]
    peak: Float64[Tensor, " n"]
    keyframes: Int64[Tensor, " n"]
    elementwise: Float64[Tensor, " n"]
    state_bytes: int
    settings: dict[str, object]

    @property
    def accuracy(self) -> float:
        """Mean IoU over all frames."""
        return float(mean_iou(self.confusion.sum(0)))

    @property
    def bops(self) -> float:
        """Mean BOPs per frame as a share of W8A8: keyframes, residuals and policy."""
        return float(self.clip_bops.sum() / self.frames.sum())

    @property
    def clip_bops(self) -> Float64[Tensor, " n"]:
        """BOPs by clip, summed over its frames."""
        return self.keyframe + self.residual + self.policy

    def resampled(self, clips: Int64[Tensor, " m"]) -> tuple[float, float]:
        """Accuracy and BOPs over a resample of the clips."""
        accuracy = float(mean_iou(self.confusion[clips].sum(0)))
        return accuracy, float(self.clip_bops[clips].sum() / self.frames[clips].sum())


@torch.no_grad()
def measure(
    model: ResQModel,
    task: Segmentation,
    store: ClipStore,
    policy: Policy,
    *,
    grid: tuple[int, int] = (6, 10),
    slots: int = 32,
    progress: Callable[[int], None] | None = None,
) -> Measurement:
    """Run every clip of the store once under `policy`.

    Args:
        slots: clips that step together; does not change the result beyond rounding.
        progress: called with the number of frames done after each step.

    Raises:
        SettingsError: no slots. PolicyError: the policy does not fit the network or grid.
    """
    if slots < 1:
        raise SettingsError(f"At least one clip must step at a time, got {slots}.")
    clips = len(store)
    sums = {k: torch.zeros(clips, dtype=torch.float64) for k in ("keyframe", "residual", "elementwise", "peak")}
    frames, keyframes = torch.zeros(clips, dtype=torch.int64), torch.zeros(clips, dtype=torch.int64)
    confusion = torch.zeros(clips, task.classes, task.classes, dtype=torch.int64)
    reference = model.reference_bops()
    policy_share = policy.macs * policy.bits**2 / reference
    for batch in batches(store, slots):
        simulator = Simulator(
            model,
            task,
            store.subset(batch),
            slots=len(batch),
            grid=grid,
            reference=policy.reference,
            trade_off_range=policy.trade_off_range,
        )
        index = torch.tensor(batch)
        for time, result in enumerate(frames_of(simulator, policy)):
            rows = index[result.clip]
            total = result.cost.total / reference
            key = result.cost.keyframe
            sums["keyframe"][rows] += torch.where(key, total, 0.0)
            sums["residual"][rows] += torch.where(key, 0.0, total)
            sums["elementwise"][rows] += result.cost.elementwise
            sums["peak"][rows] = torch.maximum(sums["peak"][rows], total + (policy_share if time else 0.0))
            frames[rows] += 1
            keyframes[rows] += key.long()
            targets = gather(simulator.store.targets, result.clip, result.time)
            confusion[rows] += task.confusion(result.prediction, targets)
            if progress is not None:
                progress(len(rows))
    policy_sum = (frames - 1).double() * policy_share
    return Measurement(
        confusion,
        frames,
        sums["keyframe"],
        sums["residual"],
        policy_sum,
        sums["peak"],
        keyframes,
        sums["elementwise"],
        model.state_bytes(policy.reference),
        policy.settings,
    )


def frames_of(simulator: Simulator, policy: Policy) -> Iterator[FrameResult]:
    """Start one clip in every slot and step them to their end; all clips must have one length."""
    slots = list(range(simulator.slots))
    result = simulator.start(slots, slots, [policy.trade_off] * len(slots))
    yield result
    while not bool(result.last.any()):
        result = simulator.step(policy.decide(FrameView(simulator)))
        yield result


def batches(store: ClipStore, slots: int) -> list[Sequence[int]]:
    """Clips of equal length, at most `slots` together."""
    by_length: dict[int, list[int]] = {}
    for index, clip in enumerate(store.clips):
        by_length.setdefault(len(clip), []).append(index)
    return [own[i : i + slots] for own in by_length.values() for i in range(0, len(own), slots)]
