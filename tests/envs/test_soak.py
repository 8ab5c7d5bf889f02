"""Memory stays where it is over very many frames.

`make test ARGS="-m slow tests/envs/test_soak.py -s"`.
"""

import numpy as np
import pytest
import torch

from resq_rl.experiments.bench import _mebibytes
from resq_rl.quantization import ThresholdField, to_float
from resq_rl.video import GeneratedVideo
from tests.envs.worlds import World

STEPS = 100_000
STREAM_FRAMES = 24 * 3600  # an hour at 24 frames a second
GROWTH = 0.02


def assert_constant(before: float, after: float, what: str) -> None:
    print(f"{what}: {before:.1f} MiB after warm-up, {after:.1f} MiB at the end ({after / before - 1:+.2%})")
    assert after < before * (1 + GROWTH)


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked_types")  # half of the time
def test_memory_stays_over_a_hundred_thousand_steps(world: World) -> None:
    core = world.core(4)
    core.reset(range(4))
    generator = np.random.default_rng(0)
    before = 0.0
    for step in range(STEPS):
        if step % (STEPS // 10) == 0:
            before = _mebibytes() if step == STEPS // 10 else before
            print(f"{step:,} steps: {_mebibytes():.1f} MiB", flush=True)
        core.step(generator.integers(core.scheme.nvec, size=(core.agents, len(core.scheme.nvec))))
    assert_constant(before, _mebibytes(), f"{STEPS} steps of {core.clips} clips")


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked_types")  # half of the time
def test_memory_stays_over_an_hour_of_video(world: World) -> None:
    video = GeneratedVideo(size=world.model.frame_size, frames=48, train=STREAM_FRAMES // 48)
    state = world.model.new_state(1, "previous")
    field = ThresholdField.constant(0.7, clips=1, groups=len(world.model.groups))
    done, before = 0, 0.0
    for index in range(STREAM_FRAMES // 48):
        for frame in video.clip("train", index).frames:
            refresh = torch.tensor([done % 48 == 0])
            world.model.step(to_float(frame[None]), state, refresh, field)
            done += 1
        before = _mebibytes() if index == STREAM_FRAMES // 480 else before
    assert_constant(before, _mebibytes(), f"a stream of {done} generated frames")
