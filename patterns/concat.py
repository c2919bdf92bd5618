"""cat([conv1(x), conv2(x)], channels)  =>  conv      W' = [W1; W2],  b' = [b1; b2]

Exact: an output channel depends on its own rows alone (Diverse Branch Block, Ding et al. 2021, transform
IV). Smaller kernels are padded with zero taps. Where each branch reads a run of channels of its own
(`chunk`, a convolution each, `cat`) the result is one grouped convolution.
"""

from __future__ import annotations

import torch
from torch.nn import BatchNorm2d, Conv2d, ReLU, Sequential

from fxfuse.algebra.operator import Operator
from fxfuse.pattern import Example, Model, Pattern, register


@register
class Concat(Pattern):
    name = "concat"
    law = "cat(conv1(x), conv2(x)) => conv;  cat of convs of chunks => grouped conv"
    relations = ("concat",)
    refused_when = "strides or output sizes differ, the axis is not the channel axis, or padded kernels cost more"

    def matches(self, relation: str, f: Operator, g: Operator) -> bool:
        return True

    examples = (
        Example(
            "two 3x3 of one input",
            lambda: Model(lambda x, f, g: torch.cat([f(x), g(x)], 1), Conv2d(3, 4, 3), Conv2d(3, 5, 3)),
        ),
        Example(
            "split, transform, concatenate",
            lambda: Sequential(
                BatchNorm2d(6),
                ReLU(),
                Model(
                    lambda x, f, g: torch.cat([f(x.chunk(2, 1)[0]), g(x.chunk(2, 1)[1])], 1),
                    Conv2d(3, 4, 3),
                    Conv2d(3, 4, 3),
                ),
            ),
            (2, 6, 6, 7),
        ),
        Example(
            "a 1x1 beside a 3x3",
            lambda: Model(lambda x, f, g: torch.cat([f(x), g(x)], 1), Conv2d(3, 4, 1), Conv2d(3, 4, 3, padding=1)),
            reason="would cost more",
        ),
    )
