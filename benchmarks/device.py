"""A device beside the CPU: equal outputs and costs, then times. A few minutes.

    python benchmarks/device.py cuda

Wraps the shipped networks on both, with one calibration, and steps them through the same frames under levels and under
thresholds. Sums of integers must be exact on either; what lies between them is the network's own arithmetic, whose
rounding may differ between devices, and with it the level of a pixel that lies at a threshold. So costs under levels
must be equal, and outputs and costs under thresholds within TOLERANCE of their largest value. Exits with 1 if they are
not.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from resq_rl.perception import compact_ddrnet, compact_pose, compact_segformer
from resq_rl.quantization import Field, LevelField, QuantizationConfig, ResQModel, ThresholdField, to_float
from resq_rl.quantization.quantizers.rounding import IntegerWeight
from resq_rl.video import FigureVideo, GeneratedVideo

TOLERANCE = 1e-3
FRAMES = 8
BATCHES = (1, 8, 32)
ROUNDS = 15
NETWORKS: dict[str, tuple[Callable[[], nn.Module], type]] = {
    "compact_ddrnet": (compact_ddrnet, GeneratedVideo),
    "compact_segformer": (compact_segformer, GeneratedVideo),
    "compact_pose": (compact_pose, FigureVideo),
}


def pair_of(make: Callable[[], nn.Module], clips: list[Tensor], device: torch.device) -> tuple[ResQModel, ResQModel]:
    """A calibrated model on the CPU, and the same on the device."""
    example = to_float(clips[0][:1])
    config = QuantizationConfig(weight_rounding="nearest")
    here = ResQModel(make(), example, config).compile().calibrate(clips)
    there = ResQModel(make().to(device), example.to(device), config).compile()
    for own, other in zip(here.operators, there.operators, strict=True):
        for part, weight in here.weights.of(own).items():
            bits = config.key_weight_bits if part == "keyframe" else config.weight_bits(own.layer_kind, own.name)
            moved = IntegerWeight(weight.codes.to(device), weight.scale.to(device))
            there.weights.put(other, "keyframe" if bits == config.key_weight_bits else part, bits, moved)
    there.ranges = here.ranges
    there.round_weights()
    return here, there


def differences(models: tuple[ResQModel, ResQModel], frames: list[Tensor], field: Field) -> tuple[float, float]:
    """The largest differences of outputs and of costs, as shares of the largest values."""
    states = [model.new_state(len(frames[0])) for model in models]
    worst = [0.0, 0.0]
    for t, frame in enumerate(frames):
        refresh = torch.full((len(frame),), t == 0)
        found = []
        for model, state in zip(models, states, strict=True):
            output, cost = model.step(frame.to(model.device), state, refresh, field)
            found.append((first_tensor(output).cpu().double(), cost.bops.cpu()))
        for i, (own, other) in enumerate(zip(*found, strict=True)):
            worst[i] = max(worst[i], float((own - other).abs().max() / own.abs().max().clamp_min(1e-12)))
    return worst[0], worst[1]


def first_tensor(output: object) -> Tensor:
    """The first tensor of what a network returns."""
    while not isinstance(output, Tensor):
        output = next(iter(output.values() if isinstance(output, dict) else output))  # type: ignore[attr-defined]
    return output


def times(model: ResQModel, frame: Tensor) -> tuple[float, float, float]:
    """Median milliseconds of a float forward pass, a residual step and a keyframe."""
    frame = frame.to(model.device)
    every, state = torch.ones(len(frame), dtype=torch.bool), model.new_state(len(frame))
    field = ThresholdField.constant(0.7, len(frame), len(model.groups))
    model.step(frame, state, every, field)
    moved = [(frame + 0.05 * torch.rand_like(frame)).clamp(0, 1) for _ in range(2)]
    runs = (
        lambda i: model.float_forward(moved[i % 2]),
        lambda i: model.step(moved[i % 2], state, ~every, field),
        lambda i: model.step(moved[i % 2], model.new_state(len(frame)), every, field),
    )
    spent: list[list[float]] = [[], [], []]
    for i in range(ROUNDS + 2):
        for run, own in zip(runs, spent, strict=True):
            wait(model.device)
            started = time.perf_counter()
            run(i)
            wait(model.device)
            own.append(1e3 * (time.perf_counter() - started))
    floats, residual, key = (statistics.median(own[2:]) for own in spent)
    return floats, residual, key


def wait(device: torch.device) -> None:
    """Until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Check all networks, then time the first."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("device", type=torch.device, help="cuda, cuda:1, ...")
    device = parser.parse_args().device
    print(torch.cuda.get_device_name(device) if device.type == "cuda" else device, "torch", torch.__version__)
    print("\n| network | decision | outputs differ by | costs differ by |\n| --- | --- | --- | --- |")
    right, first = True, None
    for name, (make, video) in NETWORKS.items():
        clips = [video(frames=FRAMES).clip("train", i).frames for i in range(3)]
        models = pair_of(make, clips, device)
        first = first or models
        frames = [torch.stack([to_float(clip[t]) for clip in clips]) for t in range(FRAMES)]
        groups, generator = len(models[0].groups), torch.Generator().manual_seed(0)
        levels = LevelField(torch.randint(4, (3, groups, 6, 10), generator=generator))
        thresholds = ThresholdField(torch.rand(3, groups, 6, 10, generator=generator).add(0.2))
        for words, field, most in (("levels", levels, 0.0), ("thresholds", thresholds, TOLERANCE)):
            output, cost = differences(models, frames, field)
            right &= output <= TOLERANCE and cost <= most
            print(f"| {name} | {words} | {output:.1e} | {cost:.1e} |", flush=True)
    assert first is not None
    print("\n| batch | device | float, ms | residual step | keyframe |\n| --- | --- | --- | --- | --- |")
    for batch in BATCHES:
        frame = torch.rand(batch, *first[0].input_shapes[0])
        for model in first:
            floats, residual, key = times(model, frame)
            print(
                f"| {batch} | {model.device.type} | {floats:.2f} | {residual / floats:.2f} | {key / floats:.2f} |",
                flush=True,
            )
    print("\nEqual within the bounds." if right else "\nNOT equal within the bounds.")
    sys.exit(not right)


if __name__ == "__main__":
    main()
