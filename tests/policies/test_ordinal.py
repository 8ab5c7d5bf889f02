"""Scores of ordered choices."""

import numpy as np
import torch
from scipy import stats

from resq_rl.policies.ordinal import OrdinalHead

SIZES = (12, 4, 2)


def head() -> OrdinalHead:
    torch.manual_seed(0)
    made = OrdinalHead(5, SIZES)
    made.linear.weight.data.normal_()
    made.log_width.data = torch.tensor([1.5, 0.7, 1.0]).log()
    return made


def test_choices_are_as_probable_as_a_normal_density_at_their_places() -> None:
    own, x = head(), torch.randn(20, 5, generator=torch.Generator().manual_seed(1))
    places = own.places(x).detach().numpy()
    for column, scores in enumerate(own(x).split(list(SIZES), 1)):
        density = stats.norm.pdf(np.arange(SIZES[column])[None], places[:, column, None], [1.5, 0.7, 1.0][column])
        expected = density / density.sum(1, keepdims=True)
        np.testing.assert_allclose(scores.softmax(1).detach().numpy(), expected, rtol=1e-3, atol=1e-6)


def test_the_likeliest_choice_is_the_nearest() -> None:
    own, x = head(), torch.randn(200, 5, generator=torch.Generator().manual_seed(2))
    places = own.places(x).detach().numpy()
    for column, scores in enumerate(own(x).split(list(SIZES), 1)):
        nearest = np.clip(np.rint(places[:, column]), 0, SIZES[column] - 1)
        assert scores.argmax(1).tolist() == nearest.tolist()
        assert len(set(nearest.tolist())) > 1


def test_its_plain_layer_gives_the_places() -> None:
    own, x = head(), torch.randn(10, 5, generator=torch.Generator().manual_seed(3))
    weight, bias = own.plain()
    torch.testing.assert_close(torch.nn.functional.linear(x, weight, bias), own.places(x).detach())


def test_a_new_head_chooses_about_evenly_and_in_the_middle() -> None:
    own = OrdinalHead(5, SIZES)
    x = torch.randn(50, 5, generator=torch.Generator().manual_seed(4))
    for size, scores in zip(SIZES, own(x).split(list(SIZES), 1), strict=True):
        entropy = torch.distributions.Categorical(logits=scores).entropy().mean() / np.log(size)
        assert entropy > 0.9
