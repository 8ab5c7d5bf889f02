"""Wrapped networks give the float network's output; what cannot be wrapped is refused by the layer's name."""

import copy
import threading
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils._pytree import tree_leaves

from resq_rl.errors import NetworkError, UnsupportedOperatorError
from resq_rl.quantization import LevelField, QuantizationConfig, ResQModel, ThresholdField, to_float
from tests.envs.problems import moving_frames
from tests.quantization.networks import (
    CASES,
    Case,
    SmallNet,
    byte_clips,
    everywhere,
    perturb_statistics,
    video,
    wrapped,
)

SIZE = (12, 16)


def exported(network: nn.Module, example: Tensor) -> nn.Module:
    """The module of a program exported with a dynamic batch dimension, written and read back."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about its file format
        shapes = ({0: torch.export.Dim("clips", min=1, max=64)},)
        program = torch.export.export(network, (example,), dynamic_shapes=shapes)
        return program.module()


def assert_same_output(network: nn.Module, model: ResQModel, frames: Tensor) -> None:
    with torch.no_grad():
        wanted, found = tree_leaves(network(frames.clone())), tree_leaves(model.float_forward(frames.clone()))
    assert len(wanted) == len(found)
    for a, b in zip(wanted, found, strict=True):
        torch.testing.assert_close(b, a, atol=1e-5, rtol=1e-5)


def layers(model: ResQModel) -> list[str]:
    return [site.name for site in model.sites]


# Modules and programs ------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_every_operator_as_a_module_and_as_a_program(case: Case) -> None:
    network = nn.Sequential(case.make(), nn.Tanh()).eval()
    frames = torch.rand(3, case.channels[0], *case.size)
    model = ResQModel(network, frames[:1])
    assert layers(model) == ["0"]
    assert_same_output(network, model, frames)
    program = ResQModel(exported(network, frames[:2]), frames[:1])
    assert len(program.sites) == 1
    assert program.macs == model.macs
    assert program.operators[0].geometry == model.operators[0].geometry
    assert program.operators[0].layer_kind == model.operators[0].layer_kind
    assert_same_output(network, program, frames)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_layer_kinds() -> None:
    kinds = {case.name: ResQModel(case.make(), torch.rand(1, case.channels[0], *case.size)) for case in CASES[:4]}
    assert kinds["pointwise"].operators[0].layer_kind == "pointwise"
    assert kinds["stride"].operators[0].layer_kind == "conv"
    found = {
        c.name: ResQModel(c.make(), torch.rand(1, c.channels[0], *c.size)).operators[0].layer_kind for c in CASES[7:]
    }
    assert found["groups"] == "grouped"
    assert found["depthwise"] == found["depthwise_multiplied"] == found["transposed_depthwise"] == "depthwise"
    assert found["transposed"] == "transposed"
    assert found["transposed_groups"] == "grouped"


@pytest.mark.parametrize("program", [False, True], ids=["module", "program"])
def test_a_whole_network(program: bool) -> None:
    network = perturb_statistics(SmallNet())
    frames = torch.rand(3, 3, *SIZE)
    model = ResQModel(exported(network, frames) if program else network, frames[:1])
    assert len(model.sites) == 8
    assert model.unfolded == []
    assert_same_output(network, model, frames)


def test_a_program_inside_a_module() -> None:
    inner = perturb_statistics(SmallNet())
    frames = torch.rand(3, 3, *SIZE)

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = exported(inner, frames)
            self.norm = nn.BatchNorm2d(2)
            self.last = nn.Conv2d(2, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.last(self.norm(self.body(x)[0]))
            return y

    network = First()
    network.norm.eval()
    model = ResQModel(network, frames[:1])
    assert len(model.sites) == 9
    assert all(name.startswith("body.") for name in layers(model)[:8])
    assert_same_output(network, model, frames)


class Shaped(nn.Module):
    """A network with one layer whose output comes in some arrangement."""

    def __init__(self, arrange: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3, padding=1)
        self.arrange = arrange

    def forward(self, x: Tensor) -> Any:
        return self.arrange(self.layer(x))


@pytest.mark.parametrize(
    "arrange",
    [
        lambda y: [y, y * 2],
        lambda y: (y, [y.mean((2, 3)), y.amax(1)]),
        lambda y: {"logits": y, "aux": {"small": y[:, :1]}},
        lambda y: (y, None, 3),
        lambda y: (y.argmax(1), y),
    ],
    ids=["list", "nested", "dict", "with_constants", "with_integers"],
)
def test_outputs_keep_their_arrangement(arrange: Callable[[Tensor], Any]) -> None:
    network = Shaped(arrange)
    frames = torch.rand(2, 3, *SIZE)
    model = wrapped(network, 3, SIZE)
    assert_same_output(network, model, frames)
    state = model.new_state(2)
    out, _ = model.step(frames, state, everywhere(2, True), LevelField.constant(3, 2, 1))
    assert type(out) is type(network(frames))
    assert len(out) == len(network(frames))


def test_the_callers_network_is_never_changed() -> None:
    network = SmallNet().train()
    before = copy.deepcopy(network.state_dict())
    model = wrapped(network, 3, SIZE)
    state = model.new_state(1)
    for t, frame in enumerate(video(3, 3, SIZE)):
        model.step(frame[None], state, everywhere(1, t == 0), LevelField.constant(2, 1, len(model.groups)))
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    assert all(p.requires_grad for p in network.parameters())
    assert network.training
    assert isinstance(network.stem[0], nn.Conv2d)
    assert isinstance(network.stem[1], nn.BatchNorm2d)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
    network.head.weight.data.zero_()  # nor does the model follow later changes
    assert float(model.float_forward(torch.rand(1, 3, *SIZE))[0].std()) > 0


def test_the_callers_program_is_never_changed() -> None:
    network = exported(perturb_statistics(SmallNet()), torch.rand(3, 3, *SIZE))
    frames = torch.rand(2, 3, *SIZE)
    with torch.no_grad():
        before = [o.clone() for o in network(frames)]
    code = network.code
    wrapped(network, 3, SIZE)
    assert network.code == code
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(before, network(frames), strict=True))


def test_frames_are_not_changed() -> None:
    model = wrapped(perturb_statistics(SmallNet()), 3, SIZE)
    frames = torch.rand(2, 3, *SIZE)
    kept = frames.clone()
    model.step(frames, model.new_state(2), everywhere(2, True), LevelField.constant(3, 2, len(model.groups)))
    assert torch.equal(frames, kept)


class Normalising(nn.Module):
    """Subtracts a mean from its own input and divides by a deviation, in place or not."""

    def __init__(self, channels: int, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.layer = nn.Conv2d(channels, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = x.sub_(0.4).div_(0.2) if self.in_place else (x - 0.4) / 0.2
        return self.layer(y)  # type: ignore[no-any-return]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("program", [False, True])
def test_a_network_that_writes_to_its_input_leaves_the_frames_as_they_are(channels: int, program: bool) -> None:
    models = []
    for in_place in (False, True):
        torch.manual_seed(0)
        network: nn.Module = Normalising(channels, in_place).eval()
        network = exported(network, torch.rand(2, channels, *SIZE)) if program else network
        models.append(ResQModel(network, torch.zeros(1, channels, *SIZE)).calibrate(byte_clips(2, 4, channels, SIZE)))
    assert models[0].ranges == models[1].ranges
    frames = video(2, channels, SIZE)
    kept, outputs = frames.clone(), []
    for model in models:
        state, field = model.new_state(1), LevelField.constant(3, 1, 1)
        outputs.append([model.float_forward(frames[:1]).clone()])
        for t in (0, 1):
            outputs[-1].append(model.step(frames[t : t + 1], state, everywhere(1, t == 0), field)[0].clone())
        assert torch.equal(frames, kept)
    assert all(map(torch.equal, *outputs))


def test_in_place_operations_of_a_program() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 4, 3, padding=1)
            self.b = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            y += 0.5
            F.relu_(y)
            z: Tensor = self.b(y)
            return z.mul_(y)

    network = Net()
    frames = torch.rand(2, 3, *SIZE)
    module, program = wrapped(network, 3, SIZE), wrapped(exported(network, frames), 3, SIZE)
    assert_same_output(network, program, frames)
    results = []
    for model in (module, program):
        state = model.new_state(2)
        decision = LevelField.constant(2, 2, len(model.groups))
        results.append([model.step(f, state, everywhere(2, i == 0), decision)[0] for i, f in enumerate((frames,) * 3)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# BatchNorm -----------------------------------------------------------------------------------------------------------


def folded(network: nn.Module, names: list[str] | None = None, channels: int = 3) -> ResQModel:
    perturb_statistics(network)
    frames = torch.rand(3, channels, *SIZE)
    model = ResQModel(network, frames[:1])
    assert model.unfolded == (names or [])
    left = [n for n, m in model.network.named_modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert left == (names or [])
    assert_same_output(network, model, frames)
    return model


def test_folding_chains() -> None:
    folded(
        nn.Sequential(
            nn.Conv2d(3, 4, 3, bias=False),
            nn.BatchNorm2d(4),
            nn.Conv2d(4, 6, 3, groups=2),
            nn.BatchNorm2d(6, eps=0.1),
            nn.ReLU(),
            nn.ConvTranspose2d(6, 4, 2, 2),
            nn.BatchNorm2d(4, affine=False),
            nn.Conv2d(4, 4, 3, padding="same", groups=4),
            nn.BatchNorm2d(4),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(16, 5, bias=False),
            nn.BatchNorm1d(5),
        )
    )


class Custom(nn.Module):
    """Layers a and b, norm and other, put together by a function."""

    def __init__(self, call: Callable[[Any, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


def conv(ins: int = 3, outs: int = 4) -> nn.Conv2d:
    return nn.Conv2d(ins, outs, 3, padding=1)


def test_a_convolution_used_twice_is_not_folded() -> None:
    model = folded(
        Custom(lambda m, x: m.norm(m.a(x)) + m.other(m.a(x * 2)), a=conv(), norm=nn.BatchNorm2d(4), other=nn.ReLU()),
        ["norm"],
    )
    assert layers(model) == ["a", "a"]


def test_a_norm_used_twice_is_not_folded() -> None:
    folded(Custom(lambda m, x: m.norm(m.a(x)) + m.norm(m.b(x)), a=conv(), b=conv(), norm=nn.BatchNorm2d(4)), ["norm"])


def test_a_sum_that_is_also_used_elsewhere_is_not_folded() -> None:
    def call(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        z: Tensor = m.norm(y) + y
        return z

    folded(Custom(call, a=conv(), norm=nn.BatchNorm2d(4)), ["norm"])


def test_a_norm_before_a_convolution_or_behind_an_activation_is_not_folded() -> None:
    folded(nn.Sequential(nn.BatchNorm2d(3), conv(), nn.ReLU(), nn.BatchNorm2d(4)), ["0", "3"])


def test_a_grouped_transposed_convolution_is_not_folded() -> None:
    folded(nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)), ["1"], channels=4)


def test_layers_under_two_names() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = conv(), nn.BatchNorm2d(4)
            self.again, self.same = self.first, self.norm

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.same(self.again(x))
            return y

    model = folded(Net())
    assert layers(model) == ["first"]


def test_a_norm_called_by_keyword_stays() -> None:
    folded(Custom(lambda m, x: m.norm(input=m.a(x)), a=conv(), norm=nn.BatchNorm2d(4)), ["norm"])


def test_control_flow_on_shapes_leaves_norms_in_place() -> None:
    def call(m: Any, x: Tensor) -> Tensor:
        y: Tensor = m.norm(m.a(x))
        return y if float(x.sum()) < 1e9 else -y

    folded(Custom(call, a=conv(), norm=nn.BatchNorm2d(4)), ["norm"])


def test_norms_of_a_program() -> None:
    network = Custom(
        lambda m, x: m.other(m.c(m.norm(m.a(x)).relu() + m.second(x))),
        a=conv(),
        c=conv(4, 4),
        norm=nn.BatchNorm2d(4),
        second=nn.BatchNorm2d(3, affine=False),
        other=nn.BatchNorm2d(4, affine=False),
    )
    network.call = lambda m, x: m.other(m.c(m.norm(m.a(x)).relu())) + m.a(m.second(x))
    perturb_statistics(network)
    frames = torch.rand(3, 3, *SIZE)
    model = ResQModel(exported(network, frames), frames[:1])
    assert len(model.unfolded) == 1  # `second`, which no convolution precedes
    assert len(model.sites) == 3
    assert_same_output(network, model, frames)


# Weights that are more than parameters --------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("parametrize", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrized_weights_are_taken_as_they_are(parametrize: Callable[[nn.Module], nn.Module], norm: bool) -> None:
    layer = parametrize(conv()).train()
    for _ in range(3):  # spectral normalisation starts in training
        layer(torch.rand(1, 3, *SIZE))
    network = nn.Sequential(layer, *([nn.BatchNorm2d(4)] if norm else []))
    before = copy.deepcopy(network.state_dict())
    folded(network)
    assert all(
        torch.equal(before[k], v) for k, v in network.state_dict().items() if "running" not in k and "1." not in k
    )


def test_tied_weights() -> None:
    a, b = conv(4, 4), conv(4, 4)
    b.weight = a.weight
    folded(nn.Sequential(a, nn.BatchNorm2d(4), b, nn.ReLU(), conv(4, 4)), channels=4)


# Used more than once -------------------------------------------------------------------------------------------------


def test_an_operator_used_twice_keeps_two_states() -> None:
    class Net(nn.Module):
        def __init__(self, first: nn.Module, second: nn.Module) -> None:
            super().__init__()
            self.stem, self.first, self.second = conv(3, 6), first, second

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.stem(x))
            return self.second(torch.tanh(self.first(y))) + F.max_pool2d(y, 3, 1, 1)  # type: ignore[no-any-return]

    torch.manual_seed(4)
    layer = conv(6, 6)
    shared = Net(layer, layer)
    unrolled = copy.deepcopy(shared)
    unrolled.second = copy.deepcopy(unrolled.first)
    # Rounded by what they multiply, the weights of the shared layer would suit both calls and so those of neither.
    config = QuantizationConfig(weight_rounding="nearest")
    shared_model, model = (wrapped(network, 3, SIZE, config) for network in (shared, unrolled))
    assert layers(shared_model) == ["stem", "first", "first"]
    assert layers(model) == ["stem", "first", "second"]
    assert shared_model.state_bytes("previous") == model.state_bytes("previous")
    generator = torch.Generator().manual_seed(1)
    fields = torch.randint(0, 4, (6, 2, 1, 3, 4), generator=generator)
    results = []
    for m in (shared_model, model):
        state = m.new_state(2)
        steps = []
        for t in range(6):
            field = LevelField(fields[t].expand(-1, len(m.groups), -1, -1))
            out, cost = m.step(
                torch.stack([video(6, 3, SIZE, s)[t] for s in range(2)]), state, everywhere(2, t % 4 == 0), field
            )
            steps.append((out, cost.per_layer))
        results.append(steps)
    for (a, x), (b, y) in zip(*results, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(x, y)


# Refused, by name ----------------------------------------------------------------------------------------------------


class Around(nn.Module):
    """A supported layer, then something at a named place."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.stem = conv(3, 4)
        self.middle = nn.Sequential(nn.ReLU(), inner)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.middle(self.stem(x))
        return y


