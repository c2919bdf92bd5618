"""Siblings: layers of one tensor as one wide layer, exact, and refused where somebody would notice the slices."""

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
from torch.fx import GraphModule

import fxfuse
from fxfuse.capture.export.graph import rebuild

Forward = Callable[..., Any]


def pair(forward: Forward, **parts: Any) -> nn.Module:
    """A module with two 1x1 convolutions `f` and `g`, their batch norms `b` and `n`, and a 3x3 `a`, on integers."""
    layers: dict[str, Any] = {"f": nn.Conv2d(12, 5, 1), "g": nn.Conv2d(12, 6, 1, bias=False)}
    layers |= {"b": nn.BatchNorm2d(5), "n": nn.BatchNorm2d(6), "a": nn.Conv2d(5, 3, 3, padding=1)}
    return randomize(model_of(forward, **(layers | parts)).double(), integer=True)


def apart(self: Any, x: Tensor) -> Tensor:
    y, z = F.relu(self.b(self.f(x))), F.relu(self.n(self.g(x)), inplace=True)
    return self.a(y).sum(1) + z.sum(1)


def bare(self: Any, x: Tensor) -> Tensor:
    return self.a(self.f(x)).sum(1) * self.g(x).sum(1)


def other_activations(self: Any, x: Tensor) -> Tensor:
    return F.relu(self.b(self.f(x)), inplace=True).sum(1) + F.leaky_relu(self.g(x), 0.5).sum(1) * self.g(x).amax(1)


def of_a_product(self: Any, x: Tensor) -> Tensor:
    x = x * x.sigmoid().round()
    return self.f(x).relu().sum(1) + torch.relu(self.g(x)).amax(1)


def met_again(self: Any, x: Tensor) -> Tensor:
    return torch.cat([F.relu(self.f(x)), F.relu(self.b(self.f(x))), F.relu(self.g(x)), x], 1)


def all_met_again(self: Any, x: Tensor) -> Tensor:
    return torch.cat([F.relu(self.g(x)), F.relu(self.b(self.f(x)))], 1)


def called_twice(self: Any, x: Tensor) -> Tensor:
    return F.relu(self.f(x)).sum(1) * F.relu(self.f(x)).amax(1)


def a_join_of_some(self: Any, x: Tensor) -> Tensor:
    y = self.f(x)
    return (y + y.mean((2, 3), keepdim=True)).sum(1) - self.g(x).amax(1)


def asks_sizes(self: Any, x: Tensor) -> Tensor:
    y, z = self.f(x), F.relu(self.g(x))
    n, c, h, w = y.shape
    return (self.b(y).reshape(n, c, h * w).sum(1) + z.flatten(2).sum(1) * z.size(1)) * y.dim()


def viewed(self: Any, x: Tensor) -> Tensor:
    y = self.f(x).view(x.shape[0], 5, -1)
    return (y @ y.transpose(1, 2)).sum((1, 2)) + self.g(x).view(x.shape[0], -1).sum(1)


def pieces(self: Any, x: Tensor) -> Tensor:
    first, second = self.g(x).chunk(2, 1)
    return (first * second).sum(1) + F.relu(self.f(x))[:, 1:].sum(1)


FIRING = {
    "conv, norm, relu": apart, "bare": bare, "other activations": other_activations, "of a product": of_a_product,
    "met again": met_again, "all met again": all_met_again, "called twice": called_twice, "asks sizes": asks_sizes,
    "viewed": viewed, "pieces": pieces, "a reader that joins": a_join_of_some,
}  # fmt: skip


@pytest.mark.parametrize("name", FIRING)
def test_siblings_are_one_layer(name: str) -> None:
    for examples in (None, torch.zeros(2, 12, 7, 5).double()):
        fused, report = exact(pair(FIRING[name]), example_inputs=examples)
        assert merged(report) == 1
        before = count(pair(FIRING[name]), torch.zeros(2, 12, 7, 5).double())
        assert count(fused, torch.zeros(2, 12, 7, 5).double())["conv"] < before["conv"]


@pytest.mark.parametrize("name", FIRING)
def test_what_holds_for_every_result(name: str) -> None:
    agrees(pair(FIRING[name]), ((2, 12, 8, 7), (3, 12, 6, 9)), fires=True)


