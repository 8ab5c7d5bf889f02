"""Generated video with one object to follow, for video object segmentation."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from resq_rl.video.generated.scene import draw_scene
from resq_rl.video.generated.video import GeneratedVideo

__all__ = ["GeneratedObjects"]

SMALLEST = 100  # pixels of the object in the first frame, in a frame of 96 rows


@dataclass(frozen=True)
class GeneratedObjects(GeneratedVideo):
    """The clips of `GeneratedVideo`, in which one shape is the object (label 1) and all else is background (0).

    The object is drawn among the shapes that show at least 100 pixels in the first frame (in a frame of 96 rows; larger
    frames in proportion), or is the most visible one. Others, of the same class too, pass before and behind it.

    Attributes:
        cuts: 0, for the object would be gone after a change of scene.
        shapes: least and greatest number of shapes in a scene, 1 or more.

    Raises:
        SettingsError: a setting out of its range.
    """

    prefix: ClassVar[str] = "generated-objects"

    cuts: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("cuts", self.cuts == 0, "0: an object does not outlive a change of scene")
        self._check("shapes", self.shapes[0] >= 1, "two counts of 1 or more: one shape is the object")

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the label values."""
        return ("background", "object")

    def _render(self, rng: np.random.Generator, time: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Draw a scene, choose the object in it, and render it."""
        scene = draw_scene(rng, self.size, self.shapes, self.distractors)
        numbered = replace(scene, shapes=tuple(replace(s, label=i + 1) for i, s in enumerate(scene.shapes)))
        _, labels = numbered.render(np.zeros(1))
        visible = np.bincount(labels.flatten(), minlength=len(scene.shapes) + 1)[1:]
        large = np.flatnonzero(visible >= SMALLEST * (min(self.size) / 96) ** 2)
        chosen = int(rng.choice(large)) if len(large) else int(visible.argmax())
        shapes = tuple(replace(shape, label=int(i == chosen)) for i, shape in enumerate(scene.shapes))
        return replace(scene, shapes=shapes).render(time)
