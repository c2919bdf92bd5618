"""The six transforms that make a diverse branch block one convolution, each as a module.

Diverse branch block (Ding et al., CVPR 2021, arXiv:2103.13425), section 3.2 and figure 2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TransformI(nn.Module):
    """A convolution followed by its batch norm."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        groups: int = 1,
        bias: bool = False,
    ) -> None:
        super().__init__()
        k = kernel_size
        self.conv = nn.Conv2d(in_channels, out_channels, k, stride, k // 2, groups=groups, bias=bias)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn(self.conv(x))
        return out


class TransformII(nn.Module):
    """The sum of two convolutions of one input and one geometry."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        groups: int = 1,
    ) -> None:
        super().__init__()
        k = kernel_size
        self.a = nn.Conv2d(in_channels, out_channels, k, stride, k // 2, groups=groups)
        self.b = nn.Conv2d(in_channels, out_channels, k, stride, k // 2, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.a(x) + self.b(x)
        return out


class TransformIII(nn.Module):
    """A 1 x 1 convolution, then a k x k one.

    Exact without further terms if `padding` is 0 or `bias` is False; with both, the border of the
    second layer sees zeros where the first would give its bias.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        mid_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.pointwise = nn.Conv2d(in_channels, mid_channels, 1, groups=groups, bias=bias)
        self.conv = nn.Conv2d(mid_channels, out_channels, kernel_size, stride, padding, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(self.pointwise(x))
        return out


class TransformIV(nn.Module):
    """Two convolutions of one input, concatenated on the channels."""

    def __init__(self, in_channels: int, first_channels: int, second_channels: int, kernel_size: int = 3) -> None:
        super().__init__()
        k = kernel_size
        self.a = nn.Conv2d(in_channels, first_channels, k, padding=k // 2)
        self.b = nn.Conv2d(in_channels, second_channels, k, padding=k // 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x), self.b(x)], dim=1)


class TransformV(nn.Module):
    """An average pool, which is a depthwise convolution whose taps are all 1 / k^2.

    With `out_channels`, an unpadded pool follows a 1 x 1 convolution that can absorb it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        kernel_size: int = 3,
        stride: int = 1,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 1) if out_channels else None
        self.pool = nn.AvgPool2d(kernel_size, stride)

    def forward(self, x: Tensor) -> Tensor:
        if self.conv is not None:
            x = self.conv(x)
        out: Tensor = self.pool(x)
        return out


class TransformVI(nn.Module):
    """1 x 1 + 1 x 3 + 3 x 1 of one input, and + 3 x 3 unless `square` is False."""

    def __init__(self, in_channels: int, out_channels: int, square: bool = True, stride: int = 1) -> None:
        super().__init__()
        kernels = [(1, 1), (1, 3), (3, 1)] + ([(3, 3)] if square else [])
        self.branches = nn.ModuleList(
            nn.Conv2d(in_channels, out_channels, (kh, kw), stride, (kh // 2, kw // 2)) for kh, kw in kernels
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.branches[0](x)
        for branch in self.branches[1:]:
            out = out + branch(x)
        return out
