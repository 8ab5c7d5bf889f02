import pytest
import torch
from torch import Tensor, nn

from resq_rl.errors import CalibrationError
from resq_rl.quantization import ResQModel, choose_residual_weight_bits
from tests.quantization.networks import SmallNet, byte_clips, perturb_statistics, wrapped

SIZE = (8, 12)


@pytest.fixture
def model() -> ResQModel:
    return wrapped(perturb_statistics(SmallNet()), 3, SIZE)


def test_every_kind_of_the_network_gets_bits(model: ResQModel) -> None:
    clips = byte_clips(2, 5, 3, SIZE, seed=200)
    chosen = choose_residual_weight_bits(model, clips)
    assert set(chosen) == {"conv", "depthwise", "pointwise", "transposed", "linear"}
    assert set(chosen.values()) <= {4, 5, 6, 8}
    assert model.config.residual_weight_bits == chosen
    assert choose_residual_weight_bits(model, clips) == chosen


def test_tolerance_rules_the_choice(model: ResQModel) -> None:
    clips = byte_clips(1, 4, 3, SIZE, seed=200)
    assert set(choose_residual_weight_bits(model, clips, tolerance=1e9).values()) == {4}
    strict = choose_residual_weight_bits(model, clips, tolerance=1.0)
    loose = choose_residual_weight_bits(model, clips, tolerance=3.0)
    assert sum(strict.values()) >= sum(loose.values())


def test_clips_without_a_residual_frame(model: ResQModel) -> None:
    with pytest.raises(CalibrationError, match="at least one clip with two frames"):
        choose_residual_weight_bits(model, byte_clips(2, 4, 3, SIZE), frames=1)


def test_weights_that_4_bits_hold_exactly_get_4_bits() -> None:
    layer = nn.Conv2d(3, 4, 3, padding=1)
    layer.weight.data = torch.randint(-7, 8, layer.weight.shape).float() / 7
    layer.weight.data[:, 0, 0, 0] = 1.0
    model = wrapped(layer, 3, SIZE)
    assert choose_residual_weight_bits(model, byte_clips(1, 4, 3, SIZE)) == {"conv": 4}


class TwoHeads(nn.Module):
    """A dense and a pointwise layer, with an output each, the second of which is scaled."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dense, self.point, self.scale = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1), scale

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both outputs."""
        return self.dense(x), self.scale * self.point(x)


def test_an_output_of_large_values_does_not_outweigh_the_others() -> None:
    clips = byte_clips(1, 4, 3, SIZE)
    chosen = [choose_residual_weight_bits(wrapped(TwoHeads(s), 3, SIZE), clips) for s in (2.0**-10, 1.0, 2.0**10)]
    assert chosen[0] == chosen[1] == chosen[2]
