"""Dynamic convolution: attention over K kernels (Chen et al., CVPR 2020, arXiv:1912.03458).

Each sample mixes a bank of K kernels with its own attention, and all samples run as one convolution
with B times the groups. The output is linear in the bank, so an affine map after it is one of the
bank and the bias.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SimpleAttention(nn.Module):
    """[B, C, H, W] -> softmax weights [B, K]: pool, 1 x 1 C -> K, relu, 1 x 1 K -> K."""

    def __init__(self, in_channels: int, kernels: int = 4) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.net = nn.Sequential(nn.Conv2d(in_channels, kernels, 1), nn.ReLU(), nn.Conv2d(kernels, kernels, 1))

    def forward(self, x: Tensor) -> Tensor:
        att = self.net(self.pool(x)).view(x.shape[0], -1)
        return F.softmax(att, dim=-1)


class Attention(nn.Module):
    """[B, C, H, W] -> softmax weights [B, K], with a reduced middle and a temperature.

    A high temperature keeps the weights near 1 / K early in training, so that all kernels learn.
    """

    def __init__(self, in_channels: int, kernels: int = 4, ratio: int = 4, temperature: float = 30.0) -> None:
        super().__init__()
        hidden = max(in_channels // ratio, 1)
        self.temperature = temperature
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.net = nn.Sequential(
            nn.Conv2d(in_channels, hidden, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(hidden, kernels, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        att = self.net(self.pool(x)).view(x.shape[0], -1)
        return F.softmax(att / self.temperature, dim=-1)


class DynamicConv2d(nn.Module):
    """A convolution whose kernel is mixed for each sample.

    Args:
        in_channels: C of the input [B, C, H, W].
        out_channels: N of the output.
        attention: a module [B, C, H, W] -> [B, K]; a `SimpleAttention` if None.
        kernel_size: odd k, padded by k // 2.
        stride, groups: as in a convolution.
        bias: whether there is a bias bank [K, N].
        kernels: K.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        attention: nn.Module | None = None,
        kernel_size: int = 3,
        stride: int = 1,
        groups: int = 1,
        bias: bool = True,
        kernels: int = 4,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride, self.groups = kernel_size, stride, groups
        self.padding, self.kernels = kernel_size // 2, kernels
        self.attention = SimpleAttention(in_channels, kernels) if attention is None else attention
        shape = (kernels, out_channels, in_channels // groups, kernel_size, kernel_size)
        self.weight = nn.Parameter(torch.empty(shape))
        for kernel in self.weight:
            nn.init.kaiming_uniform_(kernel)
        self.bias = nn.Parameter(torch.randn(kernels, out_channels) * 0.1) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        n, k, g = self.out_channels, self.kernel_size, self.groups
        att = self.attention(x)
        weight = torch.mm(att, self.weight.view(self.kernels, -1))
        weight = weight.view(b * n, self.in_channels // g, k, k)
        bias = None
        if self.bias is not None:
            bias = torch.mm(att, self.bias).view(-1)
        out = F.conv2d(x.view(1, b * c, h, w), weight, bias, self.stride, self.padding, groups=g * b)
        return out.view(b, n, out.shape[-2], out.shape[-1])


class DynamicConvBNReLU(nn.Module):
    """The paper's layer: dynamic convolution, batch norm, relu.

    Args:
        in_channels, out_channels: as in `DynamicConv2d`.
        kernel_size, stride, groups, bias, kernels: likewise.
        temperature: of the full attention; the simple one if None.
        ratio: reduction of the full attention.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        groups: int = 1,
        bias: bool = False,
        kernels: int = 4,
        temperature: float | None = 30.0,
        ratio: int = 4,
    ) -> None:
        super().__init__()
        attention: nn.Module
        if temperature is None:
            attention = SimpleAttention(in_channels, kernels)
        else:
            attention = Attention(in_channels, kernels, ratio, temperature)
        self.conv = DynamicConv2d(in_channels, out_channels, attention, kernel_size, stride, groups, bias, kernels)
        self.bn = nn.BatchNorm2d(out_channels)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.bn(self.conv(x)))
        return out
