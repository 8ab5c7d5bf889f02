"""Choosing the bits of residual weights for each kind of layer, from calibration clips."""

from collections.abc import Sequence

import torch
from jaxtyping import Float64
from torch import Tensor

from resq_rl.quantization.graph.outputs import tensors_of
from resq_rl.quantization.running.checks import check_clips
from resq_rl.quantization.running.model import ResQModel
from resq_rl.quantization.specification.config import LayerKind
from resq_rl.quantization.specification.fields import LevelField
from resq_rl.quantization.specification.inputs import Inputs, as_tuple, float_frames

__all__ = ["choose_residual_weight_bits"]

CANDIDATES = (4, 5, 6)
FINEST = 8
TOLERANCE = 1.5
LEAST = 1e-30


def choose_residual_weight_bits(
    model: ResQModel, clips: Sequence[Inputs], *, frames: int = 8, tolerance: float = TOLERANCE
) -> dict[LayerKind, int]:
    """The fewest residual weight bits per layer kind that leave the output nearly as good as 8 bits everywhere.

    Runs the clips in the closed loop at the finest level, so that only weights can err, with one keyframe each.
    Starting from 8 bits, the kinds are lowered to the first of 4, 5 and 6 bits with which the squared error of the
    output against the float network stays below `tolerance` times that of 8 bits everywhere, the kind with the most
    multiply-accumulates first. Of several outputs the geometric mean of their growths counts, so that an output of
    large values does not outweigh the others. The model is left with the chosen bits.

    Args:
        model: a calibrated model.
        clips: calibration clips, as `ResQModel.calibrate` takes them.
        frames: frames used of each clip.
        tolerance: largest growth of the squared error.

    Raises:
        CalibrationError: no clip has two frames, or they do not fit the network.
    """
    check_clips([tuple(part[:frames] for part in as_tuple(clip)) for clip in clips], model.input_shapes)
    macs: dict[LayerKind, int] = {}
    for site in model.layers:
        kind = site.layer_kind
        macs[kind] = macs.get(kind, 0) + site.macs
    chosen: dict[LayerKind, int] = dict.fromkeys(macs, FINEST)
    wanted = [_outputs(model, clip, frames) for clip in clips]
    finest = _errors(model, clips, wanted, chosen, frames)
    for kind in sorted(macs, key=lambda k: -macs[k]):
        for bits in CANDIDATES:
            growth = _errors(model, clips, wanted, chosen | {kind: bits}, frames) / finest
            if float(growth.log().mean().exp()) <= tolerance:
                chosen[kind] = bits
                break
    model.set_residual_weight_bits(chosen)
    return chosen


def _outputs(model: ResQModel, clip: Inputs, frames: int) -> list[list[Tensor]]:
    """The float network's outputs for each frame."""
    return [list(tensors_of(model.float_forward(inputs))) for inputs in float_frames(clip, frames, model.device)]


def _errors(
    model: ResQModel,
    clips: Sequence[Inputs],
    wanted: Sequence[Sequence[Sequence[Tensor]]],
    bits: dict[LayerKind, int],
    frames: int,
) -> Float64[Tensor, " outputs"]:
    """Squared error of each output, summed over residual frames, and a little, so that it is above 0."""
    model.set_residual_weight_bits(bits)
    finest = LevelField.constant(len(model.config.levels) - 1, 1, len(model.groups))
    total = torch.full((len(wanted[0][0]),), LEAST, dtype=torch.float64)
    for clip, targets in zip(clips, wanted, strict=True):
        state = model.new_state(1)
        for t, inputs in enumerate(float_frames(clip, frames, model.device)):
            output, _ = model.step(inputs, state, torch.tensor([t == 0]), finest)
            if t:
                pairs = zip(tensors_of(output), targets[t], strict=True)
                total += torch.tensor([_squared(found, target) for found, target in pairs])
    return total


def _squared(found: Tensor, target: Tensor) -> float:
    return float((found.double() - target.double()).square().sum())
