"""Training a policy with progress, tracking and checkpoints; used by `train` and `compare`."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mode

from resq_rl.envs import BatchedEnvironment
from resq_rl.envs.sb3 import AgentsVecEnv
from resq_rl.experiments.config.settings import Settings
from resq_rl.experiments.runs.progress import stage
from resq_rl.experiments.study.deployment import FILES, save_deployment
from resq_rl.experiments.study.start import Start, first_choices
from resq_rl.experiments.study.study import Study, learning_interval
from resq_rl.experiments.tracking.tracker import Tracker
from resq_rl.policies import GradientSettings, LearnedPolicy
from resq_rl.policies.gradient_policy import PassFigures, learn_policy
from resq_rl.policies.ppo import FirstChoice, PPOSettings, Progress, TrainingReport, train_ppo

__all__ = ["front_candidates", "keyframe_settings", "load_policies", "save_chosen", "train_policy"]

log = logging.getLogger(__name__)

# Of PPO for keyframe policies.
KEYFRAME_STEPS, KEYFRAME_BATCH, KEYFRAME_GAMMA = 64, 256, 0.95


def keyframe_settings(settings: Settings) -> PPOSettings:
    """The settings of PPO for a keyframe policy.

    It has one agent per clip, so its rollouts are longer and its minibatches smaller; and a keyframe pays over many
    frames, so it looks further ahead.
    """
    return settings.training.ppo(
        frames=settings.training.keyframe_frames,
        n_steps=KEYFRAME_STEPS,
        batch_size=KEYFRAME_BATCH,
        gamma=max(KEYFRAME_GAMMA, settings.training.gamma),
    )


def train_policy(
    study: Study, seed: int, folder: Path, tracker: Tracker, *, start: Start | None, resume: bool
) -> tuple[LearnedPolicy, TrainingReport]:
    """Train one policy, with learned keyframes if the settings ask for them; its files and checkpoints are in `folder`.

    Args:
        study, start: from `begin`.
        resume: go on from the newest checkpoints in `folder`.

    Returns:
        The policy and the report, whose frames are of both trainings.
    """
    training, settings = study.settings.training, study.settings.training.ppo()
    run = _Trainings(seed, tracker, resume)
    if training.trainer == "gradient":
        policy = run.descend(study, settings, folder / "checkpoints")
    else:
        first = first_choices(study, start)
        policy = run.train(f"training PPO, seed {seed}", study.agents(), settings, folder / "checkpoints", first)
    policy.save(folder)
    save_deployment(study, folder)
    if training.keyframe_frames:
        few = None if training.warm_start == "none" else lambda _: FirstChoice(0)
        agents, ppo = study.agents(policy), keyframe_settings(study.settings)
        keyframes = run.train(f"training keyframes, seed {seed}", agents, ppo, folder / "keyframes", few)
        policy = replace(policy, keyframes=keyframes)
        policy.save(folder)
    tracker.log_parameters({"seed": seed, **asdict(settings), "keyframe_frames": training.keyframe_frames})
    return policy, run.report


class _Trainings:
    """One or more trainings in turn, tracked and reported as one."""

    def __init__(self, seed: int, tracker: Tracker, resume: bool) -> None:
        self.seed, self.tracker, self.resume = seed, tracker, resume
        self.report = TrainingReport()

    def train(
        self,
        title: str,
        agents: BatchedEnvironment,
        settings: PPOSettings,
        checkpoints: Path,
        warm_start: Callable[[float], FirstChoice] | None,
    ) -> LearnedPolicy:
        """Train one policy, with progress; adds what it took to `report`."""
        before, done = self.report.frames, 0
        with stage(title, settings.frames) as advance:

            def on_rollout(progress: Progress) -> None:
                nonlocal done
                advance(progress.frames - done)
                done = progress.frames
                self._track(before, progress)

            policy, report = train_ppo(
                AgentsVecEnv(agents),
                settings,
                seed=self.seed,
                warm_start=warm_start,
                on_rollout=on_rollout,
                checkpoints=checkpoints,
                resume=self.resume,
            )
        curve = [{**row, "frames": before + row["frames"]} for row in report.curve]
        self.report = TrainingReport(
            before + report.frames, self.report.rollouts + report.rollouts, [*self.report.curve, *curve]
        )
        return policy

    def descend(self, study: Study, settings: PPOSettings, folder: Path) -> LearnedPolicy:
        """Train one policy by gradients; it goes on from nowhere but the start, and gives the same again."""
        environment = study.settings.environment
        with stage(f"training by gradients, seed {self.seed}", settings.frames) as advance:

            def on_pass(figures: PassFigures) -> None:
                advance(figures.frames - self.report.frames)
                self.report.frames, self.report.rollouts = figures.frames, self.report.rollouts + 1
                self.report.curve.append({name: float(value) for name, value in asdict(figures).items()})
                metrics = {"train/divergence": figures.divergence, "train/bops": figures.bops}
                self.tracker.log_metrics(metrics, step=figures.frames)

            return learn_policy(
                study.problems["train"],
                study.scheme(),
                GradientSettings(settings.frames),
                hidden=settings.hidden,
                bits=settings.policy_bits,
                interval=learning_interval(environment),
                reference=environment.reference,
                seed=self.seed,
                on_pass=on_pass,
            )

    def _track(self, before: int, progress: Progress) -> None:
        groups = {name: "choices" if name.startswith("choice_") else "train" for name in progress.metrics}
        metrics = {f"{groups[name]}/{name}": value for name, value in progress.metrics.items()}
        self.tracker.log_metrics(metrics, step=before + progress.frames)
        if progress.rollout % 20 == 0:
            shown = ", ".join(f"{k} {v:.3f}" for k, v in progress.metrics.items() if k in ("reward", "bops", "error"))
            log.debug("seed %d, %d frames: %s", self.seed, before + progress.frames, shown)


def load_policies(folder: Path) -> dict[int, LearnedPolicy]:
    """The trained policies of a run's folder by seed, or the one of a folder that holds a policy itself, as seed 0.

    Raises:
        PolicyError: there is none, or one is damaged.
    """
    seeds = {int(p.parent.name[4:]): p.parent for p in folder.glob("seed*/policy.json") if p.parent.name[4:].isdigit()}
    return {seed: LearnedPolicy.load(seeds[seed]) for seed in sorted(seeds)} or {0: LearnedPolicy.load(folder)}


def front_candidates(study: Study, policy: LearnedPolicy) -> list[LearnedPolicy]:
    """What validation chooses from.

    That is the policy at every lambda, with every keyframe interval and its learned keyframes, if any; and likewise the
    static thresholds that it began at, where it chooses factors of such.
    """
    trade_offs = study.settings.training.spread(policy.trade_off_range)
    intervals = study.settings.environment.keyframe_intervals if policy.scheme.agents == "region" else (0,)
    learned = [] if policy.keyframes is None else [policy.at(t) for t in trade_offs]
    beginning = [] if policy.static or not policy.scheme.base else [policy.beginning()]
    return [*learned, *(p.at(t, i) for p in (policy, *beginning) for t in trade_offs for i in intervals)]


def save_chosen(folder: Path, policy: LearnedPolicy, chosen: Sequence[LearnedPolicy], tracker: Tracker) -> None:
    """Keep in a policy's folder what validation chose for all points of its front.

    That is the rule for changes of scene that most of them follow; and, where none of them is more than the beginning,
    that instead of the network.
    """
    if chosen and all(one.static for one in chosen):
        log.info("%s: validation chose the policy's beginning, without its network.", folder.name)
        policy = chosen[len(chosen) // 2]
    if chosen and not policy.decides_keyframes:
        policy = replace(policy, scene_change=mode(one.scene_change for one in chosen))
    policy.save(folder)
    for name in FILES:
        tracker.log_artifact(folder / name, "policy")
