"""A heuristic and a learned policy of about equal accuracy, traced to show where they spend their bits."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from jaxtyping import Int64
from matplotlib.figure import Figure
from torch import Tensor

from resq_rl.envs import ActionScheme, Trace
from resq_rl.experiments.results.comparison import short_settings
from resq_rl.experiments.results.methods import method_of
from resq_rl.experiments.results.plots import plot_decisions
from resq_rl.experiments.study.study import Study
from resq_rl.policies.tuning import Measured

__all__ = ["TracedPair", "comparable_pair", "decisions_figure", "trace_pair"]

# Accuracy lost against the float network, on a scale of 0 to 1, at which policies are worth a look.
LEAST_LOSS, MOST_LOSS = 0.01, 0.02
# How many of the reported clips are traced, at most.
TRACED_CLIPS = 3


@dataclass(frozen=True)
class TracedPair:
    """A heuristic and a learned policy, and what each did on the first of the reported clips.

    Attributes:
        methods: names of both in `comparison.json`.
        heuristic, learned: each with its measurement on all reported clips.
        traces: of both, by clip.
    """

    methods: tuple[str, str]
    heuristic: Measured
    learned: Measured
    traces: tuple[tuple[Trace, Trace], ...]


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


def trace_pair(study: Study, methods: tuple[str, str], heuristic: Measured, learned: Measured) -> TracedPair:
    """Run both policies over the first of the reported clips, keeping every frame.

    The network runs even where policies are measured from tables, which know no predictions.

    Args:
        methods: names of both in `comparison.json`.
        heuristic, learned: each with its measurement on the reported clips.
    """
    split = study.settings.split
    clips = range(min(TRACED_CLIPS, len(study.problems[split])))
    traces = tuple((study.trace(heuristic[0], split, clip), study.trace(learned[0], split, clip)) for clip in clips)
    return TracedPair(methods, heuristic, learned, traces)


def decisions_figure(study: Study, pair: TracedPair) -> Figure:
    """What both policies predict, spend and choose on the first of the reported clips."""
    problem, scheme = study.problem, study.scheme()
    levels = study.settings.quantization.levels
    traces = {}
    for name, (_, measured), trace in zip(pair.methods, (pair.heuristic, pair.learned), pair.traces[0], strict=True):
        lost = 100 * (problem.float_accuracy - measured.accuracy)
        title = (
            f"{method_of(name).title} ({short_settings(measured.settings, levels)}): {measured.bops:.3f} of W8A8 and "
            f"{lost:.1f} points lost over all {study.settings.split} clips"
        )
        traces[name] = (title, _by_group(trace, scheme, study.model.group_of_site))
    by_threshold = scheme.by_threshold
    return plot_decisions(
        study.task,
        problem.clips[0].frames,
        traces,
        choices=scheme.thresholds if by_threshold else range(scheme.levels),
        labels=None if by_threshold else levels,
        meaning="threshold" if by_threshold else "bits",
        groups=study.model.groups,
        title=f"{problem.clips[0].name}, BOPs ({study.settings.quantization.cost_words})",
    )


def _by_group(trace: Trace, scheme: ActionScheme, group_of_site: Int64[Tensor, " s"]) -> Trace:
    """A trace with a threshold for each layer group: the geometric mean over its layers, at the nearest choice."""
    if not scheme.by_threshold or trace.chosen.shape[1] == scheme.groups:
        return trace
    logs = [trace.chosen[:, group_of_site == group].log().mean(1) for group in range(scheme.groups)]
    choices = torch.tensor(scheme.thresholds)
    nearest = (torch.stack(logs, 1)[..., None] - choices.log()).abs().argmin(-1)
    return replace(trace, chosen=choices[nearest])
