"""Residual blocks, from the plain one to MBConv and its fused form.

ResNet (He et al., arXiv:1512.03385), MobileNetV1 (Howard et al., arXiv:1704.04861), MobileNetV2
(Sandler et al., arXiv:1801.04381), EfficientNetV2 (Tan & Le, arXiv:2104.00298).
"""

from __future__ import annotations

from torch import Tensor, nn


class ConvNormAct(nn.Sequential):
    """A convolution with bias padded by k // 2, a norm, an activation (which may be Identity)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        groups: int = 1,
        norm: type[nn.Module] = nn.BatchNorm2d,
        act: type[nn.Module] = nn.ReLU,
        bias: bool = True,
    ) -> None:
        k = kernel_size
        super().__init__(
            nn.Conv2d(in_channels, out_channels, k, stride, k // 2, groups=groups, bias=bias),
            norm(out_channels),
            act(),
        )


class ResidualAdd(nn.Module):
    """block(x) + shortcut(x), added in place into the block's output.

    Args:
        block: any module; its output must be its own tensor, for it is written to.
        shortcut: makes the shapes agree where they differ; the input itself if None.
    """

    def __init__(self, block: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.block = block
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        res = x
        x = self.block(x)
        if self.shortcut is not None:
            res = self.shortcut(res)
        x += res
        return x


class BottleNeck(nn.Sequential):
    """1 x 1 -> 3 x 3 -> 1 x 1 around a narrow middle, a shortcut where C != N, add, relu.

    Args:
        in_channels: C of the input [B, C, H, W].
        out_channels: N of the output [B, N, H, W].
        reduction: the middle has N // reduction channels.
    """

    def __init__(self, in_channels: int, out_channels: int, reduction: int = 4) -> None:
        middle = max(out_channels // reduction, 1)
        super().__init__(_bottleneck(in_channels, middle, out_channels), nn.ReLU())


class InvertedResidual(nn.Sequential):
    """The bottleneck with a middle `expansion` times as wide as the input."""

    def __init__(self, in_channels: int, out_channels: int, expansion: int = 4) -> None:
        middle = in_channels * expansion
        super().__init__(_bottleneck(in_channels, middle, out_channels), nn.ReLU())


class LinearBottleneck(nn.Sequential):
    """The inverted residual without an activation after the add."""

    def __init__(self, in_channels: int, out_channels: int, expansion: int = 4) -> None:
        super().__init__(_bottleneck(in_channels, in_channels * expansion, out_channels))


class MobileNetLikeBlock(nn.Sequential):
    """A wide 1 x 1 -> 3 x 3 -> 1 x 1, with a residual only if C == N, then relu."""

    def __init__(self, in_channels: int, out_channels: int, expansion: int = 4) -> None:
        body = _body(in_channels, in_channels * expansion, out_channels)
        super().__init__(_maybe_residual(body, in_channels == out_channels), nn.ReLU())


class DepthwiseSeparable(nn.Sequential):
    """Depthwise k x k, then 1 x 1, with nothing between."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        bias: bool = True,
    ) -> None:
        c, k = in_channels, kernel_size
        super().__init__(
            nn.Conv2d(c, c, k, stride, k // 2, groups=c, bias=bias),
            nn.Conv2d(c, out_channels, 1, bias=bias),
        )


class MBConv(nn.Sequential):
    """1 x 1 expand, depthwise 3 x 3, 1 x 1 project; a residual only if C == N.

    Args:
        in_channels: C of the input [B, C, H, W].
        out_channels: N of the output [B, N, H, W].
        expansion: the middle has C * expansion channels.
    """

    def __init__(self, in_channels: int, out_channels: int, expansion: int = 4) -> None:
        wide = in_channels * expansion
        body = nn.Sequential(
            ConvNormAct(in_channels, wide, 1, act=nn.ReLU6, bias=False),
            ConvNormAct(wide, wide, 3, groups=wide, act=nn.ReLU6, bias=False),
            ConvNormAct(wide, out_channels, 1, act=nn.Identity, bias=False),
        )
        super().__init__(_maybe_residual(body, in_channels == out_channels))


class FusedMBConv(nn.Sequential):
    """3 x 3 expand, 1 x 1 project; a residual only if C == N. Arguments as in `MBConv`."""

    def __init__(self, in_channels: int, out_channels: int, expansion: int = 4) -> None:
        wide = in_channels * expansion
        body = nn.Sequential(
            ConvNormAct(in_channels, wide, 3, act=nn.ReLU6, bias=False),
            ConvNormAct(wide, out_channels, 1, act=nn.Identity, bias=False),
        )
        super().__init__(_maybe_residual(body, in_channels == out_channels))


def _body(in_channels: int, middle: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        ConvNormAct(in_channels, middle, 1),
        ConvNormAct(middle, middle, 3),
        ConvNormAct(middle, out_channels, 1, act=nn.Identity),
    )


def _bottleneck(in_channels: int, middle: int, out_channels: int) -> ResidualAdd:
    shortcut = ConvNormAct(in_channels, out_channels, 1) if in_channels != out_channels else None
    return ResidualAdd(_body(in_channels, middle, out_channels), shortcut)


def _maybe_residual(body: nn.Module, residual: bool) -> nn.Module:
    return ResidualAdd(body) if residual else body
