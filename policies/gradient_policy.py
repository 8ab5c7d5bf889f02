"""A policy of region agents, learned by gradients through the unrolled closed loop, as static thresholds are.

Thresholds per layer and the network that multiplies them by region and layer group are learned together, from the same
loss and on the same frames (`resq_rl.policies.gradient`). The network sees what every agent observes and is deployed as
one that PPO trained.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from resq_rl.envs import ActionScheme, Problem
from resq_rl.errors import SettingsError
from resq_rl.policies.gradient import descend, first_thresholds
from resq_rl.policies.learned import LearnedPolicy
from resq_rl.policies.unrolled_clips import GradientSettings, RegionOffsets, UnrolledClips
from resq_rl.quantization import Reference

__all__ = ["PassFigures", "learn_policy"]


@dataclass(frozen=True)
class PassFigures:
    """The means over one pass of clips: environment frames spent so far, divergence, and BOPs as a share of W8A8."""

    frames: int
    divergence: float
    bops: float


def learn_policy(
    problem: Problem,
    scheme: ActionScheme,
    settings: GradientSettings | None = None,
    *,
    hidden: tuple[int, ...] = (16, 16),
    bits: int = 8,
    interval: int = 0,
    reference: Reference = "previous",
    seed: int = 0,
    on_pass: Callable[[PassFigures], None] | None = None,
) -> LearnedPolicy:
    """Learn thresholds for every layer and a range of lambda, and a network that moves them by region.

    Args:
        problem: the network, its task and training clips.
        scheme: region agents that choose thresholds; its thresholds are replaced by a base and factors of it.
        hidden: units of each hidden layer.
        bits: at which the network runs and is charged, 32 for float.
        interval: frames between keyframes in training; 0 for the first only.
        reference: what residuals are taken against.
        on_pass: called after each pass over drawn clips.

    Returns:
        The policy, at the geometric middle of the range of lambda, which weighs BOPs against `Task.divergence`.

    Raises:
        SettingsError: the scheme chooses something else, the frames do not go beyond the first trials, no clip has a
            frame after its first, or no constant threshold diverges less for more BOPs.
    """
    _check(scheme)
    clips = UnrolledClips.of_layers(problem, reference, interval, scheme.kappa, settings, seed)
    knots, log_taus = first_thresholds(clips)
    _check_left(clips)
    layers = problem.model.group_of_site.tolist()
    scheme = scheme.on(log_taus.detach().exp().tolist(), layers)
    clips.offsets = offsets = RegionOffsets(scheme, hidden, torch.Generator().manual_seed(seed))
    descend(clips, knots, log_taus, _reporter(clips, on_pass))
    return LearnedPolicy(
        *_network(offsets),
        scheme.on(log_taus.detach().exp().tolist(), layers),
        trade_off=float((knots[0] * knots[-1]) ** 0.5),
        trade_off_range=(float(knots[0]), float(knots[-1])),
        interval=interval,
        reference=reference,
        bits=bits,
        frame_size=problem.model.frame_size,
        network=problem.model.groups,
    )


def _check(scheme: ActionScheme) -> None:
    if (scheme.kind, scheme.agents) != ("region_thresholds", "region"):
        raise SettingsError(
            f"Gradients reach thresholds by region only: got actions {scheme.kind!r} of {scheme.agents!r} agents. Use "
            "the environment resq_rl/RegionThresholds-v0 with region agents, or train by PPO."
        )


def _check_left(clips: UnrolledClips) -> None:
    if clips.frames >= clips.settings.frames:
        raise SettingsError(
            f"Of {clips.settings.frames} environment frames nothing is left to learn from: the constant thresholds "
            f"that are tried first took {clips.frames}. Give more of them (training.frames)."
        )


def _reporter(
    clips: UnrolledClips, on_pass: Callable[[PassFigures], None] | None
) -> Callable[[float, float], None] | None:
    if on_pass is None:
        return None
    return lambda divergence, bops: on_pass(PassFigures(clips.frames, divergence, bops))


def _network(offsets: RegionOffsets) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Weights and biases of its layers."""
    layers = [layer for layer in offsets.layers if isinstance(layer, torch.nn.Linear)]
    weights = tuple(layer.weight.detach().clone() for layer in layers)
    return weights, tuple(layer.bias.detach().clone() for layer in layers)
