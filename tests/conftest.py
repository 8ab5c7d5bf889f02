"""Settings and fixtures of all tests."""

import gc
import os
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import hypothesis
import jaxtyping
import numpy as np
import pytest
import torch

from tests import typechecks

# Shapes and types are checked at run time, under pytest only. Must come before the first import of resq_rl.
typechecks.hook("resq_rl")

import resq_rl.envs  # noqa: E402
from resq_rl.envs import Problem, default_problem, environments  # noqa: E402
from tests.envs.problems import make_pose_problem, make_problem, make_recurrent_problem  # noqa: E402

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # tests talk to nothing outside this machine

hypothesis.settings.register_profile("default", deadline=None, print_blob=True, max_examples=40)
hypothesis.settings.register_profile("ci", deadline=None, print_blob=True, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")

# Most frames are so small here that a second thread only makes them slower, tenfold on a busy machine.
torch.set_num_threads(int(os.environ.get("RESQ_RL_TEST_THREADS", "1")))

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _fixed_global_seeds() -> None:
    """Start every test from the same global random states (networks draw their first weights from them)."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries under test still use it
    torch.manual_seed(0)
    typechecks.begin_test()


def pytest_collection_finish() -> None:
    """Leave what is imported to itself: the garbage collector would search these million objects again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(scope="session", autouse=True)
def _small_default() -> Iterator[None]:
    """The embedded default is calibrated on a fifth of its frames, where tests and pages make environments of it."""
    small = partial(default_problem, clips=2, frames=6)
    with pytest.MonkeyPatch.context() as patch:
        for module in (environments, resq_rl.envs):
            patch.setattr(module, "default_problem", small)
        yield


@pytest.fixture
def unchecked_types() -> Iterator[None]:
    """Switch off the run-time type checks.

    For tests of what a user sees who passes a wrong type or shape, and for those that run what others run with checks,
    but so often that the checks would take most of the time.
    """
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real videos and networks: RESQ_RL_SHARED, or `shared` beside the checkout."""
    folder = Path(os.environ.get("RESQ_RL_SHARED", ROOT.parent / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"no real data: {folder} has no folder data (set RESQ_RL_SHARED to where it is)")
    return folder


@pytest.fixture(scope="session")
def problem() -> Problem:
    """A tiny network and clips of 5, 7, 5 and 6 frames with labels."""
    return make_problem()


@pytest.fixture(scope="session")
def uneven_problem() -> Problem:
    """Frames of a size that the grid does not divide."""
    return make_problem((4, 6), size=(30, 46), grid=(4, 5))


@pytest.fixture(scope="session")
def recurrent_problem() -> Problem:
    """A network that is given its own last mask, and clips of 5, 7 and 6 frames."""
    return make_recurrent_problem()


@pytest.fixture(scope="session")
def pose_problem() -> Problem:
    """A network of points, and labelled clips of 4 frames."""
    return make_pose_problem()
