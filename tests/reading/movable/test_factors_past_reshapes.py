"""Factors that move past reshapes, permutations and averages to the layer that absorbs them, and those that do not.

Numbers are integers and batch norms divide by powers of two, so that outputs are equal to the bit. Sizes agree
on purpose in the traps (as many positions as channels): what decides is which axis is which.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exactly import exactly
from helpers import count, randomize
from law_cases import Case, integers
from safety import model_of
from torch import Tensor, nn

import fxfuse

LAYERS = ("conv", "linear", "bn", "mul", "div")  # "add" is part of some linear layers
IMAGES = ((2, 4, 4, 4), (3, 4, 2, 8))  # so that a mean over all positions is exact
TOKENS = ((2, 4, 4), (3, 8, 4))
ROWS = ((4, 4), (3, 4))


def linear(into: int = 4, out: int = 4) -> nn.Module:
    return nn.Linear(into, out)


def conv(kernel: int = 1, padding: int = 0) -> nn.Module:
    return nn.Conv2d(4, 4, kernel, padding=padding)


def bn(spatial: int = 1) -> nn.Module:
    return {1: nn.BatchNorm1d, 2: nn.BatchNorm2d}[spatial](4)


def normed(norm: Any, x: Tensor) -> Tensor:
    """The batch norm `norm` as a function call."""
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=0.0)


def compared(
    case: Case, shapes: tuple[tuple[int, ...], ...], examples: bool, capture: str | None = None
) -> tuple[dict[str, int], fxfuse.Report]:
    """Outputs are equal on all shapes; what the result executes, and its report."""
    forward, parts, _ = case
    model = randomize(model_of(forward, **parts).double(), integer=True)
    tensors = [integers(shape, number) for number, shape in enumerate(shapes)]
    fused = exactly(model, *tensors, examples=tensors[0] if examples else None, capture=capture)
    counts = count(fused, tensors[0])
    return {name: counts[name] for name in LAYERS if counts[name]}, fxfuse.report(fused)


def run(case: Case, shapes: tuple[tuple[int, ...], ...], examples: bool, capture: str | None = None) -> None:
    counts, report = compared(case, shapes, examples, capture)
    assert " ".join(f"{n} {c}" for n, c in counts.items()) == case[2], report


# The channels of a convolution's output, with a BatchNorm2d that settles the rank.
FROM_IMAGES: dict[str, Case] = {
    "flatten": (lambda s, x: s.n(s.b(s.c(x)).flatten(2)), {"c": conv(), "b": bn(2), "n": bn()}, "conv 1"),
    "reshape by sizes of another tensor": (
        lambda s, x: s.n(s.b(s.c(x)).reshape(x.shape[0], 4, -1)).view(x.shape),
        {"c": conv(), "b": bn(2), "n": bn()}, "conv 1",
    ),
    "view by unpacked sizes": (
        lambda s, x: (lambda y, b, c, h, w: s.n(y.view(b, c, h * w)))(y := s.b(s.c(x)), *(y.size(i) for i in range(4))),
        {"c": conv(), "b": bn(2), "n": bn()}, "conv 1",
    ),
    "tokens and back": (
        lambda s, x: s.n(s.b(s.c(x)).flatten(2).transpose(1, 2).transpose(1, 2)).unflatten(2, (x.shape[2], -1)),
        {"c": conv(), "b": bn(2), "n": bn()}, "conv 1",
    ),
    "pooling head": (
        lambda s, x: s.f(s.n(s.p(s.b(x)).flatten(1))),
        {"b": bn(2), "p": nn.AdaptiveAvgPool2d(1), "n": bn(), "f": linear(4, 3)}, "linear 1",
    ),
    "pooling head of modules": (
        lambda s, x: s.s(x),
        {"s": nn.Sequential(bn(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), bn(), linear(4, 3))},
        "linear 1",
    ),
    "mean, two heads": (
        lambda s, x: (s.f(s.d(s.b(x).mean((2, 3)))) + s.g(s.d(s.b(x).mean((2, 3))))) / 2,
        {"b": bn(2), "d": nn.Dropout(0.1), "f": linear(), "g": linear()}, "linear 2",
    ),
    "one mean, two heads": (
        lambda s, x: (lambda y: (s.f(s.d(y)) + s.g(s.d(y))) / 2)(s.b(x).mean((-1, -2))),
        {"b": bn(2), "d": nn.Dropout(0.1), "f": linear(), "g": linear()}, "linear 1",
    ),
    "mean with kept dims, then a convolution": (
        lambda s, x: s.c(s.b(x).mean((2, 3), keepdim=True)).relu(), {"b": bn(2), "c": conv()}, "conv 1"
    ),
    "squeezed": (
        lambda s, x: s.n(F.adaptive_avg_pool2d(s.b(s.c(x)), 1).squeeze(-1).squeeze(-1)),
        {"c": conv(), "b": bn(2), "n": bn()}, "conv 1",
    ),
    "unsqueezed": (
        lambda s, x: s.n(s.f(s.b(x).mean((2, 3))).unsqueeze(-1).unsqueeze(-1)),
        {"b": bn(2), "f": linear(), "n": bn(2)}, "linear 1",
    ),
    "pools of all kinds": (
        lambda s, x: s.n(s.r(s.q(s.p(s.b(s.c(x)))))),
        {"c": conv(), "b": bn(2), "p": nn.AvgPool2d(1), "n": bn(2), "q": nn.AvgPool2d(2, 1, ceil_mode=True),
         "r": nn.AvgPool2d(1, 1, 0, count_include_pad=False)}, "conv 1",
    ),
    "resized": (
        lambda s, x: s.n(F.interpolate(s.b(s.c(x)), scale_factor=2)) * 2,
        {"c": conv(), "b": bn(2), "n": bn(2)}, "conv 1",
    ),
    "channels last and first": (
        lambda s, x: normed(s.n, s.f(s.b(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)) * -0.5,
        {"b": bn(2), "f": linear(), "n": bn(2)}, "linear 1",
    ),
    "read by two layers": (
        lambda s, x: s.c(s.b(x)).relu() + s.d(s.b(x)).relu() + (lambda y: s.c(y).relu() * s.d(y).relu())(s.n(x)),
        {"b": bn(2), "n": bn(2), "c": conv(), "d": conv()}, "conv 4 mul 1",
    ),
    "nextvit's attention": (
        lambda s, x: s.attend(x), {"b": bn(2), "n": bn(), "p": nn.AvgPool1d(2), "q": linear(), "k": linear(),
                                   "v": linear()}, "linear 2 mul 1",
    ),
    "its size is asked": (
        lambda s, x: (lambda y: s.c(y).reshape(y.size(0), -1, y.shape[2] * y.shape[3]).relu())(s.n(s.b(x))),
        {"b": bn(2), "n": bn(2), "c": conv()}, "conv 1",
    ),
    "the size of the layer before is asked": (
        lambda s, x: (lambda y: s.b(y).reshape(y.shape[0], y.shape[1], -1).relu())(s.c(x)),
        {"b": bn(2), "c": conv(3, 1)}, "conv 1",
    ),
}  # fmt: skip


def attend(self: Any, x: Tensor) -> Tensor:
    b, c, _, _ = x.shape
    out = self.b(x).reshape(b, c, -1).transpose(-1, -2)
    q = self.q(out)
    small = self.n(self.p(out.transpose(1, 2))).transpose(1, 2)
    return q.relu() + (self.k(small).relu() * self.v(small).relu()).sum(1, keepdim=True)


@pytest.mark.parametrize("examples", [False, True], ids=["", "examples"])
@pytest.mark.parametrize("name", FROM_IMAGES)
def test_factors_move_through_maps(name: str, examples: bool) -> None:
    forward, parts, executed = FROM_IMAGES[name]
    if name == "nextvit's attention":
        forward = attend
    run((forward, parts, executed), IMAGES, examples)


FROM_TOKENS: dict[str, Case] = {
    "levit": (
        lambda s, x: (lambda y: s.n(y.flatten(0, 1)).reshape_as(y))(s.f(x)), {"f": linear(), "n": bn()}, "linear 1"
    ),
    "levit in functions": (
        lambda s, x: (lambda y: normed(s.n, torch.flatten(y, 0, 1)).view_as(y))(F.linear(x, s.f.weight)),
        {"f": linear(), "n": bn()}, "linear 1",
    ),
    "view(-1, c)": (
        lambda s, x: s.n(s.f(x).view(-1, 4)).view(x.shape[0], x.shape[1], 4), {"f": linear(), "n": bn()}, "linear 1"
    ),
    "transposed and back": (
        lambda s, x: s.n(s.f(x).transpose(1, 2)).transpose(1, 2), {"f": linear(), "n": bn()}, "linear 1"
    ),
    "permuted, then a layer": (
        lambda s, x: s.f(s.n(x.permute(0, 2, 1)).permute(0, 2, 1)), {"f": linear(), "n": bn()}, "linear 1"
    ),
    "heads": (
        lambda s, x: (s.f(x).reshape(x.shape[0], x.shape[1], 2, 2) / 4).transpose(1, 2), {"f": linear()}, "linear 1"
    ),
    "mean of tokens": (
        lambda s, x: s.g(s.n(s.f(x).relu().mean(1))), {"f": linear(), "n": bn(), "g": linear()}, "linear 2"
    ),
    "transposed, then a view": (
        lambda s, x: s.n(s.f(x).transpose(1, 2)).view(x.shape[0], -1), {"f": linear(), "n": bn()}, "linear 1"
    ),
    "contiguous": (
        lambda s, x: s.n(s.f(x).transpose(1, 2).contiguous()), {"f": linear(), "n": bn()}, "linear 1"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FROM_TOKENS)
def test_factors_move_through_tokens(name: str) -> None:
    run(FROM_TOKENS[name], TOKENS, examples=True)


def test_a_detour_leaves_nothing_behind() -> None:
    forward, parts, _ = FROM_TOKENS["levit"]
    shape = model_of(lambda s, x: forward(s, s.b(x).flatten(2).transpose(1, 2)), b=bn(2), **parts)
    model = randomize(shape.double(), integer=True)
    fused = exactly(model, *map(integers, IMAGES))
    assert [n.op for n in fused.graph.nodes if n.target in ("flatten", "reshape_as")] == ["call_method"]


@pytest.mark.parametrize("name", ["levit", "levit in functions", "transposed and back", "heads", "contiguous"])
def test_factors_move_in_exported_graphs_of_tokens(name: str) -> None:
    run(FROM_TOKENS[name], TOKENS, examples=True, capture="export")


@pytest.mark.parametrize("name", ["flatten", "tokens and back", "pooling head", "squeezed", "channels last and first"])
def test_factors_move_in_exported_graphs_of_maps(name: str) -> None:
    run(FROM_IMAGES[name], IMAGES, examples=True, capture="export")


@pytest.mark.parametrize("examples", [False, True], ids=["", "examples"])
def test_a_batch_norm_that_moves_leaves_its_order_in_memory(examples: bool) -> None:
    """Batch norm gives rows in order whatever it reads, so that a view of it is always possible."""

    def forward(s: Any, x: Tensor) -> Tensor:
        y = s.b(x).view(x.shape[0], x.shape[1], -1).transpose(1, 2)
        z = s.n(s.f(y).transpose(1, 2)).view(x.shape[0], -1)
        w = s.m(s.f(y).view(x.shape[0], x.shape[2], x.shape[3], 4).permute(0, 3, 1, 2))
        return torch.cat([z, w.permute(0, 2, 3, 1).view(x.shape[0], -1)], 1)

    model = randomize(model_of(forward, b=bn(2), f=linear(), n=bn(), m=bn(2)).double(), integer=True)
    tensors = integers(IMAGES[1]), integers((3, 4, 8, 2)).mT, integers((3, 2, 8, 4)).movedim(3, 1)
    exactly(model, *tensors, examples=integers(IMAGES[0]) if examples else None, counts={"bn": 0})


# What stays is executed as before; the reason is in the report.
TRAPS: dict[str, tuple[Case, str]] = {
    "positions, not channels": (
        (lambda s, x: s.n(s.f(x)), {"f": linear(), "n": bn()}, "linear 1 bn 1"), "different axes"
    ),
    "positions after a transposition": (
        (lambda s, x: s.n(s.f(x).transpose(1, 2).reshape(-1, x.shape[1])), {"f": linear(), "n": bn()}, "linear 1 bn 1"),
        "on another axis",
    ),
    "rows and columns in one": (
        (lambda s, x: s.n(s.f(x).flatten(1)[:, :4]), {"f": linear(), "n": bn()}, "linear 1 bn 1"),
        "follows no convolution",
    ),
    "a view that swaps sizes": (
        (lambda s, x: s.n(s.f(x).view(x.shape[0], 4, x.shape[1])), {"f": linear(), "n": bn()}, "linear 1 bn 1"),
        "on another axis",
    ),
    "a mean over the channels": (
        (lambda s, x: s.n(s.f(x).mean(2)), {"f": linear(), "n": bn()}, "linear 1 bn 1"), "on another axis"
    ),
    "a pool along the channels": (
        (lambda s, x: s.n(F.avg_pool1d(s.f(x), 1).transpose(1, 2)), {"f": linear(), "n": bn()}, "linear 1 bn 1"),
        "on another axis",
    ),
    "read before the reshape too": (
        (lambda s, x: (lambda y: s.n(y.flatten(0, 1)) + y.relu().flatten(0, 1))(s.f(x)), {"f": linear(), "n": bn()},
         "linear 1 bn 1"), "read elsewhere too",
    ),
    "read by a layer and by another": (
        (lambda s, x: (lambda y: s.f(y) + y.relu())(s.n(x.flatten(0, 1))), {"f": linear(), "n": bn()},
         "linear 1 bn 1"), "follows no convolution",
    ),
    "the maximum of tokens": (
        (lambda s, x: s.n(s.f(x).amax(1)), {"f": linear(), "n": bn()}, "linear 1 bn 1"), "follows no convolution"
    ),
    "written in place": (
        (lambda s, x: (lambda y: s.n(y.flatten(0, 1)) + y.mul_(2).flatten(0, 1))(s.f(x)), {"f": linear(), "n": bn()},
         "linear 1 bn 1"), "read elsewhere too",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TRAPS)
def test_factors_that_stay_where_they_are(name: str) -> None:
    case, reason = TRAPS[name]
    counts, report = compared(case, ((4, 4, 4), (2, 4, 4)), examples=True)
    assert " ".join(f"{n} {c}" for n, c in counts.items()) == case[2]
    assert any(reason in r.reason and r.where == "n" for r in report.refused), report


@pytest.mark.parametrize("shape", [(4, 4), (2, 4, 4), (4, 4, 4)])
def test_a_rank_of_the_examples_alone_is_checked(shape: tuple[int, ...]) -> None:
    """`bn(linear(x))` is about channels for (N, C) and about positions for (N, L, C)."""
    model = randomize(model_of(lambda s, x: s.n(s.f(x)), f=linear(), n=bn()).double(), integer=True)
    unsure, fused = fxfuse.optimize(model), fxfuse.optimize(model, integers(shape))
    assert count(unsure, integers(shape))["bn"] == 1
    assert [r.reason for r in fxfuse.report(unsure).refused if "rank" in r.reason and r.where == "n"]
    for other in ((4, 4), (2, 4, 4)):
        x = integers(other)
        assert torch.equal(unsure(x), model(x))
        if len(shape) == 3 or len(other) == len(shape):
            assert torch.equal(fused(x), model(x))
        else:
            with pytest.raises(AssertionError, match="rank"):
                fused(x)


def test_a_factor_that_one_of_two_layers_cannot_take_stays_for_both() -> None:
    parts = {"b": bn(2), "c": conv(), "d": conv(3, padding=1)}
    case = (lambda s, x: (lambda y: s.c(y).relu() + s.d(y).relu())(s.b(x)), parts, "conv 2 bn 1")
    counts, report = compared(case, IMAGES, examples=False)
    assert " ".join(f"{n} {c}" for n, c in counts.items()) == case[2]
    (detail,) = [r.detail for r in report.refused if r.where == "b"]
    assert "read by c, d (exact with a frame, but it would cost more)" in detail


def test_a_shared_factor_stays_if_a_merged_weight_is_not_finite() -> None:
    """Sites that share a factor are rewritten together or not at all."""
    model = randomize(
        model_of(lambda s, x: (lambda y: s.c(y).relu() + s.d(y).relu())(s.b(x)), b=bn(2), c=conv(), d=conv())
    )
    with torch.no_grad():
        model.b.weight.fill_(1e30)
        model.c.weight.fill_(1e-20)
        model.d.weight.fill_(1e20)
    fused = fxfuse.optimize(model)
    x = torch.randn(IMAGES[0])
    torch.testing.assert_close(fused(x), model(x))
    assert count(fused, x)["bn"] == 1
    assert any("not finite" in r.reason for r in fxfuse.report(fused).refused)
