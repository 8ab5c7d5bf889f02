import dataclasses
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import pytest
from omegaconf import DictConfig, OmegaConf
from pydantic import Field

from resq_rl.checked import convert
from resq_rl.errors import SettingsError, VideoError
from resq_rl.experiments.config.composition import compose_config, load_settings
from resq_rl.experiments.config.settings import Settings, make_settings
from resq_rl.experiments.config.targets import Target, make_target
from resq_rl.quantization import Budget
from resq_rl.video import GeneratedVideo

# Overrides with a mistake, the name that the error line must show, and the nearest valid one.
MISTAKEN_OVERRIDES = [
    ("trainng.frames=3", "trainng.frames", "training.frames"),
    ("training.frame=3", "training.frame", "training.frames"),
    ("+training.frame=3", "training.frame", "training.frames"),
    ("+vido=3", "vido", "video"),
    ("~sede", "sede", "seed"),
    ("video=davsi", "davsi", "davis"),
    ("video.noize=0.1", "video.noize", "video.noise"),
    ("+video.noize=0.1", "video.noize", "video.noise"),
    ("video.fps=30", "video.fps", "+video.fps=30"),
    ("+experiment=dmo", "dmo", "demo"),
    ("experiment=demo", "experiment=demo", "+experiment=demo"),
    ("+video=davis", "video", "write video=davis"),
    ("tracking=of", "of", "disabled"),
    ("training=fast", "fast", "default"),
    ("training=3", "3", "default"),
    ("training.seeds=1,2", "training.seeds=1,2", "training.seeds=[...]"),
    ("training.hidden.x=1", "training.hidden.x", "training.hidden"),
    ("environment=frame_bits environment.agents=region", "environment.agents", "'frame'"),
    ("environment=frame_level environment.agents=region", "environment.agents", "'frame' with resq_rl/FrameLevel-v0"),
    ("results='${nowhere}'", "nowhere", "not found"),
    ("video=davis", "video.root", "video.root=VALUE"),
    ("video=files video.paths={trian:[a]}", "video.paths.trian", "video.paths.train"),
    ("model=exported", "model.source", "model.source=VALUE"),
    ("environment=frame_bits training.keyframe_frames=9", "training.keyframe_frames", "must be 0"),
    ("training.trainer=gradient training.keyframe_frames=9", "training.keyframe_frames", "learned by PPO only"),
    ("environment=region_bits training.trainer=gradient", "training.trainer", "may be gradient only for region agents"),
    ("environment.agents=frame training.warm_start=gradient", "training.warm_start", "may be gradient only for"),
    ("heuristic.clairvoyant_points=3 heuristic.searches=[random]", "heuristic.clairvoyant_points", "must be 0"),
    ("environment=frame_level heuristic.clairvoyant_points=3", "heuristic.clairvoyant_points", "must be 0"),
    ("hydra.run.dr=x", "hydra.run.dr", "hydra.run.dir"),
    ("training frames", "training frames", "NAME=VALUE"),
    ("seed", "seed", "NAME=VALUE"),
    ("seed=[1", "seed=[1", "Quote the value"),
    ("training.seeds=1,2", "training.seeds=1,2", """'training.seeds="1,2"'"""),
    ("results=", "'results'", "the name of a folder"),
    ("results=2026", "'results'", """'results="2026"'"""),
    ("trai(ing.frames=3", "trai(ing.frames", "letters, digits, dots and underscores"),
]

