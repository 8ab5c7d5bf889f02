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
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from resq_rl.checked import Checked, Count, Positive
from resq_rl.envs import Decision, NetworkEngine, Problem
from resq_rl.envs.problem import gather
from resq_rl.errors import SettingsError
from resq_rl.policies.fixed import GroupThresholds, periodic_at
from resq_rl.quantization import DEFAULT_KAPPA, Reference, ThresholdField

__all__ = ["GradientSettings", "LearnedThresholds", "learn_thresholds"]

BACKWARD_FRAMES = 3  # a frame of backpropagation counts as so many
CONSTANTS = (0.05, 0.1, 0.2, 0.4, 0.7, 1.0, 1.4, 2.0, 2.8)  # tried first, for the range of lambda and to begin from
FIRST_WINDOWS = 2  # that they run
FREE, LOST = 0.01, 0.15  # what the finest constant of the range may lose in agreement, and the coarsest must


@dataclass(frozen=True)
class GradientSettings(Checked):
    """How thresholds are learned.

    Attributes:
        frames: environment frames to spend, of which one that is backpropagated counts three times; rounded up to
            whole windows.
        window: frames through which gradients reach.
        clips: clips that step together, each at its own lambda.
        learning_rate: of Adam on the logarithms of thresholds; falls linearly to a tenth.
        sharpness: slope of a level's gate over the logarithm of the magnitude, in the backward pass.
        knots: values of lambda at which thresholds are learned; between two, logarithms are interpolated.

    Raises:
        SettingsError: a value is out of range.
    """

    _group: ClassVar[str] = "gradient "

    frames: Count = 15_000
    window: Count = 6
    clips: Count = 6
    learning_rate: Positive = 0.05
    sharpness: Positive = 3.0
    knots: Count = 3


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
        known = np.log(self.trade_offs)
        log_taus = np.log([policy.taus for policy in self.policies])
        wanted = np.linspace(known[0], known[-1], count)
        taus = np.exp(np.stack([np.interp(wanted, known, column) for column in log_taus.T], 1))
        return [_with_taus(self.policies[0], row) for row in taus]


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
    settings = settings or GradientSettings()
    first = GroupThresholds(reference, interval, taus=(1.0,) * len(problem.model.sites), kappa=kappa)
    clips = _Clips(problem, first, settings, seed, progress)
    constants = _constants(clips)
    low, high = trade_offs or _trade_offs(constants)
    knots = np.geomspace(low, high, settings.knots) if high > low else np.array([low])
    best = [min(constants, key=lambda c: c.divergence + t * c.bops).tau for t in knots.tolist()]
    log_taus = torch.tensor(best).log()[:, None].repeat(1, len(first.taus)).requires_grad_()
    _descend(clips, knots, log_taus)
    learned = tuple(_with_taus(first, row) for row in log_taus.detach().exp().double().numpy())
    return LearnedThresholds(tuple(map(float, knots)), learned, clips.frames)


