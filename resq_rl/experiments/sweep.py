"""The MLflow run of a sweep (--multirun), under which the runs of its jobs are nested."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from resq_rl.errors import ResqError
from resq_rl.experiments.conversion import convert_dataclass
from resq_rl.experiments.settings import TrackingSettings
from resq_rl.experiments.tracking import PARENT_RUN_VARIABLE, Status, Tracker, command_tags, open_tracker, run_name

__all__ = ["SweepCallback", "job_name"]


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

    _tracker: ClassVar[Tracker | None] = None
    _outer_parent: ClassVar[str | None] = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Start the parent run and name it in the environment, which the processes of jobs inherit."""
        try:
            values = OmegaConf.to_container(config.tracking, resolve=True)
            settings = convert_dataclass(values, TrackingSettings, "tracking.")
            folder = Path(config.hydra.sweep.dir).absolute()
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
        tracker, cls._tracker = cls._tracker, None
        if tracker is None:
            return
        tracker.log_metrics(counts)
        tracker.close(status)
        del os.environ[PARENT_RUN_VARIABLE]
        if cls._outer_parent is not None:
            os.environ[PARENT_RUN_VARIABLE] = cls._outer_parent
