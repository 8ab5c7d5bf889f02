"""Steps of the levels: whole numbers of one unit, for bit fields and for every threshold."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from resq_rl.quantization import ResidualTable
from resq_rl.quantization.kernels.plain import quantize
from resq_rl.quantization.quantizers.ranges import symmetric_step
from resq_rl.quantization.quantizers.residual import largest_code, residual_table, threshold_row
from tests.quantization.strategies import seeds

HALF_OCTAVES = [2.0 ** (half / 2) for half in range(-8, 7)]  # of tau: 2^-4, 2^-3.5, ... 2^3
KAPPA = (1.0, 2.0, 8.0)
LEVELS = [(0, 2, 4, 8), (0, 4), (0, 2, 4), (2, 4, 8), (0, 2, 9), (0, 8, 16), (0, 16), (2, 3), (0, 2, 3, 5)]


level_sets = st.sampled_from(LEVELS)
kappas = st.lists(st.floats(0.05, 20.0), min_size=3, max_size=3).map(lambda values: tuple(sorted(values)))
scales = st.integers(-20, 10).map(lambda k: 2.0**k)


def samples(seed: int = 0, scale: float = 1.0) -> Tensor:
    """Residuals of which a few are large, as those of video."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2000, generator=generator) * torch.rand(2000, generator=generator).pow(3) * scale


def table_of(levels: tuple[int, ...], seed: int = 0, scale: float = 1.0) -> ResidualTable:
    values = samples(seed, scale)
    return residual_table(values, float(values.std()), levels, "least_squares", reach=0.0)


def limit_of(bits: int) -> int:
    return int(2 ** (bits - 1)) - 1 if bits else 0


def most_units(bits: int, levels: tuple[int, ...]) -> int:
    """The largest 2^k or 3 * 2^k with which no code exceeds 127, or the highest level's own codes."""
    room = max(127, limit_of(levels[-1])) / limit_of(bits)
    return max(n for k in range(16) for n in (1 << k, 3 << k) if n <= room)


def assert_near(units: float, wanted: float, bits: int, levels: tuple[int, ...]) -> None:
    """Neighbours are 3:2 apart, 2:1 below 2 units; the nearer is at most the root of that off."""
    wanted = min(max(wanted, 1), most_units(bits, levels))
    gap = 1.5 if wanted >= 2 else 2
    assert max(units / wanted, wanted / units) <= math.sqrt(gap) * (1 + 1e-6)


# Steps ---------------------------------------------------------------------------------------------------------------


@given(level_sets, kappas, seeds, scales)
def test_steps_are_few_shifted_units(
    levels: tuple[int, ...], kappa: tuple[float, ...], seed: int, scale: float
) -> None:
    table, kappa = table_of(levels, seed, scale), kappa[: len(levels) - 1]
    for given_kappa, rows in ((None, 1), (kappa, len(HALF_OCTAVES))):
        inverse, limit, unit = table.steps(given_kappa)
        assert inverse.shape == limit.shape == unit.shape == (rows, len(levels))
        for level, bits in enumerate(levels):
            assert (limit[:, level] == limit_of(bits)).all()
            if bits == 0:
                assert (inverse[:, level] <= torch.finfo(torch.float32).tiny).all()  # not 0: the code of infinity is 0
                assert not unit[:, level].any()
                continue
            for units in unit[:, level].tolist():
                odd = int(units) // (int(units) & -int(units))
                assert odd in (1, 3)
                assert units == int(units)
                assert units * limit_of(bits) <= largest_code(levels)
            np.testing.assert_allclose(inverse[:, level] * unit[:, level] * table.step, 1.0, rtol=1e-6)


@given(level_sets, kappas, seeds, scales)
def test_steps_follow_the_threshold(levels: tuple[int, ...], kappa: tuple[float, ...], seed: int, scale: float) -> None:
    table, kappa = table_of(levels, seed, scale), kappa[: len(levels) - 1]
    unit = table.steps(kappa)[2]
    upper = (*kappa, 4 * kappa[-1])  # the highest level's residuals have no upper bound
    for row, tau in enumerate(HALF_OCTAVES):
        for level, bits in enumerate(levels):
            if bits == 0:
                continue
            wanted = upper[level] * tau * table.sigma / (limit_of(bits) + 2) / table.step
            if level == len(levels) - 1:
                wanted = max(wanted, table.units[-1])  # no finer than under a bit field
            assert_near(float(unit[row, level]), wanted, bits, levels)


