"""`resq-rl COMMAND --help`: every setting that a command uses stands there with its value and its meaning."""

from dataclasses import fields

import pytest

from resq_rl.experiments.cli.app import main
from resq_rl.experiments.cli.commands import COMMANDS
from resq_rl.experiments.config.composition import load_settings


def page(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, str]:
    """What the page of help says by the name that a line begins with, lines that go on joined."""
    assert main([*words, "--help"]) == 0
    found: dict[str, str] = {}
    name = ""
    for line in capsys.readouterr().out.splitlines():
        if line.startswith("  ") and line[2:3].strip():
            name = line.split()[0]
            found[name] = ""
        found[name] = " ".join([found.get(name, ""), *line.split()])
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_the_settings_that_a_command_uses_have_a_line_each(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines, settings = page(capsys, command), load_settings(COMMANDS[command].config)
    groups = COMMANDS[command].groups
    for group in ("quantization", "environment", "training", "heuristic", "running", "exporting", "benchmark"):
        for field in fields(getattr(settings, group)):
            name = f"{group}.{field.name}"
            assert (name in lines) == (group in groups), name
            if name in lines:
                _, *said = lines[name].split()
                assert len(said) >= 3, f"{name} has a value and a meaning"
    assert {"results", "threads", "model._target_"} <= set(lines)


def test_what_is_chosen_shows(capsys: pytest.CaptureFixture[str]) -> None:
    lines = page(capsys, "compare", "video=carphone", "training.seeds=[4,5]", "environment.accuracy=teacher")
    assert "[4,5]" in lines["training.seeds"]
    assert "teacher" in lines["environment.accuracy"]
    assert "resq_rl.video.VideoFiles" in lines["video._target_"]
    assert "carphone" in lines["video"]
    assert "height and width" in lines["video.size"]


def test_the_example_is_valid() -> None:
    for command in COMMANDS.values():
        assert load_settings(command.config, [word.strip("'") for word in command.example.split()])
