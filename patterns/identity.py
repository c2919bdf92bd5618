"""conv(x) + x  =>  conv      W' = W + I

Exact: the identity is the convolution whose kernel is 1 at the centre of each channel's own plane, and
convolutions of one tensor add (RepVGG, Ding et al. 2021, section 3.3). A batch norm, a constant factor or
a shift of x is the same with another diagonal. Dropout in eval mode is the identity in a chain.
"""

from __future__ import annotations

from torch.nn import BatchNorm2d, Conv2d, Dropout2d, Sequential

from fxfuse.algebra.operator import Operator
from fxfuse.pattern import Example, Model, Pattern, register


@register
class Identity(Pattern):
    name = "identity"
    law = "conv(x) + x => conv;  conv(x) + batch_norm(x) => conv;  conv -> dropout => conv"
    relations = ("sum", "chain")
    refused_when = "the convolution changes the size or the number of channels, or something non-linear lies between"

    def matches(self, relation: str, f: Operator, g: Operator) -> bool:
        kinds = (f.kind, g.kind)
        if relation == "chain":
            return "identity" in kinds
        return any(k in ("identity", "scale", "select", "pad") for k in kinds) and "pool" not in kinds

    examples = (
        Example(
            "residual around a convolution", lambda: Model(lambda x, conv: conv(x) + x, Conv2d(3, 3, 3, padding=1))
        ),
        Example(
            "residual around a grouped convolution and its batch norm",
            lambda: Model(
                lambda x, conv: conv(x) + x, Sequential(Conv2d(4, 4, 5, padding=2, groups=2), BatchNorm2d(4))
            ),
            (2, 4, 6, 7),
        ),
        Example(
            "residual around a convolution without padding broadcasts",
            lambda: Model(lambda x, conv: conv(x) + x, Conv2d(1, 4, 1)),
            (2, 1, 6, 7),
            reason="channel counts",
        ),
        Example(
            "dropout between a convolution and its batch norm",
            lambda: Sequential(Conv2d(3, 5, 1), Dropout2d(), BatchNorm2d(5)),
        ),
    )
