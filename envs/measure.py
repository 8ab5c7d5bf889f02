"""Running a policy over whole clips and counting what it got and what it spent."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Float64, Int64, Num
from torch import Tensor

from resq_rl.envs.clips import ClipStore, gather
from resq_rl.envs.observation import Observation, Seen
from resq_rl.envs.simulator import Decision, FrameResult, Simulator, clips_that_fit
from resq_rl.errors import SettingsError
from resq_rl.perception import Task
from resq_rl.quantization import LevelField, Reference, ResQModel

__all__ = ["FrameView", "Measurement", "Policy", "Trace", "batches", "frames_of", "measure", "trace"]


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

    @property
    def seen(self) -> Seen:
        """What the observation is made from."""
        return self._simulator.seen()

    def preview(self, first: Decision, then: "Policy", frames: int) -> list[FrameResult]:
        """What the next frames would give, of which none is run: for bounds, no device can do this.

        Args:
            first: how the next frame would run.
            then: decides for the frames after it.
            frames: how many, fewer where a clip ends before; 0 for all that are left.
        """
        branch = self._simulator.branch()
        results = [branch.step(first)]
        while len(results) != frames and not bool(results[-1].last.any()):
            results.append(branch.step(then.decide(FrameView(branch))))
        return results


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
        task: what was predicted.
        counts: `Task.counts` by clip.
        error: by clip, the frames' errors as rewards charge them.
        frames: frames by clip.
        keyframe, residual: BOPs by clip, summed over its frames; `policy` is the policy's own per decided frame.
        peak: the most expensive frame of each clip, policy included.
        keyframes: number of keyframes by clip.
        elementwise: elementwise operations by clip.
        state_bytes: reference state of one clip.
        settings: the policy's.
    """

    task: Task
    counts: Num[Tensor, "n *c"]
    error: Float64[Tensor, " n"]
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
        """Accuracy over all frames (`Task.accuracy`)."""
        return float(self.task.accuracy(self.counts.sum(0)))

    @property
    def mean_error(self) -> float:
        """Mean error of a frame."""
        return float(self.error.sum() / self.frames.sum())

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
        accuracy = float(self.task.accuracy(self.counts[clips].sum(0)))
        return accuracy, float(self.clip_bops[clips].sum() / self.frames[clips].sum())


