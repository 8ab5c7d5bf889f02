"""Decisions of one frame, and how a grid of regions is carried to a layer's own resolution."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Int64, Num
from torch import Tensor

from resq_rl.errors import PolicyError

__all__ = ["DEFAULT_KAPPA", "Field", "LevelField", "ThresholdField", "cells_of"]

DEFAULT_KAPPA = (1.0, 2.0, 8.0)


@dataclass(frozen=True)
class LevelField:
    """The level (an index into the bit-widths) of every layer group, or layer, and region: (clips, g, rows, cols)."""

    levels: Int64[Tensor, "b g gh gw"]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of regions."""
        return self.levels.shape[2], self.levels.shape[3]

    def rows(self, index: Int64[Tensor, " n"]) -> "LevelField":
        """The decisions of the clips in `index`."""
        return LevelField(self.levels[index])

    @staticmethod
    def constant(level: int, clips: int, groups: int, grid: tuple[int, int] = (1, 1)) -> "LevelField":
        """The same level everywhere."""
        return LevelField(torch.full((clips, groups, *grid), level, dtype=torch.int64))


@dataclass(frozen=True)
class ThresholdField:
    """The threshold tau of every layer group, or layer, and region, from which levels follow pixel by pixel.

    Pixel p of a layer takes level #{j : m(p) > tau * kappa_j} with m(p) = max over channels |r(c, p)| / sigma, where r
    is the layer's residual and sigma its calibrated standard deviation (Dynamic ResQ, arXiv 2308.09511). A constant
    field is exactly the heuristic with one tau. An infinite tau gives the lowest level, which skips if it has 0 bits.
    """

    thresholds: Float[Tensor, "b g gh gw"]
    kappa: Sequence[float] = DEFAULT_KAPPA

    def __post_init__(self) -> None:
        if list(self.kappa) != sorted(self.kappa) or not all(k > 0 for k in self.kappa):
            raise PolicyError(f"kappa must be positive and ascending, got {list(self.kappa)}.")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of regions."""
        return self.thresholds.shape[2], self.thresholds.shape[3]

    def rows(self, index: Int64[Tensor, " n"]) -> "ThresholdField":
        """The decisions of the clips in `index`."""
        return ThresholdField(self.thresholds[index], self.kappa)

    @staticmethod
    def constant(
        tau: float,
        clips: int,
        groups: int,
        grid: tuple[int, int] = (1, 1),
        kappa: Sequence[float] = DEFAULT_KAPPA,
    ) -> "ThresholdField":
        """The same threshold everywhere: the heuristic."""
        return ThresholdField(torch.full((clips, groups, *grid), tau), kappa)


Field = LevelField | ThresholdField


@lru_cache(maxsize=512)
def cells_of(length: int, cells: int) -> tuple[Tensor, Tensor]:
    """How `cells` grid cells along one axis meet `length` positions of a layer along that axis.

    A position belongs to the cell under its centre. Where the layer is coarser than the grid, a position covers several
    cells: those whose centres lie in it.

    Returns:
        cover: (length, k) indices of the cells of each position, padded by repetition; k = 1 unless the layer is
            coarser.
        share: (cells, length) share of each position's cost that each cell bears; columns sum to 1.
    """
    if length >= cells:
        cell = ((torch.arange(length) + 0.5) * cells / length).long().clamp_max(cells - 1)
        cover = cell[:, None]
    else:
        position = ((torch.arange(cells) + 0.5) * length / cells).long().clamp_max(length - 1)
        members = [torch.nonzero(position == p)[:, 0] for p in range(length)]
        widest = max(len(m) for m in members)
        cover = torch.stack([torch.cat([m, m[-1:].expand(widest - len(m))]) for m in members])
    share = torch.zeros(cells, length)
    for p in range(length):
        own = cover[p].unique()
        share[own, p] = 1.0 / len(own)
    return cover, share


def carry(values: Num[Tensor, "b n gh gw"], size: tuple[int, int], finest: str) -> Num[Tensor, "n b h w"]:
    """Grids of decisions at a layer's resolution; where a position covers several cells it takes the finest of them.

    `finest` is "max" for levels (more bits) and "min" for thresholds.
    """
    carried = values.transpose(0, 1)
    for axis in (3, 2):  # first along rows, so that then whole rows are copied
        cover = _covered(size[axis - 2], values.shape[axis], values.device)
        carried = carried.index_select(axis, cover.flatten()).unflatten(axis, cover.shape)
        if cover.shape[1] == 1:  # over which amin is slow
            carried = carried.squeeze(axis + 1)
        else:
            carried = carried.amax(axis + 1) if finest == "max" else carried.amin(axis + 1)
    return carried


@lru_cache(maxsize=512)
def _covered(length: int, cells: int, device: torch.device) -> Int64[Tensor, "length k"]:
    """By position of a layer along an axis, the grid cells that it covers, padded by repetition."""
    return cells_of(length, cells)[0].to(device)
