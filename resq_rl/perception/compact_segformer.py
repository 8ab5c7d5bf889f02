"""A compact segmentation transformer in the manner of SegFormer (Xie et al. 2021, arXiv 2105.15203).

Three stages of transformer blocks at 1/4, 1/8 and 1/16 of the frame, each behind an overlapped patch embedding, and a
head of linear layers over all of them. As in the paper, keys and values of attention come from a strided convolution
of the tokens, and a depthwise convolution between the two linear layers of a block takes the place of position codes.
Compared with the paper: one stage less, fewer and narrower blocks, and a first patch embedding of two small strided
convolutions with BatchNorm instead of one of 7x7, which small networks learn faster from.

Shapes are not checked at run time here: `torch.fx` calls the same code with placeholders instead of tensors.
"""

from typing import no_type_check

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from resq_rl.errors import NetworkError
from resq_rl.perception.compact_networks import ConvNormReLU, resize

__all__ = ["CompactSegFormer"]

_BLOCKS = 2  # in each stage
_EXPANSION = 2  # of the channels between the linear layers of a block


@no_type_check
def to_tokens(image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n c"]:
    """One token per pixel, row by row."""
    return image.flatten(2).transpose(1, 2)


@no_type_check
def to_image(tokens: Float[Tensor, "b n c"], like: Float[Tensor, "b _ h w"]) -> Float[Tensor, "b c h w"]:
    """Inverse of `to_tokens`, of the height and width of `like`."""
    return tokens.transpose(1, 2).unflatten(2, like.shape[-2:])


class ReducedAttention(nn.Module):
    """Multi-head attention whose keys and values are those of patches of the tokens' image.

    Args:
        width: channels of the tokens.
        heads: number of heads, which share the channels.
        reduction: side of a patch in tokens.
    """

    def __init__(self, width: int, heads: int, reduction: int) -> None:
        super().__init__()
        self.heads = heads
        self.reduce = nn.Conv2d(width, width, reduction, reduction)
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.project = nn.Linear(width, width)

    @no_type_check
    def by_head(self, tokens: Float[Tensor, "b n c"]) -> Float[Tensor, "b heads n _"]:
        """The channels of each head."""
        return tokens.unflatten(2, (self.heads, -1)).transpose(1, 2)

    @no_type_check
    def forward(self, tokens: Float[Tensor, "b n c"], image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n c"]:
        patches = self.norm(to_tokens(self.reduce(to_image(tokens, image))))
        query, key, value = self.query(tokens), self.key(patches), self.value(patches)
        mixed = F.scaled_dot_product_attention(self.by_head(query), self.by_head(key), self.by_head(value))
        output: Tensor = self.project(mixed.transpose(1, 2).flatten(2))
        return output


class MixFFN(nn.Module):
    """Two linear layers with a depthwise 3x3 convolution between them, through which a token knows where it lies."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = _EXPANSION * width
        self.expand = nn.Linear(width, hidden)
        self.mix = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.gelu = nn.GELU()
        self.project = nn.Linear(hidden, width)

    @no_type_check
    def forward(self, tokens: Float[Tensor, "b n c"], image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n c"]:
        hidden = self.mix(to_image(self.expand(tokens), image))
        output: Tensor = self.project(self.gelu(to_tokens(hidden)))
        return output


class Block(nn.Module):
    """Attention, then the `MixFFN`, each of normalised tokens and added to them."""

    def __init__(self, width: int, heads: int, reduction: int) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(width)
        self.attention = ReducedAttention(width, heads, reduction)
        self.norm_ffn = nn.LayerNorm(width)
        self.ffn = MixFFN(width)

    @no_type_check
    def forward(self, tokens: Float[Tensor, "b n c"], image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n c"]:
        tokens = tokens + self.attention(self.norm_attention(tokens), image)
        output: Tensor = tokens + self.ffn(self.norm_ffn(tokens), image)
        return output


class Stage(nn.Module):
    """An overlapped patch embedding, transformer blocks, and a normalisation.

    Args:
        embed: makes an image of `width` channels.
        width, heads, reduction: of the blocks.
    """

    def __init__(self, embed: nn.Module, width: int, heads: int, reduction: int) -> None:
        super().__init__()
        self.embed = embed
        self.norm_embed = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, heads, reduction) for _ in range(_BLOCKS))
        self.norm = nn.LayerNorm(width)

    @no_type_check
    def forward(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k _ _"]:
        image = self.embed(image)
        tokens = self.norm_embed(to_tokens(image))
        for block in self.blocks:
            tokens = block(tokens, image)
        output: Tensor = to_image(self.norm(tokens), image)
        return output


class AllMLPHead(nn.Module):
    """A linear layer for each stage, whose outputs are brought to the first stage's size, mixed and classified."""

    def __init__(self, inputs: tuple[int, ...], hidden: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.ModuleList(nn.Linear(width, hidden) for width in inputs)
        self.fuse = ConvNormReLU(len(inputs) * hidden, hidden, 1)
        self.classify = nn.Conv2d(hidden, classes, 1)

    @no_type_check
    def forward(self, *stages: Float[Tensor, "b _ _ _"]) -> Float[Tensor, "b k h w"]:
        images = [
            resize(to_image(linear(to_tokens(stage)), stage), stages[0])
            for linear, stage in zip(self.linear, stages, strict=True)
        ]
        output: Tensor = self.classify(self.fuse(torch.cat(images, 1)))
        return output


class CompactSegFormer(nn.Module):
    """Segmentation transformer for small frames.

    Its top-level children, in order of execution, are the natural layer groups:

    | child | resolution | channels | what |
    | --- | --- | --- | --- |
    | `quarter` | 1/2, 1/4 | w/2, w | two strided convolutions and two transformer blocks of one head |
    | `eighth` | 1/8 | 2w | a strided convolution and two transformer blocks of two heads |
    | `sixteenth` | 1/16 | 4w | a strided convolution and two transformer blocks of four heads |
    | `head` | 1/4 | 3w/2, classes | linear layers over all stages, and the classifier |

    Every token attends to the patches of a raster of 1/32 of the frame.

    Args:
        classes: number of output classes, 2 to 255.
        width: channels `w` of the first stage, an even number of at least 8.

    Input: `Float[Tensor, "b 3 h w"]`, RGB in 0..1, of at least 32 pixels each way; the normalisation is part of the
    network. Output: logits `Float[Tensor, "b classes h w"]` of the same size.

    Raises:
        NetworkError: `classes` or `width` is out of range.
    """

    def __init__(self, classes: int = 6, width: int = 32) -> None:
        super().__init__()
        if not 2 <= classes <= 255:
            raise NetworkError(f"CompactSegFormer: classes must be from 2 to 255, got {classes}.")
        if width < 8 or width % 2:
            raise NetworkError(f"CompactSegFormer: width must be an even number of at least 8, got {width}.")
        self.classes, self.width = classes, width
        half = ConvNormReLU(3, width // 2, stride=2)
        self.quarter = Stage(nn.Sequential(half, ConvNormReLU(width // 2, width, stride=2)), width, 1, 8)
        self.eighth = Stage(nn.Conv2d(width, 2 * width, 3, 2, 1), 2 * width, 2, 4)
        self.sixteenth = Stage(nn.Conv2d(2 * width, 4 * width, 3, 2, 1), 4 * width, 4, 2)
        self.head = AllMLPHead((width, 2 * width, 4 * width), 3 * width // 2, classes)

    @no_type_check
    def forward(self, frames: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b k h w"]:
        """Logits of `frames`, RGB in 0..1, at the same size."""
        quarter = self.quarter(4.0 * frames - 2.0)
        eighth = self.eighth(quarter)
        return resize(self.head(quarter, eighth, self.sixteenth(eighth)), frames)
