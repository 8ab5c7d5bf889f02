"""A policy on other video than it was trained on, as it is and adapted: `python benchmarks/adaptation.py FOLDER`.

FOLDER holds a policy of the default network whose thresholds were learned by gradients, such as `seed0` of a run of
`resq-rl compare training.trainer=gradient`. Prints, for each kind of video, the mean change of BOPs at equal accuracy
on test clips against the best of many settings of Dynamic ResQ: of the policy, of the policy that went on learning on
training clips, whose labels nobody looks at, and of one that did so while it ran on them as a stream (running.adapt).
The model is that of the folder throughout.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from resq_rl.envs import Measurement, Problem, measure
from resq_rl.experiments.results.fronts import compare_fronts
from resq_rl.perception import Segmentation, compact_ddrnet
from resq_rl.policies import AdaptiveRunner, DynamicResQ, GradientSettings, LearnedPolicy
from resq_rl.policies.gradient_policy import adapt_policy
from resq_rl.quantization import DEFAULT_KAPPA, load_model
from resq_rl.video import Clip, GeneratedVideo, Split

VIDEOS = {
    "as in training": GeneratedVideo(),
    "noise of 0.05 instead of 0.02": GeneratedVideo(noise=0.05),
    "twice as fast": GeneratedVideo(speed=2.0),
    "night": GeneratedVideo(noise=0.03),
}
NIGHT = 0.35  # of the brightness
TRAINING, TEST, STREAM = 24, 12, 24
LEARNING = (3_000, 12_000)
RATES = 0.02, 0.004
TAUS, KAPPAS = (0.3, 0.45, 0.7, 1.0, 1.4, 1.95, 2.8), (DEFAULT_KAPPA, (1.0, 2.0, 6.0), (1.0, 1.6, 6.0))
PLACES, STREAMS = np.linspace(0, 1, 8), (0.45, 0.6, 0.75)  # of lambda


def clips(name: str, split: Split, count: int) -> list[Clip]:
    """The first clips of a kind of video."""
    found = [VIDEOS[name].clip(split, i) for i in range(count)]
    return [replace(c, frames=(c.frames * NIGHT).byte()) for c in found] if name == "night" else found


def at(policy: LearnedPolicy, place: float) -> LearnedPolicy:
    """The policy at a place of lambda in its range."""
    low, high = policy.trade_off_range
    return policy.at(low ** (1 - place) * high**place)


def streamed(problem: Problem, policy: LearnedPolicy) -> LearnedPolicy:
    """What the policy becomes on the clips of a problem as one stream."""
    runner = AdaptiveRunner(policy, replace(problem, clips=()))
    for clip in problem.clips:
        for frame in clip.frames:
            runner(frame)
    assert isinstance(runner.policy, LearnedPolicy)
    return runner.policy


def main() -> None:
    """Measure every kind of video, and print a row for each."""
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    policy, model = LearnedPolicy.load(folder), load_model(folder, compact_ddrnet()).compile()
    task, grid = Segmentation(), policy.scheme.grid
    columns = "as it is", *(f"{frames:,} frames of learning" for frames in LEARNING), "while running"
    print(f"| video | float mean IoU | {' | '.join(columns)} |\n| --- | --- {'| --- ' * len(columns)}|", flush=True)
    for name in sys.argv[2:] or VIDEOS:
        test = Problem.prepare(model, task, clips(name, "test", TEST), grid=grid)
        unlabelled = Problem.prepare(model, task, clips(name, "train", TRAINING), grid=grid, source="teacher")
        stream = Problem(model, task, grid, clips=tuple(clips(name, "train", STREAM)))
        heuristics = [DynamicResQ("previous", 0, tau=tau, kappa=kappa) for tau in TAUS for kappa in KAPPAS]
        anchors = [measure(test, heuristic) for heuristic in heuristics]
        adapted = [
            adapt_policy(policy, unlabelled, GradientSettings(n, learning_rate=RATES[0], network_rate=RATES[1]))
            for n in LEARNING
        ]
        fronts = [[measure(test, at(own, place)) for place in PLACES] for own in (policy, *adapted)]
        fronts.append([measure(test, streamed(stream, at(policy, place))) for place in STREAMS])
        cells = changes(fronts, anchors, test.float_accuracy)
        print(f"| {name} | {test.float_accuracy:.3f} | {' | '.join(cells)} |", flush=True)


def changes(fronts: Sequence[Sequence[Measurement]], anchors: Sequence[Measurement], accuracy: float) -> list[str]:
    """BD-BOPs of each front against the anchors, with 95% intervals."""
    cells = []
    for front in fronts:
        entry = compare_fronts({0: front}, anchors, float_accuracy=accuracy, seed=0)
        interval = "no interval" if entry.ci95 is None else f"[{entry.ci95[0]:+.1f}, {entry.ci95[1]:+.1f}]"
        cells.append("no overlap" if entry.value is None else f"{entry.value:+.1f}% {interval}")
    return cells


if __name__ == "__main__":
    main()
