"""The state of a training run between two rollouts: all on which later rollouts depend, and the figures so far."""

import hashlib
import json
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3 import PPO

from resq_rl.envs import table_cache
from resq_rl.envs.sb3 import AgentsVecEnv
from resq_rl.errors import PolicyError
from resq_rl.sealed import Checkpoints

__all__ = ["TrainingReport", "about_run", "load_checkpoint", "save_checkpoint"]

# Settings that may change when training goes on.
_FREE_SETTINGS = ("checkpoint_every",)


@dataclass
class TrainingReport:
    """How training went.

    Attributes:
        frames, rollouts: done so far.
        curve: the figures of each rollout.
        update: the figures of the newest update, which count among those of the rollout after it.
        done: whether as many frames were simulated as were asked for.
    """

    frames: int = 0
    rollouts: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)
    update: dict[str, float] = field(default_factory=dict)
    done: bool = False


def about_run(environment: AgentsVecEnv, settings: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The settings that a checkpoint and the run that goes on from it must share, as JSON gives them back."""
    core = environment.core
    digest = hashlib.sha256()
    problem = core.streams.problem
    for known in table_cache.fingerprints(problem, range(len(problem))):
        digest.update(known.encode())
    about = {
        "settings": dict(settings),
        "actions": asdict(core.scheme),
        "episodes": asdict(core.episodes),
        "clips": core.clips,
        "network and clips": digest.hexdigest(),
        "seed": seed,
    }
    plain: dict[str, Any] = json.loads(json.dumps(about))
    return plain


def save_checkpoint(
    folder: Path, model: PPO, environment: AgentsVecEnv, about: Mapping[str, Any], report: TrainingReport
) -> Path:
    """Write a checkpoint, between two rollouts; of a run that is done without its clips in progress.

    Raises:
        ResultsError: it cannot be written.
    """
    policy: Any = model.policy
    going = not report.done
    state = {
        "about": about,
        "report": asdict(report),
        "policy": policy.state_dict(),
        "optimizer": policy.optimizer.state_dict()["state"],
        "steps": model.num_timesteps,
        "updates": model._n_updates,
        "observations": torch.from_numpy(np.asarray(model._last_obs)) if going else None,
        "starts": torch.from_numpy(np.asarray(model._last_episode_starts)),
        "environment": environment.snapshot(streams=going),
        "random": _random_states(),
    }
    return Checkpoints(folder).save(report.rollouts, state, keep=2 if going else 1)


def load_checkpoint(folder: Path, model: PPO, environment: AgentsVecEnv, about: Mapping[str, Any]) -> TrainingReport:
    """Bring an untrained model, its environment and the random states to the newest whole checkpoint, if any.

    Returns:
        The report of the run so far; with no rollouts where there is no checkpoint.

    Raises:
        PolicyError: the checkpoint is of other settings or another version.
        ResultsError: all checkpoints are damaged.
    """
    state = Checkpoints(folder).load()
    if state is None:
        return TrainingReport()
    policy: Any = model.policy
    try:
        _check_same(folder, state["about"], about)
        policy.load_state_dict(state["policy"])
        moments = {int(index): values for index, values in state["optimizer"].items()}
        policy.optimizer.load_state_dict(policy.optimizer.state_dict() | {"state": moments})
        model.num_timesteps, model._n_updates = state["steps"], state["updates"]
        if state["observations"] is not None:  # else stable-baselines3 resets the environment if it goes on
            model._last_obs = state["observations"].numpy()
            model._last_episode_starts = state["starts"].numpy()
        environment.restore(state["environment"])
        _restore_random_states(state["random"])
        return TrainingReport(**state["report"])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise PolicyError(
            f"The checkpoint in {folder} is of another version ({type(error).__name__}: {error}). Resume with the "
            "version that wrote it, or remove the folder to start anew."
        ) from error


def _random_states() -> dict[str, Any]:
    """The states of the generators that the process shares: stable-baselines3 draws from torch's and numpy's."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 - stable-baselines3 draws from it
    return {
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state(),
    }


def _restore_random_states(states: Mapping[str, Any]) -> None:
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002 - as above
    torch.set_rng_state(states["torch"])


def _check_same(folder: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on under other settings than the checkpoint's."""
    before, after = _flat(then), _flat(now)
    free = {f"settings.{name}" for name in _FREE_SETTINGS}
    names = sorted(n for n in (before.keys() | after.keys()) - free if before.get(n) != after.get(n))
    if names:
        changes = "; ".join(f"{n} was {before.get(n)!r} and is {after.get(n)!r}" for n in names[:5])
        raise PolicyError(
            f"The checkpoint in {folder} is of other settings: {changes}. Resume with the settings it was started "
            "with, or remove the folder to start anew."
        )


def _flat(about: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in about.items():
        flat |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
    return flat
