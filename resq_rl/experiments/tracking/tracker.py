"""Recording of runs in MLflow, by explicit run ids and without MLflow's global state.

A `Tracker` records one run. The default store is an SQLite file in the results folder; any store or server that MLflow
knows can take its place. A store that cannot be used is an error at the start; one that fails later is not: records
are kept in the run's folder and sent when it answers again.
"""

import logging
import math
import os
import re
import shlex
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from omegaconf import OmegaConf

from resq_rl import __version__
from resq_rl.errors import TrackingError
from resq_rl.experiments.config.settings import TrackingSettings
from resq_rl.experiments.tracking.outbox import (
    LOCAL,
    METRICS_PER_BATCH,
    Operation,
    OperationKind,
    Outbox,
    now,
    quick_requests,
    reason,
)
from resq_rl.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow import MlflowClient
else:  # slow to import; names that annotations can be checked against
    Figure = MlflowClient = Any

__all__ = ["PARENT_RUN_VARIABLE", "NullTracker", "Tracker", "command_tags", "open_tracker", "quiet_mlflow", "run_name"]

PARENT_RUN_VARIABLE = "RESQ_RL_PARENT_RUN"
OFFLINE = "offline"  # as tracking.uri: a journal and no store
Status = Literal["FINISHED", "FAILED", "KILLED"]

CHECK_SECONDS = 5
FLUSH_SECONDS = 2.0
LONGEST_PARAMETER = 6000  # characters, MLflow's limits
LONGEST_NAME = 250
LONGEST_TAG = 5000
LONGEST_RUN_NAME = 120  # beyond it, MLflow's pages are hard to read
# Settings of where and how a run runs, which do not tell what it is.
INCIDENTAL = ("results=", "tables=", "threads=", "tracking", "hydra", "training.resume=")
PARENTS = re.compile(r"[^\s=,\[\]]*/(?=[^\s/,\[\]]+/[^\s/,\[\]]+)")  # of a path, but for the last
FORBIDDEN = re.compile(r"[^\w\-. :/]")

log = logging.getLogger(__name__)


def run_name(command: str, overrides: Sequence[str], folder: Path) -> str:
    """A run's name: its command and what was asked of it; where that was nothing in particular, its folder's name."""
    telling = [PARENTS.sub("", word) for word in overrides if not word.startswith(INCIDENTAL)]
    return _cut(" ".join([command, *(telling or [folder.name])]).strip(), LONGEST_RUN_NAME)


def command_tags(command: str, arguments: Sequence[str], folder: Path) -> dict[str, Any]:
    """Tags that say what a run is of. MLflow shows its source as a path, so the arguments have a tag of their own."""
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
        name: str = "",
        tags: Mapping[str, Any] | None = None,
        parent: str | None = None,
        hint: str = "",
    ) -> None:
        self.hint = hint
        self._outbox = outbox
        self._folder = folder
        known = None if outbox is None else outbox.started_before(name, parent)
        self._run = known or f"{LOCAL}{uuid.uuid4().hex}"
        self._closed = False
        self._sent_at = time.monotonic()
        self._waiting = 0
        if known is None:
            self._add("start", {"parent": parent, "name": name, "tags": _as_tags(tags or {}), "time": now()})
        self.flush()

    @property
    def run_id(self) -> str | None:
        """The store's id of this run, a local name while the store does not answer, or None without a store."""
        return None if self._outbox is None else self._outbox.run_id(self._run)

    def child(self, name: str, tags: Mapping[str, Any] | None = None) -> "Tracker":
        """Start a run nested in this one, with figures in a folder of its own."""
        folder = self._folder / re.sub(r"[^\w\-.]+", "_", name)
        return Tracker(self._outbox, folder, name=name, tags=tags, parent=self._run, hint=self.hint)

    def log_parameters(self, parameters: Mapping[str, Any]) -> None:
        """Record settings, nested ones by dotted names; a parameter cannot be changed later.

        Values longer than MLflow takes are cut there and attached in full as `parameters.yaml`.
        """
        if self._outbox is None:
            return
        flat = {_entity_name(name): _as_text(value) for name, value in _flatten(parameters)}
        if any(len(text) > LONGEST_PARAMETER for text in flat.values()):
            text = OmegaConf.to_yaml(OmegaConf.create(_plain(parameters)))
            self.log_artifact(write_atomic(self._folder / "parameters.yaml", text))
        self._add("parameters", {"values": {name: _cut(text, LONGEST_PARAMETER) for name, text in flat.items()}})
        self.flush()

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Record numbers at a step, such as the environment frames so far.

        Sent in batches, when a thousand wait, after two seconds or with `flush`: call it freely.
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
        self._add("artifact", {"path": str(path.absolute()), "folder": folder})
        self.flush()

    def log_model(self, folder: Path, name: str | None) -> None:
        """Attach the folder of a saved MLflow model and register it under a name, if one is given."""
        self._add("model", {"path": str(folder.absolute()), "name": name})
        self.flush()

    def log_figure(self, figure: Figure, name: str) -> list[Path]:
        """Write a figure as `name`.png and `name`.svg to the run's folder, attach both, and give their paths.

        Raises:
            ResultsError: a file cannot be written.
        """
        from resq_rl.experiments.results.plots import save_figure

        paths = save_figure(figure, self._folder / name)
        for path in paths:
            self.log_artifact(path)
        return paths

    def flush(self) -> None:
        """Send what waits to be sent, unless the store failed a moment ago."""
        if self._outbox is not None:
            self._outbox.send()
        self._waiting, self._sent_at = 0, time.monotonic()

    def close(self, status: Status = "FINISHED") -> None:
        """End the run, and say where the records are that the store has not taken. Closing again changes nothing."""
        if self._closed or self._outbox is None:
            return
        self._closed = True
        self._add("end", {"status": status, "time": now()})
        if self._outbox.client is None:
            log.info("Recorded in %s; send it with resq-rl sync %s.", self._outbox.journal, self._outbox.folder)
        elif not self._outbox.finish():
            log.warning(
                "%d records for MLflow at %s were not sent; they are kept in %s. Send them with resq-rl sync %s.",
                self._outbox.pending,
                self._outbox.where,
                self._outbox.journal,
                self._outbox.folder,
            )

    def _add(self, kind: OperationKind, payload: dict[str, Any]) -> None:
        if self._outbox is not None:
            self._outbox.add(Operation(kind, self._run, payload))

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
    settings: TrackingSettings, *, results: Path, folder: Path, name: str, resume: bool = False
) -> Tracker:
    """Start a run: nested under `settings.parent_run` or the environment's RESQ_RL_PARENT_RUN, if either is set.

    Args:
        settings: where to record.
        results: the results folder, which holds the default store.
        folder: the run's own folder.
        name: the run's name.
        resume: go on with the run that was recorded from the folder, if there is one.

    Raises:
        TrackingError: the store cannot be used.
    """
    if not settings.enabled:
        return NullTracker(folder)
    outbox = open_outbox(settings, results=results, folder=folder)
    parent = settings.parent_run or os.environ.get(PARENT_RUN_VARIABLE)
    if resume:
        outbox.reopen()
    else:
        outbox.journal.unlink(missing_ok=True)
    hint = "" if outbox.client is None else _hint(outbox.where, outbox.experiment_id)
    return Tracker(outbox, folder, name=name, tags=settings.tags, parent=parent, hint=hint)


