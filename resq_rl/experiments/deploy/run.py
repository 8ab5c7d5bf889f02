"""`resq-rl run`: a trained policy and its frozen network on a video file, a folder of frames or a camera."""

import csv
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from time import monotonic
from typing import Any, TextIO

import numpy as np
from jaxtyping import UInt8
from rich.console import Console
from rich.table import Table
from torch import Tensor

from resq_rl.errors import ResultsError, SettingsError
from resq_rl.experiments.config.command_settings import RunningSettings
from resq_rl.experiments.config.settings import Settings
from resq_rl.experiments.deploy.overlay import OverlayVideo
from resq_rl.experiments.results.comparison import write_summary
from resq_rl.experiments.runs.progress import stage
from resq_rl.experiments.study.deployment import FILES, policy_folder, policy_words
from resq_rl.experiments.tracking.tracker import Tracker
from resq_rl.policies import AdaptiveRunner, RunCost, Runner
from resq_rl.policies.gradient_policy import adaptable
from resq_rl.policies.runner import REFERENCE_BITS, saved_framing
from resq_rl.video import Framing, VideoStream
from resq_rl.video.images import read_labels

__all__ = ["run"]

log = logging.getLogger(__name__)

Record = dict[str, Any]
FIELDS = ("frame", "time", "keyframe", "bops", "policy_bops", "bits", "mean_bops", "total_bops")
OVERLAY = "overlay.mp4"
ADAPTED = "adapted"


@dataclass
class _Totals:
    """Cost of the frames so far, as shares of W8A8."""

    reference_bops: float
    frames: int = 0
    keyframes: int = 0
    keyframe: float = 0.0
    residual: float = 0.0
    policy: float = 0.0
    peak: float = 0.0

    def add(self, cost: RunCost) -> None:
        self.frames += 1
        self.keyframes += cost.keyframe
        self.keyframe += cost.network if cost.keyframe else 0.0
        self.residual += 0.0 if cost.keyframe else cost.network
        self.policy += cost.policy
        self.peak = max(self.peak, cost.bops)

    @property
    def spent(self) -> float:
        return self.keyframe + self.residual + self.policy

    @property
    def total(self) -> int:
        """Bit-operations, of which shares are rounded."""
        return round(self.spent * self.reference_bops)

    @property
    def mean(self) -> float:
        return self.spent / max(1, self.frames)

    def summary(self) -> dict[str, Any]:
        """By the names of `comparison.json`; parts are per frame."""
        frames = max(1, self.frames)
        return {
            "frames": self.frames,
            "keyframes": self.keyframes,
            "bops": self.mean,
            "keyframe_bops": self.keyframe / frames,
            "residual_bops": self.residual / frames,
            "policy_bops": self.policy / frames,
            "peak_bops": self.peak,
            "bits": REFERENCE_BITS * math.sqrt(self.mean),
            "total_bops": self.total,
            "reference_bops_per_frame": self.reference_bops,
        }


def _runner(settings: Settings, folder: Path) -> Runner:
    """The policy with its network, ready for the first frame."""
    running = settings.running
    kind = AdaptiveRunner if running.adapt else Runner
    runner = kind.load(
        folder,
        settings.model.build(),
        settings.task.build(),
        trade_off=running.trade_off,
        interval=running.interval,
        scene_change=running.scene_change,
        static=running.static,
        framing=_framing(folder, running),
        budget=running.budget or settings.environment.budget,  # of its training, unless another is given
    )
    if settings.quantization.compile:
        runner.problem.model.compile()
    if running.label is not None:
        runner.reset((read_labels(Path(running.label)) > 0).astype(np.uint8))
    return runner


def run(settings: Settings, run_dir: Path, tracker: Tracker) -> str:
    """Run; writes a line per frame, `summary.json` and, if wanted, `overlay.mp4`. An interrupt keeps what is done.

    Returns:
        What is useful next.
    """
    if settings.source is None:
        raise SettingsError("On which video? Set source=PATH, a video file or a folder of frames, or a camera's index.")
    running, folder = settings.running, policy_folder(settings.policy)
    runner = _runner(settings, folder)
    stream = VideoStream(settings.source, stride=runner.framing.stride)
    frames = stream.timed()
    first = next(frames)  # a source that cannot be read ends here, before anything is written
    length = running.frames if stream.length is None else min(stream.length, running.frames or stream.length)
    totals, started, ended = _Totals(runner.problem.reference_bops), monotonic(), "failed"
    try:
        with ExitStack() as stack:
            outputs = [stack.enter_context(_records(run_dir, running))]
            if running.overlay:
                outputs.append(stack.enter_context(_overlay(run_dir, running, runner, stream.rate)))
            advance = stack.enter_context(stage(f"running {Path(stream.name).name}", length))
            for picture, seconds in islice(chain([first], frames), running.frames):
                prediction, cost = runner(picture)
                record = _record(totals, cost, seconds)
                for output in outputs:
                    output(record, picture, runner.frame, prediction, cost)
                advance(1)
        ended = "finished"
    except KeyboardInterrupt:
        ended = "interrupted"
        raise
    finally:
        seconds = monotonic() - started
        speed = {"seconds": seconds, "frames_per_second": totals.frames / seconds}
        what = {"policy": str(folder), "source": stream.name, "settings": runner.policy.settings, "ended": ended}
        learned = {"learned": runner.learned} if isinstance(runner, AdaptiveRunner) else {}
        summary = what | totals.summary() | speed | learned
        tracker.log_artifact(write_summary(run_dir / "summary.json", summary))
        tracker.log_metrics({name: summary[name] for name in ("bops", "peak_bops", "frames_per_second")})
        _print(summary)
        shipped = _adapted(runner, folder, run_dir) if any(learned.values()) else folder
    look = f"look at {os.path.relpath(run_dir / OVERLAY)}; " if running.overlay else ""
    return f"{look}ship the policy: resq-rl export {policy_words(shipped)}"


