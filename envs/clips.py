"""Clips made ready for simulation: frames, what predictions are compared with, and how errors are weighted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from resq_rl.errors import SettingsError, VideoError
from resq_rl.perception import Segmentation, mean_iou
from resq_rl.quantization import ResQModel, to_float
from resq_rl.video import IGNORE, Clip

__all__ = ["AccuracySource", "ClipStore", "ErrorWeighting", "gather"]

AccuracySource = Literal["labels", "teacher"]
ErrorWeighting = Literal["iou", "pixel"]


@dataclass(frozen=True)
class ClipStore:
    """Clips of one frame size with the targets their predictions are compared with.

    Attributes:
        clips: the clips.
        targets: per clip (t, h, w) class indices: the labels, or the float network's own predictions (teacher
            agreement).
        teacher: per clip (t, h, w) the float network's predictions.
        float_confusion: per clip confusion of the float network against the targets, (clips, k, k).
        error_table: cost of predicting class b where the target is a, (k, k), zero on the diagonal.
        source: what the targets are.
    """

    clips: tuple[Clip, ...]
    targets: tuple[UInt8[Tensor, "_ h w"], ...]
    teacher: tuple[UInt8[Tensor, "_ h w"], ...]
    float_confusion: Int64[Tensor, "n k k"]
    error_table: Float[Tensor, "k k"]
    source: AccuracySource

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

    @cached_property
    def error_by_pair(self) -> Float[Tensor, " pairs"]:
        """Cost of a pixel at index target * k + prediction; targets beyond the classes are ignored and cost nothing."""
        classes = len(self.error_table)
        table = torch.zeros(256, classes)
        table[:classes] = self.error_table
        return table.flatten()

    @property
    def float_accuracy(self) -> float:
        """Mean IoU of the float network against the targets; 1 by definition under teacher agreement."""
        return float(mean_iou(self.float_confusion.sum(0)))

    def subset(self, indices: Sequence[int]) -> "ClipStore":
        """The clips in `indices`, with the same error weights."""
        chosen = list(indices)
        return ClipStore(
            tuple(self.clips[i] for i in chosen),
            tuple(self.targets[i] for i in chosen),
            tuple(self.teacher[i] for i in chosen),
            self.float_confusion[chosen],
            self.error_table,
            self.source,
        )

    @staticmethod
    def prepare(
        model: ResQModel,
        task: Segmentation,
        clips: Sequence[Clip],
        *,
        source: AccuracySource = "labels",
        weighting: ErrorWeighting = "iou",
        progress: Callable[[int], None] | None = None,
    ) -> "ClipStore":
        """Run the float network over the clips and collect targets.

        Args:
            model: its float network gives the teacher's predictions.
            source: "labels", or "teacher" for agreement with the float network.
            weighting: "pixel" costs every wrong pixel 1; "iou" costs it max(f) / k * (1/f(target) + 1/f(prediction)),
                with f the frequencies of the k classes among the targets (at least 0.5%): to first order max(f) times
                what the pixel takes from mean IoU.
            progress: called with the number of frames done.

        Raises:
            VideoError: no clips, clips of different sizes, or no labels where they are needed.
        """
        _check(clips, source)
        targets, teachers, confusions = [], [], []
        for clip in clips:
            teacher = _predictions(model, task, clip.frames, progress)
            target = teacher if source == "teacher" or clip.labels is None else clip.labels
            top = int(torch.where(target == IGNORE, 0, target).max())
            if top >= task.classes:
                raise VideoError(
                    f"{clip.name}: labels reach class {top}, the task has {task.classes} classes. "
                    f"Set task.classes or map the labels."
                )
            targets.append(target)
            teachers.append(teacher)
            confusions.append(task.confusion(teacher, target).sum(0))
        confusion = torch.stack(confusions)
        table = _error_table(confusion.sum((0, 2)), task.classes, weighting)
        return ClipStore(tuple(clips), tuple(targets), tuple(teachers), confusion, table, source)


def gather(
    per_clip: Sequence[UInt8[Tensor, "_ *shape"]], clips: Int64[Tensor, " b"], times: Int64[Tensor, " b"]
) -> UInt8[Tensor, "b *shape"]:
    """The frame `times[i]` of clip `clips[i]` for every i, of frames, targets or the like."""
    return torch.stack([per_clip[c][t] for c, t in zip(clips.tolist(), times.tolist(), strict=True)])


def _check(clips: Sequence[Clip], source: str) -> None:
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


@torch.no_grad()
def _predictions(
    model: ResQModel, task: Segmentation, frames: Tensor, progress: Callable[[int], None] | None, chunk: int = 16
) -> Tensor:
    parts = []
    for part in frames.split(chunk):
        raw = model.float_forward(to_float(part.to(model.device)))
        parts.append(task.predict(task.output(raw, (frames.shape[2], frames.shape[3]))).cpu())
        if progress is not None:
            progress(len(part))
    return torch.cat(parts)


def _error_table(pixels: Tensor, classes: int, weighting: str) -> Tensor:
    if weighting not in get_args(ErrorWeighting):
        raise SettingsError(f"weighting is 'iou' or 'pixel', got {weighting!r}.")
    table = torch.ones(classes, classes)
    if weighting == "iou":
        # A class rarer than 0.5% of the pixels would drown all others.
        frequency = (pixels / pixels.sum().clamp_min(1)).clamp_min(0.005).float()
        inverse = frequency.amax() / frequency / classes
        table = inverse[:, None] + inverse[None, :]
    return table.fill_diagonal_(0)
