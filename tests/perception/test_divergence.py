"""`Task.divergence` of every shipped task, against SciPy and the distance between two Gaussians."""

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from torch import Tensor

from resq_rl.perception import MaskPropagation, Pose, Segmentation, Task
from resq_rl.perception.pose import SPREAD

SIZE = (32, 48)
POINTS = 5
LANDMARKS = Pose(points=POINTS, kind="landmarks", normaliser="box")
TASKS: dict[str, tuple[Task, tuple[int, ...]]] = {
    "logits": (Segmentation(classes=4), (4, 16, 24)),
    "probability": (Segmentation(classes=2, kind="probability"), (1, *SIZE)),
    "logit": (Segmentation(classes=2, kind="logit"), (1, *SIZE)),
    "masks": (MaskPropagation(), (2, *SIZE)),
    "heatmaps": (Pose(points=POINTS, normaliser="box"), (POINTS, 8, 12)),
    "heats": (Pose(points=POINTS, kind="probabilities", normaliser="box"), (POINTS, 8, 12)),
    "landmarks": (LANDMARKS, (POINTS, 2)),
}


def raw(name: str, seed: int, scale: float = 3.0) -> Tensor:
    """What a network might return for 3 frames."""
    values = scale * torch.randn(3, *TASKS[name][1], generator=torch.Generator().manual_seed(seed))
    if name == "landmarks":
        return torch.tensor([24.0, 16.0]) + 2 * values
    return values.sigmoid() if name in ("probability", "heats") else values


def probabilities(name: str, output: Tensor) -> np.ndarray:
    """The distributions that are compared, (frames, distributions, outcomes)."""
    values = output.double().numpy()
    if name in ("heatmaps", "heats", "landmarks"):
        flat = values.reshape(*values.shape[:2], -1)
    elif name in ("probability", "logit"):
        flat = values.reshape(len(values), -1, 1).clip(1e-6, 1 - 1e-6)
        return np.concatenate([1 - flat, flat], 2)
    else:
        flat = values.reshape(*values.shape[:2], -1).swapaxes(1, 2)
    weights = np.exp(flat - flat.max(2, keepdims=True))
    return np.asarray(weights / weights.sum(2, keepdims=True))


@pytest.mark.parametrize("name", TASKS)
def test_it_is_the_mean_divergence_of_the_distributions(name: str) -> None:
    task = TASKS[name][0]
    output, teacher = (task.output(raw(name, seed), SIZE) for seed in (0, 1))
    p, q = probabilities(name, teacher), probabilities(name, output)
    expected = entropy(p, q, axis=2).mean(1)
    assert (expected > 0).all()
    np.testing.assert_allclose(task.divergence(output, teacher), expected, rtol=1e-3)


@pytest.mark.parametrize("name", TASKS)
def test_equal_outputs_do_not_diverge_and_a_step_down_the_gradient_brings_others_nearer(name: str) -> None:
    task = TASKS[name][0]
    teacher, given = task.output(raw(name, 1), SIZE), raw(name, 2).requires_grad_()
    assert torch.equal(task.divergence(teacher, teacher), torch.zeros(3))
    before = task.divergence(task.output(given, SIZE), teacher)
    (gradient,) = torch.autograd.grad(before.sum(), given)
    assert bool(torch.isfinite(gradient).all())
    step = 0.01 / gradient.abs().amax()
    after = task.divergence(task.output(given - step * gradient, SIZE), teacher)
    assert (after < before).all()


@pytest.mark.parametrize("name", TASKS)
def test_certain_outputs_have_a_finite_divergence_and_gradient(name: str) -> None:
    """Saturated probabilities, and landmarks far outside of the frame."""
    task = TASKS[name][0]
    ends = raw(name, 3, scale=1e4), raw(name, 4, scale=1e4)
    output = ends[0].round().requires_grad_()
    divergence = task.divergence(task.output(output, SIZE), task.output(ends[1].round(), SIZE))
    (gradient,) = torch.autograd.grad(divergence.sum(), output)
    assert bool(torch.isfinite(divergence).all())
    assert bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize("cells", [0.5, 1.0, 2.0])
def test_landmarks_diverge_with_the_square_of_their_distance(cells: float) -> None:
    size = (160, 160)
    places = torch.full((1, POINTS, 2), 80.0)
    moved = places + torch.tensor([cells * LANDMARKS.stride, 0.0])
    output, teacher = LANDMARKS.output(moved, size), LANDMARKS.output(places, size)
    assert float(LANDMARKS.divergence(output, teacher)) == pytest.approx(cells**2 / (2 * SPREAD**2), rel=1e-3)
