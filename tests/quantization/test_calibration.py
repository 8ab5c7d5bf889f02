"""Calibration: ranges from what every call site sees, and clips that give none."""

import pytest
import torch
from torch import Tensor, nn

from resq_rl.errors import CalibrationError, SettingsError
from resq_rl.quantization import AffineQuantizer, LevelField, QuantizationConfig, Reference, ResQModel
from resq_rl.quantization.running import calibration
from tests.quantization.networks import byte_clips, wrapped

SIZE = (8, 10)


def fresh(network: nn.Module | None = None) -> ResQModel:
    return ResQModel(network or nn.Conv2d(3, 4, 3), torch.rand(1, 3, *SIZE))


def test_keyframe_ranges_cover_the_extremes_under_min_max() -> None:
    clips = byte_clips(2, 5, 3, SIZE)
    model = ResQModel(nn.Conv2d(3, 4, 3), torch.rand(1, 3, *SIZE), QuantizationConfig(range_estimator="min_max"))
    quantizer = model.calibrate(clips).ranges[0].keyframe
    largest = max(float(clip.max()) for clip in clips) / 255
    assert isinstance(quantizer, AffineQuantizer)
    assert quantizer.zero_point == 0
    assert quantizer.step == pytest.approx(largest / 255, rel=1e-5)


@pytest.mark.parametrize("reference", ["previous", "keyframe"])
def test_a_change_that_no_calibration_clip_shows_is_held(reference: Reference) -> None:
    """Clips of a camera before which hardly anything moves, then a picture that turns from black to white."""
    torch.manual_seed(0)
    pictures = byte_clips(3, 1, 3, SIZE)
    quiet = [
        (picture.expand(6, -1, -1, -1).int() + torch.randint(-1, 2, (6, 3, *SIZE))).clamp(0, 255)
        for picture in pictures
    ]
    quiet[0][:, :, 0, :2] = torch.tensor([0, 255])  # within the range of keyframes
    network = nn.Conv2d(3, 4, 3)
    model = fresh(network).calibrate([clip.to(torch.uint8) for clip in quiet])
    black, white = torch.zeros(1, 3, *SIZE), torch.ones(1, 3, *SIZE)
    state, finest = model.new_state(1, reference), LevelField.constant(3, 1, 1)
    model.step(black, state, torch.tensor([True]), finest)
    output, _ = model.step(white, state, torch.tensor([False]), finest)
    codes, scale = model.integer_weights(model.operators[0], residual=True)
    held = (codes * scale.view(-1, 1, 1, 1)).double().sum((1, 2, 3))  # of an input that is 1 everywhere
    assert network.bias is not None
    wanted = held + network.bias.double()
    reach = (codes.abs() * scale.view(-1, 1, 1, 1)).double().sum((1, 2, 3))
    assert bool(((output[0].double() - wanted[:, None, None]).abs() < 0.02 * reach[:, None, None]).all())


def test_sigma_is_the_deviation_of_all_residuals() -> None:
    clips = byte_clips(2, 7, 3, SIZE)
    model = fresh().calibrate(clips, interval=4)
    frames = [clip.double() / 255 for clip in clips]
    keyframe, previous = [], []
    for clip in frames:
        for t in range(7):
            if t % 4:
                keyframe.append(clip[t] - clip[t - t % 4])
                previous.append(clip[t] - clip[t - 1])
    tables = model.ranges[0].residual
    assert tables["keyframe"].sigma == pytest.approx(float(torch.stack(keyframe).square().mean().sqrt()), rel=1e-5)
    assert tables["previous"].sigma == pytest.approx(float(torch.stack(previous).square().mean().sqrt()), rel=1e-5)


def test_later_frames_are_left_out() -> None:
    clips = byte_clips(2, 7, 3, SIZE)
    short = [clip[:4] for clip in clips]
    a, b = fresh(), fresh()
    b.network.load_state_dict(a.network.state_dict())
    a.calibrate(clips, frames=4), b.calibrate(short)
    assert a.ranges[0].keyframe == b.ranges[0].keyframe
    assert a.ranges[0].residual["previous"].step == b.ranges[0].residual["previous"].step


def test_the_same_seed_gives_the_same_ranges() -> None:
    torch.manual_seed(1)
    network = nn.Conv2d(3, 4, 3)
    clips = byte_clips(2, 5, 3, (40, 40))
    config = QuantizationConfig(levels=(0, 2))
    models = [ResQModel(network, torch.rand(1, 3, 40, 40), config).calibrate(clips, seed=seed) for seed in (3, 3, 4)]
    steps = [m.ranges[0].residual["previous"].step for m in models]
    assert steps[0] == steps[1] != steps[2]


