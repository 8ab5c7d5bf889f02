"""What Hydra's grammar cannot read is named with the form that it reads."""

import shlex
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf import open_dict

from resq_rl.errors import SettingsError
from resq_rl.experiments.config.composition import load_settings
from resq_rl.experiments.config.quoting import assignment, readable

NAMES = [
    "what?x",
    "my clips (1)",
    "clip[1].mp4",
    "クリップ.mp4",
    "видео/ünï.avi",
    "a,b",
    "a=b",
    "it's",
    'say "x"',
    "{x}",
    "a}b",
    "~home",
    "#1",
    "a;b&c",
    "50%",
    "a\\b",
    "a\\",
    "$HOME",
    " lead",
    "a\nb",
    "null",
    "true",
    "007",
    "2026",
    "1e5",
    "[a]",
]


def read(override: str) -> Any:
    parsed = OverridesParser.create().parse_override(override)
    assert not parsed.is_sweep_override()
    return parsed.value()


def composed(*overrides: str) -> Any:
    with initialize_config_module("resq_rl.configs", version_base="1.3"):
        config = compose("train", list(overrides), return_hydra_config=True)
    with open_dict(config):
        config.hydra.job.name = "train"
    return config


def test_names_are_written_so_that_they_come_back() -> None:
    assert [read(assignment("results", name)) for name in NAMES] == NAMES
    config = composed(*(assignment(f"+names.n{i}", name) for i, name in enumerate(NAMES)))
    assert list(config.names.values()) == NAMES


@pytest.mark.parametrize(
    "name", ["what?x", "my clips (1)", "видео/ünï.avi", "a,b", "it's", "{x}", "$HOME", "null", "2026"]
)
def test_runs_go_to_a_folder_of_any_name(name: str) -> None:
    config = composed(assignment("policy", name), assignment("results", name))
    assert config.policy == name
    assert str(config.hydra.run.dir).startswith(f"{name}/train/")
    assert config.tables == f"{name}/tables"


def test_runs_of_an_experiment_go_to_a_folder_of_its_name() -> None:
    config = composed(assignment("results", "a b"), "+experiment=camvid_network")
    assert str(config.hydra.run.dir).startswith("a b/camvid_network")
    assert config.tables == "a b/tables"


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1))
@example("\\\\'\"\\")
@example('\\"')
def test_any_text_is_written_so_that_it_comes_back(text: str) -> None:
    if "${" not in text:
        assert read(assignment("results", text)) == text


@pytest.mark.parametrize(
    ("override", "form", "value"),
    [
        ("source=/my clips/a (1).mp4", 'source="/my clips/a (1).mp4"', "/my clips/a (1).mp4"),
        ("source=クリップ.mp4", 'source="クリップ.mp4"', "クリップ.mp4"),
        ("source=it's", 'source="it\'s"', "it's"),
        ("policy=seed0 (copy)", 'policy="seed0 (copy)"', "seed0 (copy)"),
        ("+video.paths.train=[a[100:400]]", '+video.paths.train=["a[100:400]"]', ["a[100:400]"]),
        (
            "x=[a[:56], 'b[1:2]', 3, null, c d]",
            "x=[\"a[:56]\",'b[1:2]',3,null,c d]",
            ["a[:56]", "b[1:2]", 3, None, "c d"],
        ),
        ("x=[it's [1].mp4,b]", 'x=["it\'s [1].mp4",b]', ["it's [1].mp4", "b"]),
        (
            "video.paths={train:[a[1:2]],validation:[b (1)],test:[c]}",
            'video.paths={train:["a[1:2]"],validation:["b (1)"],test:[c]}',
            {"train": ["a[1:2]"], "validation": ["b (1)"], "test": ["c"]},
        ),
        ("x=[[a[1],b],[c(]]", 'x=[["a[1]",b],["c("]]', [["a[1]", "b"], ["c("]]),
        ("results=a=b", 'results="a=b"', "a=b"),
    ],
)
def test_an_unreadable_value_is_named_with_the_form_that_works(override: str, form: str, value: Any) -> None:
    with pytest.raises(SettingsError) as raised:
        load_settings("run", [override])
    words = shlex.split(str(raised.value).partition("for Hydra: ")[2].removesuffix("."))
    assert words == [form] == [readable(override)]
    assert read(form) == value


def test_each_value_of_a_sweep_is_quoted() -> None:
    form = readable("source=ü.mp4,b (1).mp4,c.mp4", several=True)
    assert form is not None
    assert list(OverridesParser.create().parse_override(form).sweep_string_iterator()) == [
        '"ü.mp4"',
        '"b (1).mp4"',
        "c.mp4",
    ]


def test_the_documented_range_of_frames_reaches_the_video(tmp_path: Path) -> None:
    overrides = ["video=files", 'video.paths={train:["/my clips/a.mp4[100:400]"],validation:[b],test:[c]}']
    paths = load_settings("train", overrides).video.arguments["paths"]
    assert list(paths["train"]) == ["/my clips/a.mp4[100:400]"]


def test_quotes_do_not_mend_a_name() -> None:
    assert readable("a b=3") is None
