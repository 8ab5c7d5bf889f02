"""Any override of any setting ends in checked settings, and the objects they make, or in one clear error."""

import dataclasses
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from resq_rl.experiments.cli.commands import COMMANDS
from resq_rl.experiments.config.composition import compose_config, load_settings
from tests.fuzz.mutations import TOKENS, outcome

FEW, MANY = 15, int(os.environ.get("RESQ_RL_FUZZ_CASES", "1000"))
VALUES = [
    *(token.decode("latin-1") for token in TOKENS),
    "1",
    "-0.5",
    "0.5",
    "inf",
    "-inf",
    "[1,2]",
    "[0.3,nan]",
    "abc",
]
VALUES += [
    "[]",
    "{a:1}",
    "'",
    "${seed}",
    "${nowhere}",
    "${oc.env:HOME}",
    "???",
    "1,2",
    "[[1,2],[3]]",
    "10000000000",
    "off",
]


def names_of(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        yield f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from names_of(value, f"{prefix}{name}.")


def floats_of(value: object) -> Iterator[float]:
    if isinstance(value, float):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from floats_of(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from floats_of(item)
    elif dataclasses.is_dataclass(value):
        yield from floats_of({f.name: getattr(value, f.name) for f in dataclasses.fields(value)})


def drawn(seed: int) -> tuple[str, list[str]]:
    """A command, and one to three overrides: names and values known, mixed up or misspelt."""
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(int(generator.integers(1, 4))):
        name, value = (str(generator.choice(np.array(words))) for words in (NAMES, VALUES))
        if generator.uniform() < 0.2:
            place = int(generator.integers(len(name)))
            name = name[:place] + str(generator.choice(np.array(list("xX._+~/ =@")))) + name[place + 1 :]
        found.append(f"{name}={value}")
    return sorted(COMMANDS)[int(generator.integers(len(COMMANDS)))], found


def settings_of(command: str, overrides: list[str]) -> object:
    settings = load_settings(COMMANDS[command].config, overrides)
    assert not any(map(math.isnan, floats_of(settings))), "NaN among the settings"
    settings.video.build()
    settings.task.build()
    return settings


plain: Any = OmegaConf.to_container(compose_config("compare"), resolve=True)
NAMES = sorted(names_of(plain))


def survey_settings(cases: int) -> None:
    counts: Counter[str] = Counter()
    for seed in range(cases):
        command, overrides = drawn(seed)
        end, _ = outcome(f"{command} {overrides}", lambda: settings_of(command, overrides))  # noqa: B023 - called at once
        counts[end] += 1
    print(f"settings: {cases} odd, {counts['read']} read, {counts['refused']} refused, 0 others")
    assert counts["read"] + counts["refused"] == cases


@pytest.mark.usefixtures("unchecked_types")
def test_odd_settings_are_accepted_or_refused() -> None:
    survey_settings(FEW)


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked_types")
def test_a_thousand_odd_settings_are_accepted_or_refused() -> None:
    survey_settings(MANY)
