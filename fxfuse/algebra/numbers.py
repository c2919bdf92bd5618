"""The numbers of an operator: its weight, bias and frame, from the constants it was made of.

Everything is computed in float64 (complex128 for complex weights) and rounded once by the caller.
A weight is [N, C/g, *K] with the output channels first, for transposed convolutions too; a frame is
[N, 1, *K], the weight on one more channel that is 1 out of bounds and 0 inside.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fxfuse.algebra.constants import Values, evaluate
from fxfuse.algebra.operator import Operator
from fxfuse.algebra.terms import RUN, Numbers, Term, double


def compute(op: Operator, source: Values) -> Numbers:
    """Weight, bias and frame of `op` with its constants looked up in `source`."""
    if op.law in LEAVES:
        return LEAVES[op.law](op, source)
    if op.law in ("sum", "concat"):
        return _branches(op, source)
    parts = [compute(o, source) for o in op.operands]
    if op.law == "compose":
        f, g = op.operands
        rows_only = g.groups == g.out_channels == f.out_channels and not any(k > 1 for k in g.kernel)
        both = _scaled(*parts) if rows_only else _compose(op, f, g, *parts)
        return both._replace(frame=_frame(op, f, g, parts, source)) if op.framed else both
    weight, bias, frame = parts[0].weight(), parts[0].bias, parts[0].frame
    if op.law == "portion":
        run = slice(*op.const("rows")) if op.const("rows") else slice(None)
        bias = bias[run] if op.bias and bias is not None else None
        return Numbers.of(weight[run].reshape(op.out_channels, 1, *op.kernel), bias)
    if op.law == "placed":
        run = slice(op.const("start"), op.const("start") + len(weight))
        factor, shift = weight.new_ones(op.out_channels, *weight.shape[1:]), weight.new_zeros(op.out_channels)
        factor[run] = weight
        shift[run] = 0 if bias is None else bias
        return Numbers.of(factor, shift if op.bias else None)
    if op.law == "unbiased":
        return Numbers(parts[0].terms, None, parts[0].shape)
    if op.law == "spread":
        each = op.const("each") or 1
        bias = bias.repeat_interleave(each) if op.bias and bias is not None else None
        return Numbers.of(weight.flatten().repeat_interleave(each).reshape(op.out_channels, 1, *op.kernel), bias)
    if op.law == "rows":
        rows = list(op.const("rows"))
        some = Numbers.of(weight[rows], None if bias is None else bias[rows])
        return some._replace(frame=None if frame is None else frame[rows])
    inner = op.operands[0]
    full = op.reads is None and inner.reads is not None
    return Numbers.of(_dense(inner, weight, op.groups, full), bias)._replace(frame=frame)


def _ones(op: Operator, width: int) -> Tensor:
    return torch.ones(op.out_channels, width, *op.kernel, dtype=torch.float64)


def _conv(op: Operator, source: Values) -> Numbers:
    weight = evaluate(op.const("weight"), source)
    bias = evaluate(op.const("bias"), source)
    if op.transposed:  # [C, N/g, *K] -> [N, C/g, *K], group by group
        g = op.groups
        weight = weight.reshape(g, -1, *weight.shape[1:]).transpose(1, 2).flatten(0, 1)
    frame = double(evaluate(op.const("frame"), source)) if op.framed else None
    return Numbers.of(weight, None if bias is None else double(bias))._replace(frame=frame)


def _product(op: Operator, source: Values) -> Numbers:
    return Numbers.of(evaluate(op.const("weight"), source).t(), None)


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
    return Numbers.of(scale.reshape(op.out_channels, 1, *op.kernel), shift)


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
        return Numbers.of(weight, None)
    return Numbers.of(weight, channels("shift") * op.const("alpha"))


def _pool(op: Operator, source: Values) -> Numbers:
    return Numbers.of(_ones(op, 1) / math.prod(op.kernel), None)


def _identity(op: Operator, source: Values) -> Numbers:
    return Numbers.of(_ones(op, 1), None)


LEAVES = {
    "conv": _conv,
    "product": _product,
    "batch_norm": _batch_norm,
    "scale": _scale,
    "pool": _pool,
    "identity": _identity,
    "pad": _identity,
    "select": _identity,
}


def _scaled(one: Numbers, two: Numbers) -> Numbers:
    """f followed by one factor and one shift a channel: only the pending scales and the bias change."""
    factor = two.weight().flatten()
    shift = None if one.bias is None else one.bias * factor
    bias = two.bias if shift is None else shift if two.bias is None else shift + two.bias
    return Numbers(tuple(t.scaled(factor) for t in one.terms), bias, one.shape)


def _compose(op: Operator, f: Operator, g: Operator, one: Numbers, two: Numbers) -> Numbers:
    """W[n,c,i*d1+j*d2*s1] = sum over m of W2[n,m,j] * W1[m,c,i];  b = b2 + sum of W2 * b1.

    Products are laid out [N, taps of g, taps of f, C]; a pending scale of g's rows stays pending.
    """
    single = len(two.terms) == 1 and not two.terms[0].place
    second = two.terms[0] if single else Term(two.weight())
    w1, b1, w2 = _taps(op, one.weight()), one.bias, _taps(op, second.weight)
    middle, count = f.out_channels, g.out_channels
    if g.groups == middle:  # each output of g reads one channel: rows are scaled, never multiplied out
        row = torch.arange(count, device=w1.device) // (count // middle)
        taps = double(w2[:, 0])
        product = taps[:, :, None, None] * w1[row].transpose(1, 2)[:, None]
        shift = None if b1 is None else taps.sum(1) * b1[row]
    elif f.groups == middle == f.input_width:  # f scales each channel: columns are scaled
        local = w1.reshape(g.groups, 1, 1, -1, w1.shape[-1]).transpose(-1, -2)
        grouped = double(_split(w2, g.groups)).transpose(-1, -2)
        product = (grouped[:, :, :, None] * local[:, :, :, :]).flatten(0, 1)
        shift = None
        if b1 is not None:
            shift = torch.bmm(grouped.sum(2), b1.reshape(g.groups, -1, 1)).flatten()
    else:
        a = _split(_dense(f, w1, op.groups), op.groups)
        columns = a.flatten(2)
        if b1 is not None:  # the constant is one more input channel
            columns = torch.cat([columns, b1.reshape(op.groups, -1, 1)], 2)
        product = _multiplied(_split(_dense(g, w2, op.groups), op.groups), columns)
        shift = None if b1 is None else product[..., -1].sum(1)
        product = product[..., : a.shape[2] * a.shape[3]].reshape(*product.shape[:2], *a.shape[2:])
        product = product.transpose(-1, -2)
    if shift is not None and second.scale is not None:
        shift = shift * second.scale
    bias = two.bias if shift is None else shift if two.bias is None else shift + two.bias
    return Numbers.of(_placed(op, f, g, product), bias, second.scale)


def _frame(op: Operator, f: Operator, g: Operator, parts: list[Numbers], source: Values) -> Tensor:
    """Q[n,j,i] = Q2[n,j] + sum over m of W2[n,m,j] * D[m,i], where D is what f lacks out of bounds.

    That is its frame; or, where g pads, the value padded less the bias of f, which has one tap in the padded dims.
    """
    one, two = parts
    weight = double(_taps(op, two.weight()))
    lacks = weight.new_zeros(f.out_channels, math.prod(f.kernel))
    if one.frame is not None:
        lacks = one.frame.flatten(1)
    elif g.pads:
        first = _padded_value(g, weight, source) - (0 if one.bias is None else one.bias)
        lacks = torch.cat([first.expand(f.out_channels)[:, None], lacks[:, 1:]], 1)
    both = torch.promote_types(weight.dtype, lacks.dtype)  # a padding is real where layers are complex
    weight, lacks = _split(weight.to(both), g.groups), _split(lacks.to(both), g.groups)
    wide = torch.einsum("gnmj,gmi->gnji", weight, lacks).flatten(0, 1)
    if two.frame is not None:
        wide[:, :, 0] += two.frame.flatten(1)
    return _placed(op, f, g, wide[..., None])


def _padded_value(g: Operator, like: Tensor, source: Values) -> Tensor:
    """What g pads each channel that it reads with, or all of them."""
    value = evaluate(g.pad_value, source)
    padded = double(value) if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
    padded = padded.to(like.device).reshape(-1)
    return padded if g.reads is None or len(padded) == 1 else padded[list(g.reads)]


def _multiplied(rows: Tensor, columns: Tensor) -> Tensor:
    """[G, n, m, taps] times [G, m, c] as [G*n, taps, c], a run of rows at a time permuted and widened."""
    groups, count, middle, taps = rows.shape
    product = columns.new_empty(groups, count, taps, columns.shape[-1])
    run = max(1, RUN // max(1, groups * middle * taps))
    for start in range(0, count, run):
        some = rows[:, start : start + run].transpose(-1, -2)
        wide = torch.empty(some.shape, dtype=columns.dtype, device=columns.device).copy_(some)
        result = torch.bmm(wide.flatten(1, 2), columns)
        product[:, start : start + run] = result.reshape(groups, -1, taps, columns.shape[-1])
    return product.flatten(0, 1)


def _taps(op: Operator, weight: Tensor) -> Tensor:
    """[N, C/g, *K] as [N, C/g, taps]."""
    return weight.flatten(2) if op.spatial else weight[..., None]


def _placed(op: Operator, f: Operator, g: Operator, product: Tensor) -> Tensor:
    """The taps of a product at their place in the kernel of `op`."""
    taps = product.flatten(1, 2)
    if all(1 in pair for pair in zip(f.kernel, g.kernel, strict=True)) and (
        math.prod(f.kernel) == 1 or math.prod(g.kernel) == 1
    ):
        weight = taps
    else:
        index = _chain_index(op, f, g).to(product.device)
        weight = taps.new_zeros(taps.shape[0], math.prod(op.kernel), taps.shape[-1])
        weight.index_add_(1, index, taps)
    return weight.reshape(op.out_channels, *op.kernel, -1).movedim(-1, 1)


def _chain_index(op: Operator, f: Operator, g: Operator) -> Tensor:
    """Flat position in the result of tap j of g and tap i of f, ordered (j, i)."""
    index = torch.zeros(1, 1, dtype=torch.long)
    for d in range(op.spatial or 0):
        k1, k2 = f.kernel[d], g.kernel[d]
        both = k1 > 1 and k2 > 1
        one = f.dilation[d] if both else op.dilation[d]
        two = g.dilation[d] * f.stride[d] if both else op.dilation[d]
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
        columns = torch.tensor(f.reads, device=weight.device).reshape(groups, -1)
        wide = weight.new_zeros(count, f.in_channels // groups, *weight.shape[2:])
        if groups == 1:  # which may read a channel twice
            return wide.index_add_(1, columns[0], weight)
        rows = torch.arange(count, device=weight.device)
        wide[rows[:, None], columns[rows // (count // groups)] % wide.shape[1]] = weight
        weight = wide
    return weight


def _branches(op: Operator, source: Values) -> Numbers:
    """Sum: every branch a term in its place. Concatenation: every branch in its rows."""
    shape = (op.out_channels, op.input_width // op.groups, *op.kernel)
    branches = list(_summands(op)) if op.law == "sum" else list(op.operands)
    parts = [compute(b, source) for b in branches]
    frame = _frames(op, branches, parts) if op.framed else None
    if op.law == "sum":
        terms = [
            t._replace(weight=_dense(b, t.weight, op.groups), place=_places(op, b, t.place))
            for b, n in zip(branches, parts, strict=True)
            for t in n.terms
        ]
        biases = [n.bias for n in parts if n.bias is not None]
        return Numbers(tuple(terms), sum(biases[1:], biases[0]) if biases else None, shape, frame)
    first = parts[0].weight()
    weight, bias = first.new_zeros(shape), first.new_zeros(op.out_channels)
    start = 0
    for branch, numbers in zip(branches, parts, strict=True):
        rows = slice(start, start := start + branch.out_channels)
        where = (rows, slice(None), *_places(op, branch, ()))
        weight[where] = numbers.weight()
        if numbers.bias is not None:
            bias[rows] = numbers.bias
    return Numbers.of(weight, bias if op.bias else None)._replace(frame=frame)


def _frames(op: Operator, branches: list[Operator], parts: list[Numbers]) -> Tensor:
    """The frames of all branches in one, each in its taps, and in its rows if they are concatenated."""
    first = next(n.frame for n in parts if n.frame is not None)
    frame, start = first.new_zeros(op.out_channels, 1, *op.kernel), 0
    for branch, numbers in zip(branches, parts, strict=True):
        rows = slice(None) if op.law == "sum" else slice(start, start := start + branch.out_channels)
        if numbers.frame is not None:
            where = (rows, slice(None), *_places(op, branch, ()))
            frame[where] += numbers.frame
    return frame


def _summands(op: Operator) -> Iterator[Operator]:
    """The summands of a sum of sums: one accumulator is enough for all of them."""
    for branch in op.operands:
        yield from _summands(branch) if branch.law == "sum" else (branch,)


def _places(op: Operator, branch: Operator, inner: tuple[slice, ...]) -> tuple[slice, ...]:
    """Where the taps of `branch` (or those at `inner` of it) lie in the kernel of `op`, dim by dim."""
    places = []
    for d in range(op.spatial or 0):
        taps = range(branch.kernel[d])[inner[d]] if inner else range(branch.kernel[d])
        at = [(op.padding[d][0] - branch.padding[d][0] + t * branch.dilation[d]) // op.dilation[d] for t in taps]
        places.append(slice(at[0], at[-1] + 1, at[1] - at[0] if len(at) > 1 else 1))
    return tuple(places)
