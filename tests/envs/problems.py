"""Problems of a tiny network and tiny clips, so that environments step in a millisecond, and what is made of them."""

from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from resq_rl.envs import (
    ActionKind,
    ActionScheme,
    Agents,
    BatchedEnvironment,
    Decision,
    EpisodeSettings,
    FrameView,
    NetworkEngine,
    Policy,
    Problem,
    StreamResult,
    Streams,
    TableEngine,
    respond,
)
from resq_rl.perception import CompactPose, MaskPropagation, Pose, Segmentation, clip_inputs, load_network
from resq_rl.quantization import LevelField, QuantizationConfig, ResQModel
from resq_rl.video import IGNORE, Clip, FigureVideo

SIZE = (32, 48)
GRID = (2, 3)
CLASSES = 3


class TinyNet(nn.Module):
    """Three layer groups (stem, body, head) whose output has half the frame's resolution."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(inplace=True))
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, groups=2), nn.ReLU())
        self.head = nn.Conv2d(8, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x - 0.5)
        return self.head(x + self.body(x))  # type: ignore[no-any-return]


def tiny_network(seed: int = 0, classes: int = CLASSES) -> nn.Module:
    """A random network whose classes all occur."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = TinyNet(classes)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(2.0)
        probe = network(moving_frames(4, seed=99).float() / 255)
        network.head.bias -= probe.mean((0, 2, 3))
    return network.eval()


# It on a command line, for the generated video. It is code of the tests, to be trusted. A job of its few layers takes a
# third of the time of one of the default network, almost all of it in Python.
TINY_NETWORK = ["model=custom", "model._target_=tests.envs.problems.tiny_network", "+model.classes=6", "trusted=true"]


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


def make_problem(
    lengths: Sequence[int] = (5, 7, 5, 6),
    *,
    size: tuple[int, int] = SIZE,
    grid: tuple[int, int] = GRID,
    network: nn.Module | None = None,
    config: QuantizationConfig | None = None,
    **settings: Any,
) -> Problem:
    """A calibrated network and labelled clips of the given lengths; `settings` are those of `Problem.prepare`.

    It runs on the compiled kernels, as in jobs; tests/quantization/test_kernels.py compares them with the plain ones.
    """
    model = ResQModel(network or tiny_network(), torch.zeros(1, 3, *size), config)
    model.calibrate([moving_frames(6, size, seed=50 + i, speed=1 + i) for i in range(3)], interval=3)
    return Problem.prepare(
        model.compile(), Segmentation(classes=CLASSES), tiny_clips(lengths, size), grid=grid, **settings
    )


def with_clips(problem: Problem, lengths: Sequence[int], *, seed: int = 0, **settings: Any) -> Problem:
    """The same network on other clips."""
    clips = tiny_clips(lengths, problem.model.frame_size, seed)
    return Problem.prepare(problem.model, problem.task, clips, grid=problem.grid, **settings)


class Follower(nn.Module):
    """A tiny network of frame and mask whose output depends on both."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(4, 8, 3, 2, 1), nn.ReLU())
        self.head = nn.ConvTranspose2d(8, 2, 2, 2)

    def forward(self, frames: Tensor, masks: Tensor, colours: Tensor) -> Tensor:
        mixed: Tensor = self.head(self.stem(torch.cat([frames - colours[:, :3], masks], 1)))
        return mixed


def clips_of_objects(lengths: Sequence[int], seed: int = 0) -> list[Clip]:
    """Clips with a box that moves one pixel per frame."""
    clips = []
    for i, length in enumerate(lengths):
        labels = torch.zeros(length, *SIZE, dtype=torch.uint8)
        for t in range(length):
            labels[t, 4 : SIZE[0] - 4, 2 + t : 10 + t] = 1
        frames = moving_frames(length, SIZE, seed + i, speed=1 + i)
        clips.append(Clip(frames, labels, 25.0, f"objects/{seed + i}", "test"))
    return clips


def follower_network() -> nn.Module:
    """A random network whose output depends on the last mask."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        network = Follower()
        next(network.stem.parameters())[:, 3] += 0.3
    return network


