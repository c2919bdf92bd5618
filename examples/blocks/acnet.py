"""Asymmetric convolution block of ACNet (Ding et al., ICCV 2019, arXiv:1908.03930).

A k x k, a 1 x k and a k x 1 convolution of one input, each with its own batch norm, are summed. The
two thin kernels lie on the middle row and the middle column of the square one, so the sum is one
k x k convolution.
"""

from __future__ import annotations

from torch import Tensor, nn


def _conv_bn(
    in_channels: int,
    out_channels: int,
    kernel_size: tuple[int, int],
    stride: int,
    groups: int,
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=(kernel_size[0] // 2, kernel_size[1] // 2),
            groups=groups,
            bias=False,
        ),
        nn.BatchNorm2d(out_channels),
    )


class ACBlock(nn.Module):
    """act(square(x) + horizontal(x) + vertical(x)), for an odd kernel size.

    Args:
        in_channels: C of the input [B, C, H, W].
        out_channels: N of the output [B, N, ceil(H / stride), ceil(W / stride)].
        kernel_size: odd k of the square branch.
        stride: of all three branches.
        groups: of all three branches.
        act: the activation after the sum, or None.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        groups: int = 1,
        act: type[nn.Module] | None = nn.ReLU,
    ) -> None:
        super().__init__()
        k = kernel_size
        if k % 2 == 0:
            raise ValueError(f"kernel_size must be odd, not {k}")
        self.square = _conv_bn(in_channels, out_channels, (k, k), stride, groups)
        self.horizontal = _conv_bn(in_channels, out_channels, (1, k), stride, groups)
        self.vertical = _conv_bn(in_channels, out_channels, (k, 1), stride, groups)
        self.act = act() if act is not None else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.square(x) + self.horizontal(x) + self.vertical(x))
        return out
