"""Many agents over one simulator: the core that every face of the environments shares."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from resq_rl.envs.actions import ActionScheme
from resq_rl.envs.simulator import FrameResult, Simulator
from resq_rl.errors import SettingsError

__all__ = ["BatchedEnvironment", "EpisodeSettings", "Transition"]


@dataclass(frozen=True)
class EpisodeSettings:
    """What is drawn for each episode, and how frames are rewarded.

    Attributes:
        trade_off: lambda, or a range from which one is drawn log-uniformly for every clip.
        intervals: keyframe intervals, one of which is drawn for every clip; used by region agents only (0: no keyframe but
            the first).
        reward_scale: factor on the rewards.
        frame_share: share of the frame's reward in a region agent's; the rest is its own region's.
        shuffle: whether clips come in random order; otherwise in turn.
    """

    trade_off: float | tuple[float, float] = (0.05, 1.0)
    intervals: tuple[int, ...] = (16,)
    reward_scale: float = 1.0
    frame_share: float = 0.0
    shuffle: bool = True

    def __post_init__(self) -> None:
        low, high = self.trade_off_range
        if not 0 < low <= high:
            raise SettingsError(f"trade_off must be positive, or an ascending positive range, got {self.trade_off}.")
        if not self.intervals or any(i < 0 for i in self.intervals):
            raise SettingsError(f"intervals must be 0 (first frame only) or more, got {list(self.intervals)}.")
        if not 0 <= self.frame_share <= 1:
            raise SettingsError(f"frame_share must lie in 0..1, got {self.frame_share}.")

    @property
    def trade_off_range(self) -> tuple[float, float]:
        """Lowest and highest lambda."""
        if isinstance(self.trade_off, int | float):
            return float(self.trade_off), float(self.trade_off)
        return float(self.trade_off[0]), float(self.trade_off[1])


@dataclass(frozen=True)
class Transition:
    """What one step gave, one row per agent; `result` has one row per clip.

    Attributes:
        observations: of the next frame, of the next clip where one ended.
        rewards: scaled rewards.
        truncated: whether the agent's clip ended.
        final_observations: observations after the last frame, where any clip ended.
        result: the frame's simulation.
        frame_rewards: unscaled reward of each clip's frame.
    """

    observations: Float[np.ndarray, "agents n"]
    rewards: Float[np.ndarray, " agents"]
    truncated: Bool[np.ndarray, " agents"]
    final_observations: Float[np.ndarray, "agents n"] | None
    result: FrameResult
    frame_rewards: Float[np.ndarray, " b"]


class BatchedEnvironment:
    """Clips stream through the simulator's slots; a clip that ends is followed at once by the next.

    Args:
        simulator: the simulator; its `trade_off_range` must be the episodes'.
        scheme: actions and observations of the agents.
        episodes: what is drawn for each episode.
    """

    def __init__(self, simulator: Simulator, scheme: ActionScheme, episodes: EpisodeSettings) -> None:
        if scheme.groups != simulator.groups or scheme.grid != simulator.grid:
            raise SettingsError(
                f"The actions are for {scheme.groups} groups and grid {scheme.grid}, the simulator has "
                f"{simulator.groups} and {simulator.grid}."
            )
        self.simulator, self.scheme, self.episodes = simulator, scheme, episodes
        self.interval = torch.zeros(simulator.slots, dtype=torch.int64)
        self._generator = np.random.default_rng()
        self._queue: list[int] = []

    @property
    def clips(self) -> int:
        """Clips that step together."""
        return self.simulator.slots

    @property
    def agents(self) -> int:
        """Agents that act together."""
        return self.clips * self.scheme.agents_per_clip

    def reset(self, generator: np.random.Generator | None = None) -> Float[np.ndarray, "agents n"]:
        """Start a clip in every slot; with a generator, all that follows depends on it alone."""
        if generator is not None:
            self._generator = generator
            self._queue = []
        self._start(list(range(self.clips)))
        return self._observe()

    def step(self, actions: Int[np.ndarray, "agents k"]) -> Transition:
        """Run one frame of every clip under the agents' actions.

        Raises:
            PolicyError: the actions do not fit, or `reset` was not called.
        """
        due = (self.interval > 0) & (self.simulator.age + 1 >= self.interval)
        result = self.simulator.step(self.scheme.decide(actions, due))
        trade_off = self.simulator.trade_off
        frame = result.reward(trade_off)
        rewards = frame
        if self.scheme.agents == "region":
            share = self.episodes.frame_share
            local = result.region_reward(trade_off)
            rewards = ((1 - share) * local + share * frame[:, None, None]).flatten()
        truncated = result.last.repeat_interleave(self.scheme.agents_per_clip)
        final = None
        if bool(result.last.any()):
            final = self._observe()
            self._start(torch.nonzero(result.last)[:, 0].tolist())
        return Transition(
            self._observe(),
            (rewards * self.episodes.reward_scale).numpy().astype(np.float32),
            truncated.numpy(),
            final,
            result,
            frame.numpy(),
        )

    def _observe(self) -> Float[np.ndarray, "agents n"]:
        return self.scheme.observe(self.simulator.observe())

    def _start(self, slots: list[int]) -> None:
        low, high = (math.log(v) for v in self.episodes.trade_off_range)
        draws = self._generator.uniform(low, high, len(slots))
        trade_off = [math.exp(d) if high > low else self.episodes.trade_off_range[0] for d in draws]
        chosen = self._generator.choice(np.array(self.episodes.intervals), len(slots))
        self.interval[slots] = torch.as_tensor(chosen)
        self.simulator.start(slots, [self._next_clip() for _ in slots], trade_off)

    def _next_clip(self) -> int:
        if not self._queue:
            order = np.arange(len(self.simulator.store))
            self._queue = (self._generator.permutation(order) if self.episodes.shuffle else order).tolist()
        return self._queue.pop(0)

    # What a checkpoint needs to go on exactly where it stopped -----------------------------------------------------

    def snapshot(self) -> dict[str, Any]:
        """Clip order and random state; clips in progress start anew when restored."""
        return {"generator": self._generator.bit_generator.state, "queue": list(self._queue)}

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Go on from a snapshot."""
        self._generator = np.random.default_rng()
        self._generator.bit_generator.state = snapshot["generator"]
        self._queue = list(snapshot["queue"])