# Names, wrong values, and what the error line must say beside the name.
MISTAKEN_VALUES: list[tuple[str, Any, str]] = [
    ("video._target_", "resq_rl.video.GeneratdVideo", "resq_rl.video.GeneratedVideo"),
    ("training.frames", "many", "an integer"),
    ("training.frames", 1.5, "an integer"),
    ("training.frames", True, "an integer"),
    ("training.frames", 0, "at least 1"),
    ("training.keyframe_frames", -1, "at least 0"),
    ("training.learning_rate", 0, "above 0"),
    ("training.learning_rate", math.nan, "a finite number"),
    ("training.gamma", 1.1, "at most 1"),
    ("training.seeds", [], "at least one"),
    ("training.seeds", [1, 1], "different seeds"),
    ("training.seeds", 3, "a list"),
    ("training.seeds", [1, "a"], "each an integer"),
    ("training.warm_start", "maybe", "best"),
    ("training", 3, "a group of settings"),
    ("environment.id", "resq_rl/RegionBit-v0", "'resq_rl/RegionBits-v0'"),
    ("environment.id", "resq_rl/FrameLevels-v0", "'resq_rl/FrameLevel-v0'"),
    ("environment.reference", "previus", "'previous'"),
    ("environment.grid", [6, 10, 2], "a list of 2 values"),
    ("environment.trade_off", [0.3, 0.1], "an increasing range"),
    ("environment.trade_off", -1, "above 0"),
    ("environment.trade_off", "auot", "'auto'"),
    ("environment.thresholds", [1, 1], "increasing values"),
    ("quantization.key_weight_bits", 1, "at least 2 and at most 16"),
    ("quantization.levels", [0, 1, 8], "at least 2 bits"),
    ("quantization.levels", [0, 8], "'heuristic.kappa' must have one value fewer"),
    ("quantization.residual_weight_bits", "autp", "auto"),
    ("quantization.residual_weight_bits", {"conv": 99}, "at most 16"),
    ("quantization.range_estimator", "minmax", "'min_max'"),
    ("heuristic.references", ["previous", "key"], "keyframe"),
    ("heuristic.taus", [], "at least one value"),
    ("heuristic.kappa", [1.0, 8.0, 2.0], "increasing values"),
    ("heuristic.other_kappas", [[1.0, 2.0]], "each as long as heuristic.kappa"),
    ("heuristic.other_kappas", [[1.0, 8.0, 2.0]], "increasing values"),
    ("heuristic.frame_taus", [0.2, 0], "above 0"),
    ("heuristic.frame_kappa", [1.0, 0.5, 1.4], "increasing values"),
    ("heuristic.frame_kappa", [], "increasing values"),
    ("heuristic.searches", ["greedi"], "'greedy'"),
    ("heuristic.frame_taus", [], "at least one value"),
    ("quantization.weight_rounding", "neares", "'nearest'"),
    ("seed", -1, "at least 0"),
    ("threads", 0, "at least 1"),
    ("results", None, "text"),
    ("results", 2026, """'results="2026"'"""),
    ("results", "", "the name of a folder"),
    ("training.n_steps", 1, "at least 2"),
    ("training.policy_bits", 17, "2 to 16, or 32"),
    ("training.hidden", [], "at least one value"),
    ("pretraining.zoom", [2.0, 1.0], "two positive factors"),
    ("pretraining.batch", 1, "at least 2"),
    ("quantization.groups", "atuo", "'auto'"),
    ("running.height", 8, "at least 16 and at most 4320"),
    ("tracking.tags", {"a": [1]}, "a mapping whose values are each text or an integer"),
    ("task.kind", "probabilty", "'probability'"),
]


@pytest.mark.parametrize(("overrides", "name", "nearest"), MISTAKEN_OVERRIDES)
def test_a_mistaken_override_gives_one_line_with_its_name_and_what_would_be_valid(
    overrides: str, name: str, nearest: str
) -> None:
    words = [overrides] if overrides == "training frames" else overrides.split(" ")
    with pytest.raises(SettingsError) as raised:
        load_settings("train", words)
    line = str(raised.value)
    assert name in line
    assert nearest in line
    assert "\n" not in line


@pytest.fixture(scope="module")
def defaults() -> DictConfig:
    return compose_config("train")


