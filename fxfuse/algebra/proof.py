"""Equality of two expressions in the weights, shown for all weights without reading any.

Both sides are arithmetic in the weights, and in terms that count as weights of their own where they
are not arithmetic (`relu(b)`). So they are compared at random points: two different functions of that
kind agree on a random point with probability zero.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fxfuse.algebra.constants import Const, Values, evaluate
from fxfuse.algebra.expressions import Apply, Attr, leaves, operands_first, rebuilt
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
    terms = _terms([value, *_consts(op)])
    op, value = _arithmetic(op, terms), terms[value] if isinstance(value, Apply) else value
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


def _consts(op: Operator) -> list[Any]:
    return [c for _, c in op.consts] + [c for o in op.operands for c in _consts(o)]


def _arithmetic(op: Operator, terms: Mapping[Any, Any]) -> Operator:
    """`op` with each of its constants in arithmetic `terms`."""
    consts = tuple((name, terms[const] if isinstance(const, Apply) else const) for name, const in op.consts)
    return replace(op, consts=consts, operands=tuple(_arithmetic(o, terms) for o in op.operands))


def _terms(consts: Iterable[Any]) -> dict[Any, Any]:
    """Each expression in `consts`, and below, with every call that is not arithmetic replaced by an unknown."""
    terms: dict[Any, Any] = {}
    for const in operands_first(*consts):
        known = plain(const.function).strip("_") in ARITHMETIC
        unknown = Attr(f"..{len(terms)}", const.shape, const.dtype)  # no path of a model has two dots
        terms[const] = rebuilt(const, terms.__getitem__) if known else unknown
    return terms
