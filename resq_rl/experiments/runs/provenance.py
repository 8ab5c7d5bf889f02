"""Versions of the code, its libraries and the machine that a result was made with."""

import importlib.metadata
import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Final

import torch

import resq_rl
from resq_rl.experiments.config.settings import Settings

__all__ = ["versions"]

PACKAGES: Final = ("torch", "numpy", "scipy", "gymnasium", "stable-baselines3", "hydra-core", "mlflow", "av")


def versions(settings: Settings) -> dict[str, str]:
    """Versions by name, and the system and device."""
    found = {"resq_rl": _own_version(), "Python": platform.python_version()}
    for name in PACKAGES:
        found[name] = importlib.metadata.version(name)
    found["system"] = f"{platform.system()} {platform.machine()}"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    found["device"] = f"{device}, {settings.threads} threads"
    return found


@cache  # the code of a process does not change
def _own_version() -> str:
    """The package's version, and its commit if it runs from a git checkout."""
    root = Path(resq_rl.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return resq_rl.__version__
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):  # no git, or a checkout that belongs to another user
        return resq_rl.__version__
    return f"{resq_rl.__version__}, commit {done.stdout.strip()}"
