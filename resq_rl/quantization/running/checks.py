"""Checks of the clips, decisions and frames that callers give to a model."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from resq_rl.errors import CalibrationError, PolicyError, VideoError
from resq_rl.quantization.running.state import StreamState
from resq_rl.quantization.specification.fields import Field, LevelField
from resq_rl.quantization.specification.inputs import Inputs, as_tuple

__all__ = ["check_clips", "check_decision", "check_inputs"]


def check_clips(clips: Sequence[Inputs], shapes: Sequence[tuple[int, ...]]) -> None:
    """Raise CalibrationError unless the clips are uint8 tensors for inputs of `shapes` and one has two frames."""
    parts = [as_tuple(clip) for clip in clips]
    if not any(len(own[0]) > 1 for own in parts):
        raise CalibrationError(
            f"Calibration needs at least one clip with two frames, got {len(clips)} clips of "
            f"{sorted({len(own[0]) for own in parts})} frames."
        )
    for i, own in enumerate(parts):
        fits = [tuple(part.shape[1:]) for part in own] == list(shapes) and len({len(part) for part in own}) == 1
        if not fits or any(part.dtype != torch.uint8 for part in own):
            raise CalibrationError(
                f"Calibration clip {i} holds {_described(own)}; the model was wrapped for uint8 frames of "
                f"{_listed(shapes)}."
            )


def check_decision(
    decision: Field, refresh: Tensor, state: StreamState, clips: int, groups: int, layers: int, levels: int
) -> None:
    """Raise PolicyError unless decisions, refreshes and state fit a batch of clips."""
    values = decision.levels if isinstance(decision, LevelField) else decision.thresholds
    fits = values.dim() == 4 and values.numel() and len(values) == clips and values.shape[1] in (groups, layers)
    if not fits or refresh.shape != (clips,) or refresh.dtype != torch.bool:
        raise PolicyError(
            f"A field of shape ({clips} clips, {groups} layer groups or {layers} layers, rows, columns) is needed and "
            f"one boolean for each clip, got a field of shape {tuple(values.shape)} and refresh of shape "
            f"{tuple(refresh.shape)}, {refresh.dtype}."
        )
    if isinstance(decision, LevelField):
        if values.is_floating_point() or values.dtype == torch.bool:
            raise PolicyError(f"Levels must be whole numbers, indices of bit-widths, got {values.dtype}.")
        if int(values.min()) < 0 or int(values.max()) >= levels:
            raise PolicyError(f"Levels must be 0 to {levels - 1}, got {int(values.min())} to {int(values.max())}.")
    elif len(decision.kappa) != levels - 1 or bool((~(values >= 0)).any()):
        raise PolicyError("Thresholds must be 0 or more, with one kappa for each level above the first.")
    if len(state.age) != clips:
        raise PolicyError(f"The state holds {len(state.age)} clips, the batch {clips}.")
    if bool(((state.age < 0) & ~refresh).any()):
        raise PolicyError("A clip without a keyframe cannot run a residual frame: refresh it first.")


def check_inputs(inputs: tuple[Tensor, ...], shapes: Sequence[tuple[int, ...]]) -> None:
    """Raise VideoError unless the inputs are finite, of `shapes` and of one number of clips."""
    fits = [tuple(part.shape[1:]) for part in inputs] == list(shapes) and len({len(part) for part in inputs}) == 1
    if not fits or not all(part.is_floating_point() for part in inputs):
        wanted = " and ".join(f"(clips, {', '.join(map(str, shape))})" for shape in shapes)
        raise VideoError(
            f"Frames must be float of shape {wanted}, as the example was, got {_described(inputs)}. Use to_float for "
            "uint8 frames."
        )
    for part in inputs:
        if not math.isfinite(float(part.sum())):  # a sum shows NaN and infinity at a tenth of isfinite's cost
            bad = torch.nonzero(~torch.isfinite(part).flatten(1).all(1))[:, 0].tolist()
            if bad:  # else the sum alone was too large
                raise VideoError(f"The frames of clips {bad} hold NaN or infinity. Repair or drop these frames.")


def _described(parts: Sequence[Tensor]) -> str:
    return " and ".join(f"{part.dtype} of shape {tuple(part.shape)}" for part in parts)


def _listed(shapes: Sequence[tuple[int, ...]]) -> str:
    return " and ".join(str(shape) for shape in shapes)
