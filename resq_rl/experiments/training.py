"""Training a policy with progress, tracking and checkpoints; used by `train` and `compare`."""

import logging
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from resq_rl.envs import ActionScheme, ClipStore, Measurement
from resq_rl.envs.sb3 import AgentsVecEnv
from resq_rl.errors import SettingsError
from resq_rl.experiments.progress import stage
from resq_rl.experiments.settings import Settings
from resq_rl.experiments.statistics import MAXIMUM_ACCURACY_LOSS
from resq_rl.experiments.tracking import Tracker
from resq_rl.experiments.world import World
from resq_rl.policies import DynamicResQ, GroupThresholds, LearnedPolicy, StaticResQ
from resq_rl.policies.ppo import PPOSettings, Progress, TrainingReport, train_ppo
from resq_rl.policies.search import Strategy, search_group_thresholds

__all__ = [
    "ConstantFields",
    "front_candidates",
    "ppo_settings",
    "prepare_training",
    "searched_thresholds",
    "train_policy",
]

log = logging.getLogger(__name__)

SEARCH_CLIPS = 6


@dataclass(frozen=True)
class ConstantFields:
    """What every constant choice (threshold index or level) gave on a few training clips.

    Attributes:
        errors, bops, accuracies: by choice; errors as in the reward, BOPs as shares of W8A8.
        frames: how many frames were simulated.
    """

    errors: tuple[float, ...]
    bops: tuple[float, ...]
    accuracies: tuple[float, ...]
    frames: int

    def best(self, trade_off: float) -> int:
        """The choice with the highest reward for a lambda."""
        return int(np.argmin([error + trade_off * bops for error, bops in zip(self.errors, self.bops, strict=True)]))

    def trade_off_range(self) -> tuple[float, float]:
        """Values of lambda for which constant choices within 10 points of the most accurate one are best.

        The ends are the slopes of error over BOPs at the two ends of that part of the lower convex hull, a quarter of
        the lower one, because learned policies go on where constant ones stop to gain. Where fewer than two choices
        come that near, all are looked at.

        Raises:
            SettingsError: no choice is more accurate for more BOPs.
        """
        points = sorted(zip(self.bops, self.errors, self.accuracies, strict=True))
        hull: list[tuple[float, float, float]] = []
        for point in points:
            while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], point):
                hull.pop()
            hull.append(point)
        near = [p for p in hull if p[2] >= max(self.accuracies) - MAXIMUM_ACCURACY_LOSS]
        slopes = [_slope(a, b) for a, b in pairwise(near if len(near) > 1 else hull) if b[1] < a[1]]
        if not slopes:
            raise SettingsError(
                "environment.trade_off=auto found no range: on the first training clips, no constant choice is more "
                "accurate for more bits. Look at the network and its task, or give a range such as [0.01,1.0]."
            )
        low, high = min(slopes) / 4, max(slopes)
        return float(f"{low:.1e}"), float(f"{high:.1e}")


def _slope(a: tuple[float, float, float], b: tuple[float, float, float]) -> float:
    """Error saved per BOPs spent from one point to a more expensive one."""
    return (a[1] - b[1]) / max(b[0] - a[0], 1e-12)


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
    world: World, seed: int, folder: Path, tracker: Tracker, *, fields: ConstantFields | None, resume: bool
) -> tuple[LearnedPolicy, TrainingReport]:
    """Train one policy; its checkpoints and files are in `folder`.

    Args:
        fields: from `prepare_training`; the policy begins as the best of them if `training.warm_start`.
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
            warm_start=fields.best if fields and world.settings.training.warm_start else None,
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


def constant_fields(world: World) -> ConstantFields:
    """Measure every constant choice at the first keyframe interval."""
    scheme, environment = world.scheme(), world.settings.environment
    few = _few_clips(world)
    store, interval = few.stores["train"], environment.keyframe_intervals[0]
    policies = [_constant(scheme, choice, interval, environment.reference) for choice in range(scheme.choices)]
    with stage("constant fields", scheme.choices * store.frames) as advance:
        results = [few.measure(policy, "train", advance) for policy in policies]
    return ConstantFields(
        tuple(mean_error(result, store) for result in results),
        tuple(result.bops for result in results),
        tuple(result.accuracy for result in results),
        scheme.choices * store.frames,
    )


def prepare_training(world: World) -> tuple[World, ConstantFields | None]:
    """The world with its range of lambda settled, and the constant fields where they were measured for it."""
    environment, training = world.settings.environment, world.settings.training
    if environment.trade_off != "auto" and not training.warm_start:
        return world, None
    fields = constant_fields(world)
    if environment.trade_off == "auto":
        chosen = fields.trade_off_range()
        log.info("lambda from %g to %g", *chosen)
        world = replace(world, settings=replace(world.settings, environment=replace(environment, trade_off=chosen)))
    return world, fields


def searched_thresholds(world: World, strategy: Strategy) -> list[GroupThresholds]:
    """Static thresholds per layer group that are best for some lambda.

    They are searched on a few training clips with the frames that one PPO run may use.
    """
    settings, few = world.settings, _few_clips(world)
    environment, frames = settings.environment, few.stores["train"].frames
    evaluations = max(1, settings.training.frames // frames)
    groups, intervals = len(world.model.groups), environment.keyframe_intervals
    start = [
        GroupThresholds(environment.reference, intervals[0], taus=(tau,) * groups, kappa=settings.heuristic.kappa)
        for tau in environment.thresholds
    ]
    with stage(f"{strategy} search", evaluations * frames) as advance:

        def evaluate(policy: GroupThresholds) -> tuple[float, float]:
            result = few.measure(policy, "train", advance)
            return mean_error(result, few.stores["train"]), result.bops

        found = search_group_thresholds(
            evaluate,
            start,
            environment.thresholds,
            intervals,
            settings.training.spread(environment.trade_off_range),
            evaluations=evaluations,
            strategy=strategy,
            seed=settings.seed,
        )
    return [f.policy for f in found]


def _few_clips(world: World) -> World:
    store = world.stores["train"]
    return replace(world, stores={"train": store.subset(range(min(SEARCH_CLIPS, len(store))))}, responses={})


def mean_error(result: Measurement, store: ClipStore) -> float:
    """Mean cost of a pixel under the store's error table, as in the reward."""
    pixels = result.confusion.sum(0).double()
    return float((pixels * store.error_table).sum() / pixels.sum())


def _constant(scheme: ActionScheme, choice: int, interval: int, reference: object) -> DynamicResQ | StaticResQ:
    if scheme.kind == "region_thresholds":
        return DynamicResQ(reference, interval, tau=scheme.thresholds[choice], kappa=scheme.kappa)  # type: ignore[arg-type]
    return StaticResQ(reference, interval, level=choice)  # type: ignore[arg-type]


def front_candidates(world: World, policy: LearnedPolicy) -> list[LearnedPolicy]:
    """A policy at every lambda and keyframe interval among which validation chooses."""
    trade_offs = world.settings.training.spread(policy.trade_off_range)
    intervals = world.settings.environment.keyframe_intervals if policy.scheme.agents == "region" else (0,)
    return [policy.at(t, i) for t in trade_offs for i in intervals]
