"""Delivery of a run's records to an MLflow store, in order, also when the store does not answer for a while.

Every record is an operation, which is appended to the run's journal (a file of JSON lines) and to a queue. While the
store cannot be reached the queue stays as it is, and delivery is tried again, ever less often. A record that the store
refuses would be refused again: it is reported and left out.

The journal is the truth and the store a copy of it. A run that was killed and goes on, and `resq-rl sync`, deliver the
whole journal again, which changes nothing in a store that has it: a run is found by its local name, which is a tag, and
MLflow keeps a metric of equal name, time, step and value once.
"""

import json
import logging
import os
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from resq_rl.errors import TrackingError
from resq_rl.experiments.tracking.store import Store, is_transient, reason

if TYPE_CHECKING:
    from mlflow import MlflowClient
else:  # slow to import; a name that annotations can be checked against
    MlflowClient = Any

__all__ = ["JOURNAL", "LOCAL", "METRICS_PER_BATCH", "Operation", "Outbox", "now", "read_journal", "recorded_run"]

JOURNAL = "tracking.jsonl"
METRICS_PER_BATCH = 1000  # MLflow's limits of one request
PARAMETERS_PER_BATCH = 100
FIRST_RETRY, LAST_RETRY = 5.0, 300.0  # seconds
PARENT_TAG = "mlflow.parentRunId"
NAME_TAG = "resq_rl.run"
LOCAL = "local-"  # the beginning of every local name of a run

OperationKind = Literal["store", "start", "metrics", "parameters", "tags", "artifact", "model", "end"]

log = logging.getLogger(__name__)


def now() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000


@dataclass
class Operation:
    """One record.

    Attributes:
        kind: what to do with `payload`.
        run: the run's local name; empty for "store".
        payload: by kind, with times in milliseconds since 1970 and paths relative to the journal's folder if in it:
            "store": uri, experiment (where the session records; only in the journal);
            "start": parent, name, tags, time;
            "metrics": values, each a list of name, value, time and step;
            "parameters", "tags": values, by name;
            "artifact": path, folder (among the run's artifacts);
            "model": path, name (to register it under, or None);
            "end": status, time.
    """

    kind: OperationKind
    run: str
    payload: dict[str, Any]


