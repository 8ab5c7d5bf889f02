"""The interface of a task: all that environments, policies and experiments know of it.

A new task is a class that has these methods (`Task`, and `Trainable` for `resq-rl pretrain`) in one file, and a config
in the group `task` that names it. `resq_rl.perception.segmentation` is an example.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Final, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Float64, Num, UInt8
from pydantic import AfterValidator, Field
from torch import Tensor

from resq_rl.checked import Checked, Count, NotNegative, Positive
from resq_rl.errors import NetworkError, SettingsError
from resq_rl.video import Clip

__all__ = [
    "LEAST_PROBABILITY",
    "PALETTE",
    "Loss",
    "PretrainSettings",
    "Recurrent",
    "Task",
    "Trainable",
    "log_probabilities",
    "select_output",
]

# Colours in pictures that the colour-blind can tell apart (Okabe and Ito), RGB in 0..1.
PALETTE: Final[Float[Tensor, "n 3"]] = (
    torch.tensor([[230, 159, 0], [240, 228, 66], [0, 114, 178], [0, 158, 115], [213, 94, 0], [204, 121, 167]]) / 255
)

LEAST_PROBABILITY: Final = 1e-6  # whose logarithm is taken
ROUNDING: Final = 1e-3  # by which a probability may leave 0..1

Loss = Callable[[Tensor, Tensor], Tensor]
"""Takes the output of a batch (`Task.output`) and its labels, and returns a scalar."""


@runtime_checkable
class Task(Protocol):
    """How a network's output is read, and how a prediction is judged.

    Outputs, predictions and targets are tensors with a row for each of b frames; the task decides on their further
    dimensions. The labels of a `Clip` are targets. A task may also have a method `degenerate`, see `degenerate_output`.
    """

    @property
    def metric(self) -> str:
        """Name of the accuracy, such as "mean IoU"."""

    def check(self, clip: Clip) -> None:
        """Check a clip's labels, which are not None.

        Raises:
            VideoError: they are not labels for this task.
        """

    def output(self, raw: object, size: tuple[int, int] | None = None) -> Float[Tensor, "b *o"]:
        """The task's output among all that the network returned, for frames of `size` (height, width).

        Raises:
            NetworkError: there is none, or it has another shape or type.
        """

    def predict(self, output: Float[Tensor, "b *o"]) -> Num[Tensor, "b *p"]:
        """The predictions that follow from outputs, such as the class of each pixel."""

    def target(self, prediction: Num[Tensor, "b *p"]) -> Num[Tensor, "b *t"]:
        """The float network's predictions as targets, for teacher agreement."""

    def counts(self, prediction: Num[Tensor, "b *p"], target: Num[Tensor, "b *t"]) -> Num[Tensor, "b *c"]:
        """Counts of each frame, from whose sums over frames `accuracy` is computed."""

    def accuracy(self, counts: Num[Tensor, "*n"]) -> Float64[Tensor, "*m"]:
        """Accuracy in 0..1 from counts or sums of them, over all leading dimensions. NaN where nothing was counted."""

    def error_table(self, counts: Num[Tensor, " *c"], weighting: str) -> Float[Tensor, "*e"]:
        """The cost of each kind of error, for `error`.

        Args:
            counts: those of some network, summed over all targets.
            weighting: "pixel" where all errors cost the same; "iou" where they cost what they take from the metric, to
                first order.
        """

    def error(
        self, prediction: Num[Tensor, "b *p"], target: Num[Tensor, "b *t"], table: Tensor, size: tuple[int, int]
    ) -> Float[Tensor, "b h w"]:
        """Cost of the errors at every pixel of frames of `size`. Its mean is the frame's error, 0 if all is right."""

    def divergence(self, output: Float[Tensor, "b *o"], teacher: Float[Tensor, "b *o"]) -> Float[Tensor, " b"]:
        """How far outputs are from those of the float network: 0 where they are equal, else above, and differentiable.

        Thresholds that are learned by gradients are learned from it, so it should grow with the errors that `accuracy`
        counts.
        """

    def features(
        self, output: Float[Tensor, "b *o"], prediction: Num[Tensor, "b *p"]
    ) -> tuple[Float[Tensor, "b _ _"], Float[Tensor, "b _ _"], Float[Tensor, "b _ _"]]:
        """Uncertainty, boundary and foreground: maps over the frame, of any resolution, with values in 0..1.

        Policies observe them of the last output: where it is undecided, where it changes, and where objects are.
        """

    def overlay(self, frame: Float[Tensor, "3 h w"], prediction: Num[Tensor, "*p"]) -> Float[Tensor, "3 h w"]:
        """A frame, RGB in 0..1, with its prediction drawn over it."""


def _ascending(zoom: tuple[float, float]) -> tuple[float, float]:
    if zoom[0] > zoom[1]:
        raise ValueError("not ascending")
    return zoom


ZOOM = Field(description="two positive factors, the least and the greatest")


