"""Factors on one part of a concatenation join the layer behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from exactly import exactly
from helpers import randomize
from law_cases import integers
from torch import Tensor, nn

import fxfuse


class Parts(nn.Module):
    def __init__(self, forward: Callable[..., Any], padding: int = 0, groups: int = 1) -> None:
        super().__init__()
        self.act = forward
        self.n, self.m, self.l = nn.BatchNorm2d(3), nn.BatchNorm2d(2), nn.BatchNorm2d(3)
        self.c = nn.Conv2d(6 if groups == 2 else 5, 4, 3, padding=padding, groups=groups)
        self.k = nn.Buffer(torch.tensor([2.0, -1.0, 3.0]).view(3, 1, 1))

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.act(self, x, y)


def run(forward: Callable[..., Any], norms: int, **options: Any) -> Any:
    model = randomize(Parts(forward, **options).double(), seed=1, integer=True)
    examples = tuple(torch.ones(2, c, 6, 6).double() for c in (3, 2))
    inputs = [tuple(integers((b, c, *size), c) for c in (3, 2)) for b, *size in ((2, 7, 6), (1, 5, 9))]
    return exactly(model, *inputs, examples=examples, counts={"bn": norms})


def square(s: Any, x: Tensor, y: Tensor) -> Tensor:
    y.mul_(y)
    return s.c(torch.cat([s.n(x.relu()), s.m(y.abs())], 1))  # type: ignore[no-any-return]


JOINED: dict[str, Callable[..., Any]] = {
    "first": lambda s, x, y: s.c(torch.cat([s.n(x.relu()), y.abs()], 1)),
    "last": lambda s, x, y: s.c(torch.cat([y.abs(), s.n(x.relu())], 1)),
    "both": lambda s, x, y: s.c(torch.cat([s.m(y.abs()), s.n(x.relu())], 1)),
    "inputs themselves": lambda s, x, y: s.c(torch.cat([s.m(y), s.n(x)], 1)),
    "two in a row": lambda s, x, y: s.c(torch.cat([y.abs(), s.l(s.n(x.relu()) * 2)], 1)),
    "a number": lambda s, x, y: s.c(torch.cat([y.abs() * 3 - 1, s.n(x.relu())], dim=-3)),
    "a constant": lambda s, x, y: s.c(torch.cat([y.abs(), s.n(x.relu()) * s.k], 1)),
    "written before": square,
}


@pytest.mark.parametrize("name", JOINED)
def test_factors_of_parts_join_the_layer_behind(name: str) -> None:
    run(JOINED[name], 0)


def test_groups() -> None:
    run(lambda s, x, y: s.c(torch.cat([s.n(x.relu()), s.l(x.abs())], 1)), 0, groups=2)


def late(s: Any, x: Tensor, y: Tensor) -> Tensor:
    z = s.n(x)
    x.mul_(2)
    return s.c(torch.cat([z, y.abs()], 1))  # type: ignore[no-any-return]


def late_view(s: Any, x: Tensor, y: Tensor) -> Tensor:
    w = x.abs()
    z = s.n(w)
    w[0].zero_()
    return s.c(torch.cat([z, y.abs()], 1)) + w.sum()  # type: ignore[no-any-return]


STAY: dict[str, Callable[..., Any]] = {
    "activation between": lambda s, x, y: s.c(torch.cat([s.n(x.relu()), y.abs()], 1).relu()),
    "part read elsewhere": lambda s, x, y: (lambda z: s.c(torch.cat([z, y.abs()], 1)) + z.sum())(s.n(x.relu())),
    "concatenation read elsewhere": lambda s, x, y: (
        lambda z: s.c(z) + z.sum())(torch.cat([s.n(x.relu()), y.abs()], 1)),
    "other axis": lambda s, x, y: s.c(torch.cat([torch.cat([s.n(x.relu()), x], 2), torch.cat([y, y], 2)], 1)),
    "written later": late,
    "a view written later": late_view,
    "twice": lambda s, x, y: (lambda z: s.c(torch.cat([z[:, :0], z, z], 1)[:, :5]))(s.n(x.relu())),
}  # fmt: skip


@pytest.mark.parametrize("name", STAY)
def test_what_stays(name: str) -> None:
    run(STAY[name], 1)


def test_a_padded_layer_takes_factors_without_a_shift() -> None:
    run(lambda s, x, y: s.c(torch.cat([y.abs() * 3, x.relu() * s.k], 1)), 0, padding=1)
    fused = run(lambda s, x, y: s.c(torch.cat([y.abs(), s.n(x.relu())], 1)), 1, padding=1)
    assert fxfuse.report(fused).refused
