import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resq_rl.errors import PolicyError
from resq_rl.quantization import LevelField, ThresholdField
from resq_rl.quantization.specification.fields import carry, cells_of
from tests.quantization.reference import cells, spread
from tests.quantization.strategies import grids, seeds, sizes


@given(st.integers(1, 60), st.integers(1, 60))
def test_cells_and_positions_meet_as_defined(length: int, count: int) -> None:
    cover, share = cells_of(length, count)
    members = cells(length, count)
    assert cover.shape[0] == length
    assert [sorted(set(row)) for row in cover.tolist()] == members
    assert share.shape == (count, length)
    np.testing.assert_allclose(share.sum(0).numpy(), 1.0, rtol=1e-6)
    for p, own in enumerate(members):
        assert torch.nonzero(share[:, p])[:, 0].tolist() == own
    assert sorted({c for own in members for c in own}) == list(range(count))  # no cell is left out


@given(sizes, grids, seeds)
def test_a_grid_is_carried_position_by_position(size: tuple[int, int], grid: tuple[int, int], seed: int) -> None:
    values = torch.rand(2, 3, *grid, generator=torch.Generator().manual_seed(seed))
    for finest, pick in (("max", max), ("min", min)):
        carried = carry(values, size, finest)
        assert carried.is_contiguous()
        for row in range(3):
            assert torch.equal(carried[row], torch.from_numpy(spread(values[:, row].numpy(), size, pick)))


@given(sizes, grids)
def test_a_constant_grid_stays_constant(size: tuple[int, int], grid: tuple[int, int]) -> None:
    levels = torch.full((1, 1, *grid), 3)
    assert torch.equal(carry(levels, size, "max"), torch.full((1, 1, *size), 3))


def test_rows_and_constants() -> None:
    levels = LevelField.constant(2, 3, 4, (5, 6))
    assert levels.levels.shape == (3, 4, 5, 6)
    assert levels.grid == (5, 6)
    assert bool((levels.levels == 2).all())
    assert levels.rows(torch.tensor([2, 0])).levels.shape == (2, 4, 5, 6)
    tau = ThresholdField.constant(0.5, 3, 4, (5, 6), (1.0, 3.0))
    assert tau.grid == (5, 6)
    assert bool((tau.thresholds == 0.5).all())
    assert tau.rows(torch.tensor([1])).kappa == (1.0, 3.0)


@pytest.mark.parametrize("kappa", [(2.0, 1.0), (0.0, 1.0), (-1.0,), (float("nan"), 1.0)])
def test_impossible_kappa(kappa: tuple[float, ...]) -> None:
    with pytest.raises(PolicyError, match="positive and ascending"):
        ThresholdField.constant(1.0, 1, 1, kappa=kappa)
