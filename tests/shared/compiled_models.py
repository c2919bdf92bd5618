"""Models compiled by the backend, and every way in which their weights change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import randomize, relative_error
from torch import Tensor, nn

import fxfuse
from fxfuse.compiling.backend import fxfuse as backend

Change = Callable[[nn.Module, torch.Generator], None]


class Block(nn.Module):
    """Three branches as RepVGG has them."""

    def __init__(self, width: int = 4, eps: float = 1e-5) -> None:
        super().__init__()
        self.a, self.p = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 1)
        self.b, self.n, self.m = (nn.BatchNorm2d(width, eps=eps) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.b(self.a(x)) + self.n(self.p(x)) + self.m(x))


def build(blocks: int = 2, seed: int = 0, **fields: Any) -> nn.Module:
    return randomize(nn.Sequential(*(Block(**fields) for _ in range(blocks))), seed).double()


def compiled(model: Any, inner: Any = "eager", **options: Any) -> Any:
    dynamic = options.pop("dynamic", None)
    return torch.compile(model, backend=backend, dynamic=dynamic, options={"inner": inner, "strict": True, **options})


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape or (2, 4, 6, 5), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same(f: Any, model: Any, x: Tensor, tolerance: float = 1e-12) -> None:
    assert relative_error(f(x), model(x)) <= tolerance


class Counting:
    """An inner backend that keeps the graphs it was given."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, gm: torch.fx.GraphModule, inputs: Any) -> Any:
        self.graphs.append(gm)
        return gm.forward

    @property
    def calls(self) -> list[str]:
        return [getattr(n.target, "__name__", str(n.target)) for g in self.graphs[-1:] for n in g.graph.nodes]


@pytest.fixture(autouse=True)
def fresh() -> Any:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(
        recompile_limit=256, accumulated_recompile_limit=1024, fail_on_recompile_limit_hit=True
    ):
        yield  # beyond its limit Dynamo would run eager, and everything would agree
    torch._dynamo.reset()


def load(model: nn.Module, g: torch.Generator) -> None:
    model.load_state_dict(perturbed(model, g))


def assign(model: nn.Module, g: torch.Generator) -> None:
    model.load_state_dict(perturbed(model, g), assign=True)


def perturbed(model: nn.Module, g: torch.Generator) -> dict[str, Tensor]:
    state = model.state_dict()
    return {
        k: v + torch.rand(v.shape, generator=g, dtype=v.dtype) if v.is_floating_point() else v for k, v in state.items()
    }


def in_place(model: nn.Module, g: torch.Generator) -> None:
    with torch.no_grad():
        model.get_parameter("0.a.weight").mul_(1 + torch.rand((), generator=g, dtype=torch.float64))


def data(model: nn.Module, g: torch.Generator) -> None:
    weight = model.get_parameter("1.b.weight")
    weight.data = torch.rand(weight.shape, generator=g, dtype=weight.dtype)


def statistics(model: nn.Module, g: torch.Generator) -> None:
    model.get_buffer("0.n.running_var").add_(torch.rand((), generator=g, dtype=torch.float64))


def new_parameter(model: nn.Module, g: torch.Generator) -> None:
    conv = model.get_submodule("1.p")
    assert isinstance(conv, nn.Conv2d)
    conv.weight = nn.Parameter(torch.rand(conv.weight.shape, generator=g, dtype=conv.weight.dtype), False)


def epsilon(model: nn.Module, g: torch.Generator) -> None:
    norm = model.get_submodule("0.b")
    assert isinstance(norm, nn.BatchNorm2d)
    norm.eps = float(torch.rand((), generator=g))


def moved(model: nn.Module, g: torch.Generator) -> None:
    in_place(model, g)
    model.to(torch.float32).to(torch.float64)


def behind_the_back(model: nn.Module, g: torch.Generator) -> None:
    model.get_parameter("0.a.weight").data.mul_(1.5)
    model.get_buffer("1.b.running_mean").numpy()[:] += 1
    fxfuse.refresh()


def trained(model: nn.Module, g: torch.Generator) -> None:
    """A training step in eager writes running statistics, and counts it in no version of theirs."""
    was = model.training
    model.train()
    with torch.no_grad():
        model(torch.rand(2, 4, 5, 5, generator=g, dtype=torch.float64))
    model.train(was)


CHANGES: dict[str, Change] = {
    f.__name__: f
    for f in (load, assign, in_place, data, statistics, new_parameter, epsilon, moved, trained, behind_the_back)
}
