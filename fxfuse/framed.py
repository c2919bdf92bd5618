"""Convolutions with a frame: what they lack at the border, where a padded value was not what a layer before gives.

A framed convolution adds one map to the output of every sample: the convolution of a single channel, which is 1 at
the positions that are padded and 0 inside, with `frame`. So the map is 0 wherever no tap reads out of bounds. It is
made anew from the size of each input.

Without `from __future__ import annotations`: torch.jit.script reads the annotations of attributes.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class FramedConv1d(nn.Conv1d):
    """`nn.Conv1d` that adds a frame: [B, C, L] or [C, L] to [B, N, L'] or [N, L'].

    Args:
        *args: those of `nn.Conv1d`; `padding` is 0 where `sides` differ.
        sides: (low, high) padding of each dim.
        **fields: those of `nn.Conv1d`.

    Attributes:
        frame: parameter [N, 1, *K] in the dtype of the weight.
    """

    frame: Tensor
    amounts: list[int]
    uneven: bool

    def __init__(self, *args: Any, sides: tuple[tuple[int, int], ...], **fields: Any) -> None:
        super().__init__(*args, **fields)
        _frame(self, sides)

    def forward(self, input: Tensor) -> Tensor:
        border = F.pad(input.new_zeros((1, 1, input.size(-1))), self.amounts, value=1.0)
        frame = F.conv1d(border, self.frame, None, self.stride, 0, self.dilation)
        if self.uneven:
            input = F.pad(input, self.amounts)
        out: Tensor = self._conv_forward(input, self.weight, self.bias)
        return out.add_(frame[0])  # what a convolution gives is nobody else's

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, sides={self.sides}"  # type: ignore[no-untyped-call]


class FramedConv2d(nn.Conv2d):
    """`nn.Conv2d` that adds a frame: [B, C, H, W] or [C, H, W]; see `FramedConv1d`."""

    frame: Tensor
    amounts: list[int]
    uneven: bool

    def __init__(self, *args: Any, sides: tuple[tuple[int, int], ...], **fields: Any) -> None:
        super().__init__(*args, **fields)
        _frame(self, sides)

    def forward(self, input: Tensor) -> Tensor:
        border = F.pad(input.new_zeros((1, 1, input.size(-2), input.size(-1))), self.amounts, value=1.0)
        frame = F.conv2d(border, self.frame, None, self.stride, 0, self.dilation)
        if self.uneven:
            input = F.pad(input, self.amounts)
        out: Tensor = self._conv_forward(input, self.weight, self.bias)
        return out.add_(frame[0])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, sides={self.sides}"  # type: ignore[no-untyped-call]


class FramedConv3d(nn.Conv3d):
    """`nn.Conv3d` that adds a frame: [B, C, D, H, W] or [C, D, H, W]; see `FramedConv1d`."""

    frame: Tensor
    amounts: list[int]
    uneven: bool

    def __init__(self, *args: Any, sides: tuple[tuple[int, int], ...], **fields: Any) -> None:
        super().__init__(*args, **fields)
        _frame(self, sides)

    def forward(self, input: Tensor) -> Tensor:
        size = (1, 1, input.size(-3), input.size(-2), input.size(-1))
        border = F.pad(input.new_zeros(size), self.amounts, value=1.0)
        frame = F.conv3d(border, self.frame, None, self.stride, 0, self.dilation)
        if self.uneven:
            input = F.pad(input, self.amounts)
        out: Tensor = self._conv_forward(input, self.weight, self.bias)
        return out.add_(frame[0])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, sides={self.sides}"  # type: ignore[no-untyped-call]


def _frame(layer: Any, sides: tuple[tuple[int, int], ...]) -> None:
    layer.sides = sides
    layer.amounts = [a for pair in sides[::-1] for a in pair]  # as F.pad takes them
    layer.uneven = any(low != high for low, high in sides)
    layer.frame = nn.Parameter(layer.weight.new_zeros((layer.out_channels, 1, *layer.kernel_size)))


FRAMED: dict[int, Any] = {1: FramedConv1d, 2: FramedConv2d, 3: FramedConv3d}