class Function(nn.Module):
    """A function of the input, with a parameter."""

    def __init__(self, call: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.call = call
        self.weight = nn.Parameter(torch.rand(*shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, self.weight)


class Recurrent(nn.Module):
    """A recurrent layer over the rows of an image."""

    def __init__(self, cell: Any) -> None:
        super().__init__()
        self.cell = cell(16, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.cell(x.mean(1))[0]
        return y


UNSUPPORTED = {
    "conv1d": (Function(lambda x, w: F.conv1d(x.mean(1), w), 3, 12, 3), "middle.1"),
    "ConvTranspose1d": (nn.Sequential(nn.Flatten(2), nn.ConvTranspose1d(4, 3, 3)), "middle.1.1"),
    "Conv3d": (nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Conv3d(1, 3, 3)), "middle.1.1"),
    "LSTM": (Recurrent(nn.LSTM), "middle.1.cell"),
    "bilinear": (nn.Sequential(Function(lambda x, w: F.bilinear(x, x, w), 5, 16, 16)), "middle.1.0"),
    "conv2d": (Function(F.conv2d, 5, 4, 3, 3), "middle.1"),
    "dot": (Function(lambda x, w: x * torch.dot(x.flatten(), x.flatten()) * w, 1), "middle.1"),
    "cdist": (Function(lambda x, w: torch.cdist(x.mean(1), x.mean(1)) * w, 1), "middle.1"),
}


@pytest.mark.parametrize("kind", list(UNSUPPORTED))
def test_multiplications_outside_the_operators_are_refused_by_name(kind: str) -> None:
    inner, where = UNSUPPORTED[kind]
    with pytest.raises(UnsupportedOperatorError, match=f"in layer '{where}"):
        ResQModel(Around(inner), torch.rand(1, 3, *SIZE))


def test_multiplications_in_the_networks_own_forward_are_refused() -> None:
    network = Custom(lambda m, x: F.conv2d(m.a(x), m.a.weight.mean(1, keepdim=True).expand(-1, 4, -1, -1)), a=conv())
    with pytest.raises(UnsupportedOperatorError, match=r"aten::convolution in the network's forward"):
        ResQModel(network, torch.rand(1, 3, *SIZE))


def test_operators_of_other_libraries_are_refused() -> None:
    with torch.library._scoped_library("resq_test", "DEF") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")
        network = Custom(lambda m, x: torch.ops.resq_test.twice(m.a(x)), a=conv())
        with pytest.raises(UnsupportedOperatorError, match="resq_test::twice"):
            ResQModel(network, torch.rand(1, 3, *SIZE))


@pytest.mark.parametrize("mode", ["bilinear", "nearest", "bicubic"])
def test_resizing_and_pooling_run_in_float(mode: str) -> None:
    network = nn.Sequential(conv(), nn.Upsample(scale_factor=2, mode=mode), nn.AvgPool2d(3), nn.Softmax(1))
    assert layers(ResQModel(network, torch.rand(1, 3, *SIZE))) == ["0"]


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_other_padding_is_refused_by_name(mode: Literal["reflect", "replicate", "circular"]) -> None:
    with pytest.raises(UnsupportedOperatorError, match=f"'middle.1' pads with '{mode}'"):
        ResQModel(Around(nn.Conv2d(4, 4, 3, padding=1, padding_mode=mode)), torch.rand(1, 3, *SIZE))


class OwnForward(nn.Conv2d):
    """Standardizes its weight on the fly."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias, padding=self.padding)


class OwnConvolution(nn.Conv2d):
    """Overrides the part that convolves."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = super()._conv_forward(input, weight - weight.mean(), bias)
        return y


def patched() -> nn.Conv2d:
    layer = conv(4, 4)
    layer.__dict__["forward"] = lambda x: x
    return layer


@pytest.mark.parametrize("layer", [OwnForward(4, 4, 3), OwnConvolution(4, 4, 3), patched()], ids=["a", "b", "c"])
def test_a_layer_with_a_forward_of_its_own_is_refused_by_name(layer: nn.Module) -> None:
    with pytest.raises(UnsupportedOperatorError, match=r"'middle.1' .* has a forward of its own"):
        ResQModel(Around(layer), torch.rand(1, 3, *SIZE))


def test_a_weight_computed_in_a_program_is_refused_by_name() -> None:
    network = Custom(lambda m, x: F.conv2d(x, m.a.weight * 2, m.a.bias), a=conv()).eval()
    program = exported(network, torch.rand(2, 3, *SIZE))
    with pytest.raises(UnsupportedOperatorError, match=r"'conv2d' .* computed in the graph, by mul"):
        ResQModel(program, torch.rand(1, 3, *SIZE))


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda m, x: F.conv1d(m.a(x)[:, :3].flatten(2), m.a.weight.flatten(2)), r"'conv1d' \(aten.conv1d"),
        (lambda m, x: torch.cond(x.sum() > 9, lambda y: y + 1, lambda y: y - 1, (m.a(x),)), r"'cond' \(cond\)"),
    ],
    ids=["conv1d", "cond"],
)
def test_other_nodes_of_a_program_are_refused_by_name(call: Callable[[Any, Tensor], Tensor], name: str) -> None:
    program = exported(Custom(call, a=conv()).eval(), torch.rand(2, 3, *SIZE))
    with pytest.raises(UnsupportedOperatorError, match=f"Node {name}"):
        ResQModel(program, torch.rand(1, 3, *SIZE))


