"""Static thresholds per layer, learned by gradients through the unrolled network."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from resq_rl.envs import Problem
from resq_rl.envs.problem import gather
from resq_rl.errors import SettingsError
from resq_rl.perception import recurrent_inputs
from resq_rl.policies.fixed import GroupThresholds
from resq_rl.quantization import DEFAULT_KAPPA, LevelField, Reference, as_tuple, to_float

__all__ = ["GradientSettings", "LearnedThresholds", "learn_thresholds"]

BACKWARD_FRAMES = 3  # a frame of backpropagation counts as so many
FIRST_TAUS = (0.2, 0.4, 0.7, 1.0, 1.4, 2.0, 2.8)  # tried as constants, to begin from and to scale lambda by


@dataclass(frozen=True)
class GradientSettings:
    """How thresholds are learned.

    Attributes:
        frames: frames that are backpropagated, forced keyframes not counted.
        window: frames through which gradients reach; the state is carried from window to window.
        clips: clips that step together.
        learning_rate: of Adam on the logarithms of the thresholds; falls linearly to a tenth.
        sharpness: slope of a level's gate in the backward pass, over the logarithm of the magnitude.
        knots: values of lambda at which thresholds are learned; between them their logarithms are interpolated.
    """

    frames: int = 4608
    window: int = 6
    clips: int = 6
    learning_rate: float = 0.05
    sharpness: float = 3.0
    knots: int = 5

    def __post_init__(self) -> None:
        if min(self.frames, self.window, self.clips, self.knots) < 1:
            raise SettingsError(f"frames, window, clips and knots must be 1 or more, got {self}.")
        if not (self.learning_rate > 0 and self.sharpness > 0):
            raise SettingsError(f"learning_rate and sharpness must be positive, got {self}.")


@dataclass(frozen=True)
class LearnedThresholds:
    """Thresholds per layer at some values of lambda, by which the divergence from the float network is traded for BOPs.

    Attributes:
        trade_offs: ascending values of lambda. Divergence is measured in the task's unit, not as the error of rewards.
        taus: thresholds of each layer at each of them.
        interval, reference, kappa: as of the policies.
        frames: frames simulated for them, of which a backpropagated one counts three times.
    """

    trade_offs: tuple[float, ...]
    taus: tuple[tuple[float, ...], ...]
    interval: int
    reference: Reference
    kappa: tuple[float, ...]
    frames: int

    def policies(self, count: int) -> list[GroupThresholds]:
        """Policies at `count` values of lambda, evenly by ratio over the range."""
        known = np.log(self.trade_offs)
        wanted = np.linspace(known[0], known[-1], count)
        log_taus = np.log(np.array(self.taus))
        rows = np.stack([np.interp(wanted, known, column) for column in log_taus.T], 1)
        return [
            GroupThresholds(self.reference, self.interval, taus=tuple(float(t) for t in np.exp(row)), kappa=self.kappa)
            for row in rows
        ]


def learn_thresholds(
    problem: Problem,
    settings: GradientSettings,
    *,
    interval: int = 0,
    reference: Reference = "previous",
    kappa: tuple[float, ...] = DEFAULT_KAPPA,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> LearnedThresholds:
    """Learn a threshold for every layer and a range of lambda, on clips without labels.

    The closed loop is unrolled over windows of frames; loss = divergence of the output from the float network's
    (`Task.divergence`) + lambda * share of W8A8 BOPs, with lambda drawn for each clip.

    Args:
        problem: the network, its task and training clips.
        interval: frames between keyframes; 0 for the first only.
        reference: what residuals are taken against.
        kappa: multipliers of the thresholds by level.
        progress: called with the number of frames done.
    """
    trainer = _Trainer(problem, settings, interval, reference, kappa, seed)
    trainer.begin()
    trainer.run(progress)
    return trainer.result()


class _Trainer:
    """The clips in progress and the thresholds so far."""

    def __init__(
        self,
        problem: Problem,
        settings: GradientSettings,
        interval: int,
        reference: Reference,
        kappa: tuple[float, ...],
        seed: int,
    ) -> None:
        self.problem, self.settings = problem, settings
        self.interval, self.reference, self.kappa = interval, reference, kappa
        self.generator = np.random.default_rng(seed)
        self.frames = 0  # simulated, with backpropagated ones counted three times

    # Where it begins -------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Measure constant thresholds on a few clips: they give the range of lambda, and the best of them to begin from.

        Raises:
            SettingsError: no constant threshold diverges less for more BOPs.
        """
        layers = len(self.problem.model.sites)
        points = []
        for tau in FIRST_TAUS:
            log_tau = torch.full((self._clips, layers), math.log(tau))
            with torch.no_grad():
                losses = [self._window(log_tau) for _ in self._restarted(2)]
            divergence, bops = (float(torch.stack(part).mean()) for part in zip(*losses, strict=True))
            points.append((bops, divergence, tau))
        slopes = [(b[1] - a[1]) / (a[0] - b[0]) for a, b in zip(points, points[1:], strict=False) if a[0] > b[0]]
        slopes = [slope for slope in slopes if slope > 0]
        if not slopes:
            raise SettingsError(
                "No constant threshold diverges less from the float network for more bits, on the first training "
                "clips: look at the network and its task."
            )
        self.trade_offs = np.geomspace(min(slopes) / 4, max(slopes), self.settings.knots)
        best = [min(points, key=lambda p: p[1] + float(t) * p[0])[2] for t in self.trade_offs]
        self.log_taus = torch.tensor(best).log()[:, None].repeat(1, layers).requires_grad_()

    # Clips in progress -----------------------------------------------------------------------------------------------

    @property
    def _clips(self) -> int:
        return min(self.settings.clips, len(self.problem))

    def _start(self) -> None:
        """Draw clips and run their first frames as keyframes."""
        lengths = np.array([len(clip) for clip in self.problem.clips])
        drawn = self.generator.permutation(len(lengths))[: self._clips]
        self.clip = torch.from_numpy(drawn)
        self.length, self.time = int(lengths[drawn].min()), 0
        self.state = self.problem.model.new_state(len(drawn), self.reference)
        starts = [self.problem.starts[c].prediction for c in drawn] if self.problem.starts else []
        self.previous = torch.stack(starts) if starts else torch.zeros(len(drawn), 0)
        self._keyframe()

    def _restarted(self, windows: int) -> Sequence[int]:
        self.generator = np.random.default_rng(0) if not hasattr(self, "log_taus") else self.generator
        self._start()
        return range(min(windows, max(1, (self.length - 1) // self.settings.window)))

    def _inputs(self) -> tuple[Tensor, ...]:
        problem = self.problem
        frames = gather(problem.frame_tensors, self.clip, torch.full_like(self.clip, self.time))
        task = problem.recurrent
        starts = [problem.starts[c] for c in self.clip.tolist()] if task is not None else []
        given = frames if task is None else recurrent_inputs(task, frames, self.previous, starts)
        return tuple(to_float(part.to(problem.model.device)) for part in as_tuple(given))

    def _keyframe(self) -> None:
        problem, clips = self.problem, len(self.clip)
        field = LevelField.constant(0, clips, problem.groups)
        raw, _ = problem.model.step(self._inputs(), self.state, torch.ones(clips, dtype=torch.bool), field)
        self._remember(raw)

    def _remember(self, raw: object) -> None:
        """Move on by a frame; a recurrent task is fed its own prediction, through which no gradient leads."""
        problem = self.problem
        if problem.recurrent is not None and self.time:
            output = problem.task.output(raw, problem.model.frame_size)
            self.previous = problem.task.predict(output.detach()).cpu()
        self.time += 1
        self.frames += len(self.clip)

    # Learning --------------------------------------------------------------------------------------------------------

    def _window(self, log_tau: Float[Tensor, "b s"]) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """Divergence and share of W8A8 BOPs of each clip, averaged over the next frames."""
        problem, losses, costs = self.problem, [], []
        for _ in range(min(self.settings.window, self.length - self.time)):
            if self.interval and int(self.state.age[0]) + 1 >= self.interval:
                self._keyframe()
                continue
            inputs = self._inputs()
            raw, bops = problem.model.unrolled_step(
                inputs, self.state, log_tau, self.kappa, sharpness=self.settings.sharpness
            )
            size = problem.model.frame_size
            teacher = problem.task.output(problem.model.float_forward(inputs), size)
            losses.append(problem.task.divergence(problem.task.output(raw, size), teacher))
            costs.append(bops / problem.reference_bops)
            self._remember(raw)
        return torch.stack(losses).mean(0), torch.stack(costs).mean(0)

    def run(self, progress: Callable[[int], None] | None) -> None:
        """Descend until as many frames are backpropagated as the settings say."""
        settings, before = self.settings, self.frames
        optimizer = torch.optim.Adam([self.log_taus], lr=settings.learning_rate)
        done = 0
        self._start()
        trade_off, weights = self._lambdas()
        while done < settings.frames:
            optimizer.param_groups[0]["lr"] = settings.learning_rate * (1 - 0.9 * done / settings.frames)
            if self.time >= self.length:
                self._start()
                trade_off, weights = self._lambdas()
            start = self.time
            divergence, bops = self._window(weights @ self.log_taus)
            loss = ((divergence + trade_off * bops) / trade_off).mean()  # every lambda moves thresholds alike
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            self.state.detach()
            step = (self.time - start) * len(self.clip)
            done += step
            if progress is not None:
                progress(step)
        self.frames += (BACKWARD_FRAMES - 1) * (self.frames - before)

    def _lambdas(self) -> tuple[Float[Tensor, " b"], Float[Tensor, "b k"]]:
        """A lambda for each clip, spread over the range, and its weights on the knots."""
        clips, knots = len(self.clip), len(self.trade_offs)
        place = (self.generator.permutation(clips) + self.generator.uniform(size=clips)) / clips * (knots - 1)
        low = np.minimum(place.astype(int), max(0, knots - 2))
        weights = np.zeros((clips, knots))
        weights[np.arange(clips), low] = 1 - (place - low)
        if knots > 1:
            weights[np.arange(clips), low + 1] += place - low
        chosen = np.exp(weights @ np.log(self.trade_offs))
        return torch.from_numpy(chosen).float(), torch.from_numpy(weights).float()

    def result(self) -> LearnedThresholds:
        """The thresholds learned so far."""
        taus = tuple(tuple(float(t) for t in row) for row in self.log_taus.detach().exp())
        trade_offs = tuple(float(t) for t in self.trade_offs)
        return LearnedThresholds(trade_offs, taus, self.interval, self.reference, self.kappa, self.frames)