@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_bit_fields_have_the_steps_that_err_least(levels: tuple[int, ...]) -> None:
    table = table_of(levels)
    for bits, units in zip(levels, table.units, strict=True):
        if bits:
            best = float(symmetric_step(samples()[None], bits, "least_squares"))
            assert_near(units, best / table.step, bits, levels)
    assert table.units[-1] * table.step == pytest.approx(best)


@pytest.mark.parametrize(("bits", "finer"), [(4, 4), (6, 4), (7, 2), (8, 1), (16, 1)])
def test_the_unit_is_a_quarter_of_the_highest_levels_step_if_codes_allow_it(bits: int, finer: int) -> None:
    table = table_of((0, bits))
    assert table.units == (0, finer)
    assert largest_code((0, bits)) == max(127, 2 ** (bits - 1) - 1)
    assert finer * limit_of(bits) <= largest_code((0, bits))


@given(level_sets, kappas, seeds, scales)
def test_steps_grow_with_the_threshold(
    levels: tuple[int, ...], kappa: tuple[float, ...], seed: int, scale: float
) -> None:
    table, kappa = table_of(levels, seed, scale), kappa[: len(levels) - 1]
    unit = table.steps(kappa)[2]
    assert bool((unit.diff(dim=0) >= 0).all())
    assert bool((unit[:, -1] >= table.units[-1]).all())


def test_steps_depend_on_nothing_but_the_table_and_kappa() -> None:
    table = table_of((0, 2, 4, 8))
    before = [[part.clone() for part in table.steps(kappa)] for kappa in (None, KAPPA)]
    other = table.steps((1.0, 4.0, 8.0))
    assert bool((other[2][:, 1:3] > before[1][2][:, 1:3]).any())
    for kappa, parts in zip((None, KAPPA), before, strict=True):
        for same in (table, table_of((0, 2, 4, 8))):
            assert all(torch.equal(a, b) for a, b in zip(same.steps(kappa), parts, strict=True))


def test_a_skip_gate_has_the_steps_of_its_two_levels() -> None:
    # Equal thresholds leave the levels between them no residuals; the highest one follows the common threshold.
    sparse = torch.cat([torch.zeros(9900), samples()[:100]])
    table = residual_table(sparse, 1.0, (0, 2, 4), "least_squares", reach=0.0)
    unit = table.steps((1.0, 1.0))[2]
    for row, tau in enumerate(HALF_OCTAVES):
        assert unit[row, 0] == 0
        assert_near(float(unit[row, 2]), max(4 * tau / 9 / table.step, 4), 4, (0, 2, 4))


@pytest.mark.parametrize("levels", [(0, 2, 4, 8), (0, 4, 8), (0, 16)], ids=str)
def test_codes_reach_what_no_sample_shows(levels: tuple[int, ...]) -> None:
    reach = 40.0 * float(samples().abs().max())
    table = residual_table(samples(), float(samples().std()), levels, "least_squares", reach=reach)
    assert table.step * largest_code(levels) == pytest.approx(reach)
    for kappa in (None, KAPPA[: len(levels) - 1]):
        inverse, limit, _ = (part[:, -1] for part in table.steps(kappa))
        assert bool((limit / inverse >= 0.999 * reach).all())
    wide = residual_table(samples(), float(samples().std()), levels, "least_squares", reach=1e-3)
    assert wide == residual_table(samples(), float(samples().std()), levels, "least_squares", reach=0.0)


# Rows ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tau", "row"),
    [
        *((0.0, 0), (1e-30, 0), (0.0625, 0), (0.074, 0), (0.0745, 1), (0.25, 4), (0.84, 7), (0.85, 8), (1.0, 8)),
        *((1.18, 8), (1.19, 9), (2**0.5, 9), (2.0, 10), (6.7, 13), (6.8, 14), (8.0, 14), (100.0, 14), (math.inf, 14)),
    ],
)
def test_the_row_of_a_threshold(tau: float, row: int) -> None:
    assert threshold_row(torch.tensor([tau])).tolist() == [row]


