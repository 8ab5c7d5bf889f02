"""Thresholds learned under one cost table, measured under the others: `python benchmarks/cost_transfer.py [FOLDER]`.

Prints a table: learned under the cost of a row and measured under that of a column, the mean change of cost at equal
accuracy against Dynamic ResQ, whose thresholds and kappa are those that are best under the column's cost. FOLDER has
the `cost.yaml` of `resq-rl profile`, which adds the costs that were measured on this machine.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from resq_rl.envs import Measurement, Policy, Problem, measure
from resq_rl.experiments.results.fronts import compare_fronts
from resq_rl.perception import Segmentation, compact_ddrnet
from resq_rl.policies import DynamicResQ, GradientSettings, learn_thresholds
from resq_rl.quantization import DEFAULT_KAPPA, QuantizationConfig, ResQModel
from resq_rl.video import GeneratedVideo

TABLES = ("product", "bitfusion", "bit_serial", "roofline", "tensor_core_int4", "int8_skip")
FRAMES, CALIBRATION, TRAINING, TEST = 48, 12, 24, 12
LEARNING, SPREAD = 6_000, 8
TAUS, KAPPAS = (0.2, 0.3, 0.45, 0.7, 1.0, 1.4, 1.95), (DEFAULT_KAPPA, (1.0, 2.0, 6.0), (1.0, 1.6, 6.0))


def measured(problem: Problem, policies: Sequence[Policy]) -> list[Measurement]:
    """The policies on all clips."""
    return [measure(problem, policy) for policy in policies]


def main() -> None:
    """Learn under every cost, then print a row for each."""
    torch.set_num_threads(1)
    costs = [*TABLES, *(str(Path(folder) / "cost.yaml") for folder in sys.argv[1:])]
    video = GeneratedVideo(frames=FRAMES)
    model = ResQModel(compact_ddrnet(), torch.zeros(1, 3, *video.size)).compile()
    model.calibrate([video.clip("train", i).frames for i in range(CALIBRATION)])
    train = Problem.prepare(model, Segmentation(), [video.clip("train", i) for i in range(TRAINING)], grid=(6, 10))
    test = Problem.prepare(model, Segmentation(), [video.clip("test", i) for i in range(TEST)], grid=(6, 10))
    priced = {cost: model.priced(QuantizationConfig(bops_convention=cost).cost) for cost in costs}
    heuristics = [DynamicResQ("previous", 0, tau=tau, kappa=kappa) for tau in TAUS for kappa in KAPPAS]
    anchors = {cost: measured(replace(test, model=own), heuristics) for cost, own in priced.items()}
    print(f"| learned under | {' | '.join(Path(cost).stem for cost in costs)} |\n| --- {'| --- ' * len(costs)}|")
    for cost, own in priced.items():
        policies = learn_thresholds(replace(train, model=own), GradientSettings(LEARNING)).spread(SPREAD)
        cells = []
        for other, its in priced.items():
            front = {0: measured(replace(test, model=its), policies)}
            entry = compare_fronts(front, anchors[other], float_accuracy=test.float_accuracy, seed=0)
            cells.append("no overlap" if entry.value is None else f"{entry.value:+.1f}%{interval(entry.ci95)}")
        print(f"| {Path(cost).stem} | {' | '.join(cells)} |", flush=True)


def interval(bounds: tuple[float, float] | None) -> str:
    """A 95% interval in words; nothing where there is none."""
    return "" if bounds is None else f" [{bounds[0]:+.1f}, {bounds[1]:+.1f}]"


if __name__ == "__main__":
    main()
