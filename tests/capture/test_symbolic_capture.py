"""Capture: what a graph cannot hold is kept whole or refused with its line, and the model is as it was."""

from __future__ import annotations

import random
import re
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_untouched, fingerprint, randomize
from safety import agrees, model_of, usual
from torch import Tensor, nn

import fxfuse
from fxfuse.capture.symbolic import capture

Forward = Callable[..., Any]
HERE = r"test_symbolic_capture\.py:\d+"


def branch(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(x)) if x.sum() > 0 else self.p(x)


def branch_on_rank(self: Any, x: Tensor) -> Tensor:
    if x.dim() == 4:
        return self.b(self.a(x))
    return x


def length(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(x)) * len(x)


def loop(self: Any, x: Tensor) -> Tensor:
    return sum(self.a(part) for part in x)


def asks_type(self: Any, x: Any) -> Tensor:
    x = [x] if isinstance(x, Tensor) else x
    return self.b(self.a(x[0]))


def autocast(self: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return self.b(self.a(x)).double()


def no_grad(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = self.b(self.a(x))
    return y * 2


@torch.inference_mode()
def inference(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(x))


def assigns_data(self: Any, x: Tensor) -> Tensor:
    y = self.a(x)
    y.data = y.data * 2
    return self.b(y)


def counts(self: Any, x: Tensor) -> Tensor:
    self.calls += 1
    return self.b(self.a(x)) * self.calls


def remembers(self: Any, x: Tensor) -> Tensor:
    self.last = self.b(self.a(x))
    return self.last


def collects(self: Any, x: Tensor) -> Tensor:
    self.seen.append(x)
    return self.b(self.a(x)) * len(self.seen)


def collects_in_private(self: Any, x: Tensor) -> Tensor:
    self._seen.append(x)
    return self.b(self.a(x)) * len(self._seen)


def queues_in_private(self: Any, x: Tensor) -> Tensor:
    self._queue.append(self.a(x))
    return self.b(self.a(x))


def names_in_private(self: Any, x: Tensor) -> Tensor:
    self._names.add("x")
    return self.b(self.a(x)) * len(self._names)


def replaces_a_buffer(self: Any, x: Tensor) -> Tensor:
    self.total = self.total + 1
    return self.b(self.a(x)) * self.total


def writes_a_tensor(self: Any, x: Tensor) -> Tensor:
    self.loose.add_(1)
    return self.b(self.a(x)) * self.loose


def draws(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(x)) * torch.randn(4, 1, 1)


def draws_in_python(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(x)) * random.random()


def draws_in_numpy(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(x)) * float(numpy.random.rand())


def new_layer(self: Any, x: Tensor) -> Tensor:
    return nn.Conv2d(4, 4, 1).double()(self.b(self.a(x)))


STOPS: dict[str, tuple[Forward, str]] = {
    "branch": (branch, rf"{HERE}.*control flow"),
    "branch on rank": (branch_on_rank, rf"{HERE}.*control flow"),
    "length": (length, rf"{HERE}.*len"),
    "loop": (loop, rf"{HERE}.*iterated"),
    "type": (asks_type, rf"{HERE}.*asks for the type"),
    "autocast": (autocast, rf"{HERE}.*autocast"),
    "no_grad": (no_grad, rf"{HERE}.*switches gradients"),
    "inference_mode": (inference, "switches gradients"),
    "data": (assigns_data, rf"{HERE}.*assigns to \.data"),
    "counter": (counts, rf"{HERE}.*sets self\.calls"),
    "attribute": (remembers, rf"{HERE}.*sets self\.last"),
    "list": (collects, r"changes self\.(0\.)?seen|changes a list"),
    "private list": (collects_in_private, r"changes self\.(0\.)?_seen|changes a list"),
    "private deque": (queues_in_private, r"changes self\.(0\.)?_queue|changes a list"),
    "private set": (names_in_private, r"changes self\.(0\.)?_names|changes a list"),
    "buffer replaced": (replaces_a_buffer, rf"{HERE}.*sets self\.total"),
    "python random": (draws_in_python, "random number"),
    "numpy random": (draws_in_numpy, "random number"),
    "new layer": (new_layer, rf"{HERE}.*switches gradients"),
}


def build(forward: Forward) -> nn.Module:
    private = {"_seen": [], "_queue": deque(), "_names": set()}
    model = usual(forward, calls=0, seen=[], **private, total=torch.zeros((), dtype=torch.float64))
    model.loose = torch.ones(4, 1, 1, dtype=torch.float64)
    return model


@pytest.mark.parametrize("case", STOPS)
def test_a_model_that_does_not_trace_says_where(case: str) -> None:
    forward, text = STOPS[case]
    model = build(forward)
    before, loose, states = fingerprint(model), model.loose.clone(), (torch.get_rng_state(), random.getstate())
    with pytest.raises(fxfuse.CaptureError, match=text):
        fxfuse.optimize(model, capture="symbolic")
    assert_untouched(model, before)
    assert torch.equal(model.loose, loose) and model.seen == [] and "last" not in vars(model)
    assert not model._seen and not model._queue and not model._names
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("case", [c for c in STOPS if c not in ("numpy random", "loop")])
def test_without_a_graph_the_model_stays_what_it_is(case: str) -> None:
    model = build(STOPS[case][0])
    fused = agrees(model, reseed=random.seed, fires=False)
    report = fxfuse.report(fused)
    assert type(fused) is type(model) and report.capture == "hierarchical"
    assert "stays Python" in report.refused[0].reason and re.search(STOPS[case][1], report.refused[0].detail)


@pytest.mark.parametrize("case", [c for c in STOPS if c not in ("python random", "numpy random")])
def test_inside_a_model_it_stays_whole(case: str) -> None:
    forward, _ = STOPS[case]
    if case == "type":
        forward = lambda s, x: asks_type(s, x)  # noqa: E731
    rest = randomize(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))).double()
    model = nn.Sequential(build(forward), rest) if case != "loop" else nn.Sequential(rest, build(forward))
    fused = agrees(model.eval(), tolerance=1e-2 if case == "autocast" else 1e-12, fires=True)
    whole = [r for r in fxfuse.report(fused).refused if "stays Python" in r.reason]
    assert [r.where for r in whole] == ["1" if case == "loop" else "0"], whole


