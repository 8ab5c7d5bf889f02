"""Settings of single commands: `bench` and `profile`, `run`, and `export`."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from resq_rl.checked import Checked, Count, NotNegative, Positive
from resq_rl.quantization.specification.budget import BudgetSetting
from resq_rl.video import Fit

__all__ = ["BenchmarkSettings", "ExportSettings", "RunningSettings"]


@dataclass(frozen=True)
class BenchmarkSettings(Checked):
    """What `bench` and `profile` measure.

    Attributes:
        batches: clips that one step of `bench` runs.
        rounds: how often all that is compared runs in turn.
        processes: environments of one clip, each in a process of its own, that region agents are compared with.
        soak_steps: steps over which memory must not grow.
        frames: frames of a clip that `profile` times, after the first.
        compiled: whether `profile` also times the float network under torch.compile, which takes a minute or more.
    """

    _group: ClassVar[str] = "benchmark."

    batches: Annotated[tuple[Count, ...], Field(min_length=1)] = (1, 8, 32)
    rounds: Count = 9
    processes: Count = 8
    soak_steps: Count = 10_000
    frames: Count = 24
    compiled: bool = True


@dataclass(frozen=True)
class RunningSettings(Checked):
    """How `run` runs a policy on the video of `source`.

    Attributes:
        trade_off: lambda to decide for; None for the middle of the policy's range.
        interval: frames between keyframes, 0 for the first only; None for the policy's own timing.
        scene_change: mean residual above which a frame runs as a keyframe too, 1 for never; None for the policy's own.
        static: whether to run a policy's beginning, the static thresholds of its base, without its network.
        adapt: whether the policy goes on learning from the stream (`resq_rl.policies.AdaptiveRunner`), without labels.
            The run's folder then has the policy that it became, `adapted`.
        label: image of the mask that the first frame is given, for a task that begins with one (all but 0 is the
            object); or None.
        fit: how whole frames fill the network's size, "stretch", "crop" or "pad"; None for as in training.
        frames: most frames to run; None for all, or until interrupted.
        overlay: whether to draw the prediction, the bits and BOPs so far to `overlay.mp4`.
        height: height of the overlay in pixels.
        records: format of the file with a line per frame, "jsonl" or "csv".
        budget: what the frames of the stream may cost, {peak, mean, bucket} as of `resq_rl.quantization.Budget`; None
            for that of training, environment.budget.
    """

    _group: ClassVar[str] = "running."

    trade_off: Positive | None = None
    interval: NotNegative | None = None
    scene_change: Positive | None = None
    static: bool = False
    adapt: bool = False
    label: str | None = None
    fit: Fit | None = None
    frames: Count | None = None
    overlay: bool = True
    height: Annotated[int, Field(ge=16, le=4320)] = 360
    records: Literal["jsonl", "csv"] = "jsonl"
    budget: BudgetSetting = None


@dataclass(frozen=True)
class ExportSettings(Checked):
    """What `export` writes, and checks on the clips of `split`.

    Attributes:
        formats: "portable" (safetensors and JSON), "thresholds" (a table), "onnx" (needs the extra), "mlflow".
        trade_offs: rows of the table, spread over the policy's range of lambda.
        name: name under which the MLflow model is registered; None to register none.
    """

    _group: ClassVar[str] = "exporting."

    formats: Annotated[tuple[Literal["mlflow", "onnx", "portable", "thresholds"], ...], Field(min_length=1)] = (
        "portable",
        "thresholds",
        "onnx",
        "mlflow",
    )
    trade_offs: Count = 4
    name: str | None = "resq-rl-policy"
