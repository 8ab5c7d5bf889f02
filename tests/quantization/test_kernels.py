"""The kernels in C against the plain ones."""

import copy
import itertools
import logging
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from resq_rl.quantization import Field, LevelField, Reference, ResQModel, ThresholdField
from resq_rl.quantization.graph.operators import Geometry
from resq_rl.quantization.kernels import PLAIN, Choice, Kernels, native
from tests.quantization.networks import byte_clips

LAYOUTS = (torch.contiguous_format, torch.channels_last)


@pytest.fixture(scope="module")
def fast() -> Kernels:
    """The kernels in C."""
    if native() is PLAIN:
        pytest.skip("no C compiler on this machine")
    return native()


class Network(nn.Module):
    """One operator of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.body = nn.Conv2d(8, 8, 3, 1, 1, groups=8)
        self.wide = nn.Conv2d(8, 24, 1)
        self.up = nn.ConvTranspose2d(24, 4, 2, 2, bias=False)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(torch.relu(self.wide(torch.relu(self.body(torch.relu(self.stem(x)))))))
        scores: Tensor = self.head(x.mean((2, 3)))
        return scores


class Reshaping(nn.Module):
    """A network whose features must be contiguous in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        scores: Tensor = self.second(x.view(len(x), 16, -1, x.shape[3]))
        return scores


@pytest.mark.parametrize("network", [Network, Reshaping])
def test_steps_are_equal_bit_for_bit(network: type[nn.Module], fast: Kernels) -> None:
    generator = torch.Generator().manual_seed(0)
    plain = ResQModel(network(), torch.zeros(1, 3, 20, 28)).calibrate(byte_clips(2, 8, 3, (20, 28)))
    compiled = copy.deepcopy(plain).compile()
    assert compiled.kernels == fast
    assert (plain.layout == torch.channels_last) == (network is Network)
    references: tuple[Reference, ...] = ("previous", "keyframe")
    for clips, reference, thresholds in itertools.product((1, 3), references, (True, False)):
        states = [model.new_state(clips, reference) for model in (plain, compiled)]
        frames, given = torch.rand(clips, 3, 20, 28, generator=generator), []
        for t in range(4):
            frames = (frames + 0.2 * torch.randn(frames.shape, generator=generator)).clamp(0, 1)
            refresh = torch.arange(clips) < (clips if t == 0 else clips - 1 if t == 2 else 0)
            shape = clips, len(plain.groups), 2, 3
            field: Field = (
                ThresholdField(2 * torch.rand(shape, generator=generator), (1.0, 1.5 + t, 8.0))
                if thresholds
                else LevelField(torch.randint(4, shape, generator=generator))
            )
            (a, cost), (b, other) = (
                model.step(frames, state, refresh, field)
                for model, state in zip((plain, compiled), states, strict=True)
            )
            assert torch.equal(a, b)
            assert torch.equal(cost.bops, other.bops)
            for mine, its in zip(*(state.inputs + state.outputs for state in states), strict=True):
                assert torch.equal(mine, its)
            given.append((a, b))
        assert all(torch.equal(a, b) for a, b in given)  # what a step gave is left alone by the next ones


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_codes_costs_and_references_are_equal_in_every_layout(fast: Kernels, data: st.DataObject) -> None:
    clips, channels, height, width = (data.draw(st.integers(1, most)) for most in (3, 40, 9, 17))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    x, reference = (
        torch.randn(clips, channels, height, width, generator=generator).contiguous(
            memory_format=data.draw(st.sampled_from(LAYOUTS))
        )
        for _ in range(2)
    )
    steps = torch.rand(4, 12, generator=generator) * torch.tensor([[5.0], [7.0], [3.0], [9.0]])
    steps[1:3] = steps[1:3].round()
    row = torch.randint(3, (clips, height, width), generator=generator)
    tau = 3 * torch.rand(clips, height, width, generator=generator)
    step = data.draw(st.sampled_from([None, 0.37]))
    for choice in (Choice(steps, row, tau, 0.8, (1.0, 2.0, 8.0)), Choice(steps, row)):
        references = reference.clone(), reference.clone()
        codes, cost = PLAIN.encode(x, references[0], choice, step)
        own_codes, own_cost = fast.encode(x, references[1], choice, step)
        assert torch.equal(codes, own_codes)
        assert torch.equal(cost, own_cost)
        assert torch.equal(*references)
    for plain, own in zip(*(k.encode_keyframe(x, 0.3, -3.0, 4.0) for k in (PLAIN, fast)), strict=True):
        assert torch.equal(plain, own)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_products_of_codes_are_equal_for_every_convolution(fast: Kernels, data: st.DataObject) -> None:
    def pair(low: int, high: int) -> tuple[int, int]:
        return data.draw(st.integers(low, high)), data.draw(st.integers(low, high))

    kernel, stride = pair(1, 5), pair(1, 3)
    padding = *pair(0, 3), *pair(0, 3)
    geometry = Geometry("conv2d", kernel, stride, padding)
    clips, channels, outputs = (data.draw(st.integers(1, most)) for most in (3, 70, 70))
    (height, width), generator = pair(5, 40), torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    largest = data.draw(st.sampled_from([7, 127]))
    weight = torch.randint(-largest, largest + 1, (outputs, channels, *kernel), generator=generator).float()
    scale = torch.rand(outputs, generator=generator)[None, :, None, None]
    x, reference = (
        torch.randn(clips, channels, height, width, generator=generator).contiguous(memory_format=torch.channels_last)
        for _ in range(2)
    )
    steps = torch.tensor([[0.0, 9.0, 90.0], [0.0, 7.0, 127.0], [0.0, 16.0, 1.0], [0.0, 1.0, 2.0]])
    index = torch.randint(3, (clips, height, width), generator=generator)
    found = []
    for kernels in (PLAIN, fast):
        product = kernels.product(geometry, weight, scale, (-127, 127))
        key_product = kernels.product(geometry, weight, scale, (-100, 155))
        own = reference.clone()
        codes, _ = kernels.encode(x, own, Choice(steps, index), 0.01, product)
        key, values = kernels.encode_keyframe(x, 0.01, -100.0, 155.0, key_product)
        base = torch.linspace(-1, 1, outputs)[None, :, None, None]
        first = kernels.accumulate(key_product, key, 0.01, base)
        bare = kernels.accumulate(key_product, key, 0.01, None)
        found.append((own, values, first, bare, kernels.accumulate(product, codes, 0.3, first.sin())))
        assume(product.exact and key_product.exact)  # else sums depend on their order
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_highest_scores_are_equal(layout: torch.memory_format, fast: Kernels) -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((2, 6, 9, 17), (1, 2, 3, 70), (3, 255, 2, 2), (1, 1, 4, 4)):
        scores = torch.randint(4, shape, generator=generator).float().contiguous(memory_format=layout)  # many are equal
        first = (scores == scores.amax(1, keepdim=True)).int().argmax(1)
        assert torch.equal(fast.highest(scores), first.to(torch.uint8))
        scores[0, -1, 0, 0] = scores[-1, 0, -1, -1] = torch.nan
        assert torch.equal(PLAIN.highest(scores), fast.highest(scores))


