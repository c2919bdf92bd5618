"""conv1 -> conv2  =>  conv      W'[n,c,i*d1+j*d2*s1] = sum over m of W2[n,m,j] * W1[m,c,i],  b' = b2 + sum of W2 * b1

Exact where the second layer does not pad, or where the first is pointwise in the padded dims and takes on
zeros the value that the second pads with (no bias, or a padding with the bias: Diverse Branch Block, Ding et
al. 2021, transform III). A constant padding, a run of channels and a permutation are such layers too.
"""

from __future__ import annotations

from torch.nn import BatchNorm2d, Conv2d, Linear, Sequential, ZeroPad2d

from fxfuse.algebra.operator import Operator
from fxfuse.pattern import Example, Pattern, register


@register
class ConvChain(Pattern):
    name = "conv_chain"
    law = "conv1 -> conv2 => conv;  pad -> conv => conv"
    relations = ("chain",)
    refused_when = (
        "the second convolution pads what a biased (see border) or wide first one made, where the border would "
        "differ, or the product costs more than its factors (most chains do)"
    )

    def matches(self, relation: str, f: Operator, g: Operator) -> bool:
        kinds = {f.kind, g.kind}
        return not kinds & {"identity", "pool"} and kinds not in ({"scale"}, {"scale", "conv"})

    examples = (
        Example(
            "1x1 without bias before a padded 3x3 that halves the channels",
            lambda: Sequential(Conv2d(2, 8, 1, bias=False), Conv2d(8, 2, 3, padding=1)),
            (2, 2, 7, 6),
        ),
        Example("two linear layers through a wide middle", lambda: Sequential(Linear(4, 16), Linear(16, 4)), (3, 4)),
        Example("zero padding before a convolution", lambda: Sequential(BatchNorm2d(3), ZeroPad2d(2), Conv2d(3, 4, 5))),
        Example(
            "a 1x1 with bias before a padded 3x3",
            lambda: Sequential(Conv2d(2, 8, 1), Conv2d(8, 2, 3, padding=1)),
            (2, 2, 7, 6),
            reason="not the bias of the first",
            patterns=("conv_chain",),
        ),
        Example(
            "a pair that is cheaper apart",
            lambda: Sequential(Conv2d(8, 8, 3, groups=8, bias=False), Conv2d(8, 8, 1)),
            (2, 8, 7, 6),
            reason="would cost more",
        ),
    )
