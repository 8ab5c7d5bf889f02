"""What a segmentation network's output means: classes, confusion, mean IoU and uncertainty."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Float64, Int64, UInt8
from torch import Tensor
from torch.nn import functional as F

from resq_rl.errors import NetworkError, SettingsError, VideoError
from resq_rl.video import IGNORE

__all__ = ["OutputKind", "Segmentation", "class_iou", "mean_iou", "pixel_accuracy"]

OutputKind = Literal["logits", "probability", "logit"]
"""`logits`: one channel per class; `probability` or `logit`: one channel, of the foreground."""


def class_iou(confusion: Int64[Tensor, "*n k k"]) -> Float64[Tensor, "*n k"]:
    """Intersection over union of each class; NaN for a class that neither the target nor the prediction has.

    IoU(c) = n(c, c) / (sum of row c + sum of column c - n(c, c)), with n = `confusion`, row target, column
    prediction.
    """
    counts = confusion.double()
    hits = counts.diagonal(dim1=-2, dim2=-1)
    return hits / (counts.sum(-1) + counts.sum(-2) - hits)


def mean_iou(confusion: Int64[Tensor, "*n k k"]) -> Float64[Tensor, "*n"]:
    """Mean of `class_iou` over the classes that the target or the prediction has, in 0..1.

    Sum confusion matrices over frames first for the mean IoU of a clip or a dataset. NaN where no pixel was
    counted.
    """
    return class_iou(confusion).nanmean(-1)


def pixel_accuracy(confusion: Int64[Tensor, "*n k k"]) -> Float64[Tensor, "*n"]:
    """Share of correctly classified pixels, in 0..1; NaN where no pixel was counted."""
    counts = confusion.double()
    return counts.diagonal(dim1=-2, dim2=-1).sum(-1) / counts.sum((-2, -1))


@dataclass(frozen=True)
class Segmentation:
    """Semantic segmentation of every pixel of a frame.

    Attributes:
        classes: number of classes k, 2 to 255.
        kind: what the network puts out: "logits" (b, k, h, w); or "probability" or "logit" (b, 1, h, w) of
            the foreground, which is class 1 of 2.
        threshold: least foreground probability that counts as foreground, strictly between 0 and 1; unused
            for "logits".
        output_key: which of several outputs, an index or a dictionary key; None for a network with one
            output.

    Raises:
        SettingsError: a value is out of range.
    """

    classes: int = 6
    kind: OutputKind = "logits"
    threshold: float = 0.5
    output_key: int | str | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(OutputKind):
            raise SettingsError(
                f"Segmentation: kind must be one of {', '.join(get_args(OutputKind))}, got {self.kind!r}."
            )
        if not 2 <= self.classes <= IGNORE:
            raise SettingsError(f"Segmentation: classes must be from 2 to {IGNORE}, got {self.classes}.")
        if self.kind != "logits" and self.classes != 2:
            raise SettingsError(
                f"Segmentation: kind {self.kind!r} knows background and foreground only, so classes must be "
                f"2, got {self.classes}. Use kind 'logits' for more classes."
            )
        if not 0 < self.threshold < 1:
            raise SettingsError(f"Segmentation: threshold must lie between 0 and 1, got {self.threshold}.")

    @property
    def channels(self) -> int:
        """Channels of the network's output: `classes`, or 1 for a foreground probability or logit."""
        return self.classes if self.kind == "logits" else 1

    def output(self, raw: object, size: tuple[int, int] | None = None) -> Float[Tensor, "b k h w"]:
        """The scores in whatever the network returned, in float32.

        Arguments:
            raw: a tensor, or a list, tuple or dictionary of tensors, from which `output_key` chooses.
            size: height and width in pixels to resize to, bilinearly, where the scores have another size.

        Returns:
            Logits, or for kinds "probability" and "logit" the foreground probability.

        Raises:
            NetworkError: there is no such output, or it is not a float tensor of shape (b, `channels`, h, w).
        """
        scores = self._select(raw)
        if scores.dim() != 4 or scores.shape[1] != self.channels or not scores.is_floating_point():
            raise NetworkError(
                f"A network for {self} must put out a float tensor of shape (b, {self.channels}, h, w), got "
                f"{scores.dtype} of shape {tuple(scores.shape)}. Set classes, kind and output_key to match "
                "the network."
            )
        scores = scores.float()
        if self.kind == "logit":
            scores = scores.sigmoid()
        if size is not None and tuple(scores.shape[-2:]) != tuple(size):
            scores = F.interpolate(scores, size=size, mode="bilinear", align_corners=False)
        return scores

    def _select(self, raw: object) -> Tensor:
        key, chosen = self.output_key, raw
        if isinstance(raw, dict | list | tuple):
            outputs = raw if isinstance(raw, dict) else dict(enumerate(raw))
            if isinstance(key, int) and not isinstance(raw, dict) and key < 0:
                key += len(outputs)
            if key is None and len(outputs) == 1:
                key = next(iter(outputs))
            if key not in outputs:
                raise NetworkError(
                    f"The network returns {len(outputs)} outputs ({_describe(outputs)}) and output_key is "
                    f"{self.output_key!r}. Set output_key to the one that holds the segmentation."
                )
            chosen = outputs[key]
        elif key not in (None, 0):
            raise NetworkError(
                f"The network returns a single {type(raw).__name__}, but output_key is {key!r}. Set output_key to None."
            )
        if not isinstance(chosen, Tensor):
            raise NetworkError(
                f"The network's output is a {type(chosen).__name__}, not a tensor. Return a tensor, or a "
                "list, tuple or dictionary of tensors, and set output_key to choose one."
            )
        return chosen

    def predict(self, output: Float[Tensor, "b k h w"]) -> UInt8[Tensor, "b h w"]:
        """The class of every pixel: of the highest logit, or 1 where the foreground reaches the threshold."""
        if self.kind == "logits":
            # argmax over a strided axis is ten times slower than comparing class by class.
            best = output[:, 0]
            winner = torch.zeros(best.shape, dtype=torch.uint8, device=output.device)
            for k in range(1, output.shape[1]):
                winner.masked_fill_(output[:, k] > best, k)
                best = torch.maximum(best, output[:, k])
            return winner
        return (output[:, 0] >= self.threshold).to(torch.uint8)

    def confusion(self, prediction: UInt8[Tensor, "b h w"], target: UInt8[Tensor, "b h w"]) -> Int64[Tensor, "b k k"]:
        """Pixels of each (target, prediction) pair of classes, per frame, without those labelled 255.

        Raises:
            VideoError: the sizes differ, or a label is neither a class nor 255.
        """
        if prediction.shape != target.shape:
            raise VideoError(
                f"Labels have shape {tuple(target.shape)} and predictions {tuple(prediction.shape)} (frames, "
                "height, width). Give labels of the frame's size and resize the output to it: output(raw, "
                "size)."
            )
        k, frames = self.classes, target.shape[0]
        row = torch.full((256,), k + 1, device=target.device)  # row k + 1 gathers labels that are no class
        row[:k] = torch.arange(k, device=target.device)
        row[IGNORE] = k
        start = torch.arange(frames, device=target.device)[:, None, None] * (k + 2) * k
        cells = (row * k)[target.int()] + prediction + start
        counts = torch.bincount(cells.flatten(), minlength=frames * (k + 2) * k).view(frames, k + 2, k)
        if bool(counts[:, k + 1].any()):
            wrong = sorted({int(v) for v in torch.unique(target)} - {*range(k), IGNORE})
            raise VideoError(
                f"Labels hold the values {wrong[:5]}, but the task has the classes 0 to {k - 1} (and "
                f"{IGNORE} for pixels to ignore). Set classes to match the dataset, or map its labels."
            )
        return counts[:, :k]

    def uncertainty(self, output: Float[Tensor, "b k h w"], stride: int = 4) -> Float[Tensor, "b _ _"]:
        """How undecided the output is at every `stride`-th pixel, in 0 (certain) to 1.

        One minus the margin between the two most probable classes: 1 - (p_1 - p_2) of the softmax of logits,
        which for a foreground probability p is 1 - |2p - 1|. The first row and column sampled are stride / 2.
        """
        start = min(stride // 2, output.shape[-2] - 1, output.shape[-1] - 1)
        sample = output[..., start::stride, start::stride]
        if self.kind != "logits":
            return 1 - (2 * sample[:, 0] - 1).abs()
        best = sample.softmax(1).topk(2, dim=1).values
        return 1 - (best[:, 0] - best[:, 1])


def _describe(outputs: dict[object, object]) -> str:
    """Keys and shapes of a network's outputs, for an error message."""
    return ", ".join(
        f"{k!r}: {tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__}" for k, v in outputs.items()
    )
