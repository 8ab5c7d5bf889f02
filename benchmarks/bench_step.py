"""Time of a keyframe step and of residual steps, as ratios to a float forward pass in the same run.

    python benchmarks/bench_step.py [--batch 32] [--rounds 10] [--threads 2]

Each round times all of them in turn; the table shows medians over the rounds with the smallest and largest ratio.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from resq_rl.perception import compact_ddrnet
from resq_rl.quantization import LevelField, ResQModel, ThresholdField, to_float
from resq_rl.video import GeneratedVideo


def workloads(batch: int) -> dict[str, Callable[[], object]]:
    video = GeneratedVideo(frames=2)
    clips = [video.clip("test", i) for i in range(min(batch, 8))]
    first, second = (to_float(torch.stack([clips[i % len(clips)].frames[t] for i in range(batch)])) for t in (0, 1))
    model = ResQModel(compact_ddrnet(), first[:1]).calibrate([c.frames for c in clips])
    groups, grid = len(model.groups), (6, 10)
    refresh, rest = torch.ones(batch, dtype=torch.bool), torch.zeros(batch, dtype=torch.bool)
    thresholds = ThresholdField.constant(0.5, batch, groups, grid)
    levels = LevelField.constant(2, batch, groups, grid)
    states = {reference: model.new_state(batch, reference) for reference in ("previous", "keyframe")}
    for state in states.values():
        model.step(first, state, refresh, thresholds)
    frames = [first, second]

    def step(reference: str, decision: LevelField | ThresholdField) -> object:
        frames.reverse()  # so that every step sees motion
        return model.step(frames[0], states[reference], rest, decision)

    return {
        "float forward": lambda: model.float_forward(first),
        "keyframe step": lambda: model.step(first, states["previous"], refresh, thresholds),
        "residual, thresholds, previous": lambda: step("previous", thresholds),
        "residual, bits, previous": lambda: step("previous", levels),
        "residual, thresholds, keyframe": lambda: step("keyframe", thresholds),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    jobs = workloads(arguments.batch)
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for round_ in range(arguments.rounds + 1):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            if round_:  # the first warms up
                times[name].append(time.perf_counter() - start)
    base = times["float forward"]
    print(f"batch {arguments.batch}, {arguments.threads} threads, {arguments.rounds} rounds")
    for name, values in times.items():
        ratios = [v / b for v, b in zip(values, base, strict=True)]
        milliseconds = 1e3 * statistics.median(values) / arguments.batch
        print(
            f"{name:32} {statistics.median(ratios):5.2f}x ({min(ratios):.2f} to {max(ratios):.2f}) "
            f"{milliseconds:6.2f} ms per frame"
        )


if __name__ == "__main__":
    main()