def test_a_decomposed_program() -> None:
    network = perturb_statistics(
        nn.Sequential(
            conv(), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3), nn.Linear(3, 2, False)
        )
    )
    frames = torch.rand(3, 3, *SIZE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shapes = ({0: torch.export.Dim("clips", min=1, max=64)},)
        program = torch.export.export(network, (frames,), dynamic_shapes=shapes).run_decompositions()
    model = ResQModel(program.module(), frames[:1])
    assert [s.layer_kind for s in model.sites] == ["conv", "linear", "linear"]
    assert_same_output(network, model, frames)


def test_a_network_without_layers() -> None:
    with pytest.raises(NetworkError, match="ReLU has no layer to quantize"):
        ResQModel(nn.ReLU(), torch.rand(1, 3, *SIZE))
    with pytest.raises(NetworkError, match="calls none of its layers"):
        ResQModel(Custom(lambda m, x: x * 2, a=conv()), torch.rand(1, 3, *SIZE))


def test_frames_that_the_network_does_not_take() -> None:
    with pytest.raises(NetworkError, match=r"Conv2d cannot run on frames of shape \(1, 5, 12, 16\)"):
        ResQModel(conv(), torch.rand(1, 5, *SIZE))


def test_an_example_that_is_no_batch_of_frames(unchecked_types: None) -> None:
    for bad in (torch.rand(3, *SIZE), torch.zeros(0, 3, *SIZE), torch.zeros(1, 3, *SIZE, dtype=torch.uint8)):
        with pytest.raises(NetworkError, match=r"example must be frames as float, \(1 or more, C, H, W\), and .* got"):
            ResQModel(conv(), bad)


def test_a_program_of_one_clip_says_how_to_export_it() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(SmallNet().eval(), (torch.rand(1, 3, *SIZE),)).module()
    with pytest.raises(NetworkError, match="dynamic batch dimension"):
        ResQModel(program, torch.rand(1, 3, *SIZE))


def test_the_clip_dimension_must_lead() -> None:
    for call in (
        lambda m, x: m.a(x.flatten(0, 1)[:, None].expand(-1, 3, -1, -1)),
        lambda m, x: m.a(x[0]),
        lambda m, x: m.a(x[:1]),
    ):
        with pytest.raises(NetworkError, match=r"Layer 'a' is called on a tensor of shape .* must lead in every layer"):
            ResQModel(Custom(call, a=conv()), torch.rand(1, 3, *SIZE))


def test_statistics_over_the_clips_of_a_batch_are_refused() -> None:
    network = nn.Sequential(conv(), nn.BatchNorm2d(4, track_running_stats=False))
    with pytest.raises(NetworkError, match="statistics over the clips of a batch"):
        ResQModel(network, torch.rand(1, 3, *SIZE))


def test_hooks_on_layers_run_as_before() -> None:
    network = nn.Sequential(conv(), nn.ReLU())
    network[0].register_forward_hook(lambda module, args, output: output * 2)
    network[0].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    assert_same_output(network, wrapped(network, 3, SIZE), torch.rand(2, 3, *SIZE))


def test_a_mask_that_flips_in_a_pixel_is_no_loss() -> None:
    network = perturb_statistics(nn.Sequential(conv(3, 64), nn.BatchNorm2d(64)))
    frames = torch.rand(1, 3, *SIZE)
    model = ResQModel(nn.Sequential(network, Function(lambda x, w: (x > 0).float(), 1)), frames)
    assert len(model.sites) == 1


def test_random_outputs_are_refused() -> None:
    network = Custom(lambda m, x: F.dropout(m.a(x), 0.5, training=True), a=conv())
    with pytest.raises(NetworkError, match="random numbers"):
        ResQModel(network, torch.rand(1, 3, *SIZE))


def compiled_network() -> nn.Module:
    network = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()), nn.Conv2d(8, 4, 1)).eval()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        for parameter in network.parameters():
            parameter.normal_()
    return network


