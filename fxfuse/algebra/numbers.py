"""The numbers of an operator: its weight, bias and frame, from the constants it was made of, law by law.

Everything is computed in float64 (complex128 for complex weights) and rounded once by the caller.
A weight is [N, C/g, *K] with the output channels first, for transposed convolutions too; a frame is
[N, 1, *K], the weight on one more channel that is 1 out of bounds and 0 inside.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from fxfuse.algebra import combine
from fxfuse.algebra.chain_numbers import chain
from fxfuse.algebra.constants import Values, evaluate
from fxfuse.algebra.operator import Operator
from fxfuse.algebra.taps import places
from fxfuse.algebra.terms import Numbers, added, double


def compute(op: Operator, source: Values) -> Numbers:
    """Weight, bias and frame of `op` with its constants looked up in `source`.

    Raises:
        ValueError: its law has no numbers.
    """
    if op.law not in LAWS:
        raise ValueError(f"the law {op.law!r} of {op.describe()} has no numbers; known: {', '.join(LAWS)}")
    return LAWS[op.law](op, [compute(o, source) for o in op.operands], source)


def _double(op: Operator, name: str, source: Values) -> Any:
    """A constant of `op` in double precision, None where it is None."""
    value = evaluate(op.const(name), source)
    return None if value is None else double(value)


def _conv(op: Operator, parts: list[Numbers], source: Values) -> Numbers:
    weight = evaluate(op.const("weight"), source)
    if op.transposed:  # [C, N/g, *K] -> [N, C/g, *K], group by group
        g = op.groups
        weight = weight.reshape(g, -1, *weight.shape[1:]).transpose(1, 2).flatten(0, 1)
    return Numbers.of(weight, _double(op, "bias", source), frame=_double(op, "frame", source) if op.framed else None)


def _product(op: Operator, parts: list[Numbers], source: Values) -> Numbers:
    return Numbers.of(evaluate(op.const("weight"), source).t(), None)


def _batch_norm(op: Operator, parts: list[Numbers], source: Values) -> Numbers:
    """s = weight / sqrt(var + eps), b = bias - mean * s (Ioffe and Szegedy 2015, algorithm 2)."""
    mean, var, weight, bias = (_double(op, name, source) for name in ("mean", "var", "weight", "bias"))
    scale = (1 if weight is None else weight) / (var + op.const("eps")).sqrt()
    return _factor(op, scale, (0 if bias is None else bias) - mean * scale)


def _scale(op: Operator, parts: list[Numbers], source: Values) -> Numbers:
    """x * factor + shift, each a number or one value a channel."""

    def channels(name: str) -> Tensor:
        values: Tensor = _double(op, name, source)
        return values.reshape(-1).expand(op.out_channels)

    factor = 1 / channels("factor") if op.const("inverse") else channels("factor")
    return _factor(op, factor, None if op.const("shift") == 0 else channels("shift") * op.const("alpha"))


def _mean(op: Operator, parts: list[Numbers], source: Values) -> Numbers:
    """The same factor for each tap: 1 for the identity, 1 / taps for an average pool."""
    ones = torch.ones(op.out_channels, 1, *op.kernel, dtype=torch.float64)
    return Numbers.of(ones / math.prod(op.kernel), None)


def _factor(op: Operator, factor: Tensor, shift: Tensor | None) -> Numbers:
    """A factor and shift a channel [N]; the shift only if `op` has one."""
    return Numbers.of(factor.reshape(op.out_channels, 1, *op.kernel), shift)


def _spread(op: Operator, parts: list[Numbers], source: Values) -> Numbers:
    """A factor whose channel i is channel start + i // each of another one, with or without its shift."""
    weight, bias = parts[0].weight(), parts[0].bias
    rows = op.const("start") + torch.arange(op.out_channels, device=weight.device) // op.const("each")
    return _factor(op, weight[rows], bias[rows] if op.bias and bias is not None else None)


def _embedded(op: Operator, parts: list[Numbers], source: Values) -> Numbers:
    """A factor on a run of channels, from `start`, as one on more channels."""
    weight, bias = parts[0].weight(), parts[0].bias
    run = slice(op.const("start"), op.const("start") + len(weight))
    factor, shift = weight.new_ones(op.out_channels, *weight.shape[1:]), weight.new_zeros(op.out_channels)
    factor[run] = weight
    shift[run] = 0 if bias is None else bias
    return _factor(op, factor, shift if op.bias else None)


def _unbiased(op: Operator, parts: list[Numbers], source: Values) -> Numbers:
    return parts[0]._replace(bias=None, frame=None)


def _rows(op: Operator, parts: list[Numbers], source: Values) -> Numbers:
    rows = list(op.const("rows"))
    bias, frame = (None if t is None else t[rows] for t in (parts[0].bias, parts[0].frame))
    return Numbers.of(parts[0].weight()[rows], bias, frame=frame)


def _dense(op: Operator, parts: list[Numbers], source: Values) -> Numbers:
    inner, numbers = op.operands[0], parts[0]
    full = op.reads is None and inner.reads is not None
    return Numbers.of(combine.dense(inner, numbers.weight(), op.groups, full), numbers.bias, frame=numbers.frame)


def _sum(op: Operator, parts: list[Numbers], source: Values) -> Numbers:
    """Every branch a term in its place; a sum of sums has the terms of all."""
    shape = (op.out_channels, op.input_width // op.groups, *op.kernel)
    terms = [
        t._replace(weight=combine.dense(b, t.weight, op.groups), place=places(op, b, t.place))
        for b, n in zip(op.operands, parts, strict=True)
        for t in n.terms
    ]
    frame = _laid(op, 1, (n.frame for n in parts), [slice(None)] * len(parts))
    return Numbers(tuple(terms), added(*(n.bias for n in parts)), shape, frame)


def _concat(op: Operator, parts: list[Numbers], source: Values) -> Numbers:
    """Every branch in its rows."""
    ends = accumulate(b.out_channels for b in op.operands)
    rows = [slice(end - b.out_channels, end) for b, end in zip(op.operands, ends, strict=True)]
    weight = _laid(op, op.input_width // op.groups, (n.weight() for n in parts), rows)
    assert weight is not None
    bias = weight.new_zeros(op.out_channels)
    for run, numbers in zip(rows, parts, strict=True):
        bias[run] = 0 if numbers.bias is None else numbers.bias
    return Numbers.of(weight, bias if op.bias else None, frame=_laid(op, 1, (n.frame for n in parts), rows))


def _laid(op: Operator, width: int, tensors: Iterable[Tensor | None], rows: list[slice]) -> Tensor | None:
    """Weights or frames of the branches in one, each in its taps and rows; None where there are none."""
    whole, wide = None, torch.complex128 if op.dtype is not None and op.dtype.is_complex else torch.float64
    for run, branch, tensor in zip(rows, op.operands, tensors, strict=True):
        if tensor is not None:
            whole = tensor.new_zeros(op.out_channels, width, *op.kernel, dtype=wide) if whole is None else whole
            where = (run, slice(None), *places(op, branch))
            whole[where] += tensor
    return whole


LAWS: dict[str, Callable[[Operator, list[Numbers], Values], Numbers]] = {
    "conv": _conv, "product": _product, "batch_norm": _batch_norm, "scale": _scale,
    "pool": _mean, "identity": _mean, "pad": _mean, "select": _mean,
    "compose": chain, "sum": _sum, "concat": _concat, "rows": _rows, "dense": _dense,
    "share": _spread, "embedded": _embedded, "repeated": _spread, "unbiased": _unbiased,
}  # fmt: skip
