"""Expressions in the weights: one object for one expression, each part computed once, however they are shared."""

from __future__ import annotations

import copy
import operator
import pickle
from collections.abc import Callable
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor

from fxfuse.algebra.constants import Apply, Attr, Place, Sequence, evaluate, freeze, leaves
from fxfuse.algebra.expressions import operands_first
from fxfuse.algebra.program import Program, Step

F64 = torch.float64
W, V = Attr("w", (3, 3), F64), Attr("v", (3, 3), F64)
STEPS = 3000


def apply(function: Any, *args: Any, **kwargs: Any) -> Apply:
    return Apply(function, freeze(args).items, tuple((k, freeze(v)) for k, v in kwargs.items()), (3, 3), F64)


def values(attr: Attr) -> Tensor:
    return torch.arange(9.0, dtype=F64).reshape(3, 3) - (4 if attr.path == "w" else 2)


def doubled(steps: int, start: Any = W) -> Apply:
    """Each step reads the one before it twice: as a tree it has 2**steps leaves."""
    for _ in range(steps):
        start = apply(torch.sub, apply(torch.add, start, start), apply("clone", start))
    return start


def chained(steps: int) -> Apply:
    total: Any = W
    for number in range(steps):
        total = apply("add", total, number % 3)
    return total


def listed(steps: int) -> Apply:
    total: Any = W
    for _ in range(steps):
        total = apply("sum", apply(torch.stack, [total, total, V]), 0)
    return total


BUILT: dict[str, Callable[[int], Apply]] = {"read twice": doubled, "a chain": chained, "in lists": listed}


@pytest.mark.parametrize("how", BUILT)
def test_the_same_expression_is_the_same_object(how: str) -> None:
    one, two, other = BUILT[how](60), BUILT[how](60), BUILT[how](59)
    assert one is two
    assert len({one, two, other}) == 2 and one != other


@pytest.mark.parametrize("how", BUILT)
def test_thousands_of_steps_are_as_good_as_one(how: str) -> None:
    deep = BUILT[how](STEPS)
    assert leaves(deep) == ((W, V) if how == "in lists" else (W,))
    assert len(operands_first(deep)) == {"read twice": 3, "a chain": 1, "in lists": 2}[how] * STEPS
    assert evaluate(deep, values).shape == (3, 3)
    assert hash(deep) == hash(BUILT[how](STEPS))
    assert pickle.loads(pickle.dumps(deep)) is deep and copy.deepcopy(deep) is deep
    assert len(repr(deep)) < 200


@pytest.mark.parametrize("how", BUILT)
def test_what_nobody_holds_is_forgotten(how: str) -> None:
    deep = BUILT[how](STEPS)
    parts = [ref(p) for p in operands_first(deep)]
    del deep
    assert not [p for p in parts if p() is not None]


@pytest.mark.parametrize(
    ("one", "other"),
    [(1, True), (1, 1.0), (0.0, -0.0), ([1, 2], (1, 2)), ([1], [True]), (slice(0, 1), slice(False, 1)), (1j, 1.0)],
)
def test_arguments_that_are_equal_but_not_alike_are_told_apart(one: Any, other: Any) -> None:
    assert apply("sum", W, one) is not apply("sum", W, other)
    assert apply("sum", W, one) is apply("sum", W, one)
    assert apply("sum", W, dim=one) is not apply("sum", W, dim=other)


def test_a_sign_of_zero_is_kept() -> None:
    plus, minus = (apply(torch.copysign, W, zero) for zero in (0.0, -0.0))
    assert torch.equal(evaluate(plus, values), values(W).abs())
    assert torch.equal(evaluate(minus, values), -values(W).abs())


def test_every_part_is_computed_once() -> None:
    calls: list[int] = []

    def counted(left: Tensor, right: Tensor) -> Tensor:
        calls.append(1)
        return (left + right).clamp(-9, 9)

    total: Any = W
    expected = values(W)
    for _ in range(50):
        total, expected = apply(counted, total, total), (expected + expected).clamp(-9, 9)
    assert torch.equal(evaluate(total, values), expected)
    assert len(calls) == 50


def test_no_more_is_held_than_is_still_read() -> None:
    alive: list[Any] = []
    most = 0

    def watched(one: Tensor, other: Tensor) -> Tensor:
        nonlocal most
        result = one * 1.0
        alive.append(ref(result))
        most = max(most, sum(r() is not None for r in alive))
        return result

    one: Any = W
    two: Any = V
    for _ in range(40):
        one, two = two, apply(watched, one, two)
    evaluate(two, values)
    assert most <= 3


def test_leaves_are_in_the_order_in_which_they_are_written() -> None:
    inner = apply("mul", V, W)
    assert leaves(apply("add", W, inner)) == (W, V)
    assert leaves(apply("add", inner, W)) == (V, W)
    assert leaves(apply(torch.cat, [inner, W], dim=0)) == (V, W)
    assert leaves(freeze([W, [V]])) == (W, V) and leaves(3) == ()


def test_numbers_and_lists_of_constants_are_evaluated_too() -> None:
    assert evaluate(2.5, values) == 2.5 and evaluate(None, values) is None
    first, number = evaluate(freeze([W, 2]), values)
    assert torch.equal(first, values(W)) and number == 2
    assert evaluate(Sequence(slice, (1, None, 2)), values) == slice(1, None, 2)


def test_nested_lists_of_numbers_can_be_arguments() -> None:
    table = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]]
    made = Apply(torch.tensor, freeze([table]).items, (("dtype", F64),), (3, 3), F64)
    assert torch.equal(evaluate(made, values), torch.tensor(table, dtype=F64))
    assert made is pickle.loads(pickle.dumps(made))


def test_an_expression_never_changes() -> None:
    made = apply("clone", W)
    with pytest.raises(AttributeError, match="never changes"):
        made.shape = (1,)
    with pytest.raises(TypeError, match="unhashable"):
        Apply("clone", (W, {}), (), (3, 3), F64)


def test_a_program_writes_a_copy() -> None:
    program = Program((Step(operator.setitem, (Place(0), 0, Place(1)), ()), Step("mul_", (Place(0), 2), ())))
    start, row = values(W), values(V)[1]
    kept = start.clone()
    result = program(start, row)
    assert torch.equal(start, kept) and torch.equal(result, torch.stack([row, kept[1], kept[2]]) * 2)
    assert result.data_ptr() != program(start, row).data_ptr()
    assert hash(program) == hash(pickle.loads(pickle.dumps(program)))
