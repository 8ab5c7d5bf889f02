"""Training a policy with progress, tracking and checkpoints; used by `train` and `compare`."""

import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from resq_rl.envs import ActionScheme
from resq_rl.envs.sb3 import AgentsVecEnv
from resq_rl.experiments.progress import stage
from resq_rl.experiments.settings import Settings
from resq_rl.experiments.tracking import Tracker
from resq_rl.experiments.world import World
from resq_rl.policies import DynamicResQ, LearnedPolicy, StaticResQ
from resq_rl.policies.ppo import PPOSettings, Progress, TrainingReport, train_ppo

__all__ = ["front_candidates", "ppo_settings", "train_policy", "warm_start_choice"]

log = logging.getLogger(__name__)

WARM_START_CLIPS = 6


def ppo_settings(settings: Settings) -> PPOSettings:
    """The settings of PPO."""
    training = settings.training
    return PPOSettings(
        frames=training.frames,
        n_steps=training.n_steps,
        batch_size=training.batch_size,
        n_epochs=training.epochs,
        learning_rate=training.learning_rate,
        gamma=training.gamma,
        gae_lambda=training.gae_lambda,
        ent_coef=training.ent_coef,
        clip_range=training.clip_range,
        hidden=training.hidden,
        bits=training.policy_bits,
        checkpoint_every=training.checkpoint_every,
    )


def train_policy(
    world: World, seed: int, folder: Path, tracker: Tracker, *, warm_start: Callable[[float], int] | None, resume: bool
) -> tuple[LearnedPolicy, TrainingReport]:
    """Train one policy; its checkpoints and files are in `folder`.

    Args:
        warm_start: from `warm_start_choice`, or None.
        resume: go on from the newest checkpoint in `folder`.
    """
    settings = ppo_settings(world.settings)
    environment = AgentsVecEnv(world.agents())
    with stage(f"training PPO, seed {seed}", settings.frames) as advance:
        done = 0

        def on_rollout(progress: Progress) -> None:
            nonlocal done
            advance(progress.frames - done)
            done = progress.frames
            tracker.log_metrics({f"train/{k}": v for k, v in progress.metrics.items()}, step=progress.frames)
            if progress.rollout % 20 == 0:
                shown = ", ".join(
                    f"{k} {v:.3f}" for k, v in progress.metrics.items() if k in ("reward", "bops", "error")
                )
                log.debug("seed %d, %d frames: %s", seed, progress.frames, shown)

        policy, report = train_ppo(
            environment,
            settings,
            seed=seed,
            warm_start=warm_start,
            on_rollout=on_rollout,
            checkpoints=folder / "checkpoints",
            resume=resume,
        )
    policy.save(folder)
    tracker.log_parameters({"seed": seed, **asdict(settings)})
    for name in ("policy.safetensors", "policy.json"):
        tracker.log_artifact(folder / name, "policy")
    newest = sorted((folder / "checkpoints").glob("ppo_*.zip"))[-1:]
    for path in (*newest, folder / "checkpoints" / "state.json"):
        tracker.log_artifact(path, "checkpoints")
    return policy, report


def warm_start_choice(world: World) -> tuple[Callable[[float], int], int]:
    """The best constant choice (threshold index or level) for each lambda, measured on a few training clips.

    Returns:
        A function of lambda, and the number of frames that the search simulated.
    """
    scheme, settings = world.scheme(), world.settings
    interval, reference = settings.environment.keyframe_intervals[0], settings.environment.reference
    store = world.stores["train"]
    few = replace(world, stores={"train": store.subset(range(min(WARM_START_CLIPS, len(store))))})
    scores = []
    frames = few.stores["train"].frames
    with stage("warm start", scheme.choices * frames) as advance:
        for choice in range(scheme.choices):
            policy = _constant(scheme, choice, interval, reference)
            result = few.measure(policy, "train", advance)
            pixels = result.confusion.sum(0).double()
            scores.append((float((pixels * store.error_table).sum() / pixels.sum()), result.bops))

    def best(trade_off: float) -> int:
        return int(np.argmin([error + trade_off * bops for error, bops in scores]))

    return best, scheme.choices * frames


def _constant(scheme: ActionScheme, choice: int, interval: int, reference: object) -> DynamicResQ | StaticResQ:
    if scheme.kind == "region_thresholds":
        return DynamicResQ(reference, interval, tau=scheme.thresholds[choice], kappa=scheme.kappa)  # type: ignore[arg-type]
    return StaticResQ(reference, interval, level=choice)  # type: ignore[arg-type]


def front_candidates(world: World, policy: LearnedPolicy) -> list[LearnedPolicy]:
    """A policy at every lambda and keyframe interval among which validation chooses."""
    low, high = policy.trade_off_range
    count = world.settings.training.trade_offs if high > low else 1
    intervals = world.settings.environment.keyframe_intervals if policy.scheme.agents == "region" else (0,)
    return [policy.at(float(t), i) for t in np.geomspace(low, high, count) for i in intervals]
