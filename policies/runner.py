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
from resq_rl.perception import Recurrent, Task
from resq_rl.policies.learned import LearnedPolicy
from resq_rl.quantization import ResQModel, load_model
from resq_rl.video import Clip
from resq_rl.video.images import resize_frame, resize_labels

__all__ = ["RunCost", "Runner"]

REFERENCE_BITS = 8
# Frames of the clip that a runner lets the simulator see; the last never runs.
PLACES = 3


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
        self._own_share = policy.macs * policy.bits**2 / model.reference_bops()
        # Where frames are put before they run: the first, and every later one in the place of the one before.
        self._frames = torch.zeros(PLACES, 3, *model.frame_size, dtype=torch.uint8)
        self._given: Tensor | None = None
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

    def reset(self, given: UInt8[np.ndarray, "h w"] | UInt8[Tensor, "h w"] | None = None) -> None:
        """Begin a new video: the next frame runs as a keyframe, and nothing of the frames before is left.

        Args:
            given: for a task that begins with it (`Recurrent`), the label of the next frame, such as the mask of the
                object to follow; brought to the model's size.
        """
        self._begun = False
        self._given = None if given is None else _fitted_label(given, self.model.frame_size)
        if not isinstance(self.task, Recurrent):
            self._simulator = self._made()

    def _made(self) -> Simulator:
        """A simulator of a clip of `_frames`; what predictions are compared with there means nothing."""
        labels = None if self._given is None else self._given.expand(PLACES, -1, -1).contiguous()
        clip = Clip(self._frames, labels, 1.0, "stream", "stream")
        simulator = Simulator(
            self.model,
            self.task,
            ClipStore.prepare(self.model, self.task, [clip], source="teacher"),
            slots=1,
            grid=self.grid,
            reference=self.policy.reference,
            trade_off_range=self.policy.trade_off_range,
        )
        if isinstance(self.policy, LearnedPolicy):
            self.policy.check_view(FrameView(simulator))
        return simulator

    @property
    def frame(self) -> UInt8[Tensor, "3 h w"]:
        """The last frame as the model saw it; the next one overwrites it."""
        return self._frames[1]

    @torch.no_grad()
    def __call__(self, frame: UInt8[np.ndarray, "h w 3"] | UInt8[Tensor, "3 h w"]) -> tuple[Tensor, RunCost]:
        """Run the next frame.

        Args:
            frame: RGB of any size; brought to the model's as `VideoFiles` does.

        Returns:
            The task's prediction for it at the model's frame size, such as the class of every pixel, and its cost.

        Raises:
            VideoError: the frame is no RGB picture of bytes, or a label is wanted first.
            NetworkError: the output holds NaN or infinity.
        """
        self._frames[1 if self._begun else slice(None)] = _fitted(frame, self.model.frame_size)
        if not self._begun and isinstance(self.task, Recurrent):
            if self._given is None:
                raise VideoError(
                    f"{type(self.task).__name__} begins with the label of the first frame, and none was given: call "
                    "reset(label) before it."
                )
            self._simulator = self._made()
        simulator = self._simulator
        if self._begun:
            simulator.time.fill_(1)
            result = simulator.step(self.policy.decide(FrameView(simulator)))
        else:
            result = simulator.start([0], [0], [self.policy.trade_off])
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


def _fitted_label(label: np.ndarray | Tensor, size: tuple[int, int]) -> UInt8[Tensor, "h w"]:
    """A label map at `size`."""
    values = label.cpu().numpy() if isinstance(label, Tensor) else label
    if values.ndim != 2 or values.dtype != np.uint8:
        raise VideoError(f"A label must be bytes (h, w), got {values.dtype} of shape {values.shape}.")
    return torch.from_numpy(np.ascontiguousarray(values if values.shape == size else resize_labels(values, size)))
