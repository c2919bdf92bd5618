"""An optimized model called under torch.autocast: eager's dtypes, and no more than its error against float64."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from autocast_blocks import BLOCKS, WIDE, block, conv, draws, scale
from helpers import randomize
from safety import model_of
from torch import Tensor, nn

import fxfuse

LOWER = [torch.bfloat16, torch.float16]


def under(model: Any, x: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        out: Tensor = model(x)
    return out


def no_worse(fused: Any, model: nn.Module, x: Tensor, dtype: torch.dtype = torch.bfloat16) -> None:
    """Under autocast as good as eager, and between such calls what it is without."""
    exact = copy.deepcopy(model).double()(x.double())
    want, got, plain = under(model, x, dtype), under(fused, x, dtype), fused(x)
    assert got.dtype == want.dtype and got.shape == want.shape
    own, ours = ((y.double() - exact).square().mean().sqrt() for y in (want, got))
    assert ours <= 1.5 * own + 1e-6 * exact.abs().max()
    assert plain.dtype == model(x).dtype and torch.allclose(plain, model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", LOWER)
@pytest.mark.parametrize("name", BLOCKS)
def test_dtypes_and_errors_are_those_of_the_model(name: str, dtype: torch.dtype) -> None:
    model = block(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fused = fxfuse.optimize(model, next(draws()), patterns=["border!"] if name == "frame" else None)
    assert fxfuse.report(fused).fired
    with torch.no_grad():
        for x in draws():
            no_worse(fused, model, x, dtype)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", ["identity branch", "two of them", "scaled, beside x", "linear"])
def test_inputs_that_are_lowered_already(name: str) -> None:
    model = block(name)
    fused = fxfuse.optimize(model, next(draws()))
    for x in draws():
        want, got = (under(m, x.bfloat16()) for m in (model, fused))
        assert got.dtype == want.dtype
        assert (got.float() - want.float()).abs().max() <= 0.03 * want.abs().max()


def saved(fused: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("name", ["identity branch", "learned scale", "scaled, beside x"])
def test_copies_do_as_the_original(name: str) -> None:
    model = block(name)
    fused = fxfuse.optimize(model, next(draws()))
    pickled = pickle.loads(pickle.dumps(fused))
    copies = [copy.deepcopy(fused), pickled, saved(fused), copy.deepcopy(pickled), pickle.loads(pickle.dumps(pickled))]
    with torch.no_grad():
        for other in (*copies, fxfuse.optimize(fused, next(draws()))):
            for x in draws(2):
                no_worse(other, model, x)
                assert torch.equal(under(other, x), under(fused, x))


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.i = conv(), nn.BatchNorm2d(WIDE), nn.BatchNorm2d(WIDE)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.n(self.a(x)) + self.i(x))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.g = conv(1), scale(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.a(x) * self.g


class ScaledLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.g = nn.Linear(5, WIDE), scale()

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.a(x) * self.g)


@pytest.mark.parametrize("cls", [Branches, Scaled, ScaledLinear])  # torch.jit.script wants a forward with a name
def test_tools_see_plain_layers(cls: Callable[[], nn.Module]) -> None:
    fused = fxfuse.optimize(randomize(cls()), next(draws()))
    assert "autocast" in fused.code
    kinds = {type(m) for m in fused.modules() if next(m.parameters(recurse=False), None) is not None}
    assert kinds <= {nn.Conv2d, nn.Linear}
    x = next(draws())
    exported = torch.export.export(fused, (x,))
    targets = {str(n.target) for n in exported.graph.nodes}
    assert not any("_to_copy" in t or "aten.to" in t or "autocast" in t for t in targets)
    with torch.no_grad():
        forms = [torch.jit.script(fused), torch.jit.trace(fused, x), torch.fx.symbolic_trace(fused), exported.module()]
        for form in forms:
            assert torch.equal(form(x), fused(x))


@pytest.mark.parametrize("name", ["identity branch", "learned scale", "scaled, beside x"])
def test_compiled_whole_it_notices_the_mode_as_well(name: str) -> None:
    torch._dynamo.reset()
    model = block(name)
    fused = fxfuse.optimize(model, next(draws()))
    f = torch.compile(fused, backend="eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for x in draws():
            no_worse(f, model, x)


def test_a_graph_without_such_layers_asks_nothing() -> None:
    fused = fxfuse.optimize(block("conv, norm"), next(draws()))
    assert "autocast" not in fused.code
    assert "autocast" in fxfuse.optimize(block("learned scale"), next(draws())).code


@pytest.mark.parametrize("name", ["for", "stage.0", "a_layer"])
def test_layers_of_any_name(name: str) -> None:
    """The code of a graph spells `self.stage.0` and a keyword of Python otherwise than the path does."""
    model = nn.Module()
    holder = model
    for part in name.split(".")[:-1]:
        holder.add_module(part, nn.Module())
        holder = holder.get_submodule(part)
    holder.add_module(name.rpartition(".")[2], conv(1))
    model.g = scale(1, 1)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return self.inner.get_submodule(name)(x) * self.inner.g

    outer = randomize(Outer())
    fused = fxfuse.optimize(outer, next(draws()))
    with torch.no_grad():
        for x in draws():
            no_worse(fused, outer, x)


def test_parts_of_a_model_that_stays_python() -> None:
    class Python(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = block("identity branch"), block("learned scale")

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return self.second(y) if float(y.sum()) > -1e9 else y

    model = randomize(Python())
    fused = fxfuse.optimize(model, next(draws()))
    assert len(fxfuse.report(fused).fired) >= 2
    with torch.no_grad():
        for x in draws():
            no_worse(fused, model, x)


def test_siblings_of_different_dtypes_stay_apart() -> None:
    query, key = nn.Linear(WIDE, WIDE), nn.Linear(WIDE, WIDE)
    model = randomize(model_of(lambda s, x: (s.q(x) * s.g, s.k(x)), q=query, k=key, g=scale()))
    x = torch.randn(3, 5, WIDE)
    fused = fxfuse.optimize(model, x, patterns=["siblings!"])
    for lower in LOWER:
        with torch.no_grad(), torch.autocast("cpu", dtype=lower):
            assert [y.dtype for y in fused(x)] == [y.dtype for y in model(x)] == [torch.float32, lower]
    assert any("under autocast they give different dtypes" in r.reason for r in fxfuse.report(fused).refused)
