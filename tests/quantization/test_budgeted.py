"""Frames under a limit: never exceeded, filled as far as it goes, and the same whoever else is in the batch."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from resq_rl.errors import PolicyError, SettingsError
from resq_rl.quantization import Budget, Field, FrameCost, LevelField, QuantizationConfig, ResQModel, ThresholdField
from resq_rl.quantization.kernels import PLAIN, Choice, native
from resq_rl.quantization.kernels.plain import FLOORS, Allowance
from resq_rl.quantization.quantizers.residual import threshold_row
from resq_rl.quantization.specification.budget import ROUNDING, exceeds
from tests.quantization.corpus import ACCEPTED, Net, spatial_attention
from tests.quantization.networks import byte_clips, everywhere, wrapped
from tests.quantization.test_kernels import Network

SIZE = (16, 24)
LAYOUTS = (torch.contiguous_format, torch.channels_last)
UNEVEN = {
    "name": "uneven",
    "source": "made up",
    "macs": {"any": {4: {2: 3.3, 4: 5.1, 8: 7.7}, 8: {8: 64.0}}},
    "tile": [2, 3],
    "operator": 100.0,
    "frame": 50.0,
}


@pytest.fixture(autouse=True)
def _unchecked(unchecked_types: None) -> None:
    """Models step hundreds of times here."""


def small_model(cost: Any = "product", **config: Any) -> ResQModel:
    """A network with one operator of each kind, of random weights that are always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Network().eval()
    model = ResQModel(network, torch.zeros(1, 3, *SIZE), QuantizationConfig(bops_convention=cost, **config))
    return model.calibrate(byte_clips(2, 6, 3, SIZE), interval=3)


@pytest.fixture(scope="module")
def model() -> ResQModel:
    return small_model()


def frames(model: ResQModel, count: int, clips: int, seed: int = 0) -> list[Tensor]:
    made = byte_clips(clips, count, model.input_shapes[0][0], model.frame_size, seed=seed)
    return [torch.stack([clip[t] for clip in made]).float() / 255 for t in range(count)]


def random_field(model: ResQModel, clips: int, generator: torch.Generator) -> Field:
    """Levels or thresholds by clip, group or layer, and region, some of them 0 or infinite."""
    rows = [len(model.groups), len(model.sites)][int(torch.randint(2, (1,), generator=generator))]
    shape = (clips, rows, 2, 3)
    if int(torch.randint(2, (1,), generator=generator)):
        return LevelField(torch.randint(len(model.config.levels), shape, generator=generator))
    values = torch.tensor([0.0, 0.05, 0.3, 1.0, 4.0, torch.inf])
    return ThresholdField(values[torch.randint(len(values), shape, generator=generator)])


def run(
    model: ResQModel, inputs: list[Tensor], decide: Callable[[int], tuple[Tensor, Field]], limits: list[Tensor | None]
) -> tuple[list[Tensor], list[FrameCost]]:
    """Outputs and costs of all frames."""
    state, outputs, costs = model.new_state(len(inputs[0])), [], []
    for t, (x, limit) in enumerate(zip(inputs, limits, strict=True)):
        refresh, field = decide(t)
        y, cost = model.step(x, state, refresh, field, limit)
        outputs.append(y.clone())
        costs.append(cost)
    return outputs, costs


