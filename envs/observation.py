"""The observation before a frame runs, made only from what a device has by then."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from jaxtyping import Float, Int64, Num, UInt8
from torch import Tensor

from resq_rl.quantization.specification.fields import cells_of

__all__ = [
    "AGE_OCTAVES",
    "FRAME_FEATURES",
    "Observation",
    "Seen",
    "age_feature",
    "frame_values",
    "meaning_of",
    "observed",
    "pool_mean",
    "pool_over_regions",
    "region_features",
    "region_values",
]

# Octaves of the keyframe's age that observations tell apart.
AGE_OCTAVES = 6

_OF_FRAME: Final[Mapping[str, str]] = {
    "keyframe_age": "log2(1 + frames since the keyframe) / 6, at most 1",
    "trade_off": "position of lambda in its range, on a log scale",
    "budget_left": "how full the bucket of the budget is, from which follows what the frame may cost; 1 without a mean",
    "frame_residual_mean": "square root of the mean absolute pixel residual of the frame",
    "foreground_share": "mean of `foreground` over the frame",
}
_OF_REGION: Final[Mapping[str, str]] = {
    "residual_mean": "square root of the mean absolute pixel residual against the reference frame",
    "residual_max": "largest absolute pixel residual",
    "drift_mean": "square root of the mean absolute pixel difference to the last keyframe",
    "residual_around": "`residual_mean` over the region and its eight neighbours",
    "uncertainty": "mean uncertainty of the last output, as its task defines it (`Task.features`)",
    "boundary": "mean boundary of the last output; for classes, pixels that differ from the next one right or below",
    "boundary_around": "`boundary` over the region and its eight neighbours",
    "foreground": "mean foreground of the last output; for classes, pixels that are not of class 0",
    "texture": "square root of the mean absolute difference of neighbouring pixels' luminance",
}
FRAME_FEATURES: Final = tuple(_OF_FRAME)


def region_features(groups: int) -> tuple[str, ...]:
    """Names of a region's features by index; the last are the shares of W8A8 spent there last, one per layer group."""
    return (*_OF_REGION, *(f"spent_group{g}" for g in range(groups)))


def meaning_of(feature: str) -> str:
    """The meaning of a feature of `region_features` or `FRAME_FEATURES`; all have values from 0 to 1."""
    if feature.startswith("spent_group"):
        return f"BOPs of layer group {feature[11:]} in the last frame, over its W8A8 BOPs in the region"
    return {**_OF_FRAME, **_OF_REGION}[feature]


@dataclass(frozen=True)
class Observation:
    """The observation of a batch of clips, all values in [0, 1].

    Attributes:
        regions: features of `region_features(groups)` by clip and region.
        frame: features of `FRAME_FEATURES` by clip.
    """

    regions: Float[Tensor, "b gh gw f"]
    frame: Float[Tensor, "b k"]

    @property
    def trade_off(self) -> Float[Tensor, " b"]:
        """Lambda's place in its range, on a log scale."""
        return self.frame[:, FRAME_FEATURES.index("trade_off")]

    def per_region(self) -> Float[Tensor, "b gh gw n"]:
        """Region features followed by the frame's, for agents that see one region."""
        frame = self.frame[:, None, None].expand(*self.regions.shape[:3], -1)
        return torch.cat([self.regions, frame], -1)

    def per_frame(self) -> Float[Tensor, "b n"]:
        """Mean and maximum of the region features over the regions, followed by the frame's."""
        return torch.cat([pool_over_regions(self.regions).flatten(1), self.frame], 1)

    def whole(self) -> Float[Tensor, "b n"]:
        """All region features, row by row, followed by the frame's."""
        return torch.cat([self.regions.flatten(1), self.frame], 1)


@dataclass(frozen=True)
class Seen:
    """What a device has of each clip before a frame runs, from which observations are made.

    Attributes:
        frame: the frame that runs next.
        reference_frame: the frame its residual is taken against: the last one in the closed loop, else the keyframe.
        key_frame: the last keyframe.
        output: the means by region of `Task.features` of the last output: uncertainty, boundary, foreground.
        spent: BOPs spent there last, as shares of the W8A8 BOPs of region and layer group.
        age: frames since the keyframe.
        trade_off: lambda.
    """

    frame: UInt8[Tensor, "b 3 h w"]
    reference_frame: UInt8[Tensor, "b 3 h w"]
    key_frame: UInt8[Tensor, "b 3 h w"]
    output: Float[Tensor, "b gh gw 3"]
    spent: Float[Tensor, "b gh gw g"]
    age: Int64[Tensor, " b"]
    trade_off: Float[Tensor, " b"]


def observed(
    seen: Seen, grid: tuple[int, int], *, closed_loop: bool
) -> tuple[Float[Tensor, "b gh gw f"], Float[Tensor, " b"], Float[Tensor, " b"]]:
    """Make the features of `region_features`, `frame_residual_mean` and `foreground_share`."""
    residual = difference(seen.frame, seen.reference_frame)
    residual_mean, texture = pool_mean(residual, grid).sqrt_(), frame_texture(seen.frame, grid)
    drift = residual_mean
    if closed_loop:
        drift = pool_mean(difference(seen.frame, seen.key_frame), grid).sqrt_()
    regions = region_values(residual_mean, pool_max(residual, grid), drift, seen.output, texture, seen.spent)
    return regions, residual.mean((1, 2)).sqrt_(), seen.output[..., 2].mean((1, 2))