def test_a_view_that_is_dense_in_no_layout_is_moved_in_place(fast: Kernels) -> None:
    whole = torch.randn(2, 6, 5, 8)
    steps = torch.tensor([[2.0], [7.0], [1.0], [4.0]])
    x, index = torch.randn(2, 3, 5, 4), torch.zeros(2, 5, 4, dtype=torch.int64)
    found = []
    for kernels in (PLAIN, fast):
        own = whole.clone()
        found.append((*kernels.encode(x, own[:, ::2, :, ::2], Choice(steps, index), 0.5), own))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_copies_of_a_compiled_model_are_compiled(fast: Kernels) -> None:
    model = ResQModel(Network(), torch.zeros(1, 3, 20, 28)).calibrate(byte_clips(1, 4, 3, (20, 28)))
    assert pickle.loads(pickle.dumps(model)).kernels == PLAIN
    assert pickle.loads(pickle.dumps(model.compile())).kernels == fast


@pytest.fixture
def new_process() -> Iterator[None]:
    """As in a process that has compiled nothing yet."""
    native.cache_clear()
    yield
    native.cache_clear()


@pytest.mark.usefixtures("new_process")
def test_what_was_compiled_is_kept(fast: Kernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert native() is not PLAIN
    (library,) = (tmp_path / "resq_rl").iterdir()
    before = library.stat().st_mtime_ns
    native.cache_clear()
    assert native() is not PLAIN
    assert library.stat().st_mtime_ns == before


@pytest.mark.usefixtures("new_process")
@pytest.mark.parametrize("reason", ["no compiler", "broken compiler"])
def test_without_a_compiler_the_plain_kernels_run_and_a_line_says_so(
    reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", str(tmp_path / "none") if reason == "no compiler" else "false")
    with caplog.at_level(logging.INFO):
        assert native() is PLAIN
    assert "Kernels run uncompiled, which is slower" in caplog.text
