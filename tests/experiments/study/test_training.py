"""Training region agents and then their keyframes, on a tiny study without the command line."""

import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from resq_rl.envs import Problem
from resq_rl.errors import PolicyError
from resq_rl.experiments.config.composition import load_settings
from resq_rl.experiments.study.study import Study
from resq_rl.experiments.study.training import front_candidates, keyframe_settings, save_chosen, train_policy
from resq_rl.experiments.tracking.tracker import NullTracker
from resq_rl.policies import LearnedPolicy
from resq_rl.policies.ppo import TrainingReport
from resq_rl.video import Framing, Split
from tests.envs.problems import GRID, tiny_network

FRAMES = (80, 150)  # of the region agents and of their keyframes
SETTINGS = [
    f"environment.grid=[{GRID[0]},{GRID[1]}]",
    "environment.clips_per_batch=2",
    "environment.keyframe_intervals=[4,0]",
    "environment.trade_off=[0.1,1.0]",
    "training.n_steps=5",
    "training.trade_offs=3",
    f"training.frames={FRAMES[0]}",
    f"training.keyframe_frames={FRAMES[1]}",
]


@pytest.fixture(scope="module")
def tiny(problem: Problem) -> Study:
    """A small study that asks for learned keyframes."""
    problems: dict[Split, Problem] = {"train": problem, "validation": problem}
    framing = Framing(problem.model.frame_size)
    return Study(load_settings("train", SETTINGS), tiny_network(), problems, (), "tiny", framing)


def of_frames(study: Study, frames: int, keyframe_frames: int) -> Study:
    """The same study that trains for other numbers of frames."""
    training = replace(study.settings.training, frames=frames, keyframe_frames=keyframe_frames)
    return replace(study, settings=replace(study.settings, training=training))


def train(study: Study, folder: Path, *, resume: bool = False) -> tuple[LearnedPolicy, TrainingReport]:
    return train_policy(study, 0, folder, NullTracker(folder), start=None, resume=resume)


def same(a: LearnedPolicy | None, b: LearnedPolicy | None) -> bool:
    assert a is not None
    assert b is not None
    return all(torch.equal(x, y) for x, y in zip((*a.weights, *a.biases), (*b.weights, *b.biases), strict=True))


class Logged(NullTracker):
    """Keeps the names of the files that it is given."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.files: list[Path] = []

    def log_artifact(self, path: Path, folder: str = "") -> None:
        self.files.append(path)


@dataclass(frozen=True)
class Trained:
    """A training, and the folder that it left."""

    folder: Path
    policy: LearnedPolicy
    report: TrainingReport

    def copied(self, to: Path) -> Path:
        """Its folder once more, to go on in."""
        return Path(shutil.copytree(self.folder, to / "copy"))


@pytest.fixture(scope="module")
def alone(tiny: Study, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A training without keyframes."""
    folder = tmp_path_factory.mktemp("alone")
    return Trained(folder, *train(of_frames(tiny, FRAMES[0], 0), folder))


@pytest.fixture(scope="module")
def joint(tiny: Study, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A training of region agents and then of their keyframes."""
    folder = tmp_path_factory.mktemp("joint")
    return Trained(folder, *train(tiny, folder))


def test_keyframes_are_learned_beside_agents_that_stay_as_they_are(alone: Trained, joint: Trained) -> None:
    assert alone.policy.keyframes is None
    assert not (alone.folder / "keyframes").exists()
    assert same(alone.policy, joint.policy)
    assert joint.policy.keyframes is not None
    assert joint.policy.keyframes.scheme.kind == "keyframe"
    assert same(LearnedPolicy.load(joint.folder).keyframes, joint.policy.keyframes)
    before, report = alone.report, joint.report
    assert report.frames >= before.frames + FRAMES[1]
    assert report.curve[: before.rollouts] == before.curve
    frames = [row["frames"] for row in report.curve]
    assert frames == sorted(set(frames)), "one curve after the other"
    assert (frames[-1], len(frames)) == (report.frames, report.rollouts)


def test_keyframes_are_added_to_a_finished_run(tiny: Study, alone: Trained, joint: Trained, tmp_path: Path) -> None:
    later, _ = train(tiny, alone.copied(tmp_path), resume=True)
    assert same(alone.policy, later)
    assert same(later.keyframes, joint.policy.keyframes)


def test_a_finished_run_comes_back_with_its_keyframes(tiny: Study, joint: Trained, tmp_path: Path) -> None:
    again, twin = train(tiny, joint.copied(tmp_path), resume=True)
    assert same(joint.policy, again)
    assert same(joint.policy.keyframes, again.keyframes)
    assert twin == joint.report


def test_a_finished_training_goes_on_with_no_more_frames(tiny: Study, joint: Trained, tmp_path: Path) -> None:
    """The learning rate falls over the whole length, so more frames would be another run from its first step on."""
    with pytest.raises(PolicyError, match=r"settings.frames was 80 and is 240"):
        train(of_frames(tiny, 3 * FRAMES[0], FRAMES[1]), joint.copied(tmp_path), resume=True)


def test_validation_chooses_among_learned_and_fixed_timing(tiny: Study, joint: Trained) -> None:
    lambdas = [pytest.approx(0.1), pytest.approx(10**-0.5), pytest.approx(1.0)]
    found = front_candidates(tiny, joint.policy)
    assert [p.trade_off for p in found if p.keyframes is not None] == lambdas
    assert [p.trade_off for p in found if p.keyframes is None and p.interval == 4] == lambdas
    assert [p.trade_off for p in found if p.keyframes is None and p.interval == 0] == lambdas
    assert len(found) == 9
    results = {tuple(tiny.measure(p, "validation").keyframes.tolist()) for p in found if p.keyframes is None}
    assert results == {(1, 1, 1, 1), (2, 2, 2, 2)}
    assert len(front_candidates(tiny, joint.policy.at(0.2, 0))) == 6


def test_a_policy_is_shipped_with_the_rule_that_most_of_its_front_follows(alone: Trained, tmp_path: Path) -> None:
    policy, logged = alone.policy, Logged(tmp_path)
    quiet, watching = policy.at(0.2), replace(policy, scene_change=0.4)
    save_chosen(tmp_path, policy, [watching, quiet, watching], logged)
    assert LearnedPolicy.load(tmp_path).scene_change == 0.4
    assert (tmp_path / "policy.json") in logged.files
    save_chosen(tmp_path, policy, [quiet, watching, quiet], logged)
    assert LearnedPolicy.load(tmp_path).scene_change == math.inf


def test_a_policy_that_decides_on_keyframes_is_shipped_as_it_is(joint: Trained, tmp_path: Path) -> None:
    save_chosen(tmp_path, joint.policy, [replace(joint.policy.at(0.2, 4), scene_change=0.4)], Logged(tmp_path))
    assert same(LearnedPolicy.load(tmp_path).keyframes, joint.policy.keyframes)


def test_the_keyframe_policy_looks_further_ahead(tiny: Study) -> None:
    regions, keyframes = tiny.settings.training.ppo(), keyframe_settings(tiny.settings)
    assert keyframes.frames == FRAMES[1]
    assert keyframes.gamma > regions.gamma
    assert keyframes.n_steps > regions.n_steps
    assert keyframes.policy_bits == regions.policy_bits, "they are charged together"
