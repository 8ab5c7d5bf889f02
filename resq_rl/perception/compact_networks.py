"""A compact two-branch segmentation network in the manner of DDRNet (Hong et al. 2021, arXiv 2101.06085).

Detail stays at a quarter of the frame in one branch while a second, deeper branch goes down to a sixteenth;
the two exchange features twice, and pooled context from the deep branch is added before a light head.
Compared with the paper: fewer and narrower blocks, one block per stage, two context scales, no auxiliary
head, and convolution-norm-ReLU order everywhere, so that every normalisation folds into the convolution
before it.

Shapes are not checked at run time here: `torch.fx` calls the same code with placeholders instead of tensors.
"""

from typing import no_type_check

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from resq_rl.errors import NetworkError

__all__ = ["CompactDDRNet", "CompactPose", "MaskPropagationNet"]


@no_type_check
def resize(features: Float[Tensor, "b c h w"], like: Float[Tensor, "b _ H W"]) -> Float[Tensor, "b c H W"]:
    """Bilinear resize to the height and width of `like`."""
    return F.interpolate(features, size=like.shape[-2:], mode="bilinear", align_corners=False)


class ConvNorm(nn.Sequential):
    """Convolution without bias, then BatchNorm: `same` padding for stride 1, ceil(h / 2) for stride 2."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(outputs)


class ConvNormReLU(ConvNorm):
    """`ConvNorm` and a ReLU that is not in place."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride)
        self.relu = nn.ReLU()


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.first = ConvNormReLU(inputs, outputs, stride=stride)
        self.second = ConvNorm(outputs, outputs)
        same = inputs == outputs and stride == 1
        self.shortcut: nn.Module = nn.Identity() if same else ConvNorm(inputs, outputs, 1, stride)
        self.relu = nn.ReLU()

    @no_type_check
    def forward(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k _ _"]:
        output: Tensor = self.relu(self.second(self.first(features)) + self.shortcut(features))
        return output


class SemanticBranch(nn.Module):
    """The deep branch: 1/8 of the frame with 2w channels, then 1/16 with 4w. It takes in detail after each."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.eighth = ResidualBlock(width, 2 * width, stride=2)
        self.detail_to_eighth = ConvNorm(width, 2 * width, stride=2)
        self.relu_eighth = nn.ReLU()
        self.sixteenth = ResidualBlock(2 * width, 4 * width, stride=2)
        self.detail_to_sixteenth = nn.Sequential(
            ConvNormReLU(width, 2 * width, stride=2), ConvNorm(2 * width, 4 * width, stride=2)
        )
        self.relu_sixteenth = nn.ReLU()


class DetailBranch(nn.Module):
    """The branch that stays at 1/4 of the frame with w channels. It takes in upsampled semantics once."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = ResidualBlock(width, width)
        self.semantic_from_eighth = ConvNorm(2 * width, width, 1)
        self.relu_first = nn.ReLU()
        self.second = ResidualBlock(width, width)


class Context(nn.Module):
    """Pooled context in the manner of DAPPM: local, half-resolution and whole-frame, summed and mixed."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.local = ConvNormReLU(inputs, hidden, 1)
        self.coarse = nn.Sequential(
            nn.AvgPool2d(5, stride=2, padding=2, count_include_pad=False), ConvNormReLU(inputs, hidden, 1)
        )
        self.whole = nn.Sequential(nn.AdaptiveAvgPool2d(1), ConvNormReLU(inputs, hidden, 1))
        self.mix = ConvNormReLU(hidden, hidden)
        self.project = ConvNorm(hidden, outputs, 1)

    @no_type_check
    def forward(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k h w"]:
        scales = self.local(features) + resize(self.coarse(features), features) + self.whole(features)
        context: Tensor = self.project(self.mix(scales))
        return context


class CompactDDRNet(nn.Module):
    """Two-branch real-time segmentation network for small frames.

    Its top-level children, in order of execution, are the natural layer groups:

    | child | resolution | channels | what |
    | --- | --- | --- | --- |
    | `stem` | 1/2, 1/4 | w/2, w | two strided convolutions |
    | `shared` | 1/4 | w | one residual block before the branches part |
    | `semantic` | 1/8, 1/16 | 2w, 4w | the deep branch and what it takes from the detail branch |
    | `detail` | 1/4 | w | the fine branch and what it takes from the deep branch |
    | `context` | 1/16 and pooled | 2w, w | local, half-resolution and whole-frame context |
    | `head` | 1/4 | w, classes | one convolution and the classifier, on detail plus upsampled context |

    Args:
        classes: number of output classes, 2 to 255.
        width: channels `w` of the fine branch, an even number of at least 8.
        planes: channels of the input.

    Input: `Float[Tensor, "b 3 h w"]`, RGB in 0..1, of any size (below 16 pixels little is left to see); the
    normalisation is part of the network. Output: logits `Float[Tensor, "b classes h w"]` of the same size.

    Raises:
        NetworkError: `classes` or `width` is out of range.
    """

    def __init__(self, classes: int = 6, width: int = 32, planes: int = 3) -> None:
        super().__init__()
        if not 2 <= classes <= 255:
            raise NetworkError(f"CompactDDRNet: classes must be from 2 to 255, got {classes}.")
        if width < 8 or width % 2:
            raise NetworkError(f"CompactDDRNet: width must be an even number of at least 8, got {width}.")
        self.classes, self.width = classes, width
        self.stem = nn.Sequential(ConvNormReLU(planes, width // 2, stride=2), ConvNormReLU(width // 2, width, stride=2))
        self.shared = ResidualBlock(width, width)
        self.semantic = SemanticBranch(width)
        self.detail = DetailBranch(width)
        self.context = Context(4 * width, 2 * width, width)
        self.head = nn.Sequential(nn.ReLU(), ConvNormReLU(width, width), nn.Conv2d(width, classes, 1))

    @no_type_check
    def forward(self, frames: Float[Tensor, "b p h w"]) -> Float[Tensor, "b k h w"]:
        """Logits of `frames`, RGB in 0..1, at the same size."""
        return resize(self.logits(frames), frames)

    @no_type_check
    def logits(self, frames: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b k _ _"]:
        """Logits at 1/4 of the size of `frames`, rounded up."""
        shared = self.shared(self.stem(4.0 * frames - 2.0))
        semantic, detail = self.semantic, self.detail
        eighth, fine = semantic.eighth(shared), detail.first(shared)
        fine_first = detail.relu_first(fine + resize(detail.semantic_from_eighth(eighth), fine))
        eighth = semantic.relu_eighth(eighth + semantic.detail_to_eighth(fine))
        sixteenth, fine = semantic.sixteenth(eighth), detail.second(fine_first)
        sixteenth = semantic.relu_sixteenth(sixteenth + semantic.detail_to_sixteenth(fine))
        output: Tensor = self.head(fine + resize(self.context(sixteenth), fine))
        return output


class CompactPose(CompactDDRNet):
    """The same network for human pose: heatmaps of 1/4 of the frame, one for each point.

    Args:
        points: number of points, 2 to 255.
        width: channels of the fine branch, an even number of at least 8.

    Input: `Float[Tensor, "b 3 h w"]`, RGB in 0..1. Output: logits `Float[Tensor, "b points h/4 w/4"]`, rounded up.
    """

    def __init__(self, points: int = 13, width: int = 24) -> None:
        super().__init__(points, width)

    @no_type_check
    def forward(self, frames: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b k _ _"]:
        """Logits of heatmaps of `frames`, RGB in 0..1."""
        return self.logits(frames)


class MaskPropagationNet(CompactDDRNet):
    """`CompactDDRNet` that predicts the mask of an object from the frame and the mask in the previous one.

    In the manner of MaskTrack (Perazzi et al. 2017, arXiv 1612.02646) the mask is a fourth plane of the input; two more
    say how near each pixel is to two colours that the object has in the first frame, its memory of what to follow.

    Args:
        width: channels of the fine branch.

    Input: frames `Float[Tensor, "b 3 h w"]`, RGB in 0..1; masks `Float[Tensor, "b 1 h w"]`, 1 inside the object, 0
    outside; colours `Float[Tensor, "b 6 1 1"]`, two of RGB in 0..1. Output: logits `Float[Tensor, "b 2 h w"]` of
    background and object.
    """

    def __init__(self, width: int = 20) -> None:
        super().__init__(2, width, planes=6)

    @no_type_check
    def forward(
        self,
        frames: Float[Tensor, "b 3 h w"],
        masks: Float[Tensor, "b 1 h w"],
        colours: Float[Tensor, "b 6 1 1"],
    ) -> Float[Tensor, "b 2 h w"]:
        """Logits of `frames`, given the masks of the previous ones and the object's colours."""
        apart = [(frames - colours[:, i : i + 3]).abs().mean(1, keepdim=True) for i in (0, 3)]
        near = [(1.0 - 5.0 * distance).clamp(min=0.0) for distance in apart]
        return super().forward(torch.cat([frames, masks, *near], 1))
