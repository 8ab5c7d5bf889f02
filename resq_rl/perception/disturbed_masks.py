"""Masks with errors as tracking networks make them, for training such a network to recover from its own errors."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

__all__ = ["disturbed_masks"]

TURN, SCALE, SHIFT, BEND = math.radians(12), 0.15, 0.05, 0.02
"""Largest rotation (radians), change of scale, shift and bend (shares of the frame's height) of a mask."""


def disturbed_masks(masks: Bool[Tensor, "b h w"], generator: torch.Generator) -> Bool[Tensor, "b h w"]:
    """Masks that were turned, scaled, moved and bent, with parts missing and others added."""
    count, height, width = masks.shape

    def uniform(*shape: int) -> Tensor:
        return 2 * torch.rand(count, *shape, generator=generator) - 1

    angle, scale = TURN * uniform(), 1 + SCALE * uniform()
    centres = _centres(masks)
    rows = torch.arange(height)[:, None] + 0.5 - centres[:, :1, None]
    columns = torch.arange(width) + 0.5 - centres[:, 1:, None]
    cosine, sine = (f(angle)[:, None, None] * scale[:, None, None] for f in (torch.cos, torch.sin))
    bend = F.interpolate(BEND * height * uniform(2, 5, 8), size=(height, width), mode="bicubic", align_corners=True)
    shift = SHIFT * height * uniform(2, 1, 1) + bend + centres[:, :, None, None]
    y, x = cosine * rows - sine * columns + shift[:, 0], sine * rows + cosine * columns + shift[:, 1]
    grid = torch.stack([2 * x / width - 1, 2 * y / height - 1], -1)
    moved = F.grid_sample(masks[:, None].float(), grid, align_corners=False)[:, 0] > 0.5
    holes, blots = (_blobs(centres, (height, width), uniform) for _ in range(2))
    return (moved & ~holes) | blots


def _centres(masks: Bool[Tensor, "b h w"]) -> Float[Tensor, "b 2"]:
    """Mean (y, x) of each mask's pixels; the middle of the frame where it is empty."""
    weights = masks.float()
    total = weights.sum((1, 2))
    y = (weights.sum(2) * (torch.arange(masks.shape[1]) + 0.5)).sum(1)
    x = (weights.sum(1) * (torch.arange(masks.shape[2]) + 0.5)).sum(1)
    middle = torch.tensor(masks.shape[1:]) / 2
    return torch.where(total[:, None] > 0, torch.stack([y, x], 1) / total.clamp_min(1)[:, None], middle)


def _blobs(
    centres: Float[Tensor, "b 2"], size: tuple[int, int], uniform: Callable[..., Tensor]
) -> Bool[Tensor, "b h w"]:
    """An ellipse near each centre, in one of four masks."""
    height, width = size
    place = centres + 0.25 * height * uniform(2)
    radius = height * (0.06 + 0.05 * uniform(2))
    y = (torch.arange(height)[:, None] + 0.5 - place[:, :1, None]) / radius[:, :1, None]
    x = (torch.arange(width) + 0.5 - place[:, 1:, None]) / radius[:, 1:, None]
    return (y * y + x * x < 1) & (uniform() > 0.5)[:, None, None]
