"""Settings of PPO, apart from the training, which imports stable-baselines3."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator, Field

from resq_rl.checked import Checked, Count, Positive, Share

__all__ = ["PPOSettings"]


def _runnable(bits: int) -> int:
    if bits != 32 and not 2 <= bits <= 16:
        raise ValueError("no such width")
    return bits


@dataclass(frozen=True)
class PPOSettings(Checked):
    """Settings of PPO, with the names of stable-baselines3 where it has them.

    Attributes:
        frames: environment frames of one training run, forced keyframes included (a batch of 32 clips spends 32 per
            step); rounded up to whole rollouts.
        n_steps: frames of each clip per rollout; a rollout holds n_steps x agents samples.
        batch_size: most samples of a minibatch; the largest number up to it that divides the rollout is used.
        epochs: passes over each rollout.
        learning_rate: at the start; it falls linearly to a tenth.
        gamma: discount of later rewards; more suits slow video, where errors build up over many frames.
        gae_lambda, ent_coef, clip_range: as in stable-baselines3.
        hidden: units of each hidden layer of the policy network.
        value_hidden: units of each hidden layer of the value network, which is used in training only.
        policy_bits: bits at which the trained policy network runs and is charged; 32 for float.
        checkpoint_every: rollouts between checkpoints.
    """

    frames: Count = 40_000
    n_steps: Annotated[int, Field(ge=2)] = 16
    batch_size: Annotated[int, Field(ge=2)] = 3072
    epochs: Count = 4
    learning_rate: Positive = 2e-3
    gamma: Share = 0.8
    gae_lambda: Share = 0.9
    ent_coef: Annotated[float, Field(ge=0)] = 3e-4
    clip_range: Positive = 0.2
    hidden: Annotated[tuple[Count, ...], Field(min_length=1)] = (16, 16)
    value_hidden: tuple[Count, ...] = (64, 64)
    policy_bits: Annotated[int, AfterValidator(_runnable), Field(description="2 to 16, or 32 for float")] = 8
    checkpoint_every: Count = 20
