"""Training batches: single frames or windows of them drawn from clips, and their augmentation."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Num
from torch import Tensor
from torch.nn import functional as F

from resq_rl.errors import SettingsError, VideoError
from resq_rl.video import IGNORE, Clip

__all__ = ["FrameSampler", "class_shares", "labels_of"]

Mirror = Callable[[Tensor, int], Tensor]
"""Takes labels and the width of their frames, and returns the labels of the mirrored frames."""

_STREAM = 1_000_003  # a prime far above any number of steps, so that no two seeds share a generator


def mirrored_map(labels: Num[Tensor, "*b h w"], width: int) -> Num[Tensor, "*b h w"]:
    """Maps of one label per pixel, mirrored left to right."""
    return labels.flip(-1)


def labels_of(clip: Clip, purpose: str) -> Num[Tensor, "t *l"]:
    """Labels of a clip.

    Raises:
        VideoError: it has none. The message names the `purpose`.
    """
    if clip.labels is None:
        raise VideoError(
            f"Clip {clip.name!r} ({clip.origin}) has no labels, which {purpose} needs. Use labelled clips."
        )
    return clip.labels


def class_shares(clips: Sequence[Clip], classes: int, purpose: str) -> Float[Tensor, " k"]:
    """Share of each class among the labelled pixels of all clips.

    Raises:
        VideoError: there are no clips, a clip has no labels, a label is neither a class nor 255, or no pixel
            has a label; the message names the `purpose`.
    """
    if not clips:
        raise VideoError(f"There are no clips for {purpose}. Check the split of the dataset.")
    counts = torch.zeros(256, dtype=torch.int64)
    for clip in clips:
        counts += torch.bincount(labels_of(clip, purpose).flatten(), minlength=256)
    counts[IGNORE] = 0
    wrong = [value for value in range(classes, 256) if counts[value]]
    if wrong:
        raise VideoError(
            f"Labels of the {purpose} clips hold the values {wrong[:5]}, but the task has the classes 0 to "
            f"{classes - 1} (and {IGNORE} for pixels to ignore). Set classes to match the dataset."
        )
    if not counts.any():
        raise VideoError(f"No pixel of the {len(clips)} {purpose} clips has a label other than {IGNORE}. Label some.")
    return (counts[:classes] / counts.sum()).float()


@dataclass(frozen=True)
class FrameSampler:
    """Draws batches of single frames, uniformly over all frames of all clips, with replacement.

    The batch of a step depends on the seed and the step alone.

    Attributes:
        clips: labelled clips of one size, at least one.
        batch: frames per batch.
        seed: of the drawing and the augmentation.
        augment: mirror left to right; change brightness, contrast, colour balance and noise.
        mirror: how labels are mirrored.
        zoom: least and greatest factor by which frames are enlarged or made smaller; its logarithm is uniform.
        window: consecutive frames to draw in place of each single one; 0 for single frames.

    Raises:
        VideoError: the clips have several sizes, or one is shorter than the window. SettingsError: windows and zoom.
    """

    clips: Sequence[Clip]
    batch: int
    seed: int
    augment: bool
    mirror: Mirror = mirrored_map
    zoom: tuple[float, float] = (1.0, 1.0)
    window: int = 0

    def __post_init__(self) -> None:
        sizes = sorted({clip.size for clip in self.clips})
        if len(sizes) > 1:
            raise VideoError(
                f"Training clips must have one size, got {len(sizes)}: {sizes[:4]} (height, width). "
                "Give the dataset one size to resize to."
            )
        if self.window and self.zoom != (1.0, 1.0):
            raise SettingsError(
                f"Windows of frames are not zoomed, got zoom {self.zoom}. Set pretraining.zoom to [1, 1]."
            )
        short = [clip.name for clip in self.clips if len(clip) < self.window]
        if short:
            raise VideoError(
                f"Training on windows of {self.window} frames needs clips of as many, got fewer in "
                f"{', '.join(short[:3])} ({len(short)} of {len(self.clips)} clips). Leave them out, or lower "
                "pretraining.roll_out."
            )

    @property
    def frames(self) -> int:
        """Frames in all clips."""
        return sum(len(clip) for clip in self.clips)

    def draw(self, step: int) -> tuple[Float[Tensor, "b *n 3 h w"], Num[Tensor, "b *l"]]:
        """Frames in 0..1 and labels of the batch of `step`. Windows add a dimension of time behind the batch."""
        generator = torch.Generator().manual_seed(self.seed * _STREAM + step)
        last = max(1, self.window) - 1  # no window begins so close to the end
        ends = torch.tensor([len(clip) - last for clip in self.clips]).cumsum(0)
        chosen = torch.randint(int(ends[-1]), (self.batch,), generator=generator)
        owners = torch.searchsorted(ends, chosen, right=True)
        frames, labels = [], []
        for place, owner in zip(chosen.tolist(), owners.tolist(), strict=True):
            clip = self.clips[owner]
            time = place - int(ends[owner]) + len(clip) - last
            taken = slice(time, time + self.window) if self.window else time
            frames.append(clip.frames[taken])
            labels.append(labels_of(clip, "training")[taken])
        images, targets = torch.stack(frames).float() / 255, torch.stack(labels)
        targets = targets if targets.is_floating_point() else targets.long()
        if self.zoom != (1.0, 1.0):
            images, targets = zoomed(images, targets, self.zoom, generator)
        return augmented(images, targets, generator, self.mirror) if self.augment else (images, targets)


def zoomed(
    images: Float[Tensor, "b 3 h w"],
    labels: Num[Tensor, "b _ _"],
    limits: tuple[float, float],
    generator: torch.Generator,
) -> tuple[Float[Tensor, "b 3 h w"], Num[Tensor, "b _ _"]]:
    """Enlarge each frame around a random place, or shrink it within repeated edges, which are unlabelled."""
    count = images.shape[0]
    zoom = torch.empty(count).uniform_(math.log(limits[0]), math.log(limits[1]), generator=generator).exp()
    shift = (1 - 1 / zoom).abs()[:, None] * torch.empty(count, 2).uniform_(-1, 1, generator=generator)
    windows = torch.cat([torch.eye(2) / zoom[:, None, None], shift[:, :, None]], 2)
    grid = F.affine_grid(windows, list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    if labels.is_floating_point():
        return images, _zoomed_points(labels, zoom, shift, (images.shape[-1], images.shape[-2]))
    known = (labels - IGNORE)[:, None].float()  # so that the zeros outside mean unlabelled
    if labels.shape[1:] != images.shape[2:]:
        grid = F.affine_grid(windows, [count, 1, *labels.shape[1:]], align_corners=False)
    known = F.grid_sample(known, grid, mode="nearest", padding_mode="zeros", align_corners=False)
    return images, known[:, 0].long() + IGNORE


def _zoomed_points(
    points: Float[Tensor, "b k 3"], zoom: Float[Tensor, " b"], shift: Float[Tensor, "b 2"], extent: tuple[int, int]
) -> Float[Tensor, "b k 3"]:
    """Points after their frames of `extent` (width, height) were zoomed; those outside do not count."""
    size = torch.tensor(extent)
    place = (points[..., :2] + 0.5) * 2 / size - 1  # from -1 to 1
    place = (place - shift[:, None]) * zoom[:, None, None]
    counts = points[..., 2] * (place.abs() < 1).all(-1)
    return torch.cat([(place + 1) * size / 2 - 0.5, counts[..., None]], -1)


def augmented(
    images: Float[Tensor, "b *n 3 h w"],
    labels: Num[Tensor, "b *l"],
    generator: torch.Generator,
    mirror: Mirror = mirrored_map,
) -> tuple[Float[Tensor, "b *n 3 h w"], Num[Tensor, "b *l"]]:
    """Mirror half of the frames; change contrast, brightness, colour balance and noise, one way for a whole window."""
    count, between = images.shape[0], [1] * (images.dim() - 4)

    def uniform(low: float, high: float, channels: int = 1) -> Tensor:
        return torch.empty(count, *between, channels, 1, 1).uniform_(low, high, generator=generator)

    mirrored = torch.rand(count, generator=generator) < 0.5
    images = torch.where(mirrored.view(-1, *[1] * (images.dim() - 1)), images.flip(-1), images)
    labels = torch.where(mirrored.view(-1, *[1] * (labels.dim() - 1)), mirror(labels, images.shape[-1]), labels)
    gain, shift = uniform(0.7, 1.3) * uniform(0.9, 1.1, 3), uniform(-0.1, 0.1)
    noise = torch.randn(images.shape, generator=generator).mul_(uniform(0.0, 0.02))
    images.sub_(0.5).mul_(gain).add_(0.5).add_(shift).add_(noise).clamp_(0, 1)  # in place: windows are large
    return images, labels
