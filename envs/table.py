"""Tabulated responses of a clip: against the keyframe, a residual frame depends on its keyframe and level alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Float64, Int64, Num, UInt8
from torch import Tensor

from resq_rl.envs.clips import ClipStore, gather
from resq_rl.envs.observation import (
    Observation,
    difference,
    frame_texture,
    pool_max,
    pool_mean,
    pool_over_regions,
    region_values,
)
from resq_rl.envs.simulator import Decision, FrameResult, Simulator
from resq_rl.errors import PolicyError, SettingsError
from resq_rl.perception import Recurrent, Task
from resq_rl.quantization import FrameCost, LevelField, ResQModel, StreamState

__all__ = ["ResponseTable", "TableSimulator", "check_tabular", "respond"]

CHUNK = 32  # rows that run in one forward pass
POOLED_TOGETHER = 4096  # rows


@dataclass(frozen=True)
class ResponseTable:
    """What every frame of a clip gives against every keyframe before it, at one level for all layers and regions.

    Row [k, a, l] is frame k + a as a residual against keyframe k at level l. Row [k, 0, l] is keyframe k itself, the
    same for every l. Rows beyond the end of the clip hold no counts and NaN. There are T frames, ages 0 to A - 1, L
    levels.

    Attributes:
        counts: `Task.counts` of each row.
        region_error: `FrameResult.error`, the cost of the errors by region.
        output: the output's features by region, as the next observation shows them (`Task.features`).
        residual: the features residual_mean and residual_max of frame k + a against keyframe k.
        frame_residual: its feature frame_residual_mean.
        texture: the feature texture of each frame.
        float_error: the cost of the float network's errors in each frame.
        cost: BOPs and elementwise operations at each level, and last of a keyframe (L + 1 rows): a level that is the
            same everywhere costs the same in every frame.
        bops: their BOPs as a share of W8A8 (L + 1).
        state_bytes: bytes of reference state.
    """

    counts: Num[Tensor, "t a l *c"]
    region_error: Float[Tensor, "t a l gh gw"]
    output: Float[Tensor, "t a l gh gw 3"]
    residual: Float[Tensor, "t a gh gw 2"]
    frame_residual: Float[Tensor, "t a"]
    texture: Float[Tensor, "t gh gw"]
    float_error: Float[Tensor, "t gh gw"]
    cost: FrameCost
    bops: Float64[Tensor, "l+1"]
    state_bytes: int

    @property
    def frames(self) -> int:
        """Frames of the clip (T)."""
        return self.region_error.shape[0]

    @property
    def ages(self) -> int:
        """Ages of the keyframe that are tabulated (A), its own 0 among them."""
        return self.region_error.shape[1]

    @property
    def levels(self) -> int:
        """Levels of a residual frame (L)."""
        return self.region_error.shape[2]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of regions."""
        return self.region_error.shape[3], self.region_error.shape[4]

    @property
    def error(self) -> Float[Tensor, "t a l"]:
        """Error of the frame of each row."""
        return self.region_error.mean((3, 4))


def check_tabular(task: Task) -> None:
    """Raise SettingsError where a frame's response depends on more than its keyframe, itself and the level."""
    if isinstance(task, Recurrent):
        raise SettingsError(
            f"{type(task).__name__} feeds predictions back, so what a frame gives depends on every decision before it, "
            "and a table of responses by keyframe, frame and level would be wrong. Measure and train on the network: "
            "choose another environment than frame_level."
        )


