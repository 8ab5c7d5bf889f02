"""A job of sweeps that launchers run in other processes, which must be able to import it."""

import json
import os
import time
from pathlib import Path

from resq_rl.errors import VideoError
from resq_rl.experiments.cli.commands import RESUME, Command
from resq_rl.experiments.config.settings import Settings
from resq_rl.experiments.tracking.tracker import Tracker

COMMANDS = {"train": Command("train something", "train", "tests.experiments.sweeping:run", resume=RESUME)}
BROKEN, ENDED, WAITING = 7, 8, 9


def run(settings: Settings, run_dir: Path, tracker: Tracker) -> str | None:
    """Counts how often it began; the seed says how it ends."""
    with (run_dir / "beginnings").open("a") as file:
        file.write(f"{os.getpid()} {Path.cwd()}\n")
    tracker.log_metrics({"seed": settings.seed}, step=1)
    beginnings = len((run_dir / "beginnings").read_text().splitlines())
    match settings.seed:
        case _ if settings.seed == BROKEN:
            raise VideoError("No such video. Check the path.")
        case _ if settings.seed == ENDED and beginnings == 1:
            os._exit(1)
        case _ if settings.seed == WAITING and beginnings == 1:
            time.sleep(600)
    resumed = settings.training.resume is not None
    (run_dir / "summary.json").write_text(json.dumps({"seed": settings.seed, "resumed": resumed}))
    return None
