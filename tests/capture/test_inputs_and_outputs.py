"""Inputs and outputs of every shape: several, optional, by keyword; dicts, dataclasses, named tuples; state."""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from flows import called, pairs, same, same_calls, tensors
from safety import pickled
from torch import Tensor, nn

import fxfuse

Forward = Callable[..., Any]


class Named(NamedTuple):
    y: Tensor
    x: Tensor
    count: int = 3


@dataclasses.dataclass
class Data:
    y: Tensor
    x: Tensor | None = None
    count: int = 3


@dataclasses.dataclass
class Output(OrderedDict):  # type: ignore[type-arg]
    """A dataclass that is a dict as well, as transformers return them."""

    y: Tensor | None = None
    x: Tensor | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None:
                self[field.name] = value


class Items(dict):  # type: ignore[type-arg]
    """A dict whose items are attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


OUTPUTS: dict[str, Forward] = {
    "tensor": lambda s, x: s.one(x),
    "tuple": lambda s, x: (s.one(x), x),
    "nested": lambda s, x: [{"a": (s.one(x), [x, s.two(x)])}, None, 2],
    "named tuple": lambda s, x: Named(s.one(x), x),
    "named tuple by keyword": lambda s, x: Named(x=x, y=s.one(x), count=4),
    "dataclass": lambda s, x: Data(s.one(x), x),
    "dataclass with defaults": lambda s, x: Data(y=s.one(x)),
    "dataclass in a dict": lambda s, x: {"d": Data(y=s.one(x)), "n": Named(s.two(x), x)},
    "dict": lambda s, x: {"y": s.one(x), "x": x, "name": "y"},
    "OrderedDict": lambda s, x: OrderedDict(y=s.one(x), x=x),
    "dict of its own class": lambda s, x: Items(y=s.one(x), x=x),
    "dataclass and dict": lambda s, x: Output(y=s.one(x), x=x),
    "dataclass and dict, one of them": lambda s, x: Output(x=s.one(x)),
    "sizes": lambda s, x: (s.one(x), x.shape, x.size(0), x.ndim, x.dtype),
    "a parameter": lambda s, x: (s.one(x), s.two[0].weight),
    "nothing": lambda s, x: (s.one(x), None)[1],
    "the input": lambda s, x: (s.one(x), x)[1],
    "the same twice": lambda s, x: (lambda y: (y, y))(s.one(x)),
}


@pytest.mark.parametrize("case", OUTPUTS)
def test_outputs(case: str) -> None:
    unread = case in ("nothing", "the input")  # what nobody reads is not computed
    same_calls(pairs(OUTPUTS[case]), called(lambda x: ((x,), {})), fires=not unread)


def test_outputs_of_modules_inside() -> None:
    for make in (Data, Output, Named, lambda y, x: Items(y=y, x=x), lambda y, x: OrderedDict(y=y, x=x)):
        inner = pairs(lambda s, x, make=make: make(s.one(x), x))
        outer = pairs(lambda s, x: s.two(s.inner(x)["y"]), inner=inner)
        if make in (Data, Named):
            outer = pairs(lambda s, x: s.two(s.inner(x).y), inner=inner)
        same_calls(outer, called(lambda x: ((x,), {})), fires=True)


INPUTS: dict[str, tuple[Forward, tuple[Callable[..., Any], ...]]] = {
    "two": (lambda s, x, y: s.one(x) + s.two(y), (lambda x, y: ((x, y), {}),)),
    "two by keyword": (lambda s, x, y: s.one(x) - s.two(y), (lambda x, y: ((), {"y": y, "x": x}),)),
    "the same twice": (lambda s, x, y: s.one(x) - s.two(y), (lambda x, y: ((x, x), {}),)),
    "one unused": (lambda s, x, y: s.one(x), (lambda x, y: ((x, None), {}), lambda x, y: ((x,), {"y": 3}))),
    "keyword only": (lambda s, x, *, y: s.one(x) + y, (lambda x, y: ((x,), {"y": y}),)),
    "a number": (lambda s, x, n: s.one(x) * n, (lambda x, y: ((x, 2), {}), lambda x, y: ((x, 0.5), {}))),
    "a default that is arithmetic": (
        lambda s, x, n=2.0: s.one(x) * n,
        (lambda x, y: ((x,), {}), lambda x, y: ((x, 3.0), {}), lambda x, y: ((x,), {"n": 4})),
    ),
    "a keyword that is arithmetic": (
        lambda s, x, *, n=2.0: s.one(x) * n,
        (lambda x, y: ((x,), {}), lambda x, y: ((x,), {"n": 3.0})),
    ),
    "*args": (lambda s, *xs: s.one(xs[0]) + xs[1], (lambda x, y: ((x, y), {}),)),
    "**kwargs": (lambda s, x, **more: s.one(x) + more["y"], (lambda x, y: ((x,), {"y": y, "z": 1}),)),
    "**kwargs with get": (
        lambda s, x, **more: s.one(x) * more.get("n", 1),
        (lambda x, y: ((x,), {}), lambda x, y: ((x,), {"n": 3.0})),
    ),
    "all but *args": (
        lambda s, x, /, y, *, n=2, **rest: s.one(x) * n + s.two(y) + rest["z"],
        (lambda x, y: ((x, y), {"z": 1}), lambda x, y: ((x,), {"y": y, "n": 3, "z": 2})),
    ),
    "a list": (lambda s, xs: s.one(xs[0]) + s.two(xs[1]), (lambda x, y: (([x, y],), {}), lambda x, y: (((x, y),), {}))),
    "a dict": (lambda s, d: s.one(d["x"]) + d["y"], (lambda x, y: (({"x": x, "y": y},), {}),)),
    "a dict with get": (lambda s, d: s.one(d["x"]) * d.get("n", 2), (lambda x, y: (({"x": x},), {}),)),
    "a dataclass": (lambda s, d: s.one(d.y) + d.x * d.count, (lambda x, y: ((Data(x, y),), {}),)),
    "a named tuple": (lambda s, d: s.one(d.y) + d[1] * d.count, (lambda x, y: ((Named(x, y),), {}),)),
    "written": (lambda s, x, y: (y.add_(s.one(x)), s.two(x))[1], (lambda x, y: ((x, y), {}),)),
}


@pytest.mark.parametrize("case", INPUTS)
def test_inputs(case: str) -> None:
    forward, builders = INPUTS[case]
    same_calls(pairs(forward), called(*builders, count=2), fires=True)


class EvalReturnsNone(nn.Module):
    """Written by somebody who forgot the `return self`."""

    def __init__(self) -> None:
        super().__init__()
        self.body = pairs(lambda s, x: s.one(x) + s.two(x)).eval()

    def eval(self) -> Any:
        super().eval()

    def forward(self, x: Tensor) -> Any:
        return self.body(x)


def test_a_model_whose_eval_returns_nothing() -> None:
    model = EvalReturnsNone()
    model.eval()
    fused = same_calls(model, called(lambda x: ((x,), {})), fires=True)
    assert not any(m.training for m in fused.modules())


def counts(self: Any, x: Tensor) -> Any:
    self.calls += 1
    return self.one(x) * self.calls


def remembers(self: Any, x: Tensor) -> Any:
    y = self.one(x) + self.last
    self.last.copy_(y.mean((0, 2, 3), keepdim=True))
    return y


def averages(self: Any, x: Tensor) -> Any:
    self.last.mul_(0.5).add_(x.mean((0, 2, 3), keepdim=True), alpha=0.5)
    return self.one(x) - self.last, self.calls + 1


@pytest.mark.parametrize("forward", [counts, remembers, averages])
def test_state_in_buffers_is_kept_from_call_to_call(forward: Forward) -> None:
    buffers = {"calls": torch.zeros((), dtype=torch.long), "last": torch.zeros(1, 4, 1, 1)}
    model = pairs(forward, **buffers)
    calls = called(lambda x: ((x,), {}))
    fused = same_calls(model, calls, fires=True)
    with torch.no_grad():
        for args, kwargs in calls:
            copied = copy.deepcopy(fused)  # with the state it has now
            same(copied(*args, **kwargs), fused(*args, **kwargs))
            same(copied.state_dict(), fused.state_dict())


class Whole(nn.Module):
    """Of this module, so that it can be pickled, with an output of a class of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = pairs(lambda s, x: s.one(x)).one.eval()

    def forward(self, x: Tensor, *, scale: float = 2.0) -> Output:
        return Output(y=self.body(x) * scale, x=x)


def test_the_result_keeps_its_containers_when_it_is_pickled() -> None:
    model = Whole().eval()
    fused = fxfuse.optimize(model)
    for (x,) in tensors():
        for candidate in (fused, pickled(fused), copy.deepcopy(fused)):
            same(candidate(x, scale=3.0), model(x, scale=3.0))