def test_activations_are_hoisted_and_concatenations_vanish() -> None:
    fused, _ = exact(pair(all_met_again))
    assert [n.op for n in fused.graph.nodes] == ["placeholder", "call_module", "call_function", "output"]
    fused, _ = exact(pair(met_again))
    counts = count(fused, torch.zeros(2, 12, 7, 5).double())
    assert (counts["conv"], counts["relu"], counts["cat"]) == (1, 1, 1)
    (cat,) = (n for n in fused.graph.nodes if n.target is torch.cat)
    assert len(cat.args[0]) == 2
    fused, _ = exact(pair(apart))
    assert count(fused, torch.zeros(2, 12, 7, 5).double())["relu"] == 1


def written(self: Any, x: Tensor) -> Tensor:
    y = self.f(x).relu()
    x.mul_(2)
    return y.sum(1) + self.g(x).relu().sum(1)


def written_by_a_view(self: Any, x: Tensor) -> Tensor:
    x = x + 1
    y = self.f(x).relu()
    x.view(-1).add_(1)
    return y.sum(1) + self.g(x).relu().sum(1)


def output_written(self: Any, x: Tensor) -> Tensor:
    y, z = self.f(x), self.g(x).relu()
    y[:, 0] = 1
    return y.sum(1) + z.sum(1)


def view_written(self: Any, x: Tensor) -> Tensor:
    y, z = self.f(x), self.g(x).relu()
    y.view(-1).add_(1)
    return y.sum(1) + z.sum(1)


def activation_read_twice(self: Any, x: Tensor) -> Tensor:
    y, z = self.f(x), self.g(x).relu()
    w = y.relu_()
    return y.sum(1) + z.sum(1) + w.sum(1)


