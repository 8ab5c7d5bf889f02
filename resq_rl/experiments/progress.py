"""Progress bars on the terminal, and plain lines where there is none."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["Advance", "stage"]

log = logging.getLogger(__name__)

Advance = Callable[[int], None]


@contextmanager
def stage(title: str, total: int) -> Iterator[Advance]:
    """A part of a job with a known amount of work; yields a function that is told of work done.

    On a terminal it is a bar with the remaining time; elsewhere one line at the start and one at the end.
    """
    started = time.monotonic()
    if not sys.stderr.isatty():
        log.info("%s ...", title)
        yield lambda _: None
        log.info("%s: %.0f s", title, time.monotonic() - started)
        return
    columns = (TextColumn("{task.description:32}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=max(1, total))
        yield lambda amount: progress.advance(task, amount)
        progress.update(task, completed=max(1, total))
