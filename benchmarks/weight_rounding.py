"""What rounding the residual weights of a channel together gives, on validation clips of the generated video."""

import torch

from resq_rl.envs import ClipStore, Policy, measure
from resq_rl.perception import Segmentation, compact_ddrnet
from resq_rl.policies import DynamicResQ, PerFrame, StaticResQ
from resq_rl.quantization import QuantizationConfig, ResQModel
from resq_rl.quantization.rounding import WeightRounding
from resq_rl.video import GeneratedVideo

BITS = (3, 4, 5)
ROUNDINGS: tuple[WeightRounding, ...] = ("nearest", "second_order")


def main() -> None:
    """Print mean IoU and BOPs by rounding, residual weight bits and policy."""
    torch.set_num_threads(2)
    video, task = GeneratedVideo(train=16, validation=24), Segmentation()
    train, validation = video.clips("train"), video.clips("validation")
    policies: dict[str, Policy] = {
        "static, 8-bit residuals, interval 0": StaticResQ("previous", 0, level=3),
        "static, 8-bit residuals, interval 8": StaticResQ("previous", 8, level=3),
        "Dynamic ResQ, tau 0.7, interval 0": DynamicResQ("previous", 0, tau=0.7),
        "Dynamic ResQ, tau 0.7, interval 16": DynamicResQ("previous", 16, tau=0.7),
    }
    store = None
    for rounding in ROUNDINGS:
        for bits in BITS:
            config = QuantizationConfig(residual_weight_bits=bits, weight_rounding=rounding)
            model = ResQModel(compact_ddrnet(), torch.zeros(1, 3, *video.size), config)
            model.calibrate([clip.frames for clip in train])
            if store is None:
                store = ClipStore.prepare(model, task, validation)
                print(f"float {store.float_accuracy:.4f}, W8A8 {measure(model, task, store, PerFrame()).accuracy:.4f}")
            for name, policy in policies.items():
                result = measure(model, task, store, policy, slots=24)
                print(f"{rounding:12} {bits} bits  {name:36} {result.accuracy:.4f} at {result.bops:.3f}", flush=True)


if __name__ == "__main__":
    main()