@dataclass(frozen=True)
class PretrainSettings(Checked):
    """Settings of training.

    Attributes:
        steps: optimizer steps.
        batch: frames per step, 2 or more.
        learning_rate: peak of the one-cycle schedule of AdamW: a linear rise over the first tenth, then a
            cosine to zero.
        weight_decay: decoupled weight decay of the convolution weights; biases and norms have none.
        dice: segmentation: weight of the soft Dice loss, which favours small classes, beside the cross-entropy.
        class_balance: segmentation: cross-entropy weights are class frequency ** -class_balance, scaled to a mean of
            1; 0 for none.
        roll_out: recurrent tasks: consecutive frames for which the network predicts from its own last prediction.
        augment: mirror left to right; change brightness, contrast, colour balance and noise.
        zoom: least and greatest factor by which frames are enlarged, around a random place, or made smaller; [1, 1]
            for neither.
        validate_every: steps between measurements on the validation clips, and between checkpoints.
        seed: of the order of frames and of the augmentation. The caller provides the network's first weights.

    Raises:
        SettingsError: a value is out of range.
    """

    _group: ClassVar[str] = "pretraining."

    steps: Count = 7000
    batch: Annotated[int, Field(ge=2)] = 16
    learning_rate: Positive = 3e-3
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    dice: Annotated[float, Field(ge=0)] = 0.5
    class_balance: Annotated[float, Field(ge=0)] = 0.25
    roll_out: Count = 3
    augment: bool = True
    zoom: Annotated[tuple[Positive, Positive], ZOOM, AfterValidator(_ascending)] = (1.0, 1.0)
    validate_every: Count = 500
    seed: NotNegative = 0

    def refuse_unused(self, what: str, *names: str) -> None:
        """Refuse settings that have no effect on training for some kind of task, unless they have their defaults.

        Raises:
            SettingsError: a setting in `names` was changed.
        """
        for name in names:
            value, default = getattr(self, name), getattr(PretrainSettings, name)
            if value != default:
                raise SettingsError(
                    f"Pretraining: {name} has no effect on a task of {what}, got {value}. Leave it at {default}."
                )


@runtime_checkable
class Trainable(Task, Protocol):
    """A task for which networks can be trained on single labelled frames."""

    def objective(self, clips: Sequence[Clip], settings: PretrainSettings, purpose: str = "training") -> Loss:
        """The loss for training on these labelled clips; messages name the `purpose` of the clips.

        Raises:
            VideoError: the clips' labels do not fit. SettingsError: the task cannot be trained for, or a setting has no
                effect on it.
        """

    def mirrored(self, labels: Num[Tensor, "b *t"], width: int) -> Num[Tensor, "b *t"]:
        """The labels after frames of `width` pixels were mirrored left to right."""


@runtime_checkable
class Recurrent(Task, Protocol):
    """A task whose network takes each frame with two more inputs: a memory and a template.

    The memory is made from its prediction for the previous frame, the template from the first frame and its prediction,
    which the first frame's label gives. Both are bytes, 0..255 for 0..1, as frames are.
    """

    def given(self, label: Num[Tensor, "*t"]) -> Num[Tensor, "*p"]:
        """The prediction for a clip's first frame, from its label."""

    def memory(self, prediction: Num[Tensor, "b *p"]) -> UInt8[Tensor, "b *m"]:
        """The network's input that is made from its predictions for the previous frames."""

    def template(self, frame: UInt8[Tensor, "3 h w"], given: Num[Tensor, "*p"]) -> UInt8[Tensor, "*s"]:
        """The network's input that is made from a clip's first frame and the prediction given for it."""

    def judged(self, targets: Num[Tensor, "t *u"]) -> Num[Tensor, "t *u"]:
        """A clip's targets, where frames that do not count, such as the given one, are marked as unlabelled."""

    def disturbed(self, labels: Num[Tensor, "b *t"], generator: torch.Generator) -> Num[Tensor, "b *p"]:
        """Predictions with which roll-outs in training begin: labels, some with errors such as networks make."""


def log_probabilities(values: Float[Tensor, "*shape"], otherwise: str) -> Float[Tensor, "*shape"]:
    """The logarithms of probabilities that a network puts out.

    Args:
        values: the probabilities, of which those below LEAST_PROBABILITY count as that.
        otherwise: the kind of task to choose where they are none, for messages.

    Raises:
        NetworkError: they lie outside of 0..1 by more than rounding.
    """
    low, high = (float(bound) for bound in values.detach().aminmax())
    if low < -ROUNDING or high > 1 + ROUNDING:
        raise NetworkError(
            f"Probabilities lie in 0..1, the network puts out {low:g} to {high:g}: set task.kind={otherwise}."
        )
    return values.clamp_min(LEAST_PROBABILITY).log()


def select_output(raw: object, key: int | str | None, what: str) -> Tensor:
    """One of a network's outputs.

    Args:
        raw: a tensor, or a list, tuple or dictionary of tensors.
        key: which of several; None for a network with one output.
        what: its content, for messages.

    Raises:
        NetworkError: there is no such output.
    """
    chosen = raw
    if isinstance(raw, dict | list | tuple):
        outputs = raw if isinstance(raw, dict) else dict(enumerate(raw))
        wanted = key
        if isinstance(key, int) and not isinstance(raw, dict) and key < 0:
            wanted = key + len(outputs)
        if key is None and len(outputs) == 1:
            wanted = next(iter(outputs))
        if wanted not in outputs:
            raise NetworkError(
                f"The network returns {len(outputs)} outputs ({_describe(outputs)}) and output_key is "
                f"{key!r}. Set output_key to the one that holds the {what}."
            )
        chosen = outputs[wanted]
    elif key not in (None, 0):
        raise NetworkError(
            f"The network returns a single {type(raw).__name__}, but output_key is {key!r}. Set output_key to None."
        )
    if not isinstance(chosen, Tensor):
        raise NetworkError(
            f"The network's output is a {type(chosen).__name__}, not a tensor. Return a tensor, or a "
            "list, tuple or dictionary of tensors, and set output_key to choose one."
        )
    return chosen


def _describe(outputs: dict[object, object]) -> str:
    """Keys and shapes of a network's outputs, for an error message."""
    return ", ".join(
        f"{k!r}: {tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__}" for k, v in outputs.items()
    )
