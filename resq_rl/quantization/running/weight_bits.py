"""Choosing the bits of residual weights for each kind of layer, from calibration clips."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from resq_rl.quantization.running.checks import check_clips
from resq_rl.quantization.running.model import ResQModel
from resq_rl.quantization.specification.config import LayerKind
from resq_rl.quantization.specification.fields import LevelField
from resq_rl.quantization.specification.inputs import Inputs, as_tuple, float_frames

__all__ = ["choose_residual_weight_bits"]

CANDIDATES = (4, 5, 6)
FINEST = 8
TOLERANCE = 1.5


def choose_residual_weight_bits(
    model: ResQModel, clips: Sequence[Inputs], *, frames: int = 8, tolerance: float = TOLERANCE
) -> dict[LayerKind, int]:
    """The fewest residual weight bits per layer kind that leave the output nearly as good as 8 bits everywhere.

    Runs the clips in the closed loop at the finest level, so that only weights can err, with one keyframe each.
    Starting from 8 bits, the kinds are lowered to the first of 4, 5 and 6 bits with which the squared error of the
    output against the float network stays below `tolerance` times that of 8 bits everywhere, the kind with the most
    multiply-accumulates first. The model is left with the chosen bits.

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
    limit = tolerance * _error(model, clips, wanted, chosen, frames)
    for kind in sorted(macs, key=lambda k: -macs[k]):
        for bits in CANDIDATES:
            if _error(model, clips, wanted, chosen | {kind: bits}, frames) <= limit:
                chosen[kind] = bits
                break
    model.set_residual_weight_bits(chosen)
    return chosen


def _outputs(model: ResQModel, clip: Inputs, frames: int) -> list[Tensor]:
    return [_flat(model.float_forward(inputs)) for inputs in float_frames(clip, frames, model.device)]


def _error(
    model: ResQModel,
    clips: Sequence[Inputs],
    wanted: Sequence[Sequence[Tensor]],
    bits: dict[LayerKind, int],
    frames: int,
) -> float:
    """Sum of squared errors of the output over residual frames."""
    model.set_residual_weight_bits(bits)
    finest = LevelField.constant(len(model.config.levels) - 1, 1, len(model.groups))
    total = 0.0
    for clip, targets in zip(clips, wanted, strict=True):
        state = model.new_state(1)
        for t, inputs in enumerate(float_frames(clip, frames, model.device)):
            refresh = torch.tensor([t == 0])
            output, _ = model.step(inputs, state, refresh, finest)
            if t:
                total += float((_flat(output) - targets[t]).square().sum())
    return total


def _flat(output: Any) -> Tensor:
    """All tensors of an output side by side."""
    if isinstance(output, Tensor):
        return output.flatten().float()
    parts = output.values() if isinstance(output, dict) else output
    return torch.cat([_flat(part) for part in parts])
