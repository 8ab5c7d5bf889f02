"""Products of activations: exact integers, hand counts, and the same whoever else is in the batch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resq_rl.errors import CalibrationError, NetworkError
from resq_rl.quantization import LevelField, QuantizationConfig, ThresholdField, load_model, save_model
from resq_rl.quantization.graph.products import FACTORS
from resq_rl.quantization.running.products import exact_type, quantized_product
from tests.quantization.corpus import Net, attention, exported, spatial_attention
from tests.quantization.networks import everywhere, video, wrapped
from tests.quantization.reference import integer_product

SIZE = (8, 8)
ATEN = torch.ops.aten
SHAPES = {
    ATEN.mm.default: ((5, 7), (7, 3)),
    ATEN.bmm.default: ((2, 5, 7), (2, 7, 3)),
    ATEN.mv.default: ((5, 7), (7,)),
    ATEN.addmm.default: ((5, 7), (7, 3)),
    ATEN.addmv.default: ((5, 7), (7,)),
    ATEN.addbmm.default: ((2, 5, 7), (2, 7, 3)),
    ATEN.baddbmm.default: ((2, 5, 7), (2, 7, 3)),
}


@pytest.mark.parametrize("bits", [2, 8, 16])
@pytest.mark.parametrize("func", FACTORS)
def test_a_product_equals_integer_arithmetic(func: Any, bits: int) -> None:
    first, second = SHAPES[func]
    a, b = torch.randn(first), torch.rand(second) * 9
    a[..., 2, :] = 0.0  # a vector without a range
    wanted = integer_product(a.numpy(), b.numpy().reshape(*second[:1], 1) if len(second) == 1 else b.numpy(), bits)
    wanted = wanted[..., 0] if len(second) == 1 else wanted
    given: list[Tensor] = [a, b]
    settings = {}
    if FACTORS[func]:
        wanted = wanted.sum(0, dtype=np.float32) if func is ATEN.addbmm.default else wanted
        added, settings = torch.randn(wanted.shape), {"beta": 0.5, "alpha": 2.0}
        given, wanted = [added, *given], np.float32(0.5) * added.numpy() + np.float32(2) * wanted
    assert np.array_equal(quantized_product(func, given, settings, bits, 7).numpy(), wanted)


def test_what_is_added_times_zero_may_hold_anything() -> None:
    a, b = torch.rand(2, 3, 4), torch.rand(2, 4, 5)
    y = quantized_product(ATEN.baddbmm.default, [torch.full((2, 3, 5), torch.nan), a, b], {"beta": 0}, 8, 4)
    assert torch.equal(y, quantized_product(ATEN.bmm.default, [a, b], {}, 8, 4))


def test_sums_too_long_for_float32_are_exact() -> None:
    assert exact_type(8, 1040) is torch.float32  # 1040 * 127^2 < 2^24
    assert exact_type(8, 1041) is torch.float64
    a, b = torch.ones(1, 5001), torch.ones(5001, 1)
    a[0, 0] = 1 / 127
    assert quantized_product(ATEN.mm.default, [a, b], {}, 8, 5001).double().item() == pytest.approx(5000 + 1 / 127)


# Four channels on 8 x 8 pixels behind the first layer; what is counted besides the layers.
COUNTS: dict[str, tuple[Callable[[Any, Tensor], Any], dict[str, nn.Module], list[int]]] = {
    "matmul": (lambda m, x: m.a(x) @ m.a(x).mT, {}, [4 * 8 * 8 * 8]),
    "einsum": (lambda m, x: torch.einsum("bchw,bdhw->bcd", m.a(x), m.a(x)), {}, [4 * 4 * 64]),
    "weighted": (lambda m, x: m.a(x).flatten(2) @ m.weight.flatten().repeat(16), {}, [4 * 64]),
    "spatial": (spatial_attention, {}, [64 * 64 * 4, 64 * 64 * 4]),
    "causal": (
        lambda m, x: (lambda y: F.scaled_dot_product_attention(y, y, y, is_causal=True))(m.a(x).flatten(2)),
        {},
        [4 * 4 * 64, 4 * 4 * 64],
    ),
    "grouped": (
        lambda m, x: F.scaled_dot_product_attention(m.a(x), m.a(x)[:, :2], m.a(x)[:, :2], enable_gqa=True),
        {},
        [4 * 8 * 8 * 8, 4 * 8 * 8 * 8],
    ),
    "multihead": (
        lambda m, x: m.c(*[m.a(x).flatten(2).mT] * 3)[0],
        {"c": attention()},
        [64 * 4 * 12] + [64 * 64 * 4] * 2 + [64 * 4 * 4],
    ),
}


@pytest.mark.parametrize(("name", "program"), [(name, program) for name in COUNTS for program in (False, True)])
def test_every_form_is_counted_as_by_hand(name: str, program: bool) -> None:
    call, modules, macs = COUNTS[name]
    network = Net(call, **modules).eval()
    model = wrapped(exported(network) if program else network)
    found = [site.macs for site in model.sites if site.layer_kind == "product"]
    found += [site.macs for site in model.layers if site.name.startswith(("linear", "c."))]  # of multi-head attention
    assert sorted(found) == sorted(macs)


def test_products_cost_the_same_in_every_frame() -> None:
    model = wrapped(Net(spatial_attention).eval())
    assert [site.name for site in model.sites] == ["a", "b", "product1", "product2", "b"]
    assert model.group_of_site.tolist() == [0, 1, 1, 1, 1]
    frames = torch.stack([video(3, 3, SIZE, seed) for seed in range(2)], 1)
    state, skip = model.new_state(2), LevelField.constant(0, 2, 2, (2, 3))
    costs = [model.step(x, state, torch.tensor([t == 0, t < 2]), skip)[1] for t, x in enumerate(frames)]
    for cost in costs:
        assert torch.equal(cost.bops[:, 2:4], torch.full((2, 2, 2, 3), 64 * 64 * 4 * 8 * 8 / 6, dtype=torch.float64))
    assert (costs[2].bops[:, [0, 1, 4]] == 0).all()
    assert model.state_bytes("previous") == sum(2 * s.input_elements + 4 * s.output_elements for s in model.layers)
    # Of a skipped frame: three operations for each input and one for each output of layers, one for each factor.
    layers = [(3 * 64, 4 * 64), (4 * 64, 4 * 64), (4 * 64, 4 * 64)]
    factors = 2 * 4 * 64 + (4 * 64 + 64 * 64)
    assert float(costs[2].elementwise[0]) == sum(3 * i + o for i, o in layers) + factors


def test_clips_side_by_side_equal_each_alone() -> None:
    model = wrapped(Net(spatial_attention).eval())
    frames = torch.stack([video(4, 3, SIZE, seed) for seed in range(3)], 1)
    together, alone = model.new_state(3), [model.new_state(1) for _ in range(3)]
    for t, x in enumerate(frames):
        refresh = torch.tensor([t == 0, t in (0, 2), t == 0])
        taus = torch.rand(3, 5, 2, 2)
        output, cost = model.step(x, together, refresh, ThresholdField(taus))
        for i in range(3):
            one, own = model.step(x[i : i + 1], alone[i], refresh[i : i + 1], ThresholdField(taus[i : i + 1]))
            assert torch.equal(one[0], output[i])
            assert torch.equal(own.bops[0], cost.bops[i])
    together.put(torch.tensor([1]), alone[1])
    assert together.clone().outputs[2].shape == (3, 0)


def test_gradients_reach_thresholds_through_products() -> None:
    model = wrapped(Net(spatial_attention).eval())
    frames = video(3, 3, SIZE)[:, None]
    state, plain = model.new_state(1), model.new_state(1)
    taus = torch.full((1, 5, 1, 1), 0.3, requires_grad=True)
    total = torch.zeros(())
    for t, x in enumerate(frames):
        output, _ = model.unrolled_step(x, state, everywhere(1, t == 0), ThresholdField(taus))
        wanted, _ = model.step(x, plain, everywhere(1, t == 0), ThresholdField(taus.detach()))
        assert torch.equal(output, wanted)
        total = total + output.square().sum()
    total.backward()
    assert taus.grad is not None
    assert bool((taus.grad[0, [0, 1, 4], 0, 0] != 0).all())
    assert bool((taus.grad[0, [2, 3], 0, 0] == 0).all())  # of the products themselves, which have no levels


def test_a_saved_model_with_products_steps_the_same(tmp_path: Path) -> None:
    network = Net(spatial_attention).eval()
    model = wrapped(network)
    save_model(model, tmp_path)
    loaded = load_model(tmp_path, network)
    states = model.new_state(1), loaded.new_state(1)
    for t, x in enumerate(video(3, 3, SIZE)[:, None]):
        field = LevelField.constant(2, 1, 2)
        a, b = (m.step(x, s, everywhere(1, t == 0), field)[0] for m, s in zip((model, loaded), states, strict=True))
        assert torch.equal(a, b)


def test_settings_of_the_process_are_left_as_they_were() -> None:
    before = torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled()
    wrapped(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(2), nn.TransformerEncoderLayer(64, 2, 8, batch_first=True)))
    assert (torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled()) == before


def test_control_flow_around_products_is_named() -> None:
    network: Any = Net(lambda m, x: m.b(m.a(x) @ m.a(x) if m.calls == 0 else m.a(x) + m.a(x)))
    model = wrapped(network.eval())
    model.network.calls = 1  # type: ignore[assignment]
    with pytest.raises(NetworkError, match="out of the order seen when it was wrapped"):
        model.step(video(1, 3, SIZE), model.new_state(1), everywhere(1, True), LevelField.constant(1, 1, 2))


def test_a_product_that_mixes_clips_is_refused() -> None:
    with pytest.raises(NetworkError, match=r"clip dimension must lead|another output for a clip"):
        wrapped(Net(lambda m, x: m.a(x).flatten(1) @ m.a(x).flatten(1).T).eval())


def test_one_bit_is_too_few_for_products() -> None:
    with pytest.raises(CalibrationError, match="symmetric quantizer needs 2 to 16 bits"):
        wrapped(Net(spatial_attention).eval(), config=QuantizationConfig(key_activation_bits=1))
