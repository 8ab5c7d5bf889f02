"""Static thresholds per layer, learned by gradients through the unrolled closed loop.

For each of a range of values of lambda, the thresholds tau of the layers are to minimise

    mean over residual frames of divergence(output, float output) + lambda * BOPs / BOPs of W8A8

with `Task.divergence`, for which clips need no labels. Gradients reach tau through levels and their costs
(`ResQModel.unrolled_step`), and through the references that a frame leaves to the next ones, by truncated
backpropagation: a clip runs from its first frame in windows, whose state is carried from one to the next without its
gradient. This is for learning only: what is learned is measured as every policy is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from resq_rl.envs import Conditions, Problem
from resq_rl.envs.actions import knot_weights
from resq_rl.errors import SettingsError
from resq_rl.policies.fixed import GroupThresholds
from resq_rl.policies.unrolled_clips import GradientSettings, UnrolledClips
from resq_rl.quantization import DEFAULT_KAPPA, Reference

__all__ = ["GradientSettings", "LearnedThresholds", "descend", "first_thresholds", "learn_thresholds"]

CONSTANTS = (0.05, 0.1, 0.2, 0.4, 0.7, 1.0, 1.4, 2.0, 2.8)  # tried first, for the range of lambda and to begin from
FIRST_WINDOWS = 2  # that they run
FREE, LOST = 0.01, 0.15  # what the finest constant of the range may lose in agreement, and the coarsest must
FREE_SHARE = 0.05  # of what the coarsest of all loses, where that is less than FREE
BEYOND = 4.0


@dataclass(frozen=True)
class LearnedThresholds:
    """Thresholds per layer for a range of lambda.

    Attributes:
        trade_offs: ascending values of lambda. They weigh BOPs against `Task.divergence`, and so are not those of
            rewards.
        policies: the thresholds learned at each of them.
        frames: environment frames spent.
    """

    trade_offs: tuple[float, ...]
    policies: tuple[GroupThresholds, ...]
    frames: int

    def spread(self, count: int) -> list[GroupThresholds]:
        """Thresholds at `count` values of lambda, evenly by ratio over its range."""
        known, wanted = np.log(self.trade_offs), self._log_trade_offs(count)
        log_taus = np.log([policy.taus for policy in self.policies])
        taus = np.exp(np.stack([np.interp(wanted, known, column) for column in log_taus.T], 1))
        return [_with_taus(self.policies[0], row) for row in taus]

    def spread_trade_offs(self, count: int) -> tuple[float, ...]:
        """The values of lambda of `spread`."""
        return tuple(np.exp(self._log_trade_offs(count)).tolist())

    def _log_trade_offs(self, count: int) -> np.ndarray:
        known = np.log(self.trade_offs)
        return np.linspace(known[0], known[-1], count)


def _with_taus(policy: GroupThresholds, taus: np.ndarray) -> GroupThresholds:
    return GroupThresholds(policy.reference, policy.interval, taus=tuple(map(float, taus)), kappa=policy.kappa)


def learn_thresholds(
    problem: Problem,
    settings: GradientSettings | None = None,
    *,
    interval: int = 0,
    reference: Reference = "previous",
    kappa: tuple[float, ...] = DEFAULT_KAPPA,
    trade_offs: tuple[float, float] | None = None,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> LearnedThresholds:
    """Learn a threshold for every layer and a range of lambda.

    Args:
        problem: the network, its task and training clips.
        interval: frames between keyframes; 0 for the first only.
        reference: what residuals are taken against.
        kappa: multipliers of the thresholds by level.
        trade_offs: the range of lambda; None for one at which constant thresholds differ (`_trade_offs`).
        progress: called with the number of environment frames spent.

    Raises:
        SettingsError: no clip has a frame after its first, or no constant threshold diverges less for more BOPs.
    """
    clips = UnrolledClips.of_layers(problem, reference, interval, kappa, settings, seed, progress)
    knots, log_taus = first_thresholds(clips, trade_offs)
    descend(clips, knots, log_taus)
    learned = tuple(_with_taus(clips.policy, row) for row in log_taus.detach().exp().double().numpy())
    return LearnedThresholds(tuple(map(float, knots)), learned, clips.frames)


def first_thresholds(
    clips: UnrolledClips, trade_offs: tuple[float, float] | None = None
) -> tuple[np.ndarray, Float[Tensor, "k s"]]:
    """Values of lambda, and for each the logarithm of the constant threshold that is best on a few clips."""
    constants = _constants(clips)
    low, high = trade_offs or _trade_offs(constants)
    knots = np.geomspace(low, high, clips.settings.knots) if high > low else np.array([low])
    best = [min(constants, key=lambda c: c.divergence + t * c.bops).tau for t in knots.tolist()]
    return knots, torch.tensor(best).log()[:, None].repeat(1, len(clips.policy.taus)).requires_grad_()


class _Constant(NamedTuple):
    """What one threshold for all layers gave."""

    tau: float
    bops: float
    divergence: float
    agreement: float


def _constants(clips: UnrolledClips) -> list[_Constant]:
    """Constant thresholds on the same frames, from many BOPs to few."""
    drawn, found = clips.draw(), []
    for tau in CONSTANTS:
        log_taus = torch.full((len(clips.policy.taus),), tau).log()
        divergence, bops = clips.first_windows(drawn, log_taus, FIRST_WINDOWS)
        agreement = float(clips.problem.task.accuracy(torch.stack(clips.counts).sum(0)))
        found.append(_Constant(tau, bops, divergence, agreement))
    return found


def _trade_offs(constants: Sequence[_Constant]) -> tuple[float, float]:
    """The range of lambda that matters: the slopes of divergence over BOPs between constant thresholds.

    They are those from the last one that agrees with the float network as the best does, within FREE or FREE_SHARE, to
    the first one that LOST more than that; three of them at least. Both ends are moved out by BEYOND, because
    thresholds by layer go on where constants stop to gain, and lose less where those lose much.

    Raises:
        SettingsError: no threshold diverges less for more BOPs.
    """
    best = max(c.agreement for c in constants)
    free = min(FREE, FREE_SHARE * (best - min(c.agreement for c in constants)))
    first = max((i for i, c in enumerate(constants[:-2]) if c.agreement >= best - free), default=0)
    lost = (i for i, c in enumerate(constants) if i > first + 1 and c.agreement < best - LOST)
    last = next(lost, len(constants) - 1)
    slopes = _slopes(constants[first : last + 1]) or _slopes(constants)
    if not slopes:
        raise SettingsError(
            "Thresholds cannot be learned: on the first training clips, no constant threshold brings the output nearer "
            "to the float network's for more BOPs. Look at the network and its task."
        )
    return min(slopes) / BEYOND, max(slopes) * BEYOND


def _slopes(constants: Sequence[_Constant]) -> list[float]:
    """Divergence saved per BOPs spent from one to the next, where more BOPs save any."""
    pairs = [(a, b) for a, b in pairwise(constants) if a.bops > b.bops and a.divergence < b.divergence]
    return [(b.divergence - a.divergence) / (a.bops - b.bops) for a, b in pairs]


def descend(
    clips: UnrolledClips,
    knots: np.ndarray,
    log_taus: Float[Tensor, "k s"],
    on_pass: Callable[[float, float], None] | None = None,
    place: float | None = None,
    shown: tuple[float, float] | None = None,
) -> None:
    """Step the logarithms of thresholds, and the clips' offsets if any, down their gradient, window by window.

    Args:
        clips: the training clips.
        knots: values of lambda.
        log_taus: the thresholds at each of them; changed in place.
        on_pass: called with the mean divergence and share of W8A8 BOPs after each pass over the drawn clips.
        place: of the lambda of all clips among the knots, from 0 to 1; None for values spread over them.
        shown: the range in which a policy observes lambda, at the same place; None for that of the knots.
    """
    settings, begun, log_knots = clips.settings, clips.frames, np.log(knots)
    groups: list[dict[str, Any]] = [{"params": [log_taus], "lr": settings.learning_rate}]
    if clips.offsets is not None:
        groups.append({"params": list(clips.offsets.parameters()), "lr": settings.network_rate})
    optimizer = torch.optim.Adam(groups)
    rates = [group["lr"] for group in groups]
    while clips.frames < settings.frames:
        drawn, at = clips.draw(), _places(clips) if place is None else torch.full((clips.count,), place)
        weights = knot_weights(at, len(knots))
        without = torch.ones(clips.count)  # a budget
        trade_offs = (weights @ torch.from_numpy(log_knots).float()).exp()
        low, high = shown or (float(knots[0]), float(knots[-1]))
        observed = trade_offs if shown is None else low * (high / low) ** at
        clips.start(drawn, Conditions(observed, (low, high), without, without))
        figures = []
        while clips.left and clips.frames < settings.frames:
            done = (clips.frames - begun) / (settings.frames - begun)
            optimizer.zero_grad()
            found = []
            for part in clips.parts:
                divergence, bops = both = clips.window(part, weights[part.rows] @ log_taus)
                found.append(both.detach())
                # Scaled so that every lambda moves thresholds alike.
                loss = (divergence / trade_offs[part.rows] + bops).mean() * len(part.clip) / clips.count
                if loss.requires_grad:  # not where all frames of the window are keyframes
                    loss.backward()
            figures.append(torch.cat(found, 1).mean(1).tolist())
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (1 - 0.9 * done)
            optimizer.step()
        if on_pass is not None:
            on_pass(*np.mean(figures, 0).tolist())


def _places(clips: UnrolledClips) -> Float[Tensor, " b"]:
    """A place of lambda for each clip, spread over the range."""
    place = (clips.generator.permutation(clips.count) + clips.generator.uniform(size=clips.count)) / clips.count
    return torch.from_numpy(place).float()