def counts_in_a_buffer(self: Any, x: Tensor) -> Tensor:
    self.total += 1
    return self.b(self.a(x)) * self.total


def averages(self: Any, x: Tensor) -> Tensor:
    y = self.a(x)
    self.mean.mul_(0.9).add_(y.mean((0, 2, 3)).detach(), alpha=0.1)
    return self.b(y) - self.mean.view(1, -1, 1, 1)


def memo(self: Any, x: Tensor) -> Tensor:
    if "w" not in self.cache:
        self.cache["w"] = self.a.weight * 2
    return self.b(F.conv2d(x, self.cache["w"]))


def private_memo(self: Any, x: Tensor) -> Tensor:
    self._cache.setdefault("y", self.a(x))
    return self.b(self._cache.pop("y"))


def keeps_a_sum(self: Any, x: Tensor) -> Tensor:
    return self.b(self._cache.setdefault(0, self.a.weight.sum()) * self.a(x))


def sets_the_same(self: Any, x: Tensor) -> Tensor:
    self.calls = 0
    return self.b(self.a(x))


def layers_in_forward(self: Any, x: Tensor) -> Tensor:
    return nn.Softmax(1)(nn.ReLU()(self.b(self.a(x))))


TRACED: dict[str, Forward] = {
    "counter in a buffer": counts_in_a_buffer,
    "memo": memo,
    "same value": sets_the_same,
    "tensor written": writes_a_tensor,
    "torch random": draws,
    "layers": layers_in_forward,
    "list of tensors": lambda s, x: s.b(s.a(x) * s.tensors[0] * s.parameter_list[0]),
    "dict out": lambda s, x: {"y": s.b(s.a(x)), "x": x},
    "nested out": lambda s, x: (s.b(s.a(x)), [x, None, 3], x[:, :2]),
    "type of a layer's output": lambda s, x: (lambda y: s.b(y) if isinstance(y, Tensor) else y)(s.a(x)),
}


@pytest.mark.parametrize("case", TRACED)
def test_what_a_graph_can_hold_is_traced(case: str) -> None:
    model = build(TRACED[case])
    model.cache, model.tensors = {}, [torch.full((4, 1, 1), 3.0, dtype=torch.float64)]
    model.parameter_list = nn.ParameterList([nn.Parameter(torch.ones(4, 1, 1, dtype=torch.float64))])
    agrees(model, fires=True)


@pytest.mark.parametrize("forward", (memo, private_memo, keeps_a_sum))
def test_nothing_of_a_trace_stays_in_a_memo(forward: Forward) -> None:
    model = build(forward)
    model.cache, model._cache = {}, {}
    assert fxfuse.report(fxfuse.optimize(model, capture="symbolic")).fired
    assert model.cache == {} and model._cache == {}


def test_a_moving_average_is_kept() -> None:
    agrees(usual(averages, mean=torch.zeros(4, dtype=torch.float64)))


