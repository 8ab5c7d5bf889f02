"""Streams of clips over an engine: B clips step together, each at its own frame."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int64, UInt8
from torch import Tensor

from resq_rl.envs.engine import Conditions, Decision, Engine, FrameResult
from resq_rl.envs.observation import Observation, Seen
from resq_rl.errors import PolicyError, SettingsError
from resq_rl.quantization import Budget, Reference

__all__ = ["FrameView", "Policy", "StreamResult", "Streams"]


@dataclass(frozen=True)
class StreamResult(FrameResult):
    """The result of one frame of each stream, and which frame it was.

    Attributes:
        clip: index of the clip in the problem.
        time: index of the frame in its clip.
        last: whether it was the last frame of its clip.
    """

    clip: Int64[Tensor, " b"]
    time: Int64[Tensor, " b"]
    last: Bool[Tensor, " b"]


class FrameView:
    """The view that a policy has before one frame of each clip; the observation is computed once, and only on demand.

    Args:
        engine: runs the frames.
        inputs: gives the inputs of the frame, and is called only if a policy looks at them.
        state: what the engine keeps of the clips.
        conditions: under what they run.
        streams: the streams that the clips belong to, for `preview`.
    """

    def __init__(
        self,
        engine: Engine,
        inputs: Callable[[], Any],
        state: Any,
        conditions: Conditions,
        streams: "Streams | None" = None,
    ) -> None:
        self._engine, self._inputs, self._state, self._streams = engine, inputs, state, streams
        problem = engine.problem
        self.conditions = conditions
        self.groups, self.layers, self.grid = problem.groups, len(problem.model.sites), problem.grid
        self.network: tuple[str, ...] = problem.model.groups
        self.trade_off_range = conditions.trade_off_range
        self.age: Int64[Tensor, " b"] = state.age

    @property
    def clips(self) -> int:
        """Clips that step together."""
        return len(self.age)

    @cached_property
    def observation(self) -> Observation:
        """The observation of every clip."""
        return self._engine.observe(self._inputs(), self._state, self.conditions)

    @property
    def seen(self) -> Seen:
        """The frames and features that a `NetworkEngine` makes the observation from."""
        seen: Seen = self._engine.seen(self._inputs(), self._state, self.conditions.trade_off)  # type: ignore[attr-defined]
        return seen

    def preview(self, first: Decision, then: "Policy", frames: int) -> list[StreamResult]:
        """The results of the next frames, none of which is run: for bounds only, since no device can do this.

        Args:
            first: how the next frame would run.
            then: decides for the frames after it.
            frames: how many, fewer where a clip ends before; 0 for all that are left.
        """
        if self._streams is None:
            raise PolicyError("Frames that are not read from clips have no future to look at.")
        branch = self._streams.branch()
        results = [branch.step(first)]
        while len(results) != frames and not bool(results[-1].last.any()):
            results.append(branch.step(then.decide(branch.view())))
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
        """Settings that identify it in tables and files."""

    def decide(self, view: FrameView) -> Decision:
        """How the next frame of every clip runs."""


class Streams:
    """Steps B clips of an engine's problem, and keeps for each which frame is next and under what it runs.

    Args:
        engine: runs the frames.
        slots: clips that step together (B).
        reference: what residuals are taken against.
        trade_off_range: range of lambda, for scaling it in the observation.
        budget: what the frames of each clip may cost; None for no limit.
        charge: BOPs of the policy itself per decided frame, as a share of W8A8, for which the budget pays too.

    Raises:
        SettingsError: no clips, no slots, more slots than memory has room for, an impossible range, or a budget that
            cannot be kept.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        slots: int,
        reference: Reference = "previous",
        trade_off_range: tuple[float, float] = (0.05, 1.0),
        budget: Budget | None = None,
        charge: float = 0.0,
    ) -> None:
        if not engine.problem.clips:
            raise SettingsError("Streams need a problem with clips: make it with Problem.prepare.")
        if slots < 1:
            raise SettingsError(f"At least one clip must step at a time, got {slots}.")
        if not 0 < trade_off_range[0] <= trade_off_range[1]:
            raise SettingsError(f"The range of lambda must be positive and ascending, got {trade_off_range}.")
        if budget is not None:
            engine.check_budget(budget, charge)
        _check_memory(engine, slots)
        self.engine, self.problem = engine, engine.problem
        self.slots, self.reference, self.budget, self.charge = slots, reference, budget, charge
        self.trade_off_range = (float(trade_off_range[0]), float(trade_off_range[1]))
        self.state = engine.new_state(slots, reference)
        self.clip = torch.zeros(slots, dtype=torch.int64)
        self.time = torch.zeros(slots, dtype=torch.int64)  # index of the frame that runs next
        self.length = torch.zeros(slots, dtype=torch.int64)
        self.trade_off = torch.full((slots,), trade_off_range[0])
        self.spent = torch.zeros(slots, dtype=torch.float64)
        self.last = torch.zeros(slots, dtype=torch.float64)  # BOPs of the last frame, the policy's own included
        self.credit = torch.ones(slots, dtype=torch.float64) if budget is None else budget.begin(slots)

    @property
    def age(self) -> Int64[Tensor, " b"]:
        """Frames since each slot's keyframe."""
        age: Tensor = self.state.age
        return age

    def last_frame(self, slot: int) -> UInt8[Tensor, "3 h w"]:
        """The frame that ran last in a slot."""
        return self.problem.clips[int(self.clip[slot])].frames[int(self.time[slot]) - 1]

    def start(
        self, slots: Sequence[int], clips: Sequence[int], trade_off: Sequence[float] | None = None
    ) -> StreamResult:
        """Begin clips in some slots: frame 0 runs as the forced keyframe, or as what a budget allows of it.

        Returns:
            The keyframes' results, one row per slot started.

        Raises:
            PolicyError: a lambda is not positive.
        """
        if trade_off is not None and not all(value > 0 for value in trade_off):
            raise PolicyError(f"lambda must be positive for every clip, got {list(trade_off)}.")
        rows = torch.tensor(list(slots), dtype=torch.int64)
        self.clip[rows] = torch.tensor(list(clips), dtype=torch.int64)
        self.time[rows] = 0
        self.spent[rows] = 0
        if self.budget is not None:
            self.credit[rows] = self.budget.begin(len(rows))
        self.length[rows] = torch.tensor([len(self.problem.clips[c]) for c in clips], dtype=torch.int64)
        if trade_off is not None:
            self.trade_off[rows] = torch.tensor(list(trade_off), dtype=torch.float32)
        fresh = self.engine.new_state(len(rows), self.reference)
        result = self._run(rows, fresh, Decision.keyframes(len(rows), self.problem.groups))
        self.state.put(rows, fresh)
        return result

    def step(self, decision: Decision) -> StreamResult:
        """Run the next frame of every slot.

        Raises:
            PolicyError: the decision does not fit, or a slot's clip is over and was not started anew.
            NetworkError: an output is not finite.
        """
        if bool((self.time >= self.length).any()):
            over = torch.nonzero(self.time >= self.length)[:, 0].tolist()
            raise PolicyError(f"The clips of slots {over} are over: call start() for them (reset the environment).")
        return self._run(torch.arange(self.slots), self.state, decision)

    def _run(self, rows: Tensor, state: Any, decision: Decision) -> StreamResult:
        """Run the next frame of the slots in `rows`, whose state is `state`."""
        clips, times = self.clip[rows], self.time[rows]
        charge = torch.where(times > 0, self.charge, 0.0).double()  # nothing is decided on first frames
        limit = None if self.budget is None else self.budget.limit(self.credit[rows]) - charge
        result = self.engine.step(self.engine.inputs(clips, times), state, decision, limit)
        self.spent[rows] += result.bops
        self.last[rows] = result.bops + charge
        if self.budget is not None:
            self.credit[rows] = self.budget.after(self.credit[rows], self.last[rows])
        self.time[rows] += 1
        return StreamResult(**vars(result), clip=clips, time=times, last=self.time[rows] >= self.length[rows])

    def view(self) -> FrameView:
        """A policy's view before each slot's next frame; after the end of a clip, before its last frame once more."""
        clips, times = self.clip.clone(), torch.minimum(self.time, self.length - 1)
        if self.budget is None:
            left, rate = torch.ones(self.slots), torch.ones(self.slots)
        else:
            left, rate = self.budget.left(self.credit), self.budget.rate(self.last)
        conditions = Conditions(self.trade_off, self.trade_off_range, left, rate)
        return FrameView(self.engine, lambda: self.engine.inputs(clips, times), self.state, conditions, self)

    def observe(self) -> Observation:
        """The observation before each slot's next frame; after a clip's end, of its last frame once more."""
        return self.view().observation

    def run(self, policy: Policy) -> Iterator[tuple[Decision, StreamResult]]:
        """Start one clip in every slot and step them to their end; all clips must have one length.

        Returns:
            For every frame the decision and its result, beginning with the forced keyframes.
        """
        slots = list(range(self.slots))
        result = self.start(slots, slots, [policy.trade_off] * len(slots))
        yield Decision.keyframes(self.slots, self.problem.groups), result
        while not bool(result.last.any()):
            decision = policy.decide(self.view())
            result = self.step(decision)
            yield decision, result

    def branch(self) -> "Streams":
        """A copy that runs on from here by itself; the engine is shared."""
        other = copy.copy(self)
        for name, value in self._tensors().items():
            setattr(other, name, value.clone())
        other.state = self.state.clone()
        return other

    def _tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def snapshot(self) -> dict[str, Any]:
        """The state on which the next frames depend, for `restore`; it is not a copy."""
        return {"streams": self._tensors(), "state": self.state.snapshot()}

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Go on from a snapshot, which then belongs to these streams."""
        for name, value in snapshot["streams"].items():
            setattr(self, name, value)
        self.state.restore(snapshot["state"])


def _check_memory(engine: Engine, slots: int) -> None:
    most = engine.clips_that_fit()
    if most is not None and slots > max(1, most):
        model = engine.problem.model
        raise SettingsError(
            f"{slots} clips of {model.frame_size[0]}x{model.frame_size[1]} do not fit into memory together: each "
            f"takes about {model.simulation_bytes / 2**20:,.0f} MiB. Let at most {max(1, most)} step at a time "
            "(environment.clips_per_batch)."
        )
