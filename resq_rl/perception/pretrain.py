"""Training a segmentation network on single frames of labelled clips."""

import io
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from resq_rl.errors import SettingsError, VideoError, WeightsError
from resq_rl.files import write_atomic
from resq_rl.perception.networks import save_weights
from resq_rl.perception.sampling import FrameSampler, class_shares, labels_of
from resq_rl.perception.task import Segmentation, class_iou, mean_iou
from resq_rl.video import IGNORE, Clip

__all__ = ["PretrainProgress", "PretrainReport", "PretrainSettings", "measure_confusion", "pretrain"]


@dataclass(frozen=True)
class PretrainSettings:
    """How to train.

    Attributes:
        steps: optimizer steps.
        batch: frames per step, 2 or more.
        learning_rate: peak of the one-cycle schedule of AdamW: a linear rise over the first tenth, then a
            cosine to zero.
        weight_decay: decoupled weight decay of the convolution weights; biases and norms have none.
        dice: weight of the soft Dice loss, which favours small classes, beside the cross-entropy.
        class_balance: cross-entropy weights are class frequency ** -class_balance, scaled to a mean of 1; 0
            for none.
        augment: mirror left to right; change brightness, contrast, colour balance and noise.
        validate_every: steps between measurements on the validation clips, and between checkpoints.
        seed: of the order of frames and of the augmentation. The network's first weights are the caller's.

    Raises:
        SettingsError: a value is out of range.
    """

    steps: int = 7000
    batch: int = 16
    learning_rate: float = 3e-3
    weight_decay: float = 1e-4
    dice: float = 0.5
    class_balance: float = 0.25
    augment: bool = True
    validate_every: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"steps": 1, "batch": 2, "validate_every": 1}
        for name in ("steps", "batch", "validate_every", "weight_decay", "dice", "class_balance", "seed"):
            value, limit = getattr(self, name), least.get(name, 0)
            if not value >= limit:
                raise SettingsError(f"Pretraining: {name} must be at least {limit}, got {value}.")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise SettingsError(f"Pretraining: learning_rate must be positive, got {self.learning_rate}.")


@dataclass(frozen=True)
class PretrainProgress:
    """State of a training run, after every step.

    Attributes:
        step: steps done.
        steps: steps in all.
        loss: of the step just done.
        learning_rate: of the step just done.
        validation_miou: mean IoU on the validation clips if it was measured after this step, else None.
    """

    step: int
    steps: int
    loss: float
    learning_rate: float
    validation_miou: float | None


@dataclass(frozen=True)
class PretrainReport:
    """Outcome of a training run.

    Attributes:
        validation_miou: mean IoU on the validation clips, of the weights that the network now has.
        class_iou: IoU of each class on the validation clips; NaN for classes that do not occur.
        best_step: the step whose weights the network now has, the best one on the validation clips.
        history: (step, mean loss since the last entry, validation mean IoU) at each measurement.
        seconds: wall-clock seconds of this call.
    """

    validation_miou: float
    class_iou: tuple[float, ...]
    best_step: int
    history: tuple[tuple[int, float, float], ...]
    seconds: float


def measure_confusion(
    network: nn.Module,
    clips: Sequence[Clip],
    task: Segmentation,
    *,
    batch: int = 32,
    device: torch.device | str = "cpu",
) -> Int64[Tensor, "clips k k"]:
    """Confusion of a network against the labels, one matrix per clip, without gradients.

    Raises:
        VideoError: there are no clips, or one has no labels or labels that are no class.
        NetworkError: the network's output does not fit the task.
    """
    if not clips:
        raise VideoError("There are no clips to measure on. Check the split of the dataset.")
    totals = []
    with torch.no_grad():
        for clip in clips:
            labels = labels_of(clip, "measuring")
            total = torch.zeros(task.classes, task.classes, dtype=torch.int64)
            for start in range(0, len(clip), batch):
                frames = clip.frames[start : start + batch].to(device).float() / 255
                prediction = task.predict(task.output(network(frames), clip.size)).cpu()
                total += task.confusion(prediction, labels[start : start + batch]).sum(0)
            totals.append(total)
    return torch.stack(totals)


