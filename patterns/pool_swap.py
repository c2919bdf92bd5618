"""1x1 conv -> avg_pool  =>  avg_pool -> 1x1 conv,  and back      the pool where it has fewer values to average

Exact: a pool without padding is the same weighted mean on every channel, its weights sum to one, and a pointwise
convolution with its bias is the same affine map at every position (W mean(x) + b = mean(W x + b)). A pool that pads
and counts the padding averages zeros in; there the bias is added after it. A pool that shrinks the map goes first, as
in the transitions of DenseNet, which do a quarter of the work so; one that keeps the map goes behind a convolution
that shrinks the channels, as in the pool branches of Inception.
"""

from __future__ import annotations

from dataclasses import replace

from torch.nn import AvgPool2d, BatchNorm2d, Conv2d, ReLU, Sequential

from fxfuse.algebra.combine import meet
from fxfuse.algebra.operator import Operator
from fxfuse.pattern import Example, Pattern, register
from fxfuse.refusal import Refusal


@register
class PoolSwap(Pattern):
    name = "pool_swap"
    law = "1x1 conv -> avg_pool => avg_pool -> 1x1 conv;  avg_pool -> 1x1 conv => 1x1 conv -> avg_pool"
    relations = ("swap",)
    refused_when = (
        "the convolution is not pointwise, the pool would average more values, or it is no convolution itself "
        "(count_include_pad=False at a padded border, ceil_mode, divisor_override)"
    )

    def matches(self, relation: str, f: Operator, g: Operator) -> bool:
        return {f.kind, g.kind} == {"pool", "conv"}

    def rewrite(self, relation: str, f: Operator, g: Operator) -> Operator | Refusal:
        """The layer as it runs on the other side of the pool; before a pool that pads without its bias."""
        layer, pool = (f, g) if f.weighted else (g, f)
        if refusal := meet(f, g, f.out_channels, g.in_channels):
            return refusal
        if layer.kind != "conv" or pool.kind != "pool" or not layer.pointwise:
            return Refusal("only a pointwise layer may change places with an average pool", detail=layer.describe())
        if not pool.pads or not layer.bias:
            return layer
        if layer is f:
            return Refusal("the pool averages zeros of its padding in, where the layer before it has its bias")
        return replace(layer, law="unbiased", operands=(layer,), consts=(), bias=False)

    examples = (
        Example("the transition of a DenseNet", lambda: Sequential(Conv2d(3, 2, 1), AvgPool2d(2))),
        Example(
            "the pool branch of an Inception module",
            lambda: Sequential(AvgPool2d(3, 1, 1), Conv2d(8, 2, 1), BatchNorm2d(2), ReLU()),
            (2, 8, 6, 7),
        ),
        Example(
            "a convolution that widens",
            lambda: Sequential(AvgPool2d(3, 1, 1), Conv2d(2, 8, 1)),
            (2, 2, 6, 7),
            reason="more channels to average",
        ),
        Example(
            "a pool that pads without counting the padding",
            lambda: Sequential(AvgPool2d(3, 1, 1, count_include_pad=False), Conv2d(8, 2, 1)),
            (2, 8, 6, 7),
            reason="no convolution",
        ),
    )
