"""A tiny network, task and video, so that environments step in a millisecond."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from resq_rl.envs import (
    ActionKind,
    ActionScheme,
    Agents,
    BatchedEnvironment,
    ClipStore,
    EpisodeSettings,
    FrameView,
    Policy,
    Simulator,
)
from resq_rl.envs.clips import AccuracySource, ErrorWeighting
from resq_rl.perception import Segmentation
from resq_rl.quantization import QuantizationConfig, ResQModel
from resq_rl.video import IGNORE, Clip

SIZE = (32, 48)
GRID = (2, 3)
CLASSES = 3


class TinyNet(nn.Module):
    """Three layer groups (stem, body, head) whose output has half the frame's resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(inplace=True))
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, groups=2), nn.ReLU())
        self.head = nn.Conv2d(8, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x - 0.5)
        return self.head(x + self.body(x))  # type: ignore[no-any-return]


def tiny_network(seed: int = 0) -> nn.Module:
    """A random network whose three classes all occur."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = TinyNet()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(2.0)
        probe = network(moving_frames(4, seed=99).float() / 255)
        network.head.bias -= probe.mean((0, 2, 3))
    return network.eval()


def moving_frames(frames: int, size: tuple[int, int] = SIZE, seed: int = 0, speed: int = 2) -> Tensor:
    """A smooth random texture that moves in the lower half and stands in the upper half, uint8 (t, 3, h, w)."""
    generator = torch.Generator().manual_seed(seed)
    height, width = size
    coarse = torch.rand(1, 3, height // 4 + 2, (width + frames * speed) // 4 + 2, generator=generator)
    texture = nn.functional.interpolate(coarse, scale_factor=4, mode="bilinear", align_corners=False)[0]
    amplitude = torch.linspace(0.01, 0.03, frames)[torch.randperm(frames, generator=generator)]
    noise = torch.rand(frames, 1, height, width, generator=generator) * amplitude[:, None, None, None]
    out = []
    for t in range(frames):
        frame = texture[:, :height, :width].clone()
        frame[:, height // 2 :] = texture[:, height // 2 : height, t * speed : t * speed + width]
        out.append(frame)
    return ((torch.stack(out) * 0.97 + noise) * 255).to(torch.uint8)


def random_labels(frames: int, size: tuple[int, int], seed: int) -> Tensor:
    """Labels in 4x4 blocks, some of them to ignore, uint8 (t, h, w)."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 2 * CLASSES + 1, (frames, size[0] // 4 + 1, size[1] // 4 + 1), generator=generator) // 2
    labels = blocks.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, : size[0], : size[1]]
    return torch.where(labels >= CLASSES, IGNORE, labels).to(torch.uint8)


def tiny_clips(lengths: Sequence[int], size: tuple[int, int] = SIZE, seed: int = 0, labels: bool = True) -> list[Clip]:
    """Clips of the given lengths, each of its own video."""
    return [
        Clip(
            moving_frames(length, size, seed + i, speed=1 + i % 3),
            random_labels(length, size, 1000 + seed + i) if labels else None,
            25.0,
            f"tiny/{seed + i}",
            "test",
        )
        for i, length in enumerate(lengths)
    ]


@dataclass(frozen=True)
class World:
    """What environments are made of."""

    model: ResQModel
    task: Segmentation
    store: ClipStore
    grid: tuple[int, int] = GRID

    def with_clips(
        self,
        lengths: Sequence[int],
        *,
        seed: int = 0,
        source: AccuracySource = "labels",
        weighting: ErrorWeighting = "iou",
    ) -> "World":
        """The same network on other clips."""
        clips = tiny_clips(lengths, self.model.frame_size, seed)
        store = ClipStore.prepare(self.model, self.task, clips, source=source, weighting=weighting)
        return replace(self, store=store)

    @property
    def parts(self) -> dict[str, Any]:
        """Arguments of the registered environments."""
        return {"model": self.model, "task": self.task, "store": self.store, "grid": self.grid}

    def simulator(self, slots: int = 1, **settings: Any) -> Simulator:
        """A simulator of this world."""
        return Simulator(self.model, self.task, self.store, slots=slots, **({"grid": self.grid} | settings))

    def scheme(
        self, kind: ActionKind = "region_thresholds", agents: Agents = "region", **settings: Any
    ) -> ActionScheme:
        """Actions for this world."""
        defaults: dict[str, Any] = {"levels": len(self.model.config.levels)}
        return ActionScheme(kind, agents, len(self.model.groups), self.grid, **(defaults | settings))

    def core(
        self,
        slots: int = 2,
        kind: ActionKind = "region_thresholds",
        agents: Agents = "region",
        *,
        autoreset: bool = True,
        episodes: EpisodeSettings | None = None,
        by_group: bool = True,
        fields: Policy | None = None,
        **settings: Any,
    ) -> BatchedEnvironment:
        """Agents in this world."""
        episodes = episodes or EpisodeSettings(trade_off=0.3)
        simulator = self.simulator(slots, trade_off_range=episodes.trade_off_range, **settings)
        return BatchedEnvironment(
            simulator, self.scheme(kind, agents, by_group=by_group), episodes, autoreset=autoreset, fields=fields
        )

    def view(self, slots: int = 2, **settings: Any) -> FrameView:
        """What a policy sees after the forced keyframes of the first clips."""
        simulator = self.simulator(slots, **settings)
        simulator.start(range(slots), range(slots))
        return FrameView(simulator)


def make_world(
    lengths: Sequence[int] = (5, 7, 5, 6),
    *,
    size: tuple[int, int] = SIZE,
    grid: tuple[int, int] = GRID,
    config: QuantizationConfig | None = None,
    source: AccuracySource = "labels",
    weighting: ErrorWeighting = "iou",
) -> World:
    """A calibrated world."""
    task = Segmentation(classes=CLASSES)
    model = ResQModel(tiny_network(), torch.zeros(1, 3, *size), config)
    model.calibrate([moving_frames(6, size, seed=50 + i, speed=1 + i) for i in range(3)], interval=3)
    store = ClipStore.prepare(model, task, tiny_clips(lengths, size), source=source, weighting=weighting)
    return World(model, task, store, grid)


def first_difference(a: Any, b: Any) -> str | None:
    """Where two arrays first differ, with both values; None where they are equal bit for bit."""
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape:
        return f"shapes {a.shape} and {b.shape}"
    wrong = np.argwhere(a != b)
    if not len(wrong):
        return None
    index = tuple(int(i) for i in wrong[0])
    return f"index {index}: {a[index]!r} and {b[index]!r} ({len(wrong)} of {a.size} values differ)"
