"""Where tokens lie: against places written by hand, and against what a changed pixel changes."""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from resq_rl.quantization import LevelField, QuantizationConfig, ResQModel, ThresholdField
from resq_rl.quantization.graph.tracing import Site
from tests.quantization.corpus import Net, attention
from tests.quantization.networks import everywhere, video, wrapped
from tests.quantization.reference import Oracle, Setting, unit_cost

SIZE = (8, 12)
RASTER = [[12 * y + x for x in range(12)] for y in range(8)]


def embedded(m: Any, x: Tensor) -> Tensor:
    y: Tensor = m.a(x).flatten(2).transpose(1, 2)
    return y


def windows(m: Any, x: Tensor, shift: int = 0) -> Tensor:
    """Windows of 4 x 4 pixels, folded into the axis of the clips."""
    y = m.a(x).permute(0, 2, 3, 1).roll((-shift, -shift), (1, 2))
    folded: Tensor = y.unflatten(1, (2, 4)).unflatten(3, (3, 4)).transpose(2, 3).flatten(0, 2).flatten(1, 2)
    return folded


def of_windows(shift: int) -> list[int]:
    return [
        RASTER[(4 * i + y + shift) % 8][(4 * j + x + shift) % 12]
        for i in range(2)
        for j in range(3)
        for y in range(4)
        for x in range(4)
    ]


def unfolded(y: Tensor) -> Tensor:
    found: Tensor = y.unflatten(0, (-1, 6)).flatten(1)
    return found


def with_class(m: Any, x: Tensor) -> Any:
    own = m.weight.flatten()[:4].expand(x.shape[0], 1, 4)
    y: Tensor = m.d(torch.cat([own, embedded(m, x)], 1))
    return y