def with_defaults(self: Any, x: Tensor, mask: Any = None, scale: float = 1.0, flag: bool = False) -> Tensor:
    y = self.b(self.a(x))
    if mask is not None:
        y = y * mask
    if flag:
        y = y + 1
    return y * scale


def test_defaults_are_taken_and_checked() -> None:
    fused = agrees(usual(with_defaults), fires=True, capture="symbolic")
    x = torch.ones(1, 4, 3, 3, dtype=torch.float64)
    with pytest.raises(AssertionError, match="made for mask=None"):
        fused(x, x)
    with pytest.raises(AssertionError, match="made for flag=False"):
        fused(x, flag=True)


def test_defaults_that_change_nothing_stay_open() -> None:
    model = usual(lambda s, x, scale=1.0, mask=None: F.relu(s.b(s.a(x)) * scale))
    x = torch.ones(1, 4, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(fxfuse.optimize(model)(x, scale=3.0), model(x, scale=3.0))
    assert not [n for n in capture(model).graph.nodes if "assert" in n.name]


def test_inputs_open_a_default() -> None:
    x = torch.ones(1, 4, 3, 3, dtype=torch.float64)
    model = usual(with_defaults)
    with pytest.raises(fxfuse.CaptureError, match="whether mask is None"):
        capture(model, (x, x))
    fused = fxfuse.optimize(model, (x, x * 2))
    for args in ((x, x * 3), (x,), (x, None, 2.0), (x, x, 3.0, True)):
        torch.testing.assert_close(fused(*args), model(*args))
    assert fxfuse.report(fused).fired and fxfuse.report(fused).kept


INPUTS: dict[str, tuple[Forward, Callable[[Any], Any]]] = {
    "two": (lambda s, x, y: s.b(s.a(x)) + s.a(y), lambda x: (x, x * 2)),
    "dict": (lambda s, d: s.b(s.a(d["x"])), lambda x: ({"x": x},)),
    "list": (lambda s, xs: s.b(s.a(xs[0])) + xs[1], lambda x: ([x, x],)),
    "args": (lambda s, *xs: s.b(s.a(xs[0])), lambda x: (x, x)),
    "keyword only": (lambda s, x, *, k=2.0, **rest: s.b(s.a(x)) * k, lambda x: (x,)),
}


@pytest.mark.parametrize("case", INPUTS)
def test_inputs(case: str) -> None:
    forward, pack = INPUTS[case]
    agrees(usual(forward), draw=lambda shape, g: pack(torch.randn(shape, generator=g).double()), fires=True)


class OwnCall(nn.Sequential):
    def __call__(self, x: Tensor) -> Any:
        return super().__call__(x) * 2


def test_more_than_a_forward_is_refused() -> None:
    def fresh() -> Any:
        return nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).eval()

    own, compiled, lazy = fresh(), fresh(), nn.Sequential(nn.LazyConv2d(4, 1)).eval()
    own.forward = lambda x: x
    compiled.compile(backend="eager")
    for model, text in (
        (compiled, "compiled in place"),
        (lazy, "lazy parameters"),
        (torch.compile(fresh()), "was compiled; optimize it before"),
    ):
        with pytest.raises(fxfuse.CaptureError, match=text):
            fxfuse.optimize(model)
    for model, text in (
        (own, "forward set on the instance"),
        (OwnCall(*fresh()).eval(), "__call__ of its own"),
        (torch.jit.script(fresh()), "scripted"),
    ):
        with pytest.raises(fxfuse.CaptureError, match=text):
            fxfuse.optimize(model, capture="symbolic")
        x = torch.ones(1, 4, 3, 3)
        left = fxfuse.optimize(model)
        assert torch.equal(left(x), model(x)) and left is not model
        assert any(text in r.detail for r in fxfuse.report(left).refused)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(fxfuse.CaptureError, match="global module hook"):
            fxfuse.optimize(fresh())
    finally:
        handle.remove()
    agrees(randomize(nn.Sequential(OwnCall(*fresh()), nn.Identity())).double(), fires=True)


def test_modes_outside_do_not_matter() -> None:
    model = usual(lambda s, x: s.b(s.a(x)))
    with torch.no_grad():
        fused = fxfuse.optimize(model)
    assert fused(torch.ones(1, 4, 3, 3, dtype=torch.float64)).requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fxfuse.report(fxfuse.optimize(model)).fired


def test_made_up_models() -> None:
    for model in (nn.Identity(), nn.Sequential(), nn.Sequential(nn.Sequential(), nn.Identity()), nn.ReLU(inplace=True)):
        agrees(model, fires=False)
    agrees(randomize(nn.Conv2d(4, 4, 3)).double(), fires=False)
    assert capture(model_of(lambda s, x: x)).how == "symbolic"
