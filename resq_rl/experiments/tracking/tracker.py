"""Recording of runs in MLflow: a local store by default, or a server.

A store that cannot be used when the command starts is an error. From then on a store never stops a run: what it does
not take is kept in the run's folder and sent when it answers again.
"""

import logging
import math
import re
import shlex
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from resq_rl import __version__
from resq_rl.experiments.config.settings import TrackingSettings
from resq_rl.experiments.tracking.outbox import (
    LOCAL,
    METRICS_PER_BATCH,
    Operation,
    OperationKind,
    Outbox,
    now,
    recorded_run,
)
from resq_rl.experiments.tracking.store import OFFLINE, Store, open_store, quiet_mlflow, store_uri

if TYPE_CHECKING:
    from matplotlib.figure import Figure
else:  # slow to import; a name that annotations can be checked against
    Figure = Any

__all__ = ["NullTracker", "Status", "Tracker", "command_tags", "open_tracker", "quiet_mlflow", "run_name"]

Status = Literal["FINISHED", "FAILED", "KILLED"]

FLUSH_SECONDS = 2.0
LONGEST_PARAMETER = 6000  # characters, MLflow's limits
LONGEST_NAME = 250
LONGEST_TAG = 5000
LONGEST_RUN_NAME = 120  # beyond it, MLflow's pages are hard to read
# Settings of where and how a run is computed, which do not tell what it computes.
INCIDENTAL = ("results=", "tables=", "threads=", "tracking", "hydra", "training.resume=")
PARENTS = re.compile(r"[^\s=,\[\]]*/(?=[^\s/,\[\]]+/[^\s/,\[\]]+)")  # all folders of a path but the last
FORBIDDEN = re.compile(r"[^\w\-. :/]")

log = logging.getLogger(__name__)


def run_name(command: str, overrides: Sequence[str], folder: Path) -> str:
    """A run's name: its command and its telling overrides, or its folder's name where there are none."""
    telling = [PARENTS.sub("", word) for word in overrides if not word.startswith(INCIDENTAL)]
    return _cut(" ".join([command, *(telling or [folder.name])]).strip(), LONGEST_RUN_NAME)


def command_tags(command: str, arguments: Sequence[str], folder: Path) -> dict[str, Any]:
    """Tags with the command, arguments and folder of a run. MLflow shows its own tag of a source as a path only."""
    source = {"mlflow.source.name": f"resq-rl {command}", "mlflow.source.type": "LOCAL"}
    return {**source, "command": command, "arguments": shlex.join(arguments), "folder": folder, "resq_rl": __version__}


