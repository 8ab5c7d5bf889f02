"""Agents over streams of clips: the core that every face of the environments shares."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from resq_rl.envs.actions import ActionScheme
from resq_rl.envs.streams import Policy, StreamResult, Streams
from resq_rl.errors import SettingsError, VideoError

__all__ = ["BatchedEnvironment", "EpisodeSettings", "Transition"]


@dataclass(frozen=True)
class EpisodeSettings:
    """The draws of each episode, and the reward of frames.

    Attributes:
        trade_off: lambda, or a range from which one is drawn log-uniformly for every clip.
        intervals: keyframe intervals, one of which is drawn for every clip; used by region agents only (0: no keyframe
            but the first).
        reward_scale: factor on the rewards.
        relative: subtract the float network's error from the error as a baseline: the best action stays the same, and
            the variance of the rewards falls.
        frame_share: share of the frame's reward in a region agent's; the rest is its own region's.
        shuffle: whether clips come in random order; otherwise in turn.
    """

    trade_off: float | tuple[float, float] = (0.05, 1.0)
    intervals: tuple[int, ...] = (16,)
    reward_scale: float = 1.0
    relative: bool = False
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
    """The result of one step, with one row per agent; `result` has one row per clip.

    Attributes:
        observations: of the next frame; of the next clip where one ended and was followed.
        rewards: scaled rewards.
        truncated: whether the agent's clip ended.
        final_observations: observations after the last frame, where any clip ended.
        result: the frame's simulation.
        frame_rewards: unscaled reward of each clip's frame.
        trade_off: lambda under which each clip's frame was rewarded.
    """

    observations: Float[np.ndarray, "agents n"]
    rewards: Float[np.ndarray, " agents"]
    truncated: Bool[np.ndarray, " agents"]
    final_observations: Float[np.ndarray, "agents n"] | None
    result: StreamResult
    frame_rewards: Float[np.ndarray, " b"]
    trade_off: Float[np.ndarray, " b"]


class BatchedEnvironment:
    """Agents that act on every clip of some streams; a clip that ends is followed at once by the next.

    Every slot draws from a generator of its own, so slot i of a batch seeded s behaves like a batch of one seeded s +
    i.

    Args:
        streams: the clips that step together; their `trade_off_range` must be the episodes'.
        scheme: actions and observations of the agents.
        episodes: what is drawn for each episode.
        autoreset: whether a clip that ends is followed by the next in the same step.
        fields: for actions of kind "keyframe", the policy whose fields the frames in between take; its own keyframes
            are ignored.

    Raises:
        SettingsError: the parts do not fit each other.
        VideoError: a clip has a single frame, which leaves nothing to decide.
    """

    def __init__(
        self,
        streams: Streams,
        scheme: ActionScheme,
        episodes: EpisodeSettings,
        *,
        autoreset: bool = True,
        fields: Policy | None = None,
    ) -> None:
        if scheme.groups != streams.problem.groups or scheme.grid != streams.problem.grid:
            raise SettingsError(
                f"The actions are for {scheme.groups} groups and grid {scheme.grid}, the problem has "
                f"{streams.problem.groups} and {streams.problem.grid}."
            )
        if streams.trade_off_range != episodes.trade_off_range:
            raise SettingsError(
                f"Episodes draw lambda from {episodes.trade_off_range}, but the streams' observations place it in "
                f"{streams.trade_off_range}: give both one range."
            )
        _check_fields(scheme, fields, streams)
        short = [clip.name for clip in streams.problem.clips if len(clip) < 2]
        if short:
            raise VideoError(
                f"An episode needs clips of 2 frames or more (the first is a forced keyframe), got one frame in "
                f"{', '.join(short[:3])} ({len(short)} of {len(streams.problem)} clips). Leave them out or read longer "
                "ones."
            )
        self.streams, self.scheme, self.episodes, self.autoreset = streams, scheme, episodes, autoreset
        self.fields = fields
        self.interval = torch.zeros(streams.slots, dtype=torch.int64)
        self._generators: list[np.random.Generator] = []
        self._queues: list[list[int]] = []
        self._view = streams.view()

    @property
    def clips(self) -> int:
        """Clips that step together."""
        return self.streams.slots

    @property
    def agents(self) -> int:
        """Agents that act together."""
        return self.clips * self.scheme.agents_per_clip

    def reset(self, seeds: Sequence[int] | None = None) -> Float[np.ndarray, "agents n"]:
        """Start a clip in every slot; with a seed for each slot, all that follows depends on them alone."""
        if seeds is not None or not self._generators:
            sources: Sequence[int | None] = seeds if seeds is not None else [None] * self.clips
            if len(sources) != self.clips:
                raise SettingsError(f"One seed for each of {self.clips} clips is needed, got {len(sources)}.")
            self._generators = [np.random.default_rng(s) for s in sources]
            self._queues = [[] for _ in range(self.clips)]
        self._start(list(range(self.clips)))
        return self._observe()

    def step(self, actions: Int[np.ndarray, "agents k"]) -> Transition:
        """Run one frame of every clip under the agents' actions.

        Raises:
            PolicyError: the actions do not fit, or a clip is over (without `autoreset`) or `reset` was not called.
        """
        due = (self.interval > 0) & (self.streams.age + 1 >= self.interval)
        field = None if self.fields is None else self.fields.decide(self._view).field
        place = self._view.observation.trade_off if self.scheme.base else None
        result = self.streams.step(self.scheme.decide(actions, due, field, place))
        trade_off = self.streams.trade_off.clone()  # clips that start below get another
        frame = result.reward(trade_off)
        rewards = self._rewards(result, frame)
        truncated = result.last.repeat_interleave(self.scheme.agents_per_clip)
        observations = self._observe()
        final = None
        if bool(result.last.any()):
            final = observations
            if self.autoreset:
                self._start(torch.nonzero(result.last)[:, 0].tolist())
                observations = self._observe()
        return Transition(
            observations,
            rewards.numpy().astype(np.float32),
            truncated.numpy(),
            final,
            result,
            frame.numpy(),
            trade_off.numpy(),
        )

    def _rewards(self, result: StreamResult, frame: Tensor) -> Float[Tensor, " agents"]:
        trade_off, episodes = self.streams.trade_off, self.episodes
        local = result.region_reward(trade_off)
        if episodes.relative:
            local = local - 1 + self.streams.engine.float_error(result.clip, result.time)
            frame = local.mean((1, 2))
        if self.scheme.agents == "frame":
            return frame * episodes.reward_scale
        mixed = (1 - episodes.frame_share) * local + episodes.frame_share * frame[:, None, None]
        return mixed.flatten() * episodes.reward_scale

    def _observe(self) -> Float[np.ndarray, "agents n"]:
        self._view = self.streams.view()  # its observation is also that of the fields' policy
        observed: np.ndarray = self.scheme.observe(self._view.observation).numpy()
        return observed

    def _start(self, slots: list[int]) -> None:
        low, high = (math.log(v) for v in self.episodes.trade_off_range)
        trade_off = []
        for slot in slots:
            generator = self._generators[slot]
            drawn = math.exp(generator.uniform(low, high))
            trade_off.append(drawn if high > low else self.episodes.trade_off_range[0])
            self.interval[slot] = int(generator.choice(np.array(self.episodes.intervals)))
        self.streams.start(slots, [self._next_clip(s) for s in slots], trade_off)

    def _next_clip(self, slot: int) -> int:
        queue = self._queues[slot]
        if not queue:
            order = np.arange(len(self.streams.problem))
            queue.extend((self._generators[slot].permutation(order) if self.episodes.shuffle else order).tolist())
        return queue.pop(0)

    # State for checkpoints -------------------------------------------------------------------------------------------

    def snapshot(self, *, streams: bool = True) -> dict[str, Any]:
        """The state on which the next steps depend, for `restore`; it is not a copy.

        Without `streams`, which take most of the room, clips in progress are left out: `reset` must follow `restore`.
        """
        return {
            "generators": [g.bit_generator.state for g in self._generators],
            "queues": self._queues,
            "interval": self.interval,
            "streams": self.streams.snapshot() if streams else None,
        }

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Go on from a snapshot, which then belongs to this environment; clips in progress go on where they stopped."""
        self._generators = [np.random.default_rng(0) for _ in snapshot["generators"]]
        for generator, state in zip(self._generators, snapshot["generators"], strict=True):
            generator.bit_generator.state = state
        self._queues = [list(queue) for queue in snapshot["queues"]]
        self.interval = snapshot["interval"]
        if snapshot["streams"] is not None:
            self.streams.restore(snapshot["streams"])
            self._view = self.streams.view()


def _check_fields(scheme: ActionScheme, fields: Policy | None, streams: Streams) -> None:
    if (scheme.kind == "keyframe") != (fields is not None):
        raise SettingsError(
            f"Actions of kind {scheme.kind!r} {'choose their fields' if fields is not None else 'choose no fields'}: "
            "give a policy as 'fields' with kind 'keyframe', and with no other."
        )
    if fields is not None and fields.reference != streams.reference:
        raise SettingsError(
            f"The policy of the fields is for the reference {fields.reference!r}, the problem has "
            f"{streams.reference!r}: give both one."
        )
