"""Sums of several tensors: branches of one of them merge wherever they stand in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from affine_trees import CONVS, NORMS
from exactly import MISSED, exactly
from helpers import randomize
from law_cases import counted, inputs
from safety import model_of
from torch import Tensor
from torch.utils._pytree import tree_leaves

import fxfuse

Forward = Callable[[Any, Tensor, Tensor], Tensor]


def parts(rank: int) -> dict[str, Any]:
    conv, norm = CONVS[rank], NORMS[rank]
    layers = {n: conv(4, 4, 3, padding=1) for n in "ad"} | {n: conv(4, 4, 1) for n in "bc"}
    return {**layers, "n": norm(4), "g": conv(4, 4, 3, padding=1, groups=4), "p": conv(4, 4, 3, padding=1)}


def model(forward: Forward, rank: int = 2) -> Any:
    return randomize(model_of(lambda s, x: forward(s, x, x.relu()), **parts(rank)).double(), integer=True)


def in_place(s: Any, x: Tensor, y: Tensor) -> Tensor:
    out: Tensor = s.c(x)
    out += s.a(y)
    out += s.n(s.b(y))
    return out


def written(s: Any, x: Tensor, y: Tensor) -> Tensor:
    first = s.c(x).relu()
    out: Tensor = first + s.a(y)
    first.add_(1)
    return out + s.b(y) + first


def between(s: Any, x: Tensor, y: Tensor) -> Tensor:
    one = s.a(y)
    out: Tensor = s.c(x) + one
    one.mul_(2)
    return out + s.b(y)


def kept(s: Any, x: Tensor, y: Tensor) -> Tensor:
    inner = s.c(x).relu() + s.a(y)
    out: Tensor = inner + s.b(y)
    return out * inner.sigmoid().round()


def measured(s: Any, x: Tensor, y: Tensor) -> Tensor:
    inner = s.c(x).relu() + s.a(y)
    return (inner + s.b(y)) * inner.size(0)


def written_twice(s: Any, x: Tensor, y: Tensor) -> Tensor:
    out = x.sign() + s.a(y) + s.b(y)
    out.add_(s.c(out))
    out += s.p(out)
    return out


MERGED: dict[str, tuple[Forward, str]] = {
    "a shortcut first": (lambda s, x, y: s.c(x).relu() + s.a(y) + s.n(s.b(y)), "conv 2 add 1"),
    "a shortcut between": (lambda s, x, y: s.a(y) + s.c(x).relu() + s.b(y), "conv 2 add 1"),
    "two tensors in turn": (lambda s, x, y: s.c(x) + s.a(y) + s.d(x) + s.b(y), "conv 2 add 1"),
    "the tensor itself": (lambda s, x, y: y + x.sign() + s.a(y), "conv 1 add 1"),
    "its batch norm": (lambda s, x, y: s.a(y) + x.sign() + s.n(y), "conv 1 add 1"),
    "in place": (in_place, "conv 3 add 2"),
    "a list": (lambda s, x, y: sum([s.a(y), x.sign(), s.b(y), s.n(y)]), "conv 1 add 1"),
    "two trees": (lambda s, x, y: s.a(y) + (x.sign() + (s.b(y) + (x.abs() + s.n(y)))), "conv 1 add 2"),
    "a row beside them": (lambda s, x, y: s.a(y) + x.sign().mean(-1, keepdim=True).round() + s.b(y), "conv 1 add 1"),
    "a batch of sums": (lambda s, x, y: s.a(y) + torch.stack([x, x]).sign() + s.b(y), "conv 1 add 1"),
    "what is written later": (written, "conv 3 add 4"),
    "what is written between": (between, "conv 3 add 2"),
    "a sum that is read elsewhere": (kept, "conv 3 add 2"),
    "what would cost more": (lambda s, x, y: s.g(y) + x.sign() + s.b(y), "conv 2 add 2"),
    "twice the sum": (lambda s, x, y: (lambda z: z + z)(x.sign() + s.a(y) + s.b(y)), "conv 1 add 2"),
    "twice a part": (lambda s, x, y: (lambda z: z + (z + s.b(y)))(x.sign() + s.a(y)), "conv 2 add 3"),
    "differences": (lambda s, x, y: s.a(y) - x.sign() - s.b(y), "conv 2"),
}


@pytest.mark.parametrize("capture", ["symbolic", "export"])
@pytest.mark.parametrize("name", MERGED)
def test_sums_of_several_tensors(name: str, capture: str) -> None:
    forward, executed = MERGED[name]
    tensors, counts = inputs(4, 2), counted(executed)
    exactly(model(forward), *tensors, examples=tensors[0], capture=capture, counts=counts, of=("conv", "add"))


@pytest.mark.parametrize("rank", [1, 3])
def test_other_ranks(rank: int) -> None:
    net, tensors = model(MERGED["two tensors in turn"][0], rank), inputs(4, rank)
    for examples in (None, tensors[0]):
        exactly(net, *tensors, examples=examples, counts={"conv": 2})


@pytest.mark.parametrize("capture", ["symbolic", "export"])
def test_a_sum_that_is_written_and_read_stays(capture: str) -> None:
    tensors = inputs(4, 2)
    without = MISSED if capture == "export" else None
    exactly(model(written_twice), *tensors, examples=tensors[0], capture=capture, counts={"conv": 4}, without=without)


def test_a_sum_whose_size_is_asked_stays() -> None:
    exactly(model(measured), *inputs(4, 2), counts={"conv": 3})


def test_it_is_done_once_and_new_weights_are_followed() -> None:
    net, tensors = model(MERGED["a list"][0]), inputs(4, 2)
    fused = fxfuse.optimize(net)
    assert not fxfuse.report(fxfuse.optimize(fused)).fired
    with torch.no_grad():
        net.a.weight.mul_(-3)
    fxfuse.refresh(fused, net)
    assert all(torch.equal(fused(x), net(x)) for x in tensors)


def _sum(s: Any, x: Tensor, y: Tensor) -> Tensor:
    out: Tensor = x.sign() + s.a(y) + s.b(y)
    return out


AGAIN: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "y + v + v": lambda v, y: y + v + v,
    "v + y + v": lambda v, y: v + y + v,
    "v + (v + y)": lambda v, y: v + (v + y),
    "0 + v + v + v": lambda v, y: 0 + v + v + v,
    "sum([v, v, v])": lambda v, y: sum([v, v, v]),
    "sum([v, y, v])": lambda v, y: sum([v, y, v]),
    "y + v + v + v": lambda v, y: y + v + v + v,
    "two sums": lambda v, y: (y + v) * (v + y.abs()),
    "sums of sums": lambda v, y: (y.abs() + v) + (v + y),
    "joins": lambda v, y: torch.cat([v, v + y, v], 1),
    "the value itself": lambda v, y: (v, y + v + v),
}


@pytest.mark.parametrize("capture", ["symbolic", "export"])
@pytest.mark.parametrize("name", AGAIN)
def test_a_regrouped_sum_that_is_read_again(name: str, capture: str) -> None:
    net = model(lambda s, x, y: AGAIN[name](_sum(s, x, y), y.sign()))  # type: ignore[no-any-return]
    tensors = inputs(4, 2)
    exactly(net, *tensors, examples=tensors[0], capture=capture, counts={"conv": 1})


@pytest.mark.parametrize("name", AGAIN)
def test_a_regrouped_sum_that_is_read_again_compiled(name: str) -> None:
    net, tensors = model(lambda s, x, y: AGAIN[name](_sum(s, x, y), y.sign())), inputs(4, 2)  # type: ignore[no-any-return]
    compiled = torch.compile(net, backend="fxfuse", options={"inner": "eager", "strict": True})
    with torch.no_grad():
        for x in (*tensors, *tensors[:1]):
            assert all(map(torch.equal, tree_leaves(compiled(x)), tree_leaves(net(x))))


def test_two_sums_of_which_one_ends_in_the_other() -> None:
    def forward(s: Any, x: Tensor, y: Tensor) -> Tensor:
        inner = _sum(s, x, y)
        outer: Tensor = inner + s.c(x) + inner.relu() + s.d(x)
        return outer

    exactly(model(forward), *inputs(4, 2), counts={"conv": 2})
