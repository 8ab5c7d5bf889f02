"""Checkpoints of a training run: a stable-baselines3 zip of the user's own run beside what it leaves out."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.base_class import BaseAlgorithm

from resq_rl.envs.sb3 import AgentsVecEnv
from resq_rl.errors import PolicyError, ResultsError
from resq_rl.files import write_atomic

__all__ = ["TrainingReport", "about_run", "load_checkpoint", "save_checkpoint"]

# Settings that may change when training goes on.
_FREE_SETTINGS = ("frames", "checkpoint_every")


@dataclass
class TrainingReport:
    """How training went: frames simulated, rollouts, and the figures of each rollout."""

    frames: int = 0
    rollouts: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)


def about_run(environment: AgentsVecEnv, settings: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """What a checkpoint must have in common with the run that goes on from it, as JSON gives it back."""
    core = environment.core
    about = {
        "settings": dict(settings),
        "actions": asdict(core.scheme),
        "episodes": asdict(core.episodes),
        "clips": core.clips,
        "seed": seed,
    }
    plain: dict[str, Any] = json.loads(json.dumps(about))
    return plain


def save_checkpoint(
    folder: Path,
    model: BaseAlgorithm,
    environment: AgentsVecEnv,
    about: dict[str, Any],
    report: TrainingReport,
    *,
    done: bool,
) -> None:
    """Write the model's zip, then the state that names it, then remove older zips.

    Raises:
        ResultsError: a file cannot be written.
    """
    name = f"ppo_{report.rollouts:06d}.zip"
    temporary = folder / f".{name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        model.save(temporary)
        temporary.replace(folder / name)
    except OSError as error:
        raise ResultsError(
            f"Cannot write the checkpoint {folder / name}: {error.strerror or error}. Free some space or choose a "
            "writable folder, then resume: the checkpoint before it, if any, is whole."
        ) from error
    state = {
        "model": name,
        "done": done,
        "frames": environment.frames,
        "rollouts": report.rollouts,
        "curve": report.curve,
        "about": about,
        "environment": environment.core.snapshot(),
        "torch": torch.get_rng_state().tolist(),
        "numpy": _numpy_state(),
    }
    write_atomic(folder / "state.json", json.dumps(state))
    for old in folder.glob("ppo_*.zip"):  # state.json names the only one needed
        if old.name != name:
            old.unlink()


def load_checkpoint(
    folder: Path, environment: AgentsVecEnv, about: dict[str, Any], report: TrainingReport
) -> tuple[PPO, bool]:
    """The model of the newest checkpoint, and whether its run was done; environment and report go on from it.

    Raises:
        PolicyError: the checkpoint is damaged or of other settings.
    """
    try:
        state = json.loads((folder / "state.json").read_text())
        _check_same(folder, state["about"], about)
        model = PPO.load(folder / state["model"], environment, device="cpu")
        environment.core.restore(state["environment"])
        environment.frames = state["frames"]
        report.frames, report.rollouts, report.curve = state["frames"], state["rollouts"], state["curve"]
        torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
        name, keys, position, has_gauss, cached = state["numpy"]
        restored = (name, np.array(keys, dtype=np.uint32), position, has_gauss, cached)
        np.random.set_state(restored)  # noqa: NPY002 - stable-baselines3 draws from it
    except PolicyError:
        raise
    except Exception as error:  # a damaged zip or pickle can raise anything
        raise PolicyError(
            f"The checkpoint in {folder} cannot be read ({type(error).__name__}: {error}). Remove the folder to start "
            "anew."
        ) from error
    environment._reset_seeds()  # the restored generators go on, where a seed would start them anew
    return model, bool(state["done"]) and state["about"]["settings"]["frames"] >= about["settings"]["frames"]


def _check_same(folder: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
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


def _flat(about: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in about.items():
        flat |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def _numpy_state() -> list[Any]:
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 - stable-baselines3 draws from it
    return [name, np.asarray(keys).tolist(), position, has_gauss, cached]
