"""Arguments by keyword, in any order and under every name that PyTorch takes: the same as by position."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safety import agrees, usual
from torch import Tensor, nn
from torch.fx import Graph, Node, symbolic_trace

from fxfuse.facts.infer import infer
from fxfuse.ops.aten import views
from fxfuse.ops.movement import pooled, read_shaping
from fxfuse.ops.spellings import read
from fxfuse.ops.value_kinds import rank_check

aten = torch.ops.aten


def normed(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(x))  # type: ignore[no-any-return]


# what is done with x, by keyword and by position
PAIRS: dict[str, tuple[Any, Any]] = {
    "chunk": (lambda x: torch.chunk(dim=1, input=x, chunks=2)[1], lambda x: torch.chunk(x, 2, 1)[1]),
    "split": (
        lambda x: torch.split(tensor=x, split_size_or_sections=3, dim=1)[0],
        lambda x: torch.split(x, 3, 1)[0],
    ),
    "split sizes": (lambda x: x.split(split_size=[1, 3], dim=1)[1], lambda x: x.split([1, 3], 1)[1]),
    "narrow": (lambda x: torch.narrow(x, length=2, start=1, dim=1), lambda x: x.narrow(1, 1, 2)),
    "flip": (lambda x: torch.flip(dims=(1,), input=x), lambda x: torch.flip(x, (1,))),
    "mean": (lambda x: x.mean(axis=(2, 3), keepdims=True), lambda x: x.mean((2, 3), True)),
    "permute": (lambda x: x.permute(dims=(0, 2, 3, 1)), lambda x: x.permute(0, 2, 3, 1)),
    "transpose": (lambda x: torch.transpose(x, dim1=1, dim0=2), lambda x: x.transpose(2, 1)),
    "unflatten": (lambda x: x.unflatten(sizes=(2, 2), dim=1), lambda x: x.unflatten(1, (2, 2))),
    "view": (lambda x: x.view(size=(x.size(dim=0), -1)), lambda x: x.view(x.size(0), -1)),
    "softmax": (lambda x: F.softmax(x, _stacklevel=3, dim=1), lambda x: F.softmax(x, 1)),
    "max pool": (lambda x: F.max_pool2d(kernel_size=2, input=x), lambda x: F.max_pool2d(x, 2)),
    "product": (lambda x: torch.mm(x.mean((2, 3)), mat2=x.mean((0, 2))), lambda x: x.mean((2, 3)).mm(x.mean((0, 2)))),
    "add": (lambda x: x.add(alpha=2, other=x.relu()), lambda x: torch.add(x, x.relu(), alpha=2)),
    "pad": (lambda x: F.pad(x, value=0.0, pad=(1, 1)), lambda x: F.pad(x, (1, 1), "constant", 0.0)),
}


def calls(change: Any) -> list[Any]:
    """What is read of each node, tensors left out."""
    found = [read(n, {}, None) or read_shaping(n, {}) for n in symbolic_trace(change).graph.nodes]
    return [(c.op, {k: str(v) for k, v in c.args.items() if not isinstance(v, Node)}) for c in found if c is not None]


@pytest.mark.parametrize("name", PAIRS)
def test_by_keyword_as_by_position(name: str) -> None:
    by_keyword, by_position = PAIRS[name]
    assert calls(by_keyword) == calls(by_position)
    agrees(usual(lambda s, x: by_keyword(normed(s, x)).relu()), fires=True)
    agrees(usual(lambda s, x: by_position(normed(s, x)).relu()), fires=True)


def test_the_size_of_one_dim_is_not_the_whole_shape() -> None:
    agrees(usual(lambda s, x: normed(s, x).mean((1, 2, 3)).reshape(x.size(dim=0))), fires=True)
    agrees(usual(lambda s, x: normed(s, x).reshape(x.size(dim=0) * x.size(dim=1), -1)), fires=True)
    agrees(usual(lambda s, x: normed(s, x).reshape(x.size(dim=0), x.size(dim=1), -1) * s.f, f=torch.rand(4, 1)))


@pytest.mark.parametrize(
    "pool",
    [
        lambda x: F.max_pool2d(x, 2, return_indices=True),
        lambda x: F.max_pool2d(x, 2, None, 0, 1, False, True),
        lambda x: F.adaptive_max_pool2d(x, 2, True),
        lambda x: F.adaptive_max_pool2d(return_indices=True, output_size=2, input=x),
        lambda x: torch._C._nn.adaptive_max_pool2d(x, 2),
    ],
)
def test_a_pool_with_indices_is_no_tensor(pool: Any) -> None:
    graph = symbolic_trace(lambda x: pool(x)[0]).graph
    x, pair, first = list(graph.nodes)[:3]
    assert pooled(pair, {}) is None
    found = {n: c for n in graph.nodes if (c := read(n, {}, None)) is not None}
    facts = infer(graph, found, {}, {}, {x: torch.Size((1, 4, 8, 8))})
    assert facts[first].rank != 3
    agrees(usual(lambda s, x: s.b(s.p(pool(s.a(x))[0])), p=nn.Conv2d(4, 4, 1)), fires=True)


def test_statistics_given_by_keyword() -> None:
    def swapped(self: Any, x: Tensor) -> Tensor:
        b = self.b
        y = F.batch_norm(running_var=b.running_var, weight=b.weight, running_mean=b.running_mean, input=self.a(x))
        return F.relu(inplace=True, input=y)

    agrees(usual(swapped), fires=True)
    standard = {"running_var": None, "running_mean": None, "training": True}
    agrees(usual(lambda s, x: s.b(F.conv2d(x, F.batch_norm(s.w, **standard))), w=torch.rand(4, 4, 1, 1)), fires=True)


def test_graphs_made_by_hand() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    check = graph.call_function(torch._assert, (), {"condition": True, "message": ""})
    assert rank_check(check) is None
    cut = graph.call_function(aten.slice.Tensor, (), {"self": x, "dim": 1, "start": 1, "end": 2})
    copied = graph.call_function(aten.copy_.default, (cut, 1))
    assert views(cut) == [cut]
    call = read(copied, {}, None)
    assert call is not None and call.args["input"] is x and call.args["index"] == (slice(None), slice(1, 2))
