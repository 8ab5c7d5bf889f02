"""Settings that a folder keeps, of a run that goes on or of a policy, with those of the command line in their place."""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeGuard

from omegaconf import OmegaConf

from resq_rl.errors import SettingsError
from resq_rl.experiments.config.composition import compose_config
from resq_rl.experiments.config.settings import plain
from resq_rl.experiments.config.targets import TARGET, refuse_foreign

__all__ = ["CONFIG", "kept_text", "merged_overrides", "with_kept_settings", "with_policy_settings"]

CONFIG: Final = "config.yaml"
TARGETS: Final = ("model", "task", "video")
FOR_ONCE: Final = ("training.resume", "trusted")  # say how to go on and not what the run is
# The learning rate falls over the whole length: another length is another run from its first step on.
LENGTHS: Final = ("training.frames", "training.keyframe_frames", "pretraining.steps")
WORLD: Final = (*TARGETS, "environment", "quantization")

TRAINED: Final = "resq_rl.experiments.study.deployment.trained_"  # options that read the policy's folder themselves

log = logging.getLogger(__name__)


def kept_text(run_dir: Path) -> str | None:
    """The settings in a run's folder, as YAML; None where there are none that can be read."""
    try:
        return (run_dir / CONFIG).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def merged_overrides(before: Sequence[str], now: Sequence[str]) -> list[str]:
    """The overrides that a run was begun with, with those of this session in their place or after them."""
    named = {_setting(override) for override in now}
    kept = [override for override in before if _setting(override) not in named]
    return [*kept, *(override for override in now if _setting(override) not in FOR_ONCE)]


def with_kept_settings(
    run_dir: Path, config_name: str, given: Mapping[str, Any], overrides: Sequence[str]
) -> dict[str, Any]:
    """The settings to go on with: those in the folder, with the ones that the overrides give in their place.

    Args:
        run_dir: the run's folder.
        config_name: name of the command's configuration.
        given: the settings as composed from `overrides`, interpolations resolved.
        overrides: Hydra's overrides of this session.

    Raises:
        SettingsError: the overrides ask for another network, task, video, environment, quantization or length of
            training than the run's, or the folder names code that the command line neither names nor trusts.
    """
    text = kept_text(run_dir)
    if text is None:
        log.info("There is nothing in %s to go on from: the run begins.", os.path.relpath(run_dir))
        return dict(given)
    try:
        kept = OmegaConf.to_container(OmegaConf.create(text))
    except Exception as error:  # of OmegaConf and of the YAML parser
        raise _unusable(run_dir, str(error)) from error
    if not isinstance(kept, dict):
        raise _unusable(run_dir, "no settings in it")
    default = plain(compose_config(config_name))
    named = {_setting(override) for override in overrides}
    values: dict[str, Any] = {str(name): value for name, value in kept.items()}
    values = _replaced(values, given, default, named) | {"trusted": given.get("trusted", False)}
    differ = [name for name in WORLD if name in kept and values[name] != kept[name]]
    if differ:
        raise SettingsError(
            f"The run in {os.path.relpath(run_dir)} has other settings of {', '.join(differ)}: give only "
            "training.resume, or the arguments that the run was begun with (they are in its run.json)."
        )
    for name in LENGTHS:
        before, now = _value(kept, name), _value(values, name)
        if before is not None and now != before:
            raise SettingsError(
                f"The run in {os.path.relpath(run_dir)} was begun with {name}={before} and cannot go on with {now}: "
                f"its learning rate falls over that length. Leave {name} out, or begin a new run with {name}={now}."
            )
    for name in values.keys() & set(TARGETS):
        if values[name] != given.get(name) and values["trusted"] is not True:
            refuse_foreign(values[name], name, f"The run in {os.path.relpath(run_dir)}")
    return values


def with_policy_settings(
    saved: Mapping[str, Any], folder: Path, config_name: str, given: Mapping[str, Any], overrides: Sequence[str]
) -> dict[str, Any]:
    """The settings to use a policy with: those of its training, with the ones that the overrides give in their place.

    What then differs from training is logged.

    Args:
        saved: settings of its training, as `save_deployment` wrote them.
        folder: the policy's.
        config_name: name of the command's configuration.
        given: the settings as composed from `overrides`, interpolations resolved.
        overrides: Hydra's overrides.

    Raises:
        SettingsError: the folder names code that the command line neither names nor trusts.
    """
    groups = [name for name in (*WORLD, "training") if isinstance(saved.get(name), Mapping) and name in given]
    groups = [name for name in groups if not str(given[name].get(TARGET)).startswith(TRAINED)]
    known = {name: saved[name] for name in groups}
    named = {_setting(override) for override in overrides}
    default = plain(compose_config(config_name))
    taken = _replaced(known, {name: given[name] for name in known}, default, named)
    for name in taken.keys() & set(TARGETS):
        if taken[name] != given[name] and given.get("trusted") is not True:
            refuse_foreign(taken[name], name, f"The policy in {folder}")
    changes = sorted(_differences(known, taken))
    if changes:
        log.warning("The policy was trained under other settings: %s.", "; ".join(changes))
    return {**given, **taken}


def _differences(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name in before.keys() | after.keys():
        one, other = before.get(name), after.get(name)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from _differences(one, other, f"{prefix}{name}.")
        elif one != other:
            yield f"{prefix}{name} was {one} and is {other}"


def _setting(override: str) -> str:
    """The dotted name of the setting, or of the group, that an override gives."""
    return override.partition("=")[0].lstrip("+~").partition("@")[0]


def _value(settings: Mapping[Any, Any], name: str) -> Any:
    """The setting of a dotted name; None where there is none."""
    group, _, name = name.partition(".")
    values = settings.get(group)
    return values.get(name) if isinstance(values, Mapping) else None


def _replaced(
    kept: Mapping[str, Any], given: Mapping[str, Any], default: Mapping[str, Any], named: set[str], prefix: str = ""
) -> dict[str, Any]:
    """Kept settings, in which the given ones replace those that are named by an override or differ from the default.

    Settings that the kept ones lack are added, but not to the arguments of a target, which has defaults of its own.
    """
    values = dict(kept)
    for name, value in given.items():
        before, usual, path = kept.get(name), default.get(name), f"{prefix}{name}"
        if path in named or (name not in kept and (TARGET not in kept or value != usual)):
            values[name] = value
        elif name not in kept:
            continue
        elif _same_kind(before, value):
            values[name] = _replaced(before, value, usual if isinstance(usual, Mapping) else {}, named, f"{path}.")
        elif value != usual:
            values[name] = value
    return values


def _same_kind(one: Any, other: Any) -> TypeGuard[Mapping[str, Any]]:
    """Whether both are groups of settings with the same target, or both without one."""
    groups = isinstance(one, Mapping) and isinstance(other, Mapping)
    return groups and one.get(TARGET) == other.get(TARGET)


def _unusable(run_dir: Path, reason: str) -> SettingsError:
    return SettingsError(
        f"The settings in {run_dir / CONFIG} are damaged ({' '.join(reason.split())[:200]}). Remove the file, and give "
        "the arguments that the run was begun with (they are in its run.json) and training.resume."
    )
