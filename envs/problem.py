"""A problem: a quantized network, its task, clips with what predictions are compared with, and a grid of regions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int64, Num, UInt8
from torch import Tensor

from resq_rl.envs.observation import pool_mean
from resq_rl.errors import SettingsError, VideoError
from resq_rl.perception import Beginning, Recurrent, Task, beginning_of, judged_targets, predict_clip
from resq_rl.quantization import ResQModel
from resq_rl.quantization.specification.fields import cells_of
from resq_rl.video import Clip

__all__ = ["AccuracySource", "ErrorWeighting", "Problem", "gather"]

AccuracySource = Literal["labels", "teacher"]
ErrorWeighting = Literal["iou", "pixel"]


@dataclass(frozen=True)
class Problem:
    """A frozen, quantized network, its task, clips of one frame size, and the grid of regions in which bits are chosen.

    `Problem(model, task, grid)` has no clips: it is enough to run frames as they come. `Problem.prepare` adds clips and
    the targets with which predictions are compared.

    Attributes:
        model: the calibrated network.
        task: what its output means.
        grid: rows and columns of regions.
        clips: the clips.
        targets: per clip the target of each frame: its label, or the float network's own prediction (teacher
            agreement).
        teacher: per clip the float network's predictions.
        float_counts: per clip `Task.counts` of the float network against the targets.
        error_table: the cost of each kind of error (`Task.error_table`).
        source: what the targets are.
        starts: per clip what a recurrent task is given with it; none for other tasks.

    Raises:
        SettingsError: the grid is finer than the frame, or the clips have another size than the model's.
    """

    model: ResQModel
    task: Task
    grid: tuple[int, int] = (6, 10)
    clips: tuple[Clip, ...] = ()
    targets: tuple[Num[Tensor, "_ *target"], ...] = ()
    teacher: tuple[Num[Tensor, "_ *prediction"], ...] = ()
    float_counts: Num[Tensor, "n *c"] = field(default_factory=lambda: torch.zeros(0, 0))
    error_table: Float[Tensor, "*e"] = field(default_factory=lambda: torch.zeros(0))
    source: AccuracySource = "labels"
    starts: tuple[Beginning, ...] = ()

    def __post_init__(self) -> None:
        height, width = self.model.frame_size
        if not (1 <= self.grid[0] <= height and 1 <= self.grid[1] <= width):
            raise SettingsError(f"grid must be 1x1 to {height}x{width} regions (the frame's pixels), got {self.grid}.")
        if self.clips and self.clips[0].size != (height, width):
            clip_height, clip_width = self.clips[0].size
            raise SettingsError(
                f"Clips of {clip_height}x{clip_width} do not fit a model wrapped for {(height, width)}: give both one "
                "size."
            )

    def __len__(self) -> int:
        return len(self.clips)

    @property
    def groups(self) -> int:
        """Number of layer groups."""
        return len(self.model.groups)

    @property
    def regions(self) -> int:
        """Number of regions."""
        return self.grid[0] * self.grid[1]

    @property
    def frames(self) -> int:
        """Frames of all clips."""
        return sum(len(c) for c in self.clips)

    @property
    def recurrent(self) -> Recurrent | None:
        """The task where it feeds predictions back to the network, else None."""
        return self.task if isinstance(self.task, Recurrent) else None

    @cached_property
    def reference_bops(self) -> float:
        """BOPs of a W8A8 frame, the unit in which all BOPs are reported."""
        return self.model.reference_bops()

    @cached_property
    def frame_tensors(self) -> tuple[UInt8[Tensor, "_ 3 h w"], ...]:
        """The frames of each clip."""
        return tuple(clip.frames for clip in self.clips)

    @property
    def float_accuracy(self) -> float:
        """Accuracy of the float network against the targets; 1 by definition under teacher agreement."""
        return float(self.task.accuracy(self.float_counts.sum(0)))

    @cached_property
    def _relative_area(self) -> Float[Tensor, "gh gw"]:
        """Pixels of each region over their mean: 1 everywhere where the grid divides the frame."""
        size = self.model.frame_size
        rows, columns = (cells_of(length, cells)[1].sum(1) for length, cells in zip(size, self.grid, strict=True))
        area: Tensor = rows[:, None] * columns[None, :] * self.regions / (size[0] * size[1])
        return area

    def error(self, prediction: Num[Tensor, "b *p"], target: Num[Tensor, "b *t"]) -> Float[Tensor, "b gh gw"]:
        """Cost of the errors by region over (pixels of the frame / regions): its mean is the frame's error."""
        cost = self.task.error(prediction, target, self.error_table, self.model.frame_size)
        return pool_mean(cost, self.grid) * self._relative_area

    @cached_property
    def _float_errors(self) -> dict[int, Float[Tensor, "t gh gw"]]:
        return {}

    def float_error(self, clips: Int64[Tensor, " b"], times: Int64[Tensor, " b"]) -> Float[Tensor, "b gh gw"]:
        """Error of the float network on the frame `times[i]` of clip `clips[i]` for every i; kept by clip."""
        known = self._float_errors
        for clip in set(clips.tolist()) - known.keys():
            known[clip] = self.error(self.teacher[clip], self.targets[clip])
        return torch.stack([known[c][t] for c, t in zip(clips.tolist(), times.tolist(), strict=True)])

    def subset(self, indices: Sequence[int]) -> "Problem":
        """The same problem on the clips in `indices`, with the same error weights."""
        chosen = list(indices)
        return replace(
            self,
            clips=tuple(self.clips[i] for i in chosen),
            targets=tuple(self.targets[i] for i in chosen),
            teacher=tuple(self.teacher[i] for i in chosen),
            float_counts=self.float_counts[chosen],
            starts=tuple(self.starts[i] for i in chosen) if self.starts else (),
        )

    @staticmethod
    def prepare(
        model: ResQModel,
        task: Task,
        clips: Sequence[Clip],
        *,
        grid: tuple[int, int] = (6, 10),
        source: AccuracySource = "labels",
        weighting: ErrorWeighting = "iou",
        fill: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> "Problem":
        """Run the float network over the clips and collect targets.

        Args:
            model: the calibrated network, whose float network gives the teacher's predictions.
            task: what its output means.
            clips: the clips.
            grid: rows and columns of regions.
            source: "labels", or "teacher" for agreement with the float network.
            weighting: of errors, "pixel" or "iou", as `Task.error_table` has it.
            fill: compare frames of which nothing is labelled with the float network, so that policies that are trained
                on sparsely labelled clips do not learn to skip them.
            progress: called with the number of frames done.

        Raises:
            VideoError: no clips, clips of different sizes, or no labels where they are needed.
            SettingsError: the grid or the clips do not fit the model.
        """
        _check(clips, source, weighting)
        base = Problem(model, task, grid, clips=tuple(clips))
        targets, teachers, counts = [], [], []
        for clip in clips:
            teacher = predict_clip(model.float_forward, task, clip, device=model.device, progress=progress)
            target = _target(task, clip, teacher, source, fill=fill)
            targets.append(target)
            teachers.append(teacher)
            counts.append(task.counts(teacher, target).sum(0))
        float_counts = torch.stack(counts)
        return replace(
            base,
            targets=tuple(targets),
            teacher=tuple(teachers),
            float_counts=float_counts,
            error_table=task.error_table(float_counts.sum(0), weighting),
            source=source,
            starts=tuple(beginning_of(task, clip) for clip in clips) if isinstance(task, Recurrent) else (),
        )


def _target(task: Task, clip: Clip, teacher: Tensor, source: AccuracySource, *, fill: bool) -> Tensor:
    """What the predictions on a clip are compared with."""
    target = task.target(teacher)
    if source == "labels" and clip.labels is not None:
        task.check(clip)
        target = _filled(task, teacher, clip.labels) if fill else clip.labels
    return judged_targets(task, target)


def gather(
    per_clip: Sequence[Num[Tensor, "_ *shape"]], clips: Int64[Tensor, " b"], times: Int64[Tensor, " b"]
) -> Num[Tensor, "b *shape"]:
    """The frame `times[i]` of clip `clips[i]` for every i, of frames, targets or the like."""
    return torch.stack([per_clip[c][t] for c, t in zip(clips.tolist(), times.tolist(), strict=True)])


def _check(clips: Sequence[Clip], source: Any, weighting: Any) -> None:
    if weighting not in get_args(ErrorWeighting):
        raise SettingsError(f"weighting is 'iou' or 'pixel', got {weighting!r}.")
    if source not in get_args(AccuracySource):
        raise SettingsError(f"accuracy is 'labels' or 'teacher', got {source!r}.")
    if not clips:
        raise VideoError("No clips: the split is empty.")
    sizes = {clip.size for clip in clips}
    if len(sizes) > 1:
        raise VideoError(f"Clips of one run must have one frame size, got {sorted(sizes)}; set video.size.")
    for clip in clips:
        if source == "labels" and clip.labels is None:
            raise VideoError(f"{clip.name} has no labels: use accuracy=teacher to compare with the float network.")


def _filled(task: Task, teacher: Num[Tensor, "t *p"], labels: Num[Tensor, "t *l"]) -> Num[Tensor, "t *l"]:
    """Labels, and the float network's predictions for frames in which they count nothing."""
    empty = task.counts(teacher, labels).flatten(1).sum(1) == 0
    if not bool(empty.any()):
        return labels
    return torch.where(empty.view(-1, *[1] * (labels.dim() - 1)), task.target(teacher), labels)
