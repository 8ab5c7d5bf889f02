"""Processor time and memory of a clip frame on one thread, by network and resolution, to plan a cluster with."""

import multiprocessing
import resource
import time

import torch

from resq_rl.envs import Problem, measure
from resq_rl.perception import Segmentation, compact_ddrnet, ddrnet23_slim
from resq_rl.policies import DynamicResQ
from resq_rl.quantization import QuantizationConfig, ResQModel
from resq_rl.video import GeneratedVideo

FRAMES = 6
CITYSCAPES = Segmentation(classes=19)
CASES = (
    ("compact_ddrnet", (96, 160)),
    ("compact_ddrnet", (192, 320)),
    ("compact_ddrnet", (384, 640)),
    ("compact_ddrnet", (1024, 2048)),
    ("ddrnet23_slim", (1024, 2048)),
)


def measured(name: str, size: tuple[int, int]) -> str:
    """A row of the table; to be called in a process of its own, whose peak of memory is its."""
    torch.set_num_threads(1)
    clip = GeneratedVideo(size=size, frames=FRAMES, train=1, validation=1, test=1).clip("test", 0)
    network, task = (
        (compact_ddrnet(), Segmentation()) if name == "compact_ddrnet" else (ddrnet23_slim(None), CITYSCAPES)
    )
    model = ResQModel(network, torch.zeros(1, 3, *size), QuantizationConfig(weight_rounding="nearest"))
    model.compile().calibrate([clip.frames[:2]])
    started = time.process_time()
    problem = Problem.prepare(model, task, [clip], source="teacher")
    forward = (time.process_time() - started) / FRAMES
    policy = DynamicResQ("previous", 0, tau=0.7)
    measure(problem, policy, slots=1)  # the first compiles
    started = time.process_time()
    measure(problem, policy, slots=1)
    step = (time.process_time() - started) / FRAMES
    kept = (clip.frames, *problem.targets, *problem.teacher)
    bytes_kept = sum(tensor.numel() * tensor.element_size() for tensor in kept) / FRAMES
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return (
        f"| {name} | {size[0]}x{size[1]} | {model.macs / 1e9:.2f} | {forward:.4f} | {step:.4f} | "
        f"{bytes_kept / 1e6:.2f} | {model.simulation_bytes / 1e6:.0f} | {peak:.0f} |"
    )


def main() -> None:
    """Print a row for each case."""
    print("| network | frame | GMACs | s, float | s, measured | MB kept | MB per clip stepping | MiB, peak |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    context = multiprocessing.get_context("spawn")
    for case in CASES:
        with context.Pool(1) as pool:
            print(pool.apply(measured, case), flush=True)


if __name__ == "__main__":
    main()
