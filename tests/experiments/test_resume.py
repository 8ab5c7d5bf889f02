"""A command that is killed at any moment and goes on leaves what it would have left without the kill, bit for bit.

`make test ARGS="-m slow -k random_moments -s"` kills fifty trainings; RESQ_RL_KILLS sets another number.
"""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

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


def kill_and_go_on(runs: Runs, seconds: float, points: int, *, seed: int) -> int:
    """Kill runs of so many seconds at random moments, some of them again when they go on; how many were caught."""
    generator, caught = np.random.default_rng(seed), 0
    expected = runs.left_behind("whole")
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
    return caught


def test_a_training_that_is_killed_goes_on_as_if_it_had_not_been(runs: Make) -> None:
    training = runs("train", "training.seeds=[0]", "training.keyframe_frames=0", "training.frames=90")
    seconds = training.finish("whole")
    assert kill_and_go_on(training, seconds, 2, seed=3) > 0


@pytest.mark.slow
def test_trainings_killed_at_random_moments_go_on_exactly(runs: Make) -> None:
    points = int(os.environ.get("RESQ_RL_KILLS", "50"))
    training = runs("train")
    training.finish("warm")
    seconds = training.finish("whole")
    assert differences(training.left_behind("warm"), training.left_behind("whole")) == []
    caught = kill_and_go_on(training, seconds, points, seed=0)
    print(f"{points} random kill points ({caught} before the end), {points} exact resumes")
    assert caught > points // 4, "the machine was faster than when the whole run was timed"


@pytest.mark.slow
def test_comparisons_killed_at_random_moments_go_on_exactly(runs: Make) -> None:
    comparison = runs("compare", "training.seeds=[0]", "heuristic.searches=[greedy]")
    seconds = comparison.finish("whole")
    assert kill_and_go_on(comparison, seconds, 8, seed=1) > 2


@pytest.mark.slow
def test_pretrainings_killed_at_random_moments_go_on_exactly(runs: Make) -> None:
    pretraining = runs("pretrain", *FEW_STEPS)
    seconds = pretraining.finish("whole")
    assert kill_and_go_on(pretraining, seconds, 8, seed=2) > 2
