"""Accuracy along 740 frames of a motorway with one keyframe: `python benchmarks/drift.py WEIGHTS`.

WEIGHTS are those of `resq-rl pretrain +experiment=still_camera_network`. The network is calibrated on the first hundred
frames, which are quiet. Prints, for each hundred frames, the mean IoU of the float network and of Dynamic ResQ, and
the latter's agreement with float. The video is read from RESQ_RL_SHARED.
"""

import os
import sys
from pathlib import Path

import torch
from torch import Tensor

from resq_rl.envs import NetworkEngine, Problem, Streams
from resq_rl.perception import Segmentation, compact_ddrnet
from resq_rl.policies import DynamicResQ
from resq_rl.quantization import ResQModel
from resq_rl.video import DavisVideo

SIZE, PART = (180, 240), 100
SPLITS = {"train": ["highway[:100]"], "validation": ["highway[100:140]"], "test": ["highway[160:900]"]}
TAUS = (1.9, 4.0)


def main() -> None:
    """Print a row for each threshold."""
    torch.set_num_threads(1)
    root = Path(os.environ.get("RESQ_RL_SHARED", "../shared")) / "data" / "cdnet_highway"
    video = DavisVideo(root=root, splits=SPLITS, year=2017, resolution="240p", size=SIZE, clip_frames={"train": 50})
    network, task = compact_ddrnet(classes=2, weights=sys.argv[1]), Segmentation(classes=2)
    model = ResQModel(network, torch.zeros(1, 3, *SIZE)).compile().calibrate([c.frames for c in video.clips("train")])
    problem = Problem.prepare(model, task, video.clips("test"))
    targets, teacher = problem.targets[0], problem.teacher[0]

    def parts(counts: Tensor) -> str:
        return " | ".join(f"{float(task.accuracy(part.sum(0))):.3f}" for part in counts.split(PART))

    print(f"| float | | {parts(task.counts(teacher, targets))} |")
    for tau in TAUS:
        results = [r for _, r in Streams(NetworkEngine(problem), slots=1).run(DynamicResQ(interval=0, tau=tau))]
        predictions, bops = torch.cat([r.prediction for r in results]), torch.cat([r.bops for r in results])
        print(f"| tau {tau} | {float(bops.mean()):.3f} | {parts(task.counts(predictions, targets))} |")
        print(f"| agreement | | {parts(task.counts(predictions, task.target(teacher)))} |", flush=True)


if __name__ == "__main__":
    main()