def _adapted(runner: Runner, folder: Path, run_dir: Path) -> Path:
    """The folder to which what the policy became is saved, with all that it needs to run."""
    adapted = run_dir / ADAPTED
    try:
        adapted.mkdir(exist_ok=True)
        for name in FILES:
            if (folder / name).is_file():
                shutil.copy(folder / name, adapted)
    except OSError as error:
        raise ResultsError(f"Cannot write {adapted}: {error.strerror or error}. Free some space.") from error
    adaptable(runner.policy).save(adapted)
    return adapted


def _framing(folder: Path, running: RunningSettings) -> Framing | None:
    """How frames are brought to the network: as in training, or whole frames by `running.fit`.

    Raises:
        SettingsError: training used windows that follow an object, which a source does not tell.
    """
    framing = saved_framing(folder)
    if framing is None or running.fit is None:
        if framing is not None and framing.crop is not None:
            raise SettingsError(
                f"The policy in {folder} was trained on windows that follow a labelled object, {framing.crop:g} times "
                "as high as it is, and a video does not tell where it is. Run it on whole frames of such windows with "
                "running.fit=stretch (or crop, pad), or give the windows in Python: Runner(frame, window)."
            )
        return framing
    return replace(framing, fit=running.fit, crop=None)


Output = Callable[[Record, Any, UInt8[Tensor, "3 h w"], Tensor, RunCost], None]


def _record(totals: _Totals, cost: RunCost, seconds: float) -> Record:
    number = totals.frames
    totals.add(cost)
    values = (
        number,
        round(seconds, 6),
        cost.keyframe,
        cost.bops,
        cost.policy,
        cost.bits,
        totals.mean,
        totals.total,
    )
    return dict(zip(FIELDS, values, strict=True))


@contextmanager
def _records(run_dir: Path, running: RunningSettings) -> Iterator[Output]:
    """A line per frame, on disk as soon as the frame is done."""
    path = run_dir / f"frames.{running.records}"
    with path.open("w", newline="", encoding="utf-8", buffering=1) as file:
        write = _writer(file, running.records)

        def add(record: Record, *_: Any) -> None:
            try:
                write(record)
            except OSError as error:
                raise ResultsError(
                    f"Cannot write {path}: {error.strerror or error}. Free some space or choose a writable folder with "
                    "results=FOLDER."
                ) from error

        yield add


def _writer(file: TextIO, kind: str) -> Callable[[Record], Any]:
    if kind == "jsonl":
        return lambda record: file.write(json.dumps(record) + "\n")
    writer = csv.DictWriter(file, FIELDS)
    writer.writeheader()
    return writer.writerow


@contextmanager
def _overlay(run_dir: Path, running: RunningSettings, runner: Runner, rate: float) -> Iterator[Output]:
    with OverlayVideo(run_dir / OVERLAY, runner.problem.task, running.height, rate) as video:

        def write(record: Record, picture: Any, frame: Tensor, prediction: Tensor, cost: RunCost) -> None:
            kind = "keyframe" if cost.keyframe else "residual"
            text = (
                f"frame {record['frame']}  {kind}  {cost.bits:.1f} bits, {cost.bops:.3f} of W8A8   "
                f"mean {record['mean_bops']:.3f}   {record['total_bops'] / 1e9:.2f} GBOPs so far"
            )
            # A stretched frame is shown in the proportions of its source.
            height, width = picture.shape[:2] if runner.framing.fit == "stretch" else frame.shape[1:]
            video.add(frame, prediction, cost, text, time=record["time"], proportions=width / height)

        yield write


def _print(summary: dict[str, Any]) -> None:
    table = Table("frames", "keyframes", "BOPs, share of W8A8", "peak", "bits", "frames/s", title=summary["source"])
    names = ("bops", "peak_bops", "bits", "frames_per_second")
    table.add_row(str(summary["frames"]), str(summary["keyframes"]), *(f"{summary[name]:.3g}" for name in names))
    Console().print(table)