@torch.no_grad()
def respond(
    model: ResQModel,
    task: Task,
    store: ClipStore,
    index: int,
    *,
    grid: tuple[int, int] = (6, 10),
    longest: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> ResponseTable:
    """Run every frame of a clip against every keyframe before it, at every level.

    That is T keyframes, L frames for the costs and L * T * (T - 1) / 2 residual frames of T, fewer with `longest`.

    Args:
        model, task, store: as a `Simulator` has them.
        index: which of the store's clips.
        grid: rows and columns of regions.
        longest: greatest age of a keyframe, in frames; None for the length of the clip.
        progress: called with the number of frames done after each step.

    Raises:
        SettingsError: `longest` is negative, the clip and grid do not fit the model, or the task is recurrent.
    """
    check_tabular(task)
    if longest is not None and longest < 0:
        raise SettingsError(f"longest must be 0 frames or more, or None for the whole clip, got {longest}.")
    clip = _Clip(model, task, store.subset([index]), grid, progress)
    pixels, levels = store.clips[index].frames, len(model.config.levels)
    frames = len(pixels)
    ages = frames if longest is None else min(longest + 1, frames)
    shape = store.float_counts.shape[1:]
    counts = torch.zeros(frames, ages, levels, *shape, dtype=store.float_counts.dtype)
    error = torch.full((frames, ages, levels, *grid), torch.nan)
    output = torch.full((frames, ages, levels, *grid, 3), torch.nan)
    residual, frame_residual = torch.full((frames, ages, *grid, 2), torch.nan), torch.full((frames, ages), torch.nan)
    float_error = torch.zeros(frames, *grid)
    costs: list[FrameCost] = []
    for key in range(frames):
        state = model.new_state(1, "keyframe")
        own, counts[key, 0], output[key, 0] = clip.run(state, torch.tensor([key]), torch.tensor([0]))
        error[key, 0] = own.error
        float_error[key] = clip.simulator(1).float_error(own)[0]
        known = min(ages, frames - key)
        residual[key, :known], frame_residual[key, :known] = _residuals(pixels[key : key + known], pixels[key], grid)
        if not costs:
            costs = [clip.run(state, torch.zeros(levels, dtype=torch.int64), torch.arange(levels))[0].cost, own.cost]
        later = torch.cartesian_prod(torch.arange(1, known), torch.arange(levels))
        for age, level in (part.T for part in later.split(CHUNK) if len(part)):
            result, counts[key, age, level], output[key, age, level] = clip.run(state, key + age, level)
            error[key, age, level] = result.error
    names = ("bops", "keyframe", "elementwise")
    cost = FrameCost(*(torch.cat([getattr(c, name) for c in costs]) for name in names))
    bops = cost.total / model.reference_bops()
    texture, state_bytes = frame_texture(pixels, grid), model.state_bytes("keyframe")
    return ResponseTable(counts, error, output, residual, frame_residual, texture, float_error, cost, bops, state_bytes)


def _residuals(
    frames: UInt8[Tensor, "n 3 h w"], keyframe: UInt8[Tensor, "3 h w"], grid: tuple[int, int]
) -> tuple[Float[Tensor, "n gh gw 2"], Float[Tensor, " n"]]:
    """Features of the pixel residuals against a keyframe, as `Simulator.observe` computes them."""
    residual = difference(frames, keyframe.expand_as(frames))
    parts = [pool_mean(residual, grid).sqrt_(), pool_max(residual, grid)]
    return torch.stack(parts, -1), residual.mean((1, 2)).sqrt_()


@dataclass(frozen=True)
class _Clip:
    """A clip (the only one of its store) whose frames run in any order."""

    model: ResQModel
    task: Task
    store: ClipStore
    grid: tuple[int, int]
    progress: Callable[[int], None] | None

    def simulator(self, slots: int) -> Simulator:
        """A simulator of the clip."""
        return Simulator(self.model, self.task, self.store, slots=slots, grid=self.grid, reference="keyframe")

    def run(
        self, state: StreamState, times: Int64[Tensor, " b"], levels: Int64[Tensor, " b"]
    ) -> tuple[FrameResult, Num[Tensor, "b *c"], Float[Tensor, "b gh gw 3"]]:
        """Frames against the keyframe in `state`, or as it where there is none: result, counts, output features."""
        simulator = self.simulator(len(times))
        refresh = torch.full((len(times),), not state.inputs)
        simulator.state = state if not state.inputs else _spread(state, len(times))
        simulator.time, simulator.length[:] = times.clone(), len(self.store.clips[0])
        field = LevelField(levels[:, None, None, None].expand(-1, simulator.groups, 1, 1))
        result = simulator.step(Decision(refresh, field))
        targets = gather(self.store.targets, result.clip, result.time)
        if self.progress is not None:
            self.progress(len(times))
        return result, self.task.counts(result.prediction, targets), simulator._output


def _spread(state: StreamState, clips: int) -> StreamState:
    """The state of one clip for many; they share its memory, which residuals against a keyframe only read."""
    inputs, outputs = ([x.expand(clips, *x.shape[1:]) for x in own] for own in (state.inputs, state.outputs))
    return StreamState("keyframe", state.age.expand(clips), inputs, outputs, list(state.versions))


class _Rows:
    """The tables of all clips, one below the other, and what agents that see the whole frame observe of them.

    Row [k, a] of a clip is at first + k * ages + a; of frames alone (texture, float error), row t is at frame + t.
    """

    def __init__(self, tables: Sequence[ResponseTable], spent: Float[Tensor, "n gh gw g"]) -> None:
        def joined(name: str, dims: int) -> Tensor:
            return torch.cat([getattr(table, name).flatten(0, dims - 1) for table in tables])

        self.error: Float[Tensor, "n l gh gw"] = joined("region_error", 2)
        self.output: Float[Tensor, "n l gh gw 3"] = joined("output", 2)
        self.residual: Float[Tensor, "n gh gw 2"] = joined("residual", 2)
        self.frame_residual: Float[Tensor, " n"] = joined("frame_residual", 2)
        self.texture: Float[Tensor, "f gh gw"] = joined("texture", 1)
        self.float_error: Float[Tensor, "f gh gw"] = joined("float_error", 1)
        self.spent = spent
        self.foreground: Float[Tensor, "n l"] = self.output[..., 2].mean((2, 3))
        self.ages = torch.tensor([table.ages for table in tables])
        frames = torch.tensor([table.frames for table in tables])
        self.frame = frames.cumsum(0) - frames
        self.first = (frames * self.ages).cumsum(0) - frames * self.ages
        self._pool()

    def _pool(self) -> None:
        """Features pooled over the regions; those of other parts are 0, so that the parts' sum holds them all."""
        parts = self.residual, self.output.flatten(0, 1), self.texture, self.spent
        empty = [torch.zeros_like(values[:1]) for values in parts]
        pooled: list[Float[Tensor, "n 2 f"]] = []
        for i, own in enumerate(parts):
            chunks = []
            for some in own.split(POOLED_TOGETHER):
                alone = (some if j == i else v.expand(len(some), *v.shape[1:]) for j, v in enumerate(empty))
                chunks.append(pool_over_regions(_region_values(*alone)))
            pooled.append(torch.cat(chunks))
        self.pooled_residual, output, self.pooled_texture, self.pooled_spent = pooled
        self.pooled_output = output.unflatten(0, self.output.shape[:2])

    def row(
        self, clip: Int64[Tensor, " b"], key: Int64[Tensor, " b"], time: Int64[Tensor, " b"]
    ) -> Int64[Tensor, " b"]:
        """Rows of frames `time` against keyframes `key`."""
        return self.first[clip] + key * self.ages[clip] + time - key


def _region_values(residual: Tensor, output: Tensor, texture: Tensor, spent: Tensor) -> Float[Tensor, "b gh gw f"]:
    """`region_values` against the keyframe, where the residual is the drift."""
    mean, largest = residual.unbind(-1)
    return region_values(mean, largest, mean, output, texture, spent)


class _LookedUpObservation(Observation):
    """An observation whose regions are looked up when asked for: agents that see the whole frame need them pooled."""

    def __init__(
        self, frame: Float[Tensor, "b k"], pooled: Float[Tensor, "b 2 f"], regions: Callable[[], Tensor]
    ) -> None:
        vars(self).update(frame=frame, _pooled=pooled, _regions=regions)

    @cached_property
    def regions(self) -> Float[Tensor, "b gh gw f"]:
        found: Tensor = vars(self)["_regions"]()
        return found

    def per_frame(self) -> Float[Tensor, "b n"]:
        """Mean and maximum of the region features over the regions, followed by the frame's."""
        return torch.cat([vars(self)["_pooled"].flatten(1), self.frame], 1)


class _LookedUpCost(FrameCost):
    """Costs that are looked up in a table when asked for: by layer and region they are many numbers."""

    def __init__(self, table: FrameCost, row: Int64[Tensor, " b"], keyframe: Bool[Tensor, " b"]) -> None:
        vars(self).update(_table=table, _row=row, keyframe=keyframe)

    @cached_property
    def bops(self) -> Float64[Tensor, "b s gh gw"]:
        found: Tensor = vars(self)["_table"].bops[vars(self)["_row"]]
        return found

    @cached_property
    def elementwise(self) -> Float64[Tensor, " b"]:
        found: Tensor = vars(self)["_table"].elementwise[vars(self)["_row"]]
        return found


class TableSimulator(Simulator):
    """A `Simulator` against the keyframe reference that looks frames up instead of running the network.

    Decisions must give each clip one level, the same for all layer groups and regions (the actions "frame_level").
    Observations, errors, BOPs and rewards are those of a `Simulator`; only `FrameResult.prediction` is empty, since
    tables do not keep predictions.

    Args:
        model, task, store, slots, trade_off_range, budget: as of a `Simulator`.
        tables: the response of each clip of the store.

    Raises:
        SettingsError: the tables do not fit the store or each other.
        PolicyError: by `step`: a level is not the same everywhere, or a keyframe is older than the tables know.
    """

    def __init__(
        self,
        model: ResQModel,
        task: Task,
        store: ClipStore,
        tables: Sequence[ResponseTable],
        *,
        slots: int,
        trade_off_range: tuple[float, float] = (0.05, 1.0),
        budget: float | None = None,
    ) -> None:
        lengths = [len(clip) for clip in store.clips]
        if [table.frames for table in tables] != lengths or len({table.grid for table in tables}) > 1:
            raise SettingsError(
                f"Clips of {lengths} frames need tables of as many frames and one grid, got "
                f"{[table.frames for table in tables]} frames and grids {sorted({table.grid for table in tables})}."
            )
        super().__init__(
            model,
            task,
            store,
            slots=slots,
            grid=tables[0].grid,
            reference="keyframe",
            trade_off_range=trade_off_range,
            budget=budget,
        )
        self.tables = tuple(tables)
        self._share, spent = self._spending_of(tables[0].cost)
        self._rows = _Rows(tables, spent)
        self._row = torch.zeros(slots, dtype=torch.int64)  # of the frame that ran last
        self._ran_at = torch.zeros(slots, dtype=torch.int64)  # its level
        self._spent_row = torch.zeros(slots, dtype=torch.int64)  # its level, or beyond the last for a keyframe

    def _check_memory(self, model: ResQModel, slots: int) -> None:
        """Nothing to check: the network does not run."""

    def last_frame(self, slot: int) -> UInt8[Tensor, "3 h w"]:
        """The frame that ran last in a slot."""
        return self.store.clips[int(self.clip[slot])].frames[int(self.time[slot]) - 1]

    def _run(self, rows: Tensor, state: StreamState, decision: Decision) -> FrameResult:
        level, table = self._level(rows, state, decision), self._rows
        state.age = torch.where(decision.refresh, 0, state.age + 1)
        clip, time = self.clip[rows], self.time[rows]
        row = table.row(clip, time - state.age, time)
        spent = torch.where(decision.refresh, self.tables[0].levels, level)
        self._row[rows], self._ran_at[rows], self._spent_row[rows] = row, level, spent
        cost = _LookedUpCost(self.tables[0].cost, spent, decision.refresh)
        teacher = self.store.teacher[0]
        prediction = teacher.new_zeros(len(rows), *[0] * (teacher.dim() - 1))
        total = self.tables[0].bops[spent]
        return self._advance(rows, prediction, table.error[row, level], cost, self._share[spent], total)

    def float_error(self, result: FrameResult) -> Float[Tensor, "b gh gw"]:
        """The error that the float network makes on the frames of `result`."""
        return self._rows.float_error[self._rows.frame[result.clip] + result.time]

    def observe(self) -> Observation:
        """The observation before each slot's next frame; after a clip's end, of its last frame once more."""
        table, time = self._rows, torch.minimum(self.time, self.length - 1)
        row = table.row(self.clip, self.time - 1 - self.age, time)
        last, level, spent = self._row.clone(), self._ran_at.clone(), self._spent_row.clone()
        frame = table.frame[self.clip] + time

        def regions() -> Tensor:
            output = table.output[last, level]
            return _region_values(table.residual[row], output, table.texture[frame], table.spent[spent])

        pooled = table.pooled_residual[row] + table.pooled_output[last, level]
        pooled += table.pooled_texture[frame]
        pooled += table.pooled_spent[spent]
        features = self._frame_features(table.frame_residual[row], table.foreground[last, level])
        return _LookedUpObservation(features, pooled, regions)

    def _level(self, rows: Tensor, state: StreamState, decision: Decision) -> Int64[Tensor, " b"]:
        """The one level of each decision.

        Raises:
            PolicyError: a level is not the same everywhere, or a keyframe is older than the tables know.
        """
        field, levels = decision.field, self.tables[0].levels
        values = field.levels.flatten(1) if isinstance(field, LevelField) else torch.full((len(rows), 1), -1)
        level = values[:, 0]
        if len(level) != len(rows) or bool(((values != level[:, None]) | (values < 0) | (values >= levels)).any()):
            raise PolicyError(
                f"Tables hold frames at one level for all layer groups and regions: a LevelField of {len(rows)} clips "
                f"with levels 0 to {levels - 1} is needed. Use the actions 'frame_level', or a Simulator."
            )
        known = self._rows.ages[self.clip[rows]]
        old = ~decision.refresh & (state.age + 1 >= known)
        if bool(old.any()):
            raise PolicyError(
                f"The keyframes of slots {rows[old].tolist()} would be {(state.age[old] + 1).tolist()} frames old, the "
                f"tables know ages up to {(known[old] - 1).tolist()}: refresh, or tabulate with a greater `longest`."
            )
        return level