@pytest.mark.parametrize(("name", "value", "expected"), MISTAKEN_VALUES)
def test_a_mistaken_value_gives_one_line_with_its_name_and_what_would_be_valid(
    defaults: DictConfig, name: str, value: Any, expected: str
) -> None:
    config = defaults.copy()
    OmegaConf.update(config, name, value, merge=False)
    with pytest.raises(SettingsError) as raised:
        make_settings(config)
    line = str(raised.value)
    assert name in line
    assert expected in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("overrides", "get", "value"),
    [
        ("training.frames=1e5", lambda s: s.training.frames, 100_000),
        ("training.learning_rate=1", lambda s: s.training.learning_rate, 1.0),
        ("environment.trade_off=0.1", lambda s: s.environment.trade_off_range, (0.1, 0.1)),
        ("environment.trade_off=[0.1,0.2]", lambda s: s.environment.trade_off_range, (0.1, 0.2)),
        ("quantization.residual_weight_bits=4", lambda s: s.quantization.residual_weight_bits, 4),
        (
            "quantization.residual_weight_bits={conv:4,depthwise:8}",
            lambda s: s.quantization.residual_weight_bits,
            {"conv": 4, "depthwise": 8},
        ),
        (
            "quantization.groups={head:[head.*],rest:['*']}",
            lambda s: s.quantization.groups,
            {"head": ("head.*",), "rest": ("*",)},
        ),
        ("environment=frame_bits", lambda s: s.environment.id, "resq_rl/FrameBits-v0"),
        ("environment=frame_level", lambda s: s.environment.id, "resq_rl/FrameLevel-v0"),
        ("environment=frame_level", lambda s: s.environment.reference, "keyframe"),
        ("heuristic.frame_kappa=[1,2,3]", lambda s: s.heuristic.frame_kappa, (1.0, 2.0, 3.0)),
        ("+tracking.tags.owner=me", lambda s: s.tracking.tags, {"owner": "me"}),
        ("+video.fps=12", lambda s: s.video.arguments["fps"], 12.0),
        ("video.size=[32,48]", lambda s: s.video.arguments["size"], (32, 48)),
    ],
)
def test_values_become_what_the_annotations_say(overrides: str, get: Any, value: Any) -> None:
    found = get(load_settings("train", [overrides]))
    assert found == value
    assert type(found) is type(value)


def test_settings_are_frozen() -> None:
    settings = load_settings("train")
    assert isinstance(settings, Settings)
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.seed = 1  # type: ignore[misc]


def test_bounds_hold_for_settings_made_in_python() -> None:
    with pytest.raises(SettingsError, match=r"training\.gamma"):
        dataclasses.replace(load_settings("train").training, gamma=2.0)


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        (3, int, 3),
        (3.0, int, 3),
        (3, float, 3.0),
        (None, int | None, None),
        ("a", Path, Path("a")),
        ([1, 2], tuple[int, ...], (1, 2)),
        ([1, "a"], tuple[int, str], (1, "a")),
        ([1], list[int], [1]),
        ({"a": [1]}, dict[str, tuple[float, ...]], {"a": (1.0,)}),
        (True, Literal[True, "auto"], True),
        ([1], tuple[Annotated[int, Field(ge=0)], ...], (1,)),
        ("anything", Any, "anything"),
    ],
)
def test_conversion(value: Any, annotation: Any, expected: Any) -> None:
    converted = convert(value, annotation, "x")
    assert converted == expected
    assert type(converted) is type(expected)


