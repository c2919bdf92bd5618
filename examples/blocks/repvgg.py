"""RepVGG block and network (Ding et al., CVPR 2021, arXiv:2101.03697).

A training-time block sums a 3 x 3 convolution, a 1 x 1 convolution and, where the shapes agree, the
input itself, each with its own batch norm. The 1 x 1 kernel and the identity are the centre tap of
a 3 x 3 kernel, so the block is one 3 x 3 convolution with bias.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class RepVGGBlock(nn.Module):
    """relu(bn(conv3x3(x)) + bn(conv1x1(x)) + bn(x)); the last term only if C == N and stride is 1.

    Args:
        in_channels: C of the input [B, C, H, W].
        out_channels: N of the output [B, N, ceil(H / stride), ceil(W / stride)].
        stride: of both convolutions.
        groups: of both convolutions.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.dense = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, stride, 1, groups=groups, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.pointwise = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 1, stride, 0, groups=groups, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        same_shape = in_channels == out_channels and stride == 1
        self.identity = nn.BatchNorm2d(in_channels) if same_shape else None
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.dense(x) + self.pointwise(x)
        if self.identity is not None:
            out = out + self.identity(x)
        out = self.act(out)
        return out


class RepVGG(nn.Module):
    """A stem block, four stages of blocks, global average pool, linear classifier.

    The stem and the first block of each stage have stride 2. Blocks are numbered through all stages
    from 1; the even ones use `groups`.

    Args:
        depths: number of blocks in each of the four stages.
        widths: output channels of each stage.
        stem: output channels of the stem; the paper takes at most 64.
        num_classes: width of the output [B, num_classes].
        groups: of every second block (the "g2" and "g4" models).
        in_channels: of the image [B, in_channels, H, W].
    """

    def __init__(
        self,
        depths: Sequence[int],
        widths: Sequence[int],
        stem: int = 64,
        num_classes: int = 1000,
        groups: int = 1,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        self.stem = RepVGGBlock(in_channels, stem, stride=2)
        stages: list[nn.Module] = []
        channels, number = stem, 0
        for depth, width in zip(depths, widths, strict=True):
            blocks: list[nn.Module] = []
            for position in range(depth):
                number += 1
                stride = 2 if position == 0 else 1
                block_groups = groups if number % 2 == 0 else 1
                blocks.append(RepVGGBlock(channels, width, stride, block_groups))
                channels = width
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.stages(self.stem(x))).flatten(1)
        out: Tensor = self.classifier(x)
        return out


def repvgg_a0(num_classes: int = 1000) -> RepVGG:
    """RepVGG-A0: 22 blocks, 9.11M parameters to train and 8.31M once re-parameterized."""
    return RepVGG((2, 4, 14, 1), (48, 96, 192, 1280), stem=48, num_classes=num_classes)


def repvgg_b1g2(num_classes: int = 1000) -> RepVGG:
    """RepVGG-B1g2: 28 blocks, every second one with two groups."""
    return RepVGG((4, 6, 16, 1), (128, 256, 512, 2048), num_classes=num_classes, groups=2)