def make_recurrent_problem(lengths: Sequence[int] = (5, 7, 6)) -> Problem:
    """A network that is given its own last mask, on which its logits depend."""
    task = MaskPropagation()
    model = ResQModel(follower_network(), (torch.zeros(1, 3, *SIZE), torch.zeros(1, 1, *SIZE), torch.zeros(1, 6, 1, 1)))
    model.calibrate([clip_inputs(model.float_forward, task, clip) for clip in clips_of_objects([6, 6], seed=50)])
    return Problem.prepare(model.compile(), task, clips_of_objects(lengths), grid=GRID)


def make_pose_problem() -> Problem:
    """A network of points with random weights: predictions are wrong, and change with every frame."""
    clips = FigureVideo(size=SIZE, frames=4, speed=8, cuts=0.0, train=2, test=3).clips
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        network = CompactPose(width=8)
        list(network.head.parameters())[-2].mul_(30.0)  # weights of the last convolution
    model = ResQModel(load_network(network), torch.zeros(1, 3, *SIZE)).calibrate([c.frames for c in clips("train")])
    return Problem.prepare(model.compile(), Pose(), clips("test"), grid=GRID)


@lru_cache(maxsize=16)
def table_engine(problem: Problem) -> TableEngine:
    """An engine that looks up the responses of all clips of a problem."""
    return TableEngine(problem, [respond(problem, i) for i in range(len(problem))])


def table_streams(problem: Problem, slots: int = 1, **settings: Any) -> Streams:
    """Streams in which responses are looked up."""
    return Streams(table_engine(problem), slots=slots, reference="keyframe", **settings)


def streams(problem: Problem, slots: int = 1, **settings: Any) -> Streams:
    """Streams in which the network runs."""
    return Streams(NetworkEngine(problem), slots=slots, **settings)


def scheme(
    problem: Problem, kind: ActionKind = "region_thresholds", agents: Agents = "region", **settings: Any
) -> ActionScheme:
    """Actions that fit a problem."""
    return ActionScheme(
        kind, agents, problem.groups, problem.grid, **({"levels": len(problem.model.config.levels)} | settings)
    )


def agents(
    problem: Problem,
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
    """Agents over streams in which the network runs; `settings` are those of the streams."""
    episodes = episodes or EpisodeSettings(trade_off=0.3)
    running = streams(problem, slots, trade_off_range=episodes.trade_off_range, **settings)
    actions = scheme(problem, kind, agents, by_group=by_group)
    return BatchedEnvironment(running, actions, episodes, autoreset=autoreset, fields=fields)


def view(problem: Problem, slots: int = 2, **settings: Any) -> FrameView:
    """What a policy sees after the forced keyframes of the first clips."""
    running = streams(problem, slots, **settings)
    running.start(range(slots), range(slots))
    return running.view()


def random_levels(problem: Problem, slots: int, seed: int) -> LevelField:
    """Random levels for every layer group and region."""
    generator = torch.Generator().manual_seed(seed)
    shape = (slots, problem.groups, *problem.grid)
    return LevelField(torch.randint(0, 4, shape, generator=generator))


def run_random_levels(
    problem: Problem, clips: list[int], steps: int, **settings: Any
) -> tuple[Streams, list[StreamResult]]:
    """Random levels over some clips, forced keyframes first."""
    slots = len(clips)
    running = streams(problem, slots, **settings)
    results = [running.start(range(slots), clips)]
    for t in range(steps):
        results.append(running.step(Decision(torch.zeros(slots, dtype=torch.bool), random_levels(problem, slots, t))))
    return running, results


def written_over(value: Any) -> None:
    """Overwrite every tensor of a result, a decision or an observation in place."""
    for part in (getattr(value, own.name) for own in fields(value)):
        if isinstance(part, Tensor):
            part.fill_(1)
        elif is_dataclass(part):
            written_over(part)


def values_of(result: StreamResult) -> dict[str, Tensor]:
    """Copies of all tensors of a result, its costs among them."""
    parts = {name: value for name, value in vars(result).items() if isinstance(value, Tensor)}
    parts |= {f"cost.{name}": getattr(result.cost, name) for name in ("bops", "keyframe", "elementwise")}
    return {name: value.clone() for name, value in parts.items()}


def assert_same(mine: Any, expected: Any, names: Iterable[str], where: str = "here") -> None:
    """Two objects, or two mappings, hold the same arrays under some names, bit for bit."""
    a, b = (own if isinstance(own, dict) else {name: getattr(own, name) for name in names} for own in (mine, expected))
    for name in names:
        difference = first_difference(a[name], b[name])
        assert difference is None, f"{where}, {name}: {difference}"


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
