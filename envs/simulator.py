"""The batched simulator under every environment: B clips step in one forward pass."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Float64, Int64, Num, UInt8
from torch import Tensor

from resq_rl.envs.clips import ClipStore, gather
from resq_rl.envs.observation import (
    Observation,
    Seen,
    frame_values,
    observed,
    pool_mean,
)
from resq_rl.errors import NetworkError, PolicyError, SettingsError
from resq_rl.perception import Recurrent, Task, recurrent_inputs
from resq_rl.quantization import (
    Field,
    FrameCost,
    Inputs,
    LevelField,
    Reference,
    ResQModel,
    StreamState,
    ThresholdField,
    as_tuple,
    to_float,
)
from resq_rl.quantization.specification.fields import cells_of

__all__ = ["Decision", "FrameResult", "Simulator", "clips_that_fit"]


MEMORY = Path("/proc/meminfo")


@dataclass(frozen=True)
class Decision:
    """What one frame of each clip shall run as: a keyframe where `refresh`, else a residual under `field`."""

    refresh: Bool[Tensor, " b"]
    field: Field


@dataclass(frozen=True)
class FrameResult:
    """What one frame of each clip gave.

    Attributes:
        prediction: what the task predicts.
        error: cost of the errors by region (`Task.error`), over the frame's pixels / regions, so that its mean is the
            frame's error; 0 is perfect.
        cost: exact BOPs; `share` is them by region as a share of the region's W8A8 BOPs.
        share: BOPs by region / (W8A8 BOPs of the frame / regions), so that its mean is the frame's share of W8A8.
        clip: index of each slot's clip in the store.
        time: index of the frame in its clip.
        last: whether it was the last frame of its clip.
    """

    prediction: Num[Tensor, "b *p"]
    error: Float[Tensor, "b gh gw"]
    cost: FrameCost
    share: Float[Tensor, "b gh gw"]
    clip: Int64[Tensor, " b"]
    time: Int64[Tensor, " b"]
    last: Bool[Tensor, " b"]

    def reward(self, trade_off: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Frame reward: accuracy (1 - mean error) minus lambda times the share of W8A8 BOPs."""
        return 1 - self.error.mean((1, 2)) - trade_off * self.share.mean((1, 2))

    def region_reward(self, trade_off: Float[Tensor, " b"]) -> Float[Tensor, "b gh gw"]:
        """Local reward of each region; its mean over the regions is the frame's reward."""
        return 1 - self.error - trade_off[:, None, None] * self.share


