"""Sweeps (--multirun): the MLflow run under which the runs of their jobs are nested, and how each job ended.

A launcher may run jobs in other processes and on other machines. What is known of a job is what it left in its folder.
"""

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from resq_rl.checked import convert_dataclass
from resq_rl.errors import ResqError
from resq_rl.experiments.config import composition  # noqa: F401 - processes of launchers need its resolver
from resq_rl.experiments.config.settings import TrackingSettings
from resq_rl.experiments.runs.progress import say_lines
from resq_rl.experiments.runs.record import RunRecord
from resq_rl.experiments.tracking.tracker import (
    PARENT_RUN_VARIABLE,
    Status,
    Tracker,
    command_tags,
    open_tracker,
    run_name,
)

__all__ = ["FailedJob", "SweepCallback", "become_worker", "end_sweep", "job_name"]


@dataclass(frozen=True)
class FailedJob:
    """A job that did not come to its end.

    Attributes:
        folder: its own.
        error: why, in a line.
        exit_code: that of the command, had it been the only job.
    """

    folder: Path
    error: str
    exit_code: int


def _jobs_of(sweep: Path) -> tuple[int, list[FailedJob]]:
    """The number of jobs that were begun in the folder of a sweep, and those that failed or were ended."""
    # Hydra makes this file before a job begins.
    folders = sorted(path.parent.parent for path in sweep.rglob(".hydra/overrides.yaml"))
    folders.sort(key=lambda folder: int(folder.name) if folder.name.isdecimal() else 0)
    failures = [(folder, RunRecord(folder).failure) for folder in folders]
    return len(folders), [FailedJob(folder, *failure) for folder, failure in failures if failure is not None]


def end_sweep(folder: Path, status: Status) -> list[FailedJob]:
    """End the record of the sweep in progress, and say and return which jobs failed, unless it was ended itself."""
    jobs, failed = _jobs_of(folder)
    SweepCallback.finish(
        {"jobs": jobs, "failed_jobs": len(failed)}, "FAILED" if failed and status == "FINISHED" else status
    )
    if status == "KILLED" or not failed:
        return []
    print(f"{len(failed)} of {jobs} jobs failed.", file=sys.stderr)
    for job in failed:
        print(f"  {os.path.relpath(job.folder)}: {job.error}", file=sys.stderr)
    return failed


def become_worker(job: str) -> None:
    """Prepare a process of a launcher for a job: lines tell which job they are of, and there are no bars."""
    say_lines()
    logging.raiseExceptions = False  # a log file on a full disk must not print a traceback for every line
    for handler in logging.getLogger().handlers:
        if not isinstance(handler, logging.FileHandler):
            handler.setFormatter(logging.Formatter(f"[{job}] %(message)s"))


def job_name(command: str, overrides: Sequence[str], folder: Path) -> str:
    """The name of a run; of one in a sweep, what tells it from the others."""
    try:
        common = OmegaConf.load(folder.parent / "multirun.yaml").hydra.overrides.task
    except (OSError, OmegaConfBaseException):  # no sweep, or of a sweeper that writes none
        return run_name(command, overrides, folder)
    return run_name("", [_short(word) for word in overrides if word not in common], folder)


def _short(override: str) -> str:
    """Without the groups that a setting is in: MLflow's pages show little of a name."""
    name, equals, value = override.partition("=")
    return f"{name.rpartition('.')[2]}{equals}{value}"


def _varied(overrides: Sequence[str]) -> dict[str, str]:
    """The overrides that give several values, by the name of the setting."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    return {o.get_key_element(): str(o.input_line) for o in parsed if o.is_sweep_override()}


class SweepCallback(Callback):
    """Hydra's callback that starts the parent run; Hydra makes its own instances, so the run is kept by the class."""

    folder: ClassVar[Path | None] = None
    _tracker: ClassVar[Tracker | None] = None
    _outer_parent: ClassVar[str | None] = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Start the parent run and name it in the environment, which the processes of jobs inherit."""
        folder = SweepCallback.folder = Path(config.hydra.sweep.dir).absolute()
        try:
            values = OmegaConf.to_container(config.tracking, resolve=True)
            settings = convert_dataclass(values, TrackingSettings, "tracking.")
            results = Path(config.results).absolute()
            words = list(config.hydra.overrides.task)
            varied = _varied(words)
            name = run_name(
                f"sweep {config.hydra.job.name}", [_short(word) for word in varied.values()] or words, folder
            )
            resume = config.training.resume is not None
            tracker = open_tracker(settings, results=results, folder=folder, name=name, resume=resume)
        except ResqError:
            return  # each job reports it
        tracker.set_tags(command_tags(config.hydra.job.name, ["--multirun", *words], folder))
        tracker.log_parameters({key: word.partition("=")[2] for key, word in varied.items()})
        if tracker.run_id is not None:
            SweepCallback._tracker = tracker
            SweepCallback._outer_parent = os.environ.get(PARENT_RUN_VARIABLE)
            os.environ[PARENT_RUN_VARIABLE] = tracker.run_id

    @classmethod
    def finish(cls, counts: Mapping[str, float], status: Status) -> None:
        """End the parent run, if there is one, with `counts` as its metrics."""
        tracker, cls._tracker, cls.folder = cls._tracker, None, None
        if tracker is None:
            return
        tracker.log_metrics(counts)
        tracker.close(status)
        del os.environ[PARENT_RUN_VARIABLE]
        if cls._outer_parent is not None:
            os.environ[PARENT_RUN_VARIABLE] = cls._outer_parent
