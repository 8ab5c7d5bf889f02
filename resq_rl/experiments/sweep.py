"""The MLflow run of a sweep (--multirun), under which the runs of its jobs are nested."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from resq_rl.errors import ResqError
from resq_rl.experiments.conversion import convert_dataclass
from resq_rl.experiments.settings import TrackingSettings
from resq_rl.experiments.tracking import PARENT_RUN_VARIABLE, Status, Tracker, open_tracker, run_name

__all__ = ["SweepCallback"]


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
            name = run_name(f"sweep {config.hydra.job.name}", list(config.hydra.overrides.task), folder)
            resume = config.training.resume is not None
            tracker = open_tracker(settings, results=results, folder=folder, name=name, resume=resume)
        except ResqError:
            return  # each job reports it
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
