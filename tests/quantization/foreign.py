"""Networks with attention that nobody here wrote, as they come from `transformers`, small and with random weights."""

from typing import Any

import torch
from torch import Tensor, nn

SIZE = (32, 32)


class DinoWithHead(nn.Module):
    """DINOv2 and a linear head over its patches."""

    def __init__(self, transformers: Any) -> None:
        super().__init__()
        config = transformers.Dinov2Config(
            hidden_size=24, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=32, patch_size=8
        )
        self.backbone = transformers.Dinov2Model(config)
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.backbone(x).last_hidden_state[:, 1:])
        places: Tensor = y.transpose(1, 2).unflatten(2, (4, 4))
        return places


def segformer(transformers: Any) -> Any:
    return transformers.SegformerForSemanticSegmentation(
        transformers.SegformerConfig(
            depths=[1, 1, 1, 1],
            hidden_sizes=[8, 8, 16, 16],
            num_attention_heads=[1, 1, 2, 2],
            decoder_hidden_size=16,
            num_labels=3,
        )
    )


def dpt(transformers: Any) -> Any:
    return transformers.DPTForDepthEstimation(
        transformers.DPTConfig(
            hidden_size=24,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=32,
            patch_size=8,
            backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[8, 8, 16, 16],
            fusion_hidden_size=8,
            is_hybrid=False,
        )
    )


def vitpose(transformers: Any) -> Any:
    backbone = transformers.VitPoseBackboneConfig(
        image_size=[32, 32], patch_size=[8, 8], hidden_size=24, num_hidden_layers=2, num_attention_heads=2, num_labels=5
    )
    config = transformers.VitPoseConfig(backbone_config=backbone, num_labels=5, use_simple_decoder=True)
    return transformers.VitPoseForPoseEstimation(config)


def upernet(transformers: Any) -> Any:
    backbone = transformers.SwinConfig(
        image_size=32,
        patch_size=2,
        embed_dim=8,
        depths=[2, 2, 2],
        num_heads=[1, 1, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3"],
    )
    return transformers.UperNetForSemanticSegmentation(
        transformers.UperNetConfig(
            backbone_config=backbone,
            hidden_size=16,
            pool_scales=[1, 2],
            auxiliary_channels=8,
            auxiliary_in_channels=32,
            num_labels=3,
        )
    )


def yolos(transformers: Any) -> Any:
    return transformers.YolosForObjectDetection(
        transformers.YolosConfig(
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=[32, 32],
            patch_size=8,
            num_detection_tokens=4,
            use_mid_position_embeddings=False,
            num_labels=3,
        )
    )


NETWORKS = {
    "SegFormer": segformer,
    "DPT": dpt,
    "DINOv2": DinoWithHead,
    "ViTPose": vitpose,
    "Swin + UPerNet": upernet,
    "YOLOS": yolos,
}


def made(name: str, transformers: Any) -> nn.Module:
    """The same network every time, with weights large enough that attention is not uniform."""
    torch.manual_seed(0)
    network: nn.Module = NETWORKS[name](transformers).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5)
    return network
