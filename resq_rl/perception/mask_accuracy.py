"""Region similarity J and contour accuracy F of object masks, as DAVIS defines them (Perazzi et al. 2016, CVPR)."""

import math

import torch
from jaxtyping import Bool, Float, Float64, UInt8
from torch import Tensor
from torch.nn import functional as F

from resq_rl.video import IGNORE

__all__ = ["contour", "contour_accuracy", "j_and_f", "region_similarity"]

Masks = UInt8[Tensor, "b h w"]

TOLERANCE = 0.008  # distance within which contours match, as a share of the frame's diagonal


def region_similarity(prediction: Masks, target: Masks) -> Float64[Tensor, " b"]:
    """J, intersection over union of each frame's masks: 1 where both are empty.

    Args:
        prediction: 1 inside the object, 0 outside.
        target: likewise; pixels of 255 count in neither mask.
    """
    counted = target != IGNORE
    mine, wanted = (prediction == 1) & counted, target == 1
    shared, joint = (mine & wanted).sum((1, 2)), (mine | wanted).sum((1, 2))
    return torch.where(joint > 0, shared.double() / joint.clamp_min(1), 1.0)


def contour_accuracy(prediction: Masks, target: Masks, tolerance: float = TOLERANCE) -> Float64[Tensor, " b"]:
    """F, the harmonic mean of contour precision P and recall R of each frame's masks: 2 P R / (P + R).

    P is the share of the prediction's `contour` that lies within some pixels of the target's, R the reverse; the
    distance is `tolerance` times the frame's diagonal, rounded up, by a dilation with a disk. Where one contour is
    empty its share is 1 and the other 0; where both are, F is 1.

    Args:
        prediction, target: as `region_similarity` takes them.
        tolerance: distance as a share of the frame's diagonal.
    """
    height, width = target.shape[1:]
    counted = target != IGNORE
    mine, wanted = contour((prediction == 1) & counted), contour(target == 1)
    disk = _disk(math.ceil(tolerance * math.hypot(height, width)), target.device)
    mine_count, wanted_count = mine.sum((1, 2)), wanted.sum((1, 2))
    matched = (mine & _dilated(wanted, disk)).sum((1, 2)), (wanted & _dilated(mine, disk)).sum((1, 2))
    neither = (mine_count == 0) & (wanted_count == 0)
    precision = torch.where(mine_count > 0, matched[0].double() / mine_count.clamp_min(1), 1.0)
    recall = torch.where(wanted_count > 0, matched[1].double() / wanted_count.clamp_min(1), 1.0)
    total = precision + recall
    return torch.where(neither, 1.0, torch.where(total > 0, 2 * precision * recall / total.clamp_min(1e-12), 0.0))


def contour(masks: Bool[Tensor, "b h w"]) -> Bool[Tensor, "b h w"]:
    """Pixels that differ from the one to the right, below or diagonally below (Martin et al. 2004, `seg2bmap`)."""
    right, below = torch.zeros_like(masks), torch.zeros_like(masks)
    right[:, :, :-1] = masks[:, :, :-1] ^ masks[:, :, 1:]
    below[:, :-1] = masks[:, :-1] ^ masks[:, 1:]
    found = right | below
    found[:, :-1, :-1] |= masks[:, :-1, :-1] ^ masks[:, 1:, 1:]
    return found


def _disk(radius: int, device: torch.device) -> Float[Tensor, "n n"]:
    offsets = torch.arange(-radius, radius + 1, device=device)
    return (offsets[:, None] ** 2 + offsets[None] ** 2 <= radius**2).float()


def _dilated(marked: Bool[Tensor, "b h w"], disk: Float[Tensor, "n n"]) -> Bool[Tensor, "b h w"]:
    near = F.conv2d(marked[:, None].float(), disk[None, None], padding=disk.shape[0] // 2)
    return near[:, 0] > 0.5


def j_and_f(prediction: UInt8[Tensor, "t h w"], target: UInt8[Tensor, "t h w"]) -> tuple[float, float, float]:
    """J, F and their mean over a sequence of 3 frames or more.

    As in DAVIS the first frame, whose mask is given, and the last one do not count. The figure of a dataset is the mean
    over its sequences.
    """
    inner = slice(1, -1)
    region = float(region_similarity(prediction[inner], target[inner]).mean())
    boundary = float(contour_accuracy(prediction[inner], target[inner]).mean())
    return region, boundary, (region + boundary) / 2
