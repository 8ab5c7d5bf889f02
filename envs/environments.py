"""The registered environments, single and vector."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, ClassVar, TypedDict, Unpack

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from jaxtyping import Float, Int, UInt8

from resq_rl.envs.actions import DEFAULT_THRESHOLDS, ActionKind, ActionScheme
from resq_rl.envs.batched import BatchedEnvironment, EpisodeSettings, Transition
from resq_rl.envs.network_engine import NetworkEngine
from resq_rl.envs.problem import Problem
from resq_rl.envs.streams import Streams
from resq_rl.errors import SettingsError
from resq_rl.perception import Segmentation, compact_ddrnet
from resq_rl.quantization import DEFAULT_KAPPA, Budget, Reference, ResQModel
from resq_rl.quantization.specification.budget import read_budget
from resq_rl.video import GeneratedVideo

__all__ = [
    "EnvironmentArguments",
    "FrameBits",
    "FrameLevel",
    "RegionBits",
    "RegionThresholds",
    "ResQEnv",
    "ResQVectorEnv",
    "default_problem",
    "register",
]


@lru_cache(maxsize=2)
def default_problem(clips: int = 4, frames: int = 16) -> Problem:
    """The shipped network, calibrated, with its task and a few generated clips: enough to try an environment."""
    task = Segmentation()
    video = GeneratedVideo(train=clips, frames=frames)
    made = video.clips("train")
    height, width = video.size
    model = ResQModel(compact_ddrnet(), torch.zeros(1, 3, height, width)).compile()
    return Problem.prepare(model.calibrate([clip.frames for clip in made]), task, made)


class EnvironmentArguments(TypedDict, total=False):
    """The arguments of all registered environments, beside `problem` and those of Gymnasium: see `ResQEnv`."""

    reference: Reference
    trade_off: float | tuple[float, float]
    budget: Budget | Mapping[str, float] | None
    by_group: bool
    thresholds: tuple[float, ...]
    kappa: tuple[float, ...]
    reward_scale: float
    shuffle: bool


def _agents(
    kind: ActionKind,
    slots: int,
    problem: Problem | None,
    *,
    autoreset: bool,
    reference: Reference = "previous",
    trade_off: float | tuple[float, float] = 0.3,
    budget: Budget | Mapping[str, float] | None = None,
    by_group: bool = False,
    thresholds: tuple[float, ...] = DEFAULT_THRESHOLDS,
    kappa: tuple[float, ...] = DEFAULT_KAPPA,
    reward_scale: float = 1.0,
    shuffle: bool = True,
) -> BatchedEnvironment:
    problem = default_problem() if problem is None else problem
    episodes = EpisodeSettings(trade_off=trade_off, reward_scale=reward_scale, shuffle=shuffle)
    levels = len(problem.model.config.levels)
    scheme = ActionScheme(kind, "frame", problem.groups, problem.grid, levels, by_group, thresholds, kappa)
    streams = Streams(
        NetworkEngine(problem),
        slots=slots,
        reference=reference,
        trade_off_range=episodes.trade_off_range,
        budget=read_budget(budget),
    )
    return BatchedEnvironment(streams, scheme, episodes, autoreset=autoreset)


def _frame_info(step: Transition, slot: int) -> dict[str, Any]:
    result = step.result
    return {
        "error": float(result.error[slot].mean()),
        "bops": float(result.share[slot].mean()),
        "keyframe": bool(result.cost.keyframe[slot]),
        "clip": int(result.clip[slot]),
        "trade_off": float(step.trade_off[slot]),
    }


class ResQEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """One clip at a time through a frozen, ResQ-quantized network.

    Observation:
        `Box(0, 1)`, float32; the names by index are in `feature_names`. Per region: square root of the mean and the
        maximum of the absolute pixel residual against the reference frame, the same mean against the last keyframe, the
        mean residual of the neighbourhood, uncertainty, boundary density (own and of the neighbourhood) and foreground
        share of the last output, texture, and the share of W8A8 spent there last by layer group. Per frame: age of the
        keyframe (log2(1 + frames) / 6), place of lambda in its range (log scale), fill of the budget's bucket, mean
        residual, foreground share. Never the labels, the float output or the current output.

    Reward:
        accuracy_t - lambda * BOPs_t / BOPs_W8A8, accuracy being 1 minus the mean error cost of the pixels
        (`Problem.error`).

    Start:
        Frame 0 of the next clip has run as a forced keyframe, or as the finest residual that a budget allows; the
        observation is for frame 1.

    End:
        The last frame of the clip truncates the episode; nothing terminates it.

    Info:
        Of the frame that ran: `error` mean error cost, `bops` share of W8A8, `keyframe`, `clip` (its index), and the
        `trade_off` (lambda) that it was rewarded under; after `reset` only the last two.

    Args:
        problem: network, task, clips and grid (`Problem`); `default_problem()` by default.
        reference: what residuals are taken against, "previous" (default) or "keyframe".
        trade_off: lambda, 0.3 by default, or a range it is drawn from log-uniformly for each clip.
        budget: {peak, mean, bucket}: the most that a frame may cost, and frames on average, as shares of W8A8, and the
            frames whose credit can be saved up (`resq_rl.quantization.Budget`). No frame exceeds it: thresholds are
            raised and levels lowered until they fit. None by default.
        by_group: one choice per region and layer group; by default one per region.
        thresholds: values behind threshold indices, ascending (`DEFAULT_THRESHOLDS`).
        kappa: multipliers of the threshold rule (`resq_rl.quantization.DEFAULT_KAPPA`).
        reward_scale: factor on rewards, 1 by default.
        shuffle: whether clips come in random order (default) or in turn.
        render_mode: "rgb_array" shows the frame beside the bit-operations spent by region.

    Versions:
        v0: first.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 15}  # type: ignore[misc]
    kind: ClassVar[ActionKind] = "frame_bits"

    def __init__(
        self,
        problem: Problem | None = None,
        *,
        render_mode: str | None = None,
        **arguments: Unpack[EnvironmentArguments],
    ) -> None:
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise SettingsError(f"render_mode is None or 'rgb_array', got {render_mode!r}.")
        self.render_mode = render_mode
        self.core = _agents(self.kind, 1, problem, autoreset=False, **arguments)
        scheme = self.core.scheme
        self.feature_names = scheme.feature_names
        self.observation_space = spaces.Box(0.0, 1.0, (scheme.observation_size,), np.float32)
        self.action_space = spaces.MultiDiscrete(list(scheme.nvec))
        self._last: Transition | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Float[np.ndarray, " n"], dict[str, Any]]:
        """Start the next clip."""
        super().reset(seed=seed)
        self._last = None
        first = self.core.reset(None if seed is None else [seed])[0]
        streams = self.core.streams
        return first, {"clip": int(streams.clip[0]), "trade_off": float(streams.trade_off[0])}

    def step(self, action: Int[np.ndarray, " k"]) -> tuple[Float[np.ndarray, " n"], float, bool, bool, dict[str, Any]]:
        """Run the next frame."""
        step = self.core.step(np.asarray(action)[None])
        self._last = step
        return step.observations[0], float(step.rewards[0]), False, bool(step.truncated[0]), _frame_info(step, 0)

    def render(self) -> UInt8[np.ndarray, "h w 3"] | None:
        """The last frame beside the share of W8A8 spent in each region (white: all)."""
        if self.render_mode is None:
            return None
        streams = self.core.streams
        frame = streams.last_frame(0).permute(1, 2, 0).numpy()
        keyframe = (
            streams.spent[0].float().expand(streams.problem.grid)
        )  # all that was spent so far, before the first step
        share = (keyframe if self._last is None else self._last.result.share[0]).clamp(0, 1)
        spread = torch.nn.functional.interpolate(share[None, None], frame.shape[:2], mode="nearest")[0, 0]
        grey = (spread * 255).byte().numpy()[..., None].repeat(3, 2)
        return np.concatenate([frame, grey], 1)


