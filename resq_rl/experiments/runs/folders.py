"""Folders of runs and sweeps: one process at a time writes to each."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from filelock import FileLock, Timeout

from resq_rl.errors import ResultsError

__all__ = ["LOCK", "claimed", "new_folder"]

LOCK: Final = ".lock"  # held by the process that writes to the folder; the system releases it when the process ends


@contextmanager
def claimed(folder: Path, patience: float) -> Iterator[None]:
    """Keep other processes out of a folder, which is made if it is missing.

    Args:
        folder: of a run or sweep.
        patience: seconds to wait for another process to leave it.

    Raises:
        ResultsError: another process writes to the folder.
        OSError: the folder cannot be made or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=patience)
    except Timeout as error:
        raise ResultsError(
            f"Another process is writing to {folder}. Wait until it has ended, or choose another folder."
        ) from error
    try:
        yield
    finally:
        lock.release()


def new_folder(folder: Path) -> Path:
    """Make a folder that no other run has: of the given name, or with the first free number after it.

    Raises:
        OSError: it cannot be made.
    """
    candidate, number = folder, 1
    while True:
        try:
            candidate.mkdir(parents=True)
            return candidate
        except FileExistsError:
            number += 1
            candidate = folder.with_name(f"{folder.name}-{number}")
