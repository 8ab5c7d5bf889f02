"""Accuracy after a start and after a cut, under budgets: `python benchmarks/recovery.py`.

Generated clips with one or two cuts each. For every budget, the rate controller (constant thresholds, tuned on
validation clips) runs without a keyframe, and a row says how many points of mean IoU it loses against the float network
by frames since the scene began; another, with a rule for changes of scene, which runs what fits of a keyframe. The
first row is W2A2 on every frame, whose cost is 1/16 of W8A8.
"""

import math
from collections.abc import Iterator
from itertools import product

import torch

from resq_rl.envs import Policy, Problem, measure, trace
from resq_rl.perception import Segmentation, compact_ddrnet
from resq_rl.policies import PerFrame, RateControl
from resq_rl.quantization import Budget, QuantizationConfig, ResQModel
from resq_rl.video import Clip, GeneratedVideo, Split

CALIBRATION, VALIDATION, TEST = 12, 8, 24
BUDGETS = (Budget(peak=0.25, mean=0.12), Budget(peak=0.15, mean=0.08))
TAUS, INTEGRALS, FILLS = (0.3, 0.7, 1.0), (2.0, 8.0), (0.3, 0.7)
SCENE_CHANGES = {"": (math.inf,), ", rule for changes of scene": (0.2, 0.3, 0.4)}
SINCE = ((0, 1), (1, 2), (2, 4), (4, 8), (8, 16), (16, 48))  # frames since the scene began: from, to
CUT = 0.1  # share of the pixels that change their class; motion stays below


def main() -> None:
    """Print a table for starts and one for cuts."""
    torch.set_num_threads(1)
    video = GeneratedVideo(cuts=1.0)
    model = calibrated(video, QuantizationConfig())
    two = calibrated(video, QuantizationConfig(key_weight_bits=2, key_activation_bits=2))
    validation, test = (problem_of(model, video, *part) for part in (("validation", VALIDATION), ("test", TEST)))
    rows: list[tuple[str, Problem, Policy, Budget | None]] = [
        ("W2A2", problem_of(two, video, "test", TEST), PerFrame("previous"), None)
    ]
    for budget, (rule, changes) in product(BUDGETS, SCENE_CHANGES.items()):
        grid = [
            RateControl("previous", taus=(tau,), integral=gain, fill=fill, scene_change=change)
            for tau, gain, fill, change in product(TAUS, INTEGRALS, FILLS, changes)
        ]
        best = max(grid, key=lambda policy: measure(validation, policy, budget=budget).accuracy)
        name = f"peak {budget.peak}, mean {budget.mean}{rule}"
        print(f"{name}: {best.settings}", flush=True)
        rows.append((name, test, best, budget))
    for cut, title in ((False, "since the start"), (True, "since a cut")):
        print(f"| frames {title} | {' | '.join(f'{a} to {b - 1}' if b > a + 1 else f'{a}' for a, b in SINCE)} |")
        print("| --- " * (len(SINCE) + 1) + "|")
        for name, problem, policy, own in rows:
            lost = points_lost(problem, policy, own, cut=cut)
            print(f"| {name} | {' | '.join(f'{points:.1f}' for points in lost)} |", flush=True)


def calibrated(video: GeneratedVideo, config: QuantizationConfig) -> ResQModel:
    """The default network at a quantization."""
    model = ResQModel(compact_ddrnet(), torch.zeros(1, 3, *video.size), config).compile()
    return model.calibrate([video.clip("train", i).frames for i in range(CALIBRATION)])


def problem_of(model: ResQModel, video: GeneratedVideo, split: Split, clips: int) -> Problem:
    """Some clips of a split."""
    return Problem.prepare(model, Segmentation(), [video.clip(split, i) for i in range(clips)])


def scenes(clip: Clip) -> Iterator[tuple[int, int, bool]]:
    """First frame of every scene, the frame behind its last, and whether it begins with a cut."""
    assert clip.labels is not None  # as of all generated clips
    change = (clip.labels[1:] != clip.labels[:-1]).float().mean((1, 2))
    starts = [0, *(torch.nonzero(change > CUT)[:, 0] + 1).tolist()]
    for first, behind in zip(starts, [*starts[1:], len(clip)], strict=True):
        yield first, behind, first > 0


def points_lost(problem: Problem, policy: Policy, budget: Budget | None, *, cut: bool) -> list[float]:
    """Points of mean IoU below the float network, by frames since a start or a cut."""
    task, counts = problem.task, torch.zeros(len(SINCE), 2, *problem.float_counts.shape[1:], dtype=torch.float64)
    for i, clip in enumerate(problem.clips):
        own = task.counts(trace(problem, policy, clip=i, budget=budget).prediction, problem.targets[i])
        both = torch.stack([own, task.counts(problem.teacher[i], problem.targets[i])], 1)
        for first, behind, begun in scenes(clip):
            for k, (start, end) in enumerate(SINCE) if begun == cut else ():
                counts[k] += both[min(first + start, behind) : min(first + end, behind)].sum(0)
    return [100 * float(task.accuracy(found[1]) - task.accuracy(found[0])) for found in counts]


if __name__ == "__main__":
    main()
