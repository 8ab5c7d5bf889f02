"""Composing a command's config from groups and overrides, and explaining in one line why an override does not fit."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from importlib.resources import files
from typing import Any, get_type_hints

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from resq_rl.checked import Checked, convert
from resq_rl.errors import SettingsError, did_you_mean, unknown_name
from resq_rl.experiments.config.quoting import assignment, readable
from resq_rl.experiments.config.settings import Folder, Settings, make_settings
from resq_rl.experiments.config.targets import parameter_names

__all__ = ["CONFIG_MODULE", "compose_config", "explain", "group_options", "load_settings"]

CONFIG_MODULE = "resq_rl.configs"
VERSION_BASE = "1.3"
# The option of a group that holds the defaults of its settings class. What others share is not offered as a choice.
DEFAULT, SHARED = "default", "_shared"
# Hydra raises plain errors for some values of a group.
COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, ValueError, TypeError, AttributeError)


def _run_folder(resume: str | None, results: object, *names: str) -> str:
    """The folder to go on in, or else one within the results folder, which is checked before Hydra makes it."""
    return resume if resume is not None else "/".join((convert(results, Folder, "results"), *names))


OmegaConf.register_new_resolver("run_folder", _run_folder, replace=True)


def _store_defaults() -> None:
    """Give Hydra the defaults of the settings classes, as an option of each group."""
    for group, cls in get_type_hints(Settings).items():
        if isinstance(cls, type) and issubclass(cls, Checked):
            name = SHARED if (files(CONFIG_MODULE) / group).is_dir() else DEFAULT
            ConfigStore.instance().store(name=name, node=asdict(cls()), group=group, provider="resq_rl")  # type: ignore[call-overload]


_store_defaults()


def compose_config(config_name: str, overrides: Sequence[str] = ()) -> DictConfig:
    """The config of a command with Hydra overrides applied, without Hydra's own node.

    Raises:
        SettingsError: an override does not fit; the message names it and the nearest valid name.
    """
    within_job = GlobalHydra.instance().is_initialized()
    with nullcontext() if within_job else initialize_config_module(CONFIG_MODULE, version_base=VERSION_BASE):
        try:
            return compose(config_name, list(overrides))
        except COMPOSITION_ERRORS as error:
            raise _explain(error, config_name, overrides) from error


def group_options(config_name: str, overrides: Sequence[str] = ()) -> dict[str, list[str]]:
    """The options of every group; `overrides` may name folders that add to them."""
    with initialize_config_module(CONFIG_MODULE, version_base=VERSION_BASE):
        return _options(config_name, [text for text in overrides if text.startswith("hydra.searchpath=")])


def load_settings(config_name: str, overrides: Sequence[str] = ()) -> Settings:
    """Checked settings of a command, such as `load_settings("train", ["video=davis", "video.root=DAVIS"])`.

    Raises:
        SettingsError: an override does not fit, or a value has the wrong type or lies out of bounds.
    """
    return make_settings(compose_config(config_name, overrides))


def explain(error: Exception, config_name: str, overrides: Sequence[str], *, multirun: bool = False) -> SettingsError:
    """The error of a failed composition as one line that names the override at fault and the nearest valid name.

    With `multirun`, an override may give several values, and each is tried.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, SettingsError):  # from the run's folder, which is made after the settings are composed
            return cause
        cause = cause.__cause__ or cause.__context__
    with initialize_config_module(CONFIG_MODULE, version_base=VERSION_BASE):
        return _explain(error, config_name, overrides, multirun=multirun)


def _explain(error: Exception, config_name: str, overrides: Sequence[str], *, multirun: bool = False) -> SettingsError:
    searchpath = [text for text in overrides if text.startswith("hydra.searchpath=")]
    groups = _options(config_name, searchpath)
    parser = OverridesParser.create()
    parsed: list[tuple[str, Override]] = []
    for text in overrides:
        try:
            override = parser.parse_override(text)
            if multirun and override.is_discrete_sweep():
                values = [f"{override.key_or_group}={value}" for value in override.sweep_string_iterator()]
                parsed += [(value, parser.parse_override(value)) for value in values]
            else:
                parsed.append((text, override))
        except HydraException as failure:
            return SettingsError(_unreadable(text, failure, multirun=multirun))
    # A wrong group option hides everything else, so those are tried first.
    parsed.sort(key=lambda pair: pair[1].key_or_group not in groups)
    good = searchpath
    for text, override in parsed:
        try:
            compose(config_name, [*good, text])
        except COMPOSITION_ERRORS as failure:
            config = compose(config_name, good, return_hydra_config=override.key_or_group.startswith("hydra"))
            return SettingsError(_wrong_override(text, override, failure, config, groups))
        good.append(text)
    return SettingsError(f"Cannot compose the settings: {_one_line(error)}")


