"""What a forward asks and does beside computing: a condition on later calls, or a refusal that names it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_untouched, fingerprint, relative_error
from safety import pickled, usual
from torch import Tensor, nn
from torch.compiler import is_compiling as by_another_name

import fxfuse
from fxfuse.capture.export.program import export, export_behind
from fxfuse.refusal import CaptureError

Forward = Callable[..., Any]
EXAMPLES = torch.randn(2, 4, 6, 5, dtype=torch.float64)
LAST = EXAMPLES.to(memory_format=torch.channels_last)
COUNT = {"calls": 0}
TOTAL = 0


class Helper:
    shared = 0

    def __init__(self) -> None:
        self.k, self.seen, self.nested = 1, [0], {"a": [1], "n": 1}


def counts_calls(self: Any, x: Tensor) -> Tensor:
    self.step += 1
    return self.b(self.a(x)) * self.step


def counts_in_an_object(self: Any, x: Tensor) -> Tensor:
    self.helper.k += 1
    return self.b(self.a(x)) * self.helper.k


def counts_deep_inside(self: Any, x: Tensor) -> Tensor:
    self.helper.nested["a"].append(2)
    return self.b(self.a(x)) * len(self.helper.nested["a"])


def counts_in_a_dict(self: Any, x: Tensor) -> Tensor:
    self.helper.nested["n"] += 1
    return self.b(self.a(x)) * self.helper.nested["n"]


def counts_in_a_class(self: Any, x: Tensor) -> Tensor:
    type(self.helper).shared += 1
    return self.b(self.a(x)) * self.helper.shared


def counts_in_a_global(self: Any, x: Tensor) -> Tensor:
    global TOTAL
    TOTAL += 1
    return self.b(self.a(x)) * TOTAL


def counts_in_a_table(self: Any, x: Tensor) -> Tensor:
    COUNT["calls"] += 1
    return self.b(self.a(x)) * COUNT["calls"]


def closure() -> Forward:
    calls = 0

    def counts_in_a_closure(self: Any, x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return self.b(self.a(x)) * calls

    return counts_in_a_closure


STATE: dict[Forward, str] = {
    counts_calls: r"sets self\.step",
    counts_in_an_object: r"self\.helper\.k",
    counts_deep_inside: r"self\.helper\.nested\['a'\]",
    counts_in_a_dict: r"self\.helper\.nested\['n'\]",
    counts_in_a_class: r"Helper\.shared",
    counts_in_a_global: r"test_exported_decisions\.TOTAL",
    counts_in_a_table: r"test_exported_decisions\.COUNT\['calls'\]",
    closure(): "changes calls",
}


@pytest.mark.parametrize("shared", [False, True], ids=["one name", "two names"])
@pytest.mark.parametrize("forward", STATE, ids=lambda f: f.__name__)
def test_a_forward_that_keeps_count_is_refused_and_the_count_is_put_back(forward: Forward, shared: bool) -> None:
    """A layer with two names makes torch.export run the forward of stand-ins for the modules."""
    model = usual(forward)
    model.step, model.helper = 0, Helper()
    if shared:
        model.same = model.a
    before = fingerprint(model)
    with pytest.raises(CaptureError, match=STATE[forward]):
        export(model, (EXAMPLES,))
    assert_untouched(model, before)
    assert (model.step, model.helper.k, model.helper.nested) == (0, 1, {"a": [1], "n": 1})
    assert (Helper.shared, TOTAL, COUNT) == (0, 0, {"calls": 0})
    with pytest.raises(CaptureError, match=STATE[forward]):  # and again, from the same state
        export_behind(model, (EXAMPLES,))


@functools.lru_cache
def grid(n: int) -> Tensor:
    return torch.arange(n, dtype=torch.float64)


def remembers(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(x)) + grid(5)


def test_a_cache_is_a_memo_and_holds_no_tensor_of_the_export() -> None:
    grid.cache_clear()
    captured, _ = export_behind(usual(remembers), (EXAMPLES,))
    assert captured.how == "export" and any("arange" in str(n.target) for n in captured.graph.nodes)
    assert type(grid(5)) is Tensor


# What is asked, an input for which the answer is another one, and one for which it is the same.
ASKED: dict[str, tuple[Callable[[Tensor], Any], Callable[[], Tensor]]] = {
    "contiguous": (lambda x: x.is_contiguous(), lambda: LAST),
    "a format": (lambda x: x.is_contiguous(memory_format=torch.channels_last), lambda: LAST),
    "one stride": (lambda x: x.stride(1) == x.shape[2] * x.shape[3], lambda: LAST),
    "the last stride": (lambda x: x.stride()[-1] == 1, lambda: EXAMPLES.mT.contiguous().mT),
    "the offset": (lambda x: x.storage_offset() == 0, lambda: torch.cat([EXAMPLES, EXAMPLES])[2:]),
    "a computed one": (lambda x: (x * 2).is_contiguous(), lambda: LAST),
    "gradients": (lambda x: x.requires_grad, lambda: EXAMPLES.clone().requires_grad_()),
    "a leaf": (lambda x: x.is_leaf, lambda: EXAMPLES.clone().requires_grad_() * 1),
    "inference": (lambda x: x.is_inference(), lambda: inference()),
    "a parameter": (lambda x: isinstance(x, nn.Parameter), lambda: nn.Parameter(EXAMPLES)),
    "its class": (lambda x: type(x) is nn.Parameter, lambda: nn.Parameter(EXAMPLES)),
}


def inference() -> Tensor:
    with torch.inference_mode():
        return EXAMPLES.clone()


@pytest.mark.parametrize("name", ASKED)
def test_an_answer_is_a_condition(name: str) -> None:
    ask, other = ASKED[name]
    model = usual(lambda self, x: self.b(self.a(x)) + (x if ask(x) else 2 * x))
    captured, holds = export_behind(model, (EXAMPLES,))
    graph = torch.fx.GraphModule(model, captured.graph)
    assert not any("_assert" in str(n.target) for n in captured.graph.nodes)
    for check in (holds, copy.deepcopy(holds), pickled(holds)):
        for shape in ((2, 4, 6, 5), (3, 4, 7, 9), (1, 4, 5, 5)):
            x = torch.randn(shape, dtype=torch.float64)
            assert check(x) and check(x=x) and relative_error(graph(x), model(x)) < 1e-12
        assert not check(other()) and not check(EXAMPLES.float()) and not check(EXAMPLES[0])
        assert not check(EXAMPLES[:, :2]) and not check() and not check(EXAMPLES, EXAMPLES) and not check([EXAMPLES])


@pytest.mark.parametrize("name", ["contiguous", "a format", "the last stride", "the offset", "gradients", "a leaf"])
def test_asked_for_by_name_it_is_an_assertion_that_names_the_line(name: str) -> None:
    ask, other = ASKED[name]
    model = usual(lambda self, x: self.b(self.a(x)) + (x if ask(x) else 2 * x))
    fused = fxfuse.optimize(model, EXAMPLES, capture="export")
    assert fxfuse.report(fused).fired
    for candidate in (fused, pickled(fused)):
        for shape in ((2, 4, 6, 5), (3, 4, 7, 9)):
            x = torch.randn(shape, dtype=torch.float64)
            assert relative_error(candidate(x), model(x)) < 1e-12
        with pytest.raises(AssertionError, match=r"made for inputs with x\..*decided at .*test_exported_decisions\.py"):
            candidate(other())


@pytest.mark.parametrize(
    ("ask", "context"),
    [
        (lambda: torch.is_grad_enabled(), torch.enable_grad()),
        (lambda: torch.is_autocast_enabled("cpu"), torch.autocast("cpu", dtype=torch.bfloat16)),
        (lambda: torch.is_inference_mode_enabled(), torch.inference_mode()),
    ],
    ids=["gradients", "autocast", "inference"],
)
def test_modes_are_conditions_that_no_graph_checks(ask: Callable[[], bool], context: Any) -> None:
    model = usual(lambda self, x: self.b(self.a(x)) + (x if ask() else 2 * x))
    captured, holds = export_behind(model, (EXAMPLES,))
    with torch.no_grad():
        assert holds(EXAMPLES)
        graph = torch.fx.GraphModule(model, captured.graph)
        assert relative_error(graph(EXAMPLES), model(EXAMPLES)) < 1e-12
        with context:
            assert not holds(EXAMPLES) and list(holds.failing(EXAMPLES)) == list(holds.modes)
    with pytest.raises(CaptureError, match=r"test_exported_decisions\.py:\d+ decides by torch\.is_"):
        export(model, (EXAMPLES,))


@pytest.mark.parametrize("ask", [lambda y: y.requires_grad, lambda y: y.grad_fn is None, lambda y: y.is_leaf])
def test_what_no_condition_can_say_is_refused(ask: Callable[[Tensor], bool]) -> None:
    model = usual(lambda self, x: self.b(y) if ask(y := self.a(x)) else self.n(y))
    with pytest.raises(CaptureError, match=r"asks for \w+ of a computed tensor \(.*test_exported_decisions\.py:\d+\)"):
        export(model, (EXAMPLES,))


@pytest.mark.parametrize(
    "ask", [torch.compiler.is_compiling, lambda: torch.compiler.is_exporting(), lambda: by_another_name()]
)
def test_nothing_is_being_compiled_as_far_as_the_model_is_told(ask: Callable[[], bool]) -> None:
    model = usual(lambda self, x: self.b(self.a(x)) * (3 if ask() else 1))
    fused = fxfuse.optimize(model, EXAMPLES, capture="export")
    for batch in (1, 2, 3):
        x = torch.randn(batch, 4, 7, 5, dtype=torch.float64)
        assert relative_error(fused(x), model(x)) < 1e-12
    assert torch.compiler.is_compiling() is False and by_another_name.__module__ == "torch.compiler"


def options(self: Any, x: Tensor, mask: Tensor | None = None, *rest: Tensor, k: int = 1, **more: Any) -> Tensor:
    return self.b(self.a(x)) * k if mask is None else x


def nested(self: Any, xs: list[Tensor], d: dict[str, Tensor]) -> Tensor:
    return self.b(self.a(xs[0])) + d["k"]


def test_other_forms_of_a_call_are_other_calls() -> None:
    x, y = torch.randn(2, 2, 4, 5, 5).double()
    _, holds = export_behind(usual(options), (x,))
    assert holds(x) and holds(x, None) and holds(x, k=1) and holds(y, mask=None)
    for args, kwargs in (((x, y), {}), ((x,), {"k": 2}), ((x,), {"k": True}), ((x, None, y), {}), ((x,), {"z": 1})):
        assert not holds(*args, **kwargs)
    _, holds = export_behind(usual(nested), ([x, x.clone()], {"k": y}))
    assert holds([x, y], {"k": x.clone()}) and holds([y, x], d={"k": y.clone()})
    assert not holds((x, y), {"k": x.clone()}) and not holds([x], {"k": y}) and not holds([x, y], {"l": x})
    assert not holds([x, x], {"k": y}) and not holds([x, y], {"k": x.float()})
