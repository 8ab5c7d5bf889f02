"""The beginning of runs and sweeps, which claims their folders, and the record of a sweep until it ends.

The jobs of a sweep may run in other processes and on other machines: only their folders tell how they ended.
"""

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from resq_rl.checked import convert_dataclass
from resq_rl.errors import ResqError
from resq_rl.experiments.config.composition import explain  # processes of launchers need the resolver registered there
from resq_rl.experiments.config.settings import TrackingSettings
from resq_rl.experiments.runs.folders import claimed, new_folder
from resq_rl.experiments.runs.progress import say_lines
from resq_rl.experiments.runs.record import RunRecord
from resq_rl.experiments.tracking.tracker import Status, Tracker, command_tags, open_tracker, run_name

__all__ = ["FailedJob", "Invocation", "SweepCallback", "become_worker", "end_sweep", "invocation", "job_name"]

PATIENCE: Final = 2.0  # seconds for a process that is just ending to leave the folder


@dataclass
class Invocation:
    """What a command holds until it ends.

    Attributes:
        held: locks of folders.
        sweep: the folder of its sweep, if it is one and was begun.
        tracker: the record of the sweep.
    """

    held: ExitStack
    sweep: Path | None = None
    tracker: Tracker | None = None


# Hydra makes its callbacks itself and sends copies of them to the processes of jobs: this is how they find the command.
_current: ContextVar[Invocation] = ContextVar("invocation")


@contextmanager
def invocation() -> Iterator[Invocation]:
    """Run a command within this context."""
    with ExitStack() as held:
        token = _current.set(Invocation(held))
        try:
            yield _current.get()
        finally:
            _current.reset(token)


@dataclass(frozen=True)
class FailedJob:
    """A job that did not finish.

    Attributes:
        folder: the job's own.
        error: the reason, in one line.
        exit_code: the command's, had it been the only job.
    """

    folder: Path
    error: str
    exit_code: int


def _jobs_of(sweep: Path) -> tuple[int, list[FailedJob]]:
    """The number of jobs that were begun in the folder of a sweep, and those that failed or were killed."""
    # Hydra makes this file before a job begins.
    folders = sorted(path.parent.parent for path in sweep.rglob(".hydra/overrides.yaml"))
    folders.sort(key=lambda folder: int(folder.name) if folder.name.isdecimal() else 0)
    failures = [(folder, RunRecord(folder).failure) for folder in folders]
    return len(folders), [FailedJob(folder, *failure) for folder, failure in failures if failure is not None]


def end_sweep(started: Invocation, status: Status) -> list[FailedJob]:
    """End the record of a sweep; print and return the jobs that failed, unless the sweep was ended from outside."""
    if started.sweep is None:
        return []
    jobs, failed = _jobs_of(started.sweep)
    if started.tracker is not None:
        started.tracker.log_metrics({"jobs": jobs, "failed_jobs": len(failed)})
        started.tracker.close("FAILED" if failed and status == "FINISHED" else status)
    if status == "KILLED" or not failed:
        return []
    print(f"{len(failed)} of {jobs} jobs failed.", file=sys.stderr)
    for job in failed:
        print(f"  {os.path.relpath(job.folder)}: {job.error}", file=sys.stderr)
    return failed


def become_worker(job: str) -> None:
    """Prepare a launcher's process for a job: every line begins with the job's number, and no bars are drawn."""
    say_lines()
    logging.raiseExceptions = False  # a log file on a full disk must not print a traceback for every line
    for handler in logging.getLogger().handlers:
        if not isinstance(handler, logging.FileHandler):
            handler.setFormatter(logging.Formatter(f"[{job}] %(message)s"))


def job_name(command: str, overrides: Sequence[str], folder: Path, sweep: Path | None) -> str:
    """The name of a run; in a sweep, the overrides that the other jobs do not have."""
    try:
        common = [] if sweep is None else OmegaConf.load(sweep / "multirun.yaml").hydra.overrides.task
    except (OSError, OmegaConfBaseException):  # of a sweeper that writes none
        sweep = None
    if sweep is None:
        return run_name(command, overrides, folder)
    return run_name("", [_short(word) for word in overrides if word not in common], folder)


def _short(override: str) -> str:
    """An override without the groups of its setting: MLflow's pages show little of a name."""
    name, equals, value = override.partition("=")
    return f"{name.rpartition('.')[2]}{equals}{value}"


def _varied(overrides: Sequence[str]) -> dict[str, str]:
    """The overrides that give several values, by the name of the setting."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    return {o.get_key_element(): str(o.input_line) for o in parsed if o.is_sweep_override()}


class SweepCallback(Callback):
    """Hydra's callback. Hydra turns its exceptions into warnings, all but those that end the process."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Claim the folder of a run before Hydra writes to it."""
        _claim(config, "run")

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Claim the folder of a sweep and start its record, from which the jobs know under which run to nest."""
        started = _current.get()
        started.sweep = folder = _claim(config, "sweep").absolute()
        try:
            values = OmegaConf.to_container(config.tracking, resolve=True)
            settings = convert_dataclass(values, TrackingSettings, "tracking.")
            words = list(config.hydra.overrides.task)
            varied = _varied(words)
            tracker = open_tracker(
                settings,
                results=Path(config.results).absolute(),
                folder=folder,
                name=run_name(
                    f"sweep {config.hydra.job.name}", [_short(word) for word in varied.values()] or words, folder
                ),
                resume=config.training.resume is not None,
            )
        except ResqError:
            return  # each job reports it
        tracker.set_tags(command_tags(config.hydra.job.name, ["--multirun", *words], folder))
        tracker.log_parameters({key: word.partition("=")[2] for key, word in varied.items()})
        started.tracker = tracker


def _claim(config: DictConfig, mode: Literal["run", "sweep"]) -> Path:
    """Claim the folder that the configuration names, or a new one beside it if only its default name is taken.

    Raises:
        SystemExit: another process writes to the folder; its cause says so.
    """
    try:
        folder, setting = Path(config.hydra[mode].dir), f"hydra.{mode}.dir"
    except OmegaConfBaseException as error:
        raise SystemExit(2) from explain(error, config.hydra.job.config_name, config.hydra.overrides.task)
    asked = [word.partition("=")[0].lstrip("+") for word in config.hydra.overrides.hydra]
    try:
        if config.training.resume is None and not {setting, "hydra.run.dir"} & set(asked):
            made = new_folder(folder)
            if made != folder:
                folder = made
                with open_dict(config):
                    config.hydra[mode].dir = str(made)
                    quoted = str(made).replace("'", "\\'")
                    config.hydra.overrides.hydra.append(f"{setting}='{quoted}'")  # jobs are composed from them
        _current.get().held.enter_context(claimed(folder.absolute(), PATIENCE))
    except ResqError as error:
        raise SystemExit(2) from error
    except OSError:
        pass  # Hydra meets the same error, which is reported as its own
    return folder
