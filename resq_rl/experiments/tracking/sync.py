"""`resq-rl sync FOLDER [URI]`: send the records of runs to a tracking store that lacks them, or to another one."""

from collections.abc import Sequence
from pathlib import Path

from resq_rl.errors import TrackingError
from resq_rl.experiments.tracking.outbox import JOURNAL, Outbox, read_journal
from resq_rl.experiments.tracking.store import open_store, store_uri

__all__ = ["run", "sync"]


def run(arguments: Sequence[str]) -> None:
    """Run the command.

    Raises:
        TrackingError: the arguments are not a folder and at most an address; or as `sync` does.
    """
    if not 1 <= len(arguments) <= 2 or arguments[0].startswith("-"):
        raise TrackingError("Write resq-rl sync FOLDER, or resq-rl sync FOLDER URI for another tracking store.")
    hints: dict[str, None] = {}
    for journal, uri, hint in sync(Path(arguments[0]), arguments[1] if len(arguments) > 1 else None):
        print(f"{journal.parent}: sent to {uri}")
        hints[hint] = None
    for hint in hints:
        print(f"Next: {hint}")


def sync(folder: Path, uri: str | None = None) -> list[tuple[Path, str, str]]:
    """Send the journals in and below a folder, sweeps before their jobs; what a store has already stays as it is.

    Args:
        folder: of a run, a sweep or several.
        uri: the store; None for that of each run's settings, or of its results folder if those are `tracking=offline`.

    Returns:
        The journals, the address to which each was sent, and how to look at it there.

    Raises:
        TrackingError: there is none, a store cannot be used or stops answering, or a journal is damaged.
    """
    journals = sorted(folder.rglob(JOURNAL), key=lambda path: (len(path.parts), path))
    if not journals:
        raise TrackingError(f"There is no {JOURNAL} in {folder} or below: give the folder of a run, or of several.")
    sent = []
    for journal in journals:
        operations = read_journal(journal)
        stores = [operation.payload for operation in operations if operation.kind == "store"]
        if not stores:
            raise TrackingError(f"The journal {journal} does not begin with the store that its run was recorded for.")
        address = stores[-1]["uri"] if uri is None else store_uri(uri, journal.parent)
        outbox = Outbox(open_store(address, stores[-1]["experiment"]), journal.parent)
        if not outbox.replay(operations):
            raise TrackingError(
                f"{address} stopped answering with {outbox.pending} records of {journal} left: try again."
            )
        sent.append((journal, address, outbox.store.hint))
    return sent
