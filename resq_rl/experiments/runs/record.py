"""The record of a run, `run.json`: its commands, versions and hardware, and how each session ended."""

import json
import os
import platform
import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from resq_rl.experiments.config.settings import Settings
from resq_rl.experiments.runs.provenance import versions
from resq_rl.files import write_atomic

__all__ = ["RECORD", "RunRecord"]

RECORD = "run.json"


class RunRecord:
    """The record of one run. A run that goes on adds a session to it.

    Args:
        folder: the run's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / RECORD
        self._values = self._read()
        self._begun = False

    @property
    def finished(self) -> bool:
        """Whether the run has finished."""
        return self._values.get("status") == "finished"

    @property
    def overrides(self) -> list[str]:
        """The overrides of the newest session, merged with those of earlier ones."""
        sessions = self._values.get("sessions") or [{}]
        return [str(override) for override in sessions[-1].get("overrides", [])]

    def command_line(self, command: str) -> str:
        """The command that runs the same again in a new folder."""
        return shlex.join(["resq-rl", command, *self.overrides])

    @property
    def failure(self) -> tuple[str, int] | None:
        """Why the newest session did not finish, and its exit code; None if it did."""
        newest = self._values.get("refused") or (self._values.get("sessions") or [{}])[-1]
        if "error" in newest:
            return str(newest["error"]), int(newest.get("exit_code", 1))
        if self.finished:
            return None
        return "interrupted" if self._values.get("status") == "interrupted" else "ended from outside", 1

    def begin(self, command: Sequence[str], overrides: Sequence[str], settings: Settings, *, resume: bool) -> None:
        """Write the beginning of a session.

        Args:
            command: as the user gave it.
            overrides: those of this session, merged with those of earlier ones.
            settings: the checked settings.
            resume: whether earlier sessions are kept.

        Raises:
            ResultsError: the file cannot be written.
        """
        before = self._values.get("sessions", []) if resume else []
        session = _session(settings) | {"command": list(command), "overrides": list(overrides)}
        self._values = {"status": "running", "sessions": [*before, session]}
        self._begun = True
        self._write()

    def end(self, status: str) -> Path:
        """Write how the session ended: "finished", "failed" or "interrupted".

        Raises:
            ResultsError: the file cannot be written.
        """
        self._values["status"] = status
        self._values["sessions"][-1]["ended"] = _now()
        return self._write()

    def fail(self, error: str, exit_code: int) -> None:
        """Write why this session failed. One that was refused before it began does not change the state of the run.

        Raises:
            ResultsError: the file cannot be written.
        """
        reason = {"error": error, "exit_code": exit_code}
        if self._begun:
            self._values["sessions"][-1] |= {"ended": _now()} | reason
            self._values["status"] = "failed"
        else:
            self._values = {"status": "refused", "sessions": []} | self._values | {"refused": reason}
        self._write()

    def keep(self) -> None:
        """Remove the note that a session was refused: the run has what this session asks for."""
        if self._values.pop("refused", None) is not None:
            self._write()

    def _read(self) -> dict[str, Any]:
        try:
            values = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return {}
        return values if isinstance(values, dict) and isinstance(values.get("sessions"), list) else {}

    def _write(self) -> Path:
        return write_atomic(self.path, json.dumps(self._values, indent=2) + "\n")


def _session(settings: Settings) -> dict[str, Any]:
    return {
        "started": _now(),
        "versions": versions(settings),
        "processor": {
            "name": _processor(),
            "cores": os.cpu_count(),
            "kernels": torch.backends.cpu.get_cpu_capability(),
        },
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
