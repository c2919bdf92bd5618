"""relu(conv1(x)), relu(conv2(x))  =>  slices of relu(conv(x))      W' = [W1; W2],  b' = [b1; b2]

Exact: an output channel depends on its own rows alone, and an activation on its own element. The 1x1 convolutions
at the head of an Inception module (Szegedy et al. 2016, figure 5) or of a residual block and its shortcut read their
input once so, and linear layers of one input (query, key and value) are one matrix product.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Conv2d, Linear

from fxfuse.algebra.branches import concat
from fxfuse.algebra.operator import Operator
from fxfuse.pattern import Example, Model, Pattern, register
from fxfuse.refusal import Refusal

# What must be the same for both, and how a refusal calls it.
_ALIKE = {"spatial": "axes", "kernel": "kernels", "stride": "strides", "framed": "borders"} | {
    name: name for name in ("dilation", "padding", "padding_mode", "pad_value")
}


def _apart(x: Tensor, *layers: nn.Module) -> Tensor:
    """Layers of one input, an activation after each, and a product of what they give."""
    first, second = (F.relu(layer(x)) for layer in layers)
    return first * second.mean((-1, -2), keepdim=True)


def _attention(x: Tensor, query: nn.Module, key: nn.Module, value: nn.Module) -> Tensor:
    return F.scaled_dot_product_attention(query(x), key(x), value(x))


@register
class Siblings(Pattern):
    name = "siblings"
    law = "relu(conv1(x)), relu(conv2(x)) => slices of relu(conv(x))"
    relations = ("siblings",)
    refused_when = (
        "kernels, strides, paddings or dtypes differ, a layer is grouped, the slices are more than what is not read "
        "again, or somebody may notice that a slice is not contiguous"
    )

    def matches(self, relation: str, f: Operator, g: Operator) -> bool:
        return f.kind == g.kind == "conv"

    def rewrite(self, relation: str, f: Operator, g: Operator) -> Operator | Refusal:
        """One layer with the channels of both, if they go over the tensor in the same way."""
        for op in (f, g):
            if op.groups > 1 or op.transposed or op.reads is not None:
                what = "a transposed convolution" if op.transposed else "a layer of some of the channels"
                what = "a grouped layer" if op.groups > 1 else what
                return Refusal(f"layers of one tensor, but {what} has no wide form", detail=op.describe())
        for name, what in _ALIKE.items():
            if getattr(f, name) != getattr(g, name):
                reason = f"layers of one tensor have different {what}: no wide layer would do for both"
                return Refusal(reason, detail=f"{f.describe()} and {g.describe()}")
        return concat((f, g))

    examples = (
        Example("two 1x1 of one input", lambda: Model(_apart, Conv2d(8, 4, 1), Conv2d(8, 4, 1)), (2, 8, 6, 7)),
        Example("query, key and value", lambda: Model(_attention, *(Linear(4, 4) for _ in range(3))), (2, 5, 4)),
        Example(
            "a 1x1 beside a 3x3",
            lambda: Model(_apart, Conv2d(8, 4, 1), Conv2d(8, 4, 3, padding=1)),
            (2, 8, 6, 7),
            reason="different kernels",
        ),
        Example(
            "slices that are more than the input",
            lambda: Model(_apart, Conv2d(4, 8, 1), Conv2d(4, 8, 1)),
            (2, 4, 6, 7),
            reason="would cost more than",
        ),
    )
