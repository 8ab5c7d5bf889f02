"""Residual quantization of frozen networks, and the exact cost of running them."""

from resq_rl.quantization.calibration import Reference, SiteRanges
from resq_rl.quantization.config import QuantizationConfig
from resq_rl.quantization.fields import DEFAULT_KAPPA, Field, LevelField, ThresholdField
from resq_rl.quantization.inputs import Inputs, as_tuple, to_float
from resq_rl.quantization.ledger import BopsConvention, FrameCost, bit_cost
from resq_rl.quantization.model import ResQModel
from resq_rl.quantization.operators import LayerKind, ResidualOperator
from resq_rl.quantization.quantizer import AffineQuantizer, SymmetricQuantizer, symmetric_limit
from resq_rl.quantization.ranges import RangeEstimator
from resq_rl.quantization.residual import ResidualTable
from resq_rl.quantization.state import StreamState
from resq_rl.quantization.storage import load_model, save_model
from resq_rl.quantization.weight_bits import choose_residual_weight_bits

__all__ = [
    "DEFAULT_KAPPA",
    "AffineQuantizer",
    "BopsConvention",
    "Field",
    "FrameCost",
    "Inputs",
    "LayerKind",
    "LevelField",
    "QuantizationConfig",
    "RangeEstimator",
    "Reference",
    "ResQModel",
    "ResidualOperator",
    "ResidualTable",
    "SiteRanges",
    "StreamState",
    "SymmetricQuantizer",
    "ThresholdField",
    "as_tuple",
    "bit_cost",
    "choose_residual_weight_bits",
    "load_model",
    "save_model",
    "symmetric_limit",
    "to_float",
]
