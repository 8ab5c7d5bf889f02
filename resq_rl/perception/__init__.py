"""Perception networks: tasks, the shipped networks, loading others, and pretraining."""

from resq_rl.perception.compact_networks import CompactDDRNet, CompactPose, MaskPropagationNet
from resq_rl.perception.compact_segformer import CompactSegFormer
from resq_rl.perception.ddrnet23 import DDRNet23Slim, ddrnet23_slim
from resq_rl.perception.inference import (
    Beginning,
    beginning_of,
    beginning_with,
    clip_inputs,
    degenerate_output,
    example_inputs,
    judged_targets,
    predict_clip,
    recurrent_inputs,
)
from resq_rl.perception.mask_accuracy import contour_accuracy, j_and_f, region_similarity
from resq_rl.perception.mask_propagation import MaskPropagation
from resq_rl.perception.networks import (
    compact_ddrnet,
    compact_pose,
    compact_segformer,
    load_network,
    mask_propagation_net,
    shipped_weights,
)
from resq_rl.perception.normalisation import Normalised
from resq_rl.perception.pose import Pose, PoseKind
from resq_rl.perception.pretrain import (
    PretrainProgress,
    PretrainReport,
    measure_counts,
    pretrain,
)
from resq_rl.perception.segmentation import OutputKind, Segmentation, class_iou, mean_iou
from resq_rl.perception.task import PretrainSettings, Recurrent, Task, Trainable
from resq_rl.perception.weight_files import load_weights, save_weights

__all__ = [
    "Beginning",
    "CompactDDRNet",
    "CompactPose",
    "CompactSegFormer",
    "DDRNet23Slim",
    "MaskPropagation",
    "MaskPropagationNet",
    "Normalised",
    "OutputKind",
    "Pose",
    "PoseKind",
    "PretrainProgress",
    "PretrainReport",
    "PretrainSettings",
    "Recurrent",
    "Segmentation",
    "Task",
    "Trainable",
    "beginning_of",
    "beginning_with",
    "class_iou",
    "clip_inputs",
    "compact_ddrnet",
    "compact_pose",
    "compact_segformer",
    "contour_accuracy",
    "ddrnet23_slim",
    "degenerate_output",
    "example_inputs",
    "j_and_f",
    "judged_targets",
    "load_network",
    "load_weights",
    "mask_propagation_net",
    "mean_iou",
    "measure_counts",
    "predict_clip",
    "pretrain",
    "recurrent_inputs",
    "region_similarity",
    "save_weights",
    "shipped_weights",
]
