"""Training a policy with progress, tracking and checkpoints; used by `train` and `compare`."""

import logging
from dataclasses import asdict
from pathlib import Path

from resq_rl.envs.sb3 import AgentsVecEnv
from resq_rl.experiments.progress import stage
from resq_rl.experiments.settings import Settings
from resq_rl.experiments.start import Start, choices_of
from resq_rl.experiments.tracking import Tracker
from resq_rl.experiments.world import World
from resq_rl.policies import LearnedPolicy
from resq_rl.policies.ppo import PPOSettings, Progress, TrainingReport, train_ppo

__all__ = ["front_candidates", "ppo_settings", "train_policy"]

log = logging.getLogger(__name__)


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
    world: World, seed: int, folder: Path, tracker: Tracker, *, start: Start | None, resume: bool
) -> tuple[LearnedPolicy, TrainingReport]:
    """Train one policy; its checkpoints and files are in `folder`.

    Args:
        start: from `prepare_training`; the policy begins as the best of it if `training.warm_start`.
        resume: go on from the newest checkpoint in `folder`.
    """
    settings = ppo_settings(world.settings)
    environment = AgentsVecEnv(world.agents())
    scheme, warm = environment.core.scheme, start if world.settings.training.warm_start else None
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
            warm_start=(lambda t: choices_of(scheme, warm.best(t))) if warm else None,
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


def front_candidates(world: World, policy: LearnedPolicy) -> list[LearnedPolicy]:
    """A policy at every lambda and keyframe interval among which validation chooses."""
    trade_offs = world.settings.training.spread(policy.trade_off_range)
    intervals = world.settings.environment.keyframe_intervals if policy.scheme.agents == "region" else (0,)
    return [policy.at(t, i) for t in trade_offs for i in intervals]
