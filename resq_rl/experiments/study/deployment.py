"""Files with which a policy runs elsewhere: beside the policy, the frozen model and the settings that made it.

A policy's folder holds `policy.safetensors` and `policy.json` (the policy), `model.safetensors` and `model.json` (the
calibrated network's integers and steps) and `network.json` (which settings make the float network, task and video, and
how frames are brought to the network).
"""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from resq_rl.errors import PolicyError, SettingsError
from resq_rl.experiments.config.settings import Settings
from resq_rl.experiments.config.targets import TARGET, Target, make_target, refuse_foreign
from resq_rl.experiments.study.study import Study, network_framing, prepare_problems, read_clips
from resq_rl.files import write_atomic
from resq_rl.policies.runner import SETTINGS
from resq_rl.quantization import load_model, save_model
from resq_rl.video import Split

__all__ = [
    "FILES",
    "deployed_study",
    "policy_folder",
    "policy_words",
    "save_deployment",
    "saved_settings",
    "trained_network",
    "trained_task",
    "trained_video",
    "trainer_of",
]

log = logging.getLogger(__name__)

FILES = ("policy.safetensors", "policy.json", "model.safetensors", "model.json", SETTINGS)


def save_deployment(study: Study, folder: Path) -> None:
    """Write what a policy needs to run, but for the policy itself, into its folder.

    Raises:
        ResultsError: a file cannot be written.
    """
    save_model(study.model, folder)
    settings = study.settings
    making = {group: _plain(getattr(settings, group)) for group in ("model", "task", "video")}
    making |= {group: _plain(asdict(getattr(settings, group))) for group in ("quantization", "environment", "training")}
    making["training"]["resume"] = None  # says how to go on, not what the policy is
    making["framing"] = study.framing.to_json()
    write_atomic(folder / SETTINGS, json.dumps(making, indent=2) + "\n")


def policy_folder(policy: str | None) -> Path:
    """The folder of a policy, or of the first seed's in the folder of a run.

    Raises:
        SettingsError: none was given. PolicyError: it holds no policy.
    """
    if policy is None:
        raise SettingsError("Which policy? Set policy=FOLDER, a folder that `resq-rl train` or `compare` wrote.")
    folder = Path(policy)
    found = [folder, *sorted(folder.glob("seed*"))]
    for candidate in found:
        if (candidate / "policy.json").is_file():
            return candidate
    raise PolicyError(f"No policy in {folder}: give a folder with policy.safetensors and policy.json, or a run's.")


def saved_settings(folder: Path) -> dict[str, Any]:
    """The settings under which the policy in a folder was trained, as `save_deployment` wrote them; none if it did not.

    Raises:
        PolicyError: the file is damaged.
    """
    path = folder / SETTINGS
    try:
        saved = json.loads(path.read_text())
    except FileNotFoundError:
        log.warning("%s is missing: the policy is used with the settings of the command line.", path)
        return {}
    except (OSError, ValueError) as error:
        raise PolicyError(f"{path} is damaged ({error}). Copy it again or train the policy anew.") from error
    return saved if isinstance(saved, dict) else {}


def trainer_of(policy: str | None) -> str:
    """How a policy, or the first of a run, was trained; by PPO where its folder does not say."""
    training = saved_settings(policy_folder(policy)).get("training", {})
    return str(training.get("trainer", "ppo"))


def policy_words(folder: Path) -> str:
    """How a command line names a policy's folder, or a run's; code of its own must be trusted by the user."""
    words = f"policy={os.path.relpath(folder)}"
    try:
        making = json.loads((policy_folder(str(folder)) / SETTINGS).read_text())
        for group in ("model", "task"):
            refuse_foreign(making[group], group, "")
    except SettingsError:
        return f"{words} trusted=true"
    except (OSError, KeyError, ValueError, PolicyError):  # the command will say so
        pass
    return words


def trained_network(policy: str | None, trusted: bool = False) -> nn.Module:
    """The float network that a policy was trained with."""
    network: nn.Module = _made(policy, "model", trusted)
    return network


def trained_task(policy: str | None, trusted: bool = False) -> Any:
    """The task that a policy was trained for."""
    return _made(policy, "task", trusted)


def trained_video(policy: str | None, trusted: bool = False) -> Any:
    """The video that a policy was trained on."""
    return _made(policy, "video", trusted)


def deployed_study(settings: Settings, folder: Path, grid: tuple[int, int], splits: Sequence[Split]) -> Study:
    """The frozen model of a policy's folder and the clips of `splits`; nothing is calibrated.

    Args:
        grid: of the policy.

    Raises:
        ResqError: a part cannot be built; the message says which and how to mend it.
    """
    network, task, video = settings.model.build(), settings.task.build(), settings.video.build()
    model = load_model(folder, network)
    model = model.compile() if settings.quantization.compile else model
    problems = prepare_problems(settings, model, task, read_clips(video, splits), grid)
    return Study(settings, network, problems, (), type(video).__name__, network_framing(video, model))


def _made(policy: str | None, group: str, trusted: bool) -> Any:
    path = policy_folder(policy) / SETTINGS
    mend = f"Say how it is made, as in training: {group}=OPTION."
    try:
        node = json.loads(path.read_text())[group]
    except OSError as error:
        raise PolicyError(
            f"Cannot tell the {group} of the policy: {path}: {error.strerror or error}. {mend}"
        ) from error
    except (KeyError, TypeError, ValueError) as error:
        raise PolicyError(f"{path} is damaged ({error}). {mend}") from error
    if not trusted:
        refuse_foreign(node, group, f"The policy in {path.parent}")
    return make_target(node, group).build()


def _plain(value: Any) -> Any:
    """A target as the settings that make it; paths of files are made absolute."""
    if isinstance(value, Target):
        return {TARGET: value.path, **{name: _plain(item) for name, item in value.arguments.items()}}
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, str | Path) and Path(value).is_file():
        return str(Path(value).absolute())
    return str(value) if isinstance(value, Path) else value
