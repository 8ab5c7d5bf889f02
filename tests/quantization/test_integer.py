"""Fake quantization equals integer arithmetic bit for bit."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from resq_rl.quantization import Field, LevelField, QuantizationConfig, Reference, ResQModel, ThresholdField
from tests.quantization.networks import CASES, Case, everywhere, model_of, video, wrapped
from tests.quantization.reference import Oracle, Setting

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch's own, once


def check(model: ResQModel, oracle: Oracle, frames: Tensor, decisions: list[Field], reference: Reference) -> None:
    """Step (t, b, c, h, w) frames, the first as a keyframe, and compare output and state with the oracle's bits."""
    clips = frames.shape[1]
    state = model.new_state(clips, reference)
    for t, (frame, decision) in enumerate(zip(frames, decisions, strict=True)):
        out, _ = model.step(frame, state, everywhere(clips, t == 0), decision)
        x = frame.numpy()
        expected = oracle.keyframe(x) if t == 0 else oracle.residual(x, decision)
        assert oracle.largest < 2**24  # beyond, float32 sums may round and the comparison means nothing
        np.testing.assert_array_equal(out.numpy(), expected, err_msg=f"output of frame {t}")
        np.testing.assert_array_equal(state.inputs[0].numpy(), oracle.x_ref, err_msg=f"input reference, frame {t}")
        np.testing.assert_array_equal(state.outputs[0].numpy(), oracle.y_ref, err_msg=f"output reference, frame {t}")


def clips_of(case: Case, count: int, frames: int = 4) -> Tensor:
    return torch.stack([video(frames, case.channels[0], case.size, seed) for seed in range(count)], 1)


def random_levels(clips: int, grid: tuple[int, int], seed: int, frames: int = 4) -> list[Field]:
    generator = torch.Generator().manual_seed(seed)
    return [LevelField(torch.randint(0, 4, (clips, 1, *grid), generator=generator)) for _ in range(frames)]


def random_thresholds(clips: int, grid: tuple[int, int], seed: int, frames: int = 4) -> list[Field]:
    generator = torch.Generator().manual_seed(seed)
    fields: list[Field] = []
    for _ in range(frames):
        tau = torch.rand(clips, 1, *grid, generator=generator).mul_(8).sub_(5).exp2_()
        tau[torch.rand(tau.shape, generator=generator) < 0.1] = torch.inf
        tau[torch.rand(tau.shape, generator=generator) < 0.1] = 0.0
        fields.append(ThresholdField(tau))
    return fields


