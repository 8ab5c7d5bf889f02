"""Progress of long computations: bars on a terminal, lines of the log elsewhere."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["Advance", "say_lines", "stage"]

log = logging.getLogger(__name__)

Advance = Callable[[int], None]

SPOKEN_SECONDS = 60.0  # between two lines about one stage, where there is no terminal

_lines_only = False


def say_lines() -> None:
    """Draw no bars in this process even if it has a terminal, because other processes write to it too."""
    global _lines_only
    _lines_only = True


@contextmanager
def stage(title: str, total: int | None) -> Iterator[Advance]:
    """Show the progress of a part of a job; yields a function that takes the amount of work just done.

    A terminal shows a bar, with the remaining time if the total is known. Elsewhere there is a line at the start, one
    every minute and one at the end.
    """
    started = time.monotonic()
    if _lines_only or not sys.stderr.isatty():
        log.info("%s ...", title)
        yield _spoken(title, total, started)
        log.info("%s: %.0f s", title, time.monotonic() - started)
        return
    columns = (TextColumn("{task.description:32}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        whole = None if total is None else max(1, total)
        task = progress.add_task(title, total=whole)
        yield lambda amount: progress.advance(task, amount)
        progress.update(task, completed=whole)


def _spoken(title: str, total: int | None, started: float) -> Advance:
    """Return a function that logs a line at most every `SPOKEN_SECONDS`."""
    done, said = 0, started

    def advance(amount: int) -> None:
        nonlocal done, said
        done, now = done + amount, time.monotonic()
        if now - said < SPOKEN_SECONDS:
            return
        said = now
        if total is None:
            log.info("%s: %d", title, done)
        elif 0 < done < total:
            left = (now - started) * (total - done) / done
            log.info("%s: %d%%, about %s left", title, 100 * done // total, _duration(left))

    return advance


def _duration(seconds: float) -> str:
    """A rounded duration in seconds or minutes."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
