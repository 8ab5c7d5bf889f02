"""An engine that looks responses up in tables instead of running the network."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from resq_rl.envs.engine import Conditions, Decision, FrameResult
from resq_rl.envs.network_engine import NetworkEngine
from resq_rl.envs.observation import Observation, frame_values, pool_over_regions, region_values
from resq_rl.envs.problem import Problem
from resq_rl.envs.table import ResponseTable
from resq_rl.errors import PolicyError, SettingsError
from resq_rl.quantization import Budget, FrameCost, LevelField, Reference

__all__ = ["TableEngine", "TableState"]

POOLED_TOGETHER = 4096  # rows


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


@dataclass
class TableState:
    """State of each clip in a `TableEngine`: the place of the frame that ran last in the response tables.

    Attributes:
        age: frames since the keyframe; -1 before the first.
        key: index of the keyframe in its clip.
        row: its row.
        level: its level; 0 for a keyframe.
        cost: its row among the costs: its level, or beyond the last for a keyframe.
    """

    age: Int64[Tensor, " b"]
    key: Int64[Tensor, " b"]
    row: Int64[Tensor, " b"]
    level: Int64[Tensor, " b"]
    cost: Int64[Tensor, " b"]
    reference: ClassVar[Reference] = "keyframe"

    def put(self, rows: Int64[Tensor, " n"], other: "TableState") -> None:
        """Replace the clips in `rows` by those of `other`, in order."""
        for name, value in vars(other).items():
            getattr(self, name)[rows] = value

    def clone(self) -> "TableState":
        """A copy that runs on by itself."""
        return TableState(**{name: value.clone() for name, value in vars(self).items()})

    def snapshot(self) -> dict[str, Any]:
        """The tensors that `restore` needs; they are not copies."""
        return dict(vars(self))

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Go on from a snapshot, which then belongs to this state."""
        vars(self).update(snapshot)


