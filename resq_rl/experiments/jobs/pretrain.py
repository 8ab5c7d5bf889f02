"""`resq-rl pretrain`: train a network on labelled clips."""

import logging
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from resq_rl.errors import NetworkError, SettingsError
from resq_rl.experiments.config.settings import Settings
from resq_rl.experiments.results.comparison import write_summary
from resq_rl.experiments.runs.progress import stage
from resq_rl.experiments.tracking.tracker import Tracker
from resq_rl.perception import (
    PretrainProgress,
    PretrainReport,
    Segmentation,
    Trainable,
    class_iou,
    measure_counts,
    pretrain,
)

__all__ = ["run"]

log = logging.getLogger(__name__)


def run(settings: Settings, run_dir: Path, tracker: Tracker) -> str:
    """Train; the run folder then holds `weights.safetensors` and `summary.json`. Returns the next useful command."""
    video, network, task = settings.video.build(), settings.model.build(), settings.task.build()
    if not isinstance(network, nn.Module) or not isinstance(task, Trainable):
        raise (NetworkError if not isinstance(network, nn.Module) else SettingsError)(
            f"Pretraining needs model to make an nn.Module and task a Trainable, got a {type(network).__name__} and a "
            f"{type(task).__name__}."
        )
    clips = {split: video.clips(split) for split in ("train", "validation", "test")}
    weights = run_dir / "weights.safetensors"
    with stage("pretraining", settings.pretraining.steps) as advance:

        def on_step(progress: PretrainProgress) -> None:
            advance(1)
            if progress.step % 20 == 0 or progress.validation is not None:
                metrics = {"loss": progress.loss, "learning_rate": progress.learning_rate}
                if progress.validation is not None:
                    metrics["validation_accuracy"] = progress.validation
                    log.info("step %d: validation %s %.4f", progress.step, task.metric, progress.validation)
                tracker.log_metrics(metrics, progress.step)

        report = pretrain(
            network,
            clips["train"],
            clips["validation"],
            settings.pretraining,
            task=task,
            progress=on_step,
            checkpoint=run_dir / "checkpoints",
            weights=weights,
        )
    test = float(task.accuracy(measure_counts(network, clips["test"], task).sum(0)))
    write_summary(run_dir / "summary.json", {**_summary(task, report, test), "weights": str(weights)})
    for path in (weights, run_dir / "summary.json"):
        tracker.log_artifact(path)
    table = Table("steps", f"{task.metric}, validation", f"{task.metric}, test", title=os.path.relpath(weights))
    table.add_row(str(report.best_step), f"{report.validation:.4f}", f"{test:.4f}")
    Console().print(table)
    return f"resq-rl compare model.weights={os.path.relpath(weights)}, with the video and task of this run"


def _summary(task: Trainable, report: PretrainReport, test: float) -> dict[str, Any]:
    summary = {"metric": task.metric, "validation_accuracy": report.validation, "test_accuracy": test}
    if task.metric == Segmentation().metric:  # names from when this was the only task
        summary |= {"validation_miou": report.validation, "test_miou": test}
        summary |= {"class_iou": class_iou(report.counts).tolist()}
    return {**summary, "best_step": report.best_step, "history": report.history, "seconds": report.seconds}
