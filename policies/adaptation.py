"""A runner whose policy goes on learning from the stream that it runs, without labels."""

from collections import deque

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from resq_rl.envs import Policy, Problem
from resq_rl.errors import SettingsError
from resq_rl.policies.gradient_policy import adapt_policy, adaptable
from resq_rl.policies.runner import RunCost, Runner
from resq_rl.policies.unrolled_clips import BACKWARD_FRAMES, GradientSettings, clips_together
from resq_rl.quantization import Budget
from resq_rl.video import Clip, Framing
from resq_rl.video.images import Box

__all__ = ["AdaptiveRunner"]

EVERY, FRAMES = 192, 48  # frames after which it learns, from so many of the latest
PASSES = 2  # over them
RATES = 0.03, 0.006  # of thresholds and of the network; lower than of first training, since steps are few and noisy


class AdaptiveRunner(Runner):
    """A runner whose policy adapts to the video of its stream.

    After every 192 frames, the latest 48 run through the float network and, as a clip of their own, twice through the
    unrolled closed loop, which moves the policy's thresholds and network down the gradient of

        divergence(output, float output) + lambda * BOPs / BOPs of W8A8

    (`resq_rl.policies.gradient`). Until it has learned first, it runs as `Runner` does, bit for bit. Costs of frames do
    not include learning, which takes forward and backward passes in float32: `learned` tells how often it was done.

    Attributes:
        learned: how often the policy has learned from the stream.

    Raises:
        PolicyError: the policy was not learned by gradients (`adaptable`).
        SettingsError: a budget is given, the task begins with a label, or memory is too short for gradients.
    """

    def __init__(
        self, policy: Policy, problem: Problem, framing: Framing | None = None, budget: Budget | None = None
    ) -> None:
        if budget is not None:
            raise SettingsError(
                "A policy learns from a stream without a budget only, because gradients do not know of one: leave out "
                "the budget (running.budget, environment.budget), or adapting (running.adapt)."
            )
        if problem.recurrent is not None:
            raise SettingsError(
                f"A policy cannot learn from a stream of {type(problem.task).__name__}, whose clips begin with a "
                "label: leave out adapting (running.adapt)."
            )
        self.learned = 0
        super().__init__(policy, problem, framing, budget)
        adaptable(policy)
        clips_together(problem.model, GradientSettings().window, 1)

    def reset(self, given: UInt8[np.ndarray, "h w"] | UInt8[Tensor, "h w"] | None = None) -> None:
        """Begin a new video with the policy as it is now."""
        super().reset(given)
        self._recent: deque[Tensor] = deque(maxlen=FRAMES)
        self._due = EVERY

    def __call__(
        self, frame: UInt8[np.ndarray, "h w 3"] | UInt8[Tensor, "3 h w"], window: Box | None = None
    ) -> tuple[Tensor, RunCost]:
        """Run the next frame, as `Runner` does, and learn where it is time to."""
        result = super().__call__(frame, window)
        self._recent.append(self.frame)
        self._due -= 1
        if not self._due:
            self._due = EVERY
            self._learn()
        return result

    @torch.inference_mode(False)
    @torch.enable_grad()
    def _learn(self) -> None:
        clip = Clip(torch.stack(tuple(self._recent)), None, 25.0, "the stream", "its latest frames")
        problem = Problem.prepare(
            self.problem.model, self.problem.task, [clip], grid=self.problem.grid, source="teacher"
        )
        frames = PASSES * (1 + (FRAMES - 1) * BACKWARD_FRAMES)
        settings = GradientSettings(frames, learning_rate=RATES[0], network_rate=RATES[1])
        self.policy = adapt_policy(adaptable(self.policy), problem, settings, whole_range=False, seed=self.learned)
        self.learned += 1
