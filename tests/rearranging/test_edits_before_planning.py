"""Passes before the plan find their edits first, and make none beside another on a view that is gone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from exactly import exactly
from helpers import randomize
from law_cases import inputs
from safety import model_of
from torch import Tensor, nn
from torch.fx import Graph

import fxfuse
from fxfuse.capture.captured import Captured
from fxfuse.graph_edits import Edit, make_disjoint


def shuffle(x: Tensor, groups: int) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, groups, c // groups, h, w).transpose(1, 2).reshape(b, c, h, w)


def layers() -> dict[str, Any]:
    convs = {name: nn.Conv2d(4, 4, 1) for name in "abc"} | {"pool": nn.AvgPool2d(2), "norm": nn.BatchNorm2d(4)}
    return convs | {"i": torch.tensor([2, 0, 3, 1]), "j": torch.tensor([1, 0, 3, 2])}


NEIGHBOURS: dict[str, tuple[Callable[[Any, Tensor], Tensor], int]] = {
    "pools in turn": (lambda s, x: s.pool(s.b(s.pool(s.a(x.relu())))), 1),
    "pools in turn past a batch norm": (lambda s, x: s.pool(s.norm(s.b(s.pool(s.a(x.relu()))))), 1),
    "pools of two layers of one tensor": (lambda s, x: s.pool(s.a(x)).relu() + s.pool(s.b(x)).abs(), 2),
    "one shuffle after another": (lambda s, x: s.b(shuffle(shuffle(s.a(x).relu(), 2), 2)), 2),
    "a shuffle on each side": (lambda s, x: s.c(shuffle(s.b(shuffle(s.a(x).relu(), 2)).relu(), 2)), 3),
    "indices after indices": (lambda s, x: s.b(s.a(x).relu()[:, s.i][:, s.j]), 2),
    "indices after a shuffle": (lambda s, x: s.b(shuffle(s.a(x).relu(), 2)[:, s.i]), 2),
    "indices past indices": (lambda s, x: s.b(s.a(x).relu()[:, s.i].abs()[:, s.j]), 2),
}


@pytest.mark.parametrize("capture", ["symbolic", "export"])
@pytest.mark.parametrize("name", NEIGHBOURS)
def test_neighbours_are_changed_one_after_the_other(name: str, capture: str) -> None:
    forward, convs = NEIGHBOURS[name]
    net = randomize(model_of(forward, **layers()).double(), integer=True)
    tensors = [t * 16 for t in inputs(4, 2)]  # so that means of four are exact
    exactly(net, *tensors, examples=tensors[0], capture=capture, counts={"conv": convs})


def test_all_edits_are_found_before_the_first_is_made() -> None:
    graph = Graph()
    a, b, c = (graph.placeholder(name) for name in "abc")
    made, captured = list[str](), Captured(graph, nn.Module())

    def find() -> Any:
        for name, nodes in (("one", (a, b)), ("two", (b, c)), ("three", (c,))):
            assert not made
            yield Edit(frozenset(nodes), lambda editor, name=name: made.append(name), name)

    assert [edit.told for edit in make_disjoint(captured, find())] == made == ["one", "three"]
    assert make_disjoint(captured, []) == []


MODULES: dict[str, Callable[[], nn.Module]] = {
    "max pool": lambda: nn.MaxPool2d(3, 1, 1),
    "norm pool": lambda: nn.LPPool2d(2, 2),
    "adaptive pool": lambda: nn.AdaptiveMaxPool2d(2),
    "average pool": lambda: nn.AvgPool2d(2),
    "activation": nn.ReLU,
    "flatten": nn.Flatten,
    "identity": nn.Identity,
    "padding": lambda: nn.ZeroPad2d(1),
    "group norm": lambda: nn.GroupNorm(2, 4),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_called_by_keyword(name: str) -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        out: Tensor = s.m(input=s.n(input=s.a(input=x))) + s.b(input=x).sum()
        return out

    _by_keyword(forward, m=MODULES[name]())


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "max pool": lambda x: torch.nn.functional.max_pool2d(input=x, kernel_size=2),
    "norm pool": lambda x: torch.nn.functional.lp_pool2d(input=x, norm_type=2, kernel_size=2),
    "relu": lambda x: torch.relu(input=x),
    "dropout": lambda x: torch.nn.functional.dropout(input=x, training=False),
    "sum": lambda x: torch.add(input=x, other=x.abs(), alpha=2),
    "concatenation": lambda x: torch.cat(dim=1, tensors=[x, x.abs()]),
    "flip": lambda x: torch.flip(input=x, dims=(1,)),
    "mean": lambda x: torch.mean(input=x, dim=(2, 3), keepdim=True),
    "product": lambda x: torch.matmul(other=x, input=x.transpose(-1, -2)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_called_by_keyword(name: str) -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        return FUNCTIONS[name](s.n(s.a(x))) + s.b(x).sum()

    _by_keyword(forward)


def _by_keyword(forward: Callable[[Any, Tensor], Tensor], **parts: nn.Module) -> None:
    parts |= {"a": nn.Conv2d(4, 4, 1), "b": nn.Conv2d(4, 4, 1), "n": nn.BatchNorm2d(4)}
    net = randomize(model_of(forward, **parts)).double()
    tensors = inputs(4, 2)
    for capture in ("symbolic", "export"):
        exactly(net, *tensors, examples=tensors[0], capture=capture, fires={"conv_bn": 1}, tolerance=1e-10)
    compiled = torch.compile(net, backend="fxfuse", options={"inner": "eager", "strict": True})
    with torch.no_grad():
        assert torch.allclose(compiled(tensors[0]), net(tensors[0]), rtol=1e-10, atol=1e-10)


def test_hooks_are_told_of_keywords() -> None:
    net = randomize(
        model_of(lambda s, x: s.m(input=s.n(s.a(x))), a=nn.Conv2d(4, 4, 1), n=nn.BatchNorm2d(4), m=nn.ReLU())
    )
    told = list[Any]()
    net.m.register_forward_pre_hook(lambda m, args, kwargs: told.append(sorted(kwargs)), with_kwargs=True)
    fused = fxfuse.optimize(net)
    fused(torch.randn(2, 4, 5, 5))
    assert told == [["input"]]