def _part(network: nn.Module) -> nn.Module:
    network[0] = torch.compile(network[0], backend="eager")  # type: ignore[index, operator]
    return network


def _in_place(network: nn.Module) -> nn.Module:
    network.compile(backend="eager")
    return network


def _method(network: nn.Module) -> nn.Module:
    network.forward = torch.compile(network.forward, backend="eager")
    return network


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, on importing its compiler
@pytest.mark.parametrize("compiled", [partial(torch.compile, backend="eager"), _part, _in_place, _method])
def test_a_compiled_network_is_wrapped_as_it_is_without(compiled: Callable[[nn.Module], nn.Module]) -> None:
    """Nothing is compiled meanwhile, and the caller's network stays compiled."""
    plain, given = compiled_network(), compiled(compiled_network())
    clips = [moving_frames(5, (16, 16), seed=seed) for seed in (1, 2)]
    example = torch.zeros(1, 3, 16, 16)
    forward = vars(given).get("forward")
    with torch.compiler.set_stance("fail_on_recompile"):
        expected, found = (ResQModel(network, example).calibrate(clips) for network in (plain, given))
        assert found.groups == expected.groups
        outputs = []
        for model in (expected, found):
            state, field = model.new_state(1), ThresholdField(torch.full((1, len(model.groups), 1, 1), 0.5))
            for t in range(3):
                y, _ = model.step(to_float(clips[0][t : t + 1]), state, torch.tensor([t == 0]), field)
            outputs.append(y)
    assert torch.equal(*outputs)
    assert vars(given).get("forward") is forward


