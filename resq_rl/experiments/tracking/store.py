"""MLflow stores: their addresses, how they are opened, and what their errors mean."""

import logging
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from resq_rl.errors import TrackingError

if TYPE_CHECKING:
    from mlflow import MlflowClient
else:  # slow to import; a name that annotations can be checked against
    MlflowClient = Any

__all__ = ["OFFLINE", "Store", "is_transient", "open_store", "quiet_mlflow", "reason", "store_uri"]

OFFLINE = "offline"  # the value of tracking.uri that records in the run's folder only
SQLITE = "sqlite:///"
TRANSIENT = {"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "DEADLINE_EXCEEDED"}
# MLflow reads the limits of its requests from the environment only; by default they wait for minutes.
REQUESTS = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "20", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_DISABLE_AGENT_HINT": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


@dataclass(frozen=True)
class Store:
    """An experiment of an MLflow store.

    Attributes:
        uri: the store's address.
        experiment: the experiment's name.
        client: the connection; None while records are only kept in the run's folder.
        experiment_id: the store's id of the experiment.
    """

    uri: str
    experiment: str
    client: MlflowClient | None = None
    experiment_id: str = ""

    @property
    def hint(self) -> str:
        """How a user looks at the experiment; an empty string without a connection."""
        if self.client is None:
            return ""
        # The page of runs: MLflow's start page of an experiment is one for chats.
        page = f"#/experiments/{self.experiment_id}/runs?workflowType=machine_learning"
        if self.uri.startswith("http"):
            return f"{self.uri}/{page}"
        return f"mlflow ui --backend-store-uri {shlex.quote(self.uri)}, then http://127.0.0.1:5000/{page}"


def open_store(uri: str, experiment: str, *, parent: str | None = None) -> Store:
    """Connect to a store and check that it answers; the store and the experiment are made where they are missing.

    Args:
        uri: as `store_uri` returns it.
        experiment: name of the experiment.
        parent: the store's id of a run that must exist there.

    Raises:
        TrackingError: the store cannot be used.
    """
    try:
        client = _connect(uri)
        experiment_id = _experiment_id(client, experiment, uri)
        if parent is not None:
            client.get_run(parent)
    except TrackingError:
        raise
    except Exception as error:  # drivers and networks raise many kinds
        raise TrackingError(
            f"Cannot use the tracking store {uri}: {reason(error)}. Start it (mlflow server), "
            "set tracking.uri to another one, keep the records in the run's folder with tracking=offline and send them "
            "later with resq-rl sync, or record nothing with tracking.enabled=false."
        ) from error
    return Store(uri, experiment, client, experiment_id)


def store_uri(uri: str | None, results: Path) -> str:
    """The address of a store, independent of the working folder; without `uri` that of `mlflow.db` in `results`.

    Raises:
        TrackingError: the store is an SQLite file of a name that no address can express.
    """
    if uri is None:
        return _sqlite_uri(results.absolute() / "mlflow.db")
    if uri.startswith(SQLITE):
        return f"{SQLITE}{Path(uri.removeprefix(SQLITE)).absolute()}"
    if re.match(r"[a-z][a-z0-9+.\-]+:", uri) or uri == "databricks":
        return uri.rstrip("/")
    return Path(uri).absolute().as_uri()


def quiet_mlflow() -> None:
    """Prepare MLflow for its first import: no usage reports, no chatter on the terminal, requests that give up early.

    Variables that the user has set stay as they are.
    """
    for name, value in (QUIET | REQUESTS).items():
        os.environ.setdefault(name, value)


def reason(error: BaseException) -> str:
    """Why a store failed, in one line of at most 300 characters without a full stop."""
    cause: BaseException | None = error
    while cause is not None:
        if _lost_connection(cause):
            return "no answer in time" if "timed out" in str(cause) else "no connection"
        cause = cause.__cause__ or cause.__context__
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300].rstrip(".")


def is_transient(error: Exception) -> bool:
    """Whether the same request may succeed later."""
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
    """The HTTP status of a server's answer that MLflow raised as an error."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _connect(uri: str) -> MlflowClient:
    quiet_mlflow()
    from mlflow import MlflowClient

    for logger, level in (
        ("mlflow", logging.WARNING),
        ("mlflow.store.db.utils", logging.CRITICAL),  # prints tracebacks of errors that are reported here
        ("alembic", logging.WARNING),
    ):
        logging.getLogger(logger).setLevel(level)
    file = _sqlite_file(uri)
    if file is not None:
        _make_database(file)
    return MlflowClient(tracking_uri=uri)


def _make_database(file: Path) -> None:
    """Make an SQLite store with MLflow's tables, unless there is one.

    MLflow's migrations of a new store fail for good if two processes run them at once or one is killed. One process at
    a time runs them, on a file that gets the store's name when it is complete.
    """
    from mlflow import MlflowClient

    if file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock"):
        if file.exists():
            return
        new = file.with_name(f"{file.name}.new")
        new.unlink(missing_ok=True)
        MlflowClient(tracking_uri=_sqlite_uri(new)).search_experiments(max_results=1)
        new.replace(file)


def _sqlite_uri(file: Path) -> str:
    """The address of an SQLite file. Some releases of SQLAlchemy decode percent signs in it, and some do not.

    Raises:
        TrackingError: the name cannot be expressed.
    """
    for path in (str(file), str(file).replace("%", "%25").replace("?", "%3F")):
        if _sqlite_file(f"{SQLITE}{path}") == file:
            # MLflow makes the folder of an address of this form, but does not decode it: it would make another one.
            return f"{SQLITE}{path}" if path == str(file) else f"sqlite+pysqlite:///{path}"
    raise TrackingError(f"MLflow cannot open a database named {str(file)!r}. Choose another name with results=FOLDER.")


def _sqlite_file(uri: str) -> Path | None:
    """The file behind the address of an SQLite store; None for other stores."""
    from sqlalchemy import make_url

    database = make_url(uri).database if uri.startswith("sqlite") else None
    return Path(database) if database else None


def _experiment_id(client: MlflowClient, name: str, uri: str) -> str:
    """The id of an experiment, which is made where it is missing."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        file = _sqlite_file(uri)
        artifacts = None if file is None else (file.parent / "mlartifacts").as_uri()
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
