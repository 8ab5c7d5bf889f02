"""Training a network on single frames of labelled clips, or on windows of them where the task is recurrent."""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from jaxtyping import Num
from torch import Tensor, nn

from resq_rl.errors import NetworkError, SettingsError, VideoError, WeightsError
from resq_rl.perception.inference import Beginning, judged_targets, predict_clip, recurrent_inputs
from resq_rl.perception.segmentation import Segmentation
from resq_rl.perception.task import PretrainSettings, Recurrent, Task, Trainable
from resq_rl.perception.training_batches import FrameSampler, labels_of
from resq_rl.perception.weight_files import save_weights
from resq_rl.quantization import as_tuple, to_float
from resq_rl.sealed import Checkpoints
from resq_rl.video import Clip

__all__ = ["PretrainProgress", "PretrainReport", "measure_counts", "pretrain"]

_STREAM = 2_000_003  # of the disturbances of masks; another prime than the sampler's


@dataclass(frozen=True)
class PretrainProgress:
    """State of a training run, after every step.

    Attributes:
        step: steps done.
        loss: of the step just done.
        learning_rate: of the step just done.
        validation: accuracy on the validation clips if it was measured after this step, else None.
    """

    step: int
    loss: float
    learning_rate: float
    validation: float | None


@dataclass(frozen=True)
class PretrainReport:
    """Outcome of a training run.

    Attributes:
        validation: accuracy on the validation clips, of the weights that the network now has.
        counts: `Task.counts` summed over all frames, from which it was computed.
        best_step: the step with the best accuracy on the validation clips, whose weights the network now has.
        history: (step, mean loss since the last entry, validation accuracy) at each measurement.
        seconds: wall-clock seconds of this call.
    """

    validation: float
    counts: Num[Tensor, "*c"] = field(compare=False)
    best_step: int
    history: tuple[tuple[int, float, float], ...]
    seconds: float


def measure_counts(
    network: nn.Module,
    clips: Sequence[Clip],
    task: Task,
    *,
    batch: int = 32,
    device: torch.device | str = "cpu",
) -> Num[Tensor, "clips *c"]:
    """`Task.counts` of a network against the labels, summed over the frames of each clip, without gradients.

    Raises:
        VideoError: there are no clips, or one has no labels or labels that do not fit the task.
        NetworkError: the network's output does not fit the task.
    """
    if not clips:
        raise VideoError("There are no clips to measure on. Check the split of the dataset.")
    totals = []
    for clip in clips:
        labels = judged_targets(task, labels_of(clip, "measuring"))
        predicted = predict_clip(lambda inputs: network(*as_tuple(inputs)), task, clip, device=device, batch=batch)
        pairs = zip(predicted.split(batch), labels.split(batch), strict=True)
        totals.append(torch.stack([task.counts(*pair).sum(0) for pair in pairs]).sum(0))
    return torch.stack(totals)


def pretrain(
    network: nn.Module,
    train: Sequence[Clip],
    validation: Sequence[Clip],
    settings: PretrainSettings | None = None,
    *,
    task: Trainable | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[PretrainProgress], None] | None = None,
    checkpoint: str | Path | None = None,
    weights: str | Path | None = None,
) -> PretrainReport:
    """Train a network in place on labelled frames; leave it with its best weights, in evaluation mode.

    For a recurrent task the network is rolled out over short windows of a clip: it begins with a label, which may be
    disturbed, and goes on with its own predictions.

    The frames and augmentation of a step depend on the seed and the step alone, so a resumed run equals one
    that was never stopped (on the same machine, with the same number of threads).

    Args:
        network: takes RGB frames in 0..1 of shape (b, 3, h, w).
        train: labelled clips of one size.
        validation: labelled clips on which the best weights are chosen.
        settings: how to train.
        task: the task to train for; by default segmentation into 6 classes.
        device: where to train.
        progress: called after every step.
        checkpoint: folder of checkpoints. Training resumes from the newest, and writes one after each measurement.
        weights: file for the best weights: safetensors with architecture, settings and accuracy as metadata.

    Raises:
        VideoError: no clips, clips without labels or of several sizes, or labels that do not fit the task.
        NetworkError: the network's output does not fit the task.
        SettingsError: the task cannot be trained for, a setting has no effect on it, the loss is no longer finite, or
            the checkpoint is of other settings or another number of frames.
        WeightsError: the checkpoint is of another network.
        ResultsError: a checkpoint or the weights cannot be written, or no checkpoint can be read.
    """
    settings, task, started = settings or PretrainSettings(), task or Segmentation(), time.monotonic()
    run = _Run(network, train, validation, settings, task, torch.device(device))
    checkpoints = None if checkpoint is None else Checkpoints(Path(checkpoint))
    if checkpoints is not None:
        run.resume(checkpoints)
    _train(run, checkpoints, progress)
    report = run.finish(time.monotonic() - started)
    if weights is not None:
        save_weights(network, weights, _metadata(run, report))
    return report


