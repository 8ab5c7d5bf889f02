import torch

from resq_rl.quantization import FrameCost, LayerSize, mac_cost


def test_all_pairs_of_widths() -> None:
    expected = {  # weight bits, activation bits: product, max, clipped
        (0, 8): (0, 0, 0),
        (8, 0): (0, 0, 0),
        (0, 0): (0, 0, 0),
        (2, 2): (4, 4, 16),
        (4, 2): (8, 16, 16),
        (2, 4): (8, 16, 16),
        (4, 8): (32, 64, 32),
        (8, 2): (16, 64, 32),
        (8, 8): (64, 64, 64),
    }
    for (weight, activation), (product, largest, clipped) in expected.items():
        layer = LayerSize("conv", 1, 1, 1)
        assert mac_cost("product", weight, activation, layer) == product
        assert mac_cost("max", weight, activation, layer) == largest
        assert mac_cost("clipped", weight, activation, layer) == clipped


def test_sums_of_a_cost() -> None:
    bops = torch.arange(2 * 3 * 2 * 2, dtype=torch.float64).reshape(2, 3, 2, 2)
    cost = FrameCost(bops, torch.tensor([True, False]), torch.zeros(2, dtype=torch.float64))
    assert cost.total.tolist() == [sum(range(12)), sum(range(12, 24))]
    assert cost.per_layer.tolist() == [[6, 22, 38], [54, 70, 86]]
    assert cost.per_region.tolist() == [[[12, 15], [18, 21]], [[48, 51], [54, 57]]]
    by_group = cost.per_group(torch.tensor([0, 1, 0]), 2)
    assert by_group[0].tolist() == [[[8, 10], [12, 14]], [[4, 5], [6, 7]]]
