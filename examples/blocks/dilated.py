"""Dilated convolutions, alone and in parallel (Yu & Koltun, ICLR 2016, arXiv:1511.07122).

Parallel branches with several dilations read one grid of positions, so their sum is one convolution
whose taps are the union of theirs.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class DilatedConv(nn.Module):
    """k x k with dilation d padded by d * (k // 2), batch norm, relu.

    Args:
        in_channels: C of the input [B, C, H, W].
        out_channels: N of the output.
        kernel_size: odd k.
        dilation: d.
        stride: of the convolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        dilation: int = 2,
        stride: int = 1,
    ) -> None:
        super().__init__()
        k, d = kernel_size, dilation
        self.conv = nn.Conv2d(in_channels, out_channels, k, stride, d * (k // 2), dilation=d, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.bn(self.conv(x)))
        return out


class ParallelDilated(nn.Module):
    """The sum of one k x k convolution for each dilation.

    Args:
        in_channels, out_channels, kernel_size, stride: as in `DilatedConv`.
        dilations: one branch for each.
        with_bn: whether each branch has a batch norm instead of a bias.
        groups: of every branch.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        dilations: Sequence[int] = (1, 2),
        kernel_size: int = 3,
        stride: int = 1,
        with_bn: bool = True,
        groups: int = 1,
    ) -> None:
        super().__init__()
        c, n, k = in_channels, out_channels, kernel_size
        self.branches = nn.ModuleList()
        for d in dilations:
            conv = nn.Conv2d(c, n, k, stride, d * (k // 2), dilation=d, groups=groups, bias=not with_bn)
            self.branches.append(nn.Sequential(conv, nn.BatchNorm2d(n)) if with_bn else conv)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.branches[0](x)
        for branch in self.branches[1:]:
            out = out + branch(x)
        return out
