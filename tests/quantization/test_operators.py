from typing import Any, Literal

import numpy as np
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from resq_rl.quantization.operators import Geometry
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
    assert Geometry("linear").coverage((5, 7)).tolist() == [[1.0]]