class FrameBits(ResQEnv):
    """One level per layer group for the whole frame, and whether to refresh.

    Action:
        `MultiDiscrete([levels] * groups + [2])`: an index into the bit-widths (0, 2, 4, 8 by default) for each layer
        group, then 1 to run the frame as a keyframe.

    The observation has the mean and the maximum of each region feature over the regions. Everything else as in
    `ResQEnv`.
    """

    kind = "frame_bits"


class FrameLevel(ResQEnv):
    """One level for the whole frame, and whether to refresh: the decision whose exact oracle is known.

    Action:
        `MultiDiscrete([levels, 2])`: an index into the bit-widths (0, 2, 4, 8 by default), then 1 to run the frame as a
        keyframe.

    The observation is that of `FrameBits`. Everything else as in `ResQEnv`. With `reference="keyframe"` a
    `TableEngine` gives the same episodes without running the network.
    """

    kind = "frame_level"


class RegionBits(ResQEnv):
    """One level per region (and layer group), and whether to refresh.

    Action:
        `MultiDiscrete([levels] * regions + [2])`, regions row by row; with `by_group` the groups of a region follow
        each other.

    Everything else as in `ResQEnv`.
    """

    kind = "region_bits"


class RegionThresholds(ResQEnv):
    """One threshold per region (and layer group), from which levels follow per pixel and layer; and whether to refresh.

    Action:
        `MultiDiscrete([thresholds] * regions + [2])`: an index into `thresholds`, ascending, so that a larger index
        spends less. The same index everywhere is Dynamic ResQ with that threshold.

    Everything else as in `ResQEnv`.
    """

    kind = "region_thresholds"


