"""`resq-rl sync FOLDER [URI]`: send what runs have recorded to a tracking store that lacks it, or to another one."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from resq_rl.checked import convert_dataclass
from resq_rl.errors import TrackingError
from resq_rl.experiments.config.settings import TrackingSettings
from resq_rl.experiments.tracking.outbox import JOURNAL, Outbox, read_journal
from resq_rl.experiments.tracking.tracker import OFFLINE, open_outbox

__all__ = ["run", "sync"]

# Of a run and of a sweep, which hold where they were to be recorded.
CONFIGS = ("config.yaml", "multirun.yaml")


def run(arguments: Sequence[str]) -> None:
    """What the command does with its arguments.

    Raises:
        TrackingError: they are not a folder and at most an address; or as `sync` does.
    """
    if not 1 <= len(arguments) <= 2 or arguments[0].startswith("-"):
        raise TrackingError("Write resq-rl sync FOLDER, or resq-rl sync FOLDER URI for another tracking store.")
    sent = sync(Path(arguments[0]), arguments[1] if len(arguments) > 1 else None)
    for journal, where in sent:
        print(f"{journal.parent}: sent to {where}")
    for where in dict.fromkeys(where for _, where in sent):
        print(f"Next: open {where}" if where.startswith("http") else f"Next: mlflow ui --backend-store-uri {where}")


def sync(folder: Path, uri: str | None = None) -> list[tuple[Path, str]]:
    """Send the journals in and below a folder, sweeps before their jobs; what a store has already stays as it is.

    Args:
        uri: the store; None for that of each run's settings, or of its results folder where those say "offline".

    Returns:
        The journals and where each was sent.

    Raises:
        TrackingError: there is none, a store cannot be used or stops answering, or a journal is damaged.
    """
    journals = sorted(folder.rglob(JOURNAL), key=lambda path: (len(path.parts), path))
    if not journals:
        raise TrackingError(f"There is no {JOURNAL} in {folder} or below: give the folder of a run, or of several.")
    sent = []
    for journal in journals:
        outbox = _outbox(journal.parent, uri)
        outbox.replay(read_journal(journal))
        if not outbox.finish():
            raise TrackingError(
                f"{outbox.where} stopped answering with {outbox.pending} records of {journal} left: run it again."
            )
        sent.append((journal, outbox.where))
    return sent


def _outbox(folder: Path, uri: str | None) -> Outbox:
    found = next((folder / name for name in CONFIGS if (folder / name).is_file()), None)
    if found is None:
        raise TrackingError(f"There is none of {', '.join(CONFIGS)} in {folder}, which say where it was recorded.")
    try:
        config = OmegaConf.load(found)
        settings = convert_dataclass(
            OmegaConf.to_container(config.tracking, resolve=True), TrackingSettings, "tracking."
        )
        results = Path(config.results).absolute()
    except (OmegaConfBaseException, OSError, TypeError, ValueError) as error:
        raise TrackingError(f"Cannot read {found} ({type(error).__name__}: {error}).") from error
    if uri is not None or settings.uri == OFFLINE:
        settings = replace(settings, uri=uri)
    return open_outbox(settings, results=results, folder=folder)
