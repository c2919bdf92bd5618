"""conv -> batch_norm  =>  conv      W' = W * s,  b' = (b - mean) * s + beta,  s = gamma / sqrt(var + eps)

Exact: in eval mode batch norm is one factor and one shift a channel, and convolution is linear
(Ioffe and Szegedy 2015, algorithm 2; ACNet, Ding et al. 2019, eq. 5). The same holds for any constant
factor or shift, a number or a value a channel, after a convolution or linear layer, and for several in
a row. Before a convolution the factor scales the columns, W'[n, c] = W[n, c] * s[c], and the shift joins
the bias; that is exact only where the convolution does not pad, since padded zeros are never shifted.
"""

from __future__ import annotations

from torch import nn

from fxfuse.algebra.operator import Operator
from fxfuse.pattern import Example, Pattern, register


@register
class ConvBN(Pattern):
    name = "conv_bn"
    law = "conv -> batch_norm => conv;  batch_norm -> conv => conv;  conv * c + d => conv"
    relations = ("chain",)
    refused_when = (
        "the batch norm uses batch statistics, another reader needs the value between, it stands before a "
        "zero-padded convolution (see border), or a constant varies along a spatial axis"
    )

    def matches(self, relation: str, f: Operator, g: Operator) -> bool:
        kinds = {f.kind, g.kind}
        return "scale" in kinds and kinds <= {"scale", "conv"} and g.law != "repeated"

    examples = (
        Example(
            "batch norm after a convolution",
            lambda: nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5)),
            (2, 3, 7, 6),
        ),
        Example(
            "batch norm before a convolution without padding",
            lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 5, 3)),
            (2, 3, 7, 6),
        ),
        Example(
            "two batch norms after a transposed convolution",
            lambda: nn.Sequential(nn.ConvTranspose2d(3, 3, 2, stride=2), nn.BatchNorm2d(3), nn.BatchNorm2d(3)),
            (2, 3, 5, 4),
        ),
        Example(
            "batch norm before a zero-padded convolution",
            lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 5, 3, padding=1)),
            (2, 3, 7, 6),
            reason="pads with a value that is not the bias of the first",
            patterns=("conv_bn",),
        ),
        Example(
            "batch statistics",
            lambda: nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, track_running_stats=False)),
            (2, 3, 7, 6),
            reason="statistics of the batch",
        ),
    )
