"""The task of human pose: points of a figure from heatmaps or landmarks, and the share of correct ones (PCK)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Literal, get_args

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor
from torch.nn import functional as F

from resq_rl.errors import NetworkError, SettingsError, VideoError
from resq_rl.perception.task import PALETTE, Loss, PretrainSettings, log_probabilities, select_output
from resq_rl.perception.training_batches import labels_of
from resq_rl.video import JOINTS, Clip

__all__ = ["Pose", "PoseKind"]

PoseKind = Literal["heatmaps", "probabilities", "landmarks"]
"""`heatmaps`: a map of logits for each point; `probabilities`: a map of values in 0..1 for each, as of a sigmoid;
`landmarks`: two or more numbers for each point, coordinates first."""

SIDE: Final = (("shoulder", "elbow"), ("elbow", "wrist"), ("shoulder", "hip"), ("hip", "knee"), ("knee", "ankle"))
LIMBS: Final = (
    *((f"{side}_{a}", f"{side}_{b}") for side in ("left", "right") for a, b in SIDE),
    ("left_shoulder", "right_shoulder"),
    ("left_hip", "right_hip"),
)
"""Pairs of points that pictures join."""

TORSO: Final = ("right_shoulder", "left_hip")  # its ends
MOST_VALUES: Final = 5  # of a landmark, as far as they can be told from an output's length: x, y, z and two scores
STILL: Final = 0.01  # pixels that a point moves at least, in some clip, if a network sees anything
SPREAD: Final = 1.0  # standard deviation, in cells, of the heat of a labelled point


@dataclass(frozen=True)
class Pose:
    """Human pose: where each of k points of one figure is in a frame.

    A point is right when it lies within `share` times the size of the figure of the labelled one. The size is by
    default the diameter of the torso, from right shoulder to left hip (Sapp and Taskar 2013), or the longer side of the
    box around the figure's labelled points (Yang and Ramanan 2013), which is two to four times as long. PCK is the
    share of right points among all that count, over all frames together.

    A prediction holds x and y in pixels and a score for each point: the share of its heat within a cell of the peak. A
    target holds x, y and whether the point counts.

    Landmarks may have the shape (b, k v) or (b, k, v) for v values of each point, with further dimensions of length 1.

    Attributes:
        points: names, of which "left_x" and "right_x" trade places in mirrored frames; or the number of points where
            they have no names.
        kind: what the network returns, see `PoseKind`.
        stride: pixels of the frame per cell of a heatmap; landmarks are drawn as heatmaps of this resolution.
        share: of the figure's size, above 0.
        normaliser: what the figure's size is, "torso" or "box".
        channels: which of the network's points those are, in order; None where it has the same points.
        output_key: which of several outputs, an index or a dictionary key; None for a network with one output.
        least_score: points that the float network predicts with a lower score are no targets under teacher agreement.
        values: landmarks of shape (b, k v): the number v of values of each point. None to divide by the number of
            points, which is possible without `channels` and where the result is from 2 to 5.
        coordinates: landmarks: whether x and y are in "pixels" from the centre of the upper left one, or shares of the
            "frame": 0 at its left and upper edge, 1 at its right and lower edge.
        axes: landmarks: the order of the first two values, "xy" or "yx".

    Raises:
        SettingsError: a value is out of range, or has no effect on heatmaps.
    """

    points: int | tuple[str, ...] = JOINTS
    kind: PoseKind = "heatmaps"
    stride: int = 4
    share: float = 0.2
    normaliser: Literal["torso", "box"] = "torso"
    channels: tuple[int, ...] | None = None
    output_key: int | str | None = None
    least_score: float = 0.1
    values: int | None = None
    coordinates: Literal["pixels", "frame"] = "pixels"
    axes: Literal["xy", "yx"] = "xy"

    def __post_init__(self) -> None:
        if not isinstance(self.points, int):
            object.__setattr__(self, "points", tuple(self.points))
        if self.channels is not None:
            object.__setattr__(self, "channels", tuple(self.channels))
        names, landmarks = self.names, self.kind == "landmarks"
        channels = range(len(names)) if self.channels is None else self.channels
        torso = self.normaliser == "torso" and set(TORSO) <= set(names)
        only = "left alone for heatmaps, on which it has no effect"
        rules: dict[str, tuple[bool, str]] = {
            "kind": (self.kind in get_args(PoseKind), f"one of {', '.join(get_args(PoseKind))}"),
            "points": (bool(names) and len(set(names)) == len(names), "names, each once, or how many points there are"),
            "normaliser": (
                self.normaliser == "box" or torso,
                f"box, or torso for points that have {' and '.join(TORSO)}",
            ),
            "stride": (self.stride >= 1, "1 or more"),
            "share": (self.share > 0, "above 0"),
            "channels": (
                len(channels) == len(names) and min(channels, default=0) >= 0,
                f"{len(names)} numbers, one for each point, from 0 on",
            ),
            "values": (self.values is None or (landmarks and self.values >= 2), f"2 or more, and {only}"),
            "coordinates": (
                self.coordinates == "pixels" or (landmarks and self.coordinates == "frame"),
                f"pixels or frame, and {only}",
            ),
            "axes": (self.axes == "xy" or (landmarks and self.axes == "yx"), f"xy or yx, and {only}"),
        }
        for name, (valid, rule) in rules.items():
            if not valid:
                raise SettingsError(f"Pose: {name} must be {rule}, got {getattr(self, name)!r}.")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the points; their numbers where they have none."""
        return tuple(map(str, range(self.points))) if isinstance(self.points, int) else self.points

    @property
    def metric(self) -> str:
        """PCK with its share of the figure's size, which is the torso's unless the name says box."""
        return f"PCK@{self.share:g}" + (" of box" if self.normaliser == "box" else "")

    @cached_property
    def _mirror(self) -> list[int]:
        """Index of each point's mirror image."""
        swapped = {"left": "right", "right": "left"}
        names = ["_".join([swapped.get(side, side), *rest]) for side, *rest in (n.split("_") for n in self.names)]
        return [self.names.index(n) if n in self.names else i for i, n in enumerate(names)]

    def check(self, clip: Clip) -> None:
        """Check a clip's labels.

        Raises:
            VideoError: they are not the task's points.
        """
        labels = labels_of(clip, "pose")
        if labels.dim() != 3 or labels.shape[1:] != (len(self.names), 3) or not labels.is_floating_point():
            raise VideoError(
                f"{clip.name}: pose needs labels of shape (frames, {len(self.names)}, 3), got {labels.dtype} of shape "
                f"{tuple(labels.shape)}. Choose another video, or set task.points to its points."
            )

    def output(self, raw: object, size: tuple[int, int] | None = None) -> Float[Tensor, "b k h w"]:
        """Logits of heatmaps in whatever the network returned; landmarks as heatmaps of one peak each.

        The logits of probabilities are their logarithms, so that heat, which is a softmax over the cells of a map, is
        the probabilities over their sum.

        Args:
            raw: a tensor, or a list, tuple or dictionary of tensors, from which `output_key` chooses.
            size: height and width of the frames in pixels; needed for landmarks.

        Raises:
            NetworkError: there is no such output, or it is not of the task's kind and size.
        """
        own = select_output(raw, self.output_key, self.kind)
        if self.kind == "landmarks":
            if size is None:
                raise NetworkError("Landmarks are drawn on frames of some size: call output(raw, size).")
            return self._heat(self._places(own, size), size)
        found, stride = tuple(own.shape), self.stride
        count = len(self.names) if self.channels is None else max(self.channels) + 1
        enough = own.dim() == 4 and (own.shape[1] == count if self.channels is None else own.shape[1] >= count)
        cells = [] if size is None else zip(found[2:], size, strict=enough)
        sized = all(n in (length // stride, -(-length // stride)) for n, length in cells)
        if not (enough and sized and own.is_floating_point()):
            raise NetworkError(
                f"A network for {len(self.names)} points must put out float heatmaps of 1/{self.stride} of the frame "
                f"{size}, got {own.dtype} of shape {found}. Set kind, stride, channels and output_key to "
                "match the network."
            )
        maps = (own if self.channels is None else own[:, list(self.channels)]).float()
        return log_probabilities(maps, "heatmaps") if self.kind == "probabilities" else maps

    def _places(self, raw: Tensor, size: tuple[int, int]) -> Float[Tensor, "b k 2"]:
        """X and y in pixels of each of the task's points, from landmarks of frames of `size`.

        Raises:
            NetworkError: the output holds another number of points or values.
        """
        points, chosen = len(self.names), self.channels or tuple(range(len(self.names)))
        found = raw.reshape(*raw.shape[:1], *(n for n in raw.shape[1:] if n != 1))
        each = self.values
        if found.dim() == 2 and each is None and self.channels is None and found.shape[1] % points == 0:
            each = found.shape[1] // points
            each = each if each <= MOST_VALUES else None  # more are rather those of further points
        if found.dim() == 2 and each is not None and found.shape[1] % each == 0:
            found = found.unflatten(1, (-1, each))
        known = found.dim() == 3 and found.shape[2] == (each or found.shape[2]) and found.shape[2] >= 2
        enough = known and (found.shape[1] > max(chosen) if self.channels else found.shape[1] == points)
        if not (enough and raw.is_floating_point()):
            wanted = f"at least {max(chosen) + 1}" if self.channels else f"{points}"
            raise NetworkError(
                f"Landmarks must be a float tensor of shape (b, k v) or (b, k, v), with k {wanted} points of "
                f"{f'v = {self.values}' if self.values else 'two or more'} values, got {raw.dtype} of shape "
                f"{tuple(raw.shape)}. Set points, values (how many numbers each point has), channels (which of the "
                "network's points) and output_key to match the network."
            )
        places = found[:, list(chosen), :2].float()
        places = places if self.axes == "xy" else places.flip(2)
        return places if self.coordinates == "pixels" else places * places.new_tensor([size[1], size[0]]) - 0.5

    def _heat(self, places: Float[Tensor, "b k 2"], size: tuple[int, int]) -> Float[Tensor, "b k h w"]:
        """-d^2 / (2 SPREAD^2), with d the distance of each cell from the place (x, y), in cells."""
        cells = (-(-length // self.stride) for length in size)
        y, x = (torch.arange(n, device=places.device) * self.stride + (self.stride - 1) / 2 for n in cells)
        scale = -0.5 / (SPREAD * self.stride) ** 2
        across, down = (x - places[..., :1]) ** 2, (y - places[..., 1:2]) ** 2
        return scale * (down[..., :, None] + across[..., None, :])

    def predict(self, output: Float[Tensor, "b k h w"]) -> Float[Tensor, "b k 3"]:
        """The peak of each heatmap, refined by a parabola through its neighbours on either axis, and its score."""
        width = output.shape[3]
        best = output.flatten(2).argmax(2)
        row, column = best // width, best % width
        padded = F.pad(output, (1, 1, 1, 1), value=-torch.inf).flatten(2)
        step = torch.arange(3, device=output.device)
        cells = (row[..., None] + step)[..., :, None] * (width + 2) + (column[..., None] + step)[..., None, :]
        near = padded.gather(2, cells.flatten(2)).unflatten(2, (3, 3))
        score = (near.flatten(2).logsumexp(2) - output.flatten(2).logsumexp(2)).exp()
        x = column + _vertex(near[:, :, 1, 0], near[:, :, 1, 1], near[:, :, 1, 2])
        y = row + _vertex(near[:, :, 0, 1], near[:, :, 1, 1], near[:, :, 2, 1])
        centre = (self.stride - 1) / 2
        return torch.stack([x * self.stride + centre, y * self.stride + centre, score], -1)

    def target(self, prediction: Float[Tensor, "b k 3"]) -> Float[Tensor, "b k 3"]:
        """Points with a score of `least_score` or more count."""
        return torch.cat([prediction[..., :2], (prediction[..., 2:] >= self.least_score).float()], -1)

    def _wrong(self, prediction: Float[Tensor, "b k 3"], target: Float[Tensor, "b k 3"]) -> Float[Tensor, "b k"]:
        """1 for each point that counts and is wrong, else 0."""
        counted = target[..., 2] > 0
        distance = (prediction[..., :2] - target[..., :2]).norm(dim=2)
        wrong: Tensor = counted & ~(distance <= self.share * self._size(target))
        return wrong.float()

    def _size(self, target: Float[Tensor, "b k 3"]) -> Float[Tensor, "b 1"]:
        """Size of the figure in pixels."""
        places, counted = target[..., :2], target[..., 2:] > 0
        if self.normaliser == "torso":
            shoulder, hip = (places[:, self.names.index(name)] for name in TORSO)
            torso: Tensor = (shoulder - hip).norm(dim=1, keepdim=True)
            return torso
        low = places.masked_fill(~counted, torch.inf).amin(1)
        high = places.masked_fill(~counted, -torch.inf).amax(1)
        return (high - low).amax(1, keepdim=True)

    def counts(self, prediction: Float[Tensor, "b k 3"], target: Float[Tensor, "b k 3"]) -> Int64[Tensor, "b k 2"]:
        """For each point, whether it is right and whether it counts."""
        counted, wrong = target[..., 2] > 0, self._wrong(prediction, target) > 0
        return torch.stack([counted & ~wrong, counted], -1).long()

    def accuracy(self, counts: Int64[Tensor, "*n k 2"]) -> Float64[Tensor, "*n"]:
        """PCK over all points."""
        right, counted = counts.double().sum(-2).unbind(-1)
        return right / counted

    def error_table(self, counts: Int64[Tensor, "k 2"], weighting: str) -> Float[Tensor, " k"]:
        """Every wrong point costs the same by either weighting, as in PCK."""
        return torch.ones(len(self.names))

    def error(
        self,
        prediction: Float[Tensor, "b k 3"],
        target: Float[Tensor, "b k 3"],
        table: Float[Tensor, " k"],
        size: tuple[int, int],
    ) -> Float[Tensor, "b h w"]:
        """Half of a wrong point's cost lies where it should be and half where it was predicted: more bits help there.

        The mean is the share of the k points that are wrong; points that do not count cost nothing.
        """
        height, width = size
        cost = 0.5 * self._wrong(prediction, target) * table * (height * width / len(self.names))
        error = cost.new_zeros(len(cost), height * width)
        for places in (target, prediction):
            x, y = (places[..., i].round().long().clamp(0, n - 1) for i, n in ((0, width), (1, height)))
            error.scatter_add_(1, y * width + x, cost)
        spread: Tensor = error.unflatten(1, size)
        return spread

    def features(
        self, output: Float[Tensor, "b k h w"], prediction: Float[Tensor, "b k 3"]
    ) -> tuple[Float[Tensor, "b h w"], Float[Tensor, "b h w"], Float[Tensor, "b h w"]]:
        """Uncertainty: the heat of points with a low score; boundary: the steepness of the heat; foreground: the heat.

        Heat is exp(logit - highest logit of the point's map), of the hottest point at each cell.
        """
        heat = (output - output.amax((2, 3), keepdim=True)).exp()
        unsure = (1 - prediction[..., 2]).clamp(0, 1).to(heat.device)
        strongest = heat.amax(1)
        steep = torch.zeros_like(strongest)
        steep[:, :, :-1] += (strongest[:, :, 1:] - strongest[:, :, :-1]).abs()
        steep[:, :-1] += (strongest[:, 1:] - strongest[:, :-1]).abs()
        return (heat * unsure[..., None, None]).amax(1), steep.clamp(0, 1), strongest

    def divergence(self, output: Float[Tensor, "b k h w"], teacher: Float[Tensor, "b k h w"]) -> Float[Tensor, " b"]:
        """Divergence of the place of a point from the float network's, averaged over the points.

        KL(p || q) = sum over cells of p (log p - log q), with p = softmax over the cells of the teacher's map and q of
        the output's (Kullback and Leibler 1951; the loss of distillation, Hinton et al., arXiv 1503.02531). Of
        landmarks, which are drawn as Gaussian heat, it is d^2 / (2 SPREAD^2) inside the frame, d the distance in cells.
        """
        log_p, log_q = (maps.flatten(2).log_softmax(2) for maps in (teacher, output))
        return (log_p.exp() * (log_p - log_q)).sum(2).mean(1)

    def overlay(self, frame: Float[Tensor, "3 h w"], prediction: Float[Tensor, "k 3"]) -> Float[Tensor, "3 h w"]:
        """The darkened frame with points and limbs, in one colour each for the left, the right and the middle."""
        height, width = frame.shape[1:]
        y, x = torch.arange(height)[:, None], torch.arange(width)[None, :]
        drawn, places = 0.6 * frame, dict(zip(self.names, prediction[:, :2].tolist(), strict=True))
        thin, thick = max(0.8, min(height, width) / 160), max(2.0, min(height, width) / 60)
        limbs = [(a, b, thin) for a, b in LIMBS if a in places and b in places]
        for a, b, radius in [*limbs, *((name, name, thick) for name in self.names)]:
            (x0, y0), (x1, y1) = places[a], places[b]
            length = max((x1 - x0) ** 2 + (y1 - y0) ** 2, 1e-6)
            along = (((x - x0) * (x1 - x0) + (y - y0) * (y1 - y0)) / length).clamp(0, 1)
            distance = ((x - x0 - along * (x1 - x0)) ** 2 + (y - y0 - along * (y1 - y0)) ** 2).sqrt()
            sides = {name.split("_")[0] for name in (a, b)}
            colour = PALETTE[4 if sides == {"left"} else 3 if sides == {"right"} else 1]
            drawn = torch.where(distance <= radius, colour[:, None, None], drawn)
        return drawn

    def degenerate(self, predictions: Sequence[Float[Tensor, "t k 3"]]) -> str | None:
        """Why the predictions for some clips cannot be those of a network that works, or None.

        The points stay where they are in all frames, or none reaches `least_score`.
        """
        found = torch.cat(list(predictions))
        if len(found) > 1 and float((found[..., :2].amax(0) - found[..., :2].amin(0)).max()) < STILL:
            hint = ", coordinates and axes" if self.kind == "landmarks" else ""
            return f"every point stays at one place in all {len(found)} frames (see task.output_key{hint})"
        if float(found[..., 2].max()) < self.least_score:
            return (
                f"no point has a score of {self.least_score} or more, so there is no target (of kind 'heatmaps' they "
                "must be logits: set task.kind=probabilities for a network that puts out values in 0..1)"
            )
        return None

    def objective(self, clips: Sequence[Clip], settings: PretrainSettings, purpose: str = "training") -> Loss:
        """Cross-entropy of each map, as probabilities of cells, against Gaussian heat about the labelled point.

        Raises:
            VideoError: no clips, or labels that do not fit. SettingsError: the task is not of kind "heatmaps", points
                without names would be mirrored, or a setting has no effect.
        """
        if self.kind != "heatmaps":
            raise SettingsError(f"Pretraining needs a task of kind 'heatmaps', got {self.kind!r}.")
        settings.refuse_unused("points", "dice", "class_balance")
        if settings.augment and isinstance(self.points, int):
            raise SettingsError(
                "Frames are mirrored in training, and points without names do not tell left from right. Name them in "
                "task.points, or set pretraining.augment to false."
            )
        if not clips:
            raise VideoError(f"There are no clips for {purpose}. Check the split of the dataset.")
        for clip in clips:
            labels_of(clip, purpose)
            self.check(clip)

        def loss(output: Tensor, labels: Tensor) -> Tensor:
            size = (output.shape[2] * self.stride, output.shape[3] * self.stride)
            heat = self._heat(labels[..., :2], size).flatten(2).softmax(2)
            entropy = -(heat * output.flatten(2).log_softmax(2)).sum(2)
            return (entropy * labels[..., 2]).sum() / labels[..., 2].sum().clamp(min=1)

        return loss

    def mirrored(self, labels: Float[Tensor, "b k 3"], width: int) -> Float[Tensor, "b k 3"]:
        """Labels of mirrored frames, in which left points become right ones."""
        x, y, counted = labels[:, self._mirror].unbind(-1)
        return torch.stack([width - 1 - x, y, counted], -1)


def _vertex(before: Tensor, peak: Tensor, after: Tensor) -> Tensor:
    """The peak of a parabola through three values a cell apart, from -0.5 to 0.5; 0 at the edge of a map."""
    bend = 2 * peak - before - after
    offset = 0.5 * (after - before) / bend.clamp(min=1e-6)
    return torch.where(bend.isfinite(), offset, 0.0).clamp(-0.5, 0.5)
