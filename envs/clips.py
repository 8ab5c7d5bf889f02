"""Clips made ready for simulation: frames, what predictions are compared with, and how errors are weighted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int64, Num, UInt8
from torch import Tensor

from resq_rl.errors import SettingsError, VideoError
from resq_rl.perception import Beginning, Recurrent, Task, beginning_of, judged_targets, predict_clip
from resq_rl.quantization import ResQModel
from resq_rl.video import Clip

__all__ = ["AccuracySource", "ClipStore", "ErrorWeighting", "gather"]

AccuracySource = Literal["labels", "teacher"]
ErrorWeighting = Literal["iou", "pixel"]


@dataclass(frozen=True)
class ClipStore:
    """Clips of one frame size with the targets their predictions are compared with.

    Attributes:
        task: what predictions are of.
        clips: the clips.
        targets: per clip the target of each frame: the labels, or the float network's own predictions (teacher
            agreement).
        teacher: per clip the float network's predictions.
        float_counts: per clip `Task.counts` of the float network against the targets.
        error_table: what errors cost (`Task.error_table`).
        source: what the targets are.
        starts: per clip what a recurrent task is given with it; none for other tasks.
    """

    task: Task
    clips: tuple[Clip, ...]
    targets: tuple[Num[Tensor, "_ *target"], ...]
    teacher: tuple[Num[Tensor, "_ *prediction"], ...]
    float_counts: Num[Tensor, "n *c"]
    error_table: Float[Tensor, "*e"]
    source: AccuracySource
    starts: tuple[Beginning, ...] = ()

    def __len__(self) -> int:
        return len(self.clips)

    @property
    def frames(self) -> int:
        """Frames of all clips."""
        return sum(len(c) for c in self.clips)

    @cached_property
    def frame_tensors(self) -> tuple[UInt8[Tensor, "_ 3 h w"], ...]:
        """The frames of each clip."""
        return tuple(clip.frames for clip in self.clips)

    @property
    def float_accuracy(self) -> float:
        """Accuracy of the float network against the targets; 1 by definition under teacher agreement."""
        return float(self.task.accuracy(self.float_counts.sum(0)))

    def subset(self, indices: Sequence[int]) -> "ClipStore":
        """The clips in `indices`, with the same error weights."""
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
        source: AccuracySource = "labels",
        weighting: ErrorWeighting = "iou",
        fill: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> "ClipStore":
        """Run the float network over the clips and collect targets.

        Args:
            model: its float network gives the teacher's predictions.
            source: "labels", or "teacher" for agreement with the float network.
            weighting: of errors, "pixel" or "iou", as `Task.error_table` has it.
            fill: compare frames of which nothing is labelled with the float network, so that policies that are trained
                on sparsely labelled clips do not learn to skip them.
            progress: called with the number of frames done.

        Raises:
            VideoError: no clips, clips of different sizes, or no labels where they are needed.
        """
        _check(clips, source, weighting)
        targets, teachers, counts = [], [], []
        for clip in clips:
            teacher = predict_clip(model.float_forward, task, clip, device=model.device, progress=progress)
            target = task.target(teacher)
            if source == "labels" and clip.labels is not None:
                task.check(clip)
                target = _filled(task, teacher, clip.labels) if fill else clip.labels
            target = judged_targets(task, target)
            targets.append(target)
            teachers.append(teacher)
            counts.append(task.counts(teacher, target).sum(0))
        float_counts = torch.stack(counts)
        table = task.error_table(float_counts.sum(0), weighting)
        starts = tuple(beginning_of(task, clip) for clip in clips) if isinstance(task, Recurrent) else ()
        return ClipStore(task, tuple(clips), tuple(targets), tuple(teachers), float_counts, table, source, starts)


def gather(
    per_clip: Sequence[Num[Tensor, "_ *shape"]], clips: Int64[Tensor, " b"], times: Int64[Tensor, " b"]
) -> Num[Tensor, "b *shape"]:
    """The frame `times[i]` of clip `clips[i]` for every i, of frames, targets or the like."""
    return torch.stack([per_clip[c][t] for c, t in zip(clips.tolist(), times.tolist(), strict=True)])


def _check(clips: Sequence[Clip], source: str, weighting: str) -> None:
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
