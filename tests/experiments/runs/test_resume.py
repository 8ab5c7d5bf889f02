"""A command that is killed at any moment and goes on leaves what it would have left without the kill, bit for bit.

`make test ARGS="-m slow -k random_moments -s"` kills fifty trainings; RESQ_RL_KILLS sets another number.
"""

import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import DictConfig, OmegaConf

from resq_rl.errors import SettingsError
from resq_rl.experiments.config.composition import compose_config
from resq_rl.experiments.config.settings import make_settings, plain
from resq_rl.experiments.runs.record import RunRecord
from resq_rl.experiments.runs.resume import merged_overrides, with_kept_settings, with_policy_settings
from tests.experiments.killing import Runs, differences

Make = Callable[..., Runs]

FEW_STEPS = ["model._target_=resq_rl.perception.compact_ddrnet", "+model.pretrained=false", "task.classes=6"]
FEW_STEPS += [
    "environment.accuracy=labels",
    "pretraining.steps=12",
    "pretraining.batch=2",
    "pretraining.validate_every=3",
]


@pytest.fixture
def runs(tmp_path: Path, empty_store: Path) -> Make:
    return lambda command, *overrides: Runs(tmp_path, empty_store, command, overrides)


def kill_and_go_on(runs: Runs, points: int, *, seed: int) -> int:
    """Kill runs at random moments, some of them again when they go on; how many were caught before their end."""
    runs.finish("warm")  # the first one waits for imports
    seconds, expected = runs.finish("whole"), runs.left_behind("whole")
    assert differences(runs.left_behind("warm"), expected) == []
    generator, caught = np.random.default_rng(seed), 0
    for point in range(points):
        name, moment = f"killed{point}", float(generator.uniform(0, seconds))
        running = runs.kill(name, moment)
        again = bool(generator.uniform() < 0.25) and runs.kill(name, float(generator.uniform(0, seconds)), resume=True)
        runs.finish(name, resume=True)
        different = differences(expected, runs.left_behind(name))
        assert not different, f"killed after {moment:.2f} of {seconds:.2f} s: {different}"
        caught += running
        print(f"{point + 1} of {points}: killed after {moment:.2f} s{' and again' if again else ''}, went on exactly")
        runs.forget(name)
    print(f"{points} random kill points ({caught} before the end), {points} exact resumes")
    return caught


def test_a_training_that_is_killed_goes_on_as_if_it_had_not_been(runs: Make) -> None:
    """It is killed at its first checkpoint; the tests below kill at any moment."""
    training = runs("train", "training.seeds=[0]", "training.keyframe_frames=0", "training.frames=90")
    training.finish("whole")
    assert training.kill_once_there_is("killed", "seed0/checkpoints/*.checkpoint")
    training.finish("killed", resume=True)
    assert differences(training.left_behind("whole"), training.left_behind("killed")) == []


# Fewer are caught if the machine is faster than when the whole run was timed.


@pytest.mark.slow
def test_trainings_killed_at_random_moments_go_on_exactly(runs: Make) -> None:
    points = int(os.environ.get("RESQ_RL_KILLS", "50"))
    assert kill_and_go_on(runs("train"), points, seed=0) > points // 4


@pytest.mark.slow
def test_comparisons_killed_at_random_moments_go_on_exactly(runs: Make) -> None:
    comparison = runs("compare", "training.seeds=[0]", "heuristic.searches=[greedy]")
    assert kill_and_go_on(comparison, 8, seed=1) > 2


@pytest.mark.slow
def test_pretrainings_killed_at_random_moments_go_on_exactly(runs: Make) -> None:
    assert kill_and_go_on(runs("pretrain", *FEW_STEPS), 8, seed=2) > 2


# The settings to go on with ------------------------------------------------------------------------------------------

DEMO = ["+experiment=demo", "model=compact_ddrnet_untrained", "threads=1", "training.learning_rate=1e-4", "seed=3"]
FOREIGN = ["model=custom", "model._target_=tests.envs.worlds.tiny_network", "task.classes=3"]


@cache
def composed(*overrides: str) -> DictConfig:
    return compose_config("train", overrides)


def values_of(*overrides: str, folder: Path | None = None) -> dict[str, Any]:
    """Settings as composed; those of a run that goes on in a folder, if one is given."""
    values = plain(composed(*overrides))
    values["training"]["resume"] = None if folder is None else str(folder)
    return values


def begun(folder: Path, *overrides: str) -> Path:
    """A run's folder, as far as its settings."""
    folder.mkdir()
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(values_of(*overrides))))
    return folder


def go_on(folder: Path, *overrides: str) -> dict[str, Any]:
    return with_kept_settings(
        folder, "train", values_of(*overrides, folder=folder), [f"training.resume={folder}", *overrides]
    )


def test_a_run_goes_on_with_the_settings_in_its_folder(tmp_path: Path) -> None:
    folder = begun(tmp_path / "run", *DEMO)
    expected = values_of(*DEMO, folder=folder)
    assert go_on(folder) == expected
    assert go_on(folder, *DEMO) == expected
    assert make_settings(go_on(folder)).training.learning_rate == 1e-4


