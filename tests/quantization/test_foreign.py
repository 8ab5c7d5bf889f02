"""Networks from `transformers`, as they are and exported: equal at full bits, counted as torch counts, streamed."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resq_rl.quantization import LevelField, QuantizationConfig, Reference, ResQModel, ThresholdField
from resq_rl.quantization.graph.outputs import tensors_of
from resq_rl.quantization.running import calibration
from tests.quantization.flops import counted
from tests.quantization.foreign import NETWORKS, SIZE, made
from tests.quantization.networks import byte_clips, everywhere, wrapped

# At 16 bits everywhere the output is off by at most this share of its largest value, once no range clips.
FULL_BITS = 2.0**-10

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def transformers() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("transformers", reason="the extra 'transformers' is not installed")


def exported(network: nn.Module) -> nn.Module:
    """The module of an exported program, for any number of clips, without layers whose output nothing uses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        clips = {0: torch.export.Dim("clips", min=1, max=64)}
        program = torch.export.export(network, (torch.rand(2, 3, *SIZE),), dynamic_shapes=(clips,), strict=False)
        module = program.module()
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def every_pixel(recorder: calibration.SiteRecorder, x: Tensor, _: torch.Generator) -> Tensor:
    return x.movedim(recorder.site.operator.channel_axis, -1).flatten(0, -2)


@pytest.mark.parametrize("program", [False, True], ids=["module", "program"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_counted_streamed_and_equal_at_full_bits(
    name: str, program: bool, transformers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration.SiteRecorder, "_pixels", every_pixel)  # so that no range clips
    monkeypatch.setattr(calibration, "MOST_VALUES", 10_000_000)
    network, clips = made(name, transformers), byte_clips(2, 3, 3, SIZE)
    network = exported(network) if program else network
    config = QuantizationConfig(
        16, 16, levels=(0, 16), residual_weight_bits=16, range_estimator="min_max", weight_rounding="nearest"
    )
    model = ResQModel(network, torch.rand(1, 3, *SIZE), config).calibrate(clips)
    assert model.unplaced == []
    assert model.macs == counted(network, torch.rand(1, 3, *SIZE))
    references: tuple[Reference, ...] = ("previous", "keyframe")
    for reference in references:
        state, finest = model.new_state(2, reference), LevelField.constant(1, 2, len(model.groups))
        for t in range(3):
            x = torch.stack([clip[t] for clip in clips]).float() / 255
            found, cost = model.step(x, state, everywhere(2, t == 0), finest)
            with torch.no_grad():
                wanted = network(x)
            for a, b in zip(tensors_of(wanted), tensors_of(found), strict=True):
                assert float((a - b).abs().max()) <= FULL_BITS * float(a.abs().max())
            assert torch.equal(cost.total, torch.full((2,), float(model.macs * 256)).double())


def test_regions_of_a_frame_that_stays_cost_the_products_only(transformers: Any) -> None:
    model = wrapped(made("Swin + UPerNet", transformers), size=SIZE)
    state, groups = model.new_state(1), len(model.groups)
    x = torch.rand(1, 3, *SIZE)
    model.step(x, state, everywhere(1, True), LevelField.constant(0, 1, groups))
    _, cost = model.step(x, state, everywhere(1, False), ThresholdField.constant(1e9, 1, groups, (2, 3)))
    products = sum(site.macs for site in model.sites if site.layer_kind == "product") * 64
    assert float(cost.total) == pytest.approx(products, rel=1e-12)