@pytest.mark.parametrize("cost", ["product", "max", "clipped", "int8_skip", "roofline", UNEVEN])
def test_no_frame_exceeds_its_limit_whatever_is_decided(cost: Any) -> None:
    model = small_model(cost, residual_weight_bits=4 if cost != "int8_skip" else 8).compile()
    generator, clips, length = torch.Generator().manual_seed(1), 3, 8
    whole, least = model.layer_costs.keyframe, model.layer_costs.least
    limits: list[Tensor | None] = []
    for _ in range(length):
        drawn = torch.rand(clips, generator=generator, dtype=torch.float64) ** 3
        drawn[0] = 0.0  # exactly the least
        limits.append(least + drawn * (1.1 * whole - least))
    decided = [(torch.rand(clips, generator=generator) < 0.2, random_field(model, clips, generator)) for _ in limits]
    decided[0] = everywhere(clips, True), decided[0][1]
    inputs = frames(model, length, clips)
    outputs, costs = run(model, inputs, lambda t: decided[t], limits)
    for t, (limit, spent) in enumerate(zip(limits, costs, strict=True)):
        assert limit is not None
        assert not exceeds(spent.total, limit).any(), t
        assert torch.equal(spent.keyframe, decided[t][0] & (limit >= whole))
    for clip in range(clips):  # nobody else matters
        index = torch.tensor([clip])
        own = [None if limit is None else limit[index] for limit in limits]
        chosen = [(refresh[index], field.rows(index)) for refresh, field in decided]
        alone, alone_costs = run(model, [x[index] for x in inputs], chosen.__getitem__, own)
        for t in range(length):
            assert torch.equal(alone[t][0], outputs[t][clip]), (t, clip)
            assert torch.equal(alone_costs[t].bops[0], costs[t].bops[clip]), (t, clip)


def test_compiled_and_plain_kernels_give_the_same_frames() -> None:
    generator, clips, length = torch.Generator().manual_seed(2), 2, 8
    plain, compiled = small_model(), small_model().compile()
    limits: list[Tensor | None] = [torch.tensor([0.1, 0.03], dtype=torch.float64) * plain.reference_bops()] * length
    field = [ThresholdField(torch.rand(clips, 1, 2, 3, generator=generator).expand(-1, len(plain.groups), -1, -1))]
    inputs = frames(plain, length, clips)
    found = [run(m, inputs, lambda t: (everywhere(2, t == 0), field[0]), limits) for m in (plain, compiled)]
    for t in range(length):
        assert torch.equal(found[0][0][t], found[1][0][t]), t
        assert torch.equal(found[0][1][t].bops, found[1][1][t].bops), t


def test_an_ample_limit_changes_nothing(model: ResQModel) -> None:
    generator, clips, length = torch.Generator().manual_seed(3), 3, 6
    decided = [(everywhere(clips, t in (0, 4)), random_field(model, clips, generator)) for t in range(length)]
    inputs, ample = frames(model, length, clips), torch.full((clips,), model.layer_costs.keyframe)
    free = run(model, inputs, lambda t: decided[t], [None] * length)
    limited = run(model, inputs, lambda t: decided[t], [ample.double()] * length)
    for t in range(length):
        assert torch.equal(free[0][t], limited[0][t]), t
        assert torch.equal(free[1][t].bops, limited[1][t].bops), t
        assert torch.equal(free[1][t].elementwise, limited[1][t].elementwise), t


def test_a_stream_without_a_keyframe_is_refined_until_it_is_as_good_as_its_weights() -> None:
    """Residuals of a frame that stands still add up to its input; 8-bit weights then do as a keyframe does."""
    model = wrapped(Net(lambda m, x: m.b(torch.relu(m.a(x)))).eval(), config=QuantizationConfig(residual_weight_bits=8))
    x, length = frames(model, 1, 1)[0], 12
    limit = torch.tensor([0.3 * model.reference_bops()], dtype=torch.float64)
    finest = ThresholdField.constant(0.02, 1, len(model.groups))
    outputs, costs = run(model, [x] * length, lambda t: (everywhere(1, t == 0), finest), [limit] * length)
    wanted, keyframe = model.float_forward(x), run(model, [x], lambda _: (everywhere(1, True), finest), [None])[0][0]
    errors = [float((y - wanted).norm() / wanted.norm()) for y in (*outputs, keyframe)]
    assert errors[0] > 0.05
    assert errors[-2] < 2 * errors[-1], errors
    assert not any(bool(cost.keyframe.any()) for cost in costs)


