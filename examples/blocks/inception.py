"""Inception-A (Szegedy et al., CVPR 2016, arXiv:1512.00567, figure 5).

Four branches of one input. Three of them start with a 1 x 1 of that input, which can run as one
wider 1 x 1; the fourth is an average pool before a 1 x 1, and the two may swap.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvBNReLU(nn.Module):
    """Convolution without bias, batch norm with eps 1e-3, relu."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, padding: int = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class InceptionA(nn.Module):
    """cat(1 x 1, 1 x 1 -> 5 x 5, 1 x 1 -> 3 x 3 -> 3 x 3, pool -> 1 x 1).

    Args:
        in_channels: C of the input [B, C, H, W].
        pool_features: outputs of the pool branch.
        single: outputs of the first branch.
        five: the two widths of the 5 x 5 branch.
        three: the two widths of the double 3 x 3 branch.
    """

    def __init__(
        self,
        in_channels: int,
        pool_features: int = 32,
        single: int = 64,
        five: tuple[int, int] = (48, 64),
        three: tuple[int, int] = (64, 96),
    ) -> None:
        super().__init__()
        self.branch1x1 = ConvBNReLU(in_channels, single, 1)
        self.branch5x5_1 = ConvBNReLU(in_channels, five[0], 1)
        self.branch5x5_2 = ConvBNReLU(five[0], five[1], 5, padding=2)
        self.branch3x3_1 = ConvBNReLU(in_channels, three[0], 1)
        self.branch3x3_2 = ConvBNReLU(three[0], three[1], 3, padding=1)
        self.branch3x3_3 = ConvBNReLU(three[1], three[1], 3, padding=1)
        self.branch_pool = ConvBNReLU(in_channels, pool_features, 1)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch1x1(x)
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3_3(self.branch3x3_2(self.branch3x3_1(x)))
        pool = self.branch_pool(F.avg_pool2d(x, kernel_size=3, stride=1, padding=1))
        return torch.cat([single, five, three, pool], 1)