def segmentation_loss(
    logits: Float[Tensor, "b k h w"],
    labels: Int64[Tensor, "b h w"],
    class_weights: Float[Tensor, " k"],
    dice: float,
) -> Float[Tensor, ""]:
    """Weighted cross-entropy plus `dice` times the soft Dice loss; pixels labelled 255 count in neither.

    Dice loss: the mean over the classes c that occur of 1 - 2 sum(p_c t_c) / (sum(p_c) + sum(t_c)), summed
    over the batch, p the softmax and t the one-hot labels (Milletari et al. 2016, arXiv 1606.04797, without
    the squares).
    """
    log_probability = logits.log_softmax(1)
    loss = F.nll_loss(log_probability, labels, class_weights, ignore_index=IGNORE)
    if dice == 0:
        return loss
    counted = labels != IGNORE
    known, probability = labels.where(counted, 0), log_probability.exp() * counted[:, None]
    hits = probability.gather(1, known[:, None]).flatten()
    overlap = hits.new_zeros(logits.shape[1]).index_add(0, known.flatten(), hits)
    pixels = torch.bincount(labels[counted], minlength=logits.shape[1])
    dice_loss = 1 - 2 * overlap / (probability.sum((0, 2, 3)) + pixels).clamp(min=1.0)
    return loss + dice * dice_loss[pixels > 0].mean()


def pretrain(
    network: nn.Module,
    train: Sequence[Clip],
    validation: Sequence[Clip],
    settings: PretrainSettings | None = None,
    *,
    task: Segmentation | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[PretrainProgress], None] | None = None,
    checkpoint: str | Path | None = None,
    weights: str | Path | None = None,
    notes: Mapping[str, str] | None = None,
) -> PretrainReport:
    """Train a network in place on single labelled frames; leave it with its best weights, in evaluation mode.

    The frames and augmentation of a step depend on the seed and the step alone, so a resumed run equals one
    that was never stopped (on the same machine, with the same number of threads).

    Arguments:
        network: returns logits for RGB frames in 0..1 of shape (b, 3, h, w).
        train: labelled clips of one size.
        validation: labelled clips on which the best weights are chosen.
        settings: how to train.
        task: classes and output of the network, of kind "logits"; by default 6 classes.
        device: where to train.
        progress: called after every step.
        checkpoint: file to resume from if it is there, and to write after each measurement.
        weights: file for the best weights: safetensors with architecture, settings and accuracy as metadata.
        notes: further metadata for that file, such as where the clips are from.

    Raises:
        VideoError: no clips, clips without labels or of several sizes, or labels that are no class.
        NetworkError: the network's output does not fit the task.
        SettingsError: the task is not of kind "logits", the loss is no longer finite, or the checkpoint is of
            other settings or another number of frames.
        WeightsError: the checkpoint is damaged or of another network.
        ResultsError: the checkpoint or the weights cannot be written.
    """
    settings, task, started = settings or PretrainSettings(), task or Segmentation(), time.monotonic()
    run = _Run(network, train, validation, settings, task, torch.device(device))
    if checkpoint is not None and Path(checkpoint).exists():
        run.resume(Path(checkpoint))
    while run.step < settings.steps:
        loss, rate = run.advance()
        miou = run.validate() if run.measures() else None
        if miou is not None and checkpoint is not None:
            run.save(Path(checkpoint))
        if progress is not None:
            progress(PretrainProgress(run.step, settings.steps, loss, rate, miou))
    report = run.finish(time.monotonic() - started)
    if weights is not None:
        save_weights(network, weights, {**_metadata(run, report), **(notes or {})})
    return report


