"""What an executed operator costs. Any cost is a function (operator, output positions) -> number."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

from fxfuse.algebra.operator import Operator

CostFunction = Callable[[Operator, Fraction], float | Fraction]


def macs(op: Operator, positions: Fraction) -> Fraction:
    """Multiply-accumulates of convolutions and linear layers; everything else is free."""
    return op.macs * positions


def params(op: Operator, positions: Fraction) -> Fraction:
    """Stored numbers of convolutions and linear layers."""
    return Fraction(op.params)


def nodes(op: Operator, positions: Fraction) -> Fraction:
    """Every executed operator costs the same: fewest kernels, whatever they compute."""
    return Fraction(1)


COSTS: dict[str, CostFunction] = {"macs": macs, "nodes": nodes, "params": params}


def resolve(cost: str | CostFunction) -> CostFunction:
    """A cost by name, or the callable itself.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    if callable(cost):
        return cost
    if cost not in COSTS:
        raise ValueError(f"unknown cost {cost!r}; known: {', '.join(COSTS)}, or a callable(operator, positions)")
    return COSTS[cost]


def cost_name(cost: str | CostFunction) -> str:
    return cost if isinstance(cost, str) else getattr(cost, "__name__", type(cost).__name__)
