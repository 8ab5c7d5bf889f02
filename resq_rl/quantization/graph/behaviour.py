"""What a network must be like for its clips to be stepped side by side: checked when it is wrapped, on its outputs.

A frame's output may depend on that frame alone: not on earlier calls, on the other clips of the batch or their number,
on the random state, or on how tensors lie in memory.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from resq_rl.errors import NetworkError, ResqError
from resq_rl.quantization.graph.operators import laid_out
from resq_rl.quantization.graph.outputs import tensors_of

__all__ = ["Behaviour", "kept_random_state", "probe_clips"]

# Two orders of summation differ by about 1e-6 of the values, a mask in a pixel or two; a lost hook changes far more.
_AGREEMENT = 1e-3
_COARSEST = 0.05  # in half precision
# The share of whole numbers (classes, masks) that may differ, where two values are nearly equal.
_FLIPS = 0.02
# Brightness and contrast of the clips, so that what one takes from another shows.
_LOOKS = ((0.0, 0.5), (0.4, 0.6), (0.1, 0.9))

_RANDOM = (
    "draws random numbers in its forward, or sets the random state, so a frame has no one output. Switch off dropout "
    "and noise, or draw from a generator of the network's own that starts anew in every call."
)
_MEMORY = (
    "gives another output for the same frame in a later call: it keeps memory between frames. Make what it remembers "
    "an input and an output"
)
_MIXED = (
    "gives another output for a clip in a batch than for the clip alone: it takes statistics over the clips of a "
    "batch, mixes clips, or depends on their number. Compute everything clip by clip"
)
_LOST = (
    "gives another output once wrapped. Something in it does not survive wrapping, such as memory between frames or "
    "layers whose weights are changed or used by other code. Remove it, or export the network"
)

Outputs = list[Tensor]


def probe_clips(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Three clips of noise in 0..1, of the shapes and types of the inputs, that differ in brightness and contrast."""
    generator = torch.Generator().manual_seed(0)
    low, scale = (torch.tensor(values, dtype=torch.float32) for values in zip(*_LOOKS, strict=True))
    return tuple(
        (
            low.view(-1, *[1] * (x.dim() - 1))
            + scale.view(-1, *[1] * (x.dim() - 1))
            * torch.rand(len(_LOOKS), *x.shape[1:], dtype=torch.float32, device="cpu", generator=generator)
        ).to(x)
        for x in inputs
    )


class Behaviour:
    """The outputs of a network, as it was given, for each of some clips alone.

    Args:
        name: of the network, for messages.
        network: a copy of it that nothing else runs.
        clips: two clips or more.

    Raises:
        NetworkError: the network cannot run on one clip, or its output holds no tensor.
    """

    def __init__(self, name: str, network: nn.Module, clips: tuple[Tensor, ...]) -> None:
        self.name, self.network, self.clips = name, network, clips
        before = _random_state()
        self.alone = [self._run(network, [0])]
        self.random = not all(map(torch.equal, _random_state(), before))
        if not self.alone[0]:
            raise NetworkError(f"{name} returns no tensor. Return tensors, or containers or data classes of them.")

    def check(self) -> None:
        """Raise NetworkError if an output depends on more than the clip's own frame."""
        if self.random:
            raise NetworkError(f"{self.name} {_RANDOM}")
        self.alone.append(self._run(self.network, [1]))
        self._compare(self.alone[0], self._run(self.network, [0]), 0, 1, _MEMORY)
        self._check_batch(self.network, [0, 1], _MIXED)

    def layout_of(self, wrapped: nn.Module) -> torch.memory_format:
        """The memory layout for a wrapped network: channels last, in which operators are fastest, or contiguous.

        Raises:
            NetworkError: the wrapped network gives other outputs than the original in either layout.
        """
        self._compare(self.alone[1], self._run(wrapped, [1]), 0, 1, _LOST)
        try:
            self._check_batch(wrapped, [2, 0, 1], _LOST, torch.channels_last)
        except NetworkError:
            self._check_batch(wrapped, [2, 0, 1], _LOST)
            return torch.contiguous_format
        return torch.channels_last

    @torch.no_grad()
    def _run(
        self, network: nn.Module, rows: Sequence[int], layout: torch.memory_format = torch.contiguous_format
    ) -> Outputs:
        inputs = laid_out(tuple(part[list(rows)] for part in self.clips), layout)
        try:
            return [t.detach().clone() for t in tensors_of(network(*inputs))]
        except ResqError:
            raise
        except Exception as error:
            shapes = " and ".join(str(tuple(part.shape)) for part in inputs)
            raise NetworkError(f"{self.name} cannot run on frames of shape {shapes}: {error}") from error

    def _check_batch(
        self, network: nn.Module, rows: list[int], what: str, layout: torch.memory_format = torch.contiguous_format
    ) -> None:
        batch = self._run(network, rows, layout)
        for place, row in enumerate(rows):
            if row < len(self.alone):
                self._compare(self.alone[row], batch, place, len(rows), what)

    def _compare(self, alone: Outputs, batch: Outputs, place: int, clips: int, what: str) -> None:
        """Compare the outputs of one clip with those at a place of a batch of clips."""
        if len(alone) != len(batch):
            raise NetworkError(f"{self.name} {what} ({len(alone)} tensors, then {len(batch)}).")
        for expected, found in zip(alone, batch, strict=True):
            if expected.dim() == 0:
                continue  # a number for the whole batch, such as a loss
            rows = len(expected)
            if found.shape == (clips * rows, *expected.shape[1:]):
                found = found[place * rows : (place + 1) * rows]
            if found.shape != expected.shape:
                shapes = f"{tuple(expected.shape)} for one clip, {tuple(found.shape)} for {clips}"
                raise NetworkError(f"{self.name} has outputs of shape {shapes}; the clip dimension must lead.")
            difference, size = _difference(expected, found)
            if difference > size:
                raise NetworkError(f"{self.name} {what} (mean difference {difference:.3g}, allowed {size:.3g}).")


def _difference(expected: Tensor, found: Tensor) -> tuple[float, float]:
    """Mean difference of two tensors and the largest that rounding explains; infinite where only one is finite."""
    if not expected.numel():
        return 0.0, 0.0
    if expected.dtype != found.dtype:
        return float("inf"), 0.0
    if not expected.is_floating_point():
        return float((expected != found).double().mean()), _FLIPS
    coarse = torch.finfo(expected.dtype).eps / torch.finfo(torch.float32).eps
    a, b = expected.double(), found.double()
    same = (a == b) | (a.isnan() & b.isnan())
    difference = torch.where(same, 0.0, (a - b).abs()).nan_to_num(float("inf"), float("inf"))
    size = float(a.abs().nan_to_num(0.0, 0.0).mean())
    return float(difference.mean()), min(_AGREEMENT * max(coarse, 1.0), _COARSEST) * size + 1e-6


def _random_state() -> list[Any]:
    """The states of torch's and NumPy's global generators (Python's own is drawn from by run-time type checks)."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    numpy: Any = np.random.get_state()  # noqa: NPY002
    return [torch.get_rng_state(), *cuda, torch.from_numpy(numpy[1].astype(np.int64)), torch.tensor(numpy[2])]


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Within, whatever draws random numbers leaves the caller's random states as they were."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
