"""Wrap a network of your own, look at what it was taken apart into, and count what each frame costs.

    python examples/custom_network.py

On the command line the same network is `model=custom model._target_=custom_network.make_network`, with this folder on
Python's path.
"""

import torch
from torch import Tensor, nn

from resq_rl.envs import Problem, measure
from resq_rl.perception import Segmentation
from resq_rl.policies import DynamicResQ, PerFrame, StaticResQ
from resq_rl.quantization import QuantizationConfig, ResQModel
from resq_rl.video import GeneratedVideo

SIZE, CLASSES = (64, 96), 3


class EncoderDecoder(nn.Module):
    """Any code will do, as long as what multiplies and accumulates is Conv2d, ConvTranspose2d or Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.pointwise = nn.Conv2d(16, 32, 1)
        self.squeeze = nn.Linear(32, 32)
        self.up = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.head = nn.Conv2d(16, CLASSES, 1)

    def forward(self, frame: Tensor) -> Tensor:
        """Logits (b, 3, h, w) of frames (b, 3, h, w) in 0..1."""
        x = torch.relu(self.pointwise(self.depthwise(self.stem(frame))))
        gate = torch.sigmoid(self.squeeze(x.mean((2, 3))))
        logits: Tensor = self.head(torch.relu(self.up(x * gate[..., None, None])))
        return logits


def make_network(seed: int = 0) -> nn.Module:
    """The network with random weights; yours would load trained ones here."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        network = EncoderDecoder().eval()
        network.head.bias -= network(torch.rand(4, 3, *SIZE)).mean((0, 2, 3))  # so that every class occurs
    return network


def main() -> None:
    """Wrap, calibrate, and measure three policies by their agreement with the float network."""
    torch.set_num_threads(1)  # on frames this small, more threads would only wait for each other
    network = make_network()
    video = GeneratedVideo(size=SIZE, frames=8, train=3, test=3)
    config = QuantizationConfig(
        residual_weight_bits={"conv": 4, "depthwise": 8},
        groups={"encoder": ["stem*", "depthwise", "pointwise"], "gate": ["squeeze"], "decoder": ["up", "head"]},
    )
    model = ResQModel(network, torch.zeros(1, 3, *SIZE), config)  # copied; `network` stays as it is
    model.calibrate([clip.frames for clip in video.clips("train")])
    print(f"{len(model.sites)} operators in groups {', '.join(model.groups)}")
    print(f"W8A8: {model.reference_bops():,.0f} bit-operations a frame")

    task = Segmentation(classes=CLASSES)
    problem = Problem.prepare(model, task, video.clips("test"), source="teacher")  # there are no labels for it
    for policy in (PerFrame(), StaticResQ(interval=4, level=2), DynamicResQ(interval=4, tau=0.5)):
        result = measure(problem, policy)
        name = type(policy).__name__
        print(f"{name:12} {result.bops:.3f} of W8A8, agreement with float {result.accuracy:.3f} (mean IoU)")


if __name__ == "__main__":
    main()