@pytest.mark.parametrize("reference", ["keyframe", "previous"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_mixed_levels_per_pixel(case: Case, reference: Reference) -> None:
    model = model_of(case)
    oracle = Oracle(model, 0, case.setting, reference)
    check(model, oracle, clips_of(case, 2), random_levels(2, case.size, 1), reference)
    assert len(np.unique(oracle.levels)) == 4


@pytest.mark.parametrize("reference", ["keyframe", "previous"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_thresholds_per_pixel(case: Case, reference: Reference) -> None:
    model = model_of(case)
    oracle = Oracle(model, 0, case.setting, reference)
    check(model, oracle, clips_of(case, 2), random_thresholds(2, case.size, 2), reference)
    assert len(np.unique(oracle.levels)) >= 3


@pytest.mark.parametrize("reference", ["keyframe", "previous"])
@pytest.mark.parametrize("level", range(4))
@pytest.mark.parametrize("weight_bits", [2, 4, 8])
def test_every_pair_of_widths(weight_bits: int, level: int, reference: Reference) -> None:
    case = next(c for c in CASES if c.name == "stride")
    config = QuantizationConfig(residual_weight_bits=weight_bits)
    model = model_of(case, config)
    oracle = Oracle(model, 0, case.setting, reference)
    check(model, oracle, clips_of(case, 2), [LevelField.constant(level, 2, 1)] * 4, reference)
    limit = 2 ** (weight_bits - 1) - 1
    assert np.abs(oracle.residual_codes).max() == limit


@pytest.mark.parametrize("estimator", ["least_squares", "min_max", "percentile"])
def test_every_range_estimator(estimator: str) -> None:
    case = next(c for c in CASES if c.name == "groups")
    config = QuantizationConfig(range_estimator=estimator)  # type: ignore[arg-type]
    model = model_of(case, config)
    oracle = Oracle(model, 0, case.setting, "previous")
    check(model, oracle, clips_of(case, 2), random_levels(2, (3, 2), 3), "previous")


@pytest.mark.parametrize("key_bits", [(2, 2), (4, 4), (4, 8)])
def test_other_keyframe_widths(key_bits: tuple[int, int]) -> None:
    case = next(c for c in CASES if c.name == "plain")
    config = QuantizationConfig(key_weight_bits=key_bits[0], key_activation_bits=key_bits[1])
    model = model_of(case, config)
    oracle = Oracle(model, 0, case.setting, "keyframe")
    check(model, oracle, clips_of(case, 2), random_levels(2, case.size, 4), "keyframe")


@pytest.mark.parametrize("reference", ["keyframe", "previous"])
@pytest.mark.parametrize(
    ("levels", "kappa"),
    [
        ((0, 4), (1.0,)),
        ((2, 4, 8), (1.0, 2.0)),
        ((0, 2, 9), (0.5, 3.0)),
        ((0, 16), (2.0,)),
        ((0, 2, 4, 8), (1.0, 1.0, 1.0)),
    ],
    ids=str,
)
def test_other_levels_and_kappas(levels: tuple[int, ...], kappa: tuple[float, ...], reference: Reference) -> None:
    case = next(c for c in CASES if c.name == "plain")
    model = model_of(case, QuantizationConfig(levels=levels))
    generator = torch.Generator().manual_seed(8)
    bits: list[Field] = [
        LevelField(torch.randint(0, len(levels), (2, 1, *case.size), generator=generator)) for _ in range(4)
    ]
    taus: list[Field] = [
        ThresholdField(f.thresholds, kappa) for f in random_thresholds(2, case.size, 9) if isinstance(f, ThresholdField)
    ]
    for decisions in (bits, taus):
        oracle = Oracle(model, 0, case.setting, reference)
        check(model, oracle, clips_of(case, 2), decisions, reference)
    skip_gate = len(set(kappa)) < len(kappa)  # no magnitude lies between equal thresholds
    assert np.unique(oracle.levels).tolist() == ([0, 3] if skip_gate else list(range(len(levels))))


class Tokens(nn.Module):
    """A linear layer on (b, c, h, w) frames: over the flattened frame, or over the last axis."""

    def __init__(self, features: int, flat: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(features, 5)
        self.flat = flat

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x.flatten(1) if self.flat else x)
        return y


@pytest.mark.parametrize("reference", ["keyframe", "previous"])
@pytest.mark.parametrize("field", ["levels", "thresholds"])
@pytest.mark.parametrize("flat", [True, False])
def test_linear(flat: bool, field: str, reference: Reference) -> None:
    model = wrapped(Tokens(3 * 4 * 6 if flat else 6, flat), 3, (4, 6))
    oracle = Oracle(model, 0, Setting("linear"), reference)
    frames = torch.stack([video(4, 3, (4, 6), seed) for seed in range(3)], 1)
    # A field finer than the layer: its finest cell rules, so levels stay mixed over clips and frames only.
    made = random_levels(3, (1, 1), 5) if field == "levels" else random_thresholds(3, (1, 2), 6)
    if flat:
        state = model.new_state(3, reference)
        for t, (frame, decision) in enumerate(zip(frames, made, strict=True)):
            out, _ = model.step(frame, state, everywhere(3, t == 0), decision)
            x = frame.flatten(1).numpy()
            expected = oracle.keyframe(x) if t == 0 else oracle.residual(x, decision)
            np.testing.assert_array_equal(out.numpy(), expected)
    else:
        check(model, oracle, frames, made, reference)


@pytest.mark.parametrize("reference", ["keyframe", "previous"])
def test_a_chain_of_operators(reference: Reference) -> None:
    settings = [Setting("conv2d", (3, 3), (2, 2), (1, 1, 1, 1)), Setting("conv2d", (3, 3), pads=(1, 1, 1, 1), groups=6)]
    settings.append(Setting("conv_transpose2d", (2, 2), (2, 2)))
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3, 2, 1),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 6, 3, 1, 1, groups=6),
        nn.ReLU(inplace=True),
        nn.ConvTranspose2d(6, 2, 2, 2),
    )
    model = wrapped(network, 3, (8, 10), QuantizationConfig(groups={"all": ["*"]}))
    oracles = [Oracle(model, i, s, reference) for i, s in enumerate(settings)]
    frames = torch.stack([video(6, 3, (8, 10), seed) for seed in range(2)], 1)
    state = model.new_state(2, reference)
    for t, (frame, decision) in enumerate(zip(frames, random_thresholds(2, (3, 4), 7, 6), strict=True)):
        refresh = t in (0, 4)
        out, _ = model.step(frame, state, everywhere(2, refresh), decision)
        x = frame.numpy()
        for i, oracle in enumerate(oracles):
            x = oracle.keyframe(x) if refresh else oracle.residual(x, decision)
            x = np.maximum(x, 0) if i < 2 else x
        np.testing.assert_array_equal(out.numpy(), x, err_msg=f"frame {t}")


def test_realistic_sizes_accumulate_exactly() -> None:
    # Larger layers reach other convolution kernels of torch; its int64 product over unfolded patches is the truth.
    layer = nn.Conv2d(48, 32, 3, padding=1)
    model = wrapped(layer, 48, (24, 40))
    codes, _ = model.integer_weights(model.operators[0], residual=False)
    for clips in (1, 2, 17):
        generator = torch.Generator().manual_seed(clips)
        x = torch.randint(-128, 128, (clips, 48, 24, 40), generator=generator)
        got = model.operators[0].geometry.apply(x.float(), codes)
        patches = nn.functional.unfold(x.double(), 3, padding=1).long()
        truth = (codes.long().flatten(1) @ patches).unflatten(2, (24, 40))
        assert int(truth.abs().max()) < 2**24
        assert torch.equal(got.long(), truth)
        assert torch.equal(got, got.round())