def _train(run: "_Run", checkpoints: Checkpoints | None, progress: Callable[[PretrainProgress], None] | None) -> None:
    while run.step < run.settings.steps:
        loss, rate = run.advance()
        accuracy = run.validate() if run.measures() else None
        if progress is not None:
            progress(PretrainProgress(run.step, loss, rate, accuracy))
        if accuracy is not None and checkpoints is not None:
            run.save(checkpoints)  # after `progress`, so that nothing it records is missing in a run that goes on


class _Run:
    """The state of one training run."""

    def __init__(
        self,
        network: nn.Module,
        train: Sequence[Clip],
        validation: Sequence[Clip],
        settings: PretrainSettings,
        task: Trainable,
        device: torch.device,
    ) -> None:
        if not isinstance(task, Recurrent):
            settings.refuse_unused("single frames", "roll_out")
        window = settings.roll_out + 1 if isinstance(task, Recurrent) else 0
        self.sampler = FrameSampler(
            train, settings.batch, settings.seed, settings.augment, task.mirrored, settings.zoom, window
        )
        self.settings, self.task, self.validation, self.device = settings, task, validation, device
        self.loss = task.objective(train, settings, "training")
        task.objective(validation, settings, "validation")  # a mistake in them must not show after hours
        self.network = network.to(device).requires_grad_(True).train()
        _arrange(self.network, torch.channels_last)  # a quarter faster on a CPU than the usual layout
        decayed = [p for p in network.parameters() if p.dim() > 1]
        plain = [p for p in network.parameters() if p.dim() <= 1]
        groups = [
            {"params": decayed, "weight_decay": settings.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate)
        self.step, self.loss_sum, self.loss_steps = 0, 0.0, 0
        self.history: list[tuple[int, float, float]] = []
        self.best_step, self.best_accuracy, self.best_counts = 0, -math.inf, torch.empty(0)
        self.best_weights: dict[str, Tensor] = {}

    def learning_rate(self) -> float:
        """The next step's learning rate: a linear rise over the first tenth of the steps, then a cosine to zero."""
        settings = self.settings
        rise = max(1, settings.steps // 10)
        if self.step < rise:
            return settings.learning_rate * (self.step + 1) / rise
        done = (self.step - rise) / max(1, settings.steps - rise)
        return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * done))

    def advance(self) -> tuple[float, float]:
        """Take one step; return its loss and learning rate."""
        rate = self.learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        frames, labels = (tensor.to(self.device) for tensor in self.sampler.draw(self.step))
        if isinstance(self.task, Recurrent):
            loss = self._rolled_out(self.task, frames, labels)
        else:
            loss = self.loss(self._output(frames), labels)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise SettingsError(
                f"Pretraining: the loss is {value} at step {self.step + 1} of {self.settings.steps}, with "
                f"learning_rate {self.settings.learning_rate}. Lower the learning rate, or check the frames."
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.step, self.loss_sum, self.loss_steps = self.step + 1, self.loss_sum + value, self.loss_steps + 1
        return value, rate

    def _output(self, frames: Tensor, *others: Tensor) -> Tensor:
        try:
            found = self.network(frames, *others)
        except TypeError as error:
            raise NetworkError(
                f"{type(self.network).__name__} cannot run on the {1 + len(others)} inputs that the task "
                f"{type(self.task).__name__} gives it ({error}). Choose a network that was made for the task."
            ) from error
        return self.task.output(found, (frames.shape[-2], frames.shape[-1]))

    def _rolled_out(self, task: Recurrent, frames: Tensor, labels: Tensor) -> Tensor:
        """The mean loss over windows (b, n, ...), from the disturbed first label on the network's own predictions."""
        generator = torch.Generator().manual_seed(self.settings.seed * _STREAM + self.step)
        pixels = (255 * frames[:, 0].cpu()).round().to(torch.uint8)
        starts = [
            Beginning(p, task.template(f, p)) for f, p in zip(pixels, map(task.given, labels[:, 0].cpu()), strict=True)
        ]
        previous, losses = task.disturbed(labels[:, 0].cpu(), generator), []
        for t in range(1, frames.shape[1]):
            others = as_tuple(recurrent_inputs(task, pixels, previous, starts))[1:]
            output = self._output(frames[:, t], *(to_float(part).to(self.device) for part in others))
            losses.append(self.loss(output, labels[:, t]))
            previous = task.predict(output.detach()).cpu()
        return torch.stack(losses).mean()

    def measures(self) -> bool:
        """Whether to measure on the validation clips after the step just done."""
        return self.step % self.settings.validate_every == 0 or self.step == self.settings.steps

    def validate(self) -> float:
        """Measure on the validation clips and keep the weights if they are the best so far."""
        self.network.eval()
        counts = measure_counts(self.network, self.validation, self.task, device=self.device).sum(0)
        self.network.train()
        accuracy = float(self.task.accuracy(counts))
        self.history.append((self.step, self.loss_sum / self.loss_steps, accuracy))
        self.loss_sum, self.loss_steps = 0.0, 0
        if not self.best_weights or accuracy > self.best_accuracy:
            self.best_step, self.best_accuracy, self.best_counts = self.step, accuracy, counts
            self.best_weights = {name: value.detach().clone() for name, value in self.network.state_dict().items()}
        return accuracy

    def finish(self, seconds: float) -> PretrainReport:
        """Give the network its best weights."""
        self.network.load_state_dict(self.best_weights)
        self.network.eval()
        _arrange(self.network, torch.contiguous_format)
        return PretrainReport(
            validation=self.best_accuracy,
            counts=self.best_counts,
            best_step=self.best_step,
            history=tuple(self.history),
            seconds=seconds,
        )

    def fingerprint(self) -> dict[str, object]:
        """What a checkpoint must have in common with this run, in the types that JSON returns."""
        about = {**asdict(self.settings), "task": repr(self.task), "frames": self.sampler.frames}
        plain: dict[str, object] = json.loads(json.dumps(about))
        return plain

    def save(self, checkpoints: Checkpoints) -> None:
        """Write everything that `resume` needs."""
        state = {
            "fingerprint": self.fingerprint(),
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict()["state"],
            "step": self.step,
            "history": self.history,
            "best": [self.best_step, self.best_accuracy, self.best_counts, self.best_weights],
        }
        checkpoints.save(self.step, state)

    def resume(self, checkpoints: Checkpoints) -> None:
        """Continue from the newest checkpoint that is whole, if there is any."""
        state = checkpoints.load()
        if state is None:
            return
        found, expected = dict(state["fingerprint"]), self.fingerprint()
        different = [f"{n} {found.get(n)!r} instead of {v!r}" for n, v in expected.items() if found.get(n) != v]
        if different:
            raise SettingsError(
                f"The checkpoint in {checkpoints.folder} is of another run: {', '.join(different)}. Choose the same "
                "settings and clips, or another checkpoint."
            )
        try:
            self.network.load_state_dict(state["network"])
            moments = {int(index): values for index, values in state["optimizer"].items()}
            self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})
        except (RuntimeError, ValueError) as error:
            raise WeightsError(
                f"The checkpoint in {checkpoints.folder} does not fit {type(self.network).__name__} "
                f"({str(error).splitlines()[0]}). Build the network as it was, or choose another checkpoint."
            ) from error
        self.step, self.history = int(state["step"]), [tuple(entry) for entry in state["history"]]
        self.best_step, self.best_accuracy, self.best_counts, self.best_weights = state["best"]


def _arrange(network: nn.Module, layout: torch.memory_format) -> None:
    """Lay the weights of convolutions out in memory; their values stay."""
    for parameter in network.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=layout)


def _metadata(run: _Run, report: PretrainReport) -> dict[str, str]:
    """Metadata of the weights file: how the network was built and trained."""
    network, (height, width) = run.network, run.sampler.clips[0].size
    known = {name: str(getattr(network, name)) for name in ("classes", "width") if hasattr(network, name)}
    return {
        "architecture": type(network).__name__,
        "input": f"RGB in 0..1, {height}x{width}",
        **known,
        "settings": json.dumps(asdict(run.settings)),
        "train_frames": str(run.sampler.frames),
        "best_step": str(report.best_step),
        "task": repr(run.task),
        "metric": run.task.metric,
        "validation_accuracy": f"{report.validation:.4f}",
    }
