"""The numbers of an operator: its weight and bias, from the constants it was made of.

Everything is computed in float64 (complex128 for complex weights) and rounded once by the caller.
A weight is [N, C/g, *K] with the output channels first, for transposed convolutions too.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .constants import Const, Values, evaluate, probe_values
from .record import Operator


class Numbers(NamedTuple):
    """Weight [N, C/g, *K] and bias [N] (None: no bias) in double precision."""

    weight: Tensor
    bias: Tensor | None


def compute(op: Operator, source: Values) -> Numbers:
    """Weight and bias of `op` with its constants looked up in `source`."""
    if op.law in LEAVES:
        return LEAVES[op.law](op, source)
    parts = [compute(o, source) for o in op.operands]
    if op.law == "compose":
        return _compose(op, *op.operands, *parts)
    if op.law == "rows":
        rows = list(op.const("rows"))
        weight, bias = parts[0]
        return Numbers(weight[rows], None if bias is None else bias[rows])
    if op.law == "dense":
        inner = op.operands[0]
        full = op.reads is None and inner.reads is not None
        return Numbers(_dense(inner, parts[0].weight, op.groups, full), parts[0].bias)
    return _branches(op, parts)


def double(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


@lru_cache(maxsize=1024)
def bias_is(op: Operator, value: Const) -> bool:
    """Whether the bias of `op` equals `value` on every channel, whatever the weights are.

    Both are analytic functions of the weights: they are compared at one random point.
    """
    bias = compute(op, probe_values).bias
    if bias is None:
        bias = torch.zeros(op.out_channels, dtype=torch.float64)
    expected = evaluate(value, probe_values)
    if isinstance(expected, Tensor):
        if expected.numel() not in (1, bias.numel()):
            return False
        expected = double(expected).reshape(-1)
    return bool(torch.allclose(bias, bias.new_zeros(()) + expected, rtol=1e-10, atol=1e-12))


def _ones(op: Operator, width: int) -> Tensor:
    return torch.ones(op.out_channels, width, *op.kernel, dtype=torch.float64)


def _conv(op: Operator, source: Values) -> Numbers:
    weight = double(evaluate(op.const("weight"), source))
    bias = evaluate(op.const("bias"), source)
    if op.transposed:  # [C, N/g, *K] -> [N, C/g, *K], group by group
        g = op.groups
        weight = weight.reshape(g, -1, *weight.shape[1:]).transpose(1, 2).flatten(0, 1)
    return Numbers(weight, None if bias is None else double(bias))


def _batch_norm(op: Operator, source: Values) -> Numbers:
    """s = weight / sqrt(var + eps), b = bias - mean * s (Ioffe and Szegedy 2015, algorithm 2)."""
    mean = double(evaluate(op.const("mean"), source))
    var = double(evaluate(op.const("var"), source))
    weight, bias = (evaluate(op.const(n), source) for n in ("weight", "bias"))
    deviation = (var + op.const("eps")).sqrt()
    scale = (1 if weight is None else double(weight)) / deviation
    shift = -mean * scale
    if bias is not None:
        shift = shift + double(bias)
    return Numbers(scale.reshape(op.out_channels, 1, *op.kernel), shift)


def _scale(op: Operator, source: Values) -> Numbers:
    """x * factor + shift, each a number or one value a channel."""

    def channels(name: str) -> Tensor:
        value = evaluate(op.const(name), source)
        tensor = double(value) if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
        return tensor.reshape(-1).expand(op.out_channels)

    factor = channels("factor")
    if op.const("inverse"):
        factor = 1 / factor
    weight = factor.reshape(op.out_channels, 1, *op.kernel)
    if op.const("shift") == 0:
        return Numbers(weight, None)
    return Numbers(weight, channels("shift") * op.const("alpha"))


def _pool(op: Operator, source: Values) -> Numbers:
    return Numbers(_ones(op, 1) / math.prod(op.kernel), None)


def _identity(op: Operator, source: Values) -> Numbers:
    return Numbers(_ones(op, 1), None)


LEAVES = {
    "conv": _conv,
    "batch_norm": _batch_norm,
    "scale": _scale,
    "pool": _pool,
    "identity": _identity,
    "pad": _identity,
    "select": _identity,
}


def _compose(op: Operator, f: Operator, g: Operator, one: Numbers, two: Numbers) -> Numbers:
    """W[n,c,i*d1+j*d2*s1] = sum over m of W2[n,m,j] * W1[m,c,i];  b = b2 + sum of W2 * b1."""
    w1, w2 = one.weight.flatten(2) if op.spatial else one.weight[..., None], two.weight
    w2 = w2.flatten(2) if op.spatial else w2[..., None]
    w1, w2 = w1.to(torch.promote_types(w1.dtype, w2.dtype)), w2.to(torch.promote_types(w1.dtype, w2.dtype))
    middle = f.out_channels
    if g.groups == middle:  # each output of g reads one channel: rows are scaled, never multiplied out
        row = torch.arange(g.out_channels) // (g.out_channels // middle)
        product = w2[:, 0, :, None, None] * w1[row].transpose(1, 2)[:, None]  # n p q c
        shift = None if one.bias is None else two.weight.flatten(1).sum(1) * one.bias[row]
    else:
        if f.groups == middle == f.input_width:  # f scales each channel: columns are scaled
            local = w1.reshape(g.groups, 1, -1, w1.shape[-1])
            grouped = w2.reshape(g.groups, -1, *w2.shape[1:])
            product = torch.einsum("gnmp,gkmq->gnpqm", grouped, local).flatten(0, 1)
        else:
            a = _split(_dense(f, w1, op.groups), op.groups)
            b = _split(_dense(g, w2, op.groups), op.groups)
            product = torch.einsum("gnmp,gmcq->gnpqc", b, a).flatten(0, 1)
        shift = None
        if one.bias is not None:
            summed = _split(two.weight.flatten(2).sum(2) if op.spatial else two.weight, g.groups)
            shift = torch.einsum("gnm,gm->gn", summed, one.bias.reshape(g.groups, -1).to(summed.dtype)).flatten()
    index = _chain_index(op, f, g).to(product.device)
    weight = product.new_zeros(product.shape[0], math.prod(op.kernel), product.shape[-1])
    weight.index_add_(1, index, product.flatten(1, 2))
    weight = weight.transpose(1, 2).reshape(op.out_channels, -1, *op.kernel)
    bias = two.bias if shift is None else shift if two.bias is None else shift + two.bias
    return Numbers(weight, bias)


def _chain_index(op: Operator, f: Operator, g: Operator) -> Tensor:
    """Flat position in the result of tap j of g and tap i of f, ordered (j, i)."""
    index = torch.zeros(1, 1, dtype=torch.long)
    for d in range(op.spatial or 0):
        k1, k2 = f.kernel[d], g.kernel[d]
        one = f.dilation[d] if k2 > 1 and k1 > 1 else op.dilation[d]
        two = g.dilation[d] * f.stride[d] if k2 > 1 and k1 > 1 else op.dilation[d]
        here = (torch.arange(k2)[:, None] * two + torch.arange(k1)[None] * one) // op.dilation[d]
        index = index[:, None, :, None] * op.kernel[d] + here[None, :, None, :]
        index = index.flatten(2, 3).flatten(0, 1)
    return index.flatten()


def _split(weight: Tensor, groups: int) -> Tensor:
    return weight.reshape(groups, -1, *weight.shape[1:])


def _dense(f: Operator, weight: Tensor, groups: int, full: bool = False) -> Tensor:
    """The weight of `f` with `groups` groups, and with a column for every channel if `full`."""
    count, width = weight.shape[:2]
    if f.groups != groups:
        ratio = f.groups // groups
        wide = weight.new_zeros(count, ratio, width, *weight.shape[2:])
        rows = torch.arange(count, device=weight.device)
        wide[rows, (rows // (count // f.groups)) % ratio] = weight
        weight = wide.flatten(1, 2)
    if full and f.reads is not None:
        wide = weight.new_zeros(count, f.in_channels, *weight.shape[2:])
        weight = wide.index_add_(1, torch.tensor(f.reads, device=weight.device), weight)
    return weight


def _branches(op: Operator, parts: list[Numbers]) -> Numbers:
    """Sum or concatenation: every branch spread over the taps of the result."""
    spread = []
    for branch, numbers in zip(op.operands, parts, strict=True):
        weight = _spread(op, branch, numbers.weight)
        spread.append(_dense(branch, weight, op.groups) if op.law == "sum" else weight)
    biases = [
        w.new_zeros(w.shape[0]) if n.bias is None else n.bias for w, n in zip(spread, parts, strict=True)
    ]
    weight = sum(spread[1:], spread[0]) if op.law == "sum" else torch.cat(spread)
    bias = sum(biases[1:], biases[0]) if op.law == "sum" else torch.cat(biases)
    return Numbers(weight, bias if op.bias else None)


def _spread(op: Operator, branch: Operator, weight: Tensor) -> Tensor:
    """The taps of `branch` at their place in the kernel of `op`, zeros elsewhere."""
    if branch.kernel == op.kernel and branch.padding == op.padding:
        return weight
    out = weight.new_zeros(*weight.shape[:2], *op.kernel)
    place: list[slice | Tensor] = [slice(None), slice(None)]
    for d in range(op.spatial or 0):
        start = op.padding[d][0] - branch.padding[d][0]
        last = start + (branch.kernel[d] - 1) * branch.dilation[d]
        step = op.dilation[d]
        place.append(slice(start // step, last // step + 1, max(1, branch.dilation[d] // step) if branch.kernel[d] > 1 else 1))
    out[tuple(place)] = weight
    return out