def _unreadable(text: str, failure: HydraException, *, multirun: bool) -> str:
    reason = _one_line(failure).split(" See https://", maxsplit=1)[0]
    if "=" not in text:
        return f"Cannot read '{text}': write it as NAME=VALUE."
    quoted = readable(text, several=multirun)
    if quoted is None:
        return f"Cannot read '{text}': {reason}. A name has letters, digits, dots and underscores only."
    return f"Cannot read '{text}': {reason}. Quote the value, for the shell and for Hydra: {shlex.quote(quoted)}."


def _wrong_override(
    text: str,
    override: Override,
    failure: Exception,
    config: DictConfig,
    groups: Mapping[str, Sequence[str]],
) -> str:
    key = override.key_or_group
    if override.is_sweep_override():
        return (
            f"'{text}' gives several values: for a list write {key}=[...], to run the command once for each add "
            f"--multirun, for a text with commas write {shlex.quote(assignment(key, text.partition('=')[2]))}."
        )
    value = override.value()
    if key in groups:
        return _wrong_option(text, key, value, groups[key], add=override.is_add())
    names = dict(_names(config))
    if isinstance(names.get(key), DictConfig) and isinstance(value, dict):
        for name in value:
            if name not in names[key]:
                return str(unknown_name(str(name), names[key], prefix=f"{key}."))
    if key in names:
        return f"Cannot set '{key}' with '{text}': {_one_line(failure.__cause__ or failure)}"
    group = next((name for name in _parents(key) if name in names), "")
    accepted = [f"{group}.{name}" for name in parameter_names(names.get(group))]
    if key in accepted:
        return f"'{key}' is not in the config, but its target takes it: write +{text.lstrip('+')}."
    others = [name for name in groups if name.startswith("hydra/") == key.startswith("hydra")]
    return f"Unknown setting '{key}'.{did_you_mean(key, [*names, *accepted, *others])}"


def _wrong_option(text: str, group: str, value: Any, options: Sequence[str], *, add: bool) -> str:
    if not isinstance(value, list) and value not in options:
        return f"Unknown option '{value}' for '{group}'.{did_you_mean(str(value), options)}"
    if not add:
        return f"No option of '{group}' is chosen that '{text}' could replace: write +{text}."
    return f"An option of '{group}' is chosen already: write {text.lstrip('+')}."


def _parents(key: str) -> Iterator[str]:
    while "." in key:
        key = key.rpartition(".")[0]
        yield key


def _options(config_name: str, searchpath: list[str]) -> dict[str, list[str]]:
    # What the loader's own get_group_options asks; it copies every source for each question, which takes a second.
    loader: Any = GlobalHydra.instance().config_loader()
    _, repository = loader._parse_overrides_and_create_caching_repo(config_name, searchpath)
    options = {group: repository.get_group_options(group, ObjectType.CONFIG) for group in _groups(repository)}
    return {group: [name for name in names if name != SHARED] for group, names in options.items()}


def _groups(repository: Any, parent: str = "") -> Iterator[str]:
    for name in repository.get_group_options(parent, ObjectType.GROUP):
        group = f"{parent}/{name}" if parent else name
        yield group
        yield from _groups(repository, group)


def _names(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names of all settings and groups of settings, with their values."""
    if isinstance(config, Mapping | DictConfig):
        for key in config:
            name = f"{prefix}{key}"
            value = config._get_node(key) if isinstance(config, DictConfig) else config[key]
            yield name, value
            if isinstance(value, DictConfig) and not value._is_none() and not value._is_missing():
                yield from _names(value, f"{name}.")


def _one_line(error: BaseException) -> str:
    """The first line of an error's text, without a full stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")