class _Clips:
    """Training clips that step together, from their first frames on.

    Attributes:
        frames: environment frames spent.
        left: frames of the clips that were not run yet; 0 before any begin.
        counts: `Task.counts` of agreement with the float network, of each frame since the clips began.
    """

    def __init__(
        self,
        problem: Problem,
        policy: GroupThresholds,
        settings: GradientSettings,
        seed: int,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self.lengths = np.array([len(clip) for clip in problem.clips])
        self.usable = np.flatnonzero(self.lengths > 1)
        if not len(self.usable):
            raise SettingsError("Thresholds are learned on residual frames: give training clips of 2 frames or more.")
        self.problem, self.engine, self.policy, self.settings = problem, NetworkEngine(problem), policy, settings
        self.generator, self._progress = np.random.default_rng(seed), progress
        self.count = min(settings.clips, len(self.usable))
        self.frames, self.left = 0, 0

    def draw(self) -> np.ndarray:
        """Clips to begin with; no two are the same."""
        return self.generator.choice(self.usable, self.count, replace=False)

    def start(self, drawn: np.ndarray) -> None:
        """Begin clips: their first frames run as keyframes."""
        self.clip, self.time = torch.from_numpy(drawn), 0
        self.left = int(self.lengths[drawn].min())
        self.state = self.engine.new_state(self.count, self.policy.reference)
        self.counts: list[Tensor] = []
        self._step(torch.zeros(self.count, len(self.policy.taus)))

    def window(self, log_taus: Float[Tensor, "b s"]) -> Float[Tensor, "2 b"]:
        """Divergence and share of W8A8 BOPs of each clip, averaged over the next frames."""
        self.state.references.detach()
        frames = min(self.settings.window, self.left)
        return torch.stack([self._step(log_taus) for _ in range(frames)]).mean(0)

    def _step(self, log_taus: Float[Tensor, "b s"]) -> Float[Tensor, "2 b"]:
        times = torch.full((self.count,), self.time)
        age = self.state.age
        field = ThresholdField(log_taus.exp()[:, :, None, None], self.policy.kappa)
        decision = Decision((age < 0) | periodic_at(age, self.policy.interval), field)
        inputs, sharpness = self.engine.inputs(self.clip, times), self.settings.sharpness
        output, prediction, cost = self.engine.unrolled(inputs, self.state, decision, sharpness)
        teacher = self.problem.task.target(gather(self.problem.teacher, self.clip, times))
        self.counts.append(self.problem.task.counts(prediction, teacher).sum(0))
        divergence = self.problem.task.divergence(output, self.engine.float_output(self.clip, times))
        self.time, self.left = self.time + 1, self.left - 1
        spent = self.count * (BACKWARD_FRAMES if log_taus.requires_grad else 1)
        self.frames += spent
        if self._progress is not None:
            self._progress(spent)
        return torch.stack([divergence, (cost.total / self.problem.reference_bops).float()])


class _Constant(NamedTuple):
    """What one threshold for all layers gave."""

    tau: float
    bops: float
    divergence: float
    agreement: float


def _constants(clips: _Clips) -> list[_Constant]:
    """Constant thresholds on the same frames, from many BOPs to few."""
    drawn, found = clips.draw(), []
    for tau in CONSTANTS:
        clips.start(drawn)
        log_taus = torch.full((clips.count, len(clips.policy.taus)), tau).log()
        windows = [clips.window(log_taus) for _ in range(FIRST_WINDOWS) if clips.left]
        divergence, bops = torch.stack(windows).mean((0, 2)).tolist()
        agreement = float(clips.problem.task.accuracy(torch.stack(clips.counts).sum(0)))
        found.append(_Constant(tau, bops, divergence, agreement))
    return found


def _trade_offs(constants: Sequence[_Constant]) -> tuple[float, float]:
    """The range of lambda that matters: the slopes of divergence over BOPs between constant thresholds.

    They are those from the last one that agrees with the float network as the best does, within FREE, to the first
    one that LOST more than that; three of them at least.

    Raises:
        SettingsError: no threshold diverges less for more BOPs.
    """
    best = max(c.agreement for c in constants)
    first = max((i for i, c in enumerate(constants[:-2]) if c.agreement >= best - FREE), default=0)
    lost = (i for i, c in enumerate(constants) if i > first + 1 and c.agreement < best - LOST)
    last = next(lost, len(constants) - 1)
    slopes = _slopes(constants[first : last + 1]) or _slopes(constants)
    if not slopes:
        raise SettingsError(
            "Thresholds cannot be learned: on the first training clips, no constant threshold brings the output nearer "
            "to the float network's for more BOPs. Look at the network and its task."
        )
    return min(slopes), max(slopes)


def _slopes(constants: Sequence[_Constant]) -> list[float]:
    """Divergence saved per BOPs spent from one to the next, where more BOPs save any."""
    pairs = [(a, b) for a, b in pairwise(constants) if a.bops > b.bops and a.divergence < b.divergence]
    return [(b.divergence - a.divergence) / (a.bops - b.bops) for a, b in pairs]


def _descend(clips: _Clips, knots: np.ndarray, log_taus: Float[Tensor, "k s"]) -> None:
    """Step the logarithms of the thresholds down their gradient, window by window."""
    settings, begun = clips.settings, clips.frames
    optimizer = torch.optim.Adam([log_taus], lr=settings.learning_rate)
    while clips.frames < settings.frames:
        clips.start(clips.draw())
        weights = _weights(clips, len(knots))
        trade_offs = (weights @ torch.from_numpy(knots).float().log()).exp()
        while clips.left and clips.frames < settings.frames:
            done = (clips.frames - begun) / (settings.frames - begun)
            divergence, bops = clips.window(weights @ log_taus)
            loss = (divergence / trade_offs + bops).mean()  # scaled so that every lambda moves thresholds alike
            if loss.requires_grad:  # not where all frames of the window are keyframes
                optimizer.param_groups[0]["lr"] = settings.learning_rate * (1 - 0.9 * done)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()


def _weights(clips: _Clips, knots: int) -> Float[Tensor, "b k"]:
    """A lambda for each clip, spread over the range, as the weights of the knots between which it lies."""
    place = (clips.generator.permutation(clips.count) + clips.generator.uniform(size=clips.count)) / clips.count
    distance = np.abs(place[:, None] * (knots - 1) - np.arange(knots))
    return torch.from_numpy(np.maximum(1 - distance, 0)).float()
