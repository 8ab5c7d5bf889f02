"""Rounding the weights of a channel together: never worse than each alone, and by what the layer really multiplies."""

from functools import cache
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from resq_rl.quantization import LevelField, QuantizationConfig, ResidualOperator, ResQModel, to_float
from resq_rl.quantization.graph.operators import Geometry, Switch
from resq_rl.quantization.quantizers.ranges import symmetric_step
from resq_rl.quantization.quantizers.rounding import (
    POSITIONS_PER_FRAME,
    IntegerWeight,
    _nearest,
    _sweep,
    integer_weight,
    positions_of,
    second_moment,
)
from resq_rl.quantization.running import calibration
from resq_rl.quantization.specification.config import Part, RangeEstimator, WeightRounding
from tests.quantization.networks import CASES, Case, SmallNet, everywhere, perturb_statistics, smooth_clips, wrapped
from tests.quantization.strategies import seeds

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch's own, once

SIZE = (12, 16)
ESTIMATOR: RangeEstimator = "least_squares"


def operator_of(weight: Tensor, groups: int = 1, *, transposed: bool = False) -> ResidualOperator:
    """An operator with a given weight: linear for two dimensions, else a convolution."""
    if weight.dim() == 2:
        return ResidualOperator("layer", Geometry("linear"), weight, None, Switch())
    kind = Geometry("conv_transpose2d" if transposed else "conv2d", (weight.shape[2], weight.shape[3]), groups=groups)
    return ResidualOperator("layer", kind, weight, None, Switch())


def rows_of(operator: ResidualOperator, weight: Tensor) -> Tensor:
    """The weight by output channel: (group, channel, inputs)."""
    groups = operator.geometry.groups
    if operator.geometry.operator != "conv_transpose2d":
        rows: Tensor = weight.flatten(1).unflatten(0, (groups, -1))
        return rows
    return torch.stack([part.transpose(0, 1).flatten(1) for part in weight.chunk(groups)])


def correlated(generator: torch.Generator, groups: int, inputs: int, patches: int = 60) -> Tensor:
    """Second moments of inputs that go together, by group."""
    mixed = torch.randn(groups, patches, inputs, generator=generator) @ torch.randn(
        groups, inputs, inputs, generator=generator
    )
    moment: Tensor = second_moment(mixed)
    return moment


def damped(moment: Tensor) -> Tensor:
    """What the descent minimizes: the moment plus a hundredth of its mean diagonal, in double precision."""
    moment = moment.double()
    mean = moment.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    return moment + 0.01 * mean * torch.eye(moment.shape[1])


def quadratic(difference: Tensor, moment: Tensor) -> Tensor:
    """d H d^T of each row: (group, channel)."""
    d = difference.double()
    error: Tensor = torch.einsum("gon,gnm,gom->go", d, moment.double(), d)
    return error


def errors(operator: ResidualOperator, rounded: IntegerWeight, moment: Tensor) -> Tensor:
    groups = operator.geometry.groups
    found = rows_of(operator, rounded.codes) * rounded.scale.flatten().unflatten(0, (groups, -1))[..., None]
    return quadratic(found - rows_of(operator, operator.weight), moment)


def same(a: IntegerWeight, b: IntegerWeight) -> bool:
    return torch.equal(a.codes, b.codes) and torch.equal(a.scale, b.scale)


# The quadratic form --------------------------------------------------------------------------------------------------