def frame_values(
    age: Int64[Tensor, " b"],
    trade_off: Float[Tensor, " b"],
    trade_off_range: tuple[float, float],
    budget: Float[Tensor, " b"],
    residual: Float[Tensor, " b"],
    foreground: Float[Tensor, " b"],
) -> Float[Tensor, "b k"]:
    """The features of `FRAME_FEATURES`."""
    low, high = (math.log(v) for v in trade_off_range)
    position = (trade_off.log() - low) / (high - low) if high > low else torch.zeros_like(trade_off)
    return torch.stack([age_feature(age), position, budget, residual, foreground], 1).clamp_(0, 1)


def region_values(
    residual_mean: Float[Tensor, "b gh gw"],
    residual_max: Float[Tensor, "b gh gw"],
    drift_mean: Float[Tensor, "b gh gw"],
    output: Float[Tensor, "b gh gw 3"],
    texture: Float[Tensor, "b gh gw"],
    spent: Float[Tensor, "b gh gw g"],
) -> Float[Tensor, "b gh gw f"]:
    """The features of `region_features`; `output` holds the uncertainty, boundary and foreground of the last output."""
    uncertainty, boundary, foreground = output.unbind(-1)
    seen = [residual_mean, residual_max, drift_mean, around(residual_mean)]
    parts = [*seen, uncertainty, boundary, around(boundary), foreground, texture]
    return torch.cat([torch.stack(parts, -1), spent], -1).clamp_(0, 1)


def pool_over_regions(values: Float[Tensor, "b gh gw f"]) -> Float[Tensor, "b 2 f"]:
    """Mean and maximum of features over the regions."""
    flat = values.flatten(1, 2)
    return torch.stack([flat.mean(1), flat.amax(1)], 1)


def age_feature(age: Num[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """`keyframe_age` of keyframes so many frames old, before it is held to 1; 0 without a keyframe (age -1)."""
    return (1 + age.clamp_min(0)).float().log2() / AGE_OCTAVES


def pool_mean(x: Float[Tensor, "b h w"], grid: tuple[int, int]) -> Float[Tensor, "b gh gw"]:
    """Mean over each region of the grid."""
    (h, w), (gh, gw) = (int(x.shape[1]), int(x.shape[2])), grid
    if h % gh == 0 and w % gw == 0:
        mean: Tensor = x.unflatten(2, (gw, -1)).mean(3).unflatten(1, (gh, -1)).mean(2)
        return mean
    rows, columns = cells_of(h, gh)[1].to(x.device), cells_of(w, gw)[1].to(x.device)
    return (rows / rows.sum(1, keepdim=True)) @ x @ (columns / columns.sum(1, keepdim=True)).T


def pool_max(x: Float[Tensor, "b h w"], grid: tuple[int, int]) -> Float[Tensor, "b gh gw"]:
    """Maximum over each region of the grid (windows that overlap where the grid does not divide the size)."""
    (h, w), (gh, gw) = (int(x.shape[1]), int(x.shape[2])), grid
    if h % gh == 0 and w % gw == 0:
        largest: Tensor = x.unflatten(2, (gw, -1)).amax(3).unflatten(1, (gh, -1)).amax(2)
        return largest
    rows = torch.stack([x[:, start:stop].amax(1) for start, stop in _windows(h, gh)], 1)
    return torch.stack([rows[:, :, start:stop].amax(2) for start, stop in _windows(w, gw)], 2)


def _windows(length: int, cells: int) -> list[tuple[int, int]]:
    """Where each cell begins and ends, its ends rounded outwards to whole positions."""
    return [(i * length // cells, -(-(i + 1) * length // cells)) for i in range(cells)]


def around(x: Float[Tensor, "b gh gw"]) -> Float[Tensor, "b gh gw"]:
    """Mean over each region and its neighbours."""
    return torch.nn.functional.avg_pool2d(x[:, None], 3, 1, 1, count_include_pad=False)[:, 0]


def difference(a: UInt8[Tensor, "b 3 h w"], b: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b h w"]:
    """Largest absolute difference over the channels, in 0..1."""
    # |a - b| in unsigned bytes, without widening: max - min of the pair.
    return (torch.maximum(a, b) - torch.minimum(a, b)).amax(1).float().div_(255.0)


def frame_texture(frame: UInt8[Tensor, "b 3 h w"], grid: tuple[int, int]) -> Float[Tensor, "b gh gw"]:
    """Square root of the mean absolute difference of neighbouring pixels (green stands for luminance)."""
    green = frame[:, 1].float().div_(255.0)
    step = torch.zeros_like(green)
    step[:, :, :-1] += (green[:, :, 1:] - green[:, :, :-1]).abs_()
    step[:, :-1] += (green[:, 1:] - green[:, :-1]).abs_()
    return pool_mean(step.mul_(0.5), grid).clamp_(0, 1).sqrt_()
