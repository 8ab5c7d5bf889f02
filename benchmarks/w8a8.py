"""What 8 bits of weights and activations lose, every frame a keyframe: `python benchmarks/w8a8.py [EXPERIMENT ...]`.

Experiments are those of `configs/experiment`; each is calibrated on its own training clips, and measured on its test
clips by agreement with the float network. Real networks and videos are read from RESQ_RL_SHARED.
"""

import sys
import time
from dataclasses import replace

import torch
from torch import Tensor

from resq_rl.experiments.config.composition import load_settings
from resq_rl.experiments.study.study import read_clips
from resq_rl.perception import Pose, Segmentation, Task, class_iou, clip_inputs, example_inputs
from resq_rl.quantization import Inputs, LevelField, RangeEstimator, ResQModel, as_tuple, to_float

EXPERIMENTS = ("pose_davis", "selfie_davis", "selfie_carphone", "demo")
ESTIMATORS: tuple[RangeEstimator, ...] = ("least_squares", "percentile", "min_max")
MOST_CLIPS, BATCH = 8, 10


def keyframes(model: ResQModel, inputs: tuple[Tensor, ...]) -> object:
    """The network's output with every frame a keyframe."""
    count = len(inputs[0])
    field, refresh = LevelField.constant(0, count, len(model.groups)), torch.ones(count, dtype=torch.bool)
    return model.step(inputs, model.new_state(count), refresh, field)[0]


def agreement(model: ResQModel, task: Task, clips: list[Inputs]) -> str:
    """How far predictions at 8 bits are from those in float, in the words of the task."""
    found, wanted = [], []
    for clip in clips:
        for frames in zip(*(part.split(BATCH) for part in as_tuple(clip)), strict=True):
            inputs, size = tuple(map(to_float, frames)), model.frame_size
            found.append(task.predict(task.output(keyframes(model, inputs), size)))
            wanted.append(task.predict(task.output(model.float_forward(inputs), size)))
    own, teacher = torch.cat(found), torch.cat(wanted)
    if isinstance(task, Pose):
        pixels = float((own[..., :2] - teacher[..., :2]).norm(dim=2).mean())
        near = replace(task, share=0.05)
        share = float(near.accuracy(near.counts(own, near.target(teacher)).sum(0)))
        return f"{pixels:.1f} px, {share:.2f} within 0.05 of the box"
    if isinstance(task, Segmentation):
        confusion = task.counts(own, task.target(teacher)).sum(0)
        ious = class_iou(confusion)
        return f"IoU {float(ious[1]):.3f}" if len(ious) == 2 else f"mean IoU {float(task.accuracy(confusion)):.3f}"
    return f"accuracy {float(task.accuracy(task.counts(own, task.target(teacher)).sum(0))):.3f}"


def row(experiment: str) -> str:
    """A row of the table: an experiment, and its agreement by estimator of ranges."""
    settings = load_settings("compare", [f"+experiment={experiment}"])
    task = settings.task.build()
    clips = read_clips(settings.video.build(), ["train", "test"])
    cells = [experiment]
    for estimator in ESTIMATORS:
        config = replace(settings.quantization.config(), range_estimator=estimator)
        model = ResQModel(settings.model.build(), example_inputs(task, clips["train"][0]), config).compile()
        few = clips["train"][: settings.quantization.calibration_clips]
        started = time.process_time()
        model.calibrate([clip_inputs(model.float_forward, task, clip) for clip in few])
        seconds = time.process_time() - started
        test = [clip_inputs(model.float_forward, task, clip) for clip in clips["test"][:MOST_CLIPS]]
        cells.append(f"{agreement(model, task, test)} ({seconds:.0f} s)")
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Print a row for each experiment."""
    torch.set_num_threads(1)
    print(f"| experiment | {' | '.join(ESTIMATORS)} (processor time of calibration) |")
    print("| --- " * (1 + len(ESTIMATORS)) + "|")
    for experiment in sys.argv[1:] or EXPERIMENTS:
        print(row(experiment), flush=True)


if __name__ == "__main__":
    main()
