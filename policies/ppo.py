"""Training policies with PPO of stable-baselines3."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from torch import Tensor, nn

from resq_rl.envs import ActionScheme
from resq_rl.envs.batched import Transition
from resq_rl.envs.observation import AGE_OCTAVES, age_feature
from resq_rl.envs.sb3 import AgentsVecEnv
from resq_rl.errors import PolicyError
from resq_rl.policies.checkpoints import TrainingReport, about_run, load_checkpoint, save_checkpoint
from resq_rl.policies.learned import LearnedPolicy
from resq_rl.policies.ordinal import OrdinalPolicy
from resq_rl.policies.ppo_settings import PPOSettings
from resq_rl.sealed import Checkpoints

__all__ = ["FirstChoice", "PPOSettings", "Progress", "TrainingReport", "train_ppo", "untrained"]

# Log-odds of a keyframe after the warm start, where the width is 1: the other action is sampled once in 16.
SURE = math.log(15)
# Values of lambda at which the warm start is fitted.
POSITIONS = 65
# Figures of an update, by stable-baselines3's names.
UPDATE_FIGURES = ("entropy_loss", "approx_kl", "explained_variance", "loss")


@dataclass(frozen=True)
class FirstChoice:
    """The choices with which a policy begins.

    Attributes:
        choices: threshold index or level for all layer groups, or one for each.
        interval: frames between keyframes, for agents that decide on them; 0 for few.
    """

    choices: int | Sequence[int]
    interval: int = 0


@dataclass(frozen=True)
class Progress:
    """The progress of training after a rollout: the frames done and the figures of the rollout by name.

    Beside those of stable-baselines3 (of the update before the rollout) these are means over the rollout: `reward` and
    `error` per frame, `bops` as a share of W8A8, `keyframes` as a share of frames, `entropy` of the sampled actions
    as a share of the greatest possible, and what `choice_figures` gives.
    """

    frames: int
    rollout: int
    metrics: Mapping[str, float]


def train_ppo(
    environment: AgentsVecEnv,
    settings: PPOSettings,
    *,
    seed: int = 0,
    warm_start: Callable[[float], FirstChoice] | None = None,
    on_rollout: Callable[[Progress], None] | None = None,
    checkpoints: Path | None = None,
    resume: bool = False,
) -> tuple[LearnedPolicy, TrainingReport]:
    """Train a policy on an environment of agents.

    Args:
        environment: agents of one scheme; its episodes draw lambda, so that one network serves the whole range.
        warm_start: for a lambda, what the policy begins as in all regions.
        on_rollout: called after every rollout.
        checkpoints: folder for checkpoints; written every `checkpoint_every` rollouts and at the end.
        resume: go on from the newest whole checkpoint in `checkpoints`, if there is one; what follows is what followed
            in the run that wrote it.

    Returns:
        The deployed policy (at the geometric middle of the range of lambda) and the report.

    Raises:
        PolicyError: a checkpoint is of other settings, or training diverged.
        ResultsError: a checkpoint cannot be written, or none can be read.
    """
    torch.manual_seed(seed)
    environment.seed(seed)
    problem = environment.core.streams.problem
    decided = int(settings.frames * (1 - len(problem) / problem.frames))  # the first frame of every clip is not
    total = max(1, decided // environment.core.clips) * environment.num_envs
    about = about_run(environment, asdict(settings), seed)
    model, report = untrained(environment, settings, seed), TrainingReport()
    if checkpoints is not None and resume:
        report = load_checkpoint(checkpoints, model, environment, about)
    elif checkpoints is not None:
        Checkpoints(checkpoints).clear()
    if not report.rollouts and warm_start is not None:
        _fit_first_choices(model, environment, warm_start, seed)
    if not (report.done and model.num_timesteps >= total):
        callback = _Rollouts(environment, about, report, on_rollout, checkpoints)
        model.learn(max(0, total - model.num_timesteps), callback=callback, reset_num_timesteps=False)
        callback.end()
    return deployed(model, environment, settings), report


def untrained(environment: AgentsVecEnv, settings: PPOSettings, seed: int) -> PPO:
    """PPO before its first rollout."""
    rollout = settings.n_steps * environment.num_envs
    batch_size = next(n for n in range(min(settings.batch_size, rollout), 0, -1) if rollout % n == 0)
    model = PPO(
        OrdinalPolicy,
        environment,
        learning_rate=_Falling(settings.learning_rate),
        n_steps=settings.n_steps,
        batch_size=max(2, batch_size),
        n_epochs=settings.epochs,
        gamma=settings.gamma,
        gae_lambda=settings.gae_lambda,
        clip_range=settings.clip_range,
        ent_coef=settings.ent_coef,
        policy_kwargs={
            "net_arch": {"pi": list(settings.hidden), "vf": list(settings.value_hidden)},
            "activation_fn": nn.Tanh,
        },
        seed=seed,
        device="cpu",
        verbose=0,
    )
    model.set_logger(Logger(None, []))  # that of stable-baselines3 leaves a folder among the temporary files

    def value(observations: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            values = model.policy.predict_values(torch.as_tensor(observations))
        return settings.gamma * values[:, 0].numpy()

    environment.bootstrap = value
    return model


class _Falling:
    """Learning rate that falls linearly to a tenth."""

    def __init__(self, start: float) -> None:
        self.start = start

    def __call__(self, progress_remaining: float) -> float:
        return self.start * (0.1 + 0.9 * progress_remaining)


def _fit_first_choices(
    model: PPO,
    environment: AgentsVecEnv,
    warm_start: Callable[[float], FirstChoice],
    seed: int,
    steps: int = 1000,
) -> None:
    """Fit the policy to the choices that suit each lambda, spread over neighbours with a standard deviation of 1."""
    scheme = environment.core.scheme
    generator = np.random.default_rng(seed)
    observations = np.asarray(environment.reset(), dtype=np.float32)
    low, high = environment.core.episodes.trade_off_range
    lambdas, ages = (scheme.feature_names.index(name) for name in ("trade_off", "keyframe_age"))
    positions = np.linspace(0, 1, POSITIONS) if high > low else np.zeros(1)
    first = [warm_start(float(low * (high / low) ** p)) for p in positions]
    actions = np.stack([scheme.uniform_action(own.choices) for own in first]).astype(np.float32)
    intervals = np.array([own.interval or np.inf for own in first])
    policy: Any = model.policy
    policy.action_net.log_width.data.zero_()
    optimizer = torch.optim.Adam(policy.parameters(), lr=5e-3)
    for _ in range(steps):
        rows = observations[generator.integers(len(observations), size=256)]
        # After a reset some features never vary; the choices must hold for all values of them.
        anything = generator.uniform(size=rows.shape).astype(np.float32)
        rows = np.where(generator.uniform(size=rows.shape) < 0.5, anything, rows)
        drawn = generator.integers(len(first), size=256)
        age = np.floor(2.0 ** generator.uniform(0, AGE_OCTAVES, size=256)) - 1
        rows[:, lambdas], rows[:, ages] = positions[drawn], age_feature(torch.from_numpy(age)).numpy()
        places = policy.action_net.places(policy.mlp_extractor.forward_actor(torch.as_tensor(rows)))
        error = places - torch.as_tensor(actions[drawn])
        if scheme.agents == "frame":
            sign = torch.as_tensor(np.where(age + 1 >= intervals[drawn], 1.0, -1.0)).float()
            unsure = torch.relu(SURE - sign * (places[:, -1] - 0.5))  # nothing is lost by being surer
            error = torch.cat([error[:, :-1], unsure[:, None]], 1)
        loss = error.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


class _Rollouts(BaseCallback):
    """Collects the figures of each rollout and writes checkpoints, between two rollouts."""

    model: PPO

    def __init__(
        self,
        environment: AgentsVecEnv,
        about: dict[str, Any],
        report: TrainingReport,
        on_rollout: Callable[[Progress], None] | None,
        checkpoints: Path | None,
    ) -> None:
        super().__init__()
        self.environment, self.about, self.report = environment, about, report
        self.on_rollout, self.checkpoints = on_rollout, checkpoints
        self._saved = report.rollouts
        self._sums: dict[str, list[float]] = {}
        report.done = False

    def _on_rollout_start(self) -> None:
        self._note_update()
        rollouts = self.report.rollouts
        if rollouts > self._saved and rollouts % self.about["settings"]["checkpoint_every"] == 0:
            self._save()

    def end(self) -> None:
        """Take in the last update, after which training is done."""
        self._note_update()
        self.report.done = True
        self._save()

    def _note_update(self) -> None:
        figures = self.logger.name_to_value
        names = [name for name in UPDATE_FIGURES if f"train/{name}" in figures]
        if names:  # a run that goes on has the checkpoint's until the next update
            self.report.update = {name: float(figures[f"train/{name}"]) for name in names}
        if not np.isfinite(self.report.update.get("explained_variance", 0.0)):
            del self.report.update["explained_variance"]  # undefined where all returns are equal

        weights = (bool(torch.isfinite(p).all()) for p in self.model.policy.parameters())
        if not (np.isfinite(list(self.report.update.values())).all() and all(weights)):
            raise PolicyError(
                f"The update after rollout {self.report.rollouts} (frame {self.environment.frames}) gave a loss or "
                f"weights that are not finite: {self.report.update}. Lower training.learning_rate; checkpoints before "
                "it are kept."
            )

    def _save(self) -> None:
        if self.checkpoints is not None:
            save_checkpoint(self.checkpoints, self.model, self.environment, self.about, self.report)
            self._saved = self.report.rollouts

    def _on_step(self) -> bool:
        step = self.environment.last
        if step is not None:
            self._check_finite("reward", step, step.rewards, "the network's output and at training.reward_scale")
            self._check_finite("observation", step, step.observations, "the network's output")
            self._add("reward", float(step.frame_rewards.mean()))
            self._add("bops", float(step.result.share.mean()))
            self._add("error", float(step.result.error.mean()))
            self._add("keyframes", float(step.result.cost.keyframe.float().mean()))
        return True

    def _check_finite(self, what: str, step: Transition, values: np.ndarray, culprit: str) -> None:
        finite = np.isfinite(values).reshape(len(values), -1).all(1)
        if not finite.all():
            core, result = self.environment.core, step.result
            slot = int(np.argmin(finite)) // core.scheme.agents_per_clip
            clip = core.streams.problem.clips[int(result.clip[slot])].name
            raise PolicyError(
                f"The {what} of {clip}, frame {int(result.time[slot])}, is not finite, after {self.environment.frames} "
                f"frames in all: look at {culprit}. Checkpoints before it are kept."
            )

    def _add(self, name: str, value: float) -> None:
        self._sums.setdefault(name, []).append(value)

    def _on_rollout_end(self) -> None:
        metrics = {name: float(np.mean(values)) for name, values in self._sums.items()}
        buffer = self.locals["rollout_buffer"]  # holds each action beside the observation it was chosen from
        scheme = self.environment.core.scheme
        metrics |= choice_figures(scheme, buffer.observations, buffer.actions)
        if max(scheme.nvec) > 1:
            metrics["entropy"] = -float(buffer.log_probs.mean()) / float(np.log(scheme.nvec).sum())
        metrics |= self.report.update
        self._sums = {}
        report = self.report
        report.rollouts += 1
        report.frames = self.environment.frames
        report.curve.append({"frames": float(report.frames), **metrics})
        if not np.isfinite(list(metrics.values())).all():
            raise PolicyError(
                f"Training met a value that is not finite at frame {report.frames}: {metrics}. "
                "Lower training.learning_rate."
            )
        if self.on_rollout is not None:
            self.on_rollout(Progress(report.frames, report.rollouts, metrics))


def choice_figures(
    scheme: ActionScheme, observations: Float[np.ndarray, "*n f"], actions: Int[np.ndarray, "*n k"]
) -> dict[str, float]:
    """Figures of the agents' choices, keyframes apart: a collapsed policy chooses the same whatever it observes.

    Returns:
        `mean_choice`, the mean index of the threshold or level; `choice_0` to `choice_{n-1}`, the share of each; and
        `choice_residual_correlation`, Pearson's of the mean index of each region (or of the whole frame, where it is
        decided for) with its observed `residual_mean`, absent where either is the same everywhere. Nothing of agents
        that decide on keyframes alone.
    """
    choices = actions[..., :-1] if scheme.agents == "frame" else actions  # the last is the keyframe's
    if not choices.size:
        return {}
    shares = np.bincount(choices.ravel(), minlength=scheme.choices) / choices.size
    figures = {"mean_choice": float(choices.mean())} | {f"choice_{i}": float(s) for i, s in enumerate(shares)}
    names = [name.removeprefix("mean_").split("[")[0] for name in scheme.feature_names]
    residual = observations[..., [i for i, name in enumerate(names) if name == "residual_mean"]]
    mean = choices.reshape(*residual.shape, -1).mean(-1)
    if np.ptp(mean) > 0 and np.ptp(residual) > 0:
        figures["choice_residual_correlation"] = float(np.corrcoef(mean.ravel(), residual.ravel())[0, 1])
    return figures


def deployed(model: PPO, environment: AgentsVecEnv, settings: PPOSettings) -> LearnedPolicy:
    """The policy network of a PPO model, as it runs on a device."""
    policy: Any = model.policy
    layers = [m for m in policy.mlp_extractor.policy_net if isinstance(m, nn.Linear)]
    weight, bias = policy.action_net.plain()
    core = environment.core
    low, high = core.episodes.trade_off_range
    scheme: ActionScheme = core.scheme
    return LearnedPolicy(
        (*(_plain(layer.weight) for layer in layers), weight),
        (*(_plain(layer.bias) for layer in layers), bias),
        scheme,
        trade_off=float(np.sqrt(low * high)),
        trade_off_range=(low, high),
        interval=core.episodes.intervals[0],
        reference=core.streams.reference,
        bits=settings.policy_bits,
        frame_size=core.streams.problem.model.frame_size,
        network=core.streams.problem.model.groups,
    )


def _plain(parameter: Tensor) -> Tensor:
    return parameter.detach().cpu().clone()
