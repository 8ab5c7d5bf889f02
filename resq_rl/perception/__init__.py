"""Perception networks: tasks, the shipped networks, loading others, and pretraining."""

from resq_rl.perception.ddrnet import CompactDDRNet, CompactPose
from resq_rl.perception.ddrnet23 import DDRNet23Slim, ddrnet23_slim
from resq_rl.perception.networks import (
    compact_ddrnet,
    compact_pose,
    load_network,
    load_weights,
    save_weights,
    shipped_weights,
)
from resq_rl.perception.pose import Pose, PoseKind
from resq_rl.perception.pretrain import (
    PretrainProgress,
    PretrainReport,
    measure_counts,
    pretrain,
)
from resq_rl.perception.segmentation import OutputKind, Segmentation, class_iou, mean_iou, pixel_accuracy
from resq_rl.perception.task import PretrainSettings, Task, Trainable

__all__ = [
    "CompactDDRNet",
    "CompactPose",
    "DDRNet23Slim",
    "OutputKind",
    "Pose",
    "PoseKind",
    "PretrainProgress",
    "PretrainReport",
    "PretrainSettings",
    "Segmentation",
    "Task",
    "Trainable",
    "class_iou",
    "compact_ddrnet",
    "compact_pose",
    "ddrnet23_slim",
    "load_network",
    "load_weights",
    "mean_iou",
    "measure_counts",
    "pixel_accuracy",
    "pretrain",
    "save_weights",
    "shipped_weights",
]
