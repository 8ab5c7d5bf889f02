"""`resq-rl pretrain`: train the segmentation network on labelled clips."""

import logging
from dataclasses import asdict
from pathlib import Path

from torch import nn

from resq_rl.errors import NetworkError, SettingsError
from resq_rl.experiments.progress import stage
from resq_rl.experiments.results import write_summary
from resq_rl.experiments.settings import Settings
from resq_rl.experiments.tracking import Tracker
from resq_rl.perception import PretrainProgress, Segmentation, mean_iou, measure_confusion, pretrain

__all__ = ["run"]

log = logging.getLogger(__name__)


def run(settings: Settings, run_dir: Path, tracker: Tracker) -> None:
    """Train; the run folder then holds `weights.safetensors` and `summary.json`."""
    video, network, task = settings.video.build(), settings.model.build(), settings.task.build()
    if not isinstance(network, nn.Module) or not isinstance(task, Segmentation):
        raise (NetworkError if not isinstance(network, nn.Module) else SettingsError)(
            "Pretraining needs model to make an nn.Module and task to make a Segmentation."
        )
    clips = {split: video.clips(split) for split in ("train", "validation", "test")}
    weights = run_dir / "weights.safetensors"
    with stage("pretraining", settings.pretraining.steps) as advance:

        def on_step(progress: PretrainProgress) -> None:
            advance(1)
            if progress.step % 20 == 0 or progress.validation_miou is not None:
                metrics = {"loss": progress.loss, "learning_rate": progress.learning_rate}
                if progress.validation_miou is not None:
                    metrics["validation_miou"] = progress.validation_miou
                    log.info("step %d: validation mean IoU %.4f", progress.step, progress.validation_miou)
                tracker.log_metrics(metrics, progress.step)

        report = pretrain(
            network,
            clips["train"],
            clips["validation"],
            settings.pretraining,
            task=task,
            progress=on_step,
            checkpoint=run_dir / "checkpoint.pt",
            weights=weights,
        )
    test = float(mean_iou(measure_confusion(network, clips["test"], task).sum(0)))
    write_summary(run_dir / "summary.json", {**asdict(report), "test_miou": test, "weights": str(weights)})
    for path in (weights, run_dir / "summary.json"):
        tracker.log_artifact(path)
    log.info("mean IoU: %.4f on validation, %.4f on test; weights in %s", report.validation_miou, test, weights)
