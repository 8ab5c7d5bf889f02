"""The clairvoyant bound of frame-level decisions: the best schedule of keyframes and levels, found exactly."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from jaxtyping import Int64
from torch import Tensor

from resq_rl.envs import ClipStore, Decision, FrameView, Measurement, Policy, ResponseTable, TableSimulator
from resq_rl.envs.measure import batches
from resq_rl.errors import PolicyError
from resq_rl.perception import Task
from resq_rl.quantization import LevelField, Reference, ResQModel

__all__ = [
    "Responses",
    "Schedule",
    "Scheduled",
    "best_schedule",
    "measure_schedules",
    "oracle_measurement",
    "rollout",
]


@dataclass(frozen=True)
class Schedule:
    """How each frame of a clip runs: as a residual at a level, or as a keyframe where that is None.

    Raises:
        PolicyError: the first frame is no keyframe.
    """

    levels: tuple[int | None, ...]

    def __post_init__(self) -> None:
        if not self.levels or self.levels[0] is not None:
            raise PolicyError(f"The first frame of a clip is a keyframe (None), got {self.levels[:1]}.")

    @property
    def rows(self) -> tuple[Int64[Tensor, " t"], Int64[Tensor, " t"], Int64[Tensor, " t"]]:
        """Keyframe, age of the keyframe and level of each frame: its row in a `ResponseTable`."""
        times = torch.arange(len(self.levels))
        level = torch.tensor([-1 if chosen is None else chosen for chosen in self.levels])
        key = torch.where(level < 0, times, 0).cummax(0).values
        return key, times - key, level.clamp_min(0)


def best_schedule(table: ResponseTable, trade_off: float) -> Schedule:
    """The schedule of a clip with the least sum of error + trade_off * BOPs over its frames.

    A residual frame depends on its keyframe alone, so given that it takes its own best level, and with c(k, a) what
    keyframe k (a = 0) or the frame of age a then costs, the least cost V(k) of all frames from keyframe k on obeys

        V(k) = min over n of  c(k, 0) + ... + c(k, n - 1) + V(k + n),    V(T) = 0,

    n being the frames until the next keyframe or the end. T * T * L steps for T frames and L levels.

    Raises:
        PolicyError: lambda is not positive.
    """
    if not trade_off > 0:
        raise PolicyError(f"lambda must be positive, got {trade_off}.")
    cost = table.error.double()
    residual, level = (cost[:, 1:] + trade_off * table.bops[:-1]).min(2)
    keyframe = cost[:, :1, 0] + trade_off * table.bops[-1]
    together = torch.cat([keyframe, residual], 1).cumsum(1)  # [k, n - 1]: of keyframe k and the frames after it
    value = torch.zeros(table.frames + 1, dtype=torch.float64)
    length = [0] * table.frames
    for key in reversed(range(table.frames)):
        most = min(table.ages, table.frames - key)
        value[key], n = (together[key, :most] + value[key + 1 : key + 1 + most]).min(0)
        length[key] = int(n) + 1
    levels: list[int | None] = []
    while len(levels) < table.frames:
        key = len(levels)
        levels += [None, *level[key, : length[key] - 1].tolist()]
    return Schedule(tuple(levels))


def oracle_measurement(task: Task, tables: Sequence[ResponseTable], trade_off: float) -> Measurement:
    """What the best schedule of every clip gives and spends, without running it.

    It knows the whole clip and its targets beforehand and is charged nothing for deciding: a bound, not a policy. What
    it bounds is the error plus lambda times the BOPs, as in rewards; mean IoU follows that error to first order only.

    Args:
        task: what the tables are of.
        tables: one per clip, in the order of the clips.
        trade_off: lambda.

    Raises:
        PolicyError: lambda is not positive, or there are no tables.
    """
    schedules = [best_schedule(table, trade_off) for table in tables]
    return measure_schedules(task, tables, schedules, {"trade_off": trade_off, "reference": "keyframe"})


def measure_schedules(
    task: Task,
    tables: Sequence[ResponseTable],
    schedules: Sequence[Schedule],
    settings: dict[str, object],
    policy_share: float = 0.0,
) -> Measurement:
    """What a schedule for each clip gives and spends.

    Args:
        task: what the tables are of.
        tables, schedules: one per clip, in the order of the clips.
        settings: what identifies the schedules.
        policy_share: what deciding costs per decided frame, as a share of W8A8.

    Raises:
        PolicyError: there are no tables, or not a schedule for each.
    """
    frames = [table.frames for table in tables]
    if not frames or frames != [len(schedule.levels) for schedule in schedules]:
        raise PolicyError(
            f"A schedule for each clip is needed, of as many frames; tables have {frames}, schedules "
            f"{[len(schedule.levels) for schedule in schedules]}."
        )
    counts, sums = [], []
    for table, schedule in zip(tables, schedules, strict=True):
        key, age, level = schedule.rows
        first = age == 0
        row = torch.where(first, table.levels, level)
        bops, elementwise = table.bops[row], table.cost.elementwise[row].sum()
        charged = bops + policy_share
        charged[0] = bops[0]  # the first keyframe is no decision
        counts.append(table.counts[key, age, level].sum(0))
        error = table.error[key, age, level].double().sum()
        parts = [error, bops[first].sum(), bops[~first].sum(), charged.amax(), first.sum(), elementwise]
        sums.append(torch.stack(parts))
    error, keyframe, residual, peak, keyframes, elementwise = torch.stack(sums, 1)
    return Measurement(
        task,
        torch.stack(counts),
        error,
        torch.tensor(frames),
        keyframe,
        residual,
        (torch.tensor(frames) - 1).double() * policy_share,
        peak,
        keyframes.long(),
        elementwise,
        tables[0].state_bytes,
        settings,
    )


@dataclass(frozen=True)
class Responses:
    """The tables of a store's clips: what frame-level decisions give there, without running the network.

    Attributes:
        model, task, store: as of a `Simulator`.
        tables: one per clip.
    """

    model: ResQModel
    task: Task
    store: ClipStore
    tables: tuple[ResponseTable, ...]

    def measure(self, policy: Policy) -> Measurement:
        """What `resq_rl.envs.measure` gives for a policy of frame-level decisions.

        Raises:
            PolicyError: the policy decides for another reference than the keyframe, or not one level for each frame.
        """
        if policy.reference != "keyframe":
            raise PolicyError(f"Tables hold frames against the keyframe, the policy is for {policy.reference!r}.")
        schedules: dict[int, Schedule] = {}
        for index in batches(self.store, len(self.store)):
            simulator = TableSimulator(
                self.model,
                self.task,
                self.store.subset(index),
                [self.tables[i] for i in index],
                slots=len(index),
                trade_off_range=policy.trade_off_range,
            )
            schedules |= dict(zip(index, rollout(simulator, policy), strict=True))
        share = policy.macs * policy.bits**2 / self.model.reference_bops()
        own = [schedules[i] for i in range(len(self.store))]
        return measure_schedules(self.task, self.tables, own, policy.settings, share)


def rollout(simulator: TableSimulator, policy: Policy) -> list[Schedule]:
    """The schedules that a policy of frame-level decisions makes, one for the clip in each slot.

    Args:
        simulator: with as many slots as its store has clips, all of one length.
        policy: decides one level for each frame, against the keyframe reference.
    """
    slots = list(range(simulator.slots))
    simulator.start(slots, slots, [policy.trade_off] * len(slots))
    chosen: list[list[int | None]] = [[None] for _ in slots]
    while bool((simulator.time < simulator.length).all()):
        decision = policy.decide(FrameView(simulator))
        simulator.step(decision)  # which refuses all but one level for each frame
        levels = cast(LevelField, decision.field).levels[:, 0, 0, 0].tolist()
        for own, refresh, level in zip(chosen, decision.refresh.tolist(), levels, strict=True):
            own.append(None if refresh else level)
    return [Schedule(tuple(own)) for own in chosen]


@dataclass(frozen=True, eq=False)
class Scheduled:
    """A policy that replays a schedule for each clip of a store, whatever it observes.

    Attributes:
        store: the clips.
        schedules: one per clip, in order.
    """

    store: ClipStore
    schedules: tuple[Schedule, ...]
    reference: Reference = field(default="keyframe", init=False)
    trade_off: float = field(default=1.0, init=False)
    trade_off_range: tuple[float, float] = field(default=(1.0, 1.0), init=False)
    macs: int = field(default=0, init=False)
    bits: int = field(default=8, init=False)

    def __post_init__(self) -> None:
        frames, scheduled = [len(c) for c in self.store.clips], [len(s.levels) for s in self.schedules]
        if frames != scheduled:
            raise PolicyError(f"Clips of {frames} frames need schedules of as many, got {scheduled}.")

    @property
    def settings(self) -> dict[str, object]:
        """The schedules."""
        return {"reference": self.reference, "schedules": [list(s.levels) for s in self.schedules]}

    def decide(self, view: FrameView) -> Decision:
        """What the schedules say.

        Raises:
            PolicyError: a clip of the view is not of the store.
        """
        # A view tells neither clip nor time, which a policy must not know; a replay must, so it looks behind the view.
        simulator = view._simulator
        own = {id(clip): schedule for clip, schedule in zip(self.store.clips, self.schedules, strict=True)}
        clips = [id(simulator.store.clips[c]) for c in simulator.clip.tolist()]
        if not own.keys() >= set(clips):
            raise PolicyError("A clip has no schedule: measure a replay on the clips of its own store.")
        chosen = [own[clip].levels[t] for clip, t in zip(clips, simulator.time.tolist(), strict=True)]
        levels = torch.tensor([level or 0 for level in chosen])
        field = LevelField(levels[:, None, None, None].expand(-1, view.groups, 1, 1))
        return Decision(torch.tensor([level is None for level in chosen]), field)
