"""How long the parts of a step take: `make bench-parts`. Ratios of whole steps are what `resq-rl bench` measures."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from resq_rl.envs import (
    ActionScheme,
    BatchedEnvironment,
    Decision,
    EpisodeSettings,
    NetworkEngine,
    Problem,
    Streams,
    TableEngine,
    respond,
)
from resq_rl.envs.sb3 import AgentsVecEnv
from resq_rl.perception import Segmentation, compact_ddrnet
from resq_rl.policies.ppo import PPOSettings, deployed, untrained
from resq_rl.quantization import FrameCost, QuantizationConfig, ResQModel, ThresholdField
from resq_rl.quantization.graph.operators import Geometry
from resq_rl.quantization.kernels import PLAIN, Choice, Kernels, native
from resq_rl.quantization.running.execution import Execution
from resq_rl.video import GeneratedVideo

CLIPS, FRAMES, GRID, SLOTS = 32, 8, (6, 10), 1024
# Of the operator: the one that most layers of the default network are like.
CHANNELS, SIZE, STEP = 32, (24, 40), 0.01
KERNELS = pytest.mark.parametrize("kernels", [PLAIN, native()], ids=["plain", "native"])

Timed = Callable[..., object]  # pytest-benchmark's fixture


@pytest.fixture(scope="module")
def model() -> ResQModel:
    video = GeneratedVideo(frames=FRAMES)
    config = QuantizationConfig(weight_rounding="nearest")
    model = ResQModel(compact_ddrnet(), torch.zeros(1, 3, *video.size), config).compile()
    return model.calibrate([video.clip("train", i).frames for i in range(2)])


@pytest.fixture(scope="module")
def problem(model: ResQModel) -> Problem:
    video = GeneratedVideo(frames=FRAMES)
    return Problem.prepare(model, Segmentation(), [video.clip("train", i) for i in range(4)], grid=GRID)


@pytest.fixture
def streams(problem: Problem) -> Streams:
    streams = Streams(NetworkEngine(problem), slots=CLIPS)
    streams.start(range(CLIPS), [i % len(problem) for i in range(CLIPS)])
    return streams


@pytest.fixture
def agents(streams: Streams) -> AgentsVecEnv:
    scheme = ActionScheme("region_thresholds", "region", streams.problem.groups, GRID)
    environment = AgentsVecEnv(BatchedEnvironment(streams, scheme, EpisodeSettings()))
    environment.seed(0)
    environment.reset()
    return environment


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Input and reference of an operator, a quantizer's steps and the entry of each pixel."""
    generator = torch.Generator().manual_seed(0)
    x, reference = (
        torch.randn(CLIPS, CHANNELS, *SIZE, generator=generator).contiguous(memory_format=torch.channels_last)
        for _ in range(2)
    )
    steps = torch.tensor([[0.0, 9.0, 40.0, 90.0], [0.0, 1.0, 7.0, 127.0], [0.0, 96.0, 16.0, 1.0], [0.0, 8, 16, 32]])
    return x, reference, steps, torch.zeros(CLIPS, *SIZE, dtype=torch.int64)


@KERNELS
def test_quantization_of_a_residual(benchmark: Timed, kernels: Kernels) -> None:
    x, reference, steps, index = inputs()
    tau = torch.full((CLIPS, *SIZE), 0.5)
    benchmark(kernels.encode, x, reference, Choice(steps, index, tau, 1.0, (1.0, 2.0, 8.0)), STEP)


@KERNELS
def test_quantization_of_a_keyframe(benchmark: Timed, kernels: Kernels) -> None:
    benchmark(kernels.encode_keyframe, inputs()[0], STEP, -128.0, 127.0)


@KERNELS
def test_a_residual_operator(benchmark: Timed, kernels: Kernels) -> None:
    x, reference, steps, index = inputs()
    weight = torch.randint(-7, 8, (CHANNELS, CHANNELS, 3, 3)).float()
    geometry, scale = Geometry("conv2d", (3, 3), padding=(1, 1, 1, 1)), torch.rand(1, CHANNELS, 1, 1)
    product = kernels.product(geometry, weight, scale, (-127, 127))
    output, index = torch.zeros_like(x), index + 2

    def run() -> None:
        codes, _ = kernels.encode(x, reference, Choice(steps, index), STEP, product)
        kernels.accumulate(product, codes, STEP, output, over=True)

    benchmark(run)


@pytest.mark.parametrize("peak", [None, 1.0, 0.1], ids=["no budget", "a budget that never binds", "one that binds"])
def test_a_step_under_a_budget(benchmark: Timed, model: ResQModel, problem: Problem, peak: float | None) -> None:
    """What keeping a budget costs is the ratio of the first two: the same levels are taken in both."""
    frames = [torch.stack([clip.frames[t] for clip in problem.clips]).float() / 255 for t in range(FRAMES)]
    clips, state = len(frames[0]), model.new_state(len(frames[0]))
    limit = None if peak is None else torch.full((clips,), peak * model.reference_bops(), dtype=torch.float64)
    field, first = ThresholdField.constant(0.7, clips, problem.groups, GRID), torch.ones(clips, dtype=torch.bool)
    model.step(frames[0], state, first, field)

    def run() -> None:
        for frame in (*frames, *reversed(frames)):
            model.step(frame, state, ~first, field, limit)

    benchmark(run)


def test_ledger(benchmark: Timed, streams: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[Execution] = []
    finish = Execution.finish

    def recorded(own: Execution) -> FrameCost:
        passes.append(own)
        return finish(own)

    monkeypatch.setattr(Execution, "finish", recorded)
    field = ThresholdField.constant(0.5, CLIPS, streams.problem.groups, GRID)
    streams.step(Decision(torch.zeros(CLIPS, dtype=torch.bool), field))
    monkeypatch.undo()
    benchmark(passes[0].finish)


def test_observation(benchmark: Timed, streams: Streams) -> None:
    benchmark(streams.observe)


def test_a_step_of_region_agents(benchmark: Timed, agents: AgentsVecEnv) -> None:
    actions = np.stack([agents.action_space.sample()] * agents.num_envs)
    benchmark(agents.step, actions)


def test_a_step_of_the_table_environment(benchmark: Timed, problem: Problem) -> None:
    few = problem.subset([0, 1])
    engine = TableEngine(few, [respond(few, i) for i in range(len(few))])
    streams = Streams(engine, slots=SLOTS, reference="keyframe")
    scheme = ActionScheme("frame_level", "frame", few.groups, GRID, len(few.model.config.levels))
    environment = AgentsVecEnv(BatchedEnvironment(streams, scheme, EpisodeSettings()))
    environment.seed(0)
    environment.reset()
    benchmark(environment.step, np.tile(np.array([[1, 0]]), (SLOTS, 1)))


def test_choices_of_a_policy(benchmark: Timed, agents: AgentsVecEnv) -> None:
    settings = PPOSettings()
    policy = deployed(untrained(agents, settings, seed=0), agents, settings)
    benchmark(lambda: policy.decide(agents.core.streams.view()))
