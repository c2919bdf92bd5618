"""Models that no one graph can hold: they behave as before, and what is inside of them is optimized.

Python's control flow on shapes and on data, state in attributes, modes, optional inputs: `optimize` never
refuses them, and the result does in every later call what the model does.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable
from types import MethodType
from typing import Any

import numpy
import pytest
import torch
from flows import Call, called, pairs, same, same_calls, tensors
from torch import Tensor, nn

import fxfuse

Forward = Callable[..., Any]


def one_input(x: Tensor) -> Call:
    return (x,), {}


def branch(self: Any, x: Tensor) -> Any:
    return self.one(x) if x.shape[0] > 1 else self.two(x)


def branch_on_size(self: Any, x: Tensor) -> Any:
    x = self.one(x)
    if x.shape[-1] > 5:
        x = self.two(x)
    return x + 1


def branch_on_data(self: Any, x: Tensor) -> Any:
    y = self.one(x)
    return self.two(y) if y.sum() > 0 else self.side(y)


def branch_on_rank(self: Any, x: Tensor) -> Any:
    if x.dim() == 3:
        x = x[None]
    return self.one(x)


def branch_on_type(self: Any, x: Any) -> Any:
    if isinstance(x, (list, tuple)):
        return [self.one(part) for part in x]
    return self.one(x)


def samples(self: Any, x: Tensor) -> Any:
    return torch.stack([self.one(sample[None])[0] for sample in x])


def until(self: Any, x: Tensor) -> Any:
    steps = 0
    while x.abs().max() > 0.5 and steps < 4:
        x, steps = self.one(x).tanh() * 0.5, steps + 1
    return self.two(x), steps


def length(self: Any, x: Tensor) -> Any:
    return self.one(x) * len(x) + int(x.sum() > 0)


def item(self: Any, x: Tensor) -> Any:
    return self.one(x) * x.max().item()


def tries(self: Any, x: Tensor) -> Any:
    try:
        return self.one(x).view(3, -1)
    except RuntimeError:
        return self.two(x)


def generator(self: Any, x: Tensor) -> Any:
    return tuple(self.one(part) for part in x.split(1))


def default_dict(self: Any, x: Tensor) -> Any:
    found: Any = defaultdict(list)
    found["y"].append(self.one(x))
    found["y"].append(self.two(x))
    return found


def no_grad(self: Any, x: Tensor) -> Any:
    with torch.no_grad():
        y = self.one(x)
    return self.two(y)


def autocast(self: Any, x: Tensor) -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
        return self.one(x)


@torch.inference_mode()
def inference(self: Any, x: Tensor) -> Any:
    return self.one(x)


def counter(self: Any, x: Tensor) -> Any:
    self.calls += 1
    return self.one(x) * self.calls


def remembers(self: Any, x: Tensor) -> Any:
    y = self.one(x)
    y = y if self.last is None else y + self.last.mean()
    self.last = y
    return y


def collects(self: Any, x: Tensor) -> Any:
    self.seen.append(tuple(x.shape))
    return self.one(x) * len(self.seen), list(self.seen)


def memo_by_size(self: Any, x: Tensor) -> Any:
    if x.shape[-1] not in self.memo:
        self.memo[x.shape[-1]] = torch.arange(x.shape[-1]).double()
    return self.one(x) + self.memo[x.shape[-1]]


def warms_up(self: Any, x: Tensor) -> Any:
    if not self.ready:
        self.scale.copy_(x.abs().mean().detach())
        self.ready.fill_(True)
    return self.one(x) * self.scale


def replaces_a_buffer(self: Any, x: Tensor) -> Any:
    self.scale = self.scale * 0.5 + 1
    return self.one(x) * self.scale


def writes_data(self: Any, x: Tensor) -> Any:
    y = self.one(x)
    y.data = y.data * 2
    return self.two(y)


def puts_data_elsewhere(self: Any, x: Tensor) -> Any:
    y = self.one(x)
    z = self.two(y).relu()
    y.data = x.clone()
    return y + z


def draws(self: Any, x: Tensor) -> Any:
    return self.one(x) + torch.rand(4, 1, 1, dtype=torch.float64)


def draws_in_python(self: Any, x: Tensor) -> Any:
    return self.one(x) * random.Random(self.calls).random() * float(numpy.ones(1)[0])


def new_layer(self: Any, x: Tensor) -> Any:
    return nn.Conv2d(4, 4, 1).double()(self.one(x))


FLOWS: dict[str, Forward] = {
    f.__name__.replace("_", " "): f
    for f in (
        branch, branch_on_size, branch_on_data, branch_on_rank, branch_on_type, samples, until, length, item, tries,
        generator, default_dict, no_grad, autocast, inference, counter, remembers, collects, memo_by_size, warms_up,
        replaces_a_buffer, writes_data, puts_data_elsewhere, draws, draws_in_python, new_layer,
    )
}  # fmt: skip


def model_of(forward: Forward) -> Any:
    buffers = {"scale": torch.ones(()), "ready": torch.zeros((), dtype=torch.bool)}
    return pairs(forward, calls=0, seen=[], last=None, memo={}, **buffers)


@pytest.mark.parametrize("flow", FLOWS)
def test_a_model_behaves_as_before_in_every_call(flow: str) -> None:
    same_calls(model_of(FLOWS[flow]), called(one_input), fires=True)


@pytest.mark.parametrize("flow", FLOWS)
def test_as_a_module_inside(flow: str) -> None:
    outer = pairs(lambda s, x: (s.two(s.one(x)), s.inner(x)), inner=model_of(FLOWS[flow]))
    same_calls(outer, called(one_input), fires=True)


@pytest.mark.parametrize("flow", ["branch", "branch on data", "counter", "samples", "no grad"])
def test_around_a_module_of_its_kind(flow: str) -> None:
    """A module that cannot be traced in one that cannot either: what is in the inner one is optimized too."""
    outer = model_of(FLOWS[flow])
    outer.one = model_of(FLOWS[flow])
    fused = same_calls(outer, called(one_input), fires=True)
    assert any(f.path.startswith("one.") for f in fxfuse.report(fused).fired)


def test_inputs_of_other_kinds_take_their_branch() -> None:
    builders = (one_input, lambda x: (([x, x * 2],), {}), lambda x: (((x,),), {}))
    same_calls(model_of(branch_on_type), called(*builders), fires=True)
    same_calls(model_of(branch_on_rank), called(one_input, lambda x: ((x[0],), {})), fires=True)


OPTIONAL: dict[str, tuple[Forward, tuple[Callable[..., Call], ...]]] = {
    "a mask": (
        lambda s, x, mask=None: s.one(x) if mask is None else s.one(x) * mask,
        (lambda x, y: ((x,), {}), lambda x, y: ((x, y), {}), lambda x, y: ((x,), {"mask": y})),
    ),
    "a mask by keyword alone": (
        lambda s, x, *, mask=None: s.one(x) if mask is None else s.one(x) * mask,
        (lambda x, y: ((x,), {}), lambda x, y: ((x,), {"mask": y})),
    ),
    "a flag": (
        lambda s, x, deep=False: (s.one(x), s.two(x)) if deep else s.one(x),
        (lambda x, y: ((x,), {}), lambda x, y: ((x, True), {}), lambda x, y: ((x,), {"deep": True})),
    ),
    "a number of steps": (
        lambda s, x, steps=1: [s.one(x) for _ in range(steps)],
        (lambda x, y: ((x,), {}), lambda x, y: ((x, 3), {})),
    ),
    "a name": (
        lambda s, x, name="one": getattr(s, name)(x),
        (lambda x, y: ((x,), {}), lambda x, y: ((x, "two"), {})),
    ),
    "all of *args": (
        lambda s, *xs: sum(s.one(x) for x in xs),
        (lambda x, y: ((x,), {}), lambda x, y: ((x, y), {}), lambda x, y: ((x, y, x), {})),
    ),
    "all of **kwargs": (
        lambda s, x, **more: {n: s.one(x) + v for n, v in more.items()},
        (lambda x, y: ((x,), {}), lambda x, y: ((x,), {"a": y, "b": 1})),
    ),
    "keywords behind *args": (
        lambda s, x, *more, n=2: s.one(x) * n + len(more),
        (lambda x, y: ((x, y), {}), lambda x, y: ((x, y, 1), {"n": 3})),
    ),
    "all of a list": (
        lambda s, xs: [s.one(x) for x in xs],
        (lambda x, y: (([x],), {}), lambda x, y: (([x, y],), {})),
    ),
    "all of a dict": (
        lambda s, d: {n: s.one(x) for n, x in d.items()},
        (lambda x, y: (({"a": x},), {}), lambda x, y: (({"a": x, "b": y},), {})),
    ),
}


@pytest.mark.parametrize("case", OPTIONAL)
def test_optional_inputs_stay_optional(case: str) -> None:
    forward, builders = OPTIONAL[case]
    same_calls(pairs(forward), called(*builders, count=2), fires=True)


class OwnCall(nn.Sequential):
    def __call__(self, x: Tensor) -> Any:
        return super().__call__(x) * 2


class Wrapped(nn.Module):
    """Calls the model it holds with whatever it is given, as DataParallel and its kin do."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def test_models_that_are_more_than_their_forward() -> None:
    calls = called(one_input)
    own: Any = pairs(lambda s, x: s.one(x))
    own.forward = MethodType(lambda self, x: self.two(x) * 3, own)
    same_calls(own, calls)
    same_calls(OwnCall(pairs(lambda s, x: s.one(x))), calls)
    same_calls(Wrapped(pairs(lambda s, x: s.one(x))), calls)
    same_calls(nn.DataParallel(pairs(lambda s, x: s.one(x))), calls)


