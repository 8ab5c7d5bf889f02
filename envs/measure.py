"""Running a policy over whole clips and counting its accuracy and its BOPs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64, Int64, Num
from torch import Tensor

from resq_rl.envs.network_engine import NetworkEngine, clips_that_fit
from resq_rl.envs.problem import Problem, gather
from resq_rl.envs.streams import Policy, Streams
from resq_rl.errors import SettingsError
from resq_rl.perception import Task
from resq_rl.quantization import Budget, LayerSize, LevelField, mac_cost

__all__ = ["Measurement", "Trace", "batches", "measure", "policy_share", "trace"]


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


_SUMS = ("error", "keyframe", "residual", "elementwise", "peak")  # by clip, in double precision


@torch.no_grad()
def measure(
    problem: Problem,
    policy: Policy,
    *,
    slots: int = 32,
    budget: Budget | None = None,
    progress: Callable[[int], None] | None = None,
) -> Measurement:
    """Run every clip of a problem once under `policy`.

    Args:
        problem: the network, its task and the clips.
        policy: decides how frames run.
        budget: what the frames of each clip may cost, the policy's own BOPs included; None for no limit.
        slots: clips that step together, or fewer if memory is short; does not change the result beyond rounding.
        progress: called with the number of frames done after each step.

    Raises:
        SettingsError: no slots, or a budget that cannot be kept. PolicyError: the policy does not fit the network or
            grid.
    """
    if slots < 1:
        raise SettingsError(f"At least one clip must step at a time, got {slots}.")
    sums = {part: torch.zeros(len(problem), dtype=torch.float64) for part in _SUMS}
    sums |= {part: torch.zeros(len(problem), dtype=torch.int64) for part in ("frames", "keyframes")}
    counts = torch.zeros_like(problem.float_counts)
    own = policy_share(problem, policy)
    for batch in batches(problem, max(1, min(slots, clips_that_fit(problem.model)))):
        index = torch.tensor(batch)
        for time, (_, result) in enumerate(_streams(problem.subset(batch), policy, budget).run(policy)):
            rows = index[result.clip]
            key = result.cost.keyframe
            sums["error"][rows] += result.error.mean((1, 2))
            sums["keyframe"][rows] += torch.where(key, result.bops, 0.0)
            sums["residual"][rows] += torch.where(key, 0.0, result.bops)
            sums["elementwise"][rows] += result.cost.elementwise
            sums["peak"][rows] = torch.maximum(sums["peak"][rows], result.bops + (own if time else 0.0))
            sums["frames"][rows] += 1
            sums["keyframes"][rows] += key.long()
            counts[rows] += problem.task.counts(result.prediction, gather(problem.targets, rows, result.time))
            if progress is not None:
                progress(len(rows))
    return Measurement(
        task=problem.task,
        counts=counts,
        policy=(sums["frames"] - 1).double() * own,
        state_bytes=problem.model.state_bytes(policy.reference),
        settings=policy.settings,
        **sums,
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
def trace(problem: Problem, policy: Policy, *, clip: int = 0, budget: Budget | None = None) -> Trace:
    """Run one clip of a problem under `policy`, as `measure` does, and keep every frame.

    Args:
        problem: the network, its task and the clips.
        policy: decides how frames run.
        clip: index of the clip.
        budget: as of `measure`.

    Raises:
        PolicyError: the policy does not fit the network or grid.
    """
    decisions, results = zip(*_streams(problem.subset([clip]), policy, budget).run(policy), strict=True)
    layers = torch.cat([result.cost.per_layer for result in results]) / problem.reference_bops
    bops = layers.sum(1)
    bops[1:] += policy_share(problem, policy)
    fields = [decision.field for decision in decisions if not bool(decision.refresh)]
    chosen = [field.levels.float() if isinstance(field, LevelField) else field.thresholds for field in fields]
    return Trace(
        torch.cat([result.prediction for result in results]),
        torch.cat([result.share for result in results]),
        layers,
        bops,
        torch.cat([result.cost.keyframe for result in results]),
        torch.cat(chosen) if chosen else torch.zeros(0, problem.groups, 1, 1),
    )


def _streams(problem: Problem, policy: Policy, budget: Budget | None) -> Streams:
    """Streams in which all clips of a problem step together under `policy`."""
    return Streams(
        NetworkEngine(problem),
        slots=len(problem),
        reference=policy.reference,
        trade_off_range=policy.trade_off_range,
        budget=budget,
        charge=policy_share(problem, policy),
    )


def policy_share(problem: Problem, policy: Policy) -> float:
    """BOPs of the policy itself per decided frame, as a share of W8A8."""
    if not policy.macs:
        return 0.0
    layer, cost = LayerSize("linear", policy.macs, 0, 0), problem.model.config.cost
    return policy.macs * mac_cost(cost, policy.bits, policy.bits, layer) / problem.reference_bops


def batches(problem: Problem, slots: int) -> list[Sequence[int]]:
    """Clips of equal length, at most `slots` together."""
    by_length: dict[int, list[int]] = {}
    for index, clip in enumerate(problem.clips):
        by_length.setdefault(len(clip), []).append(index)
    return [own[i : i + slots] for own in by_length.values() for i in range(0, len(own), slots)]
