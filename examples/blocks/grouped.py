"""Grouped convolution (ResNeXt, Xie et al., CVPR 2017, arXiv:1611.05431, figure 3).

A grouped convolution, and the same thing written as split, transform, concatenate.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class GroupedConv(nn.Module):
    """One grouped convolution, batch norm, relu.

    Args:
        in_channels: C of the input [B, C, H, W]; a multiple of groups.
        out_channels: N of the output; a multiple of groups.
        groups: number of groups.
        kernel_size: odd k, padded by k // 2.
        stride: of the convolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        groups: int,
        kernel_size: int = 3,
        stride: int = 1,
    ) -> None:
        super().__init__()
        k = kernel_size
        self.conv = nn.Conv2d(in_channels, out_channels, k, stride, k // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.bn(self.conv(x)))
        return out


class SplitTransformConcat(nn.Module):
    """chunk -> a convolution for each chunk -> cat.

    Args:
        in_channels, out_channels, groups, kernel_size, stride: as in `GroupedConv`.
        norm_act: whether each convolution has its own batch norm and relu.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        groups: int,
        kernel_size: int = 3,
        stride: int = 1,
        norm_act: bool = False,
    ) -> None:
        super().__init__()
        c, n, k = in_channels // groups, out_channels // groups, kernel_size
        self.groups = groups
        self.branches = nn.ModuleList()
        for _ in range(groups):
            layers: list[nn.Module] = [nn.Conv2d(c, n, k, stride, k // 2, bias=not norm_act)]
            if norm_act:
                layers += [nn.BatchNorm2d(n), nn.ReLU()]
            self.branches.append(nn.Sequential(*layers))

    def forward(self, x: Tensor) -> Tensor:
        parts = x.chunk(self.groups, dim=1)
        return torch.cat([branch(parts[i]) for i, branch in enumerate(self.branches)], dim=1)
