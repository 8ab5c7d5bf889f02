"""Inputs of a float network for a clip, as its task asks for, and its predictions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Num, UInt8
from torch import Tensor

from resq_rl.errors import VideoError
from resq_rl.perception.task import Recurrent, Task
from resq_rl.quantization import Inputs, as_tuple, to_float
from resq_rl.video import Clip

__all__ = [
    "Beginning",
    "beginning_of",
    "beginning_with",
    "clip_inputs",
    "degenerate_output",
    "example_inputs",
    "judged_targets",
    "predict_clip",
    "recurrent_inputs",
]

Forward = Callable[[Inputs], Any]
"""A network as a function of its float inputs: frames, or a tuple of frames and further inputs."""


@dataclass(frozen=True)
class Beginning:
    """What a recurrent task knows of a clip before it runs.

    Attributes:
        prediction: for the first frame, from its label.
        template: the network's input that is made from the first frame, in bytes.
    """

    prediction: Num[Tensor, "*p"]
    template: UInt8[Tensor, "*s"]


def beginning_of(task: Recurrent, clip: Clip) -> Beginning:
    """The beginning of a clip, from its first frame and label.

    Raises:
        VideoError: the clip has no labels, or none that fit.
    """
    if clip.labels is None:
        raise VideoError(
            f"{clip.name} has no labels, but {type(task).__name__} begins with what the first frame's label gives. "
            "Use labelled clips; labels of later frames do not matter with environment.accuracy=teacher."
        )
    task.check(clip)
    return beginning_with(task, clip.frames[0], clip.labels[0])


def beginning_with(task: Recurrent, frame: UInt8[Tensor, "3 h w"], label: Num[Tensor, "*t"]) -> Beginning:
    """What a recurrent task is given with a first frame and its label.

    Raises:
        VideoError: the label shows nothing.
    """
    given = task.given(label)
    if not bool(given.any()):
        raise VideoError(
            "The label of the first frame shows no object, so there is none to follow. Start where it is in view, and "
            "mark it with 1."
        )
    return Beginning(given, task.template(frame, given))


@torch.no_grad()
def predict_clip(
    forward: Forward,
    task: Task,
    clip: Clip,
    *,
    device: torch.device | str = "cpu",
    batch: int = 16,
    progress: Callable[[int], None] | None = None,
) -> Num[Tensor, "t *p"]:
    """A network's predictions for every frame of a clip.

    For a recurrent task the network runs frame by frame on its own last prediction; the first one is given.

    Args:
        forward: the network.
        task: its task.
        clip: the clip, with labels for a recurrent task.
        device: where the network runs.
        batch: frames that run together; those of a recurrent task run alone.
        progress: called with the number of frames done.

    Raises:
        VideoError: a recurrent task finds nothing given. NetworkError: the output does not fit the task.
    """
    recurrent = task if isinstance(task, Recurrent) else None
    starts = [beginning_of(recurrent, clip)] if recurrent is not None else []
    parts: list[Tensor] = [start.prediction[None] for start in starts]
    for frames in clip.frames[len(starts) :].split(1 if starts else batch):
        inputs = frames if recurrent is None else recurrent_inputs(recurrent, frames, parts[-1], starts)
        floats = tuple(to_float(part.to(device)) for part in as_tuple(inputs))
        parts.append(task.predict(task.output(forward(floats), clip.size)).cpu())
        if progress is not None:
            progress(len(frames))
    if progress is not None and starts:
        progress(1)
    return torch.cat(parts)


def recurrent_inputs(
    task: Recurrent, frames: UInt8[Tensor, "b 3 h w"], previous: Num[Tensor, "b *p"], starts: Sequence[Beginning]
) -> Inputs:
    """A network's inputs in bytes for one frame of each clip, where `previous` was predicted for the frames before."""
    return frames, task.memory(previous), torch.stack([start.template for start in starts])


def judged_targets(task: Task, targets: Num[Tensor, "t *u"]) -> Num[Tensor, "t *u"]:
    """A clip's targets, without those that a recurrent task does not count (`Recurrent.judged`)."""
    return task.judged(targets) if isinstance(task, Recurrent) else targets


def clip_inputs(forward: Forward, task: Task, clip: Clip) -> Inputs:
    """A network's inputs in bytes for a clip, for `ResQModel.calibrate`; recurrent ones with its own predictions."""
    if not isinstance(task, Recurrent):
        return clip.frames
    predictions = predict_clip(forward, task, clip)
    previous = torch.cat([predictions[:1], predictions[:-1]])
    return recurrent_inputs(task, clip.frames, previous, [beginning_of(task, clip)] * len(clip))


def example_inputs(task: Task, clip: Clip) -> Inputs:
    """A network's inputs for the first frame of a clip, in float, for wrapping it."""
    if not isinstance(task, Recurrent):
        return to_float(clip.frames[:1])
    start = beginning_of(task, clip)
    return tuple(map(to_float, as_tuple(recurrent_inputs(task, clip.frames[:1], start.prediction[None], [start]))))


def degenerate_output(task: Task, predictions: Sequence[Num[Tensor, "_ *p"]]) -> str | None:
    """A warning where a float network's predictions look as if it were given other frames than it expects.

    Agreement with the float network is no evidence that it works: a network that sees nothing is easy to agree with.

    Args:
        task: its method `degenerate`, if it has one, knows what cannot be right; for other tasks only predictions that
            are the same for all frames are.
        predictions: those of `predict_clip` for each of some clips, best all that it is calibrated on.

    Returns:
        A sentence or two for the user, or None where nothing looks wrong.
    """
    judge = getattr(task, "degenerate", _all_the_same)
    reason = judge(predictions)
    if reason is None:
        return None
    return (
        f"The float network's output looks degenerate on the training clips: {reason}. The network is given RGB frames "
        "in 0..1: if it expects a mean and deviation, BGR or 0..255, set model.mean, model.std, model.channels and "
        "model.value_range. Check its weights and the settings of the task too."
    )


def _all_the_same(predictions: Sequence[Num[Tensor, "_ *p"]]) -> str | None:
    first, frames = predictions[0][:1], sum(map(len, predictions))
    same = frames > 1 and all(bool((prediction == first).all()) for prediction in predictions)
    return f"the prediction is the same for all {frames} frames" if same else None
