"""Keyframe quantizers and corrections: what each must achieve, and that the choice never loses."""

import pytest
import torch
from torch import Tensor, nn

from resq_rl.quantization import AffineQuantizer, ChannelQuantizer, LevelField, QuantizationConfig, ResQModel, to_float
from resq_rl.quantization.quantizers.ranges import affine_quantizer, output_quantizers
from resq_rl.quantization.running import keyframes
from resq_rl.quantization.running.calibration import SiteRanges
from tests.quantization.networks import SmallNet, everywhere, perturb_statistics, smooth_clips

SIZE = (12, 16)


def keyframes_of(model: ResQModel, frames: Tensor) -> list[Tensor]:
    """The outputs with every frame a keyframe."""
    field = LevelField.constant(0, len(frames), len(model.groups))
    output, _ = model.step(frames, model.new_state(len(frames)), everywhere(len(frames), True), field)
    return [output] if isinstance(output, Tensor) else list(output)


def errors(model: ResQModel, frames: Tensor) -> list[float]:
    """Squared error of each output."""
    wanted = model.float_forward(frames)
    wanted = [wanted] if isinstance(wanted, Tensor) else list(wanted)
    found = keyframes_of(model, frames)
    return [float((a.double() - b.double()).square().sum()) for a, b in zip(found, wanted, strict=True)]


