"""Training clips that step together through the unrolled closed loop, under thresholds that are being learned."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from resq_rl.checked import Checked, Count, Positive
from resq_rl.envs import ActionScheme, Conditions, Decision, FrameInputs, NetworkEngine, Problem
from resq_rl.envs.network_engine import NetworkState, clips_that_fit
from resq_rl.envs.problem import gather
from resq_rl.errors import SettingsError, ShortMemoryError
from resq_rl.policies.fixed import GroupThresholds, periodic
from resq_rl.quantization import Reference, ResQModel, ThresholdField

__all__ = [
    "BACKWARD_FRAMES",
    "ClipsTogether",
    "GradientSettings",
    "RegionOffsets",
    "UnrolledClips",
    "clips_together",
]

log = logging.getLogger(__name__)

UNROLLED = 2.5  # times the memory of a step that a frame takes while its gradients are due
BACKWARD_FRAMES = 3  # a frame of backpropagation counts as so many


@dataclass(frozen=True)
class GradientSettings(Checked):
    """How thresholds are learned.

    Attributes:
        frames: environment frames to spend, of which one that is backpropagated counts three times; rounded up to
            whole windows.
        window: frames through which gradients reach.
        clips: clips from which one step of learning is made, each at its own lambda.
        learning_rate: of Adam on the logarithms of thresholds; falls linearly to a tenth.
        network_rate: of Adam on the weights of a network that decides by region; falls likewise.
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
    network_rate: Positive = 0.01
    sharpness: Positive = 3.0
    knots: Count = 3


class RegionOffsets(nn.Module):
    """A multi-layer perceptron by region, whose outputs are places among the factors of a scheme's base.

    It begins at the factor 1 everywhere. Places are rounded in the forward pass, and not in the backward one.

    Args:
        scheme: region agents that choose factors, which must be evenly spaced by ratio.
        hidden: units of each hidden layer.
        generator: draws the first weights.
    """

    def __init__(self, scheme: ActionScheme, hidden: tuple[int, ...], generator: torch.Generator) -> None:
        super().__init__()
        widths = [scheme.observation_size, *hidden, len(scheme.nvec)]
        self.scheme = scheme
        self.layers = nn.ModuleList(nn.utils.skip_init(nn.Linear, i, o) for i, o in pairwise(widths))
        with torch.no_grad():
            for layer in self._linear:
                layer.weight.normal_(0, layer.in_features**-0.5, generator=generator)
                layer.bias.zero_()
            self.head.weight.zero_()
            self.head.bias.fill_(float(scheme.neutral))

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """Weights of the layers, copied."""
        return tuple(layer.weight.detach().clone() for layer in self._linear)

    @property
    def biases(self) -> tuple[Tensor, ...]:
        """Biases of the layers, copied."""
        return tuple(layer.bias.detach().clone() for layer in self._linear)

    @torch.no_grad()
    def begin_at(self, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> None:
        """Take the weights and biases of a network of the same shape."""
        for layer, weight, bias in zip(self._linear, weights, biases, strict=True):
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)

    @property
    def _linear(self) -> list[nn.Linear]:
        return [layer for layer in self.layers if isinstance(layer, nn.Linear)]

    @property
    def head(self) -> nn.Linear:
        """The last layer."""
        return self._linear[-1]

    def forward(self, observations: Float[Tensor, "n i"]) -> Float[Tensor, "n k"]:
        """The logarithm of the factor of each region and layer group."""
        x = observations
        for layer in self.layers[:-1]:
            x = torch.tanh(layer(x))
        place = self.head(x)
        top = len(self.scheme.thresholds) - 1
        taken = place + (place.round().clamp(0, top) - place).detach()
        logs = torch.tensor(self.scheme.thresholds).log()
        moves: Tensor = (taken - self.scheme.neutral) * (logs[-1] - logs[0]) / top
        return moves


def clips_together(model: ResQModel, window: int, wanted: int) -> int:
    """How many clips can step together under gradients through `window` frames; fewer than wanted in short memory.

    Raises:
        ShortMemoryError: there is not enough for one.
    """
    fit, each = clips_that_fit(model, UNROLLED * window), UNROLLED * window * model.simulation_bytes / 2**30
    if fit < 1:
        raise ShortMemoryError(
            f"Learning by gradients through {window} frames takes about {each:.1f} GiB, and less is free. Free some, "
            "use smaller frames (video.size), or train without (training.trainer=ppo training.warm_start=best)."
        )
    if fit < wanted:
        log.info("%d clips step together instead of %d, since each takes about %.1f GiB.", fit, wanted, each)
    return min(wanted, fit)


@dataclass
class ClipsTogether:
    """Clips that step together.

    Attributes:
        rows: their places among the clips that were drawn.
        clip: index of each in the problem.
        state: of the engine.
        conditions: under which offsets observe them; None without offsets.
        time: the frame that runs next.
    """

    rows: slice
    clip: Int64[Tensor, " b"]
    state: NetworkState
    conditions: Conditions | None
    time: int = 0