def test_a_target_goes_on_with_the_arguments_it_had(tmp_path: Path) -> None:
    """Though the default option has the same target, with more of them."""
    target = values_of()["model"]["_target_"]
    folder = begun(tmp_path / "run", "model=custom", f"model._target_={target}", "+model.pretrained=false")
    assert go_on(folder)["model"] == {"_target_": target, "pretrained": False}


@pytest.mark.parametrize("given", ["threads=2", "training.seeds=[5,6]", "tracking=disabled", "results=elsewhere"])
def test_what_is_given_anew_replaces_what_was_kept(given: str, tmp_path: Path) -> None:
    """Also with the value that it has by default, as threads=2."""
    folder = begun(tmp_path / "run", *DEMO)
    assert go_on(folder, given) == values_of(*DEMO, given, folder=folder)


@pytest.mark.parametrize(
    ("given", "group"),
    [
        ("video.speed=2.5", "video"),
        ("model=compact_ddrnet", "model"),
        ("environment=frame_bits", "environment"),
        ("quantization.levels=[0,2,8]", "quantization"),
        ("task.classes=7", "task"),
    ],
)
def test_another_world_is_refused(given: str, group: str, tmp_path: Path) -> None:
    folder = begun(tmp_path / "run", *DEMO)
    with pytest.raises(SettingsError, match=rf"The run in .* has other settings of {group}: give only training.resume"):
        go_on(folder, given)


@pytest.mark.parametrize("name", ["training.frames", "training.keyframe_frames", "pretraining.steps"])
def test_another_length_of_training_is_refused(name: str, tmp_path: Path) -> None:
    folder = begun(tmp_path / "run", *DEMO, f"{name}=1000")
    assert go_on(folder, f"{name}=1000") == go_on(folder)
    for length in (999, 2000):
        with pytest.raises(
            SettingsError, match=rf"was begun with {name}=1000 and cannot go on with {length}: its learning"
        ):
            go_on(folder, f"{name}={length}")


@pytest.mark.parametrize("content", ["- a\n- b\n", "video: [", "a: ${", "\x00"])
def test_damaged_settings_are_one_error(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(SettingsError, match=r"The settings in .*config.yaml are damaged"):
        go_on(tmp_path)


def test_code_that_a_folder_names_runs_only_if_the_user_names_or_trusts_it(tmp_path: Path) -> None:
    folder = begun(tmp_path / "run", *FOREIGN)
    expected = values_of(*FOREIGN, folder=folder)
    with pytest.raises(SettingsError, match=r"tests.envs.worlds.tiny_network\). If you trust it, add trusted=true; or"):
        go_on(folder)
    assert go_on(folder, *FOREIGN[:2]) == expected
    assert go_on(folder, "trusted=true") == expected | {"trusted": True}


def test_a_folder_cannot_trust_itself(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    begun(tmp_path / "run", "model=custom", "model._target_=evil.network", "trusted=true")
    sys.path.insert(0, str(tmp_path))
    try:
        with pytest.raises(SettingsError, match="would run code"):
            go_on(tmp_path / "run")
    finally:
        sys.path.remove(str(tmp_path))


def test_the_record_keeps_what_was_asked_for(tmp_path: Path) -> None:
    asked = merged_overrides(["+experiment=demo", "seed=3"], ["training.resume=x", "trusted=true", "seed=4"])
    assert asked == ["+experiment=demo", "seed=4"]
    RunRecord(tmp_path).begin(["resq-rl"], asked, make_settings(values_of()), resume=False)
    assert RunRecord(tmp_path).command_line("train") == "resq-rl train +experiment=demo seed=4"


# Settings of a policy ------------------------------------------------------------------------------------------------


def settings_for_policy(overrides: list[str], saved: dict[str, Any]) -> dict[str, Any]:
    given = plain(compose_config("evaluate", overrides))
    return with_policy_settings(saved, Path("policy"), "evaluate", given, overrides)


def trained_under(*overrides: str) -> dict[str, Any]:
    values = values_of(*overrides)
    return {name: values[name] for name in ("model", "task", "video", "quantization", "environment", "training")}


def test_a_policy_is_used_with_the_settings_of_its_training(caplog: pytest.LogCaptureFixture) -> None:
    saved = trained_under("video.speed=2.0", "quantization.residual_weight_bits=8", "environment.grid=[3,5]")
    values = settings_for_policy([], saved)
    assert {name: values[name] for name in saved} == saved
    assert caplog.text == ""


def test_what_differs_from_training_is_named(caplog: pytest.LogCaptureFixture) -> None:
    saved = trained_under("video.speed=2.0", "quantization.residual_weight_bits=8")
    values = settings_for_policy(["video.noise=0.05", "quantization.residual_weight_bits=4"], saved)
    assert (values["video"]["speed"], values["video"]["noise"]) == (2.0, 0.05)
    assert values["quantization"]["residual_weight_bits"] == 4  # named, though it is the default
    assert "quantization.residual_weight_bits was 8 and is 4" in caplog.text
    assert "video.noise was 0.02 and is 0.05" in caplog.text
    assert "speed" not in caplog.text


def test_a_policy_may_bring_no_code_of_its_own() -> None:
    saved = trained_under() | {"model": {"_target_": "os.getcwd"}}
    with pytest.raises(SettingsError, match=r"policy.*trusted=true"):
        settings_for_policy([], saved)
    assert settings_for_policy(["trusted=true"], saved)["model"] == {"_target_": "os.getcwd"}
