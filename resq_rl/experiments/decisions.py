"""Where a heuristic and a learned policy of about equal accuracy spend their bits on one clip: `decisions.png`."""

import math
from collections.abc import Sequence
from itertools import product

from matplotlib.figure import Figure

from resq_rl.envs import Measurement, Policy
from resq_rl.experiments.plots import plot_decisions
from resq_rl.experiments.results import TITLES, short_settings
from resq_rl.experiments.world import World

__all__ = ["Measured", "comparable_pair", "decisions_figure"]

Measured = tuple[Policy, Measurement]

# Accuracy lost against the float network, on a scale of 0 to 1, at which policies are worth a look.
LEAST_LOSS, MOST_LOSS = 0.01, 0.02


def comparable_pair(
    heuristics: Sequence[Measured], learned: Sequence[Measured], float_accuracy: float
) -> tuple[Measured, Measured] | None:
    """The heuristic and the learned policy nearest in accuracy, around 1 to 2 points under the float network.

    A point that the learned policy lies outside of that range weighs as much as a point between the two.

    Args:
        float_accuracy: of the float network on the clips on which both fronts were measured.

    Returns:
        None where a front has no point with an accuracy.
    """

    def distance(pair: tuple[Measured, Measured]) -> float:
        (_, base), (_, own) = pair
        lost = float_accuracy - own.accuracy
        return abs(base.accuracy - own.accuracy) + max(LEAST_LOSS - lost, lost - MOST_LOSS, 0.0)

    pairs = [pair for pair in product(heuristics, learned) if math.isfinite(distance(pair))]
    return min(pairs, key=distance, default=None)


def decisions_figure(world: World, method: str, heuristic: Measured, learned: Measured) -> Figure:
    """What both policies predict, spend and choose on the first of the reported clips.

    The network runs on it even where policies are measured from tables, which know no predictions.

    Args:
        method: name of the heuristic in `comparison.json`.
        heuristic, learned: each with its measurement on the reported clips.
    """
    split, scheme = world.settings.split, world.scheme()
    store = world.stores[split]
    traces = {}
    for name, (policy, measured) in ((method, heuristic), ("ppo", learned)):
        lost = 100 * (store.float_accuracy - measured.accuracy)
        title = (
            f"{TITLES[name]} ({short_settings(measured.settings)}): {measured.bops:.3f} of W8A8 and {lost:.1f} points "
            f"lost over all {split} clips"
        )
        traces[name] = (title, world.trace(policy, split))
    by_threshold = scheme.kind == "region_thresholds"
    return plot_decisions(
        world.task,
        store.clips[0].frames,
        traces,
        choices=scheme.thresholds if by_threshold else range(scheme.levels),
        meaning="threshold" if by_threshold else "level",
        groups=world.model.groups,
        title=f"{store.clips[0].name}, BOPs in {world.settings.quantization.bops_convention} convention",
    )
