"""A policy of region agents, learned by gradients through the unrolled closed loop, as static thresholds are.

Thresholds per layer and the network that multiplies them by region and layer group are learned together, from the same
loss and on the same frames (`resq_rl.policies.gradient`). The network sees what every agent observes and is deployed as
one that PPO trained.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from resq_rl.envs import ActionScheme, Policy, Problem
from resq_rl.errors import PolicyError, SettingsError
from resq_rl.policies.gradient import descend, first_thresholds
from resq_rl.policies.learned import LearnedPolicy
from resq_rl.policies.unrolled_clips import GradientSettings, RegionOffsets, UnrolledClips
from resq_rl.quantization import Reference

__all__ = ["PassFigures", "adapt_policy", "adaptable", "learn_policy"]


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
    scheme = scheme.on(_rows(log_taus), layers, knots.tolist())
    clips.offsets = offsets = RegionOffsets(scheme, hidden, torch.Generator().manual_seed(seed))
    descend(clips, knots, log_taus, _reporter(clips, on_pass))
    return LearnedPolicy(
        offsets.weights,
        offsets.biases,
        replace(scheme, base=_rows(log_taus)),
        trade_off=float((knots[0] * knots[-1]) ** 0.5),
        trade_off_range=(float(knots[0]), float(knots[-1])),
        interval=interval,
        reference=reference,
        bits=bits,
        frame_size=problem.model.frame_size,
        network=problem.model.groups,
    )


def adapt_policy(
    policy: LearnedPolicy,
    problem: Problem,
    settings: GradientSettings | None = None,
    *,
    whole_range: bool = True,
    seed: int = 0,
) -> LearnedPolicy:
    """Go on learning a policy by gradients, on clips of other video than it was trained on. They need no labels.

    Args:
        policy: moves the thresholds of a base that was learned by gradients, whoever trained its network.
        problem: the network, its task and the clips.
        whole_range: learn at all values of lambda; else at the policy's own only.

    Raises:
        PolicyError: the policy cannot adapt (`adaptable`).
        SettingsError: no clip has a frame after its first.
    """
    scheme = adaptable(policy).scheme
    clips = UnrolledClips.of_layers(problem, policy.reference, policy.interval, scheme.kappa, settings, seed)
    log_taus = torch.tensor(scheme.base).log().requires_grad_()
    if not policy.static:
        hidden = tuple(len(bias) for bias in policy.biases[:-1])
        clips.offsets = RegionOffsets(scheme, hidden, torch.Generator())
        clips.offsets.begin_at(policy.weights, policy.biases)
    place = None if whole_range else policy.place
    descend(clips, np.array(scheme.learned_at), log_taus, place=place, shown=policy.trade_off_range)
    learned = replace(policy, scheme=replace(scheme, base=_rows(log_taus)))
    if clips.offsets is None:
        return learned
    return replace(learned, weights=clips.offsets.weights, biases=clips.offsets.biases)


def adaptable(policy: Policy) -> LearnedPolicy:
    """The policy, where gradients can go on learning what it began with.

    Raises:
        PolicyError: its thresholds were not learned by gradients, or it decides on keyframes too.
    """
    if not isinstance(policy, LearnedPolicy) or policy.keyframes is not None or not policy.scheme.learned_at:
        raise PolicyError(
            "The policy cannot adapt: only one whose thresholds were learned by gradients can, and which does not "
            "decide on keyframes. Train it with training.trainer=gradient, or training.warm_start=gradient."
        )
    return policy


def _rows(log_taus: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in log_taus.detach().exp().tolist())


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
