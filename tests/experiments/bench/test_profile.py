"""The profile of a small network: what it writes, and that its cost table prices frames."""

import copy
import json
from pathlib import Path

import pytest
import torch

from resq_rl.envs import Problem
from resq_rl.experiments.bench.operators import EVERYTHING, NOTHING, OperatorTimes, cost_table, whole_layers
from resq_rl.experiments.cli.app import main
from resq_rl.experiments.config.composition import load_settings
from resq_rl.quantization import CostTable, LevelField, ResQModel, ThresholdField, to_float

SMALL = [
    *("video.train=2", "video.validation=1", "video.test=1", "video.frames=4", "video.size=[32,48]"),
    *("model=compact_ddrnet_untrained", "model.width=8", "quantization.weight_rounding=nearest"),
    *("benchmark.rounds=1", "benchmark.frames=2", "benchmark.compiled=false"),
    *("heuristic.taus=[0.5,1.0]", "tracking=disabled"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("profile")
    assert main(["profile", *SMALL, f"results={place}", f"hydra.run.dir={place}/run"]) == 0
    return place / "run"


def test_the_profile_holds_every_operator_and_method(folder: Path) -> None:
    profile = json.loads((folder / "profile.json").read_text())
    assert {row["method"] for row in profile["methods"]} == {"static_resq", "dynamic_resq"}
    for row in profile["methods"]:
        assert row["ms"] > 0
        assert row["worst_ms"] >= row["ms"]
        assert row["predicted_over_measured"] == pytest.approx(row["predicted_ms"] / row["ms"])
    for operator in profile["operators"]:
        assert min(operator["float32"], operator["dense"], operator["skipped"]) > 0
        shares = [share for share, _ in operator["active"]]
        assert shares == sorted(shares, reverse=True)
        assert all(0 <= share <= 1 for share in shares)


def test_the_table_is_taken_as_a_cost(folder: Path) -> None:
    cost = load_settings("compare", [f"quantization.bops_convention={folder / 'cost.yaml'}"]).quantization.config().cost
    assert isinstance(cost, CostTable)
    assert cost.name == "measured"
    assert cost.tile == (8, 8)
    assert cost.operator > 0


def test_a_table_predicts_what_its_times_say(problem: Problem) -> None:
    """Everything active: the sum of all dense times; nothing active: of all skipped ones; and the rest of a frame."""
    model, rest = problem.model, 0.5
    times = [
        OperatorTimes(site.name, site.layer_kind, site.macs, 1.0, 0.02 + 3e-6 * site.macs, 0.02, [])
        for site in model.layers
    ]
    priced = model.priced(cost_table(times, rest + sum(t.skipped for t in times), "a machine"))
    frames = [to_float(problem.clips[0].frames[t : t + 1]) for t in (0, 1)]
    state, every = priced.new_state(1), torch.ones(1, dtype=torch.bool)

    def milliseconds(tau: float, frame: int) -> float:
        field = ThresholdField.constant(tau, 1, len(model.groups))
        _, cost = priced.step(frames[frame], state, every if state.age[0] < 0 else ~every, field)
        return float(cost.total) / 1e6

    milliseconds(EVERYTHING, 0)
    assert milliseconds(EVERYTHING, 1) == pytest.approx(rest + sum(t.dense for t in times))
    assert milliseconds(NOTHING, 0) == pytest.approx(rest + sum(t.skipped for t in times))


def test_what_active_tiles_cost_is_fitted_to_all_shares() -> None:
    """By hand: (1 * 2 + 0.5 * 3) / (1 + 0.25) = 2.8 ms for a million multiply-accumulates; no less than nothing."""
    own = OperatorTimes("layer", "conv", 1_000_000, 1.0, 2.1, 0.1, [(0.5, 3.1)])
    assert cost_table([own], 1.0, "a machine").macs["conv"][16][16] == pytest.approx(2.8)
    faster = OperatorTimes("layer", "conv", 1_000_000, 1.0, 0.1, 0.2, [])
    assert cost_table([faster], 1.0, "a machine").macs["conv"][16][16] == 0.0


def test_a_model_under_another_cost_is_as_one_made_with_it(problem: Problem) -> None:
    model = problem.model
    frames = [to_float(problem.clips[0].frames[t : t + 1]) for t in (0, 1)]
    every, field = torch.ones(1, dtype=torch.bool), ThresholdField.constant(0.7, 1, len(model.groups))

    def stepped(one: ResQModel) -> tuple[torch.Tensor, float]:
        state = one.new_state(1)
        one.step(frames[0], state, every, field)
        output, cost = one.step(frames[1], state, ~every, field)
        return output, float(cost.total)

    output, cost = stepped(model)
    other, squared = stepped(model.priced("max"))
    assert torch.equal(output, other)
    assert squared != cost
    assert stepped(model)[1] == cost  # which it left alone
    assert stepped(model.priced("max").priced("product"))[1] == cost


def test_what_is_set_on_a_model_under_another_cost_leaves_the_first_alone(problem: Problem) -> None:
    model, frames = copy.deepcopy(problem.model), to_float(problem.clips[0].frames[:1])
    every, field = torch.ones(1, dtype=torch.bool), LevelField.constant(2, 1, len(problem.model.groups))

    def spent(one: ResQModel) -> tuple[torch.Tensor, float]:
        state = one.new_state(1)
        one.step(frames, state, every, field)
        output, cost = one.step(1 - frames, state, ~every, field)
        return output, float(cost.total)

    output, cost = spent(model)
    other = model.priced("product")
    other.set_residual_weight_bits(8)
    assert spent(other)[1] == 2 * cost  # of 4 bits before
    again, still = spent(model.compile())  # which makes its plans anew
    assert still == cost
    assert torch.equal(again, output)


def test_whole_layers_give_the_same_numbers(problem: Problem) -> None:
    model = problem.model.priced("product").compile()
    skipping = getattr(model.kernels, "skipping", None)
    with whole_layers(model):
        assert skipping is None or not skipping.enabled
    assert skipping is None or skipping.enabled
