"""Taps: which input offsets the kernel of a chain reads, and those of a sum or concatenation, dim by dim.

For a dim with kernel K, stride s, dilation d, padding (low, high) on a length L, an operator gives
floor((L + low + high - d*(K-1) - 1) / s) + 1 positions, so two operators agree on every L iff their strides and
their `low + high - d*(K-1)` agree. Tap i reads the offset i*d - low.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxfuse.algebra.operator import Operator
from fxfuse.refusal import Refusal


def of_chain(f: Operator, g: Operator) -> dict[str, Any]:
    """Kernel, dilation, padding and stride of g(f(x)): f's tap i and g's tap j read at i*d1 + j*d2*s1."""
    taps = [_chained(f, g, d) for d in range(f.spatial or 0)]
    sides = f.padding, g.padding, f.stride
    return {
        "kernel": tuple(k for k, _ in taps),
        "dilation": tuple(d for _, d in taps),
        "padding": tuple((a[0] + s * b[0], a[1] + s * b[1]) for a, b, s in zip(*sides, strict=True)),
        "stride": tuple(a * b for a, b in zip(f.stride, g.stride, strict=True)),
    }


def _chained(f: Operator, g: Operator, dim: int) -> tuple[int, int]:
    k1, k2 = f.kernel[dim], g.kernel[dim]
    d1, d2 = f.dilation[dim], g.dilation[dim] * (1 if f.transposed else f.stride[dim])
    if k1 == k2 == 1:  # of one tap it says nothing, but output_padding may be as large as it allows
        return 1, max(d1, d2)
    if 1 in (k1, k2):
        return (k1, d1) if k2 == 1 else (k2, d2)
    step = math.gcd(d1, d2)
    return ((k1 - 1) * d1 + (k2 - 1) * d2) // step + 1, step


def united(ops: Sequence[Operator]) -> dict[str, Any] | Refusal:
    """Kernel, dilation and padding of the smallest grid that holds the taps of all `ops`."""
    first = ops[0]
    if all((o.kernel, o.dilation, o.padding) == (first.kernel, first.dilation, first.padding) for o in ops):
        return {"kernel": first.kernel, "dilation": first.dilation, "padding": first.padding}
    grid = []
    for d in range(first.spatial or 0):
        reach = {sum(o.padding[d]) - o.dilation[d] * (o.kernel[d] - 1) for o in ops}
        if len(reach) > 1:
            return Refusal("the branches give different output sizes", detail=", ".join(o.describe() for o in ops))
        more = reach.pop()
        offsets = sorted({i * o.dilation[d] - o.padding[d][0] for o in ops for i in range(o.kernel[d])})
        start = min(offsets[0], 0)
        step = math.gcd(*(o - start for o in offsets)) or 1
        # one tap more at the far end keeps the size right when every branch stops short of it
        taps = max((offsets[-1] - start) // step, -(-(-start - more) // step)) + 1
        dilation = step if taps > 1 else max(o.dilation[d] for o in ops)
        grid.append((taps, dilation, (-start, more + step * (taps - 1) + start)))
    return dict(zip(("kernel", "dilation", "padding"), zip(*grid, strict=True), strict=True))


def places(op: Operator, branch: Operator, inner: tuple[slice, ...] = ()) -> tuple[slice, ...]:
    """Where the taps of `branch` (or those at `inner` of it) lie in the kernel of `op`, dim by dim."""
    found = []
    for d in range(op.spatial or 0):
        taps = range(branch.kernel[d])[inner[d]] if inner else range(branch.kernel[d])
        at = [(op.padding[d][0] - branch.padding[d][0] + t * branch.dilation[d]) // op.dilation[d] for t in taps]
        found.append(slice(at[0], at[-1] + 1, at[1] - at[0] if len(at) > 1 else 1))
    return tuple(found)


def flat(op: Operator, weight: Tensor) -> Tensor:
    """[N, C/g, *K] as [N, C/g, taps]."""
    return weight.flatten(2) if op.spatial else weight[..., None]


def placed(op: Operator, f: Operator, g: Operator, product: Tensor) -> Tensor:
    """Products [N, taps of g, taps of f, C] as the weight [N, C, *K] of `op`, which is g(f(x))."""
    taps = product.flatten(1, 2)
    if math.prod(f.kernel) > 1 and math.prod(g.kernel) > 1:
        weight = taps.new_zeros(taps.shape[0], math.prod(op.kernel), taps.shape[-1])
        taps = weight.index_add_(1, _index(op, f, g).to(taps.device), taps)
    return taps.reshape(op.out_channels, *op.kernel, -1).movedim(-1, 1)


def _index(op: Operator, f: Operator, g: Operator) -> Tensor:
    """Flat position in the kernel of `op` of tap j of g and tap i of f, ordered (j, i)."""
    index = torch.zeros(1, 1, dtype=torch.long)
    for d in range(op.spatial or 0):
        one, two = torch.arange(f.kernel[d]) * f.dilation[d], torch.arange(g.kernel[d]) * g.dilation[d] * f.stride[d]
        here = (two[:, None] + one) // op.dilation[d]
        index = index[:, None, :, None] * op.kernel[d] + here[None, :, None, :]
        index = index.flatten(2, 3).flatten(0, 1)
    return index.flatten()
