"""Channels taken by a constant tensor of indices: a layer takes them, and other indices are never missed."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from exactly import exactly
from helpers import count, randomize
from law_cases import integers
from torch import Tensor, nn

import fxfuse

Forward = Callable[[Any, Tensor], Tensor]
ORDER = torch.tensor([2, 0, 5, 1, 4, 3])


class Indexing(nn.Module):
    def __init__(self, forward: Forward, order: Tensor = ORDER) -> None:
        super().__init__()
        self.act = forward
        self.a, self.n, self.c = nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 5, 3, padding=1)
        self.g, self.d = nn.Conv2d(6, 6, 1, groups=2), nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.register_buffer("order", order.clone())
        self.register_buffer("hidden", order.clone(), persistent=False)
        self.plain = order.clone()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self, x)


def made(forward: Forward, order: Tensor = ORDER) -> nn.Module:
    model = Indexing(forward, order)
    for name, dtype in (("order", torch.int64), ("hidden", torch.int64)):
        setattr(model, name, getattr(model, name).to(dtype))
    return randomize(model.double(), seed=5, integer=True)


def run(forward: Forward, order: Tensor = ORDER, **options: Any) -> Any:
    model = made(forward, order)
    tensors = integers((2, 4, 5, 7)), integers((3, 4, 4, 3), 1)
    fused = exactly(model, *tensors, **options)
    return fused, count(fused, tensors[1])


def stays(counts: Any) -> bool:
    return bool(counts["index"] or counts["index_select"])


def made_here(s: Any, x: Tensor) -> Tensor:
    return s.c(s.n(s.a(x)).relu()[:, torch.tensor([2, 0, 5, 1, 4, 3])])


TAKEN: dict[str, Forward] = {
    "a buffer": lambda s, x: s.c(s.n(s.a(x)).relu()[:, s.order]),
    "a hidden buffer": lambda s, x: s.c(s.n(s.a(x)).relu()[:, s.hidden]),
    "an attribute": lambda s, x: s.c(s.n(s.a(x)).relu()[:, s.plain]),
    "a list made into a tensor": made_here,
    "index_select": lambda s, x: s.c(torch.index_select(s.n(s.a(x)).relu(), 1, s.order)),
    "the method": lambda s, x: s.c(s.n(s.a(x)).relu().index_select(-3, s.order)),
    "computed of a buffer": lambda s, x: s.c(s.n(s.a(x)).relu()[:, s.order.flip(0)]),
    "other axes": lambda s, x: s.c(s.n(s.a(x)).relu()[:, s.order, :, :]),
    "after a layer": lambda s, x: s.n(s.a(x))[:, s.order].relu(),
    "past a depthwise layer": lambda s, x: s.c(s.d(s.n(s.g(s.a(x).relu())).relu()[:, s.order]).relu()),
}
STAYS: dict[str, Forward] = {
    "a mask": lambda s, x: s.c(s.n(s.a(x)).relu()[:, s.order >= 0]),
    "another axis": lambda s, x: s.c(s.n(s.a(x)).relu()[:, :, s.order % 2]),
    "two axes": lambda s, x: s.c(s.n(s.a(x)).relu()[:, s.order.reshape(6, 1), s.order % 2].sum(3)[..., None].relu()),
    "indices of the input": lambda s, x: s.c(s.n(s.a(x)).relu()[:, (x.mean() > 9).long() + s.order % 5]),
    "groups on both sides": lambda s, x: s.g(s.g(s.n(s.a(x)).relu()).relu()[:, s.order]).relu(),
}


@pytest.mark.parametrize("capture", ["symbolic", "export"])
@pytest.mark.parametrize("name", TAKEN)
def test_a_layer_takes_it(name: str, capture: str) -> None:
    _, counts = run(TAKEN[name], examples=torch.ones(2, 4, 5, 7).double(), capture=capture)
    assert not stays(counts)


@pytest.mark.parametrize("name", STAYS)
def test_what_stays(name: str) -> None:
    fused, counts = run(STAYS[name])
    assert stays(counts)
    told = [r for r in fxfuse.report(fused).refused if "a permutation of channels stays" in r.reason]
    assert len(told) == (name == "groups on both sides")


@pytest.mark.parametrize("order", [[4, 1, 1, 0, 4, 4], [-1, 0, -3, 2, 1, 5]])
def test_repeated_and_from_the_end(order: list[int]) -> None:
    _, counts = run(TAKEN["a buffer"], torch.tensor(order))
    assert not stays(counts)


def test_some_channels() -> None:
    _, counts = run(lambda s, x: s.n(s.a(x))[:, s.order].relu(), torch.tensor([4, 1]))
    assert not stays(counts)


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 6], [0, 1, 2, 3, 4, -1]])
def test_what_eager_refuses_is_refused_alike(order: list[int]) -> None:
    model = made(TAKEN["index_select"], torch.tensor(order))
    fused = fxfuse.optimize(model)
    for module in (model, fused):
        with pytest.raises((IndexError, RuntimeError), match=r"out of .*(range|bounds)"):
            module(torch.ones(1, 4, 3, 3).double())


@pytest.mark.parametrize("name", ["a buffer", "an attribute", "computed of a buffer", "past a depthwise layer"])
def test_other_indices_are_an_error_at_refresh(name: str) -> None:
    model = made(TAKEN[name])
    fused = fxfuse.optimize(model)
    assert "order" not in fused.state_dict()
    x = torch.randint(-3, 4, (2, 4, 5, 7)).double()
    with torch.no_grad():
        model.a.weight.add_(1)
        assert torch.equal(fxfuse.refresh(fused, model)(x), model(x))
        before = fused(x)
        for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
            getattr(model, "plain" if name == "an attribute" else "order").copy_(torch.arange(6))
            with pytest.raises(ValueError, match="holds other values than the graph was made for"):
                fxfuse.refresh(other, model)
            assert torch.equal(other(x), before)
        assert torch.equal(fxfuse.optimize(model)(x), model(x))


@pytest.mark.parametrize("check", ["full", "identity"])
@pytest.mark.parametrize("freeze", ["auto", False, True])
def test_compiled_graphs_follow_the_indices(freeze: Any, check: str) -> None:
    torch._dynamo.reset()
    model = made(TAKEN["past a depthwise layer"])
    options = {"inner": "eager", "freeze": freeze, "strict": True, "check": check}
    compiled = torch.compile(model, backend="fxfuse", options=options, dynamic=False)
    x = torch.randint(-3, 4, (2, 4, 5, 7)).double()
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))
        (report,) = fxfuse.report(compiled)
        assert "index" not in str(report.after.ops) and "getitem" not in str(report.after.ops)
        for order in (torch.arange(6), torch.tensor([5, 0, 1, 2, 3, 3]), ORDER, torch.tensor([0, 0, 0, 0, 0, -1])):
            if check == "full":
                model.order.copy_(order)
            else:
                model.order = order.clone()
            model.a.weight.add_(1)
            if check == "identity":
                model.a.weight = nn.Parameter(model.a.weight + 1)
            assert torch.equal(compiled(x), model(x))
