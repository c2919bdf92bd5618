"""conv -> avg_pool => conv,  conv1(x) + avg_pool(x) => conv      the pool is a depthwise kernel of 1/k^2

Exact where every window divides by the same count: no padding, or count_include_pad, no ceil_mode and no
divisor_override (Diverse Branch Block, Ding et al. 2021, transform V). A pool alone stays a pool.
"""

from __future__ import annotations

from torch.nn import AvgPool2d, Conv2d, Sequential

from fxfuse.algebra.operator import Operator
from fxfuse.pattern import Example, Model, Pattern, register


@register
class AvgPool(Pattern):
    name = "avg_pool"
    law = "conv -> avg_pool => conv;  avg_pool -> conv => conv;  conv(x) + avg_pool(x) => conv"
    relations = ("chain", "sum")
    refused_when = "count_include_pad=False at a padded border, ceil_mode, divisor_override, or a dearer kernel"

    def matches(self, relation: str, f: Operator, g: Operator) -> bool:
        kinds = (f.kind, g.kind)
        return "pool" in kinds and (relation == "sum" or "identity" not in kinds)

    examples = (
        Example(
            "a pool beside a convolution",
            lambda: Model(lambda x, conv, pool: conv(x) + pool(x), Conv2d(3, 3, 3, padding=1), AvgPool2d(3, 1, 1)),
        ),
        Example("3x3 then a 2x2 pool is one strided 4x4", lambda: Sequential(Conv2d(3, 4, 3, padding=1), AvgPool2d(2))),
        Example(
            "a pool that pads without counting the padding",
            lambda: Sequential(Conv2d(3, 4, 1), AvgPool2d(3, 1, 1, count_include_pad=False)),
            reason="no convolution",
        ),
    )
