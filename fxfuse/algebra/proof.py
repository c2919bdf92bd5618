"""Equality of two expressions in the weights, shown for all weights without reading any.

Both sides are arithmetic in the weights, and in terms that count as weights of their own where they
are not arithmetic (`relu(b)`). So they are compared at random points: two different functions of that
kind agree on a random point with probability zero.
"""

from __future__ import annotations

import zlib
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fxfuse.algebra.constants import Apply, Attr, Const, Sequence, Values, evaluate, leaves
from fxfuse.algebra.numbers import compute
from fxfuse.algebra.operator import Operator
from fxfuse.algebra.terms import double
from fxfuse.names import plain

POINTS = 4
ARITHMETIC = set(
    "add sub mul div neg truediv true_divide multiply subtract divide negative rsub sqrt rsqrt square pow reciprocal "
    "sum mean matmul mm mv dot view reshape flatten unsqueeze squeeze expand expand_as permute transpose t getitem "
    "detach clone contiguous to type_as double cat stack zeros_like ones_like alias lift_fresh_copy".split()
)


@lru_cache(maxsize=1024)
def bias_is(op: Operator, value: Const) -> bool:
    """Whether the bias of `op` equals `value` on every channel, whatever the weights are."""
    op, value = _arithmetic(op), _terms(value)
    variances = {a.path for o in _leaves(op) if o.law == "batch_norm" for a in leaves(o.const("var"))}
    return all(_equal(op, value, _point(number, variances)) for number in range(POINTS))


def _equal(op: Operator, value: Const, values: Values) -> bool:
    bias = compute(op, values).bias
    if bias is None:
        bias = torch.zeros(op.out_channels, dtype=torch.float64)
    expected = double(evaluate(value, values)).reshape(-1)
    same_count = expected.numel() in (1, bias.numel())
    return same_count and bool(torch.allclose(bias, bias.new_zeros(()) + expected, rtol=1e-10, atol=1e-12))


def _point(number: int, variances: set[str]) -> Values:
    """Random weights of both signs, or sqrt(b * b) would pass for b; only variances are positive."""

    def positive(attr: Attr, of: str) -> Tensor:  # that depends on the path of the leaf alone
        generator = torch.Generator().manual_seed(zlib.crc32(f"{of}{attr.path}@{number}".encode()))
        return torch.rand(attr.shape, generator=generator, dtype=torch.float64) + 0.5

    def values(attr: Attr) -> Tensor:
        size = positive(attr, "")
        return size if attr.path in variances else torch.where(positive(attr, "sign of ") < 1, -size, size)

    return values


def _leaves(op: Operator) -> list[Operator]:
    return [leaf for o in op.operands for leaf in _leaves(o)] if op.operands else [op]


def _arithmetic(op: Operator) -> Operator:
    """`op` with each of its constants in arithmetic `_terms`."""
    consts = tuple((name, _terms(const)) for name, const in op.consts)
    return replace(op, consts=consts, operands=tuple(_arithmetic(o) for o in op.operands))


def _terms(const: Any) -> Any:
    """`const` with every call that is not arithmetic replaced by an unknown named after the whole call."""
    if isinstance(const, Sequence):
        return replace(const, items=tuple(_terms(i) for i in const.items))
    if not isinstance(const, Apply):
        return const
    if plain(const.function).strip("_") not in ARITHMETIC:
        return Attr(repr(const), const.shape, const.dtype)
    kwargs = tuple((k, _terms(v)) for k, v in const.kwargs)
    return replace(const, args=tuple(_terms(a) for a in const.args), kwargs=kwargs)
