"""The numbers of g(f(x)): products of weights laid out tap by tap, a factor a channel, and what a frame adds."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fxfuse.algebra import combine, taps
from fxfuse.algebra.constants import Values, evaluate
from fxfuse.algebra.operator import Operator
from fxfuse.algebra.terms import RUN, Numbers, Term, added, double


def chain(op: Operator, parts: list[Numbers], source: Values) -> Numbers:
    """W[n,c,i*d1+j*d2*s1] = sum over m of W2[n,m,j] * W1[m,c,i];  b = b2 + sum of W2 * b1."""
    f, g = op.operands
    rows_only = g.groups == g.out_channels == f.out_channels and not any(k > 1 for k in g.kernel)
    both = _scaled(*parts) if rows_only else _product(op, f, g, *parts)
    return both._replace(frame=_frame(op, f, g, parts, source)) if op.framed else both


def _scaled(one: Numbers, two: Numbers) -> Numbers:
    """f followed by one factor and one shift a channel: only the pending scales and the bias change."""
    factor = two.weight().flatten()
    shift = None if one.bias is None else one.bias * factor
    return Numbers(tuple(t.scaled(factor) for t in one.terms), added(shift, two.bias), one.shape)


def _product(op: Operator, f: Operator, g: Operator, one: Numbers, two: Numbers) -> Numbers:
    """Products are laid out [N, taps of g, taps of f, C]; a pending scale of g's rows stays pending."""
    single = len(two.terms) == 1 and not two.terms[0].place
    second = two.terms[0] if single else Term(two.weight())
    w1, w2 = taps.flat(op, one.weight()), taps.flat(op, second.weight)
    b1 = None if one.bias is None else one.bias.to(torch.promote_types(one.bias.dtype, double(w2[:0]).dtype))
    middle, count = f.out_channels, g.out_channels
    shift = None
    if g.groups == middle:  # each output of g reads one channel: rows are scaled, never multiplied out
        row = torch.arange(count, device=w1.device) // (count // middle)
        factors = double(w2[:, 0])
        product = factors[:, :, None, None] * w1[row].transpose(1, 2)[:, None]
        shift = None if b1 is None else factors.sum(1) * b1[row]
    elif f.groups == middle == f.input_width:  # f scales each channel: columns are scaled
        local = w1.reshape(g.groups, 1, 1, -1, w1.shape[-1]).transpose(-1, -2)
        grouped = double(_split(w2, g.groups)).transpose(-1, -2)
        product = (grouped[:, :, :, None] * local).flatten(0, 1)
        if b1 is not None:
            shift = torch.bmm(grouped.sum(2), b1.reshape(g.groups, -1, 1)).flatten()
    else:
        a = _split(combine.dense(f, w1, op.groups), op.groups)
        columns = a.flatten(2)
        if b1 is not None:  # the constant is one more input channel
            columns = torch.cat([columns, b1.reshape(op.groups, -1, 1)], 2)
        product = _multiplied(_split(combine.dense(g, w2, op.groups), op.groups), columns)
        shift = None if b1 is None else product[..., -1].sum(1)
        product = product[..., : a.shape[2] * a.shape[3]].reshape(*product.shape[:2], *a.shape[2:])
        product = product.transpose(-1, -2)
    if shift is not None and second.scale is not None:
        shift = shift * second.scale
    return Numbers.of(taps.placed(op, f, g, product), added(shift, two.bias), second.scale)


def _frame(op: Operator, f: Operator, g: Operator, parts: list[Numbers], source: Values) -> Tensor:
    """Q[n,j,i] = Q2[n,j] + sum over m of W2[n,m,j] * D[m,i], where D is what f lacks out of bounds.

    That is its frame; or, where g pads, the value padded less the bias of f, which has one tap in the padded dims.
    """
    one, two = parts
    weight = double(taps.flat(op, two.weight()))
    lacks = weight.new_zeros(f.out_channels, math.prod(f.kernel))
    if one.frame is not None:
        lacks = one.frame.flatten(1)
    elif g.pads:
        padded = double(evaluate(g.pad_value, source)).to(weight.device).reshape(-1)  # for all channels, or for each
        padded = padded if g.reads is None or len(padded) == 1 else padded[list(g.reads)]
        first = padded - (0 if one.bias is None else one.bias)
        lacks = torch.cat([first.expand(f.out_channels)[:, None], lacks[:, 1:]], 1)
    both = torch.promote_types(weight.dtype, lacks.dtype)  # a padding is real where layers are complex
    weight, lacks = _split(weight.to(both), g.groups), _split(lacks.to(both), g.groups)
    wide = torch.einsum("gnmj,gmi->gnji", weight, lacks).flatten(0, 1)
    if two.frame is not None:
        wide[:, :, 0] += two.frame.flatten(1)
    return taps.placed(op, f, g, wide[..., None])


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


def _split(weight: Tensor, groups: int) -> Tensor:
    return weight.reshape(groups, -1, *weight.shape[1:])