class Outbox:
    """The journal and the queue of one process, shared by a run and its children.

    Args:
        store: receives the records; with no client only the journal is written.
        folder: the journal's folder.
        retry_after: seconds until the second attempt at delivery; each further one waits twice as long.
    """

    def __init__(self, store: Store, folder: Path, *, retry_after: float = FIRST_RETRY) -> None:
        self.store = store
        self.folder = folder
        self.runs: set[str] = set()
        self._queue: deque[Operation] = deque()
        self._run_ids: dict[str, str] = {}
        self._retry_after = retry_after
        self._failures = 0
        self._retry_at = 0.0
        self._warned: set[str] = set()
        self._parameters: dict[tuple[str, str], str] = {}
        self._logged: Counter[tuple[Any, ...]] = Counter()

    @property
    def pending(self) -> int:
        """The number of records that the store has not taken."""
        return len(self._queue)

    @property
    def journal(self) -> Path:
        """The file of all records."""
        return self.folder / JOURNAL

    def run_id(self, run: str) -> str:
        """The store's id of a run, or its local name while the store does not know it."""
        return self._run_ids.get(run, run)

    def reopen(self) -> None:
        """Go on with the journal of a run that was killed or ended, and deliver it again.

        Metrics and parameters of the journal that the run then logs again are left out.
        """
        with suppress(FileNotFoundError):
            os.truncate(self.journal, len(_whole_lines(self.journal)))
        for operation in read_journal(self.journal):
            if operation.kind in ("store", "end"):
                continue
            if operation.kind == "metrics":
                self._logged.update(_identity(operation.run, value) for value in operation.payload["values"])
            self._note(operation)
            self._enqueue(operation)

    def replay(self, operations: Iterable[Operation]) -> bool:
        """Deliver the records of a journal as they are; return whether the store took or refused them all."""
        for operation in operations:
            self._enqueue(operation)
        return self.send(force=True)

    def add(self, operation: Operation) -> None:
        """Append a record."""
        values: Any = operation.payload.get("values")
        if operation.kind == "metrics":
            values = operation.payload["values"] = [v for v in values if self._is_new(operation.run, v)]
        elif operation.kind == "parameters":
            values = operation.payload["values"] = self._new_parameters(operation.run, values)
        if values is not None and not values:
            return
        self._note(operation)
        self._write(operation)
        self._enqueue(operation)

    def _note(self, operation: Operation) -> None:
        """Remember a run that was started and the parameters that were recorded."""
        if operation.kind == "start":
            self.runs.add(operation.run)
        elif operation.kind == "parameters":
            self._parameters.update({(operation.run, name): v for name, v in operation.payload["values"].items()})

    def _is_new(self, run: str, value: Sequence[Any]) -> bool:
        identity = _identity(run, value)
        known = self._logged[identity] > 0
        if known:
            self._logged[identity] -= 1
        return not known

    def _new_parameters(self, run: str, values: Mapping[str, str]) -> dict[str, str]:
        """Those that are not recorded yet. MLflow keeps a parameter's first value: another one becomes a tag."""
        known = {name: self._parameters[run, name] for name in values if (run, name) in self._parameters}
        changed = {name: values[name] for name in known if values[name] != known[name]}
        if changed:
            self.add(Operation("tags", run, {"values": changed}))
        return {name: value for name, value in values.items() if name not in known}

    def _enqueue(self, operation: Operation) -> None:
        """Append a record to the queue; metrics join the metrics before them."""
        last = self._queue[-1] if self._queue else None
        if (
            last is not None
            and operation.kind == last.kind == "metrics"
            and operation.run == last.run
            and len(last.payload["values"]) + len(operation.payload["values"]) <= METRICS_PER_BATCH
        ):
            last.payload["values"] += operation.payload["values"]
        else:
            self._queue.append(operation)

    def send(self, *, force: bool = False) -> bool:
        """Deliver the queue; return whether nothing is left. Between attempts at delivery only `force` tries."""
        waiting = self._failures and not force and time.monotonic() < self._retry_at
        if self.store.client is None or waiting:
            return not self._queue
        while self._queue:
            try:
                self._deliver(self.store.client, self._queue[0])
            except Exception as error:  # whatever a store, driver or network raises must not end the run
                if is_transient(error):
                    self._fail(error)
                    return False
                self._refuse(self._queue[0], error)
            self._queue.popleft()
        if self._failures:
            log.info("MLflow at %s answers again; everything kept for it has been sent.", self.store.uri)
        self._failures = 0
        return True

    def _fail(self, error: Exception) -> None:
        if not self._failures:
            log.warning(
                "MLflow at %s does not answer (%s). The run goes on; its records are kept in %s and sent later.",
                self.store.uri,
                reason(error),
                self.journal,
            )
        self._failures += 1
        delay = min(self._retry_after * 2 ** (self._failures - 1), LAST_RETRY)
        self._retry_at = time.monotonic() + delay

    def _refuse(self, operation: Operation, error: Exception) -> None:
        what = f"MLflow at {self.store.uri} refused a record of kind {operation.kind} ({reason(error)})."
        self._warn_once("refused", f"{what} The run goes on; the record is in {self.journal}.")
        log.debug("%s %s", what, json.dumps(asdict(operation)))

    def _warn_once(self, kind: str, text: str) -> None:
        if kind not in self._warned:
            log.warning("%s", text)
        self._warned.add(kind)

    def _write(self, operation: Operation) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self.journal.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(operation)) + "\n")
        except OSError as error:
            text = f"Cannot write {self.journal}: {error.strerror}. Records that are not sent stay in memory."
            self._warn_once("unwritable", text)

    def _deliver(self, client: MlflowClient, operation: Operation) -> None:
        from mlflow.entities import Metric, Param, RunTag

        run, payload = self.run_id(operation.run), operation.payload
        match operation.kind:
            case "start":
                self._start(client, operation.run, payload)
            case "metrics":
                client.log_batch(run, metrics=[Metric(*value) for value in payload["values"]], synchronous=True)
            case "parameters":
                parameters = [Param(*item) for item in payload["values"].items()]
                for start in range(0, len(parameters), PARAMETERS_PER_BATCH):
                    batch = parameters[start : start + PARAMETERS_PER_BATCH]
                    client.log_batch(run, params=batch, synchronous=True)
            case "tags":
                client.log_batch(run, tags=[RunTag(*item) for item in payload["values"].items()], synchronous=True)
            case "artifact":
                client.log_artifact(run, str(self.folder / payload["path"]), payload["folder"] or None)
            case "model":
                self._register(client, run, self.folder / payload["path"], payload["name"])
            case "end":
                client.set_terminated(run, payload["status"], payload["time"])
            case "store":
                pass

    def _start(self, client: MlflowClient, run: str, payload: Mapping[str, Any]) -> None:
        found = self._found(client, run)
        if found is not None:  # an earlier session, or an attempt whose answer was lost, has made it
            self._run_ids[run] = found
            client.update_run(found, status="RUNNING")
            return
        tags = {**payload["tags"], NAME_TAG: run}
        if payload["parent"] is not None:
            parent = self.run_id(payload["parent"])  # a sweep's run has a local name from another journal
            tags[PARENT_TAG] = (self._found(client, parent) or parent) if parent.startswith(LOCAL) else parent
        made = client.create_run(self.store.experiment_id, payload["time"], tags, payload["name"])
        self._run_ids[run] = made.info.run_id

    def _found(self, client: MlflowClient, run: str) -> str | None:
        """The store's id of a run that was delivered before under a local name."""
        found = client.search_runs([self.store.experiment_id], f"tags.`{NAME_TAG}` = '{run}'")
        return str(found[0].info.run_id) if found else None

    def _register(self, client: MlflowClient, run: str, folder: Path, name: str | None) -> None:
        """Attach a saved model, and make it the newest version of the registered model of a name, once."""
        from mlflow.exceptions import MlflowException

        client.log_artifacts(run, str(folder), folder.name)
        if name is None:
            return
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        versions = client.search_model_versions(f"run_id = '{run}'")
        if not any(version.name == name for version in versions):
            client.create_model_version(name, f"{client.get_run(run).info.artifact_uri}/{folder.name}", run)


