"""Memory stays where it is over very many frames, in a process of its own that has nothing else to keep.

`make test ARGS="-m slow tests/envs/test_soak.py -s"`.
"""

import multiprocessing
from collections.abc import Callable

import numpy as np
import pytest
import torch

from resq_rl.experiments.bench.bench import mebibytes_in_use
from resq_rl.quantization import ThresholdField, to_float
from resq_rl.video import GeneratedVideo
from tests.envs import problems
from tests.envs.problems import make_problem

STEPS = 100_000
STREAM_FRAMES = 24 * 3600  # an hour at 24 frames a second
CLIP_FRAMES = 48
GROWTH = 0.02


def show(done: int, of: int) -> float:
    """Print a line; the memory in use."""
    used = mebibytes_in_use()
    print(f"{done:,} of {of:,}: {used:.1f} MiB", flush=True)
    return used


def soak_in_steps() -> None:
    """Random actions in an environment of four clips."""
    problem = make_problem()
    problem.model.compile()
    core = problems.agents(problem, 4)
    core.reset(range(4))
    generator = np.random.default_rng(0)
    used = []
    for step in range(STEPS):
        if step % (STEPS // 10) == 0:
            used.append(show(step, STEPS))
        core.step(generator.integers(core.scheme.nvec, size=(core.agents, len(core.scheme.nvec))))
    check_constant(used[1], show(STEPS, STEPS))


def soak_in_video() -> None:
    """A stream of generated clips, each made when its turn comes."""
    problem = make_problem()
    problem.model.compile()
    clips = STREAM_FRAMES // CLIP_FRAMES
    video = GeneratedVideo(size=problem.model.frame_size, frames=CLIP_FRAMES, train=clips)
    state = problem.model.new_state(1, "previous")
    field = ThresholdField.constant(0.7, clips=1, groups=problem.groups)
    used = []
    for index in range(clips):
        if index % (clips // 10) == 0:
            used.append(show(index * CLIP_FRAMES, STREAM_FRAMES))
        for number, frame in enumerate(video.clip("train", index).frames):
            problem.model.step(to_float(frame[None]), state, torch.tensor([number == 0]), field)
    check_constant(used[1], show(STREAM_FRAMES, STREAM_FRAMES))


def check_constant(warm: float, last: float) -> None:
    print(f"{warm:.1f} MiB after a tenth, {last:.1f} MiB at the end ({last / warm - 1:+.2%})", flush=True)
    assert last < warm * (1 + GROWTH)


def run(soak: Callable[[], None]) -> None:
    torch.set_num_threads(1)
    soak()


def run_alone(soak: Callable[[], None]) -> None:
    """In a process of its own."""
    process = multiprocessing.get_context("spawn").Process(target=run, args=(soak,))
    process.start()
    process.join()
    assert process.exitcode == 0


@pytest.mark.slow
@pytest.mark.parametrize("soak", [soak_in_steps, soak_in_video])
def test_memory_stays_where_it_is(soak: Callable[[], None]) -> None:
    run_alone(soak)
