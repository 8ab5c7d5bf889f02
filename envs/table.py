"""Tabulated responses of a clip: against the keyframe, a residual frame depends on its keyframe and level alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Float64, Int64, Num, UInt8
from torch import Tensor

from resq_rl.envs.engine import Decision, FrameResult
from resq_rl.envs.network_engine import NetworkEngine
from resq_rl.envs.observation import difference, frame_texture, pool_max, pool_mean
from resq_rl.envs.problem import Problem, gather
from resq_rl.errors import SettingsError
from resq_rl.perception import Recurrent, Task
from resq_rl.quantization import FrameCost, LevelField, StreamState

__all__ = ["ResponseTable", "check_tabular", "respond"]

CHUNK = 32  # rows that run in one forward pass


@dataclass(frozen=True)
class ResponseTable:
    """The responses of a clip: every frame against every keyframe before it, at one level for all layers and regions.

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
    problem: Problem, index: int, *, longest: int | None = None, progress: Callable[[int], None] | None = None
) -> ResponseTable:
    """Run every frame of a clip against every keyframe before it, at every level.

    That is T keyframes, L frames for the costs and L * T * (T - 1) / 2 residual frames of T, fewer with `longest`.

    Args:
        problem: the network, its task and the clips.
        index: which of the problem's clips.
        longest: greatest age of a keyframe, in frames; None for the length of the clip.
        progress: called with the number of frames done after each step.

    Raises:
        SettingsError: `longest` is negative, or the task is recurrent.
    """
    _check(problem, longest)
    grid, pixels, levels = problem.grid, problem.clips[index].frames, len(problem.model.config.levels)
    clip = _AnyOrder(NetworkEngine(problem), index, progress)
    frames = len(pixels)
    ages = frames if longest is None else min(longest + 1, frames)
    shape = problem.float_counts.shape[1:]
    counts = torch.zeros(frames, ages, levels, *shape, dtype=problem.float_counts.dtype)
    error = torch.full((frames, ages, levels, *grid), torch.nan)
    output = torch.full((frames, ages, levels, *grid, 3), torch.nan)
    residual, frame_residual = torch.full((frames, ages, *grid, 2), torch.nan), torch.full((frames, ages), torch.nan)
    costs: list[FrameCost] = []
    for key in range(frames):
        references = problem.model.new_state(1, "keyframe")
        own, counts[key, 0], output[key, 0] = clip.run(references, torch.tensor([key]), torch.tensor([0]))
        error[key, 0] = own.error
        known = min(ages, frames - key)
        residual[key, :known], frame_residual[key, :known] = _residuals(pixels[key : key + known], pixels[key], grid)
        if not costs:
            first = clip.run(references, torch.zeros(levels, dtype=torch.int64), torch.arange(levels))[0]
            costs = [first.cost, own.cost]
        later = torch.cartesian_prod(torch.arange(1, known), torch.arange(levels))
        for age, level in (part.T for part in later.split(CHUNK) if len(part)):
            result, counts[key, age, level], output[key, age, level] = clip.run(references, key + age, level)
            error[key, age, level] = result.error
    cost = _joined(costs)
    texture = frame_texture(pixels, grid)
    float_error = problem.float_error(torch.full((frames,), index), torch.arange(frames))
    share, state_bytes = cost.total / problem.reference_bops, problem.model.state_bytes("keyframe")
    return ResponseTable(
        counts, error, output, residual, frame_residual, texture, float_error, cost, share, state_bytes
    )


def _check(problem: Problem, longest: int | None) -> None:
    check_tabular(problem.task)
    if longest is not None and longest < 0:
        raise SettingsError(f"longest must be 0 frames or more, or None for the whole clip, got {longest}.")


def _joined(costs: Sequence[FrameCost]) -> FrameCost:
    return FrameCost(*(torch.cat([getattr(cost, field.name) for cost in costs]) for field in fields(FrameCost)))


def _residuals(
    frames: UInt8[Tensor, "n 3 h w"], keyframe: UInt8[Tensor, "3 h w"], grid: tuple[int, int]
) -> tuple[Float[Tensor, "n gh gw 2"], Float[Tensor, " n"]]:
    """Features of the pixel residuals against a keyframe, as `NetworkEngine.observe` computes them."""
    residual = difference(frames, keyframe.expand_as(frames))
    parts = [pool_mean(residual, grid).sqrt_(), pool_max(residual, grid)]
    return torch.stack(parts, -1), residual.mean((1, 2)).sqrt_()


@dataclass(frozen=True)
class _AnyOrder:
    """Runs the frames of one clip in any order against one keyframe."""

    engine: NetworkEngine
    index: int
    progress: Callable[[int], None] | None

    def run(
        self, references: StreamState, times: Int64[Tensor, " b"], levels: Int64[Tensor, " b"]
    ) -> tuple[FrameResult, Num[Tensor, "b *c"], Float[Tensor, "b gh gw 3"]]:
        """Frames against the keyframe in `references`, or as the keyframe where there is none.

        Returns:
            The result, the counts of the task and the features of the output.
        """
        problem, clips = self.engine.problem, len(times)
        known = bool(references.inputs)
        state = self.engine.new_state(clips, "keyframe")
        state.references = _spread(references, clips) if known else references
        refresh = torch.full((clips,), not known)
        field = LevelField(levels[:, None, None, None].expand(-1, problem.groups, 1, 1))
        inputs = self.engine.inputs(torch.full((clips,), self.index), times)
        result = self.engine.step(inputs, state, Decision(refresh, field))
        if self.progress is not None:
            self.progress(clips)
        targets = gather(problem.targets, torch.full((clips,), self.index), times)
        return result, problem.task.counts(result.prediction, targets), state.output


def _spread(state: StreamState, clips: int) -> StreamState:
    """The state of one clip for many; they share its memory, which residuals against a keyframe only read."""
    inputs, outputs = ([x.expand(clips, *x.shape[1:]) for x in own] for own in (state.inputs, state.outputs))
    return StreamState("keyframe", state.age.expand(clips), inputs, outputs, list(state.versions))
