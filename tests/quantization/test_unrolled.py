"""Frames with gradients to their thresholds, against plain steps and finite differences."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from resq_rl.errors import PolicyError, SettingsError
from resq_rl.quantization import Field, LevelField, Reference, ResQModel, ThresholdField
from tests.quantization.networks import CASES, SmallNet, byte_clips, perturb_statistics, video, wrapped

REFERENCES: tuple[Reference, ...] = ("previous", "keyframe")
SIZE = (12, 12)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, tuple[int, int]]] = {
    "small": (lambda: perturb_statistics(SmallNet()), 3, SIZE),
    **{case.name: (case.make, case.channels[0], case.size) for case in CASES},
}


def calibrated(make: Callable[[], nn.Module], channels: int = 3, size: tuple[int, int] = SIZE) -> ResQModel:
    torch.manual_seed(0)
    return wrapped(make().eval(), channels, size)


@cache
def small() -> ResQModel:
    """A model that tests share and do not change."""
    return calibrated(*NETWORKS["small"])


def whole(output: object) -> Tensor:
    """All outputs of a network in one tensor."""
    parts = output if isinstance(output, tuple) else (output,)
    return torch.cat([part.flatten(1) for part in parts], 1)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch's own, once
@pytest.mark.parametrize("name", NETWORKS)
def test_it_equals_a_plain_step_bit_for_bit(name: str) -> None:
    """Whatever the operator, the thresholds of groups, layers and regions, and the clips that refresh."""
    make, channels, size = NETWORKS[name]
    model = calibrated(make, channels, size)
    for reference in REFERENCES:
        check_against_plain(model, channels, size, reference)
    for reference in REFERENCES:
        check_against_plain(model.compile(), channels, size, reference)


def check_against_plain(model: ResQModel, channels: int, size: tuple[int, int], reference: Reference) -> None:
    frames = torch.stack([video(6, channels, size, seed) for seed in (0, 4)], 1)
    plain, unrolled = model.new_state(2, reference), model.new_state(2, reference)
    for t, x in enumerate(frames):
        rows, grid = (len(model.sites), (2, 3)) if t % 2 else (len(model.groups), (1, 1))
        taus = (torch.rand(2, rows, *grid) + 0.05).requires_grad_()
        refresh = torch.tensor([t == 0, t in (0, 3)])
        output, cost = model.step(x, plain, refresh, ThresholdField(taus.detach()))
        other, other_cost = model.unrolled_step(x, unrolled, refresh, ThresholdField(taus))
        assert torch.equal(whole(output), whole(other)), t
        assert torch.equal(cost.bops, other_cost.bops), t
        assert torch.equal(plain.age, unrolled.age)
        for mine, own in zip(plain.inputs + plain.outputs, unrolled.inputs + unrolled.outputs, strict=True):
            assert torch.equal(mine, own), t
        assert whole(other).requires_grad == bool(t) == other_cost.total.requires_grad


def unrolled_loss(model: ResQModel, reference: Reference, log_taus: Tensor, smooth: bool, refreshed: int = 0) -> Tensor:
    """Some function of the outputs and costs of three frames after a keyframe."""
    frames = torch.stack([video(4, 3, SIZE, seed, change=0.05) for seed in (0, 4)], 1)
    state, loss = model.new_state(2, reference), torch.zeros(())
    for t, x in enumerate(frames):
        refresh = torch.tensor([t == 0, t in (0, refreshed)])
        decision = ThresholdField(log_taus.exp()[:, :, None, None])
        output, cost = model.unrolled_step(x, state, refresh, decision, smooth=smooth)
        weights = torch.linspace(-1, 1, whole(output).shape[1])
        loss = loss + (whole(output) * weights).sum() + (cost.total / model.reference_bops()).sum()
    return loss


@pytest.mark.parametrize("refreshed", [0, 2])
@pytest.mark.parametrize("reference", REFERENCES)
def test_the_gradient_of_the_smoothed_loss_agrees_with_finite_differences(reference: Reference, refreshed: int) -> None:
    """Through several frames and the references between them; `refreshed` runs one clip's keyframe in between."""
    model = small()
    # Thresholds at least 0.05 octaves from where a step of the quantizers changes, which the surrogate leaves out.
    log_taus = (2 ** (torch.randint(-4, 3, (2, len(model.sites))) / 2 + 0.1)).log().requires_grad_()
    unrolled_loss(model, reference, log_taus, True, refreshed).backward()
    assert log_taus.grad is not None
    assert (log_taus.grad != 0).all()
    for seed in range(5):
        direction = torch.randn(log_taus.shape, generator=torch.Generator().manual_seed(seed))
        step = 0.01 / direction.abs().max()
        with torch.no_grad():
            ends = [unrolled_loss(model, reference, log_taus + s * direction, True, refreshed) for s in (step, -step)]
        difference = (ends[0] - ends[1]) / (2 * step)
        expected = (log_taus.grad * direction).sum()
        scale = (log_taus.grad.abs() * direction.abs()).sum()
        assert abs(difference - expected) < 0.02 * scale, f"direction {seed}: {difference}, {expected}, {scale}"


