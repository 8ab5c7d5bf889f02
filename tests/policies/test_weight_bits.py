"""The bits of residual weights, chosen by layer for divergence and cost."""

from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from resq_rl.envs import Problem
from resq_rl.policies import choose_weight_bits
from resq_rl.policies.weight_bits import WIDTHS, _units, _walked
from resq_rl.quantization import QuantizationConfig, Reference
from tests.envs.problems import make_problem, tiny_network


def problem_of(network: nn.Module | None = None, **settings: Any) -> Problem:
    """Clips of 6 frames, and a model that a test may change."""
    return make_problem((6,) * 3, network=network, config=QuantizationConfig(**settings))


def test_every_layer_gets_bits_and_a_seed_the_same_again() -> None:
    problem = problem_of()
    chosen = choose_weight_bits(problem)
    assert list(chosen) == [operator.name for operator in problem.model.operators]
    assert set(chosen.values()) <= set(WIDTHS)
    assert problem.model.config.residual_weight_bits == chosen
    for operator in problem.model.operators:
        largest = float(problem.model.integer_weights(operator, residual=True)[0].abs().max())
        assert largest <= 2 ** (chosen[operator.name] - 1) - 1
    assert choose_weight_bits(problem) == chosen


@pytest.mark.parametrize(("reference", "interval"), [("previous", 3), ("keyframe", 0)])
def test_the_references_and_keyframes_that_policies_run_with(reference: Reference, interval: int) -> None:
    chosen = choose_weight_bits(problem_of(), interval=interval, reference=reference, kappa=(1.0, 2.0, 6.0))
    assert set(chosen.values()) <= set(WIDTHS)


def test_weights_that_2_bits_hold_exactly_get_2_bits() -> None:
    network = tiny_network()
    with torch.no_grad():
        for weight in (p for p in network.parameters() if p.dim() == 4):
            weight.copy_(torch.where(weight > 0, 0.25, -0.25))
    chosen = choose_weight_bits(problem_of(network, weight_rounding="nearest"))
    assert set(chosen.values()) == {2}


def test_bits_that_save_nothing_are_not_taken_away() -> None:
    """Under "clipped" 2 bits cost what 4 do, and err more."""
    chosen = choose_weight_bits(problem_of(bops_convention="clipped"))
    assert min(chosen.values()) >= 4


def test_residual_weights_are_no_wider_than_those_of_keyframes() -> None:
    assert max(choose_weight_bits(problem_of(key_weight_bits=4)).values()) <= 4


def test_small_layers_of_a_kind_share_a_width(unchecked_types: None) -> None:
    """Of 100 multiply-accumulates, layers of 1 are small, and go with those of their kind."""
    sites = [
        ("a", "conv", 49),
        ("b", "pointwise", 48),
        ("c", "pointwise", 1),
        ("d", "pointwise", 1),
        ("e", "linear", 1),
    ]
    model: Any = SimpleNamespace(layers=[SimpleNamespace(name=n, layer_kind=k, macs=m) for n, k, m in sites])
    assert _units(model) == [["a"], ["b"], ["c", "d"], ["e"]]


def test_layers_are_walked_to_the_least_loss() -> None:
    """Losses that are a sum over layers, each with one valley, have the minimum that trying all choices finds."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        valley = torch.rand(3, generator=generator) * 10

        def loss(bits: tuple[int, ...], valley: torch.Tensor = valley) -> float:
            return float((torch.tensor(bits) - valley).square().sum())

        for begun in WIDTHS:
            chosen: tuple[int, ...] = (begun,) * 3
            for layer in range(3):
                chosen = _walked(chosen, layer, WIDTHS, loss)
            assert loss(chosen) == min(map(loss, product(WIDTHS, repeat=3)))