def merged(m: Any, x: Tensor) -> Tensor:
    y = m.a(x).permute(0, 2, 3, 1)
    parts = [y[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
    found: Tensor = m.d(torch.cat(parts, -1).flatten(1, 2))
    return found


def after_attention(m: Any, x: Tensor) -> Tensor:
    y = embedded(m, x)
    y = y + m.c(y, y, y)[0]
    found: Tensor = m.d(torch.nn.functional.layer_norm(y, (4,)))
    return found


def squeezed(m: Any, x: Tensor) -> Tensor:
    """An image whose channels are weighed by a convolution of the whole frame's mean."""
    y = m.a(x)
    found: Tensor = y * m.s(y.mean((2, 3), keepdim=True)).sigmoid()
    return found


def by_rank(m: Any, x: Tensor) -> Tensor:
    y: Tensor = m.d(embedded(m, x).sort(1).values)
    return y


Case = tuple[Callable[[Any, Tensor], Tensor], tuple[int, int], list[int]]
CASES: dict[str, Case] = {
    "flattened": (lambda m, x: m.d(embedded(m, x)), SIZE, list(range(96))),
    "image": (lambda m, x: m.d(m.a(x).permute(0, 2, 3, 1)), SIZE, list(range(96))),
    "sideways": (lambda m, x: m.d(m.a(x).permute(0, 3, 2, 1)), SIZE, [r[x] for x in range(12) for r in RASTER]),
    "clips_inside": (lambda m, x: m.d(embedded(m, x).transpose(0, 1)).transpose(0, 1), SIZE, list(range(96))),
    "windows": (lambda m, x: unfolded(m.d(windows(m, x))), SIZE, of_windows(0)),
    "shifted": (lambda m, x: unfolded(m.d(windows(m, x, 2))), SIZE, of_windows(2)),
    "class_token": (with_class, SIZE, [96, *range(96)]),
    "merged": (merged, (4, 6), list(range(24))),
    "attention": (after_attention, SIZE, list(range(96))),
    "pooled": (lambda m, x: m.d(nn.functional.avg_pool2d(m.a(x), 4).flatten(2).mT), (2, 3), list(range(6))),
    "resized": (lambda m, x: m.d(nn.functional.interpolate(m.a(x), (4, 4)).flatten(2).mT), (4, 4), list(range(16))),
    "gated": (lambda m, x: m.d(embedded(m, x) * embedded(m, x).mean(1, keepdim=True)), SIZE, list(range(96))),
    "squeezed": (lambda m, x: m.d(squeezed(m, x).flatten(2).mT), SIZE, list(range(96))),
    "mean": (lambda m, x: m.d(embedded(m, x).mean(1)), (1, 1), [0]),
    "masked": (lambda m, x: m.d(torch.where(m.weight.flatten() > 0, embedded(m, x), 0.0)), SIZE, list(range(96))),
}


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return Net(
        CASES[name][0], c=attention(), d=nn.Linear(16 if name == "merged" else 4, 5), s=nn.Conv2d(4, 4, 1)
    ).eval()


def tokens_of(model: ResQModel) -> Site:
    return next(site for site in model.layers if site.operator.weight.shape[0] == 5)


@pytest.mark.parametrize("name", CASES)
def test_tokens_lie_where_they_were_cut_out(name: str) -> None:
    model = ResQModel(network(name), torch.rand(1, 3, *SIZE))
    site = tokens_of(model)
    assert (site.tokens.size, site.tokens.index.tolist()) == CASES[name][1:]
    assert site.tokens.known
    assert model.unplaced == []
    assert site.macs == len(CASES[name][2]) * site.operator.weight.numel()


@pytest.mark.parametrize("name", ["flattened", "clips_inside", "windows", "class_token", "attention"])
def test_a_program_places_them_alike(name: str) -> None:
    with torch.no_grad():
        model = ResQModel(exported_here(network(name)), torch.rand(1, 3, *SIZE))
    site = tokens_of(model)
    assert (site.tokens.size, site.tokens.index.tolist()) == CASES[name][1:]


def exported_here(net: nn.Module) -> nn.Module:
    shapes = {"x": {0: torch.export.Dim("clips", min=1, max=64)}}
    module: nn.Module = torch.export.export(net, (torch.rand(2, 3, *SIZE),), dynamic_shapes=shapes).module()
    return module


@pytest.mark.parametrize("name", ["flattened", "sideways", "shifted", "class_token", "merged"])
def test_a_changed_pixel_changes_the_tokens_over_it(name: str) -> None:
    """Of a layer of 1 x 1 pixels and no attention, so that nothing else changes."""
    net: Any = network(name)
    net.a = nn.Conv2d(3, 4, 1)
    model = ResQModel(net, torch.rand(1, 3, *SIZE))
    site, (height, width) = tokens_of(model), tokens_of(model).tokens.size
    entering: list[Tensor] = []
    net.d.register_forward_pre_hook(lambda _, args: entering.append(args[0]))
    x = torch.rand(1, 3, *SIZE)
    for row, column in ((0, 0), (3, 7), (7, 11), (5, 2)):
        changed = x.clone()
        changed[..., row, column] += 1.0
        entering.clear()
        net(x), net(changed)
        before, after = (t.reshape(-1, t.shape[-1]) for t in entering)
        found = torch.nonzero((before != after).any(1))[:, 0].tolist()
        pixel = (row * height // SIZE[0]) * width + column * width // SIZE[1]
        assert found == torch.nonzero(site.tokens.index == pixel)[:, 0].tolist()


@pytest.mark.parametrize("name", ["sideways", "clips_inside", "shifted", "class_token"])
def test_levels_and_costs_of_tokens_equal_a_replay(name: str) -> None:
    config = QuantizationConfig()
    model = wrapped(network(name), size=SIZE, config=config)
    site = tokens_of(model)
    position, layer = model.sites.index(site), model.layers.index(site)
    size, index = CASES[name][1:]
    pixels = size[0] * size[1]
    oracle = Oracle(model, layer, Setting("linear"), "previous", (size, [-1 if i == pixels else i for i in index]))
    compiled = wrapped(network(name), size=SIZE, config=config).compile()
    states, grid = (model.new_state(2), compiled.new_state(2)), (2, 3)
    frames = torch.stack([video(4, 3, SIZE, seed) for seed in range(2)], 1)
    for t, x in enumerate(frames):
        generator = torch.Generator().manual_seed(t)
        field = (
            LevelField(torch.randint(4, (2, len(model.groups), *grid), generator=generator))
            if t == 1
            else ThresholdField(torch.rand(2, len(model.groups), *grid, generator=generator))
        )
        entering: list[Tensor] = []
        hook = model.network.d.register_forward_pre_hook(lambda _, args, kept=entering: kept.append(args[0]))  # type: ignore[union-attr]
        steps = [m.step(x, s, everywhere(2, t == 0), field) for m, s in zip((model, compiled), states, strict=True)]
        hook.remove()
        assert torch.equal(steps[0][0], steps[1][0])
        assert torch.equal(steps[0][1].bops, steps[1][1].bops)
        values = site.arrangement.gathered(entering[0]).numpy()
        y = oracle.keyframe(values) if t == 0 else oracle.residual(values, field)
        assert np.array_equal(states[0].outputs[position].numpy(), y)
        bits = np.full((2, 1, len(index)), 8) if t == 0 else np.array(config.levels)[oracle.levels]
        wanted = np.zeros((2, *grid))
        for clip in range(2):
            for token, place in enumerate(index):
                cost = site.operator.weight.numel() * unit_cost(
                    8 if t == 0 else 4, int(bits[clip, 0, token]), "product"
                )
                if place == pixels:
                    wanted[clip] += cost / 6
                else:
                    wanted[clip, place // size[1] * 2 // size[0], place % size[1] * 3 // size[1]] += cost
        np.testing.assert_allclose(steps[0][1].bops[:, position].numpy(), wanted, rtol=1e-12)


def test_convolutions_of_one_tap_have_places_without_a_linear_layer() -> None:
    model = ResQModel(Net(lambda m, x: m.d(m.a(x).flatten(2)), d=nn.Conv1d(4, 5, 1)).eval(), torch.rand(1, 3, *SIZE))
    assert (tokens_of(model).tokens.size, tokens_of(model).tokens.index.tolist()) == (SIZE, list(range(96)))


def test_tokens_of_no_known_place_share_one_region_and_are_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        model = wrapped(Net(by_rank, d=nn.Linear(4, 5)).eval(), size=SIZE)
    assert model.unplaced == ["d"]
    assert "No place in the frame is known of the tokens of layers d" in caplog.text
    state = model.new_state(1)
    model.step(video(1, 3, SIZE), state, everywhere(1, True), LevelField.constant(0, 1, 2))
    levels = torch.tensor([[[[0, 1, 0], [2, 0, 1]]]]).expand(-1, 2, -1, -1)
    _, cost = model.step(video(2, 3, SIZE)[1:], state, everywhere(1, False), LevelField(levels))
    assert torch.equal(cost.bops[0, 1], torch.full((2, 3), 96 * 20 * 4 * 4 / 6, dtype=torch.float64))
