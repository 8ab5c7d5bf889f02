"""Worlds that the tests of the environments share."""

from collections.abc import Iterator

import pytest
import torch

from tests.envs.worlds import World, make_world


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """Frames are so small here that a second thread only makes them slower, tenfold on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def world() -> World:
    """Clips of 5, 7, 5 and 6 frames with labels."""
    return make_world()


@pytest.fixture(scope="session")
def uneven_world() -> World:
    """Frames of a size that the grid does not divide."""
    return make_world((4, 6), size=(30, 46), grid=(4, 5))
