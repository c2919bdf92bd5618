"""The table of element-wise functions against PyTorch, in every spelling, and what all readers make of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safety import agrees, usual
from torch import Tensor, nn
from torch.fx import Graph, Node

from fxfuse.facts.dtypes import find_dtypes
from fxfuse.facts.infer import infer
from fxfuse.ops.elementwise import ELEMENTWISE, elementwise, read_activation
from fxfuse.ops.memory import fresh, written
from fxfuse.ops.value_kinds import is_tensor

GIVEN: dict[str, tuple[Any, ...]] = {"threshold": (0.2, 0.7), "clamp": (-0.5, 0.6), "clip": (-0.5, 0.6)}
GIVEN |= {"leaky_relu": (0.3,), "elu": (0.7,), "hardtanh": (-0.4, 0.8), "softplus": (2, 3), "celu": (0.5,)}
Made = tuple[str, Any, tuple[Any, ...], dict[str, Any], bool]  # op, target, what follows the tensor, and if it writes


def spelled(name: str) -> Iterator[Made]:
    """Every call of a function that PyTorch has: the functions, the methods, the operators, and in place."""
    given = GIVEN.get(name, ())
    for space in (F, torch, torch.ops.aten):
        for writes, called in enumerate((name, name + "_")):
            if called in dir(space) or (space is torch.ops.aten and hasattr(space, called)):
                target = getattr(space, called)
                yield "call_function", getattr(target, "default", target), given, {}, bool(writes)
    if ELEMENTWISE[name].inplace:
        yield "call_function", getattr(F, name), given, {"inplace": True}, True
    for writes, called in enumerate((name, name + "_")):
        if hasattr(Tensor, called):
            yield "call_method", called, given, {}, bool(writes)
    cls = ELEMENTWISE[name].module
    if cls is not None:
        yield "call_module", cls(*given).eval(), (), {}, False
        if ELEMENTWISE[name].inplace:
            yield "call_module", cls(*given, inplace=True).eval(), (), {}, True  # type: ignore[call-arg]


def called(made: Made, x: Tensor) -> Any:
    op, target, args, kwargs, _ = made
    return getattr(x, target)(*args, **kwargs) if op == "call_method" else target(x, *args, **kwargs)


def in_graph(made: Made) -> tuple[Graph, Node, Node, dict[str, nn.Module]]:
    op, target, args, kwargs, _ = made
    graph, modules = Graph(), {"layer": target} if op == "call_module" else {}
    x = graph.placeholder("x")
    node = graph.create_node(op, "layer" if op == "call_module" else target, (x, *args), kwargs)
    return graph, x, node, modules


def inputs(name: str) -> list[Tensor]:
    """Numbers in the domain of every function, as they lie in memory in four ways."""
    x = torch.rand(2, 6, 4, 3, generator=torch.Generator().manual_seed(0)) * 1.6 - 0.8
    x = x.abs() + 0.1 if name in ("log", "sqrt", "rsqrt") else x
    last = x.contiguous(memory_format=torch.channels_last)
    return [x, last, x[:, 1:4], x.double(), x.to(torch.bfloat16)]


SEVERAL = [n for n in ELEMENTWISE if n != "prelu"]


@pytest.mark.parametrize("name", SEVERAL)
def test_every_spelling_is_one_function(name: str) -> None:
    spellings = list(spelled(name))
    assert len(spellings) > 1 and {m[-1] for m in spellings} >= {False}
    for x in inputs(name):
        want = called(spellings[0], x.clone(memory_format=torch.preserve_format))
        for made in spellings:
            base = x.clone(memory_format=torch.preserve_format)
            got = called(made, base)
            assert torch.equal(got, want) or (got - want).abs().max() < 1e-6, made
            assert got.shape == x.shape and got.dtype == x.dtype
            assert (got.untyped_storage().data_ptr() == base.untyped_storage().data_ptr()) == made[-1], made
            if ELEMENTWISE[name].plain and not made[-1]:
                assert got.stride() == F.relu(base).stride(), made


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_all_readers_know_every_spelling(name: str) -> None:
    x = inputs(name)[0]
    spellings = [m for m in spelled(name) if name != "prelu" or m[0] == "call_module"]
    for made in spellings:
        graph, source, node, modules = in_graph(made)
        root = nn.Module()
        root.layer = made[1] if made[0] == "call_module" else None
        assert elementwise(node, modules), made
        assert written(node, None, modules) == [source] * made[-1], made
        assert made[-1] or fresh(node, None, modules), made
        assert is_tensor(node, root), made
        fact = infer(graph, {}, {}, modules, {source: x.shape})[node]
        assert fact.rank == x.dim() and fact.axes == {i - x.dim(): n for i, n in enumerate(x.shape)}, made
        assert find_dtypes(graph, {}, {}, modules, {source: torch.float64})[node] == torch.float64, made
        activation = read_activation(node, modules)
        if ELEMENTWISE[name].plain and ELEMENTWISE[name].module is not None:
            if made[0] == "call_function" and "aten" in str(made[1]) and name in ("elu", "celu", "selu"):
                continue  # whose operators have parameters of their own
            assert activation is not None and activation.name == name, made
            args, kwargs = activation.arguments(inplace=False)
            assert torch.equal(activation.function(x, *args, **kwargs), called(made, x.clone())), made
        else:
            assert activation is None, made


def test_modules_with_a_weight_or_random_numbers() -> None:
    for layer in (nn.PReLU(), nn.RReLU().eval()):
        x = torch.rand(2, 6, 4, 3)
        got = layer(x)
        assert got.shape == x.shape and got.dtype == x.dtype and got.data_ptr() != x.data_ptr()


MORE = [
    nn.SELU(),
    nn.Softplus(2),
    nn.Softsign(),
    nn.Threshold(0.1, 0.3),
    nn.Hardshrink(0.2),
    nn.LogSigmoid(),
    nn.PReLU(),
]


@pytest.mark.parametrize("layer", MORE, ids=lambda m: type(m).__name__)
def test_what_is_written_behind_an_activation_is_its_own(layer: nn.Module) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.b(self.a(x))
        z = self.r(y)
        z += 1
        return self.p(z) + y  # type: ignore[no-any-return]

    agrees(usual(forward, r=layer).double(), fires=True)


@pytest.mark.parametrize("layer", MORE, ids=lambda m: type(m).__name__)
def test_siblings_before_an_activation(layer: nn.Module) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.r(self.p(x)) * self.r(self.q(x)).mean((-1, -2), keepdim=True)  # type: ignore[no-any-return]

    model = usual(forward, r=layer, p=nn.Conv2d(4, 1, 1), q=nn.Conv2d(4, 1, 1)).double()
    agrees(
        model, examples=torch.rand(2, 4, 8, 7).double(), fires=not isinstance(layer, (nn.LogSigmoid, nn.PReLU)) or None
    )


def relu(x: Tensor) -> Tensor:
    """Somebody's function of a name that is PyTorch's too: it gives its argument."""
    return x


def chunk(x: Tensor) -> Any:
    return x


torch.fx.wrap("relu")
torch.fx.wrap("chunk")


def behind_relu(self: Any, x: Tensor) -> Tensor:
    y = self.b(self.a(x))
    z = relu(y)
    z.mul_(2)
    return self.n(self.p(y)) + z  # type: ignore[no-any-return]


def behind_chunk(self: Any, x: Tensor) -> Tensor:
    y = self.b(self.a(x))
    z = chunk(y)
    z += 1
    return self.n(self.p(y))  # type: ignore[no-any-return]


def behind_a_maximum(self: Any, x: Tensor) -> Tensor:
    y = self.b(self.a(x))
    z = max(y, y)
    z.add_(1)
    return self.n(self.p(y))  # type: ignore[no-any-return]


@pytest.mark.parametrize("forward", [behind_relu, behind_chunk])
def test_a_function_of_the_same_name_is_not_pytorchs(forward: Any) -> None:
    agrees(usual(forward))


def test_pythons_maximum_gives_one_of_its_arguments() -> None:
    agrees(usual(behind_a_maximum), shapes=((1, 4, 1, 1), (1, 4, 1, 1)))
