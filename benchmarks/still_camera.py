"""Time of a frame of a still camera, by the share of tiles that are active, against the float network and whole layers.

    python benchmarks/still_camera.py
    python benchmarks/still_camera.py shared/data/cdnet_highway

DDRNet-23-slim with random weights, frames of 512x1024, one clip, one thread. The default is a generated still picture
in which a rectangle changes; with the root of a dataset in the arrangement of DAVIS, the first frames of its first
sequence at 240 lines. Times are the processor's, so that other processes disturb them less: medians of frames that run
in turn, the second time that the clip runs, since oneDNN compiles for every number of tiles that it meets.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from resq_rl.perception import ddrnet23_slim
from resq_rl.quantization import QuantizationConfig, ResQModel, StreamState, ThresholdField, to_float
from resq_rl.quantization.kernels import Product
from resq_rl.quantization.kernels.skipping import Tiling
from resq_rl.video import DavisVideo

SIZE = (512, 1024)
FRAMES = 7
# Share of the picture's width and height that changes, in generated frames.
TAU = 1.0
# Thresholds for video.
TAUS = (2.0, 4.0)
EXTENTS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.6)


def generated(extent: float) -> Tensor:
    """A still picture in which a rectangle takes other colours in every frame, (frames, 3, height, width) in bytes."""
    generator = torch.Generator().manual_seed(0)

    def picture() -> Tensor:
        coarse = torch.rand(1, 3, SIZE[0] // 16, SIZE[1] // 16, generator=generator)
        return F.interpolate(coarse, size=SIZE, mode="bilinear")[0]

    frames = picture().expand(FRAMES, -1, -1, -1).clone()
    height, width = (int(extent * length) for length in SIZE)
    for frame in frames[1:]:
        frame[:, 64 : 64 + height, 128 : 128 + width] += 0.2 * picture()[:, :height, :width]
    return frames.clamp(0, 1).mul(255).to(torch.uint8)


def filmed(root: Path) -> Tensor:
    """The first frames of a video."""
    name = sorted(path.name for path in (root / "JPEGImages" / "240p").iterdir())[0]
    parts = {"train": FRAMES + 1, "validation": FRAMES + 2}
    splits = {split: [f"{name}[{at - 1}:{at}]"] for split, at in parts.items()} | {"test": [f"{name}[0:{FRAMES}]"]}
    return next(iter(DavisVideo(root=root, resolution="240p", size=SIZE, splits=splits).clips("test"))).frames


class Active:
    """Notes how many multiply-accumulates active outputs take, and all, in residual steps of a model's kernels."""

    def __init__(self, kernels: Any) -> None:
        self.done = self.all = 0.0
        self._residual, self._find = kernels.residual, kernels.skipping.find
        kernels.residual, kernels.skipping.find = self.residual, self.find

    def residual(self, product: Product, *given: Any, **settings: Any) -> tuple[Tensor, Tensor]:
        """A residual step, of which all tiles count as active where none are sought."""
        self._share = 1.0
        y, cost = self._residual(product, *given, **settings)
        macs = product.codes.numel() * y[0, 0].numel()
        self.done, self.all = self.done + self._share * macs, self.all + macs
        return y, cost

    def find(self, tiling: Tiling, active: Tensor) -> Tensor:
        """The active tiles."""
        tiles = self._find(tiling, active)
        self._share = len(tiles) / tiling.count
        return tiles

    def share(self) -> float:
        """The share since the last call."""
        share = self.done / max(self.all, 1.0)
        self.done = self.all = 0.0
        return share


def row(model: ResQModel, active: Active, title: str, frames: Tensor, tau: float) -> str:
    """A row of the table for frames after a keyframe."""
    inputs = [to_float(frame[None]) for frame in frames]
    field = ThresholdField.constant(tau, 1, len(model.groups))
    run(model, active, inputs, field)
    spent, shares, bops = run(model, active, inputs, field)
    base, tiles, whole = (statistics.median(times) for times in spent)
    ratios = f"{1e3 * tiles:.0f} | {tiles / base:.2f} | {tiles / whole:.2f}"
    return f"| {title}, tau {tau} | {statistics.mean(shares):.2f} | {statistics.mean(bops):.3f} | {ratios} |"


def run(
    model: ResQModel, active: Active, inputs: Sequence[Tensor], field: ThresholdField
) -> tuple[tuple[list[float], list[float], list[float]], list[float], list[float]]:
    """Seconds of the frames after the first in float, with tiles and whole; shares that were active; shares of W8A8."""
    skipping: Any = model.kernels.skipping  # type: ignore[attr-defined]
    every, states = torch.ones(1, dtype=torch.bool), (model.new_state(1), model.new_state(1))
    spent: tuple[list[float], list[float], list[float]] = ([], [], [])
    shares, costs = [], []

    def step(x: Tensor, state: StreamState) -> None:
        costs.append(model.step(x, state, ~every, field)[1])

    for state in states:
        model.step(inputs[0], state, every, field)
    for x in inputs[1:]:
        spent[0].append(seconds(partial(model.float_forward, x)))
        active.share()
        spent[1].append(seconds(partial(step, x, states[0])))
        shares.append(active.share())
        skipping.enabled = False
        spent[2].append(seconds(partial(step, x, states[1])))
        skipping.enabled = True
    return spent, shares, [float(cost.total) / model.reference_bops() for cost in costs]


def seconds(run: Callable[[], object]) -> float:
    """Processor time that it takes."""
    started = time.thread_time()
    run()
    return time.thread_time() - started


def main() -> None:
    """Print a row for each extent or threshold."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("root", nargs="?", type=Path, help="a dataset in the arrangement of DAVIS, at 240 lines")
    root = parser.parse_args().root
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = ResQModel(ddrnet23_slim(None), torch.zeros(1, 3, *SIZE), QuantizationConfig(weight_rounding="nearest"))
    model.compile().calibrate([(filmed(root) if root else generated(0.4))[:3]])
    active = Active(model.kernels)
    print("| frames | active tiles | BOPs of W8A8 | ms | of float | of whole layers |")
    print("| --- | --- | --- | --- | --- | --- |")
    cases: Iterable[tuple[str, Tensor, float]] = ((f"{e:.0%} of both sides", generated(e), TAU) for e in EXTENTS)
    if root:
        film = filmed(root)
        cases = ((root.name, film, tau) for tau in TAUS)
    for title, frames, tau in cases:
        print(row(model, active, title, frames, tau), flush=True)


if __name__ == "__main__":
    main()