class TableEngine:
    """An engine against the keyframe reference that looks frames up instead of running the network.

    Decisions must give each clip one level, the same for all layer groups and regions (the actions "frame_level").
    Observations, errors, BOPs and rewards are those of a `NetworkEngine`; only `FrameResult.prediction` is empty, since
    tables do not keep predictions. Its inputs are the indices of clip and frame.

    Args:
        problem: the network, its task and the clips.
        tables: the response of each clip.

    Raises:
        SettingsError: the tables do not fit the clips, the grid or each other.
    """

    def __init__(self, problem: Problem, tables: Sequence[ResponseTable]) -> None:
        lengths = [len(clip) for clip in problem.clips]
        grids = sorted({table.grid for table in tables})
        if [table.frames for table in tables] != lengths or grids not in ([], [problem.grid]):
            raise SettingsError(
                f"Clips of {lengths} frames and a grid of {problem.grid} need tables of as many frames and that grid, "
                f"got {[table.frames for table in tables]} frames and grids {grids}."
            )
        self.problem, self.tables = problem, tuple(tables)
        self._share, spent = NetworkEngine(problem).spending(tables[0].cost)
        self._rows = _Rows(tables, spent)

    def subset(self, indices: Sequence[int]) -> "TableEngine":
        """The engine of the clips in `indices`."""
        return TableEngine(self.problem.subset(indices), [self.tables[i] for i in indices])

    def new_state(self, clips: int, reference: Reference) -> TableState:
        """A state before the first frame of so many clips.

        Raises:
            PolicyError: `reference` is another one than the keyframe.
        """
        if reference != "keyframe":
            raise PolicyError(f"Tables hold frames against the keyframe, not against the reference {reference!r}.")
        return TableState(torch.full((clips,), -1), *(torch.zeros(clips, dtype=torch.int64) for _ in range(4)))

    def inputs(
        self, clips: Int64[Tensor, " b"], times: Int64[Tensor, " b"]
    ) -> tuple[Int64[Tensor, " b"], Int64[Tensor, " b"]]:
        """Indices of clip and frame."""
        return clips, times

    def check_budget(self, budget: Budget, charge: float = 0.0) -> None:
        """Refuse all budgets: tables begin with a whole keyframe.

        Raises:
            SettingsError: always.
        """
        raise SettingsError(
            "Tables hold frames against whole keyframes, and no frames under a budget: leave the budget out, or run "
            "the network (environment region_thresholds, region_bits or frame_bits)."
        )

    def step(
        self,
        inputs: tuple[Int64[Tensor, " b"], Int64[Tensor, " b"]],
        state: TableState,
        decision: Decision,
        limit: Float64[Tensor, " b"] | None = None,
    ) -> FrameResult:
        """Look a frame of each clip up; `state` is updated in place.

        Raises:
            PolicyError: a level is not the same everywhere, or a keyframe is older than the tables know; or there is a
                limit, under which tables hold nothing.
        """
        if limit is not None:
            raise PolicyError("Tables hold no frames under a limit: run the network.")
        (clip, time), table = inputs, self._rows
        state.level = self._level(clip, state, decision).clone()  # the agents' actions are not this state's memory
        state.age = torch.where(decision.refresh, 0, state.age + 1)
        state.key = time - state.age
        state.row = table.row(clip, state.key, time)
        state.cost = torch.where(decision.refresh, self.tables[0].levels, state.level)
        teacher = self.problem.teacher[0]
        prediction = teacher.new_zeros(len(clip), *[0] * (teacher.dim() - 1))
        cost = _LookedUpCost(self.tables[0].cost, state.cost.clone(), decision.refresh)  # read later than the state
        error, bops = table.error[state.row, state.level], self.tables[0].bops[state.cost]
        return FrameResult(prediction, error, cost, self._share[state.cost], bops)

    def observe(
        self, inputs: tuple[Int64[Tensor, " b"], Int64[Tensor, " b"]], state: TableState, conditions: Conditions
    ) -> Observation:
        """The observation before the frames of `inputs` run."""
        (clip, time), table = inputs, self._rows
        last, level, spent = state.row.clone(), state.level.clone(), state.cost.clone()
        row = table.row(clip, state.key, time)
        frame = table.frame[clip] + time

        def regions() -> Tensor:
            output = table.output[last, level]
            return _region_values(table.residual[row], output, table.texture[frame], table.spent[spent])

        pooled = table.pooled_residual[row] + table.pooled_output[last, level]
        pooled += table.pooled_texture[frame]
        pooled += table.pooled_spent[spent]
        features = frame_values(
            state.age,
            conditions.trade_off,
            conditions.trade_off_range,
            conditions.budget_left,
            table.frame_residual[row],
            table.foreground[last, level],
        )
        return _LookedUpObservation(features, pooled, regions)

    def float_error(self, clips: Int64[Tensor, " b"], times: Int64[Tensor, " b"]) -> Float[Tensor, "b gh gw"]:
        """Error of the float network on frames of the problem's clips."""
        return self._rows.float_error[self._rows.frame[clips] + times]

    def clips_that_fit(self) -> None:
        """No limit: the network does not run."""

    def _level(self, clip: Int64[Tensor, " b"], state: TableState, decision: Decision) -> Int64[Tensor, " b"]:
        """The one level of each decision.

        Raises:
            PolicyError: a level is not the same everywhere, or a keyframe is older than the tables know.
        """
        field, levels = decision.field, self.tables[0].levels
        values = field.levels.flatten(1) if isinstance(field, LevelField) else torch.full((len(clip), 1), -1)
        level = values[:, 0]
        if len(level) != len(clip) or bool(((values != level[:, None]) | (values < 0) | (values >= levels)).any()):
            raise PolicyError(
                f"Tables hold frames at one level for all layer groups and regions: a LevelField of {len(clip)} clips "
                f"with levels 0 to {levels - 1} is needed. Use the actions 'frame_level', or a NetworkEngine."
            )
        known = self._rows.ages[clip]
        old = ~decision.refresh & (state.age + 1 >= known)
        if bool(old.any()):
            raise PolicyError(
                f"The keyframes of clips {clip[old].tolist()} would be {(state.age[old] + 1).tolist()} frames old, the "
                f"tables know ages up to {(known[old] - 1).tolist()}: refresh, or tabulate with a greater `longest`."
            )
        return level
