"""A factor after a concatenation or sum of layers goes to each of them: its channels, or its factor and one shift."""

from __future__ import annotations

import pytest
import torch
from affine_trees import CONVS, NORMS
from exactly import exactly
from helpers import count, randomize
from law_cases import LAYERS, Case, inputs, integers
from safety import model_of
from torch import nn

import fxfuse


def conv(out: int, kernel: int = 1, rank: int = 2, groups: int = 1) -> nn.Module:
    layer: nn.Module = CONVS[rank](4, out, kernel, padding=kernel // 2, groups=groups)
    return layer


def compared(case: Case, tensors: list[torch.Tensor]) -> tuple[str, fxfuse.Report]:
    forward, parts, _ = case
    model = randomize(model_of(forward, **parts).double(), integer=True)
    fused = exactly(model, *tensors, examples=tensors[0])
    counts = count(fused, tensors[0])
    return " ".join(f"{n} {counts[n]}" for n in LAYERS if counts[n]), fxfuse.report(fused)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_batch_norm_after_a_concatenation_of_two_tensors(rank: int) -> None:
    """CSP's: `norm(cat(a(relu(x)), b(x)))`, with a factor and a shift behind it."""
    parts = {"a": conv(2, 1, rank), "b": conv(3, 3, rank), "n": NORMS[rank](5)}
    case: Case = (lambda s, x: 1 - 2 * s.n(torch.cat([s.a(x.relu()), s.b(x)], 1)), parts, "conv 2 cat 1")
    assert compared(case, inputs(4, rank))[0] == case[2]


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_batch_norm_after_a_difference_of_two_tensors(rank: int) -> None:
    parts = {"a": conv(5, 1, rank), "b": conv(5, 3, rank), "n": NORMS[rank](5)}
    case: Case = (lambda s, x: s.n(s.a(x.relu()) - s.b(x)) / 4 + 3, parts, "conv 2 sub 1")
    assert compared(case, inputs(4, rank))[0] == case[2]


DIVIDED: dict[str, Case] = {
    "inception": (
        lambda s, x: s.n(torch.cat([s.a(x), s.b(x), s.c(x)], 1)).relu(),
        {"a": conv(2), "b": conv(3, 3), "c": conv(4, 5, groups=2), "n": nn.BatchNorm2d(9)}, "conv 3 cat 1",
    ),
    "a sum that does not pay": (
        lambda s, x: s.n(s.a(x) + s.b(x)).relu(),
        {"a": conv(4, 5, groups=4), "b": conv(4), "n": nn.BatchNorm2d(4)}, "conv 2 add 1",
    ),
    "some of the branches merge": (
        lambda s, x: s.n(s.a(x) + s.b(x) + s.c(x)).relu(),
        {"a": conv(4, 5, groups=4), "b": conv(4), "c": conv(4, 3, groups=4), "n": nn.BatchNorm2d(4)}, "conv 2 add 1",
    ),
    "a norm each and one for all": (
        lambda s, x: s.n(torch.cat([s.m(s.a(x.relu())), s.o(s.b(x))], -3)),
        {"a": conv(2), "b": conv(3, 3), "m": nn.BatchNorm2d(2), "o": nn.BatchNorm2d(3), "n": nn.BatchNorm2d(5)},
        "conv 2 cat 1",
    ),
    "read by two layers": (
        lambda s, x: (lambda y: s.d(y).relu() * s.e(y).relu())(s.n(torch.cat([s.a(x.relu()), s.b(x)], 1))),
        {"a": conv(2), "b": conv(3, 3), "n": nn.BatchNorm2d(5), "d": nn.Conv2d(5, 4, 1), "e": nn.Conv2d(5, 4, 1)},
        "conv 4 mul 1 cat 1",
    ),
    "its size is asked": (
        lambda s, x: (lambda y: y.reshape(y.size(0), y.shape[1], -1))(s.n(torch.cat([s.a(x.relu()), s.b(x)], 1))),
        {"a": conv(2), "b": conv(3, 3), "n": nn.BatchNorm2d(5)}, "conv 2 cat 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DIVIDED)
def test_factors_after_joins_that_stay(name: str) -> None:
    assert compared(DIVIDED[name], inputs(4, 2))[0] == DIVIDED[name][2]


WHOLE: dict[str, Case] = {
    "joined along positions": (
        lambda s, x: s.n(torch.cat([s.a(x.relu()), s.b(x)], 2)),
        {"a": conv(4), "b": conv(4), "n": nn.BatchNorm2d(4)}, "conv 2 bn 1 cat 1",
    ),
    "one channel that broadcasts": (
        lambda s, x: s.n(s.a(x.relu()) + s.b(x)),
        {"a": conv(4), "b": conv(1), "n": nn.BatchNorm2d(4)}, "conv 2 bn 1 add 1",
    ),
    "a branch that is no layer": (
        lambda s, x: s.n(torch.cat([s.a(x.relu()), x], 1)), {"a": conv(4), "n": nn.BatchNorm2d(8)}, "conv 1 bn 1 cat 1"
    ),
    "a branch that somebody else reads": (
        lambda s, x: (lambda y: s.n(torch.cat([y, s.b(x)], 1)) * y[:, :1].relu())(s.a(x.relu())),
        {"a": conv(4), "b": conv(4), "n": nn.BatchNorm2d(8)}, "conv 2 bn 1 mul 1 cat 1",
    ),
    "the join is read before it is normalized": (
        lambda s, x: (lambda y: s.n(y) * y.relu())(torch.cat([s.a(x.relu()), s.b(x)], 1)),
        {"a": conv(4), "b": conv(4), "n": nn.BatchNorm2d(8)}, "conv 2 bn 1 mul 1 cat 1",
    ),
    "one tensor twice": (
        lambda s, x: (lambda y: s.n(torch.cat([y, y], 1)))(s.a(x.relu())),
        {"a": conv(4), "n": nn.BatchNorm2d(8)}, "conv 1 bn 1 cat 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_factors_after_joins_that_they_do_not_divide_over(name: str) -> None:
    executed, report = compared(WHOLE[name], [integers((2, 4, 4, 4)), integers((3, 4, 4, 6), 1)])
    assert executed == WHOLE[name][2]
    assert [r.reason[:30] for r in report.refused if r.where == "n"] == ["batch_norm follows no convolut"]


def test_a_factor_is_divided_for_all_branches_or_none() -> None:
    """The weight that would overflow is one branch's; the other keeps the batch norm too."""
    parts = {"a": nn.Conv2d(4, 2, 1), "b": nn.Conv2d(4, 3, 1), "n": nn.BatchNorm2d(5)}
    model = randomize(model_of(lambda s, x: s.n(torch.cat([s.a(x.relu()), s.b(x)], 1)), **parts))
    with torch.no_grad():
        model.n.weight.copy_(torch.tensor([1.0, -1.0, 1e30, -1e30, 1e30]))
        model.b.weight.fill_(1e10)
        model.b.bias.fill_(1e10)
    blind = {"plan": "a plan reads no weight"}
    exactly(model, torch.randn(2, 4, 5, 5), torch.randn(3, 4, 6, 4), counts={"bn": 1}, without=blind)


@pytest.mark.parametrize("shape", [(2, 4, 6), (4, 6)])
def test_a_rank_of_the_examples_alone_is_checked(shape: tuple[int, ...]) -> None:
    """Along axis 1 an unbatched input has positions: `cat` and batch norm mean something else there."""
    parts = {"a": nn.Conv1d(4, 6, 1), "b": nn.Conv1d(4, 6, 1), "n": nn.BatchNorm1d(12)}
    model = randomize(model_of(lambda s, x: s.n(torch.cat([s.a(x.relu()), s.b(x)], 1)), **parts).double(), integer=True)
    fused = fxfuse.optimize(model, integers(shape))
    for other in ((2, 4, 6), (4, 6)):
        x = integers(other)
        try:
            got = fused(x)
        except AssertionError as error:
            assert other != shape and "rank" in str(error)
        else:
            assert torch.equal(got, model(x))
    assert count(fused, integers(shape))["bn"] == len(shape) % 2 ^ 1
