"""Multiply-accumulates of every wrapped network equal half of the flops that torch counts, exactly."""

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from resq_rl.perception import (
    CompactDDRNet,
    CompactPose,
    CompactSegFormer,
    DDRNet23Slim,
    MaskPropagationNet,
    load_network,
)
from resq_rl.quantization import ResQModel
from tests.quantization.corpus import ACCEPTED, REFERENCES, SIZE
from tests.quantization.flops import counted

SHIPPED: dict[str, Callable[[], nn.Module]] = {
    "compact_ddrnet": CompactDDRNet,
    "compact_pose": CompactPose,
    "compact_segformer": CompactSegFormer,
    "ddrnet23_slim": DDRNet23Slim,
}

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*jit.*")


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_network(name: str) -> None:
    frames = torch.rand(1, 3, 32, 64)
    network = SHIPPED[name]().eval()
    assert ResQModel(network, frames).macs == counted(network, frames)


def test_the_shipped_network_with_more_inputs() -> None:
    inputs: tuple[Tensor, ...] = torch.rand(1, 3, 32, 64), torch.rand(1, 1, 32, 64), torch.rand(1, 6, 1, 1)
    network = MaskPropagationNet().eval()
    assert ResQModel(network, inputs).macs == counted(network, *inputs)


# Parametrized weights are products themselves, computed once when the network is wrapped; torch does not count addbmm.
@pytest.mark.parametrize("name", [name for name in ACCEPTED if name not in ("parametrized", "addbmm")])
def test_a_network_of_the_corpus(name: str) -> None:
    frames = torch.rand(1, 3, *SIZE)
    wrapped, reference = ACCEPTED[name](), REFERENCES.get(name, ACCEPTED[name])()
    for network in (wrapped, reference):
        if not isinstance(network, torch.fx.GraphModule):
            network.eval()
    constant = 5 * 15 if name == "gru" else 0  # of the first state, which no frame changes
    assert ResQModel(wrapped, frames).macs == counted(reference, frames) - constant


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("selfie_segmentation", (256, 256)),
        ("pose_landmark_lite", (256, 256)),
        ("movenet_lightning", (192, 192)),
        ("twinlitenet", (360, 640)),
        ("deeplab_cityscapes_as_camvid", (360, 480)),
        ("deeplab_voc_05_person_vehicle", (240, 320)),
    ],
)
def test_a_pretrained_network(name: str, size: tuple[int, int], shared: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = load_network(shared / "models" / f"{name}.pt2")
    frames = torch.rand(1, 3, *size)
    assert ResQModel(network, frames).macs == counted(network, frames)
