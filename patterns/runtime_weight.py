"""dynamic_conv -> batch_norm  =>  dynamic_conv      bank'[k, n] = bank[k, n] * s[n],  bias' = bias * s + t

A dynamic convolution mixes a bank of kernels with attention that the input decides (Chen et al. 2020, eq. 1;
CondConv, Yang et al. 2019). Its output is linear in the bank, so a factor and shift a channel after it go to the
bank and to what is mixed as its bias; one without a bias gets one. A deformable convolution (Dai et al. 2017, eq. 2)
reads where its offsets say, and is linear in its weight: W' = W * s, b' = b * s + t. Exact at every batch size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import BatchNorm2d, Embedding, Linear

from fxfuse.algebra.operator import Operator
from fxfuse.pattern import Example, Model, Pattern, register


def _mixed(x: Tensor, attend: nn.Module, bank: Embedding, shifts: Embedding) -> Tensor:
    """A convolution whose kernel is mixed for each sample."""
    b, c, h, w = x.shape
    attention = attend(x.mean((2, 3))).softmax(1)
    weight, bias = (attention @ bank.weight).view(b * 4, 4, 3, 3), (attention @ shifts.weight).view(-1)
    y = F.conv2d(x.reshape(1, b * c, h, w), weight, bias, padding=1, groups=b)
    return y.view(b, 4, y.shape[2], y.shape[3])


def _model(formula: Callable[..., Tensor]) -> Model:
    return Model(formula, BatchNorm2d(4), Linear(4, 3), Embedding(3, 4 * 4 * 9), Embedding(3, 4))


@register
class RuntimeWeight(Pattern):
    name = "runtime_weight"
    law = "dynamic_conv -> batch_norm => dynamic_conv;  deform_conv2d -> batch_norm => deform_conv2d"
    relations = ("chain",)
    refused_when = "the weight is not a product with a constant bank, or something else reads what lies between"

    def matches(self, relation: str, f: Operator, g: Operator) -> bool:
        return g.law == "repeated" or (f.kind == "warp" and g.kind == "scale")

    examples = (
        Example(
            "batch norm after a dynamic convolution",
            lambda: _model(lambda x, norm, *mixing: norm(_mixed(x, *mixing))),
            (3, 4, 6, 5),
        ),
        Example(
            "something that is not linear joins before the batch norm",
            lambda: _model(lambda x, norm, *mixing: norm(_mixed(x, *mixing) + x.relu())),
            (3, 4, 6, 5),
            reason="follows no convolution",
        ),
    )
