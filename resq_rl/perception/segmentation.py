"""The task of semantic segmentation: classes, confusion, mean IoU, uncertainty and the loss for training."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

import torch
from jaxtyping import Float, Float64, Int64, Num, UInt8
from torch import Tensor
from torch.nn import functional as F

from resq_rl.errors import NetworkError, SettingsError, VideoError
from resq_rl.perception.task import (
    LEAST_PROBABILITY,
    PALETTE,
    Loss,
    PretrainSettings,
    log_probabilities,
    select_output,
)
from resq_rl.perception.training_batches import class_shares, mirrored_map
from resq_rl.quantization.kernels import native
from resq_rl.video import IGNORE, Clip

__all__ = ["OutputKind", "Segmentation", "class_iou", "mean_iou", "segmentation_loss"]


DEFAULT_THRESHOLD: Final = 0.5
ONE_CLASS: Final = 0.9999  # share of a frame's pixels from which the frame counts as of one class

OutputKind = Literal["logits", "probabilities", "probability", "logit"]
"""`logits` or `probabilities`: one channel per class; `probability` or `logit`: one channel, of the foreground."""
BY_CLASS: Final[tuple[OutputKind, ...]] = ("logits", "probabilities")


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


@dataclass(frozen=True)
class Segmentation:
    """Semantic segmentation of every pixel of a frame.

    Attributes:
        classes: number of classes k, 2 to 255.
        kind: what the network returns: "logits" (b, k, h, w), or "probabilities" of the classes, as behind a softmax;
            or "probability" or "logit" (b, 1, h, w) of the foreground, which is class 1 of 2.
        threshold: least foreground probability that counts as foreground, strictly between 0 and 1; it has no
            effect where there is a channel for each class, and must be left alone there.
        output_key: which of several outputs, an index or a dictionary key; None for a network with one
            output.
        label_size: height and width of the labels where that is not the size of the frames. The network's output is
            resized to it before the class of each pixel is chosen, so that accuracy is measured there.

    Raises:
        SettingsError: a value is out of range, or has no effect.
    """

    classes: int = 6
    kind: OutputKind = "logits"
    threshold: float = DEFAULT_THRESHOLD
    output_key: int | str | None = None
    label_size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(OutputKind):
            raise SettingsError(
                f"Segmentation: kind must be one of {', '.join(get_args(OutputKind))}, got {self.kind!r}."
            )
        if not 2 <= self.classes <= IGNORE:
            raise SettingsError(f"Segmentation: classes must be from 2 to {IGNORE}, got {self.classes}.")
        if self.kind not in BY_CLASS and self.classes != 2:
            raise SettingsError(
                f"Segmentation: kind {self.kind!r} knows background and foreground only, so classes must be "
                f"2, got {self.classes}. Use kind 'logits' for more classes."
            )
        if not 0 < self.threshold < 1:
            raise SettingsError(f"Segmentation: threshold must lie between 0 and 1, got {self.threshold}.")
        if self.kind in BY_CLASS and self.threshold != DEFAULT_THRESHOLD:
            raise SettingsError(
                f"Segmentation: threshold {self.threshold} has no effect on kind {self.kind!r}, whose highest class "
                "wins. Leave it out, or set kind to 'probability' or 'logit'."
            )
        if self.label_size is not None:
            object.__setattr__(self, "label_size", tuple(self.label_size))
            if len(self.label_size) != 2 or min(self.label_size) < 1:
                raise SettingsError(
                    f"Segmentation: label_size must be a height and a width of 1 or more, got {self.label_size}."
                )

    @property
    def metric(self) -> str:
        """The accuracy is the mean IoU."""
        return "mean IoU"

    @property
    def channels(self) -> int:
        """Channels of the network's output: `classes`, or 1 for a foreground probability or logit."""
        return self.classes if self.kind in BY_CLASS else 1

    def output(self, raw: object, size: tuple[int, int] | None = None) -> Float[Tensor, "b k h w"]:
        """The scores in whatever the network returned, in float32.

        Args:
            raw: a tensor, or a list, tuple or dictionary of tensors, from which `output_key` chooses.
            size: height and width of the frames in pixels, to which scores of another size are resized bilinearly; with
                `label_size` they are resized to that.

        Returns:
            Logits, which of probabilities are their logarithms; or for kinds "probability" and "logit" the foreground
            probability.

        Raises:
            NetworkError: there is no such output, it is not a float tensor of shape (b, `channels`, h, w), or holds
                probabilities that are none.
        """
        scores = select_output(raw, self.output_key, "segmentation")
        if scores.dim() != 4 or scores.shape[1] != self.channels or not scores.is_floating_point():
            raise NetworkError(
                f"A network for {self} must put out a float tensor of shape (b, {self.channels}, h, w), got "
                f"{scores.dtype} of shape {tuple(scores.shape)}. Set classes, kind and output_key to match "
                "the network."
            )
        scores = scores.float()
        if self.kind == "logit":
            scores = scores.sigmoid()
        size = size if self.label_size is None else self.label_size
        if size is not None and tuple(scores.shape[-2:]) != tuple(size):
            scores = F.interpolate(scores, size=size, mode="bilinear", align_corners=False)
        return log_probabilities(scores, "logits") if self.kind == "probabilities" else scores

    def check(self, clip: Clip) -> None:
        """Check a clip's labels.

        Raises:
            VideoError: they are not maps of the task's classes, or of another size than predictions are compared at.
        """
        labels = clip.labels
        if labels is None or labels.dtype != torch.uint8:
            raise VideoError(f"{clip.name}: segmentation needs a class for every pixel. Choose another task or video.")
        found = (labels.shape[1], labels.shape[2])
        if found != (self.label_size or clip.size):
            raise VideoError(
                f"{clip.name}: labels are of {found[0]}x{found[1]} pixels (height x width), where the task compares at "
                f"{'x'.join(map(str, self.label_size or clip.size))}. Set task.label_size=[{found[0]},{found[1]}] to "
                "measure at the size of the labels."
            )
        top = int(torch.where(labels == IGNORE, 0, labels).max())
        if top >= self.classes:
            raise VideoError(
                f"{clip.name}: labels reach class {top}, the task has {self.classes} classes. "
                f"Set task.classes or map the labels."
            )

    def predict(self, output: Float[Tensor, "b k h w"]) -> UInt8[Tensor, "b h w"]:
        """The class of every pixel: that of the highest logit, or 1 where the foreground reaches the threshold."""
        if self.kind in BY_CLASS:
            return native().highest(output)
        return (output[:, 0] >= self.threshold).to(torch.uint8)

    def target(self, prediction: UInt8[Tensor, "b h w"]) -> UInt8[Tensor, "b h w"]:
        """The classes themselves."""
        return prediction

    def counts(self, prediction: UInt8[Tensor, "b h w"], target: UInt8[Tensor, "b h w"]) -> Int64[Tensor, "b k k"]:
        """The confusion of each frame."""
        return self.confusion(prediction, target)

    def accuracy(self, counts: Int64[Tensor, "*n k k"]) -> Float64[Tensor, "*n"]:
        """Mean IoU."""
        return mean_iou(counts)

    def confusion(self, prediction: UInt8[Tensor, "b h w"], target: UInt8[Tensor, "b h w"]) -> Int64[Tensor, "b k k"]:
        """Pixels of each (target, prediction) pair of classes, per frame, without those labelled 255.

        Raises:
            VideoError: the sizes differ, or a label is neither a class nor 255.
        """
        if prediction.shape != target.shape:
            raise VideoError(
                f"Labels have shape {tuple(target.shape)} and predictions {tuple(prediction.shape)} (frames, "
                "height, width). Resize the output to the labels: output(raw, size), or set label_size."
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

    def error_table(self, counts: Int64[Tensor, "k k"], weighting: str) -> Float[Tensor, "k k"]:
        """Cost of predicting class b where the target is a, zero on the diagonal.

        Args:
            counts: confusion whose rows tell how frequent each class is among the targets.
            weighting: "pixel" costs every wrong pixel 1; "iou" costs it max(f) / k * (1/f(target) + 1/f(prediction)),
                with f the frequencies of the k classes among the targets (at least 0.5%): to first order max(f) times
                what the pixel takes from mean IoU.
        """
        table = torch.ones(self.classes, self.classes)
        if weighting == "iou":
            pixels = counts.sum(1)
            # A class rarer than 0.5% of the pixels would drown all others.
            frequency = (pixels / pixels.sum().clamp_min(1)).clamp_min(0.005).float()
            inverse = frequency.amax() / frequency / self.classes
            table = inverse[:, None] + inverse[None, :]
        return table.fill_diagonal_(0)

    def error(
        self,
        prediction: UInt8[Tensor, "b h w"],
        target: UInt8[Tensor, "b h w"],
        table: Float[Tensor, "k k"],
        size: tuple[int, int],
    ) -> Float[Tensor, "b _ _"]:
        """Cost of every pixel by `table`; pixels labelled 255 cost nothing.

        With `label_size` a pixel's cost is the mean over the labels that lie in it, weighted by area.
        """
        by_pair = torch.zeros(256, self.classes)
        by_pair[: self.classes] = table
        pair = (target.int() * self.classes).add_(prediction)
        cost = by_pair.flatten().index_select(0, pair.flatten()).view(pair.shape)  # twice as fast as indexing
        if tuple(cost.shape[1:]) == tuple(size):
            return cost
        rows, columns = (_area_weights(n, of) for n, of in zip(size, cost.shape[1:], strict=True))
        pooled: Tensor = rows @ cost @ columns.T
        return pooled

    def features(
        self, output: Float[Tensor, "b k h w"], prediction: UInt8[Tensor, "b h w"]
    ) -> tuple[Float[Tensor, "b _ _"], Float[Tensor, "b h w"], Float[Tensor, "b h w"]]:
        """`uncertainty`; pixels that differ from the one to the right or below; pixels that are not of class 0."""
        edge = torch.zeros(prediction.shape, dtype=torch.bool, device=prediction.device)
        edge[:, :, :-1] |= prediction[:, :, 1:] != prediction[:, :, :-1]
        edge[:, :-1] |= prediction[:, 1:] != prediction[:, :-1]
        return self.uncertainty(output), edge.float(), (prediction != 0).float()

    def divergence(self, output: Float[Tensor, "b k h w"], teacher: Float[Tensor, "b k h w"]) -> Float[Tensor, " b"]:
        """Divergence of the classes at a pixel from the float network's, averaged over the pixels.

        KL(p || q) = sum over classes of p (log p - log q), with p of the teacher and q of the output (Kullback and
        Leibler 1951; the loss of distillation, Hinton et al., arXiv 1503.02531).
        """
        log_p, log_q = self._log_probabilities(teacher), self._log_probabilities(output)
        return (log_p.exp() * (log_p - log_q)).sum(1).mean((1, 2))

    def _log_probabilities(self, output: Float[Tensor, "b k h w"]) -> Float[Tensor, "b c h w"]:
        if self.kind in BY_CLASS:
            return output.log_softmax(1)
        p = output.clamp(LEAST_PROBABILITY, 1 - LEAST_PROBABILITY)
        return torch.cat([(-p).log1p(), p.log()], 1)

    def overlay(self, frame: Float[Tensor, "3 h w"], prediction: UInt8[Tensor, "_ _"]) -> Float[Tensor, "3 h w"]:
        """The frame in grey, tinted where the predicted class is not 0."""
        if prediction.shape != frame.shape[1:]:
            prediction = F.interpolate(prediction[None, None].float(), size=frame.shape[1:], mode="nearest-exact")[0, 0]
        grey = frame.mean(0, keepdim=True).expand(3, -1, -1)
        tint = PALETTE[prediction.long() % len(PALETTE)].movedim(-1, 0)
        return torch.where(prediction > 0, 0.4 * grey + 0.6 * tint, grey)

    def degenerate(self, predictions: Sequence[UInt8[Tensor, "t h w"]]) -> str | None:
        """Why the predictions for some clips cannot be those of a network that works, or None.

        Every frame is of one class.
        """
        found = torch.cat([prediction.flatten(1) for prediction in predictions])
        classes = found.unique().tolist()
        top = torch.stack([(found == c).double().mean(1) for c in classes]).amax(0)
        if not bool((top > ONE_CLASS).all()):
            return None
        nothing = "nothing is ever foreground" if classes == [0] and self.classes == 2 else None
        return nothing or f"each of the {len(found)} frames is of one class (found: {', '.join(map(str, classes))})"

    def objective(self, clips: Sequence[Clip], settings: PretrainSettings, purpose: str = "training") -> Loss:
        """`segmentation_loss`, with class weights from the frequencies of the classes in the clips.

        Raises:
            VideoError: no clips, or labels that do not fit. SettingsError: the task is not of kind "logits".
        """
        if self.kind != "logits":
            raise SettingsError(f"Pretraining needs a task of kind 'logits', got {self.kind!r}.")
        shares = class_shares(clips, self.classes, purpose)
        weights = shares.clamp(min=1e-4) ** -settings.class_balance
        weights = weights / weights.mean()

        def loss(output: Tensor, labels: Tensor) -> Tensor:
            return segmentation_loss(output, labels, weights.to(output.device), settings.dice)

        return loss

    def mirrored(self, labels: Num[Tensor, "*b h w"], width: int) -> Num[Tensor, "*b h w"]:
        """Labels of mirrored frames, or of windows of them."""
        return mirrored_map(labels, width)

    def uncertainty(self, output: Float[Tensor, "b k h w"], stride: int = 4) -> Float[Tensor, "b _ _"]:
        """How undecided the output is at every `stride`-th pixel, in 0 (certain) to 1.

        One minus the margin between the two most probable classes: 1 - (p_1 - p_2) of the softmax of logits,
        which for a foreground probability p is 1 - |2p - 1|. The first row and column sampled are stride / 2.
        """
        start = min(stride // 2, output.shape[-2] - 1, output.shape[-1] - 1)
        sample = output[..., start::stride, start::stride]
        if self.kind not in BY_CLASS:
            return 1 - (2 * sample[:, 0] - 1).abs()
        best = sample.softmax(1).topk(2, dim=1).values
        return 1 - (best[:, 0] - best[:, 1])


def _area_weights(cells: int, of: int) -> Float[Tensor, "cells of"]:
    """For each of `cells` equal parts of a length, the shares of it that lie in each of `of` equal parts."""
    starts, others = torch.arange(cells)[:, None] / cells, torch.arange(of)[None, :] / of
    shared = torch.minimum(starts + 1 / cells, others + 1 / of) - torch.maximum(starts, others)
    return shared.clamp(min=0) * cells


def segmentation_loss(
    logits: Float[Tensor, "b k h w"],
    labels: Int64[Tensor, "b h w"],
    class_weights: Float[Tensor, " k"],
    dice: float,
) -> Float[Tensor, ""]:
    """Weighted cross-entropy plus `dice` times the soft Dice loss; pixels labelled 255 count in neither.

    Dice loss: the mean over the classes c that occur of 1 - 2 sum(p_c t_c) / (sum(p_c) + sum(t_c)), summed
    over the batch, p the softmax and t the one-hot labels (Milletari et al. 2016, arXiv 1606.04797, without
    the squares).
    """
    log_probability = logits.log_softmax(1)
    loss = F.nll_loss(log_probability, labels, class_weights, ignore_index=IGNORE)
    if dice == 0:
        return loss
    counted = labels != IGNORE
    known, probability = labels.where(counted, 0), log_probability.exp() * counted[:, None]
    hits = probability.gather(1, known[:, None]).flatten()
    overlap = hits.new_zeros(logits.shape[1]).index_add(0, known.flatten(), hits)
    pixels = torch.bincount(labels[counted], minlength=logits.shape[1])
    dice_loss = 1 - 2 * overlap / (probability.sum((0, 2, 3)) + pixels).clamp(min=1.0)
    return loss + dice * dice_loss[pixels > 0].mean()
