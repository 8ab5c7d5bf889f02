"""Worlds that the tests of the environments share."""

import pytest

from tests.envs.worlds import World, make_world


@pytest.fixture(scope="session")
def world() -> World:
    """Clips of 5, 7, 5 and 6 frames with labels."""
    return make_world()


@pytest.fixture(scope="session")
def uneven_world() -> World:
    """Frames of a size that the grid does not divide."""
    return make_world((4, 6), size=(30, 46), grid=(4, 5))
