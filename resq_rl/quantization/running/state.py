"""State that a device keeps from one frame to the next, for a batch of clips."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from resq_rl.quantization.specification.config import Reference

__all__ = ["StreamState"]


@dataclass
class StreamState:
    """State kept from one frame to the next: the input and output reference of every operator call, per clip.

    Attributes:
        reference: the kind of reference that residuals are taken against.
        inputs: x^_ref of each site, (clips, ...).
        outputs: y_ref of each site, (clips, ...).
        age: frames since each clip's keyframe; -1 before the first.
    """

    reference: Reference
    age: Tensor
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)

    def clone(self) -> "StreamState":
        """An independent copy: stepping one leaves the other unchanged."""
        inputs, outputs = [x.clone() for x in self.inputs], [y.clone() for y in self.outputs]
        return StreamState(self.reference, self.age.clone(), inputs, outputs, [y._version for y in outputs])

    def detach(self) -> None:
        """End the reach of gradients: what comes next does not lead back beyond here."""
        self.inputs, self.outputs = [x.detach() for x in self.inputs], [y.detach() for y in self.outputs]
        self.versions = [y._version for y in self.outputs]

    def snapshot(self) -> dict[str, Any]:
        """The tensors that `restore` takes; they share memory with this state."""
        return {"age": self.age, "inputs": list(self.inputs), "outputs": list(self.outputs)}

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Continue from a snapshot, whose tensors then belong to this state."""
        self.age, self.inputs, self.outputs = snapshot["age"], list(snapshot["inputs"]), list(snapshot["outputs"])
        self.versions = [y._version for y in self.outputs]

    def put(self, rows: Tensor, other: "StreamState") -> None:
        """Replace the clips in `rows` by those of `other`, which may share memory and must not be stepped again."""
        self.age[rows] = other.age
        if len(rows) == len(self.age) and bool((rows == torch.arange(len(rows))).all()):
            self.inputs, self.outputs = other.inputs, other.outputs
            self.versions = other.versions
            return
        if not self.inputs:
            self.inputs = [_zeros(len(self.age), x) for x in other.inputs]
            self.outputs = [_zeros(len(self.age), y) for y in other.outputs]
        for mine, new in zip(self.inputs + self.outputs, other.inputs + other.outputs, strict=True):
            mine[rows] = new
        self.versions = [y._version for y in self.outputs]


def _zeros(clips: int, like: Tensor) -> Tensor:
    """Zeros for `clips` clips, in the memory layout of `like`."""
    zeros = like.new_zeros(clips, *like.shape[1:])
    if like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last):
        return zeros.contiguous(memory_format=torch.channels_last)
    return zeros
