"""Fused kernels against the plain ones, in processes of their own: run-time type checks are no code to compile."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

STEPS = """
import copy, itertools, pickle, torch
from resq_rl.quantization import LevelField, ResQModel, ThresholdField
from resq_rl.quantization.kernels import PLAIN

class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 8, 3, 2, 1)
        self.body = torch.nn.Conv2d(8, 8, 3, 1, 1, groups=8)
        self.up = torch.nn.ConvTranspose2d(8, 4, 2, 2, bias=False)
        self.head = torch.nn.Linear(4, 2)
    def forward(self, x):
        x = self.up(torch.relu(self.body(torch.relu(self.stem(x)))))
        return self.head(x.mean((2, 3)))

torch.manual_seed(0)
network = Network()
clips = [torch.randint(0, 256, (8, 3, 20, 28), dtype=torch.uint8) for _ in range(2)]
plain, fused = (ResQModel(network, torch.zeros(1, 3, 20, 28)).calibrate(clips) for _ in range(2))
fused.compile()
assert fused.kernels is not PLAIN, "not compiled"
for clips, reference, thresholds in itertools.product((1, 3), ("previous", "keyframe"), (True, False)):
    states = [model.new_state(clips, reference) for model in (plain, fused)]
    frames = torch.rand(clips, 3, 20, 28)
    for t in range(4):
        frames = (frames + 0.2 * torch.randn(frames.shape)).clamp(0, 1)
        refresh = torch.arange(clips) < (clips if t == 0 else clips - 1 if t == 2 else 0)
        groups = len(plain.groups)
        field = (
            ThresholdField(torch.rand(clips, groups, 2, 3) * 2, (1.0, 1.5 + t, 8.0))
            if thresholds
            else LevelField(torch.randint(4, (clips, groups, 2, 3)))
        )
        (a, cost), (b, other) = (m.step(frames, s, refresh, field) for m, s in zip((plain, fused), states))
        assert torch.equal(a, b) and torch.equal(cost.bops, other.bops), (clips, reference, thresholds, t)
        for mine, its in zip(states[0].inputs + states[0].outputs, states[1].inputs + states[1].outputs):
            assert torch.equal(mine, its), (clips, reference, thresholds, t)
again = pickle.loads(pickle.dumps(fused))
assert again.kernels is not PLAIN and again.kernels.device == fused.kernels.device, "not compiled after pickling"
assert copy.deepcopy(plain).kernels == PLAIN
print("equal")
"""

FALLBACK = """
import logging
logging.basicConfig(level=logging.INFO, format="%(message)s")
from resq_rl.quantization.kernels import PLAIN, compiled
assert compiled() is PLAIN
"""


def run(code: str, cache: Path, **environment: str) -> str:
    """What a script prints, with an empty cache of compiled code."""
    settings = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"} | environment
    del settings["TORCH_COMPILE_DISABLE"]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=settings, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler (g++) on this machine")
def test_fused_steps_equal_plain_ones_bit_for_bit(tmp_path: Path) -> None:
    assert "equal" in run(STEPS, tmp_path)


def test_without_a_compiler_the_plain_kernels_run_and_a_line_says_so(tmp_path: Path) -> None:
    assert "Kernels run uncompiled, which is slower" in run(FALLBACK, tmp_path, CXX=str(tmp_path / "no-compiler"))