@given(st.floats(2.0**-4, 2.0**3, width=32))
def test_a_row_is_the_nearest_half_octave_by_ratio(tau: float) -> None:
    row = int(threshold_row(torch.tensor(tau)))
    ratios = [max(tau / centre, centre / tau) for centre in HALF_OCTAVES]
    assert ratios[row] == pytest.approx(min(ratios), rel=1e-6)


# Codes ---------------------------------------------------------------------------------------------------------------


def codes_of(
    table: ResidualTable, residual: Tensor, levels: Tensor, row: Tensor | None = None, kappa: tuple[float, ...] = ()
) -> Tensor:
    """Codes under a bit field, or under thresholds of the rows in `row`."""
    index = levels if row is None else levels + row * len(table.units)
    inverse, limit, unit, _ = table.lookup(None if row is None else kappa)[:, index]
    return quantize(residual, inverse, limit, unit)


def test_codes_by_hand() -> None:
    table = ResidualTable(1.0, 0.25, (0, 1, 7), (0, 6, 4))
    residual = torch.tensor([0.9, -0.9, 0.4, 9.0])
    codes = [codes_of(table, residual, torch.full((4,), level)).tolist() for level in range(3)]
    assert codes == [[0, 0, 0, 0], [6, -6, 0, 6], [4, -4, 0, 28]]  # steps of 1.5 and 1
    # At tau 1 with kappa 1 and 2, the steps are 2 / 3 and 8 / 9: nearest are 3 and, no finer than for bits, 4 units.
    # At tau 4 they are 8 / 3 and 32 / 9: nearest are 12 units (3) and 16 (4).
    for tau, wanted in ((1.0, [[3, -3, 3, 3], [4, -4, 0, 28]]), (4.0, [[0, 0, 0, 12], [0, 0, 0, 32]])):
        rows = threshold_row(torch.full((4,), tau))
        found = [codes_of(table, residual, torch.full((4,), level), rows, (1.0, 2.0)).tolist() for level in (1, 2)]
        assert found == wanted


def test_every_pixel_has_codes_of_its_own_level_and_row() -> None:
    table = table_of((0, 2, 4, 8))
    generator = torch.Generator().manual_seed(1)
    residual = torch.randn(2, 3, 4, 5, generator=generator)
    levels = torch.randint(0, 4, (2, 1, 4, 5), generator=generator)
    rows = torch.randint(0, len(HALF_OCTAVES), (2, 1, 4, 5), generator=generator)
    found = codes_of(table, residual, levels, rows, KAPPA)
    for clip, y, x in product(range(2), range(4), range(5)):
        level, row = levels[clip, :, y, x], rows[clip, :, y, x]
        assert torch.equal(found[clip, :, y, x], codes_of(table, residual[clip, :, y, x], level, row, KAPPA))


@given(level_sets, kappas, seeds, st.sampled_from([0.0, 1e-30, 1.0, 1e3, 1e30]))
def test_codes_are_whole_and_no_larger_than_promised(
    levels: tuple[int, ...], kappa: tuple[float, ...], seed: int, size: float
) -> None:
    table, kappa = table_of(levels, seed), kappa[: len(levels) - 1]
    wild = samples(1)[:200] * size * table.sigma
    for level in range(len(levels)):
        index = torch.full((200,), level)
        for row in (None, *range(len(HALF_OCTAVES))):
            rows = None if row is None else torch.full((200,), row)
            codes = codes_of(table, wild, index, rows, () if row is None else kappa)
            assert torch.equal(codes, codes.round())
            assert float(codes.abs().max()) <= largest_code(levels)


@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_residuals_that_are_all_zero_give_finite_steps(levels: tuple[int, ...]) -> None:
    table = residual_table(torch.zeros(50), 0.0, levels, "least_squares", reach=0.0)
    for kappa in (None, KAPPA[: len(levels) - 1]):
        assert all(bool(part.isfinite().all()) for part in table.steps(kappa))
    zeros = torch.zeros(3)
    assert not codes_of(table, zeros, torch.full((3,), len(levels) - 1)).any()
