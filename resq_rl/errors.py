"""Every error that `resq_rl` raises on bad input.

    ResqError
    ├── VideoError                  a clip, video file or dataset tree that cannot be used
    ├── NetworkError                a network that cannot be loaded or wrapped
    │   └── UnsupportedOperatorError    an operator on the quantized path that ResQ cannot express
    ├── WeightsError                a weights file that is missing, damaged or of another network
    ├── CalibrationError            calibration data that gives no usable ranges
    ├── PolicyError                 a policy, decision or policy file that does not fit
    ├── SettingsError               a setting with a wrong name, type or value
    ├── TrackingError               an experiment tracker that cannot be used
    ├── ResultsError                a results folder or file that cannot be read or written
    └── LaunchError                 jobs of a sweep that cannot be started or were lost

Each message says what is wrong, where, which value was received, and how to mend it.
"""

import difflib
from collections.abc import Iterable

__all__ = [
    "CalibrationError",
    "LaunchError",
    "NetworkError",
    "PolicyError",
    "ResqError",
    "ResultsError",
    "SettingsError",
    "TrackingError",
    "UnsupportedOperatorError",
    "VideoError",
    "WeightsError",
    "did_you_mean",
    "unknown_name",
]


class ResqError(Exception):
    """Base of all errors that `resq_rl` raises on purpose."""


class VideoError(ResqError):
    """A clip, video file or dataset tree that cannot be used."""


class NetworkError(ResqError):
    """A network that cannot be loaded or wrapped."""


class UnsupportedOperatorError(NetworkError):
    """An operator on the quantized path that residual quantization cannot express."""


class WeightsError(ResqError):
    """A weights file that is missing, damaged or of another network."""


class CalibrationError(ResqError):
    """Calibration data that gives no usable ranges."""


class PolicyError(ResqError):
    """A policy, decision or policy file that does not fit the environment."""


class SettingsError(ResqError):
    """A setting with a wrong name, type or value."""


class ShortMemoryError(SettingsError):
    """Settings that take more memory than is free at the moment, on this machine."""


class TrackingError(ResqError):
    """An experiment tracker that cannot be used."""


class ResultsError(ResqError):
    """A results folder or file that cannot be read or written."""


class LaunchError(ResqError):
    """Jobs of a sweep that cannot be started, or were lost with the processes that ran them."""


def did_you_mean(name: str, valid: Iterable[str], *, prefix: str = "") -> str:
    """The end of an error line: the nearest valid name after `prefix`, and all of them where they are few."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f" Did you mean '{prefix}{close[0]}'?" if close else ""
    if not names or (close and len(names) > 12):
        return hint
    return f"{hint} Valid: {', '.join(names)}."


def unknown_name(name: str, valid: Iterable[str], *, prefix: str = "") -> SettingsError:
    """The error for a setting that does not exist; `name` and `valid` are relative to `prefix`."""
    return SettingsError(f"Unknown setting '{prefix}{name}'.{did_you_mean(name, valid, prefix=prefix)}")
