"""Shuffled grouped convolution (ShuffleNet, Zhang et al., CVPR 2018, arXiv:1707.01083).

The channel shuffle is a constant permutation, so a neighbouring weight can take it where that
weight's groups allow; a depthwise weight always can, by passing it on to the next layer.
"""

from __future__ import annotations

from torch import Tensor, nn


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """[B, C, H, W] -> the same, with channel g * (C / groups) + i moved to i * groups + g."""
    b, c, h, w = x.shape
    x = x.view(b, groups, c // groups, h, w)
    x = x.transpose(1, 2)
    return x.reshape(b, c, h, w)


class ShuffleUnit(nn.Module):
    """1 x 1 grouped, bn, relu, shuffle, depthwise 3 x 3, bn, 1 x 1 grouped, bn, + x, relu.

    Args:
        channels: C of input and output [B, C, H, W]; a multiple of groups.
        groups: of the two pointwise convolutions.
        mid_channels: of the middle, a multiple of groups; C // 2 if None.
    """

    def __init__(self, channels: int, groups: int, mid_channels: int | None = None) -> None:
        super().__init__()
        m = mid_channels or channels // 2
        self.groups = groups
        self.reduce = nn.Conv2d(channels, m, 1, groups=groups, bias=False)
        self.bn1 = nn.BatchNorm2d(m)
        self.relu = nn.ReLU()
        self.depthwise = nn.Conv2d(m, m, 3, padding=1, groups=m, bias=False)
        self.bn2 = nn.BatchNorm2d(m)
        self.expand = nn.Conv2d(m, channels, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.reduce(x)))
        out = channel_shuffle(out, self.groups)
        out = self.bn2(self.depthwise(out))
        out = self.bn3(self.expand(out))
        out = out + x
        result: Tensor = self.relu(out)
        return result


class ShuffledGroupedConv(nn.Module):
    """1 x 1 grouped, shuffle, 1 x 1: a dense second weight can take the permutation whole.

    Args:
        in_channels: C of the input [B, C, H, W]; a multiple of groups.
        mid_channels: shuffled channels; a multiple of groups.
        out_channels: N of the output.
        groups: of the first convolution.
        out_groups: of the second one; 1 lets it absorb any permutation.
    """

    def __init__(
        self,
        in_channels: int,
        mid_channels: int,
        out_channels: int,
        groups: int,
        out_groups: int = 1,
    ) -> None:
        super().__init__()
        self.groups = groups
        self.first = nn.Conv2d(in_channels, mid_channels, 1, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(mid_channels)
        self.relu = nn.ReLU()
        self.second = nn.Conv2d(mid_channels, out_channels, 1, groups=out_groups)

    def forward(self, x: Tensor) -> Tensor:
        x = channel_shuffle(self.relu(self.bn(self.first(x))), self.groups)
        out: Tensor = self.second(x)
        return out
