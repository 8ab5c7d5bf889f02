"""Levels by blocks of channels: every block of a pixel's channels as a pixel of its own.

In memory with the channels last, the blocks of a pixel lie side by side as pixels do, so that whatever works on pixels
works on blocks: an image of (c, h, w) is one of (c / k, h, w k).
"""

from jaxtyping import Num, Shaped, UInt8
from torch import Tensor

__all__ = ["any_of", "joined", "split", "spread", "summed"]


def split(x: Shaped[Tensor, "b c h w"], blocks: int) -> Shaped[Tensor, "b n h wk"]:
    """An image with its blocks as pixels: a view, if channels lie last in memory."""
    if blocks == 1:
        return x
    clips, channels, rows, columns = x.shape
    return x.permute(0, 2, 3, 1).reshape(clips, rows, columns * blocks, channels // blocks).permute(0, 3, 1, 2)


def joined(x: Shaped[Tensor, "b n h wk"], blocks: int) -> Shaped[Tensor, "b c h w"]:
    """The inverse of `split`."""
    if blocks == 1:
        return x
    clips, channels, rows, columns = x.shape
    return x.permute(0, 2, 3, 1).reshape(clips, rows, columns // blocks, channels * blocks).permute(0, 3, 1, 2)


def spread(values: Shaped[Tensor, "*b h w"], blocks: int) -> Shaped[Tensor, "*b h wk"]:
    """Values of pixels, for each of their blocks."""
    return values if blocks == 1 else values.repeat_interleave(blocks, -1)


def summed(values: Num[Tensor, "b h wk"], blocks: int) -> Num[Tensor, "b h w"]:
    """Sums over the blocks of each pixel."""
    total: Tensor = values if blocks == 1 else values.unflatten(-1, (-1, blocks)).sum(-1)
    return total


def any_of(marks: UInt8[Tensor, "b h wk"], blocks: int) -> UInt8[Tensor, "b h w"]:
    """Pixels of which some block is marked."""
    return marks if blocks == 1 else marks.unflatten(-1, (-1, blocks)).amax(-1)
