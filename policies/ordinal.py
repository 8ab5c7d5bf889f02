"""A PPO policy whose choices are places on a scale: thresholds and levels are ordered, and so is keyframe or not."""

from typing import Any

import torch
from jaxtyping import Float
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import Tensor, nn

__all__ = ["OrdinalHead", "OrdinalPolicy"]

# Initial width of a decision, as a share of its number of choices.
FIRST_WIDTH = 0.3
# Move of a decision by one unit of the layer's output, as a share of its number of choices.
REACH = 1 / 3


class OrdinalHead(nn.Module):
    """Scores of every choice from one number per decision, its place on the scale of choices 0 to n - 1.

    The score of choice i is -((i - place) / width)^2 / 2, so that neighbours share what is learned, exploration goes to
    neighbours first, and a device needs only the place: the likeliest choice is the nearest to it. The width is
    learned, one per decision. In the manner of ordinal policies (Tang and Agrawal, arXiv 1901.10500).

    Args:
        inputs: width of the layer before.
        sizes: number of choices of each decision.
    """

    index: Tensor
    column: Tensor
    middle: Tensor
    reach: Tensor

    def __init__(self, inputs: int, sizes: tuple[int, ...]) -> None:
        super().__init__()
        counts = torch.tensor(sizes)
        self.linear = nn.Linear(inputs, len(sizes))
        nn.init.orthogonal_(self.linear.weight, 0.01)
        nn.init.zeros_(self.linear.bias)
        self.log_width = nn.Parameter((counts * FIRST_WIDTH).log())
        self.register_buffer("index", torch.cat([torch.arange(n) for n in sizes]).float(), persistent=False)
        self.register_buffer("column", torch.arange(len(sizes)).repeat_interleave(counts), persistent=False)
        self.register_buffer("middle", (counts - 1) / 2, persistent=False)
        self.register_buffer("reach", counts * REACH, persistent=False)

    def forward(self, x: Float[Tensor, "n inputs"]) -> Float[Tensor, "n choices"]:
        """Scores of all choices, decision by decision."""
        distance = (self.index - self.places(x)[:, self.column]) / self.log_width.exp()[self.column]
        return distance.square().mul(-0.5)

    def places(self, x: Float[Tensor, "n inputs"]) -> Float[Tensor, "n k"]:
        """Place of every decision."""
        places: Tensor = self.linear(x) * self.reach + self.middle
        return places

    def plain(self) -> tuple[Float[Tensor, "k inputs"], Float[Tensor, " k"]]:
        """Weight and bias of the linear layer that gives the places."""
        with torch.no_grad():
            weight = self.linear.weight * self.reach[:, None]
            return weight.cpu(), (self.linear.bias * self.reach + self.middle).cpu()


class OrdinalPolicy(ActorCriticPolicy):
    """stable-baselines3's policy of two multi-layer perceptrons, with an `OrdinalHead` for the actions."""

    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        sizes = tuple(int(n) for n in self.action_space.nvec)  # type: ignore[attr-defined]
        self.action_net = OrdinalHead(self.mlp_extractor.latent_dim_pi, sizes)
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)  # type: ignore[call-arg]