def returned(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    return self.f(x), F.relu(self.g(x))


def returned_by_a_view(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    return self.f(x).transpose(2, 3), F.relu(self.g(x)).sum(1)


def strides(self: Any, x: Tensor) -> Tensor:
    y = F.relu(self.f(x))
    return y.sum(1) * y.stride(0) + F.relu(self.g(x)).sum(1)


def as_strided(self: Any, x: Tensor) -> Tensor:
    y = self.f(x)
    return torch.as_strided(y, (2, 2), (1, 1)).sum() + F.relu(self.g(x)).sum(1)


REFUSED: dict[str, tuple[Forward, dict[str, Any], str]] = {
    "source written": (written, {}, "overwritten in place before the last"),
    "source written by a view": (written_by_a_view, {}, "overwritten in place before the last"),
    "output written": (output_written, {}, "it is written in place"),
    "view of an output written": (view_written, {}, "it is written in place"),
    "activation in place, read twice": (activation_read_twice, {}, "it is written in place"),
    "returned": (returned, {}, "the model returns it"),
    "returned by a view": (returned_by_a_view, {}, "the model returns it"),
    "strides": (strides, {}, "may look at its strides"),
    "as strided": (as_strided, {}, "may look at its strides"),
    "groups": (bare, {"g": nn.Conv2d(12, 6, 1, groups=2)}, "a grouped layer has no wide form"),
    "stride": (apart, {"g": nn.Conv2d(12, 6, 1, stride=2), "a": nn.Conv2d(5, 3, 1, stride=2)}, "different strides"),
    "kernel": (bare, {"g": nn.Conv2d(12, 6, 3, padding=1)}, "different kernels"),
    "3x3": (
        apart, {"f": nn.Conv2d(12, 5, 3, padding=1), "g": nn.Conv2d(12, 6, 3, padding=1)}, "is no faster for being wide"
    ),
    "padding": (
        lambda self, x: self.f(x).relu().sum() + self.g(x).relu().sum(1), {"g": nn.Conv2d(12, 6, 1, padding=1)},
        "different padding",
    ),
    "transposed": (bare, {"g": nn.ConvTranspose2d(12, 6, 1)}, "a transposed convolution has no wide form"),
    "wide slices": (bare, {"g": nn.Conv2d(12, 9, 1)}, "slices of a wide layer would cost more"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    forward, parts, reason = REFUSED[name]
    _, report = exact(pair(forward, **parts))
    assert not merged(report)
    assert any(reason in r.reason and r.where for r in report.refused)


def test_a_3x3_is_merged_when_asked_for() -> None:
    for mode in ("zeros", "reflect", "circular"):
        options: dict[str, Any] = {"kernel_size": 3, "padding": 1, "dilation": 1, "padding_mode": mode}
        model = pair(apart, f=nn.Conv2d(12, 5, **options), g=nn.Conv2d(12, 6, **options))
        _, report = exact(model, patterns=["siblings!"])
        assert merged(report) == 1
        assert not merged(exact(pair(apart, g=nn.Conv2d(12, 6, **options)), patterns=["siblings!"])[1])


def test_strided_siblings() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return F.relu(self.b(self.f(x))).sum(1) + self.n(self.g(x)).amax(1)

    _, report = exact(pair(forward, f=nn.Conv2d(12, 5, 1, 2), g=nn.Conv2d(12, 6, 1, 2)))
    assert merged(report) == 1


def test_hooks_keep_a_layer_to_itself() -> None:
    model = pair(apart)
    model.get_submodule("f").register_forward_hook(lambda module, args, output: output * 2)
    _, report = exact(model, without={"pickle": "the hook is local to this test"})
    assert not merged(report)


def test_a_weight_that_is_used_elsewhere_is_not_stored_twice() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.f(x).relu().sum(1) + self.g(x).relu().sum(1)
        return y + self.g(x.amax((2, 3), keepdim=True)).sum(1)

    model = pair(forward)
    fused, report = exact(model)
    assert not merged(report) and any("stored twice" in r.reason for r in report.refused)
    assert sum(p.numel() for p in fused.parameters()) <= sum(p.numel() for p in model.parameters())


def test_shared_layers_that_are_siblings_everywhere_stay_shared() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        levels = (x, F.max_pool2d(x, 2))
        return sum((self.f(v).relu().sum((1, 2, 3)) + self.g(v).relu().amax((1, 2, 3)) for v in levels), 0)

    fused, report = exact(pair(forward))
    assert merged(report) == 2
    assert sum(isinstance(m, nn.Conv2d) for m in fused.modules()) == 1


def test_what_is_trained_and_what_is_not_stay_apart() -> None:
    model = pair(apart)
    for parameter in model.get_submodule("f").parameters():
        parameter.requires_grad_(False)
    for parameter in model.get_submodule("b").parameters():
        parameter.requires_grad_(False)
    _, report = exact(model)
    assert not merged(report) and any("require gradients" in r.reason for r in report.refused)


def test_dtypes_that_differ() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.f(x).relu().sum(1) + self.g(x.float()).double().sum(1) + F.relu(self.b(self.f(x))).amax(1)

    model = pair(forward)
    model.get_submodule("g").float()
    exact(model)


class Heads(nn.Module):
    """Query, key and value of several heads, as timm writes them."""

    def __init__(self, width: int, heads: int, bias: tuple[bool, bool, bool] = (True, False, True)) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(width, width, bias=b) for b in bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        q, k, v = (f(x).view(n, t, self.heads, c // self.heads).transpose(1, 2) for f in (self.q, self.k, self.v))
        y: Tensor = (q @ k.transpose(-2, -1)) @ v
        return self.proj(y.transpose(1, 2).reshape(n, t, c))


@pytest.mark.parametrize("examples", [True, False])
def test_query_key_and_value(examples: bool) -> None:
    model = randomize(Heads(8, 2).double(), integer=True)
    fused, report = exact(model, (2, 5, 8), example_inputs=torch.zeros(2, 5, 8).double() if examples else None)
    assert merged(report) == 1
    assert count(fused, torch.zeros(2, 5, 8).double())["linear"] == 2


def test_inputs_without_a_batch() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.f(x).relu().sum(-3) + self.g(x).relu().amax(-3)

    exactly(pair(forward), integers((12, 6, 7)), integers((2, 12, 6, 7)), fires={"siblings": 1})


@pytest.mark.parametrize("spatial", [1, 3])
def test_other_ranks(spatial: int) -> None:
    cls = {1: nn.Conv1d, 3: nn.Conv3d}[spatial]

    def forward(self: Any, x: Tensor) -> Tensor:
        return F.relu(self.f(x)).sum(1) + F.relu(self.g(x)).amax(1)

    _, report = exact(pair(forward, f=cls(12, 5, 1), g=cls(12, 6, 1)), (2, 12, 7, 5, 3)[: spatial + 2])
    assert merged(report) == 1


@pytest.mark.parametrize("forward", [apart, met_again, viewed])
def test_new_weights(forward: Forward) -> None:
    model, other = pair(forward), pair(forward)
    randomize(other, seed=5, integer=True)
    fused = fxfuse.optimize(model)
    x = torch.randint(-3, 4, (2, 12, 7, 5)).double()
    with torch.no_grad():
        assert torch.equal(fxfuse.refresh(fused, other)(x), other(x))
        assert torch.equal(fxfuse.refresh(fused, model)(x), model(x))


@pytest.mark.parametrize("forward", [apart, met_again])
def test_what_can_be_done_with_the_result(forward: Forward) -> None:
    model = pair(forward)
    fused, x = fxfuse.optimize(model), torch.randint(-3, 4, (2, 12, 7, 5)).double()
    want = model(x)
    copies = [copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), torch.jit.script(fused)]
    copies.append(torch.export.export(fused, (x,)).module())
    buffer = io.BytesIO()
    torch.save(fused.state_dict(), buffer)
    buffer.seek(0)
    blank = copy.deepcopy(fused)
    for parameter in blank.parameters():
        parameter.detach().zero_()
    blank.load_state_dict(torch.load(buffer))
    for module in (*copies, blank):
        assert torch.equal(module(x), want)
    out = fused(x.requires_grad_())
    out.sum().backward()
    (gradient,) = torch.autograd.grad(model(x).sum(), x)
    assert x.grad is not None and torch.equal(x.grad, gradient)


@pytest.mark.parametrize("forward", [apart, met_again, bare])
def test_an_exported_model(forward: Forward) -> None:
    x = torch.randint(-3, 4, (2, 12, 7, 5)).double()
    _, report = exact(pair(forward), example_inputs=x, capture="export")
    assert merged(report) == 1


@pytest.mark.parametrize("forward", [apart, met_again, viewed])
def test_under_torch_compile(forward: Forward) -> None:
    model = pair(forward)
    compiled = torch.compile(model, backend="fxfuse", options={"inner": "eager", "strict": True})
    with torch.no_grad():
        for seed in (0, 4):
            randomize(model, seed=seed, integer=True)
            x = torch.randint(-3, 4, (2, 12, 7, 5)).double()
            assert torch.equal(compiled(x), model(x))
    (report,) = fxfuse.report(compiled)
    assert merged(report) == 1


def test_a_decomposed_model() -> None:
    model, x = randomize(Heads(8, 2).double(), integer=True), torch.randint(-3, 4, (2, 5, 8)).double()
    captured = rebuild(model, (x,), torch.export.export(model, (x,)).run_decompositions(), {})
    graph = GraphModule(model, captured.graph).eval()
    fused = exactly(graph, x, integers((2, 5, 8)), examples=x)
    assert torch.equal(fused(x), model(x))


def test_under_another_autocast_activations_stay() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y, z = self.f(x), self.g(x)
        with torch.no_grad():
            y, z = F.relu(y), F.relu(z)
        return y.sum(1) + z.sum(1)

    model = pair(forward)
    compiled = torch.compile(model, backend="fxfuse", options={"inner": "eager", "strict": True})
    x = torch.randint(-3, 4, (2, 12, 7, 5)).double()
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))


def test_a_weight_that_is_not_finite_keeps_its_siblings() -> None:
    model = pair(apart).float()
    with torch.no_grad():
        model.get_parameter("b.weight").fill_(3e38)
        model.get_parameter("f.weight").fill_(100)
    fused = fxfuse.optimize(model)
    report = fxfuse.report(fused)
    assert not merged(report) and any(f.path == "g" for f in report.fired)
    assert any("float32" in str(r) for r in report.refused)


def test_switched_off_and_costs() -> None:
    _, report = exact(pair(apart), patterns=["-siblings"])
    assert not merged(report) and any("siblings is switched off" in r.reason for r in report.refused)
    for cost in ("nodes", lambda op, positions: op.macs * positions):
        assert merged(fxfuse.plan(pair(apart), cost=cost)) == 1
    assert not merged(fxfuse.plan(pair(apart), cost=lambda op, positions: op.macs * op.out_channels))
    assert fxfuse.plan(pair(apart)).by_pattern == fxfuse.report(fxfuse.optimize(pair(apart))).by_pattern
