"""The second opinion on an export, objects that a forward returns, and code that nobody reads."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error
from safety import pickled, usual
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxfuse
from fxfuse.capture.export.calls import check
from fxfuse.capture.export.program import export, export_behind
from fxfuse.refusal import CaptureError

EXAMPLES = torch.randn(2, 4, 6, 5, dtype=torch.float64)
HERE = r"test_exported_calls\.py:\d+"


def asks_for_its_class(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(x)) if type(x) is Tensor else self.n(x)


def asks_for_the_class_of_a_size(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(x)) if isinstance(x.shape[2], torch.SymInt) else self.n(x)


def stores_what_it_computed(self: Any, x: Tensor) -> Tensor:
    if "grid" not in self.memo:
        self.memo["grid"] = x.mean() * torch.arange(4, dtype=x.dtype).view(4, 1, 1)
    return self.b(self.a(x)) + self.memo["grid"]


@pytest.mark.parametrize(
    ("forward", "text"),
    [
        (asks_for_its_class, f"at .*{HERE}"),
        (asks_for_the_class_of_a_size, f"at .*{HERE}"),
        (stores_what_it_computed, "when it is called again"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_a_graph_that_does_something_else_is_refused(forward: Callable[..., Tensor], text: str) -> None:
    model = usual(forward)
    model.memo = {}
    with pytest.raises(CaptureError, match=f"something else than its exported graph: .*{text}"):
        export(model, (EXAMPLES,))
    assert model.memo == {}


def edit(captured: Any, name: str, change: Callable[[Any], None]) -> None:
    change(next(n for n in captured.graph.nodes if name in str(n.target)))
    captured.graph.lint()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("aten.mul", lambda n: n.update_arg(1, 3)),
        ("aten.mul", lambda n: n.update_arg(0, n.args[0].args[0])),
        ("aten.relu", lambda n: n.replace_all_uses_with(n.args[0])),
        ("aten.batch_norm", lambda n: n.update_arg(1, n.args[2])),
        ("aten.relu", lambda n: setattr(n, "target", torch.ops.aten.tanh.default)),
    ],
    ids=["number", "earlier call", "left out", "weight", "operation"],
)
def test_every_kind_of_difference_is_seen(name: str, change: Callable[[Any], None]) -> None:
    model = usual(lambda self, x: (self.b(self.a(x)) * 2).relu() + F.conv2d(x, self.p.weight))
    captured, _ = export_behind(model, (EXAMPLES,))
    check(model, captured, (EXAMPLES,))
    edit(captured, name, change)
    captured.graph.eliminate_dead_code()
    with pytest.raises(CaptureError, match=rf"something else than its exported graph: .*({HERE}|other tensors)"):
        check(model, captured, (EXAMPLES,))


@pytest.mark.parametrize("layer", ["encoder", "attention", "lstm"])
def test_faster_ways_of_torchs_own_layers_are_no_difference(layer: str) -> None:
    built: dict[str, nn.Module] = {
        "encoder": nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        "attention": nn.MultiheadAttention(8, 2, batch_first=True),
        "lstm": nn.LSTM(8, 8, batch_first=True),
    }

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = built[layer], nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            out = self.layer(x, x, x) if layer == "attention" else self.layer(x)
            return self.head(out[0] if isinstance(out, tuple) else out)

    model = Net().eval()
    captured, holds = export_behind(model, (torch.randn(2, 5, 8),))
    graph = torch.fx.GraphModule(model, captured.graph)
    with torch.no_grad():
        for shape in ((2, 5, 8), (3, 5, 8), (2, 5, 8)):
            x = torch.randn(shape)
            assert not holds(x) or relative_error(graph(x), model(x)) < 1e-5


@dataclass
class Result:
    y: Tensor
    parts: Any = None
    hidden: Tensor | None = None


class Box(dict[str, Any]):
    """As transformers' ModelOutput: a dict of a class of its own."""


class Pair:
    def __init__(self, first: Tensor, note: str) -> None:
        self.first, self.note = first, note


torch.export.register_dataclass(Result, serialized_type_name="tests.Result")
pytree.register_pytree_node(Box, lambda b: (list(b.values()), list(b)), lambda v, k: Box(zip(k, v, strict=True)))
pytree.register_pytree_node(Pair, lambda p: ([p.first], p.note), lambda v, note: Pair(v[0], note))


def returns_a_dataclass(self: Any, x: Tensor) -> Result:
    return Result(self.b(self.a(x)), parts=[x * 2, {"p": self.p(x)}])


def returns_a_dict_of_its_own(self: Any, x: Tensor) -> Box:
    return Box(y=self.b(self.a(x)), inner=Result(x, hidden=self.p(x)), none=None)


def returns_a_class_with_a_note(self: Any, x: Tensor) -> tuple[Any, ...]:
    return Pair(self.b(self.a(x)), "a note, with 'quotes'"), torch.return_types.max((x, self.p(x)))


@pytest.mark.parametrize(
    "forward", [returns_a_dataclass, returns_a_dict_of_its_own, returns_a_class_with_a_note], ids=lambda f: f.__name__
)
def test_objects_are_returned_as_what_they_are(forward: Callable[..., Any]) -> None:
    model = usual(forward)
    fused = fxfuse.optimize(model, EXAMPLES, capture="export")
    assert fxfuse.report(fused).fired
    for candidate in (fused, pickled(fused), copy.deepcopy(fused)):
        for shape in ((2, 4, 6, 5), (1, 4, 7, 7), (3, 4, 5, 9)):
            x = torch.randn(shape, dtype=torch.float64)
            (ours, kind), (theirs, want) = map(pytree.tree_flatten, (candidate(x), model(x)))
            assert kind == want
            for a, b in zip(ours, theirs, strict=True):
                assert a is b is None or relative_error(a, b) < 1e-12


@pytest.mark.parametrize(
    "unread",
    [
        lambda self, x: torch.einsum("oihw,hw->oihw", self.a.weight, self.a.weight[0, 0]),
        lambda self, x: x.shape[2] * x.shape[3] + x.shape[0],
        lambda self, x: self.n(x).mean() == 0,
    ],
    ids=["of weights", "of sizes", "of the input"],
)
def test_what_nobody_reads_is_not_in_the_graph(unread: Callable[..., Any]) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        unread(self, x)
        return self.b(self.a(x))

    captured, _ = export_behind(usual(forward), (EXAMPLES,))
    assert [str(n.target) for n in captured.graph.nodes if n.op == "call_function"] == [
        "aten.conv2d.default",
        "aten.batch_norm.default",
    ]
    model = usual(forward)
    fused = fxfuse.optimize(model, EXAMPLES, capture="export")
    for batch in (1, 2, 3):
        x = torch.randn(batch, 4, 7, 5, dtype=torch.float64)
        assert relative_error(fused(x), model(x)) < 1e-12
    assert sum(p.numel() for p in fused.parameters()) == 4 * 4 * 9 + 4


def test_what_nobody_reads_but_writes_or_draws_stays() -> None:
    model = usual(lambda self, x: (torch.rand(2), self.n.running_mean.add_(1), self.b(self.a(x)))[2])
    captured, _ = export_behind(model, (EXAMPLES,))
    targets = {str(n.target) for n in captured.graph.nodes}
    assert {"aten.rand.default", "aten.add_.Tensor"} <= targets