class UnrolledClips:
    """Training clips from which one step of learning is made, from their first frames on.

    They step together where memory allows it. Else they do so in parts, one after another, whose gradients add up to
    the same but for the order of sums.

    Attributes:
        frames: environment frames spent.
        count: clips that are drawn; fewer than the settings say where there are fewer.
        parts: the clips that step together; none before any begin.
        counts: `Task.counts` of agreement with the float network, of each frame since the clips began.
        offsets: moves the thresholds of each region from its observation; None for thresholds that are the same
            everywhere.
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
        self._together = clips_together(problem.model, settings.window, self.count)
        self.frames, self._shortest = 0, 0
        self.parts: list[ClipsTogether] = []
        self.offsets: RegionOffsets | None = None

    @classmethod
    def of_layers(
        cls,
        problem: Problem,
        reference: Reference,
        interval: int,
        kappa: tuple[float, ...],
        settings: GradientSettings | None,
        seed: int,
        progress: Callable[[int], None] | None = None,
    ) -> "UnrolledClips":
        """Training clips under a threshold for every layer, all 1 to begin with."""
        ones = GroupThresholds(reference, interval, taus=(1.0,) * len(problem.model.sites), kappa=kappa)
        return cls(problem, ones, settings or GradientSettings(), seed, progress)

    def draw(self) -> np.ndarray:
        """Clips to begin with; no two are the same."""
        return self.generator.choice(self.usable, self.count, replace=False)

    @property
    def left(self) -> int:
        """Frames of the clips that were not run yet; 0 before any begin."""
        return self._shortest - self.parts[-1].time if self.parts else 0

    def start(self, drawn: np.ndarray, conditions: Conditions | None = None) -> None:
        """Begin clips, with offsets under given conditions: their first frames run as keyframes."""
        self._shortest, self.counts = int(self.lengths[drawn].min()), list[Tensor]()
        self.parts = []
        for first in range(0, len(drawn), self._together):
            rows = slice(first, first + self._together)
            clip = torch.from_numpy(drawn[rows])
            own = conditions and conditions.rows(rows)
            self.parts.append(ClipsTogether(rows, clip, self.engine.new_state(len(clip), self.policy.reference), own))
        for part in self.parts:
            self._step(part, torch.zeros(len(part.clip), len(self.policy.taus)))

    def window(self, part: ClipsTogether, log_taus: Float[Tensor, "b s"]) -> Float[Tensor, "2 b"]:
        """Divergence and share of W8A8 BOPs of each clip of a part, averaged over its next frames."""
        part.state.references.detach()
        frames = min(self.settings.window, self._shortest - part.time)
        return torch.stack([self._step(part, log_taus) for _ in range(frames)]).mean(0)

    @torch.no_grad()
    def first_windows(self, drawn: np.ndarray, log_taus: Float[Tensor, " s"], windows: int) -> tuple[float, float]:
        """Mean divergence and share of W8A8 BOPs of the first windows of clips, under the same thresholds for all."""
        self.start(drawn)
        by_clip = log_taus.expand(self.count, -1)
        found = [
            torch.cat([self.window(part, by_clip[part.rows]) for part in self.parts], 1)
            for _ in range(windows)
            if self.left
        ]
        divergence, bops = torch.stack(found).mean((0, 2)).tolist()
        return divergence, bops

    def _step(self, part: ClipsTogether, log_taus: Float[Tensor, "b s"]) -> Float[Tensor, "2 b"]:
        times = torch.full((len(part.clip),), part.time)
        age = part.state.age
        inputs, sharpness = self.engine.inputs(part.clip, times), self.settings.sharpness
        field = ThresholdField(self._moved(part, log_taus, inputs).exp(), self.policy.kappa)
        decision = Decision((age < 0) | periodic(age, self.policy.interval), field)
        output, prediction, cost = self.engine.unrolled(inputs, part.state, decision, sharpness)
        teacher = self.problem.task.target(gather(self.problem.teacher, part.clip, times))
        self.counts.append(self.problem.task.counts(prediction, teacher).sum(0))
        divergence = self.problem.task.divergence(output, self.engine.float_output(part.clip, times))
        part.time += 1
        spent = len(part.clip) * (BACKWARD_FRAMES if log_taus.requires_grad else 1)
        self.frames += spent
        if self._progress is not None:
            self._progress(spent)
        return torch.stack([divergence, (cost.total / self.problem.reference_bops).float()])

    def _moved(
        self, part: ClipsTogether, log_taus: Float[Tensor, "b s"], inputs: FrameInputs
    ) -> Float[Tensor, "b s rows columns"]:
        """The logarithms of thresholds by region."""
        whole = log_taus[:, :, None, None]
        if self.offsets is None or part.conditions is None:
            return whole
        if not part.time:  # nothing was observed yet, and the frame is a keyframe
            return whole.expand(-1, -1, *self.problem.grid)
        observed = self.offsets.scheme.observe(self.engine.observe(inputs, part.state, part.conditions))
        by_region = self.offsets(observed).unflatten(0, (len(part.clip), *self.problem.grid))
        moved: Tensor = whole + by_region.permute(0, 3, 1, 2)[:, self.problem.model.group_of_site]
        return moved
