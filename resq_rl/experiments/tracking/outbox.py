"""Delivery of records to an MLflow store, in order, through times in which the store does not answer.

Every record is an operation. It is appended to the run's journal, a file of JSON lines, and to a queue. A delivery that
fails because the store cannot be reached leaves the queue as it is; it is tried again later, ever less often. A record
that the store refuses would be refused again, so it goes to a second file and the queue moves on.

The journal is the truth and the store a copy of it: a run that was killed and goes on, or `resq-rl sync`, delivers the
whole journal again, which changes nothing in a store that has it. A run is found by its local name, which is a tag, and
a metric that comes with the time, step and value of another is the same one to MLflow.
"""

import json
import logging
import os
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from resq_rl.errors import TrackingError

if TYPE_CHECKING:
    from mlflow import MlflowClient
else:  # slow to import; a name that annotations can be checked against
    MlflowClient = Any

__all__ = [
    "JOURNAL",
    "LOCAL",
    "METRICS_PER_BATCH",
    "Operation",
    "OperationKind",
    "Outbox",
    "now",
    "quick_requests",
    "read_journal",
    "reason",
]

JOURNAL = "tracking.jsonl"
REFUSED_FILE = "tracking-refused.jsonl"
METRICS_PER_BATCH = 1000  # MLflow's limits of one request
PARAMETERS_PER_BATCH = 100
FIRST_RETRY, LAST_RETRY = 5.0, 300.0  # seconds
TRANSIENT = {"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "DEADLINE_EXCEEDED"}
PARENT_TAG = "mlflow.parentRunId"
NAME_TAG = "resq_rl.run"
LOCAL = "local-"  # how local names of runs begin

OperationKind = Literal["start", "metrics", "parameters", "tags", "artifact", "model", "end", "sent"]

log = logging.getLogger(__name__)


def now() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000


@dataclass
class Operation:
    """One record for the store.

    Attributes:
        kind: what to do with `payload`.
        run: the run's local name.
        payload: of "start" parent, name, tags and time; of "metrics" values as (name, value, time, step); of
            "parameters" and "tags" values by name; of "artifact" path and folder; of "model" path and the name to
            register it under; of "end" status and time. Times are milliseconds since 1970. "sent" is only in the
            journal, and says that the store has all before it.
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
        client: the store; None for none, as long as the journal is all that is wanted.
        experiment_id: the experiment in which runs are started.
        where: the store's address, for messages.
        folder: where the journal is.
        timeout: seconds after which a request counts as failed.
        retry_after: seconds until the next try after the first failure; doubles with each further one.
    """

    client: MlflowClient | None
    experiment_id: str
    where: str
    folder: Path
    timeout: int = 20
    retry_after: float = FIRST_RETRY
    _queue: deque[Operation] = field(default_factory=deque)
    _run_ids: dict[str, str] = field(default_factory=dict)
    _failures: int = 0
    _retry_at: float = 0.0
    _refused: int = 0
    _unwritable: bool = False
    _reopened: bool = False
    _before: list[Operation] = field(default_factory=list)
    _logged: Counter[tuple[Any, ...]] = field(default_factory=Counter)

    @property
    def pending(self) -> int:
        """Records that the store has not taken."""
        return len(self._queue)

    @property
    def journal(self) -> Path:
        """The file of all records."""
        return self.folder / JOURNAL

    def run_id(self, run: str) -> str:
        """The store's id of a run that was started under a local name."""
        return self._run_ids.get(run, run)

    def reopen(self) -> None:
        """Go on with the journal of a run that was ended, by a kill or otherwise, and deliver it again.

        Metrics that the run then logs once more are left out.
        """
        self._reopened = True
        self._before = [operation for operation in read_journal(self.journal) if operation.kind not in ("end", "sent")]
        for operation in self._before:
            self._enqueue(operation)
            if operation.kind == "metrics":
                self._logged.update(_identity(operation.run, value) for value in operation.payload["values"])

    def replay(self, operations: Sequence[Operation]) -> None:
        """Deliver the records of a journal as they are."""
        self._reopened = True
        for operation in operations:
            self._enqueue(operation)

    def started_before(self, name: str, parent: str | None) -> str | None:
        """The local name of a run of the reopened journal; each is given once."""
        for operation in self._before:
            known = operation.payload if operation.kind == "start" else {}
            if known and (known["name"], known["parent"]) == (name, parent):
                self._before.remove(operation)
                return operation.run
        return None

    def add(self, operation: Operation) -> None:
        """Append a record; metrics join the metrics before them."""
        if operation.kind == "metrics" and self._logged:
            operation.payload["values"] = [v for v in operation.payload["values"] if self._is_new(operation.run, v)]
            if not operation.payload["values"]:
                return
        self._write(self.journal, json.dumps(asdict(operation)) + "\n")
        self._enqueue(operation)

    def _is_new(self, run: str, value: Sequence[Any]) -> bool:
        identity = _identity(run, value)
        known = self._logged[identity] > 0
        self._logged[identity] -= known
        return not known

    def _enqueue(self, operation: Operation) -> None:
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
        """Deliver what is pending; whether nothing is left. Between retries only `force` makes it try."""
        waiting = self._failures and not force and time.monotonic() < self._retry_at
        if self.client is None or waiting:
            return not self._queue
        with quick_requests(self.timeout):
            while self._queue:
                try:
                    self._deliver(self.client, self._queue[0])
                except Exception as error:  # whatever a store, driver or network raises must not end the run
                    if _is_transient(error):
                        self._fail(error)
                        return False
                    self._refuse(self._queue[0], error)
                self._queue.popleft()
        if self._failures:
            log.info("MLflow at %s answers again; everything kept for it has been sent.", self.where)
        self._failures = 0
        return True

    def finish(self) -> bool:
        """Deliver the rest; whether nothing is left, which the journal then says."""
        if not self.send(force=True):
            return False
        self._write(self.journal, json.dumps(asdict(Operation("sent", "", {"where": self.where}))) + "\n")
        return True

    def _fail(self, error: Exception) -> None:
        if not self._failures:
            log.warning(
                "MLflow at %s does not answer (%s). The run goes on; its records are kept in %s and sent later.",
                self.where,
                reason(error),
                self.journal,
            )
        self._failures += 1
        delay = min(self.retry_after * 2 ** (self._failures - 1), LAST_RETRY)
        self._retry_at = time.monotonic() + delay

    def _refuse(self, operation: Operation, error: Exception) -> None:
        record = asdict(operation) | {"run": self.run_id(operation.run), "reason": reason(error)}
        self._write(self.folder / REFUSED_FILE, json.dumps(record) + "\n")
        if not self._refused:
            log.warning(
                "MLflow at %s refused a record of kind %s (%s). Refused records are kept in %s.",
                self.where,
                operation.kind,
                reason(error),
                self.folder / REFUSED_FILE,
            )
        self._refused += 1

    def _write(self, path: Path, text: str) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            if not self._unwritable:
                log.warning("Cannot write %s: %s. The records stay in memory.", path, error.strerror)
            self._unwritable = True

    def _deliver(self, client: MlflowClient, operation: Operation) -> None:
        from mlflow.entities import Metric, Param, RunTag

        run, payload = self.run_id(operation.run), operation.payload
        match operation.kind:
            case "start":
                self._start(client, operation.run, payload)
            case "metrics":
                metrics = [Metric(*value) for value in payload["values"]]
                client.log_batch(run, metrics=metrics, synchronous=True)
            case "parameters":
                parameters = [Param(*item) for item in payload["values"].items()]
                for start in range(0, len(parameters), PARAMETERS_PER_BATCH):
                    batch = parameters[start : start + PARAMETERS_PER_BATCH]
                    client.log_batch(run, params=batch, synchronous=True)
            case "tags":
                tags = [RunTag(*item) for item in payload["values"].items()]
                client.log_batch(run, tags=tags, synchronous=True)
            case "artifact":
                client.log_artifact(run, payload["path"], payload["folder"] or None)
            case "model":
                self._register(client, run, Path(payload["path"]), payload["name"])
            case "end":
                client.set_terminated(run, payload["status"], payload["time"])
            case "sent":
                pass

    def _start(self, client: MlflowClient, run: str, payload: Mapping[str, Any]) -> None:
        if self._reopened or self._failures:  # a try before may have come through
            found = self._found(client, run)
            if found is not None:
                self._run_ids[run] = found
                client.update_run(found, status="RUNNING")
                return
        tags = {**payload["tags"], NAME_TAG: run}
        if payload["parent"] is not None:
            parent = self.run_id(payload["parent"])  # of a sweep without a store a local name, of another journal
            tags[PARENT_TAG] = (self._found(client, parent) or parent) if parent.startswith(LOCAL) else parent
        made = client.create_run(self.experiment_id, payload["time"], tags, payload["name"])
        self._run_ids[run] = made.info.run_id

    def _found(self, client: MlflowClient, run: str) -> str | None:
        """The store's id of a run that was delivered before under a local name."""
        found = client.search_runs([self.experiment_id], f"tags.`{NAME_TAG}` = '{run}'")
        return str(found[0].info.run_id) if found else None

    def _register(self, client: MlflowClient, run: str, folder: Path, name: str | None) -> None:
        """Attach a saved model, and make it the newest version of the registered model of a name."""
        from mlflow.exceptions import MlflowException

        client.log_artifacts(run, str(folder), folder.name)
        if name is None:
            return
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        source = f"{client.get_run(run).info.artifact_uri}/{folder.name}"
        client.create_model_version(name, source, run)


def read_journal(path: Path) -> list[Operation]:
    """The records of a journal; a last line that a kill cut short is removed from the file.

    Raises:
        TrackingError: the file cannot be read, or a line before the last is damaged.
    """
    try:
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            with path.open("r+b") as file:
                file.truncate(len(whole))
        return [_operation(json.loads(line)) for line in whole.splitlines()]
    except OSError as error:
        raise TrackingError(f"Cannot read the journal {path}: {error.strerror or error}. Check its rights.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise TrackingError(
            f"The journal {path} is damaged ({type(error).__name__}: {error}). Remove it to record the run anew."
        ) from error


def _operation(line: Any) -> Operation:
    if line["kind"] not in get_args(OperationKind):
        raise ValueError(f"there is no kind {line['kind']!r}")
    return Operation(line["kind"], str(line["run"]), dict(line["payload"]))


def _identity(run: str, value: Sequence[Any]) -> tuple[Any, ...]:
    """What tells a metric from others: its name, step and value, but not when it was logged."""
    name, number, _, step = value
    return run, name, step, repr(float(number))


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
