"""conv -> batch_norm  =>  conv      W' = W * s,  b' = (b - mean) * s + beta,  s = gamma / sqrt(var + eps)

Exact: in eval mode batch norm is one factor and one shift a channel, and convolution is linear
(Ioffe and Szegedy 2015, algorithm 2; ACNet, Ding et al. 2019, eq. 5). The same holds for any constant
factor or shift, a number or a value a channel, after a convolution or linear layer, and for several in
a row. Before a convolution the factor scales the columns, W'[n, c] = W[n, c] * s[c], and the shift joins
the bias; that is exact only where the convolution does not pad, since padded zeros are never shifted.
"""

from __future__ import annotations

from torch.nn import BatchNorm2d, Conv2d, ConvTranspose2d, Sequential

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
        Example("batch norm after a convolution", lambda: Sequential(Conv2d(3, 5, 3, padding=1), BatchNorm2d(5))),
        Example("batch norm before a convolution without padding", lambda: Sequential(BatchNorm2d(3), Conv2d(3, 5, 3))),
        Example(
            "two batch norms after a transposed convolution",
            lambda: Sequential(ConvTranspose2d(3, 3, 2, stride=2), BatchNorm2d(3), BatchNorm2d(3)),
        ),
        Example(
            "batch norm before a zero-padded convolution",
            lambda: Sequential(BatchNorm2d(3), Conv2d(3, 5, 3, padding=1)),
            reason="pads with a value that is not the bias of the first",
            patterns=("conv_bn",),
        ),
        Example(
            "batch statistics",
            lambda: Sequential(Conv2d(3, 5, 3), BatchNorm2d(5, track_running_stats=False)),
            reason="statistics of the batch",
        ),
    )
