import copy

import pytest
import torch
from torch import fx, nn

from resq_rl.errors import NetworkError
from resq_rl.perception import CompactDDRNet


def macs(network: nn.Module, height: int, width: int) -> dict[str, int]:
    """Multiply-accumulates of each top-level child, from the shapes that the convolutions see."""
    found: dict[str, int] = {}

    def count(name: str) -> object:
        def hook(module: nn.Conv2d, _: object, output: torch.Tensor) -> None:
            taps = module.weight[0].numel()
            group = name.split(".")[0]
            found[group] = found.get(group, 0) + output[0].numel() * taps

        return hook

    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count(name))  # type: ignore[arg-type]
    network.eval()(torch.rand(1, 3, height, width))
    return found


def test_macs_equal_a_hand_count() -> None:
    half, quarter, eighth, sixteenth, pooled = 48 * 80, 24 * 40, 12 * 20, 6 * 10, 3 * 5
    hand = {
        "stem": half * 9 * 3 * 16 + quarter * 9 * 16 * 32,
        "shared": quarter * 2 * 9 * 32 * 32,
        "semantic": eighth * (9 * 32 * 64 + 9 * 64 * 64 + 32 * 64)  # block to 1/8
        + eighth * 9 * 32 * 64  # detail to 1/8
        + sixteenth * (9 * 64 * 128 + 9 * 128 * 128 + 64 * 128)  # block to 1/16
        + eighth * 9 * 32 * 64
        + sixteenth * 9 * 64 * 128,  # detail to 1/16
        "detail": quarter * 4 * 9 * 32 * 32 + eighth * 64 * 32,
        "context": (sixteenth + pooled + 1) * 128 * 64 + sixteenth * (9 * 64 * 64 + 64 * 32),
        "head": quarter * (9 * 32 * 32 + 32 * 6),
    }
    assert macs(CompactDDRNet(), 96, 160) == hand
    assert sum(hand.values()) == 112_443_392


def test_size_is_in_the_range_of_its_class() -> None:
    parameters = sum(p.numel() for p in CompactDDRNet().parameters())
    assert parameters == 535_446
    assert 300_000 <= parameters <= 1_000_000


def test_top_level_children_are_the_stages_in_order_of_execution() -> None:
    network = CompactDDRNet().eval()
    assert [n for n, _ in network.named_children()] == [
        "stem", "shared", "semantic", "detail", "context", "head",
    ]  # fmt: skip
    started: list[str] = []

    def note(group: str) -> None:
        started.append(group)

    for group, child in network.named_children():
        for module in child.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_pre_hook(lambda *_, group=group: note(group))
    network(torch.rand(1, 3, 32, 32))
    assert list(dict.fromkeys(started)) == [n for n, _ in network.named_children()]


def test_every_layer_is_used_once_and_none_is_in_place() -> None:
    network, calls = CompactDDRNet().eval(), dict[str, int]()
    for name, module in network.named_modules():
        assert not getattr(module, "inplace", False)
        if not list(module.children()):
            module.register_forward_hook(lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1}))
    network(torch.rand(1, 3, 32, 32))
    leaves = {name for name, module in network.named_modules() if not list(module.children())}
    assert calls == dict.fromkeys(leaves, 1)


@pytest.mark.parametrize("size", [(96, 160), (97, 33), (16, 16), (7, 5), (1, 1), (120, 88)])
def test_output_has_the_size_of_the_frame(size: tuple[int, int]) -> None:
    logits = CompactDDRNet(classes=4, width=8).eval()(torch.rand(2, 3, *size))
    assert logits.shape == (2, 4, *size)
    assert logits.isfinite().all()


def test_frames_of_a_batch_do_not_touch_each_other() -> None:
    network, frames = CompactDDRNet(width=16).eval(), torch.rand(3, 3, 48, 64)
    with torch.no_grad():
        together = network(frames)
        alone = torch.cat([network(frame[None]) for frame in frames])
    assert torch.allclose(together, alone, atol=1e-5)


def test_input_stays_as_it_was() -> None:
    frames = torch.rand(1, 3, 32, 32)
    before = frames.clone()
    CompactDDRNet(width=8).eval()(frames)
    assert torch.equal(frames, before)


def test_every_parameter_gets_a_gradient() -> None:
    network = CompactDDRNet(width=8).train()
    network(torch.rand(2, 3, 32, 32)).square().mean().backward()
    without = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # A BatchNorm takes away what the whole-frame branch's two pooled pixels share, but not all of it.
    assert without == []


def test_output_depends_on_the_whole_frame() -> None:
    network = CompactDDRNet(width=8).eval()
    frames = torch.rand(1, 3, 96, 160, requires_grad=True)
    network(frames)[0, :, 0, 0].sum().backward()
    assert frames.grad is not None
    assert frames.grad[..., -8:, -8:].abs().sum() > 0


def test_every_norm_directly_follows_its_convolution() -> None:
    network = CompactDDRNet(width=8).eval()
    graph = fx.symbolic_trace(copy.deepcopy(network)).graph
    norms = [n for n in graph.nodes if str(n.target).endswith(".norm")]
    assert len(norms) == sum(isinstance(m, nn.BatchNorm2d) for m in network.modules())
    for node in norms:
        source = node.args[0]
        assert isinstance(network.get_submodule(source.target), nn.Conv2d)
        assert len(source.users) == 1


@pytest.mark.parametrize(("classes", "width"), [(1, 32), (256, 32), (6, 6), (6, 9)])
def test_settings_out_of_range_are_refused(classes: int, width: int) -> None:
    with pytest.raises(NetworkError, match=r"CompactDDRNet: (classes|width) must be"):
        CompactDDRNet(classes, width)
