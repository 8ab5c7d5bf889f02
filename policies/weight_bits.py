"""The bits of residual weights by layer, chosen on training clips for the loss that thresholds are learned for.

Coarser weights make every residual of a layer cheaper, and err by what the scene has moved since its keyframe, which
takes long clips to show. The widths of the layers are to minimise, under the constant threshold that is best for one
lambda,

    mean over frames of divergence(output, float output) + lambda * BOPs / BOPs of W8A8

as learned thresholds do. Lambda lies on the accurate side of the range that matters, where errors of weights count
most. Mixed precision by layer, searched for what it costs and loses, is that of HAQ (arXiv 1811.08886) and HAWQ (arXiv
1905.03696).
"""

from collections import Counter, defaultdict
from collections.abc import Callable
from functools import cache

from resq_rl.envs import Problem
from resq_rl.policies.gradient import first_thresholds
from resq_rl.policies.unrolled_clips import GradientSettings, UnrolledClips
from resq_rl.quantization import DEFAULT_KAPPA, Reference, ResQModel

__all__ = ["choose_weight_bits"]

WIDTHS = (2, 3, 4, 5, 6, 8)
SETTINGS = GradientSettings(clips=4, knots=4)  # of clips, and of values of lambda over its range
LAMBDA = 1  # which of them counts
WINDOWS = 8  # of frames, at most, in which widths are compared
SMALL = 0.02  # of the multiply-accumulates: smaller layers of a kind have one width


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
    first, is made narrower as long as the loss falls, or else wider; never wider than at keyframes. Small layers of a
    kind are changed together.

    Args:
        problem: the network, its task and training clips.
        interval: frames between keyframes; 0 for the first only.
        reference: what residuals are taken against.
        kappa: multipliers of the thresholds by level.
        progress: called with the number of frames run.

    Raises:
        SettingsError: no clip has a frame after its first, or no constant threshold diverges less for more BOPs.
    """
    model = problem.model
    widths = tuple(bits for bits in WIDTHS if bits <= model.config.key_weight_bits)
    model.set_residual_weight_bits(min(4, widths[-1]))
    clips = UnrolledClips.of_layers(problem, reference, interval, kappa, SETTINGS, seed, progress)
    knots, constants = first_thresholds(clips)
    trade_off, log_taus = float(knots[LAMBDA]), constants[LAMBDA].detach()
    drawn, units = clips.draw(), _units(model)

    def by_layer(widths: tuple[int, ...]) -> dict[str, int]:
        return {name: width for names, width in zip(units, widths, strict=True) for name in names}

    @cache
    def loss(bits: tuple[int, ...]) -> float:
        model.set_residual_weight_bits(by_layer(bits))
        divergence, bops = clips.first_windows(drawn, log_taus, WINDOWS)
        return divergence + trade_off * bops

    chosen = min(((bits,) * len(units) for bits in widths), key=loss)
    for unit in range(len(units)):
        chosen = _walked(chosen, unit, widths, loss)
    bits = by_layer(chosen)
    ordered = {operator.name: bits[operator.name] for operator in model.operators}
    model.set_residual_weight_bits(ordered)
    return ordered


def _walked(
    chosen: tuple[int, ...], unit: int, widths: tuple[int, ...], loss: Callable[[tuple[int, ...]], float]
) -> tuple[int, ...]:
    """The choice with one unit made narrower as long as the loss falls, or else wider."""
    for narrower in (True, False):
        begun = chosen
        place = widths.index(chosen[unit])
        for bits in reversed(widths[:place]) if narrower else widths[place + 1 :]:
            other = (*chosen[:unit], bits, *chosen[unit + 1 :])
            if loss(other) >= loss(chosen):
                break
            chosen = other
        if chosen != begun:
            break
    return chosen


def _units(model: ResQModel) -> list[list[str]]:
    """Names of the layers that change together, those with the most multiply-accumulates first."""
    macs: Counter[tuple[str, str]] = Counter()
    members: dict[tuple[str, str], set[str]] = defaultdict(set)
    by_name: Counter[str] = Counter()
    for site in model.layers:
        by_name[site.name] += site.macs
    for site in model.layers:
        small = by_name[site.name] < SMALL * by_name.total()
        unit = (site.layer_kind, "") if small else (site.layer_kind, site.name)
        macs[unit] += site.macs
        members[unit].add(site.name)
    return [sorted(members[unit]) for unit, _ in macs.most_common()]
