"""An average pool behind the pointwise layer it stood before: exact at the border, and only where it does less work."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exactly import exactly
from helpers import count, randomize
from law_cases import exact, integers, merged
from safety import agrees, model_of
from torch import Tensor, nn

import fxfuse

Forward = Callable[..., Any]
SHAPE = (2, 12, 7, 6)


def branch(forward: Forward, width: int = 3, **parts: Any) -> nn.Module:
    """A module with a 1x1 convolution `c`, its batch norm `b` and a 2x2 average pool that keeps the size, `p`."""
    layers: dict[str, Any] = {"c": nn.Conv2d(12, width, 1), "b": nn.BatchNorm2d(width)}
    layers |= {"p": nn.AvgPool2d(2, 1, 1)}
    return randomize(model_of(forward, **(layers | parts)).double(), integer=True)


def swapped(report: Any) -> int:
    return int(report.by_pattern.get("pool_swap", 0))


def usual(self: Any, x: Tensor) -> Tensor:
    return F.relu(self.b(self.c(self.p(x))))


def bare(self: Any, x: Tensor) -> Tensor:
    return self.c(self.p(x)).abs()


def function(self: Any, x: Tensor) -> Tensor:
    return F.relu(self.b(self.c(F.avg_pool2d(x * x.sign(), 2, stride=1, padding=1))))


def module_in_a_chain(self: Any, x: Tensor) -> Tensor:
    return self.b(self.c(self.p(self.b.weight.sum() * x.relu()))) * 2 + 1


def shifted(self: Any, x: Tensor) -> Tensor:
    return self.b(self.c(self.p(x.relu() * 2 + 1))).relu()


def branches(self: Any, x: Tensor) -> Tensor:
    return torch.cat([self.b(self.c(self.p(x))), F.max_pool2d(x, 2, 1, 1)], 1)


FIRING: dict[str, tuple[Forward, dict[str, Any]]] = {
    "norm and relu": (usual, {}),
    "without a bias": (usual, {"c": nn.Conv2d(12, 3, 1, bias=False)}),
    "convolution alone": (bare, {}),
    "convolution without bias": (bare, {"c": nn.Conv2d(12, 3, 1, bias=False)}),
    "function": (function, {}),
    "a factor and a shift before it": (shifted, {}),
    "in a chain": (module_in_a_chain, {}),
    "branches": (branches, {}),
    "a larger map": (usual, {"p": nn.AvgPool2d(2, 1, 1)}),
    "one axis": (usual, {"p": nn.AvgPool2d((1, 2), 1, (0, 1))}),
    "groups": (usual, {"c": nn.Conv2d(12, 3, 1, groups=3)}),
}


@pytest.mark.parametrize("name", FIRING)
def test_the_layer_goes_first(name: str) -> None:
    forward, parts = FIRING[name]
    for examples in (None, torch.zeros(SHAPE).double()):
        fused, report = exact(branch(forward, **parts), SHAPE, example_inputs=examples)
        assert swapped(report) == 1
        order = [n.name for n in fused.graph.nodes]
        pool = next(i for i, n in enumerate(order) if n.startswith(("p", "avg_pool")) and "placeholder" not in n)
        assert any(n.startswith("c") for n in order[:pool])
        assert not any("batch_norm" in k for k in report.after.ops)


@pytest.mark.parametrize("name", FIRING)
def test_what_holds_for_every_result(name: str) -> None:
    forward, parts = FIRING[name]
    agrees(branch(forward, **parts), (SHAPE, (3, 12, 6, 9)), fires=True)


def test_three_by_three_in_floats() -> None:
    model = branch(usual, p=nn.AvgPool2d(3, 1, 1))
    assert swapped(fxfuse.report(agrees(model, (SHAPE, (1, 12, 3, 5)), fires=True))) == 1


def read_twice(self: Any, x: Tensor) -> Tensor:
    y = self.p(x)
    return self.c(y).relu() + y.amax(1, keepdim=True)


def written_between(self: Any, x: Tensor) -> Tensor:
    x = x + 1
    y = self.p(x)
    x.mul_(2)
    return self.c(y).relu()


def sized(self: Any, x: Tensor) -> Tensor:
    y = self.p(x)
    return self.b(self.c(y)).relu() * y.shape[1] + y.size(-1)


REFUSED: dict[str, tuple[Forward, dict[str, Any], str]] = {
    "more channels": (bare, {"c": nn.Conv2d(12, 13, 1)}, "more channels to average"),
    "as many channels": (bare, {"c": nn.Conv2d(12, 12, 1)}, "more channels to average"),
    "a smaller map": (bare, {"p": nn.AvgPool2d(2, 1)}, "more positions to work on"),
    "padding that is not counted": (bare, {"p": nn.AvgPool2d(2, 1, 1, count_include_pad=False)}, "no convolution"),
    "another divisor": (bare, {"p": nn.AvgPool2d(2, 1, 1, divisor_override=2)}, "no convolution"),
    "ceil_mode": (bare, {"p": nn.AvgPool2d(2, 1, 1, ceil_mode=True)}, "no convolution"),
    "3x3": (bare, {"c": nn.Conv2d(12, 1, 3)}, ""),
    "a stride": (bare, {"p": nn.AvgPool2d(2, 2)}, ""),
    "read twice": (read_twice, {}, ""),
    "written between": (written_between, {}, "overwritten in place"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    forward, parts, reason = REFUSED[name]
    _, report = exact(branch(forward, **parts), SHAPE)
    assert not swapped(report)
    assert not reason or any(reason in r.reason for r in report.refused)


def test_a_pool_without_padding_when_asked_for() -> None:
    model = branch(usual, p=nn.AvgPool2d(2, 1))
    fused, report = exact(model, SHAPE, patterns=["pool_swap!", "conv_bn"])
    assert swapped(report) == 1
    assert count(fused, torch.zeros(SHAPE).double())["add"] == 0  # its bias is the same before the pool and after it


def test_sizes_of_what_is_gone() -> None:
    agrees(branch(sized), (SHAPE,))


def test_the_swapped_layer_is_a_sibling() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = torch.cat([self.b(self.c(self.p(x)))[..., 1:, 1:].relu(), self.d(x).relu(), self.e(x).relu()], 1)
        return y + self.e(x).sigmoid().round().amax(1, keepdim=True)

    model = branch(forward, d=nn.Conv2d(12, 4, 1), e=nn.Conv2d(12, 5, 1, bias=False))
    fused, report = exact(model, SHAPE)
    assert merged(report) == swapped(report) == 1
    assert count(fused, torch.zeros(SHAPE).double())["conv"] == 1


def test_new_weights_and_copies() -> None:
    model, x = branch(usual), torch.randint(-3, 4, SHAPE).double()
    other = randomize(branch(usual), seed=7, integer=True)
    fused = fxfuse.optimize(model)
    with torch.no_grad():
        assert torch.equal(fxfuse.refresh(fused, other)(x), other(x))
        assert torch.equal(fxfuse.refresh(fused, model)(x), model(x))
    copies = [copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), torch.jit.script(fused)]
    copies.append(torch.export.export(fused, (x,)).module())
    buffer, blank = io.BytesIO(), copy.deepcopy(fused)
    torch.save(fused.state_dict(), buffer)
    buffer.seek(0)
    for parameter in blank.parameters():
        parameter.detach().zero_()
    blank.load_state_dict(torch.load(buffer))
    for module in (*copies, blank):
        assert torch.equal(module(x), model(x))
    assert sum(p.numel() for p in fused.parameters()) == 12 * 3 + 3
    assert fxfuse.plan(model).after == fxfuse.report(fxfuse.optimize(model)).after


@pytest.mark.parametrize("forward", [usual, branches])
def test_under_torch_compile(forward: Forward) -> None:
    model = branch(forward)
    compiled = torch.compile(model, backend="fxfuse", options={"inner": "eager", "strict": True})
    with torch.no_grad():
        for seed in (0, 4, 5):
            randomize(model, seed=seed, integer=True)
            x = torch.randint(-3, 4, SHAPE).double()
            assert torch.equal(compiled(x), model(x))
    (report,) = fxfuse.report(compiled)
    assert swapped(report) == 1


@pytest.mark.parametrize("between", [nn.Identity(), nn.BatchNorm2d(4)])
def test_a_pool_that_shrinks_the_map_goes_first_under_torch_compile(between: nn.Module) -> None:
    model = nn.Sequential(nn.ReLU(), nn.Conv2d(12, 4, 1), between, nn.AvgPool2d(2), nn.Conv2d(4, 3, 3, padding=1))
    randomize(model.double(), integer=True)
    compiled = torch.compile(model, backend="fxfuse", options={"inner": "eager", "strict": True})
    x = torch.randint(-3, 4, (2, 12, 8, 6)).double()
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))
    (report,) = fxfuse.report(compiled)
    assert swapped(report) == 1
    positions, late = 2 * 8 * 6, 2 * 4 * 3 * 4 * 3 * 9
    assert (report.before.macs, report.after.macs) == (positions * 48 + late, positions // 4 * 48 + late)
    exported = fxfuse.report(exact(model, (2, 12, 8, 6), example_inputs=x, capture="export")[0])
    assert (exported.before.macs, exported.after.macs) == (report.before.macs, report.after.macs)


@pytest.mark.parametrize("forward", [usual, bare])
def test_an_exported_model(forward: Forward) -> None:
    x = torch.randint(-3, 4, SHAPE).double()
    _, report = exact(branch(forward), SHAPE, example_inputs=x, capture="export")
    assert swapped(report) == 1


def test_under_autocast_the_bias_widens_nothing() -> None:
    model = branch(usual).float()
    fused, x = fxfuse.optimize(model), torch.randn(SHAPE)
    assert swapped(fxfuse.report(fused)) == 1
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert fused(x).dtype == model(x).dtype


def test_inputs_without_a_batch() -> None:
    exactly(branch(bare), integers(SHAPE[1:]), integers(SHAPE), fires={"pool_swap": 1})


@pytest.mark.parametrize("dims", [1, 3])
def test_other_ranks(dims: int) -> None:
    conv, pool = {1: (nn.Conv1d, nn.AvgPool1d), 3: (nn.Conv3d, nn.AvgPool3d)}[dims]
    model = branch(bare, c=conv(12, 3, 1), p=pool(2, 1, 1))
    assert swapped(exact(model, (2, 12, 7, 6, 5)[: dims + 2])[1]) == 1