def test_a_lazy_layer_is_refused_by_name() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.LazyConv2d(2, 1))
    with pytest.raises(NetworkError, match="Layer '1' is lazy"):
        ResQModel(network, torch.zeros(1, 3, 8, 8))
    network(torch.zeros(1, 3, 8, 8))
    assert len(ResQModel(network, torch.zeros(1, 3, 8, 8)).layers) == 2


def test_a_network_that_cannot_be_copied() -> None:
    network = Custom(lambda m, x: m.a(x), a=conv())
    vars(network)["lock"] = threading.Lock()
    with pytest.raises(NetworkError, match=r"Custom cannot be copied: .*\(locks"):
        ResQModel(network, torch.rand(1, 3, *SIZE))


@pytest.mark.parametrize("which", ["weight", "bias"])
def test_weights_that_are_not_finite_are_refused_by_name(which: str) -> None:
    network = nn.Sequential(conv(), nn.ReLU(), conv(4, 4))
    getattr(network[2], which).data[0] = float("nan")
    with pytest.raises(NetworkError, match="'2' has weights that are not finite"):
        ResQModel(network, torch.rand(1, 3, *SIZE))


# Control flow --------------------------------------------------------------------------------------------------------


class Branching(nn.Module):
    """Takes another path on bright frames."""

    def __init__(self, bright: Callable[["Branching", Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = conv(3, 4), conv(3, 4)
        self.bright = bright

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bright(self, x) if float(x.max()) > 2 else self.a(x)
        return y


@pytest.mark.parametrize(
    ("bright", "message"),
    [
        (lambda m, x: m.b(x), "called layer 'b' out of the order"),
        (lambda m, x: m.a(x) + m.a(x), "called layer 'a' out of the order"),
        (lambda m, x: x[:, :1].expand(-1, 4, -1, -1), "0 operator calls instead of the 1"),
        (lambda m, x: m.a(x).relu_(), "'a' was overwritten in place"),
    ],
)
def test_a_path_that_changes_between_steps(bright: Callable[[Branching, Tensor], Tensor], message: str) -> None:
    network = nn.Sequential(Branching(bright), nn.ReLU())
    model = wrapped(network, 3, SIZE)
    state = model.new_state(1)
    decision = LevelField.constant(3, 1, 1)
    frames = torch.rand(1, 3, *SIZE)
    model.step(frames, state, everywhere(1, True), decision)
    message = message.replace("'a'", "'0.a'").replace("'b'", "'0.b'")
    with pytest.raises(NetworkError, match=message):
        model.step(frames * 4, state, everywhere(1, False), decision)


def test_wrapping_and_stepping_inside_inference_mode() -> None:
    network = perturb_statistics(SmallNet())
    clips = byte_clips(1, 4, 3, SIZE)
    frames = video(3, 3, SIZE)[:, None]
    outputs = []
    for inference in (False, True):
        with torch.inference_mode(inference):
            model = ResQModel(network, frames[0].clone()).calibrate(clips)
            state = model.new_state(1)
            decision = LevelField.constant(2, 1, len(model.groups))
            for t in range(3):
                out, _ = model.step(frames[t].clone(), state, everywhere(1, t == 0), decision)
            outputs.append(out[0])
    assert torch.equal(outputs[0], outputs[1])