SHAPES: tuple[tuple[tuple[int, ...], int, bool], ...] = (
    ((5, 7), 1, False),
    ((4, 3, 3, 3), 1, False),
    ((6, 2, 3, 2), 3, False),
    ((4, 1, 3, 3), 4, False),
    ((4, 3, 2, 2), 2, True),
)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@given(seeds, st.sampled_from([2, 3, 4, 7]), st.booleans())
def test_second_order_never_errs_more_than_nearest(
    shape: tuple[tuple[int, ...], int, bool], seed: int, bits: int, dead: bool
) -> None:
    size, groups, transposed = shape
    generator = torch.Generator().manual_seed(seed)
    operator = operator_of(torch.randn(size, generator=generator), groups, transposed=transposed)
    moment = correlated(generator, groups, rows_of(operator, operator.weight).shape[2])
    if dead:  # an input that is always 0, and a channel without weights
        moment[:, 0] = moment[:, :, 0] = 0
        operator.weight[0] = 0
    nearest = errors(operator, integer_weight(operator, bits, ESTIMATOR), damped(moment))
    rounded = integer_weight(operator, bits, ESTIMATOR, moment)
    together = errors(operator, rounded, damped(moment))
    assert bool(rounded.codes.isfinite().all())
    assert bool(rounded.scale.isfinite().all())
    assert bool((rounded.scale > 0).all())
    assert torch.equal(rounded.codes, rounded.codes.round())
    assert float(rounded.codes.abs().max()) <= 2 ** (bits - 1) - 1
    assert bool((together <= nearest * (1 + 1e-4) + 1e-9).all())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_errors_of_inputs_that_go_together_cancel(bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    operator = operator_of(torch.randn(64, 20, generator=generator))
    moment = correlated(generator, 1, 20)
    nearest, together = (
        float(errors(operator, integer_weight(operator, bits, ESTIMATOR, m), moment).sum()) for m in (None, moment)
    )
    assert together < 0.5 * nearest


@pytest.mark.parametrize(("inputs", "bits"), [(3, 2), (4, 2), (3, 3), (4, 3)])
def test_tiny_problems_against_all_codes(inputs: int, bits: int) -> None:
    limit = 2 ** (bits - 1) - 1
    every = torch.tensor(list(product(range(-limit, limit + 1), repeat=inputs)), dtype=torch.float32)
    generator = torch.Generator().manual_seed(inputs * bits)
    best, reached, started = [], [], []
    for _ in range(50):
        moment = correlated(generator, 1, inputs)
        weights = torch.randn(1, 8, inputs, generator=generator)
        step = weights.abs().amax(2, keepdim=True) / limit * 0.8
        codes = _nearest(weights, step, limit)
        started.append(quadratic(codes * step - weights, moment)[0])
        for _ in range(10):
            _sweep(codes, step, weights, moment, limit)
        reached.append(quadratic(codes * step - weights, moment)[0])
        errs = torch.stack(
            [quadratic(every[None] * step[0, o] - weights[:, [o]], moment)[0] for o in range(8)]
        )  # (channel, all codes)
        best.append(errs.amin(1))
        for o in range(8):  # no other value of any single code does better
            neighbours = (every != codes[0, o]).sum(1) <= 1
            assert float(reached[-1][o]) <= float(errs[o][neighbours].min()) * (1 + 1e-4) + 1e-5
    optimum, found, first = (torch.cat(part) for part in (best, reached, started))
    assert float((found <= optimum * (1 + 1e-4) + 1e-5).float().mean()) > (0.75 if bits == 2 else 0.55)
    assert float(found.sum() - optimum.sum()) < 0.3 * float(first.sum() - optimum.sum())


@pytest.mark.parametrize("inputs", [10, 64, 65, 200])
def test_every_sweep_lowers_the_error_however_many_inputs(inputs: int) -> None:
    generator = torch.Generator().manual_seed(inputs)
    moment = damped(correlated(generator, 1, inputs, patches=inputs // 2)).float()
    weights = torch.randn(1, 16, inputs, generator=generator)
    step = weights.abs().amax(2, keepdim=True) / 7
    codes = _nearest(weights, step, 7)
    plain = codes.double()[0]
    for _ in range(4):
        before = quadratic(codes * step - weights, moment)
        _sweep(codes, step, weights, moment, 7)
        after = quadratic(codes * step - weights, moment)
        assert bool((after <= before * (1 + 1e-4)).all())
        for i in range(inputs):  # the same, with the error's slope worked out anew for every input
            slope = ((plain * step[0] - weights[0]).double() @ moment[0].double())[:, i]
            plain[:, i] = (plain[:, i] - slope / (step[0, :, 0] * moment[0, i, i])).round().clamp(-7, 7)
        expected = quadratic((plain * step[0] - weights[0])[None], moment)
        assert float(after.sum()) == pytest.approx(float(expected.sum()), rel=0.02)


@pytest.mark.parametrize("bits", [2, 4])
def test_inputs_that_do_not_go_together_are_rounded_alone(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    limit = 2 ** (bits - 1) - 1
    weights = torch.randn(2, 6, 70, generator=generator)
    step = weights.abs().amax(2, keepdim=True) / limit * 0.7
    power = torch.rand(2, 70, generator=generator) + 0.1
    for diagonal in (torch.ones(2, 70), power):
        codes = torch.zeros_like(weights)
        _sweep(codes, step, weights, torch.diag_embed(diagonal), limit)
        assert torch.equal(codes, (weights / step).round().clamp(-limit, limit))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_moment_of_zeros_counts_all_inputs_alike(bits: int) -> None:
    # Codes and step may still suit each other better than those of rounding to nearest, in the weights themselves.
    generator = torch.Generator().manual_seed(bits)
    operator = operator_of(torch.randn(6, 4, 3, 3, generator=generator), 2)
    alike = torch.eye(36).expand(2, 36, 36).contiguous()
    zeros = integer_weight(operator, bits, ESTIMATOR, torch.zeros(2, 36, 36))
    assert same(zeros, integer_weight(operator, bits, ESTIMATOR, alike))
    nearest = integer_weight(operator, bits, ESTIMATOR)
    assert bool((errors(operator, zeros, alike) <= errors(operator, nearest, alike) * (1 + 1e-6)).all())


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_rounding_to_nearest(bits: int) -> None:
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(bits))
    operator = operator_of(weight)
    step = symmetric_step(weight, bits, ESTIMATOR)[:, None]
    limit = 2 ** (bits - 1) - 1
    found = integer_weight(operator, bits, ESTIMATOR)
    assert torch.equal(found.codes, (weight / step).round().clamp(-limit, limit))
    assert torch.equal(found.scale, step[:, 0])
    if bits >= 8:
        moment = correlated(torch.Generator().manual_seed(0), 1, 7)
        assert same(found, integer_weight(operator, bits, ESTIMATOR, moment))


# What calibration weighs ---------------------------------------------------------------------------------------------


@pytest.fixture
def all_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every output position of a frame once, so that moments are known exactly."""

    def every(operator: ResidualOperator, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        size = shape[1:] if operator.channel_axis == 1 else shape[:-1]
        return torch.arange(torch.Size(size).numel())

    monkeypatch.setattr(calibration, "positions_of", every)


class Twice(nn.Module):
    """Uses one layer two times."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(torch.tanh(self.layer(x)))
        return y


def inputs_of(network: nn.Module, layer: nn.Module, frames: Tensor) -> list[Tensor]:
    """What every call of a layer gets: (t, ...) by call."""
    met: list[Tensor] = []
    handle = layer.register_forward_hook(lambda module, args, output: met.append(args[0].detach()))
    with torch.no_grad():
        network(to_float(frames))
    handle.remove()
    return met


def bare(layer: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    """What the layer, with another weight and without its bias, makes of x."""
    changed = {"weight": weight}
    if isinstance(layer.bias, Tensor):
        changed["bias"] = torch.zeros_like(layer.bias)
    output: Tensor = torch.func.functional_call(layer, changed, (x,))
    return output.detach()


def assert_weighed(model: ResQModel, network: nn.Module, layer: nn.Module, clips: list[Tensor], interval: int) -> None:
    """d H d^T is the squared output that weights d give, on inputs (keyframe) and their changes (residual)."""
    operator = model.operators[0]
    difference = torch.randn(operator.weight.shape, generator=torch.Generator().manual_seed(1))
    axis = operator.channel_axis
    parts: tuple[Part, ...] = ("keyframe", "residual")
    expected = {part: torch.zeros(operator.out_channels) for part in parts}
    for clip in clips:
        for x in inputs_of(network, layer, clip):
            key = x[[t - t % interval for t in range(len(x))]]
            for part, seen in zip(parts, (x, x - key), strict=True):
                expected[part] += bare(layer, difference, seen).movedim(axis, -1).flatten(0, -2).square().sum(0)
    moments = model.weights.moments
    assert moments is not None
    for part, wanted in expected.items():
        found = quadratic(rows_of(operator, difference), moments[operator, part]).flatten()
        torch.testing.assert_close(found.float(), wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_moments_weigh_what_the_layer_multiplies(case: Case, all_positions: None) -> None:
    layer = case.make()
    clips = smooth_clips(2, 5, case.channels[0], case.size)
    config = QuantizationConfig(key_weight_bits=4)
    model = ResQModel(layer, torch.rand(1, case.channels[0], *case.size), config).calibrate(clips, interval=3)
    assert_weighed(model, layer, layer, clips, 3)


def test_an_operator_used_twice_is_weighed_at_both_calls(all_positions: None) -> None:
    network = Twice()
    clips = smooth_clips(2, 5, 3, SIZE)
    config = QuantizationConfig(key_weight_bits=4)
    model = ResQModel(network, torch.rand(1, 3, *SIZE), config).calibrate(clips, interval=3)
    assert len(model.sites) == 2
    assert_weighed(model, network, network.layer, clips, 3)


@pytest.mark.parametrize("features", [(6,), (5, 6)], ids=str)
def test_moments_of_a_linear_layer(features: tuple[int, ...], all_positions: None) -> None:
    network = nn.Sequential(nn.Flatten(2 - len(features)) if len(features) == 1 else nn.Identity(), nn.Linear(6, 4))
    clips = smooth_clips(2, 5, 1, features if len(features) == 2 else (2, 3))
    config = QuantizationConfig(key_weight_bits=4)
    model = ResQModel(network, to_float(clips[0][:1]), config).calibrate(clips, interval=3)
    assert_weighed(model, network, network[1], clips, 3)


@given(st.sampled_from(["conv", "flat", "tokens"]), seeds)
def test_positions_lie_in_the_output(kind: str, seed: int) -> None:
    operator = operator_of(torch.zeros(4, 3, 1, 1) if kind == "conv" else torch.zeros(4, 3))
    shape, count = {"conv": ((4, 5, 6), 30), "flat": ((4,), 1), "tokens": ((7, 4), 7)}[kind]
    positions = positions_of(operator, shape, torch.Generator().manual_seed(seed))
    assert positions.shape == (POSITIONS_PER_FRAME,)
    assert 0 <= int(positions.min()) <= int(positions.max()) < count


# Models --------------------------------------------------------------------------------------------------------------


def weights(model: ResQModel, *, residual: bool = True) -> list[IntegerWeight]:
    return [IntegerWeight(*model.integer_weights(operator, residual=residual)) for operator in model.operators]


def alike(a: list[IntegerWeight], b: list[IntegerWeight]) -> list[bool]:
    return [same(x, y) for x, y in zip(a, b, strict=True)]


def small(config: QuantizationConfig, seed: int = 0) -> ResQModel:
    """An uncalibrated model; the same network each time."""
    torch.manual_seed(seed)
    return ResQModel(perturb_statistics(SmallNet()), torch.rand(1, 3, *SIZE), config)


@cache
def fitted(**settings: object) -> ResQModel:
    """A calibrated model that tests share and do not change."""
    return small(QuantizationConfig(**settings)).calibrate(smooth_clips(2, 5, 3, SIZE))  # type: ignore[arg-type]


def output_error(model: ResQModel, clips: list[Tensor]) -> float:
    """Squared error of residual frames at the finest level, where it is the weights that err."""
    frames = to_float(torch.stack(clips, 1))
    state = model.new_state(len(clips))
    finest = LevelField.constant(3, len(clips), len(model.groups))
    total = 0.0
    for t, frame in enumerate(frames):
        out, _ = model.step(frame, state, everywhere(len(clips), t == 0), finest)
        wanted = model.float_forward(frame)
        pairs = [(out, wanted)] if isinstance(out, Tensor) else list(zip(out, wanted, strict=True))
        total += sum(float((a - b).square().sum()) for a, b in pairs) if t else 0.0
    return total


ROUNDINGS: tuple[WeightRounding, ...] = ("nearest", "second_order")


@pytest.mark.parametrize("case", CASES[::2], ids=lambda c: c.name)
def test_second_order_brings_a_layers_output_nearer_to_float(case: Case, all_positions: None) -> None:
    layer = case.make()
    clips = smooth_clips(4, 8, case.channels[0], case.size)
    nearest, together = (
        output_error(
            ResQModel(
                layer, to_float(clips[0][:1]), QuantizationConfig(weight_rounding=rounding, residual_weight_bits=3)
            ).calibrate(clips),
            clips,
        )
        for rounding in ROUNDINGS
    )
    assert together < nearest


def test_second_order_brings_a_networks_output_nearer_to_float() -> None:
    own = smooth_clips(4, 6, 3, SIZE)
    clips = {"own": own, "others": smooth_clips(4, 6, 3, SIZE, 900)}
    ratios: dict[tuple[int, str], list[float]] = {(bits, name): [] for bits in (2, 4) for name in clips}
    for seed in range(3):
        configs = [QuantizationConfig(weight_rounding=r, levels=(0, 2, 4, 12)) for r in ROUNDINGS]  # only weights err
        models = [small(config, seed).calibrate(own) for config in configs]
        for bits in (2, 4):
            for model in models:
                model.set_residual_weight_bits(bits)
            for name in clips:
                nearest, together = (output_error(model, clips[name]) for model in models)
                ratios[bits, name].append(together / nearest)
    for (bits, _), shares in ratios.items():  # layers are rounded one by one, so now and then a whole network loses
        assert sum(shares) / len(shares) < {2: 0.7, 4: 0.85}[bits]


def test_weights_are_rounded_to_nearest_until_calibrated_or_if_so_set() -> None:
    plain = weights(small(QuantizationConfig(weight_rounding="nearest")))
    assert all(alike(weights(small(QuantizationConfig())), plain))
    assert all(alike(weights(fitted(weight_rounding="nearest")), plain))
    assert not any(alike(weights(fitted()), plain))


def test_too_wide_layers_are_rounded_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "WIDEST", 8)  # of the layers, only the stem has more inputs, and one depthwise
    model = small(QuantizationConfig()).calibrate(smooth_clips(2, 5, 3, SIZE))
    plain = weights(fitted(weight_rounding="nearest"))
    wide = [operator.weight_rows().shape[1] > 8 for operator in model.operators]
    assert 0 < sum(wide) < len(wide)
    assert alike(weights(model), plain) == wide


@pytest.mark.parametrize("bits", [4, 8])
def test_residual_weights_as_wide_as_keyframe_weights_are_the_same(bits: int) -> None:
    model = fitted(key_weight_bits=bits, residual_weight_bits=bits)
    assert all(alike(weights(model), weights(model, residual=False)))
    nearest = fitted(key_weight_bits=bits, residual_weight_bits=bits, weight_rounding="nearest")
    assert any(alike(weights(model), weights(nearest))) == (bits == 8)


def test_narrower_residual_weights_are_fitted_to_changes_not_inputs() -> None:
    model = fitted(key_weight_bits=6, residual_weight_bits=4)
    assert not any(alike(weights(model), weights(fitted(key_weight_bits=4, residual_weight_bits=4))))


def test_calibrating_again_starts_afresh() -> None:
    clips, others = smooth_clips(2, 5, 3, SIZE), smooth_clips(2, 5, 3, SIZE, 900)
    model = small(QuantizationConfig(key_weight_bits=5)).calibrate(clips)
    first = weights(model), weights(model, residual=False)
    assert not all(alike(weights(model.calibrate(others)), first[0]))
    for _ in range(2):  # after other clips, and after the same
        model.calibrate(clips)
        assert all(alike(weights(model), first[0]))
        assert all(alike(weights(model, residual=False), first[1]))


def test_weight_bits_set_later_are_fitted_to_the_same_clips() -> None:
    model = small(QuantizationConfig()).calibrate(smooth_clips(2, 5, 3, SIZE))
    four = weights(model)
    model.set_residual_weight_bits(3)
    assert all(alike(weights(model), weights(fitted(residual_weight_bits=3))))
    model.set_residual_weight_bits({"pointwise": 8})
    kinds = [operator.layer_kind for operator in model.operators]
    key = weights(model, residual=False)
    for found, kind, at_key, at_four in zip(weights(model), kinds, key, four, strict=True):
        assert same(found, at_key if kind == "pointwise" else at_four)


def test_a_dead_layer_does_no_harm() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 3))
    layer = network[0]
    assert isinstance(layer, nn.Conv2d)
    assert layer.bias is not None
    layer.weight.data.zero_()
    layer.bias.data.fill_(-1.0)
    model = wrapped(network, 3, SIZE)
    for rounded in weights(model):
        assert bool(rounded.codes.isfinite().all())
        assert bool((rounded.scale > 0).all())
    state = model.new_state(1)
    for t, frame in enumerate(to_float(smooth_clips(1, 3, 3, SIZE)[0])):
        out, _ = model.step(frame[None], state, everywhere(1, t == 0), LevelField.constant(3, 1, len(model.groups)))
        torch.testing.assert_close(out, model.float_forward(frame[None]))
