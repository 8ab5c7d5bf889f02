"""The worked example of docs/adding_a_task.md: its files, as they stand there, make a task that can be compared."""

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from resq_rl.experiments.cli.app import main
from resq_rl.experiments.results.comparison import Comparison
from resq_rl.perception import Task
from tests.envs.problems import TINY_NETWORK
from tests.experiments.jobs.test_jobs import FEW, TINY

DOCUMENT = Path(__file__).parents[3] / "docs" / "adding_a_task.md"


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the document's file and config."""
    blocks = dict(re.findall(r"```(python|yaml)\n(.*?)```", DOCUMENT.read_text(), re.DOTALL))
    (tmp_path / "coverage_task.py").write_text(blocks["python"])
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "coverage.yaml").write_text(blocks["yaml"])
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("coverage_task", None)


def test_the_documents_task_can_be_compared(example: Path) -> None:
    own = [*TINY_NETWORK, *FEW, "task=coverage", "training.frames=30"]
    assert main(["compare", "--config-dir", str(example), *TINY, *own, f"results={example}"]) == 0
    (found,) = (example / "compare").glob("*/comparison.json")
    comparison = Comparison.read(found)
    assert comparison.task == "coverage"
    assert comparison.accuracy_metric == "overlap of shares"
    assert 0.3 < comparison.float_accuracy < 1
    assert comparison.fronts["per_frame"][0].accuracy == pytest.approx(comparison.float_accuracy, abs=0.05)
    assert comparison.fronts["ppo"]
    assert (found.parent / "decisions.png").is_file()


def test_the_documents_class_is_a_task(example: Path) -> None:
    assert isinstance(importlib.import_module("coverage_task").Coverage(), Task)
