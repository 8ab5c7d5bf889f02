"""The benchmark command on a tiny world, and its arithmetic under a clock that the test moves."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from resq_rl.experiments.bench import bench, growth
from resq_rl.experiments.bench.timing import Figure, alternate, timed
from tests.experiments.jobs.test_jobs import run

SMALL = ["benchmark.batches=[1,2]", "benchmark.rounds=1", "benchmark.processes=1", "benchmark.soak_steps=20"]


def test_figures_are_medians_of_the_ratios_of_each_round() -> None:
    now = 0.0
    durations = {"base": iter([99.0, 1.0, 2.0, 4.0]), "other": iter([99.0, 6.0, 6.0, 4.0])}  # the first warms up
    ran: list[str] = []

    def job(name: str, frames: int) -> Callable[[], int]:
        def work() -> int:
            nonlocal now
            now += next(durations[name])
            ran.append(name)
            return frames

        return work

    figures = alternate({"base": job("base", 1), "other": job("other", 2)}, 3, clock=lambda: now)
    assert ran == ["base", "other"] * 4
    assert figures["base"] == Figure(1.0, 1.0, 1.0, 2000.0)
    assert figures["other"] == Figure(1.5, 0.5, 3.0, 3000.0)  # per frame 3, 3 and 2 seconds, against 1, 2 and 4


def test_timing_a_method_adds_up_and_leaves_the_object_as_it_was() -> None:
    class Slow:
        def work(self, result: int) -> int:
            return result

    slow, spent = Slow(), {}  # type: tuple[Slow, dict[str, float]]
    with timed(slow, "work", spent):
        assert [slow.work(1), slow.work(result=2)] == [1, 2]
    assert spent["work"] > 0
    assert vars(slow) == {}
    with timed(Slow, "work", spent):
        assert slow.work(3) == 3
    assert Slow.work.__name__ == "work"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the command writes, of small networks and few steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(growth, "DEPTHS", (2, 3))
        patch.setattr(growth, "WIDTHS", (8, 10, 12))
        patch.setattr(bench, "TABLE_SLOTS", 8)
        patch.setattr(bench, "TABLE_STEPS", 5)
        patch.setattr(bench, "RATE_STEPS", 2)
        folder: Path = run(tmp_path_factory.mktemp("results"), "bench", *SMALL)
    values: dict[str, Any] = json.loads((folder / "bench.json").read_text())
    return values


def test_every_part_is_measured(report: dict[str, Any]) -> None:
    growth = ["grids", "resolutions", "layers", "widths", "groups", "clip lengths"]
    rest = ["environment", "training", "processes", "tables", "memory"]
    assert list(report["parts"]) == ["steps, batch 1", "steps, batch 2", *growth, *rest]
    assert [len(report["parts"][part]) for part in growth] == [3, 3, 2, 3, 2, 3]  # there are three groups, or one
    assert list(report["parts"]["resolutions"]) == ["16x24", "32x48", "64x96"]
    assert report["threads"] == 1
    assert report["frame_size"] == [32, 48]


def test_ratios_are_to_a_float_forward_pass(report: dict[str, Any]) -> None:
    for part in ("steps, batch 1", "steps, batch 2", "environment"):
        reference, *others = report["parts"][part].items()
        assert reference[0] == "float forward"
        assert reference[1]["ratio"] == 1.0
        for name, figure in others:
            assert 0 < figure["lowest"] <= figure["ratio"] <= figure["highest"], name
            assert figure["milliseconds"] > 0, name


def test_shares_of_training_are_a_whole(report: dict[str, Any]) -> None:
    shares = report["parts"]["training"].values()
    assert sum(shares) == pytest.approx(1.0)
    assert min(shares) > 0