def read_journal(path: Path) -> list[Operation]:
    """The records of a journal, without a last line that is not written in full.

    Raises:
        TrackingError: the file cannot be read, or a line before the last is damaged.
    """
    try:
        return [_operation(json.loads(line)) for line in _whole_lines(path).splitlines()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise TrackingError(f"Cannot read the journal {path}: {error.strerror or error}. Check its rights.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise TrackingError(
            f"The journal {path} is damaged ({type(error).__name__}: {error}). Remove it to record the run anew."
        ) from error


def recorded_run(folder: Path) -> str | None:
    """The local name of the run that was recorded from a folder, which is the first in its journal.

    Raises:
        TrackingError: the journal cannot be read.
    """
    return next((operation.run for operation in read_journal(folder / JOURNAL) if operation.kind == "start"), None)


def _whole_lines(path: Path) -> bytes:
    """The content of a file up to its last line break: a kill may have cut the line after it short."""
    content = path.read_bytes()
    return content[: content.rfind(b"\n") + 1]


def _operation(line: Any) -> Operation:
    if line["kind"] not in get_args(OperationKind):
        raise ValueError(f"there is no kind {line['kind']!r}")
    return Operation(line["kind"], str(line["run"]), dict(line["payload"]))


def _identity(run: str, value: Sequence[Any]) -> tuple[Any, ...]:
    """What tells a metric from others: its run, name, step and value, but not when it was logged."""
    name, number, _, step = value
    return run, name, step, repr(float(number))
