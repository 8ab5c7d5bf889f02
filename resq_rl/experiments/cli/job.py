"""Running the job of a command: settings are checked and kept, the run is recorded, shortages are named."""

import errno
import importlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from resq_rl.errors import ResultsError, SettingsError
from resq_rl.experiments.cli.commands import Command
from resq_rl.experiments.config.settings import Settings, make_settings, plain
from resq_rl.experiments.runs.record import RunRecord
from resq_rl.experiments.runs.resume import (
    CONFIG,
    kept_text,
    merged_overrides,
    with_kept_settings,
    with_policy_settings,
)
from resq_rl.experiments.runs.sweep import job_name
from resq_rl.experiments.study.deployment import policy_folder, saved_settings
from resq_rl.experiments.tracking.outbox import recorded_run
from resq_rl.experiments.tracking.tracker import Tracker, command_tags, open_tracker
from resq_rl.files import write_atomic

__all__ = ["run_job"]

log = logging.getLogger(__name__)

OUT_OF_MEMORY = ("can't allocate memory", "out of memory")  # as PyTorch says it, of CPU and GPU
DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def run_job(
    name: str,
    command: Command,
    arguments: Sequence[str],
    config: DictConfig,
    record: RunRecord,
    overrides: Sequence[str],
    sweep: Path | None,
) -> None:
    """Run a command's job in the folder of its record, tracked and recorded.

    Args:
        name, command: the command's name, and its job and settings.
        arguments: the command line, for the record.
        config: the composed settings.
        record: the run's record.
        overrides: Hydra's overrides, from which `config` was composed.
        sweep: the folder of the sweep that the job is one of, if any.
    """
    run_dir, composed = record.path.parent, plain(config)
    resume = (composed.get("training") or {}).get("resume") is not None
    if resume and not command.resume:
        raise SettingsError(f"`resq-rl {name}` cannot go on from a run: leave training.resume out.")
    values = _with_earlier_settings(command, run_dir, composed, overrides, resume=resume)
    overrides = merged_overrides(record.overrides, overrides) if resume else overrides
    settings = make_settings(values)
    values = values | {"training": values["training"] | {"resume": None}, "trusted": False}  # how to go on is not kept
    text = OmegaConf.to_yaml(OmegaConf.create(values))
    if resume and record.finished and kept_text(run_dir) == text:
        log.info("%s is finished already.", os.path.relpath(run_dir))
        record.keep()
        return
    resolved = write_atomic(run_dir / CONFIG, text)
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)  # of networks without weights
    record.begin(["resq-rl", name, *arguments], overrides, settings, resume=resume)
    tracker = _tracker(settings, run_dir, job_name(name, overrides, run_dir, sweep), sweep, resume=resume)
    with tracker, _recorded(record, tracker):
        tracker.set_tags(command_tags(name, overrides, run_dir))
        tracker.log_parameters(values)
        tracker.log_artifact(resolved)
        log.info("Will %s. Results go to %s", command.help, os.path.relpath(run_dir))
        with _named_shortage(name, settings):
            following = _job_of(command)(settings, run_dir, tracker)
    _say_results(run_dir, tracker, following)


def _job_of(command: Command) -> Callable[..., str | None]:
    module, _, function = command.job.partition(":")
    job: Callable[..., str | None] = getattr(importlib.import_module(module), function)
    return job


def _tracker(settings: Settings, run_dir: Path, name: str, sweep: Path | None, *, resume: bool) -> Tracker:
    results, parent = Path(settings.results).absolute(), None if sweep is None else recorded_run(sweep)
    return open_tracker(settings.tracking, results=results, folder=run_dir, name=name, parent=parent, resume=resume)


def _say_results(run_dir: Path, tracker: Tracker, following: str | None) -> None:
    log.info("Results: %s", os.path.relpath(run_dir))
    if tracker.hint:
        log.info("Tracking: %s", tracker.hint)
    if following:
        log.info("Next: %s", following)


def _with_earlier_settings(
    command: Command, run_dir: Path, composed: dict[str, Any], overrides: Sequence[str], *, resume: bool
) -> dict[str, Any]:
    """The composed settings, after those of the run that goes on or of the policy's training."""
    if resume:
        return with_kept_settings(run_dir, command.config, composed, overrides)
    if composed.get("policy") is not None:
        folder = policy_folder(composed["policy"])
        return with_policy_settings(saved_settings(folder), folder, command.config, composed, overrides)
    return composed


@contextmanager
def _named_shortage(command: str, settings: Settings) -> Iterator[None]:
    """Turn a shortage of memory or disk into an error that names the setting to lower or the way to go on."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in OUT_OF_MEMORY):
            raise
        name, value = "environment.clips_per_batch", settings.environment.clips_per_batch
        if command == "pretrain":
            name, value = "pretraining.batch", settings.pretraining.batch
        raise SettingsError(
            f"Out of memory with {name}={value}: lower it, or video.size ({str(error).splitlines()[0][:200]})."
        ) from error
    except OSError as error:
        if error.errno not in DISK_TROUBLE:
            raise
        raise ResultsError(
            f"Cannot write {error.filename or 'a file'}: {error.strerror}. Free some space or choose a writable "
            "folder, then go on with training.resume=FOLDER; what was done is kept."
        ) from error


@contextmanager
def _recorded(record: RunRecord, tracker: Tracker) -> Iterator[None]:
    """Record how a job ends, also if it raises."""
    status = "failed"
    try:
        yield
        status = "finished"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        with suppress(ResultsError) if status != "finished" else nullcontext():  # the job's own error counts
            tracker.log_artifact(record.end(status))
