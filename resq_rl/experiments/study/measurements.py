"""Measurements kept in a run's folder under all that they depend on: a run that goes on does not repeat them."""

import hashlib
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from resq_rl.envs import Measurement, Policy, Problem, measure
from resq_rl.envs.table_cache import fingerprints
from resq_rl.experiments.runs.progress import Advance
from resq_rl.quantization import Budget
from resq_rl.sealed import ContentStore

__all__ = ["MEASUREMENTS", "Measurements"]

MEASUREMENTS = "measurements"  # in the run's folder


class Measurements:
    """Measures policies, each once.

    Args:
        folder: where measurements are kept; None to keep nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self._store = ContentStore(folder)
        self._problems: dict[int, tuple[Problem, str]] = {}

    def measure(
        self,
        problem: Problem,
        policy: Policy,
        slots: int,
        advance: Advance | None = None,
        budget: Budget | None = None,
    ) -> Measurement:
        """What `resq_rl.envs.measure` gives."""
        key = self._key(problem, policy, slots, budget)
        known = None if key is None else self._store.get(key)
        if known is not None:
            if advance is not None:
                advance(problem.frames)
            return Measurement(**known, task=problem.task, settings=policy.settings)
        result = measure(problem, policy, slots=slots, budget=budget, progress=advance)
        if key is not None:
            names = [f.name for f in fields(result) if f.name not in ("task", "settings")]
            self._store.put(key, {name: getattr(result, name) for name in names})
        return result

    def _key(self, problem: Problem, policy: Policy, slots: int, budget: Budget | None) -> str | None:
        """SHA-256 of all that a measurement depends on; None where that cannot be told, as of unknown policies."""
        if self._store.folder is None:
            return None
        digest = hashlib.sha256(self._fingerprint(problem).encode())
        digest.update(repr(slots if budget is None else (slots, budget)).encode())
        try:
            for part in _content(policy):
                digest.update(len(part).to_bytes(8, "little"))
                digest.update(part)
        except TypeError:
            return None
        return digest.hexdigest()

    def _fingerprint(self, problem: Problem) -> str:
        """SHA-256 of a problem, computed once; the problem is kept so that no other takes its id."""
        if id(problem) not in self._problems:
            digest = hashlib.sha256()
            for clip in fingerprints(problem, range(len(problem))):
                digest.update(clip.encode())
            self._problems[id(problem)] = problem, digest.hexdigest()
        return self._problems[id(problem)][1]


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