def open_outbox(settings: TrackingSettings, *, results: Path, folder: Path) -> Outbox:
    """The delivery to a store that was checked, with its journal in `folder`.

    Raises:
        TrackingError: the store cannot be used.
    """
    if settings.uri == OFFLINE:
        return Outbox(None, "", OFFLINE, folder)
    uri = _absolute_uri(settings.uri, results)
    try:
        client = _make_client(uri)
        with quick_requests(CHECK_SECONDS):
            experiment = _experiment(client, settings.experiment, uri)
            parent = settings.parent_run or os.environ.get(PARENT_RUN_VARIABLE)
            if parent is not None and not parent.startswith(LOCAL):
                client.get_run(parent)
    except TrackingError:
        raise
    except Exception as error:  # drivers and networks raise many kinds
        raise TrackingError(
            f"Cannot use the tracking store {uri}: {reason(error)}. Start it (mlflow server), "
            "set tracking.uri to another one, keep the records in the run's folder with tracking=offline and send them "
            "later with resq-rl sync, or record nothing with tracking.enabled=false."
        ) from error
    return Outbox(client, experiment, uri, folder)


def quiet_mlflow() -> None:
    """Keep MLflow from reporting its use and from chatter on the terminal; to be called before it is imported."""
    for variable in ("DISABLE_TELEMETRY", "DISABLE_AGENT_HINT", "SUPPRESS_PRINTING_URL_TO_STDOUT"):
        os.environ.setdefault(f"MLFLOW_{variable}", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")


def _make_client(uri: str) -> MlflowClient:
    quiet_mlflow()
    from mlflow import MlflowClient

    for logger, level in (
        ("mlflow", logging.WARNING),
        ("mlflow.store.db.utils", logging.CRITICAL),  # prints tracebacks of errors that are reported here
        ("alembic", logging.WARNING),
    ):
        logging.getLogger(logger).setLevel(level)
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri=uri)


def _absolute_uri(uri: str | None, results: Path) -> str:
    """The store's address, independent of the working folder."""
    if uri is None:
        return f"sqlite:///{(results / 'mlflow.db').absolute()}"
    if uri.startswith("sqlite:///"):
        return f"sqlite:///{Path(uri.removeprefix('sqlite:///')).absolute()}"
    if re.match(r"[a-z][a-z0-9+.\-]+:", uri) or uri == "databricks":
        return uri.rstrip("/")
    return Path(uri).absolute().as_uri()


def _experiment(client: MlflowClient, name: str, uri: str) -> str:
    """The id of the experiment, which is made if need be."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        artifacts = None
        if uri.startswith("sqlite:///"):
            artifacts = (Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts").as_uri()
        try:
            return str(client.create_experiment(name, artifact_location=artifacts))
        except MlflowException as error:
            found = client.get_experiment_by_name(name)  # another process may have been faster
            if found is None:
                raise error
    if found.lifecycle_stage != "active":
        raise TrackingError(
            f"The experiment {name!r} in the tracking store {uri} is deleted. Restore it "
            f"(mlflow experiments restore --experiment-id {found.experiment_id}) or set tracking.experiment."
        )
    return str(found.experiment_id)


def _hint(uri: str, experiment: str) -> str:
    page = f"#/experiments/{experiment}/runs?workflowType=machine_learning"  # or MLflow begins with pages for chats
    if uri.startswith("http"):
        return f"{uri}/{page}"
    return f"mlflow ui --backend-store-uri {uri}, then http://127.0.0.1:5000/{page}"


def _flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat += _flatten(value, f"{prefix}{name}.")
        else:
            flat.append((f"{prefix}{name}", value))
    return flat


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


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
