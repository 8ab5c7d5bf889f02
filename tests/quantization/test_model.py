"""Settings, checks at the boundary, and what a model reports about itself."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resq_rl.errors import CalibrationError, PolicyError, SettingsError, VideoError
from resq_rl.quantization import Field, LevelField, QuantizationConfig, ResQModel, ThresholdField, to_float
from tests.quantization.networks import SmallNet, byte_clips, everywhere, video, wrapped

SIZE = (8, 10)


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1))


@pytest.fixture(scope="module")
def model() -> ResQModel:
    torch.manual_seed(0)
    return wrapped(small(), 3, SIZE)


# Settings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"levels": (0,)}, r"'levels' must be two or more increasing values, .* received \[0\]"),
        ({"levels": (0, 4, 2)}, r"increasing values, .* received \[0, 4, 2\]"),
        ({"levels": (0, 4, 4)}, r"increasing values, .* received \[0, 4, 4\]"),
        ({"levels": (0, 1, 4)}, r"each 0 or at least 2 bits and at most 16; received \[0, 1, 4\]"),
        ({"levels": (-2, 4)}, "each 0 or at least 2 bits"),
        ({"levels": (0, 17)}, "at most 16"),
        ({"levels": 4}, "increasing values, .* received 4"),
        ({"key_weight_bits": 0}, "'key_weight_bits' must be an integer of at least 2 and at most 16; received 0"),
        ({"key_weight_bits": 1}, "'key_weight_bits' must be an integer of at least 2"),
        ({"key_weight_bits": "8"}, "'key_weight_bits' must be an integer .* received '8'"),
        ({"key_weight_bits": True}, "'key_weight_bits' must be an integer .* received True"),
        ({"key_activation_bits": 0}, "'key_activation_bits' must be an integer of at least 1 and at most 16; rec"),
        ({"key_activation_bits": 17}, "'key_activation_bits' must be .* at most 16; received 17"),
        ({"residual_weight_bits": 1}, "'residual_weight_bits' must be an integer of at least 2 and .* received 1"),
        ({"residual_weight_bits": {"conv": 4, "linear": 0}}, "'residual_weight_bits' must be .* at least 2 and at"),
        ({"range_estimator": "mse"}, "'range_estimator' must be one of least_squares, min_max, .* received 'mse'"),
        ({"weight_rounding": "bogus"}, "'weight_rounding' must be one of nearest, second_order; received 'bogus'"),
        ({"weight_rounding": "neares"}, r"did you mean 'nearest'\?"),
        (
            {"bops_convention": "sum"},
            "'bops_convention' must be one of clipped, max, product; or a cost table, .* received 'sum'",
        ),
        ({"groups": "atuo"}, r"'groups' must be auto or a mapping .*did you mean 'auto'\?"),
        ({"groups": {"all": 3}}, "a mapping whose values are each text or a list of values, each text"),
    ],
)
def test_impossible_settings(settings: dict[str, Any], message: str, unchecked_types: None) -> None:
    with pytest.raises(SettingsError, match=message):
        QuantizationConfig(**settings)


def test_residual_weight_bits_can_be_set_later(unchecked_types: None) -> None:
    model = wrapped(small(), 3, SIZE)
    assert [int(model.integer_weights(o, residual=True)[0].abs().max()) for o in model.operators] == [7, 7]
    model.set_residual_weight_bits({"conv": 8})
    assert [int(model.integer_weights(o, residual=True)[0].abs().max()) for o in model.operators] == [127, 7]
    with pytest.raises(SettingsError, match=r"'residual_weight_bits\.convolution'.*'residual_weight_bits\.conv'"):
        model.set_residual_weight_bits({"convolution": 8})
    assert model.config.residual_weight_bits == {"conv": 8}


def test_a_layer_goes_by_its_name_before_its_kind() -> None:
    model = wrapped(small(), 3, SIZE, QuantizationConfig(residual_weight_bits={"conv": 8, "0": 3, "pointwise": 6}))
    assert [(operator.name, operator.layer_kind) for operator in model.operators] == [("0", "conv"), ("2", "pointwise")]
    assert [int(model.integer_weights(o, residual=True)[0].abs().max()) for o in model.operators] == [3, 31]


def test_bits_of_a_layer_that_is_not_there() -> None:
    with pytest.raises(SettingsError, match=r"'residual_weight_bits\.deepwise'. Did you mean '.*depthwise'"):
        wrapped(small(), 3, SIZE, QuantizationConfig(residual_weight_bits={"conv": 4, "deepwise": 8}))


# Layer groups --------------------------------------------------------------------------------------------------------


def grouped(groups: Any) -> ResQModel:
    return ResQModel(SmallNet().eval(), torch.rand(1, 3, *SIZE), QuantizationConfig(groups=groups))


def test_groups_follow_the_top_level_modules() -> None:
    model = grouped("auto")
    assert model.groups == ("stem", "block", "squeeze", "up", "head", "score")
    assert model.group_of_site.tolist() == [0, 1, 1, 2, 2, 3, 4, 5]


def test_groups_of_a_flat_network_follow_the_resolution() -> None:
    layers: list[nn.Module] = [nn.Conv2d(3, 4, 3, 1, 1)]
    for stride in (1, 2, 1, 2, 2, 1, 2, 1, 1):
        layers.append(nn.Conv2d(4, 4, 3, stride, 1))
    model = ResQModel(nn.Sequential(*layers), torch.rand(1, 3, 32, 32))
    assert model.groups == ("group0", "group1", "group2", "group3", "group4")
    assert model.group_of_site.tolist() == [0, 0, 1, 1, 2, 3, 3, 4, 4, 4]


def test_given_groups() -> None:
    model = grouped({"early": ["stem*", "block.*"], "late": ["squeeze.?", "up", "head", "score"]})
    assert model.groups == ("early", "late")
    assert model.group_of_site.tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
    turned = grouped({"late": ["squeeze.?", "up", "head", "score"], "early": ["stem*", "block.*"]})
    assert turned.groups == ("early", "late"), "as they run"
    assert turned.group_of_site.tolist() == model.group_of_site.tolist()
    one = grouped({"early": "stem*", "late": ["[!s]*", "squeeze*", "score"]})
    assert one.group_of_site.tolist() == [0, 1, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"a": ["stem*"]}, r"Layer 'block.0' matches 0 of the groups \['a'\]"),
        ({"a": ["*"], "b": ["head"]}, "Layer 'head' matches 2 of the groups"),
        ({"a": ["*"], "b": ["tail*"]}, r"groups \['b'\] match no layer. Layers are \['stem.0'"),
        ({"a": "stem"}, "Layer 'stem.0' matches 0"),
        ("stages", "'groups' must be auto or a mapping .* received 'stages'"),
    ],
)
def test_impossible_groups(groups: Any, message: str, unchecked_types: None) -> None:
    with pytest.raises(SettingsError, match=message):
        grouped(groups)


# Steps ---------------------------------------------------------------------------------------------------------------


def constant(model: ResQModel, clips: int = 2, level: int = 3) -> LevelField:
    return LevelField.constant(level, clips, len(model.groups))


def test_a_step_before_calibration() -> None:
    model = ResQModel(small(), torch.rand(1, 3, *SIZE))
    with pytest.raises(CalibrationError, match=r"call calibrate\(clips\) first"):
        model.step(torch.rand(2, 3, *SIZE), model.new_state(2), everywhere(2, True), constant(model))


def test_an_unknown_reference(model: ResQModel, unchecked_types: None) -> None:
    with pytest.raises(SettingsError, match="'keyframe' or 'previous', got 'next'"):
        model.new_state(2, "next")  # type: ignore[arg-type]


def test_the_first_step_must_refresh_every_clip(model: ResQModel) -> None:
    for refresh in ([False, False], [True, False]):
        with pytest.raises(PolicyError, match="refresh it first"):
            model.step(torch.rand(2, 3, *SIZE), model.new_state(2), torch.tensor(refresh), constant(model))


def levels(shape: tuple[int, ...], fill: int = 0) -> LevelField:
    return LevelField(torch.full(shape, fill))


def taus(shape: tuple[int, ...], fill: float = 1.0, kappa: tuple[float, ...] = (1, 2, 8)) -> ThresholdField:
    return ThresholdField(torch.full(shape, fill), kappa)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: levels((3, 2, 1, 1)), r"field of shape \(3, 2, 1, 1\)"),
        (lambda: levels((2, 3, 1, 1)), "2 clips, 2 layer groups or 2 layers, rows, columns"),
        (lambda: levels((2, 2, 1)), r"field of shape \(2, 2, 1\)"),
        (lambda: levels((2, 2, 0, 1)), r"field of shape \(2, 2, 0, 1\)"),
        (lambda: levels((2, 2, 1, 1), -1), "Levels must be 0 to 3, got -1 to -1"),
        (lambda: levels((2, 2, 1, 1), 4), "Levels must be 0 to 3, got 4 to 4"),
        (lambda: LevelField(torch.ones(2, 2, 1, 1)), "Levels must be whole numbers.* got torch.float32"),
        (lambda: LevelField(torch.ones(2, 2, 1, 1, dtype=torch.bool)), "Levels must be whole numbers.* got torch.bool"),
        (lambda: taus((1, 2, 1, 1)), r"field of shape \(1, 2, 1, 1\)"),
        (lambda: taus((2, 2, 1, 1), float("nan")), "Thresholds must be 0 or more"),
        (lambda: taus((2, 2, 1, 1), -0.5), "Thresholds must be 0 or more"),
        (lambda: taus((2, 2, 1, 1), kappa=(1, 2)), "one kappa for each level above the first"),
    ],
)
def test_decisions_that_do_not_fit(
    model: ResQModel, make: Callable[[], Field], message: str, unchecked_types: None
) -> None:
    with pytest.raises(PolicyError, match=message):
        model.step(torch.rand(2, 3, *SIZE), model.new_state(2), everywhere(2, True), make())


def test_a_refresh_that_does_not_fit(model: ResQModel, unchecked_types: None) -> None:
    for refresh in (everywhere(3, True), torch.ones(2, 1, dtype=torch.bool), torch.ones(2, dtype=torch.int64)):
        with pytest.raises(PolicyError, match=r"one boolean for each clip, .* refresh of shape"):
            model.step(torch.rand(2, 3, *SIZE), model.new_state(2), refresh, constant(model))


def test_a_state_of_another_batch(model: ResQModel) -> None:
    with pytest.raises(PolicyError, match="state holds 3 clips, the batch 2"):
        model.step(torch.rand(2, 3, *SIZE), model.new_state(3), everywhere(2, True), constant(model))


@pytest.mark.parametrize(
    "frames",
    [
        torch.rand(2, 3, 8, 12),
        torch.rand(2, 1, *SIZE),
        torch.rand(3, *SIZE),
        torch.zeros(2, 3, *SIZE, dtype=torch.uint8),
    ],
    ids=["size", "channels", "one", "bytes"],
)
def test_frames_that_do_not_fit(model: ResQModel, frames: Tensor, unchecked_types: None) -> None:
    with pytest.raises(VideoError, match=r"Frames must be float of shape \(clips, 3, 8, 10\).*to_float"):
        model.step(frames, model.new_state(len(frames)), everywhere(len(frames), True), constant(model))


def test_frames_whose_sum_is_too_large_for_their_type_are_finite() -> None:
    size = (300, 500)  # in half precision, whose largest number is 65,504
    network = nn.Sequential(nn.Identity(), nn.Conv2d(1, 1, 1, 50)).half()
    model = ResQModel(network, torch.zeros(1, 1, *size, dtype=torch.float16)).calibrate(byte_clips(1, 2, 1, size))
    frames = torch.full((1, 1, *size), 0.5, dtype=torch.float16)
    assert not torch.isfinite(frames.sum())
    output, _ = model.step(frames, model.new_state(1), everywhere(1, True), LevelField.constant(0, 1, 1))
    assert bool(torch.isfinite(output).all())


@pytest.mark.parametrize("compiled", [False, True])
def test_decisions_of_other_types_are_those_of_their_values(
    model: ResQModel, compiled: bool, unchecked_types: None
) -> None:
    model = model.priced("product")
    model = model.compile() if compiled else model
    frames = torch.stack([video(2, 3, SIZE, s) for s in range(2)], 1)
    fields: list[tuple[Any, ...]] = [
        (
            levels((2, 2, 1, 1), 2),
            *(LevelField(levels((2, 2, 1, 1), 2).levels.to(t)) for t in (torch.int32, torch.uint8)),
        ),
        (
            taus((2, 2, 1, 1), 0.5),
            *(ThresholdField(taus((2, 2, 1, 1), 0.5).thresholds.to(t)) for t in (torch.float64, torch.float16)),
        ),
    ]
    for own in fields:
        found = []
        for field in own:
            state = model.new_state(2)
            model.step(frames[0], state, everywhere(2, True), field)
            output, cost = model.step(frames[1], state, everywhere(2, False), field)
            found.append([output, cost.bops])
        for other in found[1:]:
            assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_frames_that_are_not_finite_leave_the_state_as_it_was(model: ResQModel, bad: float) -> None:
    frames = torch.stack([video(2, 3, SIZE, s) for s in range(2)], 1)
    state = model.new_state(2)
    model.step(frames[0], state, everywhere(2, True), constant(model))
    broken = frames[1].clone()
    broken[1, 2, 3, 4] = bad
    with pytest.raises(VideoError, match=r"frames of clips \[1\] hold NaN or infinity"):
        model.step(broken, state, everywhere(2, False), constant(model))
    out, _ = model.step(frames[1], state, everywhere(2, False), constant(model))
    untouched = model.new_state(2)
    model.step(frames[0], untouched, everywhere(2, True), constant(model))
    expected, _ = model.step(frames[1], untouched, everywhere(2, False), constant(model))
    assert torch.equal(out, expected)
    assert state.age.tolist() == [1, 1]


def test_ages_count_from_the_keyframe(model: ResQModel) -> None:
    state = model.new_state(2)
    assert state.age.tolist() == [-1, -1]
    ages = []
    for refresh in ([True, True], [False, False], [True, False], [False, False]):
        model.step(torch.rand(2, 3, *SIZE), state, torch.tensor(refresh), constant(model))
        ages.append(state.age.tolist())
    assert ages == [[0, 0], [1, 1], [0, 2], [1, 3]]


# What a model says of itself -----------------------------------------------------------------------------------------


def test_state_bytes_by_hand() -> None:
    model = ResQModel(SmallNet().eval(), torch.rand(1, 3, 8, 12))
    # Inputs and outputs: stem, depthwise, pointwise, two squeezed layers, transposed, head, score.
    ins = [3 * 96, 8 * 24, 8 * 24, 8, 4, 8 * 24, 6 * 96, 8]
    outs = [8 * 24, 8 * 24, 8 * 24, 4, 8, 6 * 96, 2 * 96, 3]
    assert model.state_bytes("keyframe") == sum(ins) + 4 * sum(outs)
    assert model.state_bytes("previous") == 2 * sum(ins) + 4 * sum(outs)
    wide = ResQModel(SmallNet().eval(), torch.rand(1, 3, 8, 12), QuantizationConfig(key_activation_bits=9))
    assert wide.state_bytes("keyframe") == 2 * sum(ins) + 4 * sum(outs)


def test_exact_sites_by_hand() -> None:
    ones = nn.Sequential(*(nn.Conv2d(c, 1, 1, bias=False) for c in (517, 1)), nn.Conv2d(1, 1, 1))
    for layer in ones:
        assert isinstance(layer, nn.Conv2d)
        layer.weight.data.fill_(1.0)  # code 127 in 8 bits
    bound = [127 * 255 * 517, 127 * 255, 127 * 255]
    assert bound[0] < 2**24 < 127 * 255 * 519
    config = QuantizationConfig(range_estimator="min_max")
    model = ResQModel(ones, torch.rand(1, 517, 4, 4), config)
    assert model.exact_sites == [True, True, True]
    model.set_residual_weight_bits(8)  # residual codes are smaller than those of keyframes
    assert model.exact_sites == [127 * 127 * 517 < 2**24, True, True] == [True, True, True]
    wider = nn.Conv2d(519, 1, 1)
    wider.weight.data.fill_(-1.0)
    assert ResQModel(wider, torch.rand(1, 519, 4, 4), config).exact_sites == [False]
    assert all(ResQModel(SmallNet().eval(), torch.rand(1, 3, 8, 12)).exact_sites)


def test_frames_as_float_are_a_copy(unchecked_types: None) -> None:
    frames = torch.tensor([0, 51, 255], dtype=torch.uint8)
    assert torch.allclose(to_float(frames), torch.tensor([0, 0.2, 1.0]))
    already = torch.tensor([0.0, 51.0, 255.0])
    assert torch.allclose(to_float(already), torch.tensor([0, 0.2, 1.0]))
    assert already.tolist() == [0, 51, 255]


def test_an_operators_weight_as_rows_and_back() -> None:
    for layer in (nn.ConvTranspose2d(4, 6, (3, 2), groups=2), nn.Conv2d(4, 6, (3, 2), groups=2), nn.Linear(4, 6)):
        size = (5, 4) if isinstance(layer, nn.Linear) else (5, 6)
        operator = ResQModel(layer, torch.rand(1, 4, *size)).operators[0]
        rows = operator.weight_rows()
        assert rows.shape[0] == operator.out_channels == 6
        assert torch.equal(operator.rows_to_weight(rows), operator.weight)
        if isinstance(layer, nn.ConvTranspose2d):  # output channel 4 is channel 1 of the second group
            assert torch.equal(rows[4], layer.weight[2:, 1].flatten())
