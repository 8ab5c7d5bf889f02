"""The clairvoyant bound of frame-level decisions: the best schedule of keyframes and levels, found exactly."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from resq_rl.envs import Measurement, Policy, ResponseTable, Streams, TableEngine
from resq_rl.envs.measure import batches, policy_share
from resq_rl.errors import PolicyError
from resq_rl.perception import Task
from resq_rl.quantization import Budget, LevelField
from resq_rl.quantization.specification.budget import exceeds

__all__ = [
    "Schedule",
    "best_schedule",
    "best_schedule_within",
    "measure_on_tables",
    "measure_schedules",
    "oracle_measurement",
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


@dataclass(frozen=True)
class _Ways:
    """Ways of having run the first frames of a clip, of which none has both more credit and a smaller error.

    Attributes:
        credit: of the bucket before the next frame.
        error: sum over the frames.
        step: index of the last step among all steps that were kept.
    """

    credit: Float64[Tensor, " n"]
    error: Float64[Tensor, " n"]
    step: Int64[Tensor, " n"]


def best_schedule_within(table: ResponseTable, budget: Budget) -> Schedule:
    """The schedule of a clip with the least sum of errors, of which every frame keeps a budget.

    What can still be done depends on the keyframe and on the credit of the bucket alone. So frame by frame and for each
    keyframe, a way of having come there is dropped if another one has no less credit and no larger error, which loses
    nothing: the result is exact.

    Raises:
        PolicyError: the budget does not allow the keyframe that a clip begins with, or no schedule.
    """
    error, first = table.error.double(), budget.begin(1)
    if bool(exceeds(table.bops[-1:], budget.limit(first)).any()):
        raise PolicyError(
            f"A clip begins with a keyframe, which costs {float(table.bops[-1]):g}, and the budget allows its first "
            f"frame {float(budget.limit(first)):g}: raise the peak, or the mean or the bucket."
        )
    steps: list[tuple[int, int | None]] = [(-1, None)]  # the step before, and the level
    ways = {0: _Ways(budget.after(first, table.bops[-1:]), error[:1, 0, 0], torch.zeros(1, dtype=torch.int64))}
    levels: list[int | None] = [*range(table.levels), None]
    for time in range(1, table.frames):
        found: dict[int, list[tuple[_Ways, int | None]]] = {time: []}
        for key, own in ways.items():
            found[key] = []
            for level in levels if time - key < table.ages else [None]:
                to, row = (time, (time, 0, 0)) if level is None else (key, (key, time - key, level))
                spent = table.bops[table.levels if level is None else level]
                found[to].append((_run(own, budget, spent, error[row]), level))
        ways = {key: _best(options, steps) for key, options in found.items() if options}
    ends = [own for own in ways.values() if len(own.error)]
    if not ends:
        raise PolicyError(
            "No schedule keeps the budget: residuals cost more than the mean at the lowest level, or a keyframe that "
            "is due does not fit. Raise the mean or the bucket, or tabulate more ages or a level of 0 bits."
        )
    last = min(ends, key=lambda own: float(own.error.min()))
    chosen: list[int | None] = []
    step = int(last.step[last.error.argmin()])
    while step >= 0:
        step, level = steps[step]
        chosen.insert(0, level)
    return Schedule(tuple(chosen))


def _run(ways: _Ways, budget: Budget, bops: Float64[Tensor, ""], error: Float64[Tensor, ""]) -> _Ways:
    """The ways that allow a next frame of such a cost and error, with it."""
    spent = bops.expand(len(ways.credit))
    fits = ~exceeds(spent, budget.limit(ways.credit))
    return _Ways(budget.after(ways.credit, spent)[fits], ways.error[fits] + error, ways.step[fits])


def _best(options: Sequence[tuple[_Ways, int | None]], steps: list[tuple[int, int | None]]) -> _Ways:
    """What is kept of the ways by the level of their last frame, each with a step of its own at the end of `steps`."""
    credit, error, before = (
        torch.cat([getattr(ways, name) for ways, _ in options]) for name in ("credit", "error", "step")
    )
    levels = [level for ways, level in options for _ in range(len(ways.step))]
    kept, most = [], -math.inf
    for _, less, i in sorted(zip(error.tolist(), (-credit).tolist(), range(len(levels)), strict=True)):
        if -less > most:
            most = -less
            kept.append(i)
    begin = len(steps)
    steps += [(int(before[i]), levels[i]) for i in kept]
    return _Ways(credit[kept], error[kept], torch.arange(begin, len(steps)))


def oracle_measurement(task: Task, tables: Sequence[ResponseTable], trade_off: float) -> Measurement:
    """Accuracy and BOPs of the best schedule of every clip, without running it.

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
    """Accuracy and BOPs of a schedule for each clip.

    Args:
        task: what the tables are of.
        tables, schedules: one per clip, in the order of the clips.
        settings: what identifies the schedules.
        policy_share: what deciding costs per decided frame, as a share of W8A8.

    Raises:
        PolicyError: there are no tables, or not a schedule for each.
    """
    frames, scheduled = [table.frames for table in tables], [len(schedule.levels) for schedule in schedules]
    if not frames or frames != scheduled:
        raise PolicyError(
            f"A schedule for each clip is needed, of as many frames; tables have {frames}, schedules {scheduled}."
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


def measure_on_tables(engine: TableEngine, policy: Policy) -> Measurement:
    """Measure a policy of frame-level decisions as `resq_rl.envs.measure` does, without running the network.

    Raises:
        PolicyError: the policy decides for another reference than the keyframe, or not one level for each frame.
    """
    problem = engine.problem
    schedules: dict[int, Schedule] = {}
    for index in batches(problem, len(problem)):
        streams = Streams(
            engine.subset(index),
            slots=len(index),
            reference=policy.reference,
            trade_off_range=policy.trade_off_range,
        )
        schedules |= dict(zip(index, _schedules(streams, policy), strict=True))
    own = [schedules[i] for i in range(len(problem))]
    return measure_schedules(problem.task, engine.tables, own, policy.settings, policy_share(problem, policy))


def _schedules(streams: Streams, policy: Policy) -> list[Schedule]:
    """The schedules that a policy of frame-level decisions makes, one for the clip in each slot."""
    chosen: list[list[int | None]] = [[] for _ in range(streams.slots)]
    for decision, _ in streams.run(policy):  # the engine refuses all but one level for each frame
        levels = cast(LevelField, decision.field).levels[:, 0, 0, 0].tolist()
        for own, refresh, level in zip(chosen, decision.refresh.tolist(), levels, strict=True):
            own.append(None if refresh else level)
    return [Schedule(tuple(own)) for own in chosen]
