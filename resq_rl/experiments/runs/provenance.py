"""What it takes to run a comparison again: the versions of what it ran on."""

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
    """Names and versions of the code, its libraries and the machine."""
    found = {"resq_rl": _own_version(), "Python": platform.python_version()}
    for name in PACKAGES:
        found[name] = importlib.metadata.version(name)
    found["system"] = f"{platform.system()} {platform.machine()}"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    found["device"] = f"{device}, {settings.threads} threads"
    return found


@cache  # a process runs the code that it began with
def _own_version() -> str:
    """The package's version, and where it runs from a checkout of git its commit."""
    root = Path(resq_rl.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return resq_rl.__version__
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):  # no git, or a checkout that belongs to another user
        return resq_rl.__version__
    return f"{resq_rl.__version__}, commit {done.stdout.strip()}"
