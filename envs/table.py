"""Tabulated responses of a clip: against the keyframe, a residual frame depends on its keyframe and level alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from resq_rl.envs.clips import ClipStore, gather
from resq_rl.envs.simulator import Decision, FrameResult, Simulator
from resq_rl.errors import PolicyError, SettingsError
from resq_rl.perception import Segmentation
from resq_rl.quantization import FrameCost, LevelField, ResQModel, StreamState

__all__ = ["ResponseTable", "TableSimulator", "respond"]

CHUNK = 32  # rows that run in one forward pass


@dataclass(frozen=True)
class ResponseTable:
    """What every frame of a clip gives against every keyframe before it, at one level for all layers and regions.

    Row [k, a, l] is frame k + a as a residual against keyframe k at level l. Row [k, 0, l] is keyframe k itself, the
    same for every l. Rows beyond the end of the clip hold no pixels and NaN. There are T frames, ages 0 to A - 1, L
    levels.

    Attributes:
        confusion: pixels by target class and predicted class.
        region_error: `FrameResult.error`, the cost of the errors by region.
        output: the output's features by region, as the next observation shows them (`output_features`).
        cost: BOPs and elementwise operations at each level, and last of a keyframe (L + 1 rows): a level that is the
            same everywhere costs the same in every frame.
        bops: their BOPs as a share of W8A8 (L + 1).
        state_bytes: bytes of reference state.
    """

    confusion: Int64[Tensor, "t a l k k"]
    region_error: Float[Tensor, "t a l gh gw"]
    output: Float[Tensor, "t a l gh gw 3"]
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
        """Mean cost of the errors per pixel of each row."""
        return self.region_error.mean((3, 4))


@torch.no_grad()
def respond(
    model: ResQModel,
    task: Segmentation,
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
        SettingsError: `longest` is negative, or the clip and grid do not fit the model.
    """
    if longest is not None and longest < 0:
        raise SettingsError(f"longest must be 0 frames or more, or None for the whole clip, got {longest}.")
    clip = _Clip(model, task, store.subset([index]), grid, progress)
    frames, levels = len(store.clips[index]), len(model.config.levels)
    ages = frames if longest is None else min(longest + 1, frames)
    confusion = torch.zeros(frames, ages, levels, task.classes, task.classes, dtype=torch.int64)
    error = torch.full((frames, ages, levels, *grid), torch.nan)
    output = torch.full((frames, ages, levels, *grid, 3), torch.nan)
    costs: list[FrameCost] = []
    for key in range(frames):
        state = model.new_state(1, "keyframe")
        own, confusion[key, 0], output[key, 0] = clip.run(state, torch.tensor([key]), torch.tensor([0]))
        error[key, 0] = own.error
        if not costs:
            costs = [clip.run(state, torch.zeros(levels, dtype=torch.int64), torch.arange(levels))[0].cost, own.cost]
        later = torch.cartesian_prod(torch.arange(1, min(ages, frames - key)), torch.arange(levels))
        for age, level in (part.T for part in later.split(CHUNK) if len(part)):
            result, confusion[key, age, level], output[key, age, level] = clip.run(state, key + age, level)
            error[key, age, level] = result.error
    names = ("bops", "keyframe", "elementwise")
    cost = FrameCost(*(torch.cat([getattr(c, name) for c in costs]) for name in names))
    bops = cost.total / model.reference_bops()
    return ResponseTable(confusion, error, output, cost, bops, model.state_bytes("keyframe"))


@dataclass(frozen=True)
class _Clip:
    """A clip (the only one of its store) whose frames run in any order."""

    model: ResQModel
    task: Segmentation
    store: ClipStore
    grid: tuple[int, int]
    progress: Callable[[int], None] | None

    def run(
        self, state: StreamState, times: Int64[Tensor, " b"], levels: Int64[Tensor, " b"]
    ) -> tuple[FrameResult, Int64[Tensor, "b k k"], Float[Tensor, "b gh gw 3"]]:
        """Frames against the keyframe in `state`, or as it where there is none: result, confusion, output features."""
        simulator = Simulator(self.model, self.task, self.store, slots=len(times), grid=self.grid, reference="keyframe")
        refresh = torch.full((len(times),), not state.inputs)
        simulator.state = state if not state.inputs else _spread(state, len(times))
        simulator.time, simulator.length[:] = times.clone(), len(self.store.clips[0])
        field = LevelField(levels[:, None, None, None].expand(-1, simulator.groups, 1, 1))
        result = simulator.step(Decision(refresh, field))
        targets = gather(self.store.targets, result.clip, result.time)
        if self.progress is not None:
            self.progress(len(times))
        return result, self.task.confusion(result.prediction, targets), simulator._output


def _spread(state: StreamState, clips: int) -> StreamState:
    """The state of one clip for many; they share its memory, which residuals against a keyframe only read."""
    inputs, outputs = ([x.expand(clips, *x.shape[1:]) for x in own] for own in (state.inputs, state.outputs))
    return StreamState("keyframe", state.age.expand(clips), inputs, outputs, list(state.versions))


class TableSimulator(Simulator):
    """A `Simulator` against the keyframe reference that looks frames up instead of running the network.

    Decisions must give each clip one level, the same for all layer groups and regions (the actions "frame_level").
    Observations, errors, BOPs and rewards are those of a `Simulator`; only `FrameResult.prediction` is empty (0x0
    pixels), since tables do not keep predictions.

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
        task: Segmentation,
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

    def _run(self, rows: Tensor, state: StreamState, decision: Decision) -> FrameResult:
        level = self._level(rows, state, decision)
        state.age = torch.where(decision.refresh, 0, state.age + 1)
        clips, keys = self.clip[rows], self.time[rows] - state.age
        at = list(zip(clips.tolist(), keys.tolist(), state.age.tolist(), level.tolist(), strict=True))
        error = torch.stack([self.tables[c].region_error[k, a, n] for c, k, a, n in at])
        output = torch.stack([self.tables[c].output[k, a, n] for c, k, a, n in at])
        spent = self.tables[0].cost
        row = torch.where(decision.refresh, self.tables[0].levels, level)
        cost = FrameCost(spent.bops[row], decision.refresh, spent.elementwise[row])
        prediction = torch.zeros(len(rows), 0, 0, dtype=torch.uint8)
        return self._finish(rows, self._frames(rows), prediction, error, output, cost)

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
        known = torch.tensor([self.tables[c].ages for c in self.clip[rows].tolist()])
        old = ~decision.refresh & (state.age + 1 >= known)
        if bool(old.any()):
            raise PolicyError(
                f"The keyframes of slots {rows[old].tolist()} would be {(state.age[old] + 1).tolist()} frames old, the "
                f"tables know ages up to {(known[old] - 1).tolist()}: refresh, or tabulate with a greater `longest`."
            )
        return level
