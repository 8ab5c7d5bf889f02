from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from resq_rl.quantization import ResQModel
from resq_rl.quantization.graph.operators import Geometry, ResidualOperator, Switch
from tests.quantization.networks import CASES, Case
from tests.quantization.reference import Setting

small = st.tuples(st.integers(1, 3), st.integers(1, 3))
paddings = st.integers(0, 2)


@st.composite
def operators(draw: st.DrawFn) -> tuple[Geometry, Setting, int, int]:
    """A geometry with the same setting for the reference, and its inputs and outputs per group."""
    kinds: list[Literal["conv2d", "conv_transpose2d"]] = ["conv2d", "conv_transpose2d"]
    kind = draw(st.sampled_from(kinds))
    kernel, stride, dilation = draw(small), draw(small), draw(small)
    top, left = draw(paddings), draw(paddings)
    pads, output_padding = (left, left, top, top), (0, 0)
    if kind == "conv2d":
        pads = (left, draw(paddings), top, draw(paddings))
    else:
        most = [max(s, d) - 1 for s, d in zip(stride, dilation, strict=True)]
        output_padding = (draw(st.integers(0, most[0])), draw(st.integers(0, most[1])))
    groups = draw(st.integers(1, 3))
    shared: Any = (kernel, stride, pads, dilation, groups, output_padding)
    return Geometry(kind, *shared), Setting(kind, *shared), draw(st.integers(1, 2)), draw(st.integers(1, 2))


@given(operators(), st.tuples(st.integers(1, 7), st.integers(1, 7)), st.integers(0, 1000))
def test_any_geometry(operator: tuple[Geometry, Setting, int, int], size: tuple[int, int], seed: int) -> None:
    geometry, setting, ins, outs = operator
    assume(min(setting.output_size(size)) > 0)
    counts = np.zeros(size)
    for _, _, pixel in setting.readers(size):
        counts[pixel] += 1
    np.testing.assert_array_equal(geometry.coverage(size).numpy(), counts)
    generator = torch.Generator().manual_seed(seed)
    groups = geometry.groups
    first, second = (groups * ins, outs) if geometry.operator == "conv_transpose2d" else (groups * outs, ins)
    weight = torch.randint(-127, 128, (first, second, *geometry.kernel), generator=generator)
    x = torch.randint(-255, 256, (2, groups * ins, *size), generator=generator)
    expected = setting.accumulate(x.numpy(), weight.numpy())
    np.testing.assert_array_equal(geometry.apply(x.float(), weight.float()).numpy(), expected)


def test_a_linear_layer_is_one_position() -> None:
    assert Geometry("linear").coverage((2, 3)).tolist() == [[1.0] * 3] * 2


# Patches -------------------------------------------------------------------------------------------------------------


def products(operator: ResidualOperator, x: Tensor, size: tuple[int, ...], positions: Tensor) -> Tensor:
    """Patches times rows of weights: (positions, output channels)."""
    patches = operator.geometry.patches(x, size, positions)
    rows = operator.weight_rows().unflatten(0, (len(patches), -1))
    outputs: Tensor = (patches @ rows.transpose(1, 2)).transpose(0, 1).flatten(1)
    return outputs


def whole(*shape: int) -> Tensor:
    """Small whole numbers, whose sums are exact in any order."""
    return torch.randint(-9, 10, shape).float()


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch's own, once
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_patches_times_weights_are_the_layers_output(case: Case) -> None:
    layer = case.make()
    for parameter in layer.parameters():
        parameter.data = whole(*parameter.shape)
    if layer.bias is not None:
        layer.bias.data.zero_()  # type: ignore[operator]
    x = whole(1, case.channels[0], *case.size)
    output = layer(x)[0].detach()
    operator = ResQModel(layer, torch.rand_like(x)).operators[0]
    expected = output.flatten(1).T
    positions = torch.randint(len(expected), (40,))  # some twice
    for chosen in (torch.arange(len(expected)), positions):
        assert torch.equal(products(operator, x, output.shape[1:], chosen), expected[chosen])


@given(operators(), st.tuples(st.integers(1, 7), st.integers(1, 7)), st.integers(0, 1000))
def test_patches_of_any_geometry(
    operator: tuple[Geometry, Setting, int, int], size: tuple[int, int], seed: int
) -> None:
    geometry, setting, ins, outs = operator
    height, width = setting.output_size(size)
    assume(min(height, width) > 0)
    torch.manual_seed(seed)
    groups = geometry.groups
    first, second = (groups * ins, outs) if geometry.operator == "conv_transpose2d" else (groups * outs, ins)
    weight, x = whole(first, second, *geometry.kernel), whole(1, groups * ins, *size)
    residual = ResidualOperator("layer", geometry, weight, None, Switch())
    found = products(residual, x, (height, width), torch.arange(height * width))
    expected = setting.accumulate(x.long().numpy(), weight.long().numpy())[0].reshape(groups * outs, -1)
    np.testing.assert_array_equal(found.numpy(), expected.T)


@pytest.mark.parametrize("shape", [(1, 6), (1, 5, 6), (1, 2, 3, 6)], ids=str)
def test_patches_of_a_linear_layer(shape: tuple[int, ...]) -> None:
    layer = nn.Linear(6, 4, bias=False)
    layer.weight.data = whole(4, 6)
    x = whole(*shape)
    operator = ResidualOperator("layer", Geometry("linear"), layer.weight, None, Switch())
    expected = layer(x).detach().flatten(0, -2)
    assert torch.equal(products(operator, x, (1, 1), torch.arange(len(expected))), expected)
