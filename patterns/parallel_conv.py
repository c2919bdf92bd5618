"""conv1(x) + conv2(x)  =>  conv      W' = W1 + W2,  b' = b1 + b2

Exact: convolution is linear in its kernel. Kernels of different size or dilation are laid on one grid of
taps first, aligned by the input offset that each tap reads, i*dilation - padding (ACNet, Ding et al. 2019,
eq. 3; RepVGG; Diverse Branch Block, Ding et al. 2021, transforms II and VI). Strides and output sizes must
agree for every input size. The sum has as many groups as all summands share.
"""

from __future__ import annotations

from torch.nn import Conv2d

from fxfuse.algebra.operator import Operator
from fxfuse.pattern import Example, Model, Pattern, register


@register
class ParallelConv(Pattern):
    name = "parallel_conv"
    law = "conv1(x) + conv2(x) => conv; conv1(x) + y + conv2(x) => conv + y"
    relations = ("sum",)
    refused_when = (
        "strides, output sizes or padding values differ, or the common kernel costs more (a depthwise beside a "
        "dense convolution, distant dilations)"
    )

    def matches(self, relation: str, f: Operator, g: Operator) -> bool:
        return f.kind == g.kind == "conv"

    examples = (
        Example(
            "asymmetric branches (ACNet)",
            lambda: Model(
                lambda x, f, g, h: f(x) + g(x) + h(x),
                Conv2d(3, 4, 3, padding=1),
                Conv2d(3, 4, (1, 3), padding=(0, 1)),
                Conv2d(3, 4, (3, 1), padding=(1, 0)),
            ),
        ),
        Example(
            "depthwise kernels of two sizes",
            lambda: Model(
                lambda x, f, g: f(x) + g(x), Conv2d(3, 3, 7, padding=3, groups=3), Conv2d(3, 3, 3, padding=1, groups=3)
            ),
        ),
        Example(
            "a depthwise beside a dense convolution",
            lambda: Model(lambda x, f, g: f(x) + g(x), Conv2d(8, 8, 3, padding=1, groups=8), Conv2d(8, 8, 1)),
            (2, 8, 6, 7),
            reason="would cost more",
        ),
        Example(
            "output sizes that differ broadcast",
            lambda: Model(lambda x, f, g: f(x) + g(x), Conv2d(3, 4, 1), Conv2d(3, 4, 5)),
            (2, 3, 5, 5),
            reason="different output sizes",
        ),
    )
