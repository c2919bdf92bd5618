"""Spatially separable, depthwise separable and flattened convolutions.

Inception-v3 (Szegedy et al., arXiv:1512.00567, section 3.2), Xception (Chollet, arXiv:1610.02357),
Flattened networks (Jin et al., arXiv:1412.5474).
"""

from __future__ import annotations

from torch import Tensor, nn


class SpatiallySeparable(nn.Module):
    """k x 1, then 1 x k.

    Args:
        in_channels: C of the input [B, C, H, W].
        out_channels: N of the output.
        mid_channels: between the two; N if None.
        kernel_size: odd k; each convolution pads k // 2 along its own axis.
        stride: each convolution strides along its own axis.
        bias: of both convolutions.
        with_bn: whether a batch norm follows each convolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        mid_channels: int | None = None,
        kernel_size: int = 3,
        stride: int = 1,
        bias: bool = False,
        with_bn: bool = False,
    ) -> None:
        super().__init__()
        k, s, m = kernel_size, stride, mid_channels or out_channels
        self.vertical = nn.Conv2d(in_channels, m, (k, 1), (s, 1), (k // 2, 0), bias=bias)
        self.bn1 = nn.BatchNorm2d(m) if with_bn else nn.Identity()
        self.horizontal = nn.Conv2d(m, out_channels, (1, k), (1, s), (0, k // 2), bias=bias)
        self.bn2 = nn.BatchNorm2d(out_channels) if with_bn else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.vertical(x))
        out: Tensor = self.bn2(self.horizontal(x))
        return out


class DepthwiseSeparableConv(nn.Module):
    """Depthwise k x k, then 1 x 1, with or without batch norm and relu after each.

    Args:
        in_channels: C of the input [B, C, H, W].
        out_channels: N of the output.
        kernel_size: odd k, padded by k // 2.
        stride: of the depthwise convolution.
        norm_act: whether each convolution has a batch norm and a relu.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        norm_act: bool = False,
    ) -> None:
        super().__init__()
        c, n, k = in_channels, out_channels, kernel_size
        self.depthwise = nn.Conv2d(c, c, k, stride, k // 2, groups=c, bias=False)
        self.between = _norm_act(c) if norm_act else nn.Identity()
        self.pointwise = nn.Conv2d(c, n, 1, bias=False)
        self.after = _norm_act(n) if norm_act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(self.depthwise(x))
        out: Tensor = self.after(self.pointwise(x))
        return out


class FlattenedConv(nn.Module):
    """C x 1 x 1 (lateral), then a vertical, then a horizontal one-dimensional convolution.

    Args:
        in_channels: C of the input [B, C, H, W].
        out_channels: N of the output; the two spatial convolutions are depthwise on N.
        kernel_size: odd k, padded by k // 2 along each axis.
        bias: of all three convolutions.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, bias: bool = False) -> None:
        super().__init__()
        n, k = out_channels, kernel_size
        self.lateral = nn.Conv2d(in_channels, n, 1, bias=bias)
        self.vertical = nn.Conv2d(n, n, (k, 1), padding=(k // 2, 0), groups=n, bias=bias)
        self.horizontal = nn.Conv2d(n, n, (1, k), padding=(0, k // 2), groups=n, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.horizontal(self.vertical(self.lateral(x)))
        return out


def _norm_act(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())