@pytest.mark.parametrize(
    ("value", "annotation", "message"),
    [
        (1, Literal[True], "'x' must be True; received 1"),
        (True, float, "'x' must be a finite number; received True"),
        (1, bool, "'x' must be true or false"),
        ("1", int | None, "'x' must be an integer or null; received '1'"),
        ({"a": "b"}, dict[str, int], "a mapping whose values are each an integer"),
        (3, dict[str, int], r"a mapping .*, such as \{name: value\}"),
        (5, Path, "a path"),
        ("???", int, r"'x' has no default. Set it with x=VALUE"),
    ],
)
def test_conversion_refuses(value: Any, annotation: Any, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        convert(value, annotation, "x")


class Part:
    def __init__(self, length: int = 1) -> None:
        self.length = length


def assemble(parts: list[Part], name: str, scale: float = 1.0) -> tuple[list[int], str, float]:
    if scale < 0:
        raise ValueError(f"scale must not be negative, got {scale}")
    if scale == 0:
        raise VideoError("nothing is left at scale 0")
    return [part.length for part in parts], name, scale


def anything(**settings: Any) -> dict[str, Any]:
    return settings


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> str:
    """The dotted name of a module with targets of a user's own."""
    made = ModuleType("own_targets")
    for item in (Part, assemble, anything):
        setattr(made, item.__name__, item)
        monkeypatch.setattr(item, "__module__", "own_targets")
    monkeypatch.setitem(sys.modules, "own_targets", made)
    return "own_targets"


def test_target_builds_nested_targets(module: str) -> None:
    node = {"_target_": f"{module}.assemble", "parts": [{"_target_": f"{module}.Part", "length": 3}], "scale": 2}
    assert make_target(node, "video").build(name="x") == ([3], "x", 2.0)


def test_target_takes_any_name_where_its_function_does(module: str) -> None:
    assert make_target({"_target_": f"{module}.anything", "a": [1], "b": None}, "video").build() == {
        "a": [1],
        "b": None,
    }


def test_target_settings_build_the_shipped_video() -> None:
    target = load_settings("train", ["video.train=1", "video.size=[32,32]", "video.frames=2"]).video
    video = target.build(validation=3)
    assert isinstance(video, GeneratedVideo)
    assert (video.size, video.train, video.validation) == ((32, 32), 1, 3)


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"_target_": "own_targets.assemble", "nam": "x"}, "Unknown setting 'video.nam'. Did you mean 'video.name'?"),
        ({"_target_": "own_targets.assemble", "name": 3}, "Setting 'video.name' must be text; received 3."),
        (
            {"_target_": "own_targets.assemble", "parts": [{"_target_": "own_targets.Part", "lenth": 1}]},
            "Unknown setting 'video.parts.0.lenth'. Did you mean 'video.parts.0.length'?",
        ),
        ({"_target_": "own_targets.asemble"}, "Did you mean 'own_targets.assemble'?"),
        ({"_target_": "no_such_package.Thing"}, "there is no module 'no_such_package'"),
        ({"_target_": "os.system"}, "blocklisted"),
        ({"_target_": "not a path"}, "Cannot use 'not a path'"),
        ({"_target_": "???"}, "Setting 'video._target_' has no default"),
        ({"name": "x"}, "Setting 'video' needs a _target_"),
        ("generated", "Setting 'video' needs a _target_"),
    ],
)
def test_target_refuses(module: str, node: Any, message: str) -> None:
    with pytest.raises(SettingsError) as raised:
        make_target(node, "video")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_target_names_a_failing_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_installed.py").write_text("import a_missing_dependency\n")
    (tmp_path / "broken_module.py").write_text("raise RuntimeError('boom')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SettingsError, match="needs the module 'a_missing_dependency', which is not installed"):
        make_target({"_target_": "half_installed.Thing"}, "video")
    with pytest.raises(SettingsError, match="importing broken_module failed with RuntimeError: boom"):
        make_target({"_target_": "broken_module.Thing"}, "video")


def test_target_reports_what_its_function_refuses(module: str) -> None:
    def built(**arguments: Any) -> Any:
        return Target("video", f"{module}.assemble", {"parts": [], **arguments}).build()

    with pytest.raises(SettingsError, match=r"'video.name' is missing: own_targets.assemble needs it"):
        built()
    with pytest.raises(
        SettingsError, match=r"Cannot make 'video' \(own_targets.assemble\): scale must not be negative"
    ):
        built(name="x", scale=-1.0)
    with pytest.raises(VideoError, match="nothing is left"):
        built(name="x", scale=0.0)


def test_budgets_are_read_from_some_of_their_fields() -> None:
    environment = load_settings("compare", ["+experiment=budget"]).environment
    assert environment.budget == Budget(peak=0.25, mean=0.12, bucket=8.0)
    assert load_settings("compare").environment.budget is None
    running = load_settings("run", ["running.budget={peak: 0.3, mean: 0.1}"]).running
    assert running.budget == Budget(peak=0.3, mean=0.1)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("running.budget=0.3", "some of peak, mean, bucket"),
        ("running.budget={top: 0.3}", "some of peak, mean, bucket"),
        ("running.budget={peak: 0.1, mean: 0.3}", "no frame may cost more than the peak"),
    ],
)
def test_budgets_that_cannot_be_are_refused(override: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        load_settings("run", [override])


def test_frame_level_tables_take_no_budget() -> None:
    with pytest.raises(SettingsError, match=r"environment\.budget.* must be null"):
        load_settings("compare", ["environment=frame_level", "environment.budget={peak: 0.3}"])