class Simulator:
    """Steps B clips through a calibrated model and keeps what observations need.

    Args:
        model: a calibrated `ResQModel`.
        task: turns outputs into predictions.
        store: the clips.
        slots: clips that step together (B).
        grid: rows and columns of regions.
        reference: what residuals are taken against.
        trade_off_range: range of lambda, for scaling it in the observation.
        budget: BOPs a clip may spend per frame, as a share of W8A8, or None; only observed, never enforced.

    Raises:
        SettingsError: a grid finer than the frame, no slots, an impossible range or budget.
    """

    def __init__(
        self,
        model: ResQModel,
        task: Task,
        store: ClipStore,
        *,
        slots: int,
        grid: tuple[int, int] = (6, 10),
        reference: Reference = "previous",
        trade_off_range: tuple[float, float] = (0.05, 1.0),
        budget: float | None = None,
    ) -> None:
        height, width = store.clips[0].size
        if not (1 <= grid[0] <= height and 1 <= grid[1] <= width):
            raise SettingsError(f"grid must be 1x1 to {height}x{width} regions (the frame's pixels), got {grid}.")
        if (height, width) != model.frame_size:
            raise SettingsError(
                f"Clips of {height}x{width} do not fit a model wrapped for {model.frame_size}: give both one size."
            )
        if slots < 1:
            raise SettingsError(f"At least one clip must step at a time, got {slots}.")
        if not 0 < trade_off_range[0] <= trade_off_range[1]:
            raise SettingsError(f"The range of lambda must be positive and ascending, got {trade_off_range}.")
        if budget is not None and not budget > 0:
            raise SettingsError(f"budget must be a positive share of W8A8, or None for no budget, got {budget}.")
        self._check_memory(model, slots)
        self.model, self.task, self.store = model, task, store
        self.slots, self.grid, self.budget = slots, grid, budget
        self.trade_off_range = (float(trade_off_range[0]), float(trade_off_range[1]))
        self.reference_bops = model.reference_bops()
        self.state: StreamState = model.new_state(slots, reference)
        self.clip = torch.zeros(slots, dtype=torch.int64)
        self.time = torch.zeros(slots, dtype=torch.int64)  # index of the frame that runs next
        self.length = torch.zeros(slots, dtype=torch.int64)
        self.trade_off = torch.full((slots,), trade_off_range[0])
        self.spent = torch.zeros(slots, dtype=torch.float64)
        self._frame = torch.zeros(slots, 3, height, width, dtype=torch.uint8)
        self._key_frame = torch.zeros_like(self._frame)
        self._recurrent = task if isinstance(task, Recurrent) else None
        self._previous = torch.stack([start.prediction for start in store.starts[:1] * slots] or [torch.zeros(0)])
        self._output = torch.zeros(slots, *grid, 3)
        self._spent_there = torch.zeros(slots, *grid, self.groups)
        self._float_errors: dict[int, Tensor] = {}  # by clip, made when first asked for
        self._group_bops = self._reference_bops_by_group()
        self._area = _relative_area((height, width), grid)

    def _check_memory(self, model: ResQModel, slots: int) -> None:
        most = clips_that_fit(model)
        if most is not None and slots > max(1, most):
            raise SettingsError(
                f"{slots} clips of {model.frame_size[0]}x{model.frame_size[1]} do not fit into memory together: each "
                f"takes about {model.simulation_bytes / 2**20:,.0f} MiB. Let at most {max(1, most)} step at a time "
                "(environment.clips_per_batch)."
            )

    @property
    def groups(self) -> int:
        """Number of layer groups."""
        return len(self.model.groups)

    @property
    def reference(self) -> Reference:
        """What residuals are taken against."""
        return self.state.reference

    @property
    def age(self) -> Int64[Tensor, " b"]:
        """Frames since each slot's keyframe."""
        return self.state.age

    def _reference_bops_by_group(self) -> Float64[Tensor, " g"]:
        macs = torch.tensor([float(site.macs) for site in self.model.sites], dtype=torch.float64)
        total = torch.zeros(self.groups, dtype=torch.float64).index_add_(0, self.model.group_of_site, macs)
        return total / macs.sum() * self.reference_bops

    def last_frame(self, slot: int) -> UInt8[Tensor, "3 h w"]:
        """The frame that ran last in a slot."""
        return self._frame[slot]

    # Episodes --------------------------------------------------------------------------------------------------------

    def start(
        self, slots: Sequence[int], clips: Sequence[int], trade_off: Sequence[float] | None = None
    ) -> FrameResult:
        """Begin clips in some slots: frame 0 runs as the forced keyframe.

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
        self.length[rows] = torch.tensor([len(self.store.clips[c]) for c in clips], dtype=torch.int64)
        if trade_off is not None:
            self.trade_off[rows] = torch.tensor(list(trade_off), dtype=torch.float32)
        if self._recurrent is not None:
            self._previous[rows] = torch.stack([self.store.starts[c].prediction for c in clips])
        fresh = self.model.new_state(len(rows), self.reference)
        refresh = torch.ones(len(rows), dtype=torch.bool)
        field = LevelField.constant(0, len(rows), self.groups, self.grid)
        result = self._run(rows, fresh, Decision(refresh, field))
        self.state.put(rows, fresh)
        return result

    def step(self, decision: Decision) -> FrameResult:
        """Run the next frame of every slot.

        Raises:
            PolicyError: the decision does not fit, or a slot's clip is over and was not started anew.
            NetworkError: an output is not finite.
        """
        if bool((self.time >= self.length).any()):
            over = torch.nonzero(self.time >= self.length)[:, 0].tolist()
            raise PolicyError(f"The clips of slots {over} are over: call start() for them (reset the environment).")
        return self._run(torch.arange(self.slots), self.state, decision)

    def branch(self) -> "Simulator":
        """A copy that runs on from here by itself; network, task and clips are shared."""
        other = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(other, name, value.clone())
        other.state = self.state.clone()
        return other

    def snapshot(self) -> dict[str, Any]:
        """All that the frames to come depend on besides network, task and clips, for `restore`; not a copy."""
        streams = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return {"streams": streams, "state": self.state.snapshot()}

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Go on from a snapshot, which then belongs to this simulator."""
        for name, value in snapshot["streams"].items():
            setattr(self, name, value)
        self.state.restore(snapshot["state"])

    def _run(self, rows: Tensor, state: StreamState, decision: Decision) -> FrameResult:
        """Run the next frame of the slots in `rows`, whose state is `state`."""
        frames, field = self._frames(rows), self._on_grid(decision.field)
        raw, cost = self.model.step(self._inputs(rows, frames), state, decision.refresh, field)
        output = self.task.output(raw, self.model.frame_size)
        self._check_finite(output, rows, state)
        prediction = self._remembered(rows, self.task.predict(output).cpu())
        error = self._error(prediction, gather(self.store.targets, self.clip[rows], self.time[rows]))
        maps = self.task.features(output, prediction)
        features = torch.stack([pool_mean(values.cpu(), self.grid) for values in maps], -1)
        return self._finish(rows, frames, prediction, error, features, cost)

    def _inputs(self, rows: Tensor, frames: UInt8[Tensor, "n 3 h w"]) -> Inputs:
        """What the network takes for the slots in `rows`: frames, and what a recurrent task adds."""
        inputs: Inputs = frames
        if self._recurrent is not None:
            starts = [self.store.starts[c] for c in self.clip[rows].tolist()]
            inputs = recurrent_inputs(self._recurrent, frames, self._previous[rows], starts)
        return tuple(to_float(part.to(self.model.device)) for part in as_tuple(inputs))

    def _remembered(self, rows: Tensor, prediction: Num[Tensor, "n *p"]) -> Num[Tensor, "n *p"]:
        """The predictions, with what is given where a clip begins; a recurrent task feeds them back next."""
        if self._recurrent is None:
            return prediction
        for row in torch.nonzero(self.time[rows] == 0)[:, 0].tolist():
            prediction[row] = self.store.starts[int(self.clip[rows[row]])].prediction
        self._previous[rows] = prediction
        return prediction

    def _check_finite(self, output: Tensor, rows: Tensor, state: StreamState) -> None:
        if not math.isfinite(float(output.sum())):  # a sum shows NaN and infinity at a thirtieth of isfinite's cost
            finite = torch.isfinite(output).flatten(1).all(1)
            if bool(finite.all()):
                return  # large numbers only
            index = int(torch.nonzero(~finite)[0])
            clip = self.store.clips[int(self.clip[rows[index]])].name
            layers = zip(self.model.sites, state.outputs, strict=True)
            first = next((s.operator.name for s, y in layers if not bool(torch.isfinite(y[index]).all())), None)
            where = f"from layer {first!r} on" if first is not None else "behind its layers"
            raise NetworkError(
                f"The network's output for {clip}, frame {int(self.time[rows[index]])}, holds NaN or infinity, "
                f"{where}: look at divisions, roots and logarithms there, or give it more residual bits."
            )

    def _on_grid(self, field: Field) -> Field:
        """A constant field spread over the grid, so that its cost is known by region."""
        if field.grid == self.grid:
            return field
        if field.grid != (1, 1):
            raise PolicyError(f"The decision is for a grid of {field.grid} regions, the simulator has {self.grid}.")
        if isinstance(field, LevelField):
            return LevelField(field.levels.expand(-1, -1, *self.grid))
        return ThresholdField(field.thresholds.expand(-1, -1, *self.grid), field.kappa)

    def _frames(self, rows: Tensor) -> UInt8[Tensor, "n 3 h w"]:
        return gather(self.store.frame_tensors, self.clip[rows], self.time[rows])

    def _finish(
        self, rows: Tensor, frames: Tensor, prediction: Tensor, error: Tensor, features: Tensor, cost: FrameCost
    ) -> FrameResult:
        """Remember what the next observations need of the frames that ran."""
        share, spent = self._spending_of(cost)
        self._output[rows], self._spent_there[rows] = features, spent
        if len(rows) == self.slots and bool((rows == torch.arange(self.slots)).all()):
            self._frame = frames
        else:
            self._frame[rows] = frames
        key = rows[cost.keyframe]
        self._key_frame[key] = self._frame[key]
        return self._advance(rows, prediction, error, cost, share, cost.total / self.reference_bops)

    def _spending_of(self, cost: FrameCost) -> tuple[Float[Tensor, "b gh gw"], Float[Tensor, "b gh gw g"]]:
        """`FrameResult.share`, and the features of what layer groups spent."""
        regions = self.grid[0] * self.grid[1]
        share = (cost.per_region * (regions / self.reference_bops)).float()
        by_group = cost.per_group(self.model.group_of_site, self.groups)
        spent = (by_group / self._group_bops[:, None, None] * regions).float()
        return share, spent.permute(0, 2, 3, 1).clamp_(0, 1)

    def _advance(
        self, rows: Tensor, prediction: Tensor, error: Tensor, cost: FrameCost, share: Tensor, total: Tensor
    ) -> FrameResult:
        """Move the slots in `rows` on by the frame that ran, which cost the share `total` of W8A8."""
        clips, times = self.clip[rows], self.time[rows]
        self.spent[rows] += total
        self.time[rows] += 1
        last = self.time[rows] >= self.length[rows]
        return FrameResult(prediction, error, cost, share, clips, times, last)

    def _error(self, prediction: Num[Tensor, "b *p"], target: Num[Tensor, "b *t"]) -> Float[Tensor, "b gh gw"]:
        cost = self.task.error(prediction, target, self.store.error_table, self.model.frame_size)
        return pool_mean(cost, self.grid) * self._area

    def float_error(self, result: FrameResult) -> Float[Tensor, "b gh gw"]:
        """The error that the float network makes on the frames of `result`, which just ran in every slot."""
        for clip in set(result.clip.tolist()) - self._float_errors.keys():
            self._float_errors[clip] = self._error(self.store.teacher[clip], self.store.targets[clip])
        found = zip(result.clip.tolist(), result.time.tolist(), strict=True)
        return torch.stack([self._float_errors[clip][time] for clip, time in found])

    # Observation -----------------------------------------------------------------------------------------------------

    def seen(self) -> Seen:
        """What a device has before each slot's next frame; after a clip's end, before its last frame once more."""
        time = torch.minimum(self.time, self.length - 1)
        frame = gather(self.store.frame_tensors, self.clip, time)
        reference = self._frame if self.reference == "previous" else self._key_frame
        return Seen(frame, reference, self._key_frame, self._output, self._spent_there, self.age, self.trade_off)

    def observe(self) -> Observation:
        """The observation before each slot's next frame; after a clip's end, of its last frame once more."""
        regions, residual, foreground = observed(self.seen(), self.grid, closed_loop=self.reference == "previous")
        return Observation(regions, self._frame_features(residual, foreground))

    def _frame_features(self, residual: Float[Tensor, " b"], foreground: Float[Tensor, " b"]) -> Float[Tensor, "b k"]:
        budget = torch.ones(self.slots)
        if self.budget is not None:
            budget = (1 - self.spent / (self.budget * self.length)).float()
        return frame_values(self.age, self.trade_off, self.trade_off_range, budget, residual, foreground)


def clips_that_fit(model: ResQModel) -> int | None:
    """How many clips can step together in three quarters of the free memory; None where the system does not tell."""
    if model.device.type == "cuda":
        free = torch.cuda.mem_get_info(model.device)[0]
    elif MEMORY.exists():
        free = next(int(line.split()[1]) for line in MEMORY.read_text().splitlines() if line.startswith("MemAvailable"))
        free *= 1024
    else:
        return None
    return 3 * free // (4 * model.simulation_bytes)


def _relative_area(size: tuple[int, int], grid: tuple[int, int]) -> Float[Tensor, "gh gw"]:
    """Pixels of each region over their mean: 1 everywhere where the grid divides the frame."""
    rows, columns = (cells_of(length, cells)[1].sum(1) for length, cells in zip(size, grid, strict=True))
    return rows[:, None] * columns[None, :] * (grid[0] * grid[1]) / (size[0] * size[1])