@torch.no_grad()
def measure(
    model: ResQModel,
    task: Task,
    store: ClipStore,
    policy: Policy,
    *,
    grid: tuple[int, int] = (6, 10),
    slots: int = 32,
    progress: Callable[[int], None] | None = None,
) -> Measurement:
    """Run every clip of the store once under `policy`.

    Args:
        slots: clips that step together, or fewer if memory is short; does not change the result beyond rounding.
        progress: called with the number of frames done after each step.

    Raises:
        SettingsError: no slots. PolicyError: the policy does not fit the network or grid.
    """
    if slots < 1:
        raise SettingsError(f"At least one clip must step at a time, got {slots}.")
    clips = len(store)
    sums = {
        k: torch.zeros(clips, dtype=torch.float64) for k in ("error", "keyframe", "residual", "elementwise", "peak")
    }
    frames, keyframes = torch.zeros(clips, dtype=torch.int64), torch.zeros(clips, dtype=torch.int64)
    counts = torch.zeros_like(store.float_counts)
    reference = model.reference_bops()
    policy_share = _own_share(model, policy)
    for batch in batches(store, max(1, min(slots, clips_that_fit(model) or slots))):
        simulator = _simulator(model, task, store.subset(batch), policy, grid)
        index = torch.tensor(batch)
        for time, result in enumerate(frames_of(simulator, policy)):
            rows = index[result.clip]
            total = result.cost.total / reference
            key = result.cost.keyframe
            sums["error"][rows] += result.error.mean((1, 2))
            sums["keyframe"][rows] += torch.where(key, total, 0.0)
            sums["residual"][rows] += torch.where(key, 0.0, total)
            sums["elementwise"][rows] += result.cost.elementwise
            sums["peak"][rows] = torch.maximum(sums["peak"][rows], total + (policy_share if time else 0.0))
            frames[rows] += 1
            keyframes[rows] += key.long()
            targets = gather(simulator.store.targets, result.clip, result.time)
            counts[rows] += task.counts(result.prediction, targets)
            if progress is not None:
                progress(len(rows))
    policy_sum = (frames - 1).double() * policy_share
    return Measurement(
        task,
        counts,
        sums["error"],
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


@dataclass(frozen=True)
class Trace:
    """One clip under one policy, frame by frame; BOPs are shares of the network's W8A8 frame.

    Attributes:
        prediction: what the task predicts.
        share: BOPs by region / (W8A8 BOPs of the frame / regions), without the policy's own.
        layers: BOPs by site (operator call) of the network, without the policy's own.
        bops: BOPs of each frame, the policy's own included.
        keyframe: which frames ran as keyframes.
        chosen: threshold or level of each layer group and region on each of the n residual frames; one region where
            the policy decides for whole frames.
    """

    prediction: Num[Tensor, "t *p"]
    share: Float[Tensor, "t gh gw"]
    layers: Float64[Tensor, "t s"]
    bops: Float64[Tensor, " t"]
    keyframe: Bool[Tensor, " t"]
    chosen: Float[Tensor, "n g rows columns"]

    def choice_shares(self, choices: Sequence[float]) -> Float64[Tensor, "g k"]:
        """How often each layer group got each of k thresholds or levels, as shares of all that was chosen.

        They sum to 1 over groups and choices; without residual frames all are 0.
        """
        chosen = self.chosen[..., None] == torch.tensor(choices, dtype=torch.float32)
        return chosen.sum((0, 2, 3)).double() / max(1, self.chosen.numel())


@torch.no_grad()
def trace(
    model: ResQModel,
    task: Task,
    store: ClipStore,
    policy: Policy,
    *,
    clip: int = 0,
    grid: tuple[int, int] = (6, 10),
) -> Trace:
    """Run one clip of the store under `policy`, as `measure` does, and keep every frame.

    Args:
        clip: index of the clip in the store.

    Raises:
        PolicyError: the policy does not fit the network or grid.
    """
    simulator = _simulator(model, task, store.subset([clip]), policy, grid)
    decisions: list[Decision] = []
    results = list(frames_of(simulator, policy, on_decision=decisions.append))
    layers = torch.cat([result.cost.per_layer for result in results]) / model.reference_bops()
    bops = layers.sum(1)
    bops[1:] += _own_share(model, policy)
    fields = [decision.field for decision in decisions if not bool(decision.refresh)]
    chosen = [field.levels.float() if isinstance(field, LevelField) else field.thresholds for field in fields]
    return Trace(
        torch.cat([result.prediction for result in results]),
        torch.cat([result.share for result in results]),
        layers,
        bops,
        torch.cat([result.cost.keyframe for result in results]),
        torch.cat(chosen) if chosen else torch.zeros(0, simulator.groups, 1, 1),
    )


def _simulator(model: ResQModel, task: Task, store: ClipStore, policy: Policy, grid: tuple[int, int]) -> Simulator:
    """A simulator in which all clips of the store step together under `policy`."""
    return Simulator(
        model,
        task,
        store,
        slots=len(store),
        grid=grid,
        reference=policy.reference,
        trade_off_range=policy.trade_off_range,
    )


def _own_share(model: ResQModel, policy: Policy) -> float:
    """What the policy itself spends per decided frame, as a share of W8A8."""
    return policy.macs * policy.bits**2 / model.reference_bops()


def frames_of(
    simulator: Simulator, policy: Policy, *, on_decision: Callable[[Decision], None] | None = None
) -> Iterator[FrameResult]:
    """Start one clip in every slot and step them to their end; all clips must have one length.

    Args:
        on_decision: called with the policy's decision before every frame but the first.
    """
    slots = list(range(simulator.slots))
    result = simulator.start(slots, slots, [policy.trade_off] * len(slots))
    yield result
    while not bool(result.last.any()):
        decision = policy.decide(FrameView(simulator))
        if on_decision is not None:
            on_decision(decision)
        result = simulator.step(decision)
        yield result


def batches(store: ClipStore, slots: int) -> list[Sequence[int]]:
    """Clips of equal length, at most `slots` together."""
    by_length: dict[int, list[int]] = {}
    for index, clip in enumerate(store.clips):
        by_length.setdefault(len(clip), []).append(index)
    return [own[i : i + slots] for own in by_length.values() for i in range(0, len(own), slots)]
