"""conv(x, f(W))  =>  conv(x, W')      W' = f(W), computed once

Exact: where a weight is an expression of parameters and buffers alone, evaluating it at every call gives the
same tensor every time. Weight standardization (Qiao et al. 2019, eq. 2), scaled weight standardization of
normalizer-free networks (Brock et al. 2021, eq. 1) and masked or normalized weights are written so. The
expression runs in the dtype of the model, as it does in eager, and no number of it is rounded anew.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

from fxfuse.algebra.operator import Operator
from fxfuse.pattern import Example, Pattern, register


class _Standardized(nn.Conv2d):
    def forward(self, x):  # type: ignore[no-untyped-def]
        mean, var = self.weight.mean((1, 2, 3), keepdim=True), self.weight.var((1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / (var + 1e-6).sqrt(), self.bias, self.stride, self.padding)


class _Gated(nn.Conv2d):
    def forward(self, x):  # type: ignore[no-untyped-def]
        return F.conv2d(x, self.weight * x.mean(), self.bias, self.stride, self.padding)


@register
class ConstantWeight(Pattern):
    name = "constant_weight"
    law = "conv(x, f(W)) => conv(x, W')"
    relations = ("alone",)
    refused_when = "the weight depends on the input, on random numbers, or on what the forward itself writes"

    def matches(self, relation: str, f: Operator, g: Operator) -> bool:
        return f.computed

    examples = (
        Example("weight standardization", lambda: _Standardized(3, 5, 3, padding=1), (2, 3, 6, 7)),
        Example(
            "a weight that depends on the input",
            lambda: _Gated(3, 5, 3, padding=1),
            (2, 3, 6, 7),
            reason="computed from data",
        ),
    )
