"""The task of video object segmentation by mask propagation: J and F, and the previous mask as the network's input."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Num, UInt8
from torch import Tensor

from resq_rl.errors import SettingsError, VideoError
from resq_rl.perception.disturbed_masks import disturbed_masks
from resq_rl.perception.mask_accuracy import contour_accuracy, region_similarity
from resq_rl.perception.segmentation import Segmentation
from resq_rl.perception.task import Loss, PretrainSettings
from resq_rl.video import IGNORE, Clip

__all__ = ["MaskPropagation"]

DISTURBED, LOST = 0.5, 0.05
"""Shares of the roll-outs in training that begin with a disturbed mask, or with an empty one."""


@dataclass(frozen=True)
class MaskPropagation(Segmentation):
    """Following one object through a clip from its mask in the first frame.

    The network takes each frame with the mask of the previous frame, which is its own prediction except at the second
    frame, and with two colours of the object in the first frame.
    Accuracy is J&F, the mean of region similarity and contour accuracy (`j_and_f`), over the frames of all clips
    without the first and the last of each, as DAVIS counts.

    Attributes:
        classes: 2, background (0) and object (1).
        kind, threshold, output_key: as for `Segmentation`.
        label_size: None: masks are compared at the size of the frames.

    Raises:
        SettingsError: a value is out of range.
    """

    classes: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.classes != 2:
            raise SettingsError(
                f"MaskPropagation: classes must be 2, background and one object, got {self.classes}. Follow several "
                "objects one by one."
            )
        if self.label_size is not None:
            raise SettingsError(
                f"MaskPropagation: label_size {self.label_size} cannot be used, since the network is given its own "
                "masks at the size of the frames. Leave it out."
            )

    @property
    def metric(self) -> str:
        """Mean of region similarity and contour accuracy."""
        return "J&F"

    def check(self, clip: Clip) -> None:
        """Look at a clip's labels.

        Raises:
            VideoError: they are not masks of one object, or the first frame does not show it.
        """
        super().check(clip)
        labels = clip.labels
        if len(clip) < 3:
            raise VideoError(f"{clip.name}: no frame of {len(clip)} counts, since the first and the last do not.")
        if labels is None or not bool((labels[0] == 1).any()):
            raise VideoError(
                f"{clip.name}: the first frame's mask shows no object, so there is none to follow. Start the clip "
                "where the object is in view."
            )

    # What the network is given ----------------------------------------------------------------------------------------

    def given(self, label: Num[Tensor, "h w"]) -> UInt8[Tensor, "h w"]:
        """The first frame's mask; unlabelled pixels are outside the object."""
        return (label == 1).to(torch.uint8)

    def memory(self, prediction: UInt8[Tensor, "b h w"]) -> UInt8[Tensor, "b 1 h w"]:
        """The previous masks as planes of bytes: 255 inside the object."""
        return prediction[:, None] * 255

    def template(self, frame: UInt8[Tensor, "3 h w"], given: UInt8[Tensor, "h w"]) -> UInt8[Tensor, "6 1 1"]:
        """Two colours of the object: the means of its darker and of its lighter half; grey where it is empty."""
        pixels = frame[:, given == 1].float()
        if not pixels.numel():
            return frame.new_full((6, 1, 1), 128)
        light = pixels.mean(0)
        dark = light <= light.median()
        halves = [pixels[:, half].mean(1) if bool(half.any()) else pixels.mean(1) for half in (dark, ~dark)]
        return torch.cat(halves).round().to(torch.uint8)[:, None, None]

    def judged(self, targets: UInt8[Tensor, "t h w"]) -> UInt8[Tensor, "t h w"]:
        """Targets without those of the first frame, which is given, and of the last, which DAVIS leaves out."""
        kept = targets.clone()
        kept[0], kept[-1] = IGNORE, IGNORE
        return kept

    def disturbed(self, labels: Num[Tensor, "b h w"], generator: torch.Generator) -> UInt8[Tensor, "b h w"]:
        """Masks with which roll-outs in training begin: as labelled, with errors, or empty."""
        masks, drawn = labels == 1, torch.rand(len(labels), 1, 1, generator=generator)
        masks = torch.where(drawn < DISTURBED, disturbed_masks(masks, generator), masks)
        return (masks & (drawn >= LOST)).to(torch.uint8)

    def degenerate(self, predictions: Sequence[UInt8[Tensor, "t h w"]]) -> str | None:
        """As for segmentation, without the first frame's mask, which is given."""
        return super().degenerate([prediction[1:] for prediction in predictions])

    def objective(self, clips: Sequence[Clip], settings: PretrainSettings, purpose: str = "training") -> Loss:
        """As for segmentation, frame by frame: a small object counts as much as a large one, as it does in J and F.

        Frames of which no pixel is labelled do not count.

        Raises:
            VideoError: no clips, or labels that do not fit. SettingsError: the task is not of kind "logits".
        """
        of_frames = super().objective(clips, settings, purpose)

        def loss(output: Tensor, labels: Tensor) -> Tensor:
            known = (labels != IGNORE).flatten(1).any(1)
            pairs = zip(output[known].split(1), labels[known].split(1), strict=True)
            return torch.stack([of_frames(*pair) for pair in pairs]).mean() if bool(known.any()) else 0 * output.sum()

        return loss

    # How it is judged -------------------------------------------------------------------------------------------------

    def counts(self, prediction: UInt8[Tensor, "b h w"], target: UInt8[Tensor, "b h w"]) -> Float64[Tensor, "b 5"]:
        """J, F, 1, pixels of the object and pixels of each frame; all 0 for a frame in which no pixel is labelled."""
        known, inside = (target != IGNORE).sum((1, 2)), (target == 1).sum((1, 2))
        judged = (known > 0).double()
        region, boundary = region_similarity(prediction, target), contour_accuracy(prediction, target)
        return torch.stack([region * judged, boundary * judged, judged, inside.double(), known.double()], 1)

    def accuracy(self, counts: Float64[Tensor, "*n 5"]) -> Float64[Tensor, "*n"]:
        """J&F: the mean of J and F over the frames."""
        return (counts[..., 0] + counts[..., 1]) / (2 * counts[..., 2])

    def error_table(self, counts: Float64[Tensor, "5"], weighting: str) -> Float[Tensor, "2 2"]:
        """As for segmentation, from the numbers of pixels inside and outside the object."""
        inside, known = counts[3], counts[4]
        return super().error_table(torch.stack([known - inside, inside]).long().diag(), weighting)
