"""Deformable convolution, v1 (Dai et al., ICCV 2017, arXiv:1703.06211) and v2 (Zhu et al., CVPR
2019, arXiv:1811.11168, with a mask).

Where a tap reads depends on the input, but the output is linear in the weight, so a batch norm
after it scales the weight's output axis and joins the bias. This file needs torchvision, and is
imported only when one of its blocks is built.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.ops import DeformConv2d, deform_conv2d

# The function branches on shapes; wrapped, a symbolic trace holds one call of it.
torch.fx.wrap("deform_conv2d")


class DeformableConv(nn.Module):
    """deform_conv2d with offsets from a convolution, batch norm, relu.

    Args:
        in_channels: C of the input [B, C, H, W].
        out_channels: N of the output.
        kernel_size: odd k, padded by k // 2.
        stride: of the offsets' convolution and of the deformable one.
        modulated: v2; a second convolution gives a mask in (0, 1) for each tap.
        groups: of the deformable weight.
        offset_groups: channel groups with offsets of their own.
        bias: of the deformable convolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        modulated: bool = False,
        groups: int = 1,
        offset_groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        k, taps = kernel_size, kernel_size * kernel_size * offset_groups
        self.stride, self.padding = (stride, stride), (k // 2, k // 2)
        self.offset = nn.Conv2d(in_channels, 2 * taps, k, stride, k // 2)
        self.mask = nn.Conv2d(in_channels, taps, k, stride, k // 2) if modulated else None
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, k, k))
        nn.init.kaiming_uniform_(self.weight)
        self.bias = nn.Parameter(torch.randn(out_channels) * 0.1) if bias else None
        self.bn = nn.BatchNorm2d(out_channels)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        mask = None if self.mask is None else torch.sigmoid(self.mask(x))
        out = deform_conv2d(
            x,
            self.offset(x),
            self.weight,
            self.bias,
            stride=self.stride,
            padding=self.padding,
            mask=mask,
        )
        result: Tensor = self.act(self.bn(out))
        return result


class DeformableLayer(nn.Module):
    """The same around torchvision's own `DeformConv2d` module.

    Args:
        in_channels, out_channels, kernel_size, stride: as in `DeformableConv`.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1) -> None:
        super().__init__()
        k = kernel_size
        self.offset = nn.Conv2d(in_channels, 2 * k * k, k, stride, k // 2)
        self.conv = DeformConv2d(in_channels, out_channels, k, stride, k // 2, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.bn(self.conv(x, self.offset(x))))
        return out
