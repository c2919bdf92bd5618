"""ResNet-18 (He et al., CVPR 2016, arXiv:1512.03385) with a diverse branch block for every 3 x 3.

The 7 x 7 stem and the three 1 x 1 projections stay plain convolutions with batch norm.
"""

from __future__ import annotations

from torch import Tensor, nn

from .dbb import DBB


class DBBBasicBlock(nn.Module):
    """relu(dbb(relu(dbb(x))) + shortcut(x)), with the relu of each sum outside of its DBB.

    Args:
        in_channels: C of the input [B, C, H, W].
        out_channels: N of the output [B, N, ceil(H / stride), ceil(W / stride)].
        stride: of the first DBB and of the shortcut.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.dbb1 = DBB(in_channels, out_channels, 3, stride, act=nn.ReLU)
        self.dbb2 = DBB(out_channels, out_channels, 3, act=None)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out: Tensor = self.dbb2(self.dbb1(x))
        out += identity
        out = self.relu(out)
        return out


class DBBResNet18(nn.Module):
    """Four stages of two basic blocks: 84 convolutions and 100 batch norms before, 20 and 0 after.

    Args:
        num_classes: width of the output [B, num_classes].
        width: channels of the stem; the stages have 1, 2, 4 and 8 times as many.
    """

    def __init__(self, num_classes: int = 1000, width: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = self._stage(width, width, 1)
        self.layer2 = self._stage(width, 2 * width, 2)
        self.layer3 = self._stage(2 * width, 4 * width, 2)
        self.layer4 = self._stage(4 * width, 8 * width, 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8 * width, num_classes)

    @staticmethod
    def _stage(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            DBBBasicBlock(in_channels, out_channels, stride),
            DBBBasicBlock(out_channels, out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        out: Tensor = self.fc(self.avgpool(x).flatten(1))
        return out


def dbb_resnet18(num_classes: int = 1000, width: int = 64) -> DBBResNet18:
    """ResNet-18 in its diverse-branch training form, on images [B, 3, H, W]."""
    return DBBResNet18(num_classes, width)
