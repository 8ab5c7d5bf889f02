"""The commands that run a job, and what each of them takes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["COMMANDS", "RESUME", "Command"]


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        help: what it does, in a line.
        config: name of its primary config in `resq_rl.configs`.
        job: "module:function" of `function(settings, run_dir, tracker)`, which may say what is useful next.
        resume: the setting by which an interrupted run goes on, with {folder} for its folder; empty where it cannot.
        example: arguments of a typical call.
        groups: what of the settings it uses, for its page of help; all where there are none.
    """

    help: str
    config: str
    job: str
    resume: str = ""
    example: str = ""
    groups: Sequence[str] = ()


RESUME = "training.resume={folder}"
WORLD = ("video", "model", "task", "quantization", "environment", "tracking")
DEPLOYED = ("model", "task", "tracking")

COMMANDS: Mapping[str, Command] = {
    "train": Command(
        "train a bit-allocation policy by PPO, with checkpoints",
        "train",
        "resq_rl.experiments.jobs.train:run",
        resume=RESUME,
        example="video.speed=2.0 'training.seeds=[0]' training.frames=20000",
        groups=(*WORLD, "training"),
    ),
    "evaluate": Command(
        "measure a trained policy on one split",
        "evaluate",
        "resq_rl.experiments.jobs.evaluate:run",
        example="policy=results/train/DATE/seed0 split=test",
        groups=(*WORLD, "training"),
    ),
    "compare": Command(
        "tune, train and measure all methods, and compare their fronts",
        "compare",
        "resq_rl.experiments.jobs.compare:run",
        resume=RESUME,
        example="+experiment=demo",
        groups=(*WORLD, "training", "heuristic"),
    ),
    "run": Command(
        "run a trained policy on a video file, a folder of frames or a camera",
        "run",
        "resq_rl.experiments.deploy.run:run",
        example="policy=results/train/DATE/seed0 source=drive.mp4",
        groups=(*DEPLOYED, "running"),
    ),
    "export": Command(
        "write a trained policy for other runtimes, and check each file",
        "export",
        "resq_rl.experiments.deploy.export:run",
        example="policy=results/train/DATE/seed0 'exporting.formats=[portable,thresholds]'",
        groups=("video", *DEPLOYED, "environment", "exporting"),
    ),
    "bench": Command(
        "measure how fast the simulation is on this machine",
        "bench",
        "resq_rl.experiments.bench.bench:run",
        example="threads=1 'benchmark.batches=[8]'",
        groups=(*WORLD, "training", "benchmark"),
    ),
    "profile": Command(
        "measure milliseconds of operators and of frames under each method, and the cost table of this machine",
        "profile",
        "resq_rl.experiments.bench.profile:run",
        example="policy=results/compare/DATE",
        groups=(*WORLD, "heuristic", "benchmark"),
    ),
    "pretrain": Command(
        "train a network on labelled video",
        "pretrain",
        "resq_rl.experiments.jobs.pretrain:run",
        resume=RESUME,
        example="pretraining.steps=1500 model.width=24",
        groups=("video", "model", "task", "tracking", "pretraining"),
    ),
}
