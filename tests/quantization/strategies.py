"""Hypothesis strategies shared by the quantization tests."""

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from torch import Tensor

from resq_rl.quantization import AffineQuantizer

bit_widths = st.integers(2, 16)

# Magnitudes that occur: nothing below 1e-6, where float32 steps of 16 bits would come near its smallest numbers.
numbers = st.floats(-1e4, 1e4, width=32).map(lambda v: 0.0 if abs(v) < 1e-6 else v)


def samples(rows: int | None = None, most: int = 40) -> st.SearchStrategy[Tensor]:
    """Float32 samples (n,), or (rows, n)."""
    lengths = st.integers(1, most)
    shapes = lengths.map(lambda n: (n,) if rows is None else (rows, n))
    return shapes.flatmap(lambda s: npst.arrays(np.float32, s, elements=numbers)).map(torch.from_numpy)


def symmetric(x: Tensor, bits: int, step: Tensor) -> Tensor:
    """Symmetric quantization of `x` to `bits` bits: clamp(round(x / step), -n, n) * step with n = 2^(bits-1) - 1."""
    limit = 2 ** (bits - 1) - 1
    return torch.round(x / step).clamp(-limit, limit) * step


@st.composite
def affine_quantizers(draw: st.DrawFn) -> AffineQuantizer:
    """Affine quantizers whose range holds 0."""
    bits = draw(st.integers(1, 16))
    return AffineQuantizer(bits, draw(st.floats(2.0**-13, 100, width=32)), draw(st.integers(0, 2**bits - 1)))


grids = st.tuples(st.integers(1, 12), st.integers(1, 12))
sizes = st.tuples(st.integers(1, 12), st.integers(1, 12))
seeds = st.integers(0, 2**31 - 1)