class Uneven(nn.Module):
    """A depthwise layer with two outputs for each input channel, whose inputs differ in scale a thousandfold."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.deep = nn.Conv2d(3, 6, 3, padding=1, groups=3)
        self.register_buffer("scale", torch.tensor([1.0, 0.03, 0.001])[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.deep(x * self.scale) / self.scale.repeat_interleave(2, 0)
        return y


def use_plain_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    def plain(self: keyframes.KeyframeFit, ranges: list[SiteRanges], *_: object, **__: object) -> list[SiteRanges]:
        return ranges

    monkeypatch.setattr(keyframes.KeyframeFit, "best", plain)


# Ranges --------------------------------------------------------------------------------------------------------------


def output_error(patches: Tensor, weights: Tensor, quantizer: AffineQuantizer) -> float:
    """Squared error of the outputs of one group, in double precision."""
    x, step, zero = patches[0].double(), quantizer.step, quantizer.zero_point
    codes = (x / step).round().clamp(-zero, 2**quantizer.bits - 1 - zero)
    return float(((codes * step - x) @ weights[0].double().T).square().sum())


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_output_ranges_lose_less_in_the_output_than_ranges_of_the_inputs(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    patches = torch.randn(1, 400, 20, generator=generator) * torch.logspace(0, -1.5, 20)
    patches[..., 0] *= torch.rand(400, generator=generator).pow(6) * 8  # rare and large, and hardly weighed
    weights = torch.randn(1, 8, 20, generator=generator) * torch.logspace(-1.5, 0, 20)
    own = affine_quantizer(patches.flatten(), bits, "least_squares")
    (found,) = output_quantizers(patches, weights, patches.amin((1, 2)), patches.amax((1, 2)), bits)
    assert output_error(patches, weights, found) < 0.9 * output_error(patches, weights, own)


def test_groups_get_the_ranges_that_they_would_get_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(4, 100, 9, generator=generator) * torch.tensor([1.0, 0.1, 5.0, 0.0])[:, None, None]
    patches[2] = patches[2].abs()
    weights = torch.randn(4, 2, 9, generator=generator)
    ends = patches.amin((1, 2)), patches.amax((1, 2))
    found = output_quantizers(patches, weights, ends[0], ends[1], 8)
    for g in range(4):
        part = slice(g, g + 1)
        assert found[part] == output_quantizers(patches[part], weights[part], ends[0][part], ends[1][part], 8)
    assert found[2].zero_point == 0
    assert all(quantizer.step > 0 for quantizer in found)


# Corrections ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_corrected_layers_have_the_mean_of_the_float_output(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # With so few bits a mean error is left in every layer, and the second layer must see the first one corrected.
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3, bias=bias), nn.ReLU(), nn.Conv2d(8, 4, 3, bias=bias))
    clips = smooth_clips(4, 6, 3, SIZE)
    model = ResQModel(network, to_float(clips[0][:1]), QuantizationConfig(key_activation_bits=3)).calibrate(clips)
    (frames,), _ = keyframes.chosen_frames(clips, 24, model.layers, model.device)
    corrected = keyframes_of(model, frames)[0].double().mean((0, 2, 3))
    use_plain_ranges(monkeypatch)
    plain = keyframes_of(model.calibrate(clips), frames)[0].double().mean((0, 2, 3))
    wanted = model.float_forward(frames).double().mean((0, 2, 3))
    assert float((corrected - wanted).abs().max()) < 0.01 * float((plain - wanted).abs().max())


def test_corrections_serve_residual_frames_too() -> None:
    network, clips = perturb_statistics(SmallNet()), smooth_clips(4, 6, 3, SIZE)
    model = ResQModel(network, to_float(clips[0][:1])).calibrate(clips)
    state, still = model.new_state(1), to_float(clips[0][:1])
    first, _ = model.step(still, state, everywhere(1, True), LevelField.constant(0, 1, len(model.groups)))
    kept = [part.clone() for part in first]
    later, _ = model.step(still, state, everywhere(1, False), LevelField.constant(0, 1, len(model.groups)))
    assert all(map(torch.equal, kept, later))


# The choice ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_the_choice_never_loses_on_the_frames_it_is_made_by(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(seed)
    network, clips = perturb_statistics(SmallNet(), seed), smooth_clips(2, 6, 3, SIZE)
    model = ResQModel(network, to_float(clips[0][:1])).calibrate(clips)
    _, (held,) = keyframes.chosen_frames(clips, 24, model.layers, model.device)
    chosen = torch.tensor(errors(model, held)).log().sum()
    use_plain_ranges(monkeypatch)
    plain = torch.tensor(errors(model.calibrate(clips), held)).log().sum()
    assert not any(r.correction for r in model.ranges)
    assert float(chosen) <= float(plain) + 1e-6


def test_inputs_of_a_depthwise_layer_get_steps_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    clips = smooth_clips(4, 6, 3, SIZE)
    network, frames = Uneven(), to_float(torch.cat(smooth_clips(2, 6, 3, SIZE, 900)))
    model = ResQModel(network, frames[:1]).calibrate(clips)
    quantizer = model.ranges[0].keyframe
    assert isinstance(quantizer, ChannelQuantizer)
    assert len({channel.step for channel in quantizer.channels}) == 3
    own = errors(model, frames)[0]
    use_plain_ranges(monkeypatch)
    assert own < 0.001 * errors(model.calibrate(clips), frames)[0]


def test_ranges_that_were_asked_for_stay() -> None:
    clips = smooth_clips(2, 6, 3, SIZE)
    model = ResQModel(Uneven(), to_float(clips[0][:1]), QuantizationConfig(range_estimator="min_max")).calibrate(clips)
    assert isinstance(model.ranges[0].keyframe, AffineQuantizer)


def test_frames_to_fit_to_and_to_choose_by_are_apart_and_fit_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ResQModel(nn.Conv2d(1, 1, 1), torch.zeros(1, 1, 2, 2))
    clips = [torch.arange(10 * i, 10 * i + 10, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2) for i in (0, 1)]

    def numbers(most: int) -> tuple[list[int], list[int]]:
        parts = keyframes.chosen_frames(clips, most, model.layers, model.device)
        fitted, held = ([round(float(v) * 255) for v in part[0][:, 0, 0, 0]] for part in parts)
        return fitted, held

    fitted, held = numbers(4)
    assert sorted(fitted + held) == [0, 1, 2, 3, 10, 11, 12, 13]
    assert len(held) == 2
    assert numbers(1) == ([0], [10])
    monkeypatch.setattr(keyframes, "MOST_ELEMENTS", 6 * 8)
    assert [len(part) for part in numbers(10)] == [4, 2]


def test_threads_do_not_show() -> None:
    clips, found = smooth_clips(2, 4, 3, SIZE), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.manual_seed(0)
            torch.set_num_threads(threads)
            network = perturb_statistics(SmallNet())
            found.append(ResQModel(network, to_float(clips[0][:1])).calibrate(clips).ranges)
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]