class Tracker:
    """Records parameters, metrics and files of one run. Use it in a `with` statement, or `close` it.

    Made by `open_tracker` and `child`. No method raises because a store fails: `open_tracker` has checked it.

    Attributes:
        hint: how to look at what was recorded, or an empty string.
    """

    def __init__(
        self,
        outbox: Outbox | None,
        folder: Path,
        *,
        run: str = "",
        name: str = "",
        tags: Mapping[str, Any] | None = None,
        parent: str | None = None,
    ) -> None:
        self.hint = "" if outbox is None else outbox.store.hint
        self._outbox = outbox
        self._folder = folder
        self._run = run
        self._closed = False
        self._sent_at = time.monotonic()
        self._waiting = 0
        if outbox is not None and run not in outbox.runs:
            self._add("start", {"parent": parent, "name": name, "tags": _as_tags(tags or {}), "time": now()})
        self.flush()

    @property
    def run_id(self) -> str | None:
        """The store's id of this run, a local name while the store does not know it, or None without tracking."""
        return None if self._outbox is None else self._outbox.run_id(self._run)

    def child(self, name: str, tags: Mapping[str, Any] | None = None) -> "Tracker":
        """Start a run nested in this one, with figures in a folder of its own. Siblings need different names."""
        label = re.sub(r"[^\w\-.]+", "_", name)
        run = f"{self._run}/{label}"
        return Tracker(self._outbox, self._folder / label, run=run, name=name, tags=tags, parent=self._run)

    def log_parameters(self, parameters: Mapping[str, Any]) -> None:
        """Record settings, nested ones by dotted names. Values longer than MLflow takes are cut.

        MLflow keeps the first value of a parameter; one that a resumed run changes is recorded as a tag.
        """
        values = {_entity_name(name): _cut(_as_text(value), LONGEST_PARAMETER) for name, value in _flatten(parameters)}
        self._add("parameters", {"values": values})
        self.flush()

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Record numbers at a step, such as the environment frames so far.

        They are sent in batches: when a thousand wait, after two seconds, or with `flush`.
        """
        stamp = now()
        values = [(_entity_name(name), float(value), stamp, int(step)) for name, value in metrics.items()]
        for start in range(0, len(values), METRICS_PER_BATCH):
            self._add("metrics", {"values": values[start : start + METRICS_PER_BATCH]})
        self._waiting += len(values)
        if self._waiting >= METRICS_PER_BATCH or time.monotonic() - self._sent_at > FLUSH_SECONDS:
            self.flush()

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Record or change tags."""
        self._add("tags", {"values": _as_tags(tags)})
        self.flush()

    def describe(self, text: str) -> None:
        """Set the description that the run's page shows."""
        self.set_tags({"mlflow.note.content": text})

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Attach a copy of a file, under `folder` among the run's artifacts. The file must stay until `close`."""
        self._add("artifact", {"path": self._path(path), "folder": folder})
        self.flush()

    def log_model(self, folder: Path, name: str | None) -> None:
        """Attach the folder of a saved MLflow model and register it under a name, if one is given."""
        self._add("model", {"path": self._path(folder), "name": name})
        self.flush()

    def log_figure(self, figure: Figure, name: str) -> list[Path]:
        """Write a figure as `name`.png and `name`.svg to the run's folder, attach both, and return their paths.

        Raises:
            ResultsError: a file cannot be written.
        """
        from resq_rl.experiments.results.plots import save_figure

        paths = save_figure(figure, self._folder / name)
        for path in paths:
            self.log_artifact(path)
        return paths

    def flush(self) -> None:
        """Send the records that wait, unless the store failed a moment ago."""
        if self._outbox is not None:
            self._outbox.send()
        self._waiting, self._sent_at = 0, time.monotonic()

    def close(self, status: Status = "FINISHED") -> None:
        """End the run, and report where records are that the store has not taken. A second call changes nothing."""
        if self._closed or self._outbox is None:
            return
        self._closed = True
        self._add("end", {"status": status, "time": now()})
        box = self._outbox
        if box.store.client is None:
            log.info("Recorded in %s; send it with resq-rl sync %s.", box.journal, shlex.quote(str(box.folder)))
        elif not box.send(force=True):
            log.warning(
                "%d records for MLflow at %s were not sent; they are kept in %s. Send them with resq-rl sync %s.",
                box.pending,
                box.store.uri,
                box.journal,
                shlex.quote(str(box.folder)),
            )

    def _add(self, kind: OperationKind, payload: dict[str, Any]) -> None:
        if self._outbox is not None:
            self._outbox.add(Operation(kind, self._run, payload))

    def _path(self, path: Path) -> str:
        """A path for the journal: relative if in its folder, which may be moved before it is sent."""
        path = path.absolute()
        if self._outbox is not None and path.is_relative_to(self._outbox.folder.absolute()):
            path = path.relative_to(self._outbox.folder.absolute())
        return str(path)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.close("FAILED" if isinstance(error, Exception) else "KILLED")


class NullTracker(Tracker):
    """Records nothing; figures are still written to the run's folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(None, folder)


def open_tracker(
    settings: TrackingSettings,
    *,
    results: Path,
    folder: Path,
    name: str,
    parent: str | None = None,
    resume: bool = False,
) -> Tracker:
    """Start the record of a run.

    Args:
        settings: where to record, and the run to nest under, if any.
        results: the results folder, which holds the default store.
        folder: the run's own folder.
        name: the run's name.
        parent: local name of the run to nest under where the settings name none.
        resume: whether to go on with the run that was recorded from the folder, if there is one.

    Raises:
        TrackingError: the store cannot be used, or the journal to go on with is damaged.
    """
    if not settings.enabled:
        return NullTracker(folder)
    parent = settings.parent_run or parent
    if settings.uri == OFFLINE:
        store = Store(store_uri(None, results), settings.experiment)
    else:
        known = None if parent is None or parent.startswith(LOCAL) else parent
        store = open_store(store_uri(settings.uri, results), settings.experiment, parent=known)
    outbox = Outbox(store, folder)
    run = recorded_run(folder) if resume else None
    if run is not None:
        outbox.reopen()
    else:
        outbox.journal.unlink(missing_ok=True)
    outbox.add(Operation("store", "", {"uri": store.uri, "experiment": store.experiment}))
    run = run or f"{LOCAL}{uuid.uuid4().hex}"
    return Tracker(outbox, folder, run=run, name=name, tags=settings.tags, parent=parent)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat += _flatten(value, f"{prefix}{name}.")
        else:
            flat.append((f"{prefix}{name}", value))
    return flat


def _as_text(value: Any) -> str:
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.12g}"
    return str(list(value) if isinstance(value, tuple) else value)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _entity_name(name: str) -> str:
    return _cut(FORBIDDEN.sub("_", name), LONGEST_NAME).replace("…", "_")


def _as_tags(tags: Mapping[str, Any]) -> dict[str, str]:
    return {_entity_name(name): _cut(str(value), LONGEST_TAG) for name, value in tags.items()}