def test_a_report_says_what_kept_the_model_from_being_one_graph() -> None:
    report = fxfuse.report(fxfuse.optimize(model_of(branch_on_data).eval()))
    assert [f.path for f in report.fired] == ["one.0", "two.0", "side.0"]
    assert any("control flow" in str(r) and "test_control_flow.py" in str(r) for r in report.refused)


def test_the_result_of_such_a_model_is_a_module_like_any_other() -> None:
    model = model_of(counter).eval()
    fused = fxfuse.optimize(model)
    for (x,) in tensors():
        same(fused(x), model(x))
    again = fxfuse.optimize(fused)
    same(again.calls, fused.calls)
    for (x,) in tensors():
        same(again(x), model(x))
    fused.train()
    assert all(m.training for m in fused.modules())


def scalar_branch(self: Any, x: Tensor) -> Tensor:
    return torch.where(self.one(x) > 0, self.one(x), 0.0)


def asked_on_the_same_line(self: Any, x: Tensor) -> Tensor:
    y = self.one(x)
    return torch.where(y > 0, y, 0.0) if isinstance(y, Tensor) else torch.where(y > 0, 1.0, y)


def asked_over_lines(self: Any, x: Tensor) -> Tensor:
    y = self.one(x)
    return torch.where(y > 0, 0.5, y) + (
        1 if isinstance(
            y, Tensor
        ) else torch.where(y > 0, y, 2.0)
    )  # fmt: skip


@pytest.mark.parametrize("forward", [scalar_branch, asked_on_the_same_line, asked_over_lines])
def test_code_in_c_is_not_told_that_a_traced_value_is_a_tensor(forward: Forward) -> None:
    """It would read the memory of a tensor where there is none."""
    same_calls(model_of(forward), called(lambda x: ((x,), {})), fires=True)
