"""Blueprint separable convolutions (Haase & Amthor, CVPR 2020, arXiv:2003.13549).

A full convolution whose kernels are scaled copies of one blueprint each: pointwise first, depthwise
after. The subspace form splits the pointwise in two with a narrow middle.
"""

from __future__ import annotations

import math

from torch import nn


class BSConvU(nn.Sequential):
    """Unconstrained: 1 x 1 C -> N, [batch norm], depthwise k x k on N.

    Args:
        in_channels: C of the input [B, C, H, W].
        out_channels: N of the output.
        kernel_size: odd k of the depthwise convolution, padded by k // 2.
        stride: of the depthwise convolution.
        dilation: of the depthwise convolution; its padding grows with it.
        bias: of the depthwise convolution.
        with_bn: whether a batch norm follows the pointwise one.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        dilation: int = 1,
        bias: bool = True,
        with_bn: bool = False,
    ) -> None:
        super().__init__()
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        if with_bn:
            self.bn = nn.BatchNorm2d(out_channels)
        self.depthwise = _depthwise(out_channels, kernel_size, stride, dilation, bias)


class BSConvS(nn.Sequential):
    """Subspace: 1 x 1 C -> M', [bn], 1 x 1 M' -> N, [bn], depthwise k x k on N.

    Args:
        in_channels, out_channels, kernel_size, stride, dilation, bias, with_bn: as in `BSConvU`.
        p: M' = min(C, max(min_mid_channels, ceil(p * C))).
        min_mid_channels: see p.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        dilation: int = 1,
        bias: bool = True,
        with_bn: bool = False,
        p: float = 0.25,
        min_mid_channels: int = 4,
    ) -> None:
        super().__init__()
        mid = min(in_channels, max(min_mid_channels, math.ceil(p * in_channels)))
        self.pointwise1 = nn.Conv2d(in_channels, mid, 1, bias=False)
        if with_bn:
            self.bn1 = nn.BatchNorm2d(mid)
        self.pointwise2 = nn.Conv2d(mid, out_channels, 1, bias=False)
        if with_bn:
            self.bn2 = nn.BatchNorm2d(out_channels)
        self.depthwise = _depthwise(out_channels, kernel_size, stride, dilation, bias)


def _depthwise(channels: int, k: int, stride: int, dilation: int, bias: bool) -> nn.Conv2d:
    padding = dilation * (k // 2)
    return nn.Conv2d(channels, channels, k, stride, padding, dilation, groups=channels, bias=bias)
