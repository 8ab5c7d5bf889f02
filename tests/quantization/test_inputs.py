"""Networks that take more than the frame."""

import warnings

import pytest
import torch
from torch import Tensor, nn

from resq_rl.errors import CalibrationError, NetworkError, VideoError
from resq_rl.quantization import QuantizationConfig, ResQModel, ThresholdField
from tests.quantization.networks import SmallNet, byte_clips, everywhere, perturb_statistics, video

SIZE = (12, 16)


class Joined(nn.Module):
    """A network of three planes that takes two as the frame and the third as something else."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, frames: Tensor, plane: Tensor) -> Tensor:
        mixed: Tensor = self.network(torch.cat([frames, plane], 1))[0]
        return mixed


class First(nn.Module):
    """The first output of a network."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.network(x)[0]
        return mixed


def program_of(network: nn.Module, *planes: int) -> nn.Module:
    """The network, whose inputs have so many planes, as the module of an exported program."""
    clips = torch.export.Dim("clips", min=1, max=64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about its file format
        example = tuple(torch.rand(2, count, *SIZE) for count in planes)
        return torch.export.export(network, example, dynamic_shapes=tuple({0: clips} for _ in planes)).module()


@pytest.fixture(scope="module")
def networks() -> tuple[nn.Module, nn.Module]:
    """A network of one input and the same network of two."""
    network = perturb_statistics(SmallNet())
    return First(network).eval(), Joined(network).eval()


CONFIG = QuantizationConfig(groups={"all": ["*"]})


def whole_and_parted(networks: tuple[nn.Module, nn.Module]) -> tuple[ResQModel, ResQModel]:
    """Both networks, calibrated on the same planes."""
    clips = byte_clips(2, 5, 3, SIZE)
    whole = ResQModel(networks[0], torch.zeros(1, 3, *SIZE), CONFIG).calibrate(clips)
    parted = ResQModel(networks[1], (torch.zeros(1, 2, *SIZE), torch.zeros(1, 1, *SIZE)), CONFIG)
    return whole, parted.calibrate([(clip[:, :2], clip[:, 2:]) for clip in clips])


@pytest.mark.parametrize("program", [False, True])
def test_two_inputs_run_like_one_tensor_of_both(networks: tuple[nn.Module, nn.Module], program: bool) -> None:
    """Outputs and costs are the same to the last bit, whichever clips run a keyframe."""
    if program:
        networks = program_of(networks[0], 3), program_of(networks[1], 2, 1)
    whole, parted = whole_and_parted(networks)
    states = whole.new_state(2), parted.new_state(2)
    field = ThresholdField.constant(0.6, 2, len(whole.groups), (2, 2))
    frames = torch.stack([video(4, 3, SIZE, seed) for seed in range(2)], 1)
    for t, frame in enumerate(frames):
        refresh = everywhere(2, True) if t == 0 else torch.tensor([False, t == 2])
        wanted, cost = whole.step(frame, states[0], refresh, field)
        found, own = parted.step((frame[:, :2], frame[:, 2:]), states[1], refresh, field)
        assert torch.equal(found, wanted)
        assert torch.equal(own.per_region, cost.per_region)
    both = parted.float_forward((frames[0][:, :2], frames[0][:, 2:]))
    torch.testing.assert_close(both, whole.float_forward(frames[0]))


def test_inputs_that_do_not_fit(networks: tuple[nn.Module, nn.Module]) -> None:
    _, model = whole_and_parted(networks)
    state, field = model.new_state(2), ThresholdField.constant(1.0, 2, 1)
    frame, plane = torch.rand(2, 2, *SIZE), torch.rand(2, 1, *SIZE)
    for inputs in (frame, (frame,), (frame, plane, plane), (plane, frame), (frame, plane[:1])):
        with pytest.raises(VideoError, match=r"\(clips, 2, 12, 16\) and \(clips, 1, 12, 16\)"):
            model.step(inputs, state, everywhere(2, True), field)
    plane[1, 0, 3, 3] = torch.nan
    with pytest.raises(VideoError, match=r"clips \[1\] hold NaN"):
        model.step((frame, plane), state, everywhere(2, True), field)
    clip = byte_clips(1, 5, 3, SIZE)[0]
    for wrong in (clip, (clip[:, :2], clip[:3, 2:]), (clip[:, :2], clip[:, 2:].float())):
        with pytest.raises(CalibrationError, match=r"uint8 frames of \(2, 12, 16\) and \(1, 12, 16\)"):
            model.calibrate([wrong])
    with pytest.raises(NetworkError, match=r"got nothing"):
        ResQModel(networks[1], ())
