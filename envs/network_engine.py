"""The engine that runs one frame of B clips through the quantized network."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import psutil
import torch
from jaxtyping import Bool, Float, Float64, Int64, Num, UInt8
from torch import Tensor

from resq_rl.envs.engine import Conditions, Decision, FrameInputs, FrameResult
from resq_rl.envs.observation import Observation, Seen, frame_values, observed, pool_mean
from resq_rl.envs.problem import Problem, gather
from resq_rl.errors import NetworkError, PolicyError, SettingsError
from resq_rl.perception import recurrent_inputs
from resq_rl.quantization import (
    Budget,
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

__all__ = ["NetworkEngine", "NetworkState", "clips_that_fit"]


@dataclass
class NetworkState:
    """State of each clip in a `NetworkEngine`: references of the network, and values that observations show.

    Attributes:
        references: inputs and outputs of every layer, and the age of the keyframe.
        frame, key_frame: the last frame and the last keyframe.
        output: means by region of `Task.features` of the last output: uncertainty, boundary, foreground.
        spent: BOPs of the last frame as shares of the W8A8 BOPs of region and layer group.
        previous: the last prediction, for a recurrent task.
    """

    references: StreamState
    frame: UInt8[Tensor, "b 3 h w"]
    key_frame: UInt8[Tensor, "b 3 h w"]
    output: Float[Tensor, "b gh gw 3"]
    spent: Float[Tensor, "b gh gw g"]
    previous: Num[Tensor, "b *p"]

    @property
    def reference(self) -> Reference:
        """The reference mode: residuals are taken against the previous frame or the keyframe."""
        return self.references.reference

    @property
    def age(self) -> Int64[Tensor, " b"]:
        """Frames since each clip's keyframe; -1 before the first."""
        return self.references.age

    def _tensors(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "references"}

    def put(self, rows: Int64[Tensor, " n"], other: "NetworkState") -> None:
        """Replace the clips in `rows` by those of `other`, in order; `other` may share memory and must not run on."""
        self.references.put(rows, other.references)
        for name, value in other._tensors().items():
            getattr(self, name)[rows] = value

    def clone(self) -> "NetworkState":
        """A copy that runs on by itself."""
        return NetworkState(self.references.clone(), **{name: t.clone() for name, t in self._tensors().items()})

    def snapshot(self) -> dict[str, Any]:
        """The tensors that `restore` needs; they are not copies."""
        return {"references": self.references.snapshot(), **self._tensors()}

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Go on from a snapshot, which then belongs to this state."""
        self.references.restore(snapshot["references"])
        for name in self._tensors():
            setattr(self, name, snapshot[name])


class NetworkEngine:
    """An engine that runs the quantized network of a problem."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._sequence = problem.recurrent
        macs = torch.tensor([float(site.macs) for site in problem.model.sites], dtype=torch.float64)
        by_group = torch.zeros(problem.groups, dtype=torch.float64)
        by_group.index_add_(0, problem.model.group_of_site, macs)
        self._group_bops = by_group / macs.sum() * problem.reference_bops

    def new_state(self, clips: int, reference: Reference) -> NetworkState:
        """A state before the first frame of so many clips."""
        problem = self.problem
        previous = [start.prediction for start in problem.starts[:1]] * clips
        return NetworkState(
            problem.model.new_state(clips, reference),
            frame=torch.zeros(clips, 3, *problem.model.frame_size, dtype=torch.uint8),
            key_frame=torch.zeros(clips, 3, *problem.model.frame_size, dtype=torch.uint8),
            output=torch.zeros(clips, *problem.grid, 3),
            spent=torch.zeros(clips, *problem.grid, problem.groups),
            previous=torch.stack(previous) if previous else torch.zeros(clips, 0),
        )

    def inputs(self, clips: Int64[Tensor, " b"], times: Int64[Tensor, " b"]) -> FrameInputs:
        """The frame `times[i]` of the problem's clip `clips[i]` for every i."""
        problem = self.problem
        return FrameInputs(
            gather(problem.frame_tensors, clips, times),
            gather(problem.targets, clips, times),
            [problem.starts[c] for c in clips.tolist()] if problem.starts else (),
            times == 0,
            lambda i: f"{problem.clips[int(clips[i])].name}, frame {int(times[i])}",
        )

    def step(
        self,
        inputs: FrameInputs,
        state: NetworkState,
        decision: Decision,
        limit: Float64[Tensor, " b"] | None = None,
    ) -> FrameResult:
        """Run a frame of each clip, as `Engine` says; under a limit as `resq_rl.quantization.running.budgeted` does.

        Raises:
            PolicyError: the decision does not fit, or a limit cannot be kept. NetworkError: an output is not finite.
        """
        problem = self.problem
        given, field = self._network_inputs(inputs, state.previous), _on_grid(decision.field, problem.grid)
        bops = None if limit is None else limit * problem.reference_bops
        raw, cost = problem.model.step(given, state.references, decision.refresh, field, bops)
        output = problem.task.output(raw, problem.model.frame_size)
        self._check_finite(output, inputs, state)
        prediction = self._predicted(output, inputs, state)
        share = self._keep(output, prediction, cost, inputs, state)
        return FrameResult(
            prediction, self._error(prediction, inputs), cost, share, cost.total / problem.reference_bops
        )

    def check_budget(self, budget: Budget, charge: float = 0.0) -> None:
        """Raise SettingsError unless frames can always keep a budget, which pays `charge` before each of them."""
        costs, whole = self.problem.model.layer_costs, self.problem.reference_bops
        least, sure = costs.least / whole + charge, budget.least
        if sure < least:
            raise SettingsError(
                f"The budget allows a frame {sure:g} of W8A8, but products of activations, overheads and the policy's "
                f"own network cost {least:g} in every frame: raise budget.{'peak' if budget.mean is None else 'mean'}."
            )

    @torch.no_grad()
    def _keep(
        self,
        output: Float[Tensor, "b *o"],
        prediction: Num[Tensor, "b *p"],
        cost: FrameCost,
        inputs: FrameInputs,
        state: NetworkState,
    ) -> Float[Tensor, "b gh gw"]:
        """Keep what the next observation shows of a frame, and return `FrameResult.share`."""
        problem = self.problem
        maps = problem.task.features(output, prediction)
        state.output = torch.stack([pool_mean(values.cpu(), problem.grid) for values in maps], -1)
        state.frame = inputs.pixels
        begun = state.age == 0  # at a keyframe, and at what stands for one that no budget allows
        state.key_frame[begun] = inputs.pixels[begun]
        share, state.spent = self.spending(cost)
        return share

    def unrolled(
        self, inputs: FrameInputs, state: NetworkState, decision: Decision, sharpness: float
    ) -> tuple[Float[Tensor, "b *o"], Num[Tensor, "b *p"], FrameCost]:
        """The task's output for a frame of each clip, its prediction, and the cost, with gradients to thresholds.

        It runs as `step` does (`ResQModel.unrolled_step`); values for observations are kept where the decision is by
        region. No gradient leads through them, nor through the predictions that a recurrent task is fed.

        Raises:
            PolicyError: the decision does not fit. NetworkError: an output is not finite.
        """
        problem = self.problem
        given, field = self._network_inputs(inputs, state.previous), decision.field
        raw, cost = problem.model.unrolled_step(given, state.references, decision.refresh, field, sharpness=sharpness)
        output = problem.task.output(raw, problem.model.frame_size)
        self._check_finite(output.detach(), inputs, state)
        prediction = self._predicted(output.detach(), inputs, state)
        if field.grid == problem.grid:
            self._keep(output.detach(), prediction, cost, inputs, state)
        return output, prediction, cost

    def float_output(self, clips: Int64[Tensor, " b"], times: Int64[Tensor, " b"]) -> Float[Tensor, "b *o"]:
        """The float network's output for frames of the problem's clips, on its own predictions if it is fed any."""
        problem = self.problem
        previous = gather(problem.teacher, clips, (times - 1).clamp_min(0))
        raw = problem.model.float_forward(self._network_inputs(self.inputs(clips, times), previous))
        return problem.task.output(raw, problem.model.frame_size)

    def _predicted(self, output: Float[Tensor, "b *o"], inputs: FrameInputs, state: NetworkState) -> Tensor:
        """The predictions that follow from the output; a recurrent task is given that of a clip's first frame."""
        prediction = self.problem.task.predict(output).cpu()
        if self._sequence is not None:
            for row in torch.nonzero(inputs.first)[:, 0].tolist():
                prediction[row] = inputs.starts[row].prediction
            state.previous = prediction.clone()
        return prediction

    def _network_inputs(self, inputs: FrameInputs, previous: Num[Tensor, "b *p"]) -> Inputs:
        """The network's inputs: the frames, and those that a recurrent task adds from its previous predictions."""
        given: Inputs = inputs.pixels
        if self._sequence is not None:
            if bool(inputs.first.any()):
                starts = torch.stack([start.prediction for start in inputs.starts])
                every = bool(inputs.first.all())
                previous = starts if every else torch.where(_spread_over(inputs.first, starts), starts, previous)
            given = recurrent_inputs(self._sequence, inputs.pixels, previous, inputs.starts)
        return tuple(to_float(part.to(self.problem.model.device)) for part in as_tuple(given))

    def _error(self, prediction: Num[Tensor, "b *p"], inputs: FrameInputs) -> Float[Tensor, "b gh gw"]:
        if inputs.targets is None:
            return torch.full((len(prediction), *self.problem.grid), torch.nan)
        return self.problem.error(prediction, inputs.targets)

    def _check_finite(self, output: Tensor, inputs: FrameInputs, state: NetworkState) -> None:
        if not math.isfinite(float(output.sum())):  # a sum shows NaN and infinity at a thirtieth of isfinite's cost
            finite = torch.isfinite(output).flatten(1).all(1)
            if bool(finite.all()):
                return  # large numbers only
            index = int(torch.nonzero(~finite)[0])
            layers = zip(self.problem.model.sites, state.references.outputs, strict=True)
            first = next((s.name for s, y in layers if not bool(torch.isfinite(y[index]).all())), None)
            where = f"from layer {first!r} on" if first is not None else "behind its layers"
            raise NetworkError(
                f"The network's output for {inputs.names(index)}, holds NaN or infinity, {where}: look at divisions, "
                "roots and logarithms there, or give it more residual bits."
            )

    def spending(self, cost: FrameCost) -> tuple[Float[Tensor, "b gh gw"], Float[Tensor, "b gh gw g"]]:
        """`FrameResult.share`, and the features of what layer groups spent."""
        problem = self.problem
        share = (cost.per_region * (problem.regions / problem.reference_bops)).float()
        by_group = cost.per_group(problem.model.group_of_site, problem.groups)
        spent = (by_group / self._group_bops[:, None, None] * problem.regions).float()
        return share, spent.permute(0, 2, 3, 1).clamp_(0, 1)

    def seen(self, inputs: FrameInputs, state: NetworkState, trade_off: Float[Tensor, " b"]) -> Seen:
        """The frames and features that a device has before the frame of `inputs` runs."""
        reference = state.frame if state.reference == "previous" else state.key_frame
        return Seen(inputs.pixels, reference, state.key_frame, state.output, state.spent, state.age, trade_off)

    def observe(self, inputs: FrameInputs, state: NetworkState, conditions: Conditions) -> Observation:
        """The observation before the frame of `inputs` runs."""
        seen = self.seen(inputs, state, conditions.trade_off)
        regions, residual, foreground = observed(seen, self.problem.grid, closed_loop=state.reference == "previous")
        frame = frame_values(
            state.age,
            conditions.trade_off,
            conditions.trade_off_range,
            conditions.budget_left,
            residual,
            foreground,
        )
        return Observation(regions, frame)

    def float_error(self, clips: Int64[Tensor, " b"], times: Int64[Tensor, " b"]) -> Float[Tensor, "b gh gw"]:
        """Error of the float network on frames of the problem's clips."""
        return self.problem.float_error(clips, times)

    def clips_that_fit(self) -> int:
        """How many clips can step together in three quarters of the free memory."""
        return clips_that_fit(self.problem.model)


def _on_grid(field: Field, grid: tuple[int, int]) -> Field:
    """A constant field spread over the grid, so that its cost is known by region."""
    if field.grid == grid:
        return field
    if field.grid != (1, 1):
        raise PolicyError(f"The decision is for a grid of {field.grid} regions, the problem has {grid}.")
    if isinstance(field, LevelField):
        return LevelField(field.levels.expand(-1, -1, *grid))
    return ThresholdField(field.thresholds.expand(-1, -1, *grid), field.kappa)


def _spread_over(rows: Bool[Tensor, " b"], values: Num[Tensor, "b *p"]) -> Bool[Tensor, "b *one"]:
    return rows.view(-1, *[1] * (values.dim() - 1))


def clips_that_fit(model: ResQModel, times: float = 1.0) -> int:
    """How many clips can step together in three quarters of the free memory, each in `times` that of a step."""
    on_cuda = model.device.type == "cuda"
    free = torch.cuda.mem_get_info(model.device)[0] if on_cuda else psutil.virtual_memory().available
    return int(3 * free / (4 * times * model.simulation_bytes))
