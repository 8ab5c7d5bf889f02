"""Measurements kept in a run's folder under what they depend on: a run that goes on does not repeat them."""

import hashlib
import logging
import sqlite3
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from resq_rl.envs import ClipStore, Measurement, Policy
from resq_rl.envs.table_cache import fingerprints
from resq_rl.perception import Task
from resq_rl.quantization import ResQModel
from resq_rl.sealed import DamagedError, pack, unpack

__all__ = ["MEASURED", "Measured"]

log = logging.getLogger(__name__)

MEASURED = "measured.db"  # in the run's folder
TABLE = "CREATE TABLE IF NOT EXISTS measured (key TEXT PRIMARY KEY, sealed BLOB NOT NULL)"


class Measured:
    """A file of measurements. One that cannot be used costs time, not the run: what is missing is measured anew.

    Args:
        path: of an SQLite database, made with the first measurement; None to keep nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._parts: dict[tuple[int, int], tuple[object, str]] = {}

    def key(
        self,
        model: ResQModel,
        task: Task,
        store: ClipStore,
        policy: Policy,
        grid: tuple[int, int],
        slots: int,
    ) -> str | None:
        """SHA-256 of all that a measurement depends on; None where that cannot be told, as of unknown policies."""
        if self.path is None:
            return None
        digest = hashlib.sha256(self._world(model, task, store, grid).encode())
        digest.update(repr(slots).encode())
        try:
            for part in _content(policy):
                digest.update(len(part).to_bytes(8, "little"))
                digest.update(part)
        except TypeError:
            return None
        return digest.hexdigest()

    def _world(self, model: ResQModel, task: Task, store: ClipStore, grid: tuple[int, int]) -> str:
        """Of all but the policy, computed once for each model and store, kept so that no other takes its id."""
        place = id(model), id(store)
        if place not in self._parts:
            digest = hashlib.sha256()
            for clip in fingerprints(model, task, store, range(len(store)), grid):
                digest.update(clip.encode())
            self._parts[place] = (model, store), digest.hexdigest()
        return self._parts[place][1]

    def get(self, key: str | None, task: Task, policy: Policy) -> Measurement | None:
        """The measurement of a policy, if it is known."""
        if key is None or self.path is None or not self.path.exists():
            return None
        found = self._execute("SELECT sealed FROM measured WHERE key = ?", (key,))
        if not found:
            return None
        try:
            values = unpack(found[0][0])
        except DamagedError as error:
            log.warning("A measurement in %s is damaged (%s). It is measured anew.", self.path, error)
            return None
        return Measurement(**values, task=task, settings=policy.settings)

    def put(self, key: str | None, measurement: Measurement) -> None:
        """Keep a measurement."""
        if key is not None:
            names = [f.name for f in fields(measurement) if f.name not in ("task", "settings")]
            values = {name: getattr(measurement, name) for name in names}
            self._execute("INSERT OR REPLACE INTO measured VALUES (?, ?)", (key, pack(values)))

    def _execute(self, statement: str, values: tuple[Any, ...]) -> list[Any]:
        assert self.path is not None
        try:
            connection = sqlite3.connect(self.path)
            try:
                with connection:
                    connection.execute(TABLE)
                    return connection.execute(statement, values).fetchall()
            finally:
                connection.close()
        except sqlite3.Error as error:
            log.warning("Measurements are no longer kept: %s cannot be used (%s). The run goes on.", self.path, error)
            self.path = None
            return []


def _content(value: Any) -> Iterator[bytes]:
    """Types and values, in order.

    Raises:
        TypeError: a part is neither plain nor a tensor nor a dataclass of these.
    """
    yield type(value).__qualname__.encode()
    if isinstance(value, Tensor):
        yield f"{value.dtype} {tuple(value.shape)}".encode()
        yield value.detach().cpu().contiguous().numpy().tobytes()
    elif is_dataclass(value):
        for name, part in sorted(vars(value).items()):
            yield name.encode()
            yield from _content(part)
    elif isinstance(value, tuple | list):
        yield str(len(value)).encode()
        for part in value:
            yield from _content(part)
    elif value is None or isinstance(value, bool | int | float | str):
        yield repr(value).encode()
    else:
        raise TypeError(f"{type(value).__name__} is not plain")
