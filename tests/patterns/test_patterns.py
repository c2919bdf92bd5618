"""Patterns: their examples, choosing them, forcing them, writing one."""

from __future__ import annotations

import re

import pytest
import torch
from helpers import randomize, relative_error
from torch import nn

import fxfuse
from fxfuse import pattern as registry

EXAMPLES = [(name, example) for name, pattern in registry.known().items() for example in pattern.examples]


class Summed(nn.Module):
    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.branches[0](x) + self.branches[1](x)


def convs(model: nn.Module) -> int:
    return sum(isinstance(m, nn.Conv2d) for m in model.modules())


@pytest.mark.parametrize(("name", "example"), EXAMPLES, ids=[f"{n}: {e.title}" for n, e in EXAMPLES])
def test_example(name: str, example: fxfuse.Example) -> None:
    model = randomize(example.build()).double()
    fused = fxfuse.optimize(model, patterns=example.patterns)
    report = fxfuse.report(fused)
    assert any(name in f.patterns for f in report.fired) == example.fires
    if not example.fires:
        assert any(re.search(example.reason, r.reason) for r in report.refused)
    x = torch.randn(example.shape, dtype=torch.float64)
    with torch.no_grad():
        assert relative_error(fused(x), model(x)) < 1e-13


def test_every_pattern_documents_itself() -> None:
    for name, pattern in registry.known().items():
        assert pattern.name == name and pattern.law and pattern.refused_when
        assert any(e.fires for e in pattern.examples) and any(not e.fires for e in pattern.examples)


def test_unknown_pattern_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"unknown pattern 'conv_nb'; known: avg_pool, border, concat, "):
        fxfuse.optimize(nn.ReLU().eval(), patterns=["conv_nb"])


def test_unknown_cost_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"unknown cost 'flops'; known: macs, nodes, params"):
        fxfuse.optimize(nn.ReLU().eval(), cost="flops")


@pytest.mark.parametrize(
    ("patterns", "fired"),
    [
        (None, {"conv_bn", "parallel_conv"}),
        (["conv_bn"], {"conv_bn"}),
        ("conv_bn", {"conv_bn"}),
        (["-parallel_conv"], {"conv_bn"}),
        (["parallel_conv"], set()),
        ([], set()),
    ],
)
def test_picking_and_leaving_out(patterns: list[str] | str | None, fired: set[str]) -> None:
    model = randomize(Summed(*(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)) for _ in range(2)))).double()
    fused = fxfuse.optimize(model, patterns=patterns)
    report = fxfuse.report(fused)
    assert set(report.by_pattern) == fired
    if fired != {"conv_bn", "parallel_conv"}:
        assert any("is switched off" in r.reason and r.remedy for r in report.refused)
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    with torch.no_grad():
        assert relative_error(fused(x), model(x)) < 1e-14


@pytest.mark.parametrize(("cost", "left"), [("macs", 2), ("nodes", 1), ("params", 2), (lambda op, positions: 1, 1)])
def test_cost_decides(cost: object, left: int) -> None:
    model = randomize(nn.Sequential(nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.Conv2d(8, 8, 1))).double()
    fused = fxfuse.optimize(model, cost=cost)
    assert convs(fused) == left
    x = torch.randn(2, 8, 7, 6, dtype=torch.float64)
    with torch.no_grad():
        assert relative_error(fused(x), model(x)) < 1e-14


def test_step_that_costs_more_alone_is_taken_where_it_pays() -> None:
    chain = nn.Sequential(nn.Conv2d(8, 4, 1, bias=False), nn.Conv2d(4, 8, 3, padding=1))
    alone, beside = randomize(chain), randomize(Summed(nn.Conv2d(8, 8, 3, padding=1), chain))
    assert convs(fxfuse.optimize(alone)) == 2
    assert convs(fxfuse.optimize(beside)) == 1


class Blueprint(fxfuse.Pattern):
    name = "blueprint"
    law = "1x1 -> depthwise kxk => kxk"
    always = True

    def matches(self, relation: str, f: fxfuse.Operator, g: fxfuse.Operator) -> bool:
        return f.weighted and f.pointwise and g.weighted and g.depthwise


def test_own_pattern() -> None:
    model = randomize(nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 8, 3, padding=1, groups=8))).double()
    assert convs(fxfuse.optimize(model)) == 2
    fxfuse.register(Blueprint)
    try:
        fused = fxfuse.optimize(model)
        assert convs(fused) == 1 and fxfuse.report(fused).by_pattern == {"blueprint": 1}
        x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
        with torch.no_grad():
            assert relative_error(fused(x), model(x)) < 1e-14
        with pytest.raises(ValueError, match="registered already"):
            fxfuse.register(type("Other", (Blueprint,), {}))
    finally:
        fxfuse.unregister("blueprint")
    assert convs(fxfuse.optimize(model)) == 2


def test_pattern_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a name and relations"):
        fxfuse.register(type("Nameless", (fxfuse.Pattern,), {}))
    with pytest.raises(ValueError, match="needs a name and relations"):
        fxfuse.register(type("Odd", (fxfuse.Pattern,), {"name": "odd", "relations": ("beside",)}))