def test_samples_are_thinned_over_all_channels_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "MOST_VALUES", 200)
    for channels in (1, 2, 6, 8, 16):
        rows = torch.arange(channels).float().expand(400, channels)
        values = calibration._thinned(rows)
        assert 50 <= len(values) <= 400
        counts = torch.bincount(values.long(), minlength=channels)
        assert int(counts.max() - counts.min()) <= 1


# Clips that give no ranges -------------------------------------------------------------------------------------------


def test_no_clips() -> None:
    with pytest.raises(CalibrationError, match="at least one clip with two frames, got 0 clips"):
        fresh().calibrate([])


def test_clips_of_one_frame() -> None:
    with pytest.raises(CalibrationError, match=r"at least one clip with two frames, got 2 clips of \[1\] frames"):
        fresh().calibrate(byte_clips(2, 1, 3, SIZE))
    fresh().calibrate([*byte_clips(1, 1, 3, SIZE), *byte_clips(1, 2, 3, SIZE)])  # one is enough


@pytest.mark.parametrize(("interval", "frames"), [(1, 8), (0, 8), (-1, 8), (4, 1), (4, 0)])
def test_intervals_without_a_residual_frame(interval: int, frames: int) -> None:
    with pytest.raises(SettingsError, match=f"2 or more, got {interval} and {frames}"):
        fresh().calibrate(byte_clips(1, 4, 3, SIZE), interval=interval, frames=frames)


def test_clips_of_another_size_or_type(unchecked_types: None) -> None:
    for clips in (byte_clips(1, 4, 3, (8, 8)), byte_clips(1, 4, 1, SIZE), [torch.rand(4, 3, *SIZE)]):
        with pytest.raises(CalibrationError, match=r"clip 0 holds .* wrapped for uint8 frames of \(3, 8, 10\)"):
            fresh().calibrate(clips)


def test_clips_that_do_not_move() -> None:
    still = byte_clips(1, 1, 3, SIZE)[0].expand(4, -1, -1, -1)
    with pytest.raises(CalibrationError, match="do not move"):
        fresh().calibrate([still])


class Diverging(nn.Module):
    """Divides by what is zero on dark frames."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x) / x.amax((1, 2, 3), keepdim=True))
        return y


@pytest.mark.parametrize("dark", [0, 1, 3, 4])
def test_values_that_are_not_finite_are_named_by_layer(dark: int) -> None:
    clip = byte_clips(1, 6, 3, SIZE)[0].clone()
    clip[dark] = 0
    with pytest.raises(CalibrationError, match="Layer 'second' meets NaN or infinity"):
        fresh(Diverging()).calibrate([clip], interval=4)


def test_a_dead_layer_gets_harmless_ranges() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    layer = network[0]
    assert isinstance(layer, nn.Conv2d)
    layer.weight.data.zero_()
    assert layer.bias is not None
    layer.bias.data.fill_(-1.0)
    model = wrapped(network, 3, SIZE)
    table = model.ranges[1].residual["previous"]
    assert table.step > 0
    for kappa in (None, (1.0, 2.0, 8.0)):
        assert all(bool(part.isfinite().all()) for part in table.steps(kappa))
    assert float(model.ranges[1].keyframe(torch.zeros(1))) == 0.0


class Overwriting(nn.Module):
    """Writes to a layer's input, in place or not, once the layer has read it; within autocast, if it is to."""

    def __init__(self, in_place: bool = False, coarse: bool = False) -> None:
        super().__init__()
        self.in_place, self.coarse = in_place, coarse
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.coarse):
            x = self.first(x)
            y = self.second(x)
            total: Tensor = (x.relu_() if self.in_place else x.relu()) + y
            return total


def overwriting(**how: bool) -> ResQModel:
    torch.manual_seed(0)
    return ResQModel(Overwriting(**how).eval(), torch.rand(1, 3, *SIZE)).calibrate(byte_clips(2, 5, 3, SIZE))


def test_what_is_written_to_an_input_later_is_not_calibrated_on() -> None:
    written, kept = overwriting(in_place=True), overwriting()
    assert written.ranges == kept.ranges


def test_calibration_has_full_precision_within_a_networks_own_autocast() -> None:
    """The first layer sees the same frames either way, so that its weights are rounded alike."""
    coarse, fine = overwriting(coarse=True), overwriting()
    weights = [model.integer_weights(model.operators[0], residual=True) for model in (coarse, fine)]
    assert all(map(torch.equal, *weights))
    assert coarse.ranges[0].residual == fine.ranges[0].residual
