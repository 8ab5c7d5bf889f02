"""The bits of residual weights by layer, chosen on training clips for the loss that thresholds are learned for.

Coarser weights make every residual of a layer cheaper, and err by what the scene has moved since its keyframe, which
takes long clips to show. The widths of the layers are to minimise, under thresholds learned for one lambda,

    mean over frames of divergence(output, float output) + lambda * BOPs / BOPs of W8A8

as thresholds do. Lambda lies on the accurate side of the range that matters, where errors of weights count most. Mixed
precision by layer, searched for what it costs and loses, is that of HAQ (arXiv 1811.08886) and HAWQ (arXiv 1905.03696).
"""

from collections.abc import Callable, Mapping
from functools import cache

import torch

from resq_rl.envs import Problem
from resq_rl.policies.gradient import learn_thresholds
from resq_rl.policies.unrolled_clips import GradientSettings, UnrolledClips
from resq_rl.quantization import DEFAULT_KAPPA, Reference, ResQModel

__all__ = ["choose_weight_bits"]

WIDTHS = (2, 3, 4, 5, 6, 8)
LEARNING = GradientSettings(frames=3000)  # of the thresholds
COMPARING = GradientSettings(clips=4)  # of widths
WINDOWS = 8  # of frames, at most, in which widths are compared
LAMBDAS, LAMBDA = 4, 1  # values of lambda spread over its range, and which of them counts


def choose_weight_bits(
    problem: Problem,
    *,
    interval: int = 0,
    reference: Reference = "previous",
    kappa: tuple[float, ...] = DEFAULT_KAPPA,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> dict[str, int]:
    """The bits of residual weights of each layer, to which the problem's model is set.

    The best width for all layers is the beginning. From there each layer, the one with the most multiply-accumulates
    first, is made narrower as long as the loss falls, or else wider; never wider than at keyframes.

    Args:
        problem: the network, its task and training clips.
        interval: frames between keyframes; 0 for the first only.
        reference: what residuals are taken against.
        kappa: multipliers of the thresholds by level.
        progress: called with the number of frames run.

    Raises:
        SettingsError: thresholds cannot be learned (`learn_thresholds`).
    """
    model = problem.model
    widths = tuple(bits for bits in WIDTHS if bits <= model.config.key_weight_bits)
    learned = learn_thresholds(
        problem, LEARNING, interval=interval, reference=reference, kappa=kappa, seed=seed, progress=progress
    )
    trade_off = learned.spread_trade_offs(LAMBDAS)[LAMBDA]
    log_taus = torch.tensor(learned.spread(LAMBDAS)[LAMBDA].taus).log()
    clips = UnrolledClips.of_layers(problem, reference, interval, kappa, COMPARING, seed, progress)
    drawn = clips.draw()

    @cache
    @torch.no_grad()
    def loss(bits: tuple[int, ...]) -> float:
        model.set_residual_weight_bits(dict(zip(names, bits, strict=True)))
        clips.start(drawn)
        found = []
        for _ in range(WINDOWS):
            if clips.left:
                found += [clips.window(part, log_taus.expand(len(part.clip), -1)) for part in clips.parts]
        divergence, bops = torch.cat(found, 1).mean(1).tolist()
        return float(divergence + trade_off * bops)

    macs = _macs(model)
    names = list(macs)
    chosen = min(((bits,) * len(names) for bits in widths), key=loss)
    for name in sorted(names, key=lambda n: -macs[n]):
        chosen = _walked(chosen, names.index(name), widths, loss)
    by_layer = dict(zip(names, chosen, strict=True))
    model.set_residual_weight_bits(by_layer)
    return by_layer


def _walked(
    chosen: tuple[int, ...], layer: int, widths: tuple[int, ...], loss: Callable[[tuple[int, ...]], float]
) -> tuple[int, ...]:
    """The choice with one layer made narrower as long as the loss falls, or else wider."""
    for narrower in (True, False):
        begun = chosen
        place = widths.index(chosen[layer])
        for bits in reversed(widths[:place]) if narrower else widths[place + 1 :]:
            other = (*chosen[:layer], bits, *chosen[layer + 1 :])
            if loss(other) >= loss(chosen):
                break
            chosen = other
        if chosen != begun:
            break
    return chosen


def _macs(model: ResQModel) -> Mapping[str, int]:
    """Multiply-accumulates by layer, over all its calls."""
    macs: dict[str, int] = {}
    for site in model.layers:
        macs[site.name] = macs.get(site.name, 0) + site.macs
    return macs
