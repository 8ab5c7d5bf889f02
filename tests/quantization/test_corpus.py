"""Every network of the corpus: equal to an independent replay and to the float network at full bits, or refused."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from resq_rl.errors import ResqError
from resq_rl.quantization import Field, LevelField, QuantizationConfig, Reference, ResQModel, ThresholdField
from resq_rl.quantization.graph.outputs import tensors_of
from resq_rl.quantization.running import calibration
from tests.quantization.corpus import ACCEPTED, REFERENCES, REFUSED, SIZE
from tests.quantization.networks import byte_clips, everywhere, video
from tests.quantization.reference import Oracle, Setting, integer_product

# At 16 bits everywhere the output is off by at most this share of its largest value, once no range clips.
FULL_BITS = 2.0**-10
# What `Replay` does not know: folded BatchNorm, and attention that torch breaks down where it does not see it.
NOT_REPLAYED = {"batch_norm_keyword", "fused_attention", "multihead_attention", "encoder_layer", "einsum"}
NOT_REPLAYED |= {"einsum_of_three", "baddbmm", "addbmm", "masked", "biased", "causal", "scaled", "grouped"}
NOT_REPLAYED |= {"cross_attention", "padded_attention", "masked_attention", "attention_by_head", "decoder_layer"}
NOT_REPLAYED |= {"attention_with_more_keys", "gru", "one_tap", "rows", "channel_gate"}
COARSE = {"float16", "bfloat16", "autocast"}  # these round between the layers far more than 16 bits do

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*jit.*")


def made(name: str, *, reference: bool = False) -> nn.Module:
    """The same network every time, or what stands for it as a reference."""
    torch.manual_seed(0)
    network = REFERENCES.get(name, ACCEPTED[name])() if reference else ACCEPTED[name]()
    return network if isinstance(network, torch.fx.GraphModule) else network.eval()


def frames(count: int) -> list[Tensor]:
    return [torch.stack([video(count, 3, SIZE, seed)[t] for seed in range(2)]) for t in range(count)]


class Replay(TorchFunctionMode):
    """Runs a network as it is, its layers by integer arithmetic in NumPy instead, call by call."""

    def __init__(self, model: ResQModel) -> None:
        super().__init__()
        self.model, self.position, self.refresh = model, 0, True
        self.oracles: list[Oracle] = []
        self.decision: Field = LevelField.constant(0, 1, 1)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        products = Tensor.__matmul__, Tensor.matmul, torch.matmul, torch.bmm
        if func in products and args[0].dim() > 1:  # a product of vectors here is of constants
            return torch.from_numpy(integer_product(args[0].numpy(), args[1].numpy(), 8))
        if func not in (F.conv2d, F.conv_transpose2d, F.linear):
            return func(*args, **(kwargs or {}))
        kind = {F.conv2d: "conv2d", F.conv_transpose2d: "conv_transpose2d", F.linear: "linear"}[func]
        x, weight = args[0], args[1]
        dtype = func(*args, **(kwargs or {})).dtype
        if self.position == len(self.oracles):
            setting = Setting("linear") if kind == "linear" else _setting(kind, weight, args[3:])
            self.oracles.append(Oracle(self.model, self.position, setting, "previous"))
        oracle = self.oracles[self.position]
        self.position += 1
        values = x.detach().float().numpy()
        y = torch.from_numpy(oracle.keyframe(values) if self.refresh else oracle.residual(values, self.decision))
        return (y.contiguous(memory_format=self.model.layout) if y.dim() == 4 else y).to(dtype, copy=True)


def _setting(kind: str, weight: Tensor, rest: Any) -> Setting:
    def pair(value: Any) -> tuple[int, int]:
        return (value, value) if isinstance(value, int) else tuple(value)

    stride, padding = pair(rest[0]), pair(rest[1])
    pads, kernel = (padding[1], padding[1], padding[0], padding[0]), (weight.shape[2], weight.shape[3])
    if kind == "conv2d":
        return Setting(kind, kernel, stride, pads, pair(rest[2]), rest[3])
    return Setting(kind, kernel, stride, pads, pair(rest[4]), rest[3], pair(rest[2]))


@pytest.mark.parametrize("name", list(ACCEPTED))
def test_steps_equal_an_independent_replay(name: str) -> None:
    network = made(name, reference=True)
    model = ResQModel(made(name), frames(1)[0])
    model.calibrate(byte_clips(2, 3, 3, SIZE))
    compiled, groups = copy.deepcopy(model).compile(), len(model.groups)
    replayed = not isinstance(network, torch.fx.GraphModule) and name not in NOT_REPLAYED
    replay = Replay(model)
    states = model.new_state(2), compiled.new_state(2)
    for t, x in enumerate(frames(3)):
        decision: Field = (
            ThresholdField.constant(0.4, 2, groups) if t == 2 else LevelField.constant(2 + t % 2, 2, groups)
        )
        refresh = everywhere(2, t == 0)
        plain, fast = (
            list(tensors_of(m.step(x, state, refresh, decision)[0]))
            for m, state in zip((model, compiled), states, strict=True)
        )
        assert all(torch.equal(a, b) for a, b in zip(plain, fast, strict=True))
        assert all(y.dtype == torch.float32 for y in states[0].inputs + states[0].outputs)
        if replayed:
            replay.position, replay.refresh, replay.decision = 0, t == 0, decision
            with torch.no_grad(), replay:
                wanted = list(tensors_of(network(x.contiguous(memory_format=model.layout))))
            assert all(torch.equal(a, b) for a, b in zip(wanted, plain, strict=True))


@pytest.fixture
def every_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibration sees all values, so that no range clips."""
    monkeypatch.setattr(calibration, "PIXELS_PER_FRAME", 4000)
    monkeypatch.setattr(calibration, "MOST_VALUES", 10_000_000)


@pytest.mark.usefixtures("every_value")
@pytest.mark.parametrize("name", [name for name in ACCEPTED if name not in COARSE])
def test_at_full_bits_the_stream_equals_the_float_network(name: str) -> None:
    config = QuantizationConfig(
        16, 16, levels=(0, 16), residual_weight_bits=16, range_estimator="min_max", weight_rounding="nearest"
    )
    clips = byte_clips(2, 3, 3, SIZE)
    model = ResQModel(made(name), frames(1)[0], config).calibrate(clips)
    # The closed loop is also what the independent replay steps through.
    references: tuple[Reference, ...] = ("keyframe", "previous") if name in NOT_REPLAYED else ("keyframe",)
    for reference in references:
        network = made(name, reference=True)
        state, decision = model.new_state(2, reference), LevelField.constant(1, 2, len(model.groups))
        for t in range(3):
            x = torch.stack([clip[t] for clip in clips]).float() / 255
            found = list(tensors_of(model.step(x, state, everywhere(2, t == 0), decision)[0]))
            with torch.no_grad():
                wanted = list(tensors_of(network(x.clone())))
            for a, b in zip(wanted, found, strict=True):
                assert float((a - b).abs().max()) <= FULL_BITS * float(a.abs().max())


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_cannot_be_right_is_refused_before_anything_is_computed(name: str) -> None:
    make, message = REFUSED[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = make()
    state = torch.get_rng_state()
    with pytest.raises(ResqError, match=message):
        ResQModel(network.eval(), frames(1)[0])
    assert name == "script" or torch.equal(torch.get_rng_state(), state)