def test_a_keyframe_that_does_not_fit_begins_from_nothing_where_that_is_nearer() -> None:
    """A linear network, whose layers scale alike: a darker frame is nearer to nothing, a similar one is not."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(*(nn.Conv2d(n, m, 3, padding=1, bias=False) for n, m in ((3, 8), (8, 4)))).eval()
    model = ResQModel(network, torch.zeros(1, 3, *SIZE), QuantizationConfig(weight_rounding="nearest"))
    model.calibrate(byte_clips(2, 6, 3, SIZE), interval=3).compile()
    every, field = everywhere(2, True), ThresholdField.constant(1.0, 2, len(model.groups))
    limit = torch.full((2,), model.layer_costs.least + 0.2 * model.layer_costs.keyframe, dtype=torch.float64)
    bright = frames(model, 1, 2)[0]
    after = bright * torch.tensor([0.2, 0.9])[:, None, None, None]
    fresh, fresh_cost = model.step(after, model.new_state(2), every, field, limit)
    state = model.new_state(2)
    before, _ = model.step(bright, state, every, field)
    kept = before.clone()
    found, cost = model.step(after, state, every, field, limit)
    assert torch.equal(before, kept), "what was returned is the caller's"
    assert torch.equal(found[0], fresh[0])
    assert torch.equal(cost.bops[0], fresh_cost.bops[0])
    wanted = model.float_forward(after)
    assert (found[1] - wanted[1]).abs().mean() < 0.5 * (fresh[1] - wanted[1]).abs().mean()


def test_a_limit_is_filled_by_the_finest_thresholds(model: ResQModel) -> None:
    """As far as whole pixels go, which are large here beside the frame."""
    inputs, limit = frames(model, 3, 2), 0.11 * model.reference_bops()
    finest = ThresholdField.constant(0.0, 2, len(model.groups))
    limits: list[Tensor | None] = [torch.full((2,), limit, dtype=torch.float64)] * 3
    _, costs = run(model, inputs, lambda t: (everywhere(2, t == 0), finest), limits)
    for cost in costs:
        assert bool((cost.total > 0.7 * limit).all()), cost.total / limit


def test_levels_are_lowered_under_one_cap_for_the_frame(model: ResQModel) -> None:
    """4 bits everywhere cost a quarter of W8A8 with 4-bit weights, 2 bits an eighth."""
    whole = model.reference_bops()
    levels = LevelField.constant(3, 5, len(model.groups))
    limits = torch.tensor([0.5, 0.4999, 0.25, 0.2, 0.1], dtype=torch.float64) * whole
    state = model.new_state(5)
    inputs = frames(model, 2, 5)
    model.step(inputs[0], state, everywhere(5, True), levels)
    _, cost = model.step(inputs[1], state, everywhere(5, False), levels, limits)
    assert (cost.total / whole).tolist() == [0.5, 0.25, 0.25, 0.125, 0.0]


def test_products_of_activations_are_paid_for_or_refused() -> None:
    model = wrapped(Net(spatial_attention).eval())
    costs, clips = model.layer_costs, 2
    products = sum(cost for site, cost in _product_costs(model))
    assert costs.least == products > 0
    inputs, field = frames(model, 4, clips), ThresholdField.constant(0.0, clips, len(model.groups))
    for share in (0.0, 0.2):
        limit = torch.full((clips,), costs.least + share * (costs.keyframe - costs.least), dtype=torch.float64)
        _, spent = run(model, inputs, lambda t: (everywhere(clips, t == 0), field), [limit] * len(inputs))
        assert not any(bool(exceeds(cost.total, limit).any()) for cost in spent)
    state = model.new_state(clips)
    with pytest.raises(PolicyError, match=r"A limit of at least .* BOPs is needed for each of 2 clips"):
        model.step(inputs[0], state, everywhere(clips, True), field, limit * 0 + 0.99 * products)
    assert not state.inputs  # before anything was computed


@pytest.mark.parametrize(
    "make",
    [
        ACCEPTED["decoder_layer"],
        ACCEPTED["gru"],
        lambda: Net(lambda m, x: m.c(m.a(x).flatten(2)), c=nn.Conv1d(4, 3, 3, padding=1)),
    ],
)
def test_tokens_and_lines_keep_to_a_limit(make: Callable[[], nn.Module]) -> None:
    model = wrapped(make().eval())
    costs, clips = model.layer_costs, 2
    limit = torch.tensor([0.3, 0.06], dtype=torch.float64) * (costs.keyframe - costs.least) + costs.least
    inputs = frames(model, 3, clips)
    for field in (
        ThresholdField.constant(0.0, clips, len(model.groups)),
        LevelField.constant(3, clips, len(model.groups), (2, 2)),
    ):
        _, spent = run(model, inputs, lambda t, own=field: (everywhere(clips, t == 0), own), [limit] * 3)  # type: ignore[misc]
        assert not any(bool(exceeds(cost.total, limit).any()) for cost in spent)
        assert all(bool((cost.total > costs.least).any()) for cost in spent)


def _product_costs(model: ResQModel) -> list[tuple[str, float]]:
    layers = {site.name for site in model.layers}
    return [(site.name, 64.0 * site.macs) for site in model.sites if site.name not in layers]


@given(st.integers(0, 10**6), st.floats(0.0, 1.2), st.sampled_from(LAYOUTS), st.sampled_from([1, 4]))
@settings(max_examples=40, deadline=None)
def test_the_smallest_floor_against_brute_force(
    seed: int, share: float, layout: torch.memory_format, threads: int
) -> None:
    """All floors are tried by which the cost of some pixel changes, and those next to them."""
    generator = torch.Generator().manual_seed(seed)
    clips, channels, h, w = 2, 3, 5, 6
    x, reference = (torch.randn(clips, channels, h, w, generator=generator) for _ in range(2))
    x, reference = x.contiguous(memory_format=layout), reference.contiguous(memory_format=layout)
    tau = torch.rand(clips, h, w, generator=generator)
    coverage = torch.randint(0, 10, (h, w), generator=generator, dtype=torch.int32)
    costs = torch.tensor([7.0, 2.0, 2.0, 4.0], dtype=torch.float64)
    kappa, sigma = (1.0, 2.0, 8.0), 0.37
    steps = torch.rand(4, 4 * (int(threshold_row(FLOORS).max()) + 1), generator=generator)
    left = torch.rand(clips, generator=generator, dtype=torch.float64) * 8 * int(coverage.sum())
    choice = Choice(steps, threshold_row(tau), tau, sigma, kappa)
    magnitude = (x - reference).abs().amax(1).numpy()

    def spent(clip: int, floor: np.float32) -> float:
        bound = np.maximum(tau.numpy()[clip], floor) * np.float32(sigma)
        total = float(costs[0])
        for factor, cost in zip(kappa, costs[1:].tolist(), strict=True):
            total += cost * int(coverage.numpy()[magnitude[clip] > bound * np.float32(factor)].sum())
        return total

    floor, after = torch.zeros(clips), left.clone()
    for clip in range(clips):
        changes = [np.searchsorted(FLOORS.numpy(), magnitude[clip] / (sigma * factor)) for factor in kappa]
        tried = sorted({0, len(FLOORS) - 1} | {int(i) + d for c in changes for i in c.flat for d in range(-2, 3)})
        most = (7.0 + share * float(left[clip])) * (1 + ROUNDING)
        floor[clip] = next(f for f in FLOORS[tried] if spent(clip, f.numpy()) <= most)
        after[clip] -= spent(clip, floor.numpy()[clip]) - 7.0
    moved = reference.clone(memory_format=torch.preserve_format)
    wanted = PLAIN.encode(x, moved, choice.raised(floor, threshold_row(floor)), 0.5)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for kernels in {PLAIN, native()}:
            own, rest = reference.clone(memory_format=torch.preserve_format), left.clone()
            allowance = Allowance(rest, share, costs, coverage, threshold_row(FLOORS))
            found = kernels.encode(x, own, replace(choice, allowance=allowance), 0.5)
            assert torch.equal(rest, after)
            assert torch.equal(own, moved)
            assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    finally:
        torch.set_num_threads(before)


def test_layers_share_what_is_left_by_hand(model: ResQModel) -> None:
    costs = model.layer_costs
    sizes = [
        site.macs * model.config.weight_bits(site.layer_kind, site.name) * 8 for site in model.layers
    ]  # at 8 bits beyond 0
    weights = [size**0.7 * 2 ** (-i / len(sizes)) for i, size in enumerate(sizes)]
    assert costs.share == pytest.approx([own / sum(weights[i:]) for i, own in enumerate(weights)])
    assert costs.share[-1] == 1


def test_the_bucket_by_hand() -> None:
    budget = Budget(peak=0.3, mean=0.1, bucket=4)
    credit = budget.begin(1)
    for spent, limit, after in [(0.3, 0.3, 0.1), (0.0, 0.1, 0.2), (0.0, 0.2, 0.3), (0.0, 0.3, 0.4), (0.0, 0.3, 0.4)]:
        assert float(budget.limit(credit)) == pytest.approx(limit)
        credit = budget.after(credit, torch.tensor([spent], dtype=torch.float64))
        assert float(credit) == pytest.approx(after)
    assert float(budget.left(credit)) == 1.0
    credit = budget.after(credit, torch.tensor([0.3], dtype=torch.float64))
    assert float(budget.left(credit)) == pytest.approx(0.5)
    alone = Budget(peak=0.3)
    assert float(alone.left(alone.after(alone.begin(1), torch.tensor([0.3], dtype=torch.float64)))) == 1.0


def test_how_full_the_bucket_is_by_hand() -> None:
    """It begins with the peak, of a capacity of four frames, and gains one frame's credit with every frame."""
    budget = Budget(peak=0.2, mean=0.1, bucket=4)
    spent = torch.tensor([0.2, 0.0, 0.0, 0.0, 0.2, 0.2], dtype=torch.float64)
    assert budget.filled(spent).tolist() == pytest.approx([0.5, 0.25, 0.5, 0.75, 1.0, 0.75])
    assert Budget(peak=0.5, mean=0.1, bucket=4).filled(spent[:1]).tolist() == [1.0], "no more than the capacity"
    assert Budget(peak=0.5).filled(spent).tolist() == [1.0] * 6


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.floats(1, 9), st.floats(0.01, 1), st.floats(0, 1))
def test_the_mean_holds_over_all_first_frames_and_in_every_window(
    shares: list[float], bucket: float, mean: float, above: float
) -> None:
    peak = mean + above * (1 - mean)
    budget, spent = Budget(peak=peak, mean=mean, bucket=bucket), []
    credit = budget.begin(1)
    for share in shares:
        limit = budget.limit(credit)
        assert float(limit) >= mean * (1 - 1e-9)
        spent.append(share * float(limit))
        credit = budget.after(credit, torch.tensor([spent[-1]], dtype=torch.float64))
    for end in range(1, len(spent) + 1):
        assert sum(spent[:end]) <= (min(peak, bucket * mean) + (end - 1) * mean) * (1 + 1e-9)
        for start in range(end):
            assert sum(spent[start:end]) <= (end - start + bucket - 1) * mean * (1 + 1e-9)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peak": 0.0}, "budget.peak"),
        ({"peak": 0.1, "mean": 0.2}, "no frame may cost more than the peak"),
        ({"mean": 0.1, "bucket": 0.5}, "budget.bucket"),
    ],
)
def test_impossible_budgets_are_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Budget(**values)
