"""Fixtures of the experiment tests."""

import logging
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _restored_process_state() -> Iterator[None]:
    """Put back what a command changes in its process: log handlers and levels, and the number of threads."""
    root, threads = logging.getLogger(), torch.get_num_threads()
    package = logging.getLogger("resq_rl")
    handlers, levels = root.handlers[:], (root.level, package.level)
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    package.setLevel(levels[1])
    torch.set_num_threads(threads)
