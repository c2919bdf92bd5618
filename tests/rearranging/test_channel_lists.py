"""Channels taken by a list of constants: a neighbouring layer takes the selection into its weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from exactly import exactly
from helpers import count, randomize
from law_cases import integers
from torch import Tensor, nn

import fxfuse

Forward = Callable[[Any, Tensor], Tensor]
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class Picked(nn.Module):
    def __init__(self, forward: Forward, dims: int = 2) -> None:
        super().__init__()
        conv = CONVS[dims]
        self.act = forward
        self.a, self.n, self.c = conv(4, 6, 1), NORMS[dims](6), conv(6, 5, 3, padding=1)
        self.two, self.g = conv(2, 3, 3, padding=1), conv(6, 6, 1, groups=2)
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self, x)


def run(forward: Forward, dims: int = 2, **options: Any) -> Any:
    model = randomize(Picked(forward, dims).double(), seed=5, integer=True)
    tensors = [integers(shape[: 2 + dims], i) for i, shape in enumerate(((2, 4, 5, 7, 4), (3, 4, 4, 3, 5)))]
    return count(exactly(model, *tensors, **options), tensors[1])


ORDER = [2, 0, 5, 1, 4, 3]
TAKEN: dict[str, tuple[Forward, int]] = {
    "a permutation before a layer": (lambda s, x: s.c(s.n(s.a(x)).relu()[:, ORDER]), 2),
    "a permutation after a layer": (lambda s, x: s.n(s.a(x))[:, ORDER].relu(), 1),
    "some channels": (lambda s, x: s.n(s.a(x))[:, [4, 1]].relu(), 1),
    "one channel twice": (lambda s, x: s.c(s.n(s.a(x)).relu()[:, [4, 1, 1, 0, 4, 4]]), 2),
    "from the end": (lambda s, x: s.c(s.n(s.a(x)).relu()[:, [-1, -6, 1, 2, 3, 4]]), 2),
    "other axes spelled out": (lambda s, x: s.c(s.n(s.a(x)).relu()[:, tuple(ORDER), :, :]), 2),
    "axes in front left out": (lambda s, x: s.c(s.n(s.a(x)).relu()[..., ORDER, :, :]), 2),
    "axes behind left out": (lambda s, x: s.c(s.n(s.a(x)).relu()[:, ORDER, ...]), 2),
}
STAY: dict[str, Forward] = {
    "a mask": lambda s, x: s.two(s.n(s.a(x)).relu()[:, [True, False, False, True, False, False]]),
    "a few of many, which a wider layer would pay for": lambda s, x: s.two(s.n(s.a(x)).relu()[:, [4, 1]]),
    "another axis": lambda s, x: s.c(s.n(s.a(x)).relu()[:, :, [1, 0]]),
    "samples": lambda s, x: s.c(s.n(s.a(x)).relu()[[1, 0]]),
    "before a grouped layer": lambda s, x: s.g(x.repeat(1, 2, 1, 1)[:, 1:7].relu()[:, ORDER]),
    "beside a slice": lambda s, x: s.c(s.n(s.a(x)).relu()[:, ORDER, 1:]),
}


@pytest.mark.parametrize("name", TAKEN)
def test_a_layer_takes_it(name: str) -> None:
    forward, convs = TAKEN[name]
    counts = run(forward)
    assert counts["conv"] == convs and not counts["index"]


@pytest.mark.parametrize("dims", [1, 3])
def test_in_other_ranks(dims: int) -> None:
    example = torch.ones((2, 4, 5, 5, 5)[: 2 + dims]).double()
    counts = run(lambda s, x: s.c(s.n(s.a(x)).relu()[:, ORDER]), dims, examples=example)
    assert counts["conv"] == 2 and not counts["index"]


@pytest.mark.parametrize("name", STAY)
def test_what_stays(name: str) -> None:
    assert run(STAY[name])["index"] == 1


def test_out_of_range_is_the_error_that_it_was() -> None:
    model = randomize(Picked(lambda s, x: s.c(s.n(s.a(x)).relu()[:, [0, 1, 2, 3, 4, 6]])))
    fused = fxfuse.optimize(model)
    for module in (model, fused):
        with pytest.raises(IndexError, match="index 6 is out of bounds"):
            module(torch.ones(1, 4, 3, 3))


def test_between_linear_layers() -> None:
    counts = run(lambda s, x: s.last(s.first(x.transpose(1, -1)).relu()[..., ORDER]))
    assert not counts["index"]
