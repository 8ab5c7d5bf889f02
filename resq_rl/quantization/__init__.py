"""Residual quantization of frozen networks, and the exact cost of running them."""

from resq_rl.quantization.graph.operators import ResidualOperator
from resq_rl.quantization.quantizers.quantizer import AffineQuantizer, ChannelQuantizer, symmetric_limit
from resq_rl.quantization.quantizers.residual import ResidualTable
from resq_rl.quantization.running.calibration import SiteRanges
from resq_rl.quantization.running.model import ResQModel
from resq_rl.quantization.running.state import StreamState
from resq_rl.quantization.running.storage import load_model, save_model
from resq_rl.quantization.specification.budget import Budget
from resq_rl.quantization.specification.config import LayerKind, QuantizationConfig, RangeEstimator, Reference
from resq_rl.quantization.specification.costs import Convention, CostTable, LayerSize, cost_name, mac_cost
from resq_rl.quantization.specification.fields import DEFAULT_KAPPA, Field, LevelField, ThresholdField
from resq_rl.quantization.specification.inputs import Inputs, as_tuple, to_float
from resq_rl.quantization.specification.ledger import FrameCost

__all__ = [
    "DEFAULT_KAPPA",
    "AffineQuantizer",
    "Budget",
    "ChannelQuantizer",
    "Convention",
    "CostTable",
    "Field",
    "FrameCost",
    "Inputs",
    "LayerKind",
    "LayerSize",
    "LevelField",
    "QuantizationConfig",
    "RangeEstimator",
    "Reference",
    "ResQModel",
    "ResidualOperator",
    "ResidualTable",
    "SiteRanges",
    "StreamState",
    "ThresholdField",
    "as_tuple",
    "cost_name",
    "load_model",
    "mac_cost",
    "save_model",
    "symmetric_limit",
    "to_float",
]
