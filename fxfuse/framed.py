"""Convolutions with a frame: what they lack at the border, where a padded value was not what a layer before gives.

A framed convolution adds one map to the output of every sample: the convolution of a single channel, which is 1 at
the positions that are padded and 0 inside, with `frame`. So the map is 0 wherever no tap reads out of bounds. It is
made anew from the size of each input.

Without `from __future__ import annotations`: torch.jit.script reads the annotations of attributes.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd


class _Framed(_ConvNd):
    """What the three below have in common.

    Args:
        *args: those of the convolution; `padding` is 0 where `sides` differ.
        sides: (low, high) padding of each dim.
        **fields: those of the convolution.

    Attributes:
        frame: parameter [N, 1, *K] in the dtype of the weight.
    """

    frame: Tensor
    amounts: list[int]
    uneven: bool

    def __init__(self, *args: Any, sides: tuple[tuple[int, int], ...], **fields: Any) -> None:
        super().__init__(*args, **fields)
        self.sides = sides
        self.amounts = [a for pair in sides[::-1] for a in pair]  # as F.pad takes them
        self.uneven = any(low != high for low, high in sides)
        self.frame = nn.Parameter(self.weight.new_zeros((self.out_channels, 1, *self.kernel_size)))

    def _at_border(self, border: Tensor) -> Tensor:
        """The convolution of the map `border`, a batch of one channel, with the frame."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        inside = input.new_zeros(input.shape[-len(self.kernel_size) :])
        border = F.pad(inside, self.amounts, value=1.0).unsqueeze(0).unsqueeze(0)
        frame = self._at_border(border)
        if self.uneven:
            input = F.pad(input, self.amounts)
        out: Tensor = self._conv_forward(input, self.weight, self.bias)
        return out.add_(frame[0])  # what a convolution gives is nobody else's

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, sides={self.sides}"  # type: ignore[no-untyped-call]


class FramedConv1d(_Framed, nn.Conv1d):
    """`nn.Conv1d` that adds a frame: [B, C, L] or [C, L] to [B, N, L'] or [N, L']."""

    def _at_border(self, border: Tensor) -> Tensor:
        return F.conv1d(border, self.frame, None, self.stride, [0], self.dilation, 1)


class FramedConv2d(_Framed, nn.Conv2d):
    """`nn.Conv2d` that adds a frame: [B, C, H, W] or [C, H, W]."""

    def _at_border(self, border: Tensor) -> Tensor:
        return F.conv2d(border, self.frame, None, self.stride, [0, 0], self.dilation, 1)


class FramedConv3d(_Framed, nn.Conv3d):
    """`nn.Conv3d` that adds a frame: [B, C, D, H, W] or [C, D, H, W]."""

    def _at_border(self, border: Tensor) -> Tensor:
        return F.conv3d(border, self.frame, None, self.stride, [0, 0, 0], self.dilation, 1)


FRAMED: dict[int, Any] = {1: FramedConv1d, 2: FramedConv2d, 3: FramedConv3d}
