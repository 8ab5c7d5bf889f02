"""Residual quantizers: one symmetric step per level, all of them multiples of one unit."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from resq_rl.quantization.quantizers.quantizer import symmetric_limit
from resq_rl.quantization.quantizers.ranges import symmetric_step
from resq_rl.quantization.specification.config import RangeEstimator

__all__ = ["ResidualTable", "largest_code", "residual_table", "threshold_row"]

# Codes of coarse levels are multiples of a fine unit; this keeps all codes within bytes.
LARGEST_CODE = 127
# Units in the finest level's step, as far as LARGEST_CODE allows.
FINER = 4
# Steps of threshold fields are made for every half octave of tau from 2^-4 to 2^3.
LOWEST_OCTAVE, HIGHEST_OCTAVE = -4, 3
# The finest level has no upper bound; its range is to hold residuals of so many times its lower bound.
OPEN_END = 4.0


@dataclass(frozen=True)
class ResidualTable:
    """The residual quantizers of one operator call: symmetric, one step per level.

    The step of a level is a whole number of units, and that number is 2^k or 3 * 2^k: the codes of all levels are
    integers in the same unit, which int8 holds up to 8 bits, and one int32 accumulator serves pixels of mixed levels.
    Hardware needs a shift and at most one addition, no rescaling.

    Under a bit field, a level has the step that calibration found best for all residuals. Under a threshold field, a
    level gets the pixels whose largest magnitude lies in (tau kappa_l sigma, tau kappa_(l+1) sigma], so its step
    follows tau: kappa_(l+1) tau sigma / (n + 2), n the largest code. That clips the largest residuals of the level (at
    2 bits to a third of the bound) and resolves the many small ones beside them better; the closed loop makes up for
    what is clipped. The highest level has no bound: 4 times its lower one stands for it, and its step is at least that
    of bit fields, so that it holds any change within the range of keyframes. No code exceeds `largest_code`.

    Attributes:
        sigma: standard deviation of the residual, by which magnitudes are normalised.
        step: the unit of the codes.
        limits: largest code magnitude by level, before it is multiplied by the level's units.
        units: step of each level of bit fields, in units; 0 where the level has 0 bits.
    """

    sigma: float
    step: float
    limits: tuple[int, ...]
    units: tuple[int, ...]

    def lookup(
        self,
        kappa: tuple[float, ...] | None = None,
        costs: tuple[float, ...] = (),
        device: torch.device | str = "cpu",
    ) -> Float[Tensor, "4 n"]:
        """1 / step, largest code, units and cost of level l under `threshold_row` r at index r * levels + l.

        Args:
            kappa: multipliers of tau, for a threshold field; None for a bit field, which has one row.
            costs: a cost for each level; 0 if not given.
        """
        return _lookup(self, kappa, costs, torch.device(device))

    def steps(
        self, kappa: tuple[float, ...] | None = None, device: torch.device | str = "cpu"
    ) -> tuple[Float[Tensor, "rows levels"], Float[Tensor, "rows levels"], Float[Tensor, "rows levels"]]:
        """1 / step, largest code and units by `threshold_row` and level; of a single row without `kappa`, for bits."""
        return _steps(self, kappa, torch.device(device))


def threshold_row(tau: Float[Tensor, "*shape"]) -> Int64[Tensor, "*shape"]:
    """Row of `ResidualTable.steps` for threshold tau: its nearest half octave."""
    octave = torch.log2(tau.clamp(2.0**LOWEST_OCTAVE, 2.0**HIGHEST_OCTAVE))
    return torch.round(2 * octave).long() - 2 * LOWEST_OCTAVE


@lru_cache(maxsize=4096)
def _steps(
    table: ResidualTable, kappa: tuple[float, ...] | None, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    rows = [table.units] if kappa is None else [_units(table, tau, kappa) for tau in _half_octaves()]
    unit = torch.tensor(rows, dtype=torch.float32, device="cpu")
    limit = torch.tensor(table.limits, dtype=torch.float32, device="cpu").expand(len(rows), -1).contiguous()
    inverse = torch.where(unit > 0, 1.0 / (table.step * unit), 0.0)
    return inverse.to(device), limit.to(device), unit.to(device)


@lru_cache(maxsize=4096)
def _lookup(
    table: ResidualTable, kappa: tuple[float, ...] | None, costs: tuple[float, ...], device: torch.device
) -> Tensor:
    parts = _steps(table, kappa, torch.device("cpu"))
    cost = torch.tensor(costs or (0.0,) * len(table.units), dtype=torch.float32, device="cpu").expand_as(parts[0])
    return torch.stack([part.flatten() for part in (*parts, cost.contiguous())]).to(device)


def _half_octaves() -> list[float]:
    return [2.0 ** (half / 2) for half in range(2 * LOWEST_OCTAVE, 2 * HIGHEST_OCTAVE + 1)]


def _units(table: ResidualTable, tau: float, kappa: Sequence[float]) -> tuple[int, ...]:
    """Units in the step of each level for threshold tau."""
    upper = (*kappa, OPEN_END * kappa[-1])
    steps = [u * tau * table.sigma / (n + 2) / table.step for u, n in zip(upper, table.limits, strict=True)]
    steps[-1] = max(steps[-1], table.units[-1])
    most = max(LARGEST_CODE, table.limits[-1])
    return tuple(_whole(s, n, most) for s, n in zip(steps, table.limits, strict=True))


def _whole(units: float, limit: int, most: int) -> int:
    """The number 2^k or 3 * 2^k nearest to `units` by ratio with which codes up to `limit` stay within `most`.

    0 for limit 0.
    """
    if limit == 0:
        return 0
    powers = [2**k for k in range(most.bit_length())]
    allowed = [n for n in (*powers, *(3 * p for p in powers)) if n * limit <= most]
    nearest: int = min(allowed, key=lambda n: abs(math.log(n / max(units, 1.0))))
    return nearest


def largest_code(level_bits: Sequence[int]) -> int:
    """Largest magnitude that a residual code can take, in units of `ResidualTable.step`."""
    return max(LARGEST_CODE, symmetric_limit(level_bits[-1]))


def residual_table(
    samples: Float[Tensor, " n"], sigma: float, level_bits: Sequence[int], estimator: RangeEstimator, reach: float
) -> ResidualTable:
    """A table for residuals of which `samples` were drawn.

    Args:
        samples: values of the residual.
        sigma: their standard deviation over all of calibration.
        level_bits: bit-widths of the levels, ascending.
        estimator: how the steps of bit fields are chosen.
        reach: the largest change of an input, which codes must hold however small the samples are: calibration clips
            may show little motion.
    """
    limits = [symmetric_limit(bits) for bits in level_bits]
    steps = [float(symmetric_step(samples[None], b, estimator)) if b else 0.0 for b in level_bits]
    finer = max(n for n in (1, 2, FINER) if n == 1 or n * limits[-1] <= LARGEST_CODE)
    unit = max(steps[-1] / finer, reach / largest_code(level_bits))
    units = [_whole(s / unit, n, largest_code(level_bits)) for s, n in zip(steps, limits, strict=True)]
    return ResidualTable(max(sigma, 1e-8), unit, tuple(limits), tuple(units))
