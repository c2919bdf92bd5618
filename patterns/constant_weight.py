"""conv(x, f(W))  =>  conv(x, W')      W' = f(W), computed once

Exact: where a weight is an expression of parameters and buffers alone, evaluating it at every call gives the
same tensor every time. Weight standardization (Qiao et al. 2019, eq. 2), scaled weight standardization of
normalizer-free networks (Brock et al. 2021, eq. 1) and masked or normalized weights are written so. The
expression runs in the dtype of the model, as it does in eager, and no number of it is rounded anew.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Conv2d

from fxfuse.algebra.operator import Operator
from fxfuse.pattern import Example, Model, Pattern, register


def _standardized(x: Tensor, conv: nn.Conv2d) -> Tensor:
    mean, var = conv.weight.mean((1, 2, 3), keepdim=True), conv.weight.var((1, 2, 3), keepdim=True)
    return F.conv2d(x, (conv.weight - mean) / (var + 1e-6).sqrt(), conv.bias)


@register
class ConstantWeight(Pattern):
    name = "constant_weight"
    law = "conv(x, f(W)) => conv(x, W')"
    relations = ("alone",)
    refused_when = "the weight depends on the input, on random numbers, or on what the forward itself writes"

    def matches(self, relation: str, f: Operator, g: Operator) -> bool:
        return f.computed

    examples = (
        Example("weight standardization", lambda: Model(_standardized, Conv2d(3, 5, 3))),
        Example(
            "a weight that depends on the input",
            lambda: Model(lambda x, conv: F.conv2d(x, conv.weight * x.mean(), conv.bias), Conv2d(3, 5, 3)),
            reason="computed from data",
        ),
    )
