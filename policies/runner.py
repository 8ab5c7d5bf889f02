"""A policy and its frozen network on a stream of frames, as an application runs them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn

from resq_rl.envs import ClipStore, FrameView, Policy, Simulator
from resq_rl.errors import PolicyError, VideoError
from resq_rl.perception import Task
from resq_rl.policies.learned import LearnedPolicy
from resq_rl.quantization import ResQModel, load_model
from resq_rl.video import Clip
from resq_rl.video.images import resize_frame

__all__ = ["RunCost", "Runner"]

REFERENCE_BITS = 8


@dataclass(frozen=True)
class RunCost:
    """What one frame cost, as shares of the network's W8A8 frame.

    Attributes:
        keyframe: whether it ran as a keyframe.
        network: BOPs of the network.
        policy: BOPs of the policy's own network; 0 on the first frame, on which it decides nothing.
        regions: BOPs of the network by region of the policy's grid, as shares of the region's W8A8.
    """

    keyframe: bool
    network: float
    policy: float
    regions: Float[Tensor, "gh gw"]

    @property
    def bops(self) -> float:
        """All BOPs of the frame."""
        return self.network + self.policy

    @property
    def bits(self) -> float:
        """Bits b at which running the whole frame at WbAb would cost as much: 8 * sqrt(share of W8A8)."""
        return float(REFERENCE_BITS * self.bops**0.5)


class Runner:
    """A policy and its frozen network, run on frames as they come, in constant memory.

        runner = Runner.load(folder, network, task)
        for frame in frames:
            prediction, cost = runner(frame)

    What it gives for the frames of a clip equals what the simulator measures on it, bit for bit.

    Args:
        policy: decides how frames run.
        model: the calibrated network.
        task: what its output means.
        grid: rows and columns of regions; not needed for a learned policy.

    Raises:
        PolicyError: the policy does not fit the network or the grid.
    """

    def __init__(self, policy: Policy, model: ResQModel, task: Task, grid: tuple[int, int] | None = None) -> None:
        if grid is None:
            grid = policy.scheme.grid if isinstance(policy, LearnedPolicy) else (6, 10)
        self.policy, self.model, self.task, self.grid = policy, model, task, grid
        # A clip of one frame is where each frame is put before it runs; what it is compared with means nothing.
        self._clip = Clip(torch.zeros(1, 3, *model.frame_size, dtype=torch.uint8), None, 1.0, "stream", "stream")
        self._store = ClipStore.prepare(model, task, [self._clip], source="teacher")
        self._own_share = policy.macs * policy.bits**2 / model.reference_bops()
        self.reset()

    @staticmethod
    def load(
        folder: str | Path,
        network: nn.Module,
        task: Task,
        *,
        trade_off: float | None = None,
        interval: int | None = None,
    ) -> "Runner":
        """The policy and the calibrated model that a training run wrote into `folder`.

        Args:
            network: the float network that was calibrated.
            trade_off: lambda to decide for; the middle of its range by default.
            interval: frames between keyframes (0: first frame only); the policy's own timing by default.

        Raises:
            PolicyError, CalibrationError: the files are missing or damaged, or the policy does not know that lambda.
            NetworkError: the files are of another network.
        """
        policy = LearnedPolicy.load(Path(folder))
        low, high = policy.trade_off_range
        if trade_off is not None and not 0.999 * low <= trade_off <= 1.001 * high:  # the ends may come rounded
            raise PolicyError(f"The policy was trained for lambda from {low:g} to {high:g}, got {trade_off:g}.")
        if trade_off is not None or interval is not None:
            policy = policy.at(policy.trade_off if trade_off is None else trade_off, interval)
        return Runner(policy, load_model(Path(folder), network), task)

    def reset(self) -> None:
        """Begin a new video: the next frame runs as a keyframe, and nothing of the frames before is left."""
        self._begun = False
        self._simulator = Simulator(
            self.model,
            self.task,
            self._store,
            slots=1,
            grid=self.grid,
            reference=self.policy.reference,
            trade_off_range=self.policy.trade_off_range,
        )
        if isinstance(self.policy, LearnedPolicy):
            self.policy.check_view(FrameView(self._simulator))

    @property
    def frame(self) -> UInt8[Tensor, "3 h w"]:
        """The last frame as the model saw it; the next one overwrites it."""
        return self._clip.frames[0]

    @torch.no_grad()
    def __call__(self, frame: UInt8[np.ndarray, "h w 3"] | UInt8[Tensor, "3 h w"]) -> tuple[Tensor, RunCost]:
        """Run the next frame.

        Args:
            frame: RGB of any size; brought to the model's as `VideoFiles` does.

        Returns:
            The task's prediction for it at the model's frame size, such as the class of every pixel, and its cost.

        Raises:
            VideoError: the frame is no RGB picture of bytes. NetworkError: the output holds NaN or infinity.
        """
        self._clip.frames[0] = _fitted(frame, self.model.frame_size)
        if self._begun:
            self._simulator.time.zero_()
            result = self._simulator.step(self.policy.decide(FrameView(self._simulator)))
        else:
            result = self._simulator.start([0], [0], [self.policy.trade_off])
        share = float(result.cost.total) / self.model.reference_bops()
        cost = RunCost(bool(result.cost.keyframe), share, self._own_share if self._begun else 0.0, result.share[0])
        self._begun = True
        return result.prediction[0], cost


def _fitted(frame: np.ndarray | Tensor, size: tuple[int, int]) -> UInt8[Tensor, "3 h w"]:
    """A frame at `size`, channels first."""
    shape, kind = tuple(frame.shape), frame.dtype
    channels = shape[-1 if isinstance(frame, np.ndarray) else 0] if len(shape) == 3 else 0
    if channels != 3 or 0 in shape or kind not in (np.uint8, torch.uint8):
        raise VideoError(
            f"A frame must be RGB bytes, an array (h, w, 3) or a tensor (3, h, w), got {kind} of shape {shape}."
        )
    if isinstance(frame, Tensor):
        if tuple(frame.shape[1:]) == size:
            return frame
        frame = frame.permute(1, 2, 0).cpu().numpy()
    resized = resize_frame(Image.fromarray(np.ascontiguousarray(frame)), size)
    return torch.from_numpy(resized).permute(2, 0, 1)
