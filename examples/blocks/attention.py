"""Squeeze and excitation (Hu et al., CVPR 2018, arXiv:1709.01507), CBAM (Woo et al., ECCV 2018,
arXiv:1807.06521).

The factors depend on the input, so no weight can take them; what surrounds them still folds.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SEBlock(nn.Module):
    """x * sigmoid(fc(relu(fc(mean of x over H and W)))).

    Args:
        channels: C of input and output [B, C, H, W].
        reduction: the middle has C // reduction features.
    """

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        hidden = max(channels // reduction, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Linear(channels, hidden)
        self.relu = nn.ReLU()
        self.fc2 = nn.Linear(hidden, channels)
        self.gate = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        factor = self.pool(x).flatten(1)
        factor = self.gate(self.fc2(self.relu(self.fc1(factor))))
        out: Tensor = x * factor[:, :, None, None]
        return out


class SEConv(nn.Module):
    """Convolution, batch norm, squeeze and excitation, 1 x 1 convolution, batch norm.

    Args:
        in_channels: C of the input [B, C, H, W].
        out_channels: N of the output [B, N, H, W].
        reduction: of the squeeze and excitation.
    """

    def __init__(self, in_channels: int, out_channels: int, reduction: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.se = SEBlock(out_channels, reduction)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.se(self.bn1(self.conv1(x)))
        out: Tensor = self.bn2(self.conv2(x))
        return out


class ChannelAttention(nn.Module):
    """[B, C, H, W] -> factors [B, C, 1, 1]; one MLP, called on the mean and on the maximum."""

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        hidden = max(channels // reduction, 1)
        self.average = nn.AdaptiveAvgPool2d(1)
        self.maximum = nn.AdaptiveMaxPool2d(1)
        self.mlp = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(hidden, channels, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.mlp(self.average(x)) + self.mlp(self.maximum(x)))


class SpatialAttention(nn.Module):
    """[B, C, H, W] -> factors [B, 1, H, W] from the mean and the maximum over the channels."""

    def __init__(self, kernel_size: int = 7) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm2d(1)

    def forward(self, x: Tensor) -> Tensor:
        mean = torch.mean(x, dim=1, keepdim=True)
        maximum = torch.max(x, dim=1, keepdim=True)[0]
        return torch.sigmoid(self.bn(self.conv(torch.cat([mean, maximum], dim=1))))


class CBAM(nn.Module):
    """Channel attention, then spatial attention.

    Args:
        channels: C of input and output [B, C, H, W].
        reduction: of the channel attention's MLP.
        kernel_size: of the spatial attention's convolution.
    """

    def __init__(self, channels: int, reduction: int = 4, kernel_size: int = 7) -> None:
        super().__init__()
        self.channel = ChannelAttention(channels, reduction)
        self.spatial = SpatialAttention(kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.channel(x)
        out: Tensor = x * self.spatial(x)
        return out