class ResQVectorEnv(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """Several clips in one forward pass; sub-environment i with seed s equals the single environment with seed s + i.

    A clip that ends is followed by the next in the same step; `infos["final_obs"]` then holds the last observations,
    where `infos["_final_obs"]`. All other infos are of the frame that ran, never of the next clip's keyframe. Arguments
    as `ResQEnv`.
    """

    metadata: ClassVar[dict[str, Any]] = {  # type: ignore[misc]
        "autoreset_mode": AutoresetMode.SAME_STEP,
        "render_modes": [],
    }

    def __init__(
        self,
        kind: ActionKind,
        num_envs: int = 1,
        problem: Problem | None = None,
        *,
        render_mode: str | None = None,
        **arguments: Unpack[EnvironmentArguments],
    ) -> None:
        if num_envs < 1:
            raise SettingsError(f"num_envs must be at least 1, got {num_envs}.")
        self.num_envs, self.render_mode = num_envs, render_mode
        self.core = _agents(kind, num_envs, problem, autoreset=True, **arguments)
        scheme = self.core.scheme
        self.feature_names = scheme.feature_names
        self.single_observation_space = spaces.Box(0.0, 1.0, (scheme.observation_size,), np.float32)
        self.single_action_space = spaces.MultiDiscrete(list(scheme.nvec))
        self.observation_space = gymnasium.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gymnasium.vector.utils.batch_space(self.single_action_space, num_envs)

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Float[np.ndarray, "b n"], dict[str, Any]]:
        """Start a clip in every sub-environment.

        Raises:
            SettingsError: another number of seeds than of sub-environments, or a `reset_mask`.
        """
        if options is not None and "reset_mask" in options:
            raise SettingsError(
                "options['reset_mask'] is not supported: a clip that ends is followed by the next by itself."
            )
        seeds: list[int] | None = None
        if isinstance(seed, int | np.integer):
            super().reset(seed=int(seed))
            seeds = [int(seed) + i for i in range(self.num_envs)]
        elif seed is not None:
            if len(seed) != self.num_envs:
                raise SettingsError(f"{self.num_envs} sub-environments need as many seeds, got {len(seed)}.")
            drawn = np.random.SeedSequence().generate_state(self.num_envs)
            seeds = [int(d) if s is None else s for s, d in zip(seed, drawn, strict=True)]
        observations, streams = self.core.reset(seeds), self.core.streams
        return observations, {"clip": streams.clip.numpy().copy(), "trade_off": streams.trade_off.numpy().copy()}

    def step(
        self, actions: Int[np.ndarray, "b k"]
    ) -> tuple[Float[np.ndarray, "b n"], Float[np.ndarray, " b"], np.ndarray, np.ndarray, dict[str, Any]]:
        """Run the next frame of every clip."""
        step = self.core.step(actions)
        result = step.result
        infos: dict[str, Any] = {
            "error": result.error.mean((1, 2)).numpy(),
            "bops": result.share.mean((1, 2)).numpy(),
            "keyframe": result.cost.keyframe.numpy(),
            "clip": result.clip.numpy(),
            "trade_off": step.trade_off,
        }
        if step.final_observations is not None:
            final = np.full(self.num_envs, None, dtype=object)  # as Gymnasium's own vector environments give it
            for i in np.nonzero(step.truncated)[0]:
                final[i] = step.final_observations[i]
            infos |= {"final_obs": final, "_final_obs": step.truncated.copy()}
        return step.observations, step.rewards, np.zeros(self.num_envs, dtype=bool), step.truncated, infos


_IDS: dict[str, type[ResQEnv]] = {
    "resq_rl/FrameBits-v0": FrameBits,
    "resq_rl/FrameLevel-v0": FrameLevel,
    "resq_rl/RegionBits-v0": RegionBits,
    "resq_rl/RegionThresholds-v0": RegionThresholds,
}


def _vector_entry_point(kind: ActionKind) -> Any:
    def make(num_envs: int = 1, problem: Problem | None = None, **arguments: Any) -> ResQVectorEnv:
        return ResQVectorEnv(kind, num_envs, problem, **arguments)

    return make


def register() -> None:
    """Register the environments with Gymnasium; importing `resq_rl.envs` does it."""
    for name, environment in _IDS.items():
        if name not in gymnasium.registry:
            entry_point: Any = environment
            gymnasium.register(name, entry_point=entry_point, vector_entry_point=_vector_entry_point(environment.kind))
