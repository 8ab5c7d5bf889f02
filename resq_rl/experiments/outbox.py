"""Delivery of records to an MLflow store, in order, through times in which the store does not answer.

Every record is an operation in a queue. A delivery that fails because the store cannot be reached leaves the queue as
it is and writes it to a file of JSON lines; it is tried again later, ever less often. A record that the store refuses
would be refused again, so it goes to a second file and the queue moves on.
"""

import json
import logging
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from mlflow import MlflowClient
else:  # slow to import; a name that annotations can be checked against
    MlflowClient = Any

__all__ = ["METRICS_PER_BATCH", "Operation", "OperationKind", "Outbox", "now", "quick_requests", "reason"]

PENDING_FILE = "tracking-pending.jsonl"
REFUSED_FILE = "tracking-refused.jsonl"
METRICS_PER_BATCH = 1000  # MLflow's limits of one request
PARAMETERS_PER_BATCH = 100
FIRST_RETRY, LAST_RETRY = 5.0, 300.0  # seconds
TRANSIENT = {"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "DEADLINE_EXCEEDED"}
PARENT_TAG = "mlflow.parentRunId"

OperationKind = Literal["start", "metrics", "parameters", "tags", "artifact", "model", "end"]

log = logging.getLogger(__name__)


def now() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000


@dataclass
class Operation:
    """One record for the store.

    Attributes:
        kind: what to do with `payload`.
        run: the run's id, or a local name as long as the store has not made the run.
        payload: of "start" parent, name, tags and time; of "metrics" values as (name, value, time, step); of
            "parameters" and "tags" values by name; of "artifact" path and folder; of "model" path and the name to
            register it under; of "end" status and time. Times are milliseconds since 1970.
    """

    kind: OperationKind
    run: str
    payload: dict[str, Any]


@contextmanager
def quick_requests(seconds: int) -> Iterator[None]:
    """Make MLflow's own HTTP requests give up after `seconds`, without retries; by default they wait for minutes.

    MLflow reads these limits only from the environment. Limits that the user has set there stay.
    """
    wanted = {"MLFLOW_HTTP_REQUEST_TIMEOUT": str(seconds), "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    added = [name for name in wanted if name not in os.environ]
    os.environ.update({name: wanted[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@dataclass
class Outbox:
    """The queue of one process, shared by a run and its children.

    Attributes:
        client: the store.
        experiment_id: the experiment in which runs are started.
        where: the store's address, for messages.
        folder: where records are kept that the store does not take.
        timeout: seconds after which a request counts as failed.
        retry_after: seconds until the next try after the first failure; doubles with each further one.
    """

    client: MlflowClient
    experiment_id: str
    where: str
    folder: Path
    timeout: int = 20
    retry_after: float = FIRST_RETRY
    _queue: deque[Operation] = field(default_factory=deque)
    _run_ids: dict[str, str] = field(default_factory=dict)
    _failures: int = 0
    _retry_at: float = 0.0
    _saved: int = 0
    _refused: int = 0

    @property
    def pending(self) -> int:
        """Records that the store has not taken."""
        return len(self._queue)

    @property
    def pending_file(self) -> Path:
        """Where pending records are kept while the store does not answer."""
        return self.folder / PENDING_FILE

    def run_id(self, run: str) -> str:
        """The store's id of a run that was started under a local name."""
        return self._run_ids.get(run, run)

    def add(self, operation: Operation) -> None:
        """Append a record; metrics join the metrics before them."""
        last = self._queue[-1] if len(self._queue) > self._saved else None
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
        """Deliver what is pending; whether nothing is left. Between retries only `force` makes it try."""
        if self._failures and not force and time.monotonic() < self._retry_at:
            self._save()
            return not self._queue
        with quick_requests(self.timeout):
            while self._queue:
                try:
                    self._deliver(self._queue[0])
                except Exception as error:  # whatever a store, driver or network raises must not end the run
                    if _is_transient(error):
                        self._fail(error)
                        return False
                    self._refuse(self._queue[0], error)
                self._queue.popleft()
                self._saved = max(self._saved - 1, 0)
        if self._failures:
            log.info("MLflow at %s answers again; everything kept for it has been sent.", self.where)
        self._failures = 0
        self.pending_file.unlink(missing_ok=True)
        return True

    def _fail(self, error: Exception) -> None:
        if not self._failures:
            log.warning(
                "MLflow at %s does not answer (%s). The run goes on; its records are kept in %s and sent later.",
                self.where,
                reason(error),
                self.pending_file,
            )
        self._failures += 1
        delay = min(self.retry_after * 2 ** (self._failures - 1), LAST_RETRY)
        self._retry_at = time.monotonic() + delay
        self._saved = 0
        self._save()

    def _save(self) -> None:
        """Bring the file of pending records up to date."""
        new = list(self._queue)[self._saved :]
        if not new:
            return
        lines = [json.dumps(asdict(operation) | {"run": self.run_id(operation.run)}) + "\n" for operation in new]
        if self._write(self.pending_file, "".join(lines), "a" if self._saved else "w"):
            self._saved = len(self._queue)

    def _refuse(self, operation: Operation, error: Exception) -> None:
        record = asdict(operation) | {"run": self.run_id(operation.run), "reason": reason(error)}
        self._write(self.folder / REFUSED_FILE, json.dumps(record) + "\n", "a")
        if not self._refused:
            log.warning(
                "MLflow at %s refused a record of kind %s (%s). Refused records are kept in %s.",
                self.where,
                operation.kind,
                reason(error),
                self.folder / REFUSED_FILE,
            )
        self._refused += 1

    def _write(self, path: Path, text: str, mode: str) -> bool:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open(mode, encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            log.warning("Cannot write %s: %s. The records stay in memory.", path, error.strerror)
            return False
        return True

    def _deliver(self, operation: Operation) -> None:
        from mlflow.entities import Metric, Param, RunTag

        run, payload = self.run_id(operation.run), operation.payload
        match operation.kind:
            case "start":
                self._start(operation.run, payload)
            case "metrics":
                metrics = [Metric(*value) for value in payload["values"]]
                self.client.log_batch(run, metrics=metrics, synchronous=True)
            case "parameters":
                parameters = [Param(*item) for item in payload["values"].items()]
                for start in range(0, len(parameters), PARAMETERS_PER_BATCH):
                    batch = parameters[start : start + PARAMETERS_PER_BATCH]
                    self.client.log_batch(run, params=batch, synchronous=True)
            case "tags":
                tags = [RunTag(*item) for item in payload["values"].items()]
                self.client.log_batch(run, tags=tags, synchronous=True)
            case "artifact":
                self.client.log_artifact(run, payload["path"], payload["folder"] or None)
            case "model":
                self._register(run, Path(payload["path"]), payload["name"])
            case "end":
                self.client.set_terminated(run, payload["status"], payload["time"])

    def _start(self, run: str, payload: Mapping[str, Any]) -> None:
        tags = dict(payload["tags"])
        if payload["parent"] is not None:
            tags[PARENT_TAG] = self.run_id(payload["parent"])
        made = self.client.create_run(self.experiment_id, payload["time"], tags, payload["name"])
        self._run_ids[run] = made.info.run_id

    def _register(self, run: str, folder: Path, name: str | None) -> None:
        """Attach a saved model, and make it the newest version of the registered model of a name."""
        from mlflow.exceptions import MlflowException

        self.client.log_artifacts(run, str(folder), folder.name)
        if name is None:
            return
        try:
            self.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        source = f"{self.client.get_run(run).info.artifact_uri}/{folder.name}"
        self.client.create_model_version(name, source, run)


def reason(error: BaseException) -> str:
    """Why a store failed, in at most 300 characters of one line, without a full stop."""
    cause: BaseException | None = error
    while cause is not None:
        if _lost_connection(cause):
            return "no answer in time" if "timed out" in str(cause) else "no connection"
        cause = cause.__cause__ or cause.__context__
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300].rstrip(".")


def _is_transient(error: Exception) -> bool:
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return error.error_code in TRANSIENT
    status = _http_status(error)
    return _lost_connection(error) if status is None else status >= 500


def _lost_connection(error: BaseException) -> bool:
    """Whether a connection failed: Python's own errors, or those of `requests`, which are OSErrors without a number."""
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    return isinstance(error, OSError) and error.errno is None and _http_status(error) is None


def _http_status(error: BaseException) -> int | None:
    """The status of a server's answer that MLflow raised as an error."""
    return getattr(getattr(error, "response", None), "status_code", None)