def test_the_cost_falls_with_every_threshold() -> None:
    model = small()
    log_taus = torch.zeros(2, len(model.sites), requires_grad=True)
    state = model.new_state(2)
    for t, x in enumerate(torch.stack([video(3, 3, SIZE, seed) for seed in (0, 4)], 1)):
        decision = ThresholdField(log_taus.exp()[:, :, None, None])
        cost = model.unrolled_step(x, state, torch.full((2,), t == 0), decision)[1]
    (gradient,) = torch.autograd.grad(cost.total.sum(), log_taus)
    assert (gradient <= 0).all()
    assert (gradient < 0).any(0).all()


def test_detached_references_end_the_reach_of_gradients() -> None:
    model = small()
    first, second = (torch.ones(1, len(model.sites), 1, 1, requires_grad=True) for _ in range(2))
    for detached in (False, True):
        state, frames = model.new_state(1), video(3, 3, SIZE)[:, None]
        model.step(frames[0], state, torch.ones(1, dtype=torch.bool), ThresholdField(first.detach()))
        still = torch.zeros(1, dtype=torch.bool)
        model.unrolled_step(frames[1], state, still, ThresholdField(first))
        if detached:
            state.detach()
        output = model.unrolled_step(frames[2], state, still, ThresholdField(second))[0]
        reached, own = torch.autograd.grad(whole(output).sum(), (first, second), allow_unused=True)
        assert own.abs().sum() > 0
        assert (reached is None) == detached


@pytest.mark.parametrize(
    ("decision", "sharpness", "error", "message"),
    [
        (LevelField.constant(1, 1, 6), 3.0, PolicyError, "give a field of positive ones"),
        (ThresholdField.constant(0.0, 1, 6), 3.0, PolicyError, "give a field of positive ones"),
        (ThresholdField.constant(1.0, 1, 4), 3.0, PolicyError, "6 layer groups or 8 layers"),
        (ThresholdField.constant(1.0, 1, 6), 0.0, SettingsError, "sharpness of a gate must be positive, got 0.0"),
    ],
)
def test_what_cannot_have_gradients(decision: Field, sharpness: float, error: type[Exception], message: str) -> None:
    model = small()
    with pytest.raises(error, match=message):
        model.unrolled_step(
            torch.rand(1, 3, *SIZE), model.new_state(1), torch.ones(1, dtype=torch.bool), decision, sharpness=sharpness
        )


# Fields with a row for each layer, in plain steps


class TwoByTwo(nn.Module):
    """Two groups of layers, the second of two."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 2, 1)
        self.then = nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Conv2d(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self.first(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("reference", REFERENCES)
def test_layers_with_the_thresholds_of_their_group_run_as_the_group_does(reference: Reference) -> None:
    model = small()
    by_group = torch.rand(2, len(model.groups), 2, 3) + 0.05
    by_layer = by_group[:, model.group_of_site]
    states = model.new_state(2, reference), model.new_state(2, reference)
    for t, x in enumerate(torch.stack([video(4, 3, SIZE, seed) for seed in (0, 4)], 1)):
        refresh = torch.tensor([t == 0, t in (0, 2)])
        levels = torch.randint(4, (2, len(model.groups), 2, 3))
        pairs: list[tuple[Field, Field]] = [(ThresholdField(by_group), ThresholdField(by_layer))]
        pairs.append((LevelField(levels), LevelField(levels[:, model.group_of_site])))
        results = [model.step(x, s, refresh, field) for s, field in zip(states, pairs[t % 2], strict=True)]
        assert torch.equal(whole(results[0][0]), whole(results[1][0]))
        assert torch.equal(results[0][1].bops, results[1][1].bops)


def test_the_cost_of_a_level_for_each_layer_by_hand() -> None:
    """Pointwise layers of 3 to 2, 2 to 4 and 4 to 1 channels on 4x4 pixels: 4 bits x level bits x MACs."""
    model = ResQModel(TwoByTwo(), torch.rand(1, 3, 4, 4)).calibrate(byte_clips(2, 4, 3, (4, 4)))
    state, frames = model.new_state(1), video(2, 3, (4, 4))[:, None]
    field = LevelField(torch.tensor([3, 1, 0])[None, :, None, None])  # 8, 2 and 0 bits
    model.step(frames[0], state, torch.ones(1, dtype=torch.bool), field)
    cost = model.step(frames[1], state, torch.zeros(1, dtype=torch.bool), field)[1]
    assert cost.per_layer.tolist() == [[4 * 8 * 16 * 6, 4 * 2 * 16 * 8, 0]]
