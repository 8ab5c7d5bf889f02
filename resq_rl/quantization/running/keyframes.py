"""Keyframe quantizers and biases, chosen by what the network's output makes of them.

The ranges of calibration lose least in the inputs of every layer. What counts is the network's output, so calibration
tries two things beside them, on frames of its clips:

    output ranges   the range that loses least in the output of the layer, with a step for each channel group of a
                    grouped layer, whose outputs read one group each: the steps fold into those of the weights
    correction      of the mean error of each output channel, added to its bias: layer after layer, so that each one is
                    corrected for inputs that come from corrected layers (Nagel et al., arXiv 1906.04721, empirically);
                    of all layers, or of all but the last, whose mean says little where its outputs saturate

and keeps the combination with the least error of the network's output on frames that it was not fitted to. The plain
ranges without a correction are one of them.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from resq_rl.quantization.graph.operators import ResidualOperator, own_types
from resq_rl.quantization.graph.outputs import tensors_of
from resq_rl.quantization.graph.tracing import Site
from resq_rl.quantization.kernels.plain import Kernels
from resq_rl.quantization.quantizers.quantizer import AffineQuantizer, ChannelQuantizer
from resq_rl.quantization.quantizers.ranges import output_quantizers
from resq_rl.quantization.quantizers.rounding import WIDEST, positions_of
from resq_rl.quantization.running.calibration import SiteRanges
from resq_rl.quantization.running.execution import numbered
from resq_rl.quantization.running.plans import SitePlan, keyframe_output
from resq_rl.quantization.specification.inputs import Inputs, as_tuple, to_float

__all__ = ["KeyframeFit", "chosen_frames"]

MOST_FRAMES = 96
HELD_OUT = 4  # one frame of so many is not fitted to, but chosen by
# Elements of a layer's input and output, over all frames of a pass.
MOST_ELEMENTS = 2**27
# Patches and output channels of a group that ranges are chosen by.
PATCHES, OUTPUTS = 512, 32

Quantizer = AffineQuantizer | ChannelQuantizer
Run = Callable[[tuple[Tensor, ...], Callable[[ResidualOperator, Tensor], Tensor]], Any]


def chosen_frames(
    clips: Sequence[Inputs], frames: int, sites: Sequence[Site], device: torch.device
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Frames to fit to and frames to choose by, each as one batch in 0..1, evenly from the first `frames` of each clip.

    There are at least two frames in all, and as many are taken as `MOST_FRAMES` and `MOST_ELEMENTS` allow.
    """
    parts = [as_tuple(clip) for clip in clips]
    every = [(own, t) for own in parts for t in range(min(frames, len(own[0])))]
    widest = max(site.input_elements + site.output_elements for site in sites)
    count = min(len(every), max(HELD_OUT, min(MOST_FRAMES, MOST_ELEMENTS // widest)))
    taken = [every[i * len(every) // count] for i in range(count)]
    held = [place for i, place in enumerate(taken) if i % HELD_OUT == 1]
    fitted = [place for i, place in enumerate(taken) if i % HELD_OUT != 1]
    return _batch(fitted, device), _batch(held, device)


def _batch(places: Sequence[tuple[tuple[Tensor, ...], int]], device: torch.device) -> tuple[Tensor, ...]:
    inputs = zip(*([part[t] for part in own] for own, t in places), strict=True)
    return tuple(to_float(torch.stack(frames).to(device)) for frames in inputs)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Within, float operators add in one order, whatever the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class KeyframeFit:
    """Chooses the keyframe quantizers and corrections of all sites.

    Args:
        sites: the operator calls of a pass, in order.
        plan: makes the plans of all sites for given ranges.
        run: runs the network on inputs, with a function in the place of every operator.
        kernels: the kernels that run the arithmetic.
        fitted, held: frames to fit to, and to choose by.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        plan: Callable[[Sequence[SiteRanges]], list[SitePlan]],
        run: Run,
        kernels: Kernels,
        fitted: tuple[Tensor, ...],
        held: tuple[Tensor, ...],
    ) -> None:
        self._sites, self._plan, self._run_network, self._kernels = list(sites), plan, run, kernels
        self._fitted, self._held = fitted, held

    def best(self, plain: Sequence[SiteRanges], bits: int, *, search: bool, seed: int) -> list[SiteRanges]:
        """The ranges, of which keyframe quantizers and corrections may differ from the plain ones.

        Args:
            bits: activation bits of a keyframe.
            search: whether other ranges than the plain ones are tried.
        """
        with _one_thread():
            found, means = self._observe(bits, torch.Generator().manual_seed(seed))
            candidates = [list(plain)]
            if search:
                candidates.append([replace(r, keyframe=q or r.keyframe) for r, q in zip(plain, found, strict=True)])
            wanted = [y.detach().clone() for y in tensors_of(self._run(self._held, lambda _, o, x: o.float_output(x)))]
            tried = []
            for ranges in candidates:
                corrected = self._corrected(ranges, means)
                tried += [ranges, corrected, [*corrected[:-1], ranges[-1]]]
            return min(tried, key=lambda ranges: self._loss(ranges, wanted))

    def _run(self, inputs: tuple[Tensor, ...], execute: Callable[[int, ResidualOperator, Tensor], Tensor]) -> Any:
        """A pass in which `execute` gets the position of every call, and the input in float32."""
        return self._run_network(inputs, numbered(self._sites, execute))

    def _observe(self, bits: int, generator: torch.Generator) -> tuple[list[Quantizer | None], list[Tensor]]:
        """By site, the quantizer that loses least in the output, and the mean of each channel of the float output."""
        quantizers: list[Quantizer | None] = []
        means: list[Tensor] = []

        def observe(position: int, operator: ResidualOperator, x: Tensor) -> Tensor:
            y = operator.float_output(x)
            with own_types():
                quantizers.append(_quantizer(self._sites[position], x.detach().float(), bits, generator))
            means.append(_mean(operator, y))
            return y

        self._run(self._fitted, observe)
        return quantizers, means

    def _corrected(self, ranges: Sequence[SiteRanges], means: Sequence[Tensor]) -> list[SiteRanges]:
        """The ranges with the correction of each site, found in one pass: later sites see the earlier corrected."""
        plans, corrections = self._plan(ranges), []

        def correct(position: int, operator: ResidualOperator, x: Tensor) -> Tensor:
            y = self._quantized(plans[position], x)
            correction = (means[position] - _mean(operator, y)).float()
            corrections.append(correction)
            return (y + operator.per_channel(correction)).to(self._sites[position].dtype)

        self._run(self._fitted, correct)
        return [replace(r, correction=tuple(c.tolist())) for r, c in zip(ranges, corrections, strict=True)]

    def _loss(self, ranges: Sequence[SiteRanges], wanted: Sequence[Tensor]) -> float:
        """Sum over the network's outputs of the logarithm of their squared error; infinite where it is not finite.

        By the logarithm, outputs of any scale count alike.
        """
        plans = self._plan(ranges)

        def execute(position: int, operator: ResidualOperator, x: Tensor) -> Tensor:
            return self._quantized(plans[position], x).to(self._sites[position].dtype)

        total = 0.0
        for y, target in zip(tensors_of(self._run(self._held, execute)), wanted, strict=True):
            error = float((y.double() - target.double()).square().sum())
            total += math.log(error + 1e-12 * float(target.double().square().sum()) + 1e-30)
        return total if math.isfinite(total) else math.inf

    def _quantized(self, plan: SitePlan, x: Tensor) -> Tensor:
        """The output of an operator as at keyframes, whatever types the network's own code computes in."""
        with own_types():
            return keyframe_output(plan, self._kernels, _laid_out(plan.site.operator, x))[0]


def _quantizer(site: Site, x: Tensor, bits: int, generator: torch.Generator) -> Quantizer | None:
    """The quantizer that loses least in the site's output; None where patches would take too much memory."""
    operator, groups = site.operator, site.operator.geometry.groups
    rows = operator.weight_rows()
    if rows.shape[1] > WIDEST:
        return None
    patches = _patches(site, x, generator)
    weights = rows.unflatten(0, (groups, -1))
    few = torch.linspace(0, weights.shape[1] - 1, min(OUTPUTS, weights.shape[1])).long()
    by_group = x.movedim(operator.channel_axis, 0).reshape(groups, -1)
    ends = by_group.amin(1), by_group.amax(1)
    found = output_quantizers(patches, weights[:, few.to(x.device)], *ends, bits)
    return found[0] if groups == 1 else ChannelQuantizer(tuple(q for q in found for _ in range(x.shape[1] // groups)))


def _patches(site: Site, x: Tensor, generator: torch.Generator) -> Float[Tensor, "g k n"]:
    """Some of the patches that the operator multiplies, of all frames."""
    operator = site.operator
    if operator.channel_axis != 1:  # the axis of clips may be any of those before the channels, or part of one
        vectors = x.flatten(0, -2)
        return vectors[None, torch.randint(len(vectors), (PATCHES,), generator=generator).to(x.device)]
    each = -(-PATCHES // len(x))
    positions = [positions_of(operator, site.output_shape, generator)[:each] for _ in range(len(x))]
    by_frame = [operator.geometry.patches(x[i : i + 1], site.output_size, own) for i, own in enumerate(positions)]
    return torch.cat(by_frame, 1)


def _laid_out(operator: ResidualOperator, x: Tensor) -> Tensor:
    x = x.float()
    return x if operator.channel_axis == 1 else x.contiguous()


def _mean(operator: ResidualOperator, y: Tensor) -> Float[Tensor, " out"]:
    """Mean of each output channel, in double precision."""
    return y.detach().movedim(operator.channel_axis, 0).flatten(1).double().mean(1)
