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
def stage(title: str, total: int | None) -> Iterator[Advance]:
    """A part of a job; yields a function that is told of work done.

    On a terminal it is a bar with the remaining time, if the amount of work is known; elsewhere one line at the start
    and one at the end.
    """
    started = time.monotonic()
    if not sys.stderr.isatty():
        log.info("%s ...", title)
        yield lambda _: None
        log.info("%s: %.0f s", title, time.monotonic() - started)
        return
    columns = (TextColumn("{task.description:32}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        whole = None if total is None else max(1, total)
        task = progress.add_task(title, total=whole)
        yield lambda amount: progress.advance(task, amount)
        progress.update(task, completed=whole)
