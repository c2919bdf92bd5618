"""Two layers that are neither a chain nor branches of a join: siblings, or a layer and a pool that change places."""

from __future__ import annotations

from dataclasses import replace

from fxfuse.algebra.combine import Result, concat, meet
from fxfuse.algebra.operator import Operator
from fxfuse.refusal import Refusal


def swap(f: Operator, g: Operator) -> Result:
    """Of a pointwise layer and an average pool in a row, the layer as it runs on the other side of the pool.

    A pool that pads averages zeros in, which are the layer's own zeros only without its bias: before such a pool the
    layer loses its bias, to be added after it.
    """
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


def siblings(f: Operator, g: Operator) -> Result:
    """Two layers of one tensor as one layer with the channels of both, if they go over it in the same way."""
    for op in (f, g):
        if op.groups > 1 or op.transposed or op.reads is not None:
            what = "a transposed convolution" if op.transposed else "a layer of some of the channels"
            what = "a grouped layer" if op.groups > 1 else what
            return Refusal(f"layers of one tensor, but {what} has no wide form", detail=op.describe())
    geometry = ("spatial", "kernel", "stride", "dilation", "padding", "padding_mode", "pad_value", "framed")
    for name in geometry:
        if getattr(f, name) != getattr(g, name):
            what = {"spatial": "axes", "kernel": "kernels", "stride": "strides", "framed": "borders"}.get(name, name)
            reason = f"layers of one tensor have different {what}: no wide layer would do for both"
            return Refusal(reason, detail=f"{f.describe()} and {g.describe()}")
    return concat((f, g))
