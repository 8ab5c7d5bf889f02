"""The stable-baselines3 face: many agents stepping in one forward pass."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv

from resq_rl.envs.batched import BatchedEnvironment, Transition
from resq_rl.errors import SettingsError

__all__ = ["AgentsVecEnv"]


class AgentsVecEnv(VecEnv):
    """A `VecEnv` whose sub-environments are agents: one per clip, or one per clip and region.

    Ends of clips are truncations: `infos[i]` then holds `terminal_observation` and `TimeLimit.truncated`, and for the
    first agent of each clip `episode` with the frame rewards' sum `r` and the length `l`.

    Attributes:
        bootstrap: if set, what is to come after observations, discounted; it is added to the last rewards of clips for
            all their agents at once, where stable-baselines3 would do so one agent at a time, and `infos` do not ask
            for it.
        frames: frames simulated so far, forced keyframes included.
        last: the last step's transition, for callbacks.

    Raises:
        SettingsError: `core` does not follow a clip that ends by the next (autoreset), as stable-baselines3 needs it
            to.
    """

    def __init__(self, core: BatchedEnvironment) -> None:
        if not core.autoreset:
            raise SettingsError("Agents of stable-baselines3 need a BatchedEnvironment with autoreset=True.")
        self.core = core
        scheme = core.scheme
        observation = spaces.Box(0.0, 1.0, (scheme.observation_size,), np.float32)
        self.render_mode = None
        super().__init__(core.agents, observation, spaces.MultiDiscrete(list(scheme.nvec)))
        self.frames = 0
        self.last: Transition | None = None
        self.bootstrap: Callable[[np.ndarray], np.ndarray] | None = None
        self._actions: np.ndarray | None = None
        self._returns = np.zeros(core.clips)
        self._lengths = np.zeros(core.clips, dtype=np.int64)

    def reset(self) -> Any:
        """Start a clip in every slot."""
        first = self._seeds[0]
        observations = self.core.reset(None if first is None else [first + i for i in range(self.core.clips)])
        self._reset_seeds()
        self._reset_options()
        self.frames += self.core.clips
        self._returns[:] = 0
        self._lengths[:] = 0
        return observations

    def step_async(self, actions: np.ndarray) -> None:
        """Remember the actions for `step_wait`."""
        self._actions = actions

    def step_wait(self) -> Any:
        """Run the frame."""
        if self._actions is None:
            raise RuntimeError("step_wait() without step_async(actions).")
        step = self.core.step(self._actions)
        self.last = step
        self.frames += self.core.clips + int(step.result.last.sum())
        self._returns += step.frame_rewards
        self._lengths += 1
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        rewards = step.rewards
        if step.final_observations is not None:
            self._end_episodes(step, infos)
            if self.bootstrap is not None:
                rewards = rewards.copy()
                rewards[step.truncated] += self.bootstrap(step.final_observations[step.truncated])
        return step.observations, rewards, step.truncated, infos

    def _end_episodes(self, step: Transition, infos: list[dict[str, Any]]) -> None:
        assert step.final_observations is not None
        for agent in np.nonzero(step.truncated)[0]:
            infos[agent] = {
                "terminal_observation": step.final_observations[agent],
                "TimeLimit.truncated": self.bootstrap is None,
            }
        per_clip = self.core.scheme.agents_per_clip
        for clip in np.nonzero(step.result.last.numpy())[0]:
            infos[clip * per_clip]["episode"] = {
                "r": float(self._returns[clip]),
                "l": int(self._lengths[clip]),
            }
            self._returns[clip], self._lengths[clip] = 0.0, 0

    def snapshot(self, *, streams: bool = True) -> dict[str, Any]:
        """All that the steps to come depend on, for `restore`, as of a `BatchedEnvironment`."""
        counts = {"frames": self.frames, "returns": self._returns.tolist(), "lengths": self._lengths.tolist()}
        return {**counts, "core": self.core.snapshot(streams=streams)}

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Go on from a snapshot."""
        self.frames = snapshot["frames"]
        self._returns[:], self._lengths[:] = snapshot["returns"], snapshot["lengths"]
        self.core.restore(snapshot["core"])
        self._reset_seeds()  # the restored generators go on, where a seed would start them anew

    def close(self) -> None:
        """Nothing to release."""

    def get_attr(self, attr_name: str, indices: int | Iterable[int] | None = None) -> list[Any]:
        """The same value for every agent: they share one environment."""
        return [getattr(self, attr_name)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: int | Iterable[int] | None = None) -> None:
        """Set an attribute of the whole environment."""
        setattr(self, attr_name, value)

    def env_method(
        self, method_name: str, *args: Any, indices: int | Iterable[int] | None = None, **kwargs: Any
    ) -> list[Any]:
        """Call a method of the whole environment once."""
        result = getattr(self, method_name)(*args, **kwargs)
        return [result] * len(list(self._get_indices(indices)))

    def env_is_wrapped(
        self, wrapper_class: Any, indices: int | Sequence[int] | Iterable[int] | None = None
    ) -> list[bool]:
        """No agent is wrapped."""
        return [False] * len(list(self._get_indices(indices)))
