"""The backend under the modes of its caller and of the graph: autocast around it, gradients switched on inside."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from autocast_blocks import BLOCKS, block, draws
from helpers import randomize, relative_error
from torch import Tensor, nn


def compiled(model: nn.Module, reports: list[Any] | None = None, **options: Any) -> Any:
    torch._dynamo.reset()
    kept: list[Any] = [] if reports is None else reports
    return torch.compile(
        model, backend="fxfuse", options={"inner": "eager", "strict": True, "on_report": kept.append, **options}
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", BLOCKS)
def test_under_autocast_dtypes_and_errors_are_those_of_the_model(name: str, dtype: torch.dtype) -> None:
    model, reports = block(name), list[Any]()
    f, exact = compiled(model, reports), copy.deepcopy(model).double()
    with torch.no_grad():
        for x in draws():
            with torch.autocast("cpu", dtype=dtype):
                want, got = model(x), f(x)
            assert got.dtype == want.dtype
            own, ours = ((y.double() - exact(x.double())).square().mean().sqrt() for y in (want, got))
            assert ours <= 1.5 * own + 1e-6 * want.abs().max()
            plain, twin = f(x), model(x)
            assert plain.dtype == twin.dtype and relative_error(plain, twin) < 1e-5
    assert all(r.fired for r in reports) and len(reports) >= 2  # one graph a mode


@pytest.mark.parametrize("freeze", [True, False, "auto"])
@pytest.mark.parametrize("name", ["identity branch", "learned scale", "scaled, beside x"])
def test_weights_that_change_between_calls_under_autocast(name: str, freeze: Any) -> None:
    model = block(name)
    f = compiled(model, freeze=freeze)
    with torch.no_grad():
        for x in draws():
            with torch.autocast("cpu", dtype=torch.bfloat16):  # which keeps what it casts as long as it lasts
                want, got = model(x), f(x)
            assert got.dtype == want.dtype and relative_error(got, want) < 0.03
            for p in model.parameters():
                p.mul_(-0.75)


def test_inductor_gives_the_same_dtypes() -> None:
    model = block("identity branch")
    f = compiled(model, inner="inductor")
    with torch.no_grad():
        for x in draws(2):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert f(x).dtype == model(x).dtype == torch.float32
            assert relative_error(f(x), model(x)) < 1e-5


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.b = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))


class InsideWith(Parts):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        with torch.enable_grad():
            return self.b(x)


class SetForGood(Parts):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        torch.set_grad_enabled(True)
        return self.b(x)


class OneOfTwo(Parts):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.set_grad_enabled(True):
            y = self.b(x)
        return self.a(x), y


class NoInference(Parts):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        with torch.inference_mode(False), torch.enable_grad():
            return self.b(x.clone())


class Guided(Parts):
    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            y = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.b(y).square().sum(), y)
        return self.a(x - slope)


@pytest.mark.parametrize("freeze", [True, False, "auto"])
@pytest.mark.parametrize("cls", [InsideWith, SetForGood, OneOfTwo, NoInference, Guided])
def test_gradients_switched_on_inside_a_call_without(cls: Callable[[], nn.Module], freeze: Any) -> None:
    model, reports = randomize(cls()), list[Any]()
    f = compiled(model, reports, freeze=freeze)
    for x in draws():
        with torch.no_grad():
            got = f(x)
        with torch.no_grad():
            want = model(x)
        pairs = zip(*(v if isinstance(v, tuple) else (v,) for v in (got, want)), strict=True)
        for a, b in pairs:
            assert a.requires_grad == b.requires_grad and relative_error(a, b) < 1e-5
    assert sum(len(r.fired) for r in reports) >= 1  # what lies outside is fused all the same


def test_gradients_of_such_a_region_reach_its_weights() -> None:
    model = randomize(InsideWith())
    twin = copy.deepcopy(model)
    f = compiled(model)
    for x in draws(2):
        for call in (f, twin):
            with torch.no_grad():
                y = call(x)
            y.square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None) == name.startswith("a."), name
        assert p.grad is None or q.grad is None or relative_error(p.grad, q.grad) < 1e-4
