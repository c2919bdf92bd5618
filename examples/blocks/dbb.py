"""Diverse branch block (Ding et al., CVPR 2021, arXiv:2103.13425), and a ResNet-18 made of it.

Four branches of one input are summed: k x k; 1 x 1; 1 x 1 then k x k; 1 x 1 then average pool. The
zero padding of the last two sits between their layers, where the first layer's value outside of the
image is its shift and not zero. `DBB` pads with that shift, so it is exactly one k x k convolution;
`NaiveDBB` pads with zeros and differs from one by a border term.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BNAndPadLayer(nn.Module):
    """Batch norm, then a border of `pad_pixels` holding what the batch norm makes of zero.

    Args:
        pad_pixels: width of the border on all four sides.
        num_features: C of [B, C, H, W] -> [B, C, H + 2 * pad_pixels, W + 2 * pad_pixels].
        affine: whether the batch norm has a weight and a bias.
    """

    def __init__(self, pad_pixels: int, num_features: int, affine: bool = True) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(num_features, affine=affine)
        self.pad_pixels = pad_pixels

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.bn(x)
        p = self.pad_pixels
        if p > 0:
            mean, var = self.bn.running_mean, self.bn.running_var
            assert mean is not None and var is not None
            std = torch.sqrt(var + self.bn.eps)
            if self.bn.affine:
                pad_values = self.bn.bias.detach() - mean * self.bn.weight.detach() / std
            else:
                pad_values = -mean / std
            output = F.pad(output, [p] * 4)
            pad_values = pad_values.view(1, -1, 1, 1)
            output[:, :, 0:p, :] = pad_values
            output[:, :, -p:, :] = pad_values
            output[:, :, :, 0:p] = pad_values
            output[:, :, :, -p:] = pad_values
        return output


class DBB(nn.Module):
    """The block in its authors' form; exactly one k x k convolution with bias, then `act`.

    Args:
        in_channels: C of the input [B, C, H, W].
        out_channels: N of the output.
        kernel_size: odd k.
        stride: of the whole block.
        padding: of the whole block, at least k // 2; k // 2 if None.
        groups: of every convolution. If depthwise, the pool branch has no 1 x 1.
        internal_channels: width between the 1 x 1 and the k x k; C if None.
        act: the activation after the sum, or None.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int | None = None,
        groups: int = 1,
        internal_channels: int | None = None,
        act: type[nn.Module] | None = nn.ReLU,
    ) -> None:
        super().__init__()
        c, n, k, s, g = in_channels, out_channels, kernel_size, stride, groups
        p = k // 2 if padding is None else padding
        if k % 2 == 0 or p < k // 2:
            raise ValueError(f"needs an odd kernel and padding >= k // 2, not k={k}, padding={p}")
        m = internal_channels or (c if g < n else 2 * c)
        self.dbb_origin = nn.Sequential(nn.Conv2d(c, n, k, s, p, groups=g, bias=False), nn.BatchNorm2d(n))
        self.dbb_1x1 = nn.Sequential(nn.Conv2d(c, n, 1, s, p - k // 2, groups=g, bias=False), nn.BatchNorm2d(n))
        if g < n:
            self.dbb_avg = nn.Sequential(
                nn.Conv2d(c, n, 1, groups=g, bias=False),
                BNAndPadLayer(p, n),
                nn.AvgPool2d(k, s, 0),
                nn.BatchNorm2d(n),
            )
        else:
            self.dbb_avg = nn.Sequential(nn.AvgPool2d(k, s, p), nn.BatchNorm2d(n))
        self.dbb_1x1_kxk = nn.Sequential(
            nn.Conv2d(c, m, 1, groups=g, bias=False),
            BNAndPadLayer(p, m),
            nn.Conv2d(m, n, k, s, 0, groups=g, bias=False),
            nn.BatchNorm2d(n),
        )
        self.act = act() if act is not None else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.dbb_origin(x)
        out += self.dbb_1x1(x)
        out += self.dbb_avg(x)
        out += self.dbb_1x1_kxk(x)
        out = self.act(out)
        return out


class NaiveDBB(nn.Module):
    """The same four branches with plain zero padding in the second layer of the last two.

    The arguments are those of `DBB`, with padding fixed to k // 2.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        groups: int = 1,
        internal_channels: int | None = None,
        act: type[nn.Module] | None = nn.ReLU,
    ) -> None:
        super().__init__()
        c, n, k, s, g = in_channels, out_channels, kernel_size, stride, groups
        m, p = internal_channels or c, k // 2
        self.origin = nn.Sequential(nn.Conv2d(c, n, k, s, p, groups=g, bias=False), nn.BatchNorm2d(n))
        self.pointwise = nn.Sequential(nn.Conv2d(c, n, 1, s, groups=g, bias=False), nn.BatchNorm2d(n))
        self.average = nn.Sequential(
            nn.Conv2d(c, n, 1, groups=g, bias=False),
            nn.BatchNorm2d(n),
            nn.AvgPool2d(k, s, p),
            nn.BatchNorm2d(n),
        )
        self.chain = nn.Sequential(
            nn.Conv2d(c, m, 1, groups=g, bias=False),
            nn.BatchNorm2d(m),
            nn.Conv2d(m, n, k, s, p, groups=g, bias=False),
            nn.BatchNorm2d(n),
        )
        self.act = act() if act is not None else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        total = self.origin(x) + self.pointwise(x) + self.average(x) + self.chain(x)
        out: Tensor = self.act(total)
        return out
