"""Checks of what callers give to a model."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from resq_rl.errors import CalibrationError, PolicyError, VideoError
from resq_rl.quantization.fields import Field, LevelField
from resq_rl.quantization.state import StreamState

__all__ = ["check_clips", "check_decision", "check_frames"]


def check_clips(clips: Sequence[Tensor], shape: tuple[int, ...]) -> None:
    """Raise CalibrationError unless the clips are uint8 frames of `shape` (c, h, w) and one has two frames."""
    if not any(len(clip) > 1 for clip in clips):
        raise CalibrationError(
            f"Calibration needs at least one clip with two frames, got {len(clips)} clips of "
            f"{sorted({len(clip) for clip in clips})} frames."
        )
    for i, clip in enumerate(clips):
        if clip.dtype != torch.uint8 or tuple(clip.shape[1:]) != shape:
            raise CalibrationError(
                f"Calibration clip {i} holds {clip.dtype} frames of shape {tuple(clip.shape[1:])}; the model was "
                f"wrapped for uint8 frames of {shape}."
            )


def check_decision(decision: Field, refresh: Tensor, state: StreamState, clips: int, groups: int, levels: int) -> None:
    """Raise PolicyError unless decisions, refreshes and state fit a batch of clips."""
    values = decision.levels if isinstance(decision, LevelField) else decision.thresholds
    fits = values.dim() == 4 and values.numel() and values.shape[:2] == (clips, groups)
    if not fits or refresh.shape != (clips,) or refresh.dtype != torch.bool:
        raise PolicyError(
            f"A field of shape ({clips} clips, {groups} layer groups, rows, columns) is needed and one boolean for "
            f"each clip, got a field of shape {tuple(values.shape)} and refresh of shape {tuple(refresh.shape)}, "
            f"{refresh.dtype}."
        )
    if isinstance(decision, LevelField):
        if int(values.min()) < 0 or int(values.max()) >= levels:
            raise PolicyError(f"Levels must be 0 to {levels - 1}, got {int(values.min())} to {int(values.max())}.")
    elif len(decision.kappa) != levels - 1 or bool((~(values >= 0)).any()):
        raise PolicyError("Thresholds must be 0 or more, with one kappa for each level above the first.")
    if len(state.age) != clips:
        raise PolicyError(f"The state holds {len(state.age)} clips, the batch {clips}.")
    if bool(((state.age < 0) & ~refresh).any()):
        raise PolicyError("A clip without a keyframe cannot run a residual frame: refresh it first.")


def check_frames(frames: Tensor, shape: tuple[int, ...]) -> None:
    """Raise VideoError unless the frames are finite and of `shape` (c, h, w)."""
    if not frames.is_floating_point() or tuple(frames.shape[1:]) != shape:
        raise VideoError(
            f"Frames must be float of shape (clips, {', '.join(map(str, shape))}), as the example was, got "
            f"{frames.dtype} of shape {tuple(frames.shape)}. Use to_float for uint8 frames."
        )
    if not math.isfinite(float(frames.sum())):  # a sum shows NaN and infinity at a tenth of isfinite's cost
        bad = torch.nonzero(~torch.isfinite(frames).flatten(1).all(1))[:, 0].tolist()
        raise VideoError(f"The frames of clips {bad} hold NaN or infinity. Repair or drop these frames.")