class _Run:
    """The state of one training run."""

    def __init__(
        self,
        network: nn.Module,
        train: Sequence[Clip],
        validation: Sequence[Clip],
        settings: PretrainSettings,
        task: Segmentation,
        device: torch.device,
    ) -> None:
        if task.kind != "logits":
            raise SettingsError(f"Pretraining needs a task of kind 'logits', got {task.kind!r}.")
        self.sampler = FrameSampler(train, settings.batch, settings.seed, settings.augment)
        self.settings, self.task, self.validation, self.device = settings, task, validation, device
        shares = class_shares(train, task.classes, "training")
        class_shares(validation, task.classes, "validation")  # a mistake in them must not show after hours
        weights = shares.clamp(min=1e-4) ** -settings.class_balance
        self.class_weights = (weights / weights.mean()).to(device)
        self.network = network.to(device).requires_grad_(True).train()
        decayed = [p for p in network.parameters() if p.dim() > 1]
        plain = [p for p in network.parameters() if p.dim() <= 1]
        groups = [
            {"params": decayed, "weight_decay": settings.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate)
        self.step, self.loss_sum, self.loss_steps = 0, 0.0, 0
        self.history: list[tuple[int, float, float]] = []
        self.best_step, self.best_confusion = 0, torch.zeros(task.classes, task.classes, dtype=torch.int64)
        self.best_weights: dict[str, Tensor] = {}

    def learning_rate(self) -> float:
        """Of the next step: a linear rise over the first tenth of the steps, then a cosine towards zero."""
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
        size = (labels.shape[-2], labels.shape[-1])
        logits = self.task.output(self.network(frames), size)
        loss = segmentation_loss(logits, labels, self.class_weights, self.settings.dice)
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

    def measures(self) -> bool:
        """Whether the validation clips are due after the step just done."""
        return self.step % self.settings.validate_every == 0 or self.step == self.settings.steps

    def validate(self) -> float:
        """Measure on the validation clips and keep the weights if they are the best so far."""
        self.network.eval()
        confusion = measure_confusion(self.network, self.validation, self.task, device=self.device).sum(0)
        self.network.train()
        miou = float(mean_iou(confusion))
        self.history.append((self.step, self.loss_sum / self.loss_steps, miou))
        self.loss_sum, self.loss_steps = 0.0, 0
        if not self.best_weights or miou > float(mean_iou(self.best_confusion)):
            self.best_step, self.best_confusion = self.step, confusion
            self.best_weights = {name: value.detach().clone() for name, value in self.network.state_dict().items()}
        return miou

    def finish(self, seconds: float) -> PretrainReport:
        """Give the network its best weights."""
        self.network.load_state_dict(self.best_weights)
        self.network.eval()
        return PretrainReport(
            validation_miou=float(mean_iou(self.best_confusion)),
            class_iou=tuple(class_iou(self.best_confusion).tolist()),
            best_step=self.best_step,
            history=tuple(self.history),
            seconds=seconds,
        )

    def fingerprint(self) -> dict[str, float | int | bool]:
        """What a checkpoint must agree on."""
        return {**asdict(self.settings), "classes": self.task.classes, "frames": self.sampler.frames}

    def save(self, path: Path) -> None:
        """Write everything that `resume` needs, atomically."""
        state = {
            "fingerprint": self.fingerprint(),
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "history": self.history,
            "best": (self.best_step, self.best_confusion, self.best_weights),
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomic(path, buffer.getvalue())

    def resume(self, path: Path) -> None:
        """Continue from a checkpoint."""
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            found = dict(state["fingerprint"])
        except Exception as error:  # damaged archives fail in many ways
            reason = str(error).strip().split("\n")[0][:200]
            raise WeightsError(
                f"Cannot resume from the checkpoint {path}: it is damaged ({type(error).__name__}: "
                f"{reason}). Delete it to train from the start."
            ) from error
        expected = self.fingerprint()
        different = [f"{n} {found.get(n)!r} instead of {v!r}" for n, v in expected.items() if found.get(n) != v]
        if different:
            raise SettingsError(
                f"The checkpoint {path} is of another run: {', '.join(different)}. Choose the same settings "
                "and clips, or another checkpoint."
            )
        try:
            self.network.load_state_dict(state["network"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise WeightsError(
                f"The checkpoint {path} does not fit {type(self.network).__name__} "
                f"({str(error).splitlines()[0]}). Build the network as it was, or choose another checkpoint."
            ) from error
        self.step, self.history = int(state["step"]), [tuple(entry) for entry in state["history"]]
        self.best_step, self.best_confusion, self.best_weights = state["best"]
        self.best_confusion = self.best_confusion.cpu()


def _metadata(run: _Run, report: PretrainReport) -> dict[str, str]:
    """What a reader of the weights file must know, as safetensors metadata."""
    network, (height, width) = run.network, run.sampler.clips[0].size
    known = {name: str(getattr(network, name)) for name in ("classes", "width") if hasattr(network, name)}
    return {
        "architecture": type(network).__name__,
        "input": f"RGB in 0..1, {height}x{width}",
        **known,
        "settings": json.dumps(asdict(run.settings)),
        "train_frames": str(run.sampler.frames),
        "best_step": str(report.best_step),
        "validation_miou": f"{report.validation_miou:.4f}",
    }
