"""Perception networks: the segmentation task, the shipped network, loading others, and pretraining."""

from resq_rl.perception.ddrnet import CompactDDRNet
from resq_rl.perception.networks import (
    compact_ddrnet,
    load_network,
    load_weights,
    save_weights,
    shipped_weights,
)
from resq_rl.perception.pretrain import (
    PretrainProgress,
    PretrainReport,
    PretrainSettings,
    measure_confusion,
    pretrain,
)
from resq_rl.perception.task import OutputKind, Segmentation, class_iou, mean_iou, pixel_accuracy

__all__ = [
    "CompactDDRNet",
    "OutputKind",
    "PretrainProgress",
    "PretrainReport",
    "PretrainSettings",
    "Segmentation",
    "class_iou",
    "compact_ddrnet",
    "load_network",
    "load_weights",
    "mean_iou",
    "measure_confusion",
    "pixel_accuracy",
    "pretrain",
    "save_weights",
    "shipped_weights",
]
